"""Every documented entry of a checkpoint's config files, missing and with values that nobody expects."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.made_once import made_once
from tests.small_folders import MAKERS, changed
from uwm_deploy.errors import ExitCode, InputError
from uwm_deploy.recipes.resolve import recipe_of
from uwm_deploy.towers.load import load_model

MISSING = object()
ODD: dict[str, tuple[Any, ...]] = {
    "missing": (MISSING,),
    "null": (None,),
    "wrong type": ("what", [3], {"a": 1}, 1.5, True),
    "out of range": (0, -1, 10**9),
}


class Entry(NamedTuple):
    """An entry of a JSON file: the file, and the keys on the way to it."""

    file: str
    keys: tuple[str, ...]


def _of_transformers(config: type, text: type, vision: type, processor: Any) -> list[Entry]:
    def fields(kind: type) -> list[str]:
        return [f.name for f in dataclasses.fields(kind) if not f.name.startswith("_")]

    image = [*processor.valid_kwargs.__annotations__, "image_processor_type"]
    tokenizer = (
        "tokenizer_class", "bos_token", "eos_token", "unk_token", "pad_token", "model_max_length", "padding_side",
        "truncation_side", "add_prefix_space", "clean_up_tokenization_spaces", "added_tokens_decoder", "model_input_names",
    )  # fmt: skip
    return [
        *(Entry("config.json", (key,)) for key in ["model_type", *fields(config)]),
        *(Entry("config.json", ("text_config", key)) for key in fields(text)),
        *(Entry("config.json", ("vision_config", key)) for key in fields(vision)),
        *(Entry("preprocessor_config.json", (key,)) for key in image),
        *(Entry("tokenizer_config.json", (key,)) for key in tokenizer),
    ]


def _of_open_clip() -> list[Entry]:
    from open_clip import CLIPTextCfg, CLIPVisionCfg
    from open_clip.coca_model import MultimodalCfg
    from open_clip.transform import PreprocessCfg

    from uwm_deploy.towers.open_clip import CONFIG

    tables = {"text_cfg": CLIPTextCfg, "vision_cfg": CLIPVisionCfg, "multimodal_cfg": MultimodalCfg}
    top = (
        "embed_dim", "text_cfg", "vision_cfg", "multimodal_cfg", "quick_gelu", "custom_text", "init_logit_scale",
        "init_logit_bias", "nonscalar_logit_scale", "output_dict",
    )  # fmt: skip
    return [
        *(Entry(CONFIG, (key,)) for key in ("model_cfg", "preprocess_cfg")),
        *(Entry(CONFIG, ("model_cfg", key)) for key in top),
        *(Entry(CONFIG, ("model_cfg", t, f.name)) for t, kind in tables.items() for f in dataclasses.fields(kind)),
        *(Entry(CONFIG, ("preprocess_cfg", field.name)) for field in dataclasses.fields(PreprocessCfg)),
    ]


def entries_of(library: str) -> list[Entry]:
    """Every entry that a library documents."""
    import transformers as t

    if library == "hf-clip":
        return _of_transformers(t.CLIPConfig, t.CLIPTextConfig, t.CLIPVisionConfig, t.CLIPImageProcessor)
    if library == "siglip":
        return _of_transformers(t.SiglipConfig, t.SiglipTextConfig, t.SiglipVisionConfig, t.SiglipImageProcessor)
    return _of_open_clip()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return lambda library: made_once(tmp_path_factory, f"small-{library}", MAKERS[library])


def with_value(body: dict[str, Any], keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The JSON with another value of one entry, or without it."""
    body = copy.deepcopy(body)
    table = body
    for key in keys[:-1]:
        table = table.setdefault(key, {})
    if value is MISSING:
        table.pop(keys[-1], None)
    else:
        table[keys[-1]] = value
    return body


def all_changes(library: str) -> Iterator[tuple[Entry, Any]]:
    """Every entry with every odd value."""
    return ((entry, value) for entry in entries_of(library) for values in ODD.values() for value in values)


def some_changes(library: str) -> Iterator[tuple[Entry, Any]]:
    """Every eighth entry, each with an odd value of the next kind."""
    kinds = list(ODD.values())
    return ((entry, kinds[number % len(kinds)][0]) for number, entry in enumerate(entries_of(library)[::8]))


def faults(source: Path, to: Path, changes: Iterable[tuple[Entry, Any]]) -> Iterator[tuple[str, str]]:
    """How each change ends: "loaded", "refused", or what is wrong about the end; with the change in words."""
    for entry, value in changes:
        body = json.loads((source / entry.file).read_text())
        changed(source, to, entry.file, with_value(body, entry.keys, value))
        words = f"{entry.file} {'.'.join(entry.keys)} = {'missing' if value is MISSING else json.dumps(value)}"
        yield end_of(to), words


def end_of(folder: Path) -> str:
    """How loading a folder ends."""
    try:
        load_model(recipe_of(str(folder))[0], folder=folder, device="cpu")
    except InputError as error:
        said = str(error)
        if "\n" in said or len(said) > 600 or not error.fix or error.exit_code != ExitCode.BAD_INPUT:
            return f"badly said: {said}"
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


@pytest.mark.parametrize("library", MAKERS)
def test_an_odd_entry_loads_or_is_refused_in_one_line(library: str, whole: Any, tmp_path: Path) -> None:
    """A sample; all of them take minutes."""
    _check(whole(library), tmp_path / "model", some_changes(library))


@pytest.mark.slow
@pytest.mark.parametrize("library", MAKERS)
def test_every_odd_entry_loads_or_is_refused_in_one_line(library: str, whole: Any, tmp_path: Path) -> None:
    """The printed counts are in docs/reference/models.md."""
    counts = _check(whole(library), tmp_path / "model", all_changes(library))
    entries = len(entries_of(library))
    print(
        f"{library}: {entries} entries, {counts.total()} changes, {counts['loaded']} loaded, {counts['refused']} refused"
    )


def _check(source: Path, to: Path, changes: Iterable[tuple[Entry, Any]]) -> Counter[str]:
    ends = list(faults(source, to, changes))
    counts = Counter(end for end, _ in ends)
    bad = [f"{words}: {end}" for end, words in ends if end not in ("loaded", "refused")]
    assert not bad, "\n".join(bad)
    assert counts["loaded"] > 0
    assert counts["refused"] > 0
    return counts
