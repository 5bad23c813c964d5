"""What is loaded depends on the files of a checkpoint alone, and what does not fit is said in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from tests.made_once import made_once
from tests.small_folders import MAKERS, OPEN_CLIP, SIDE, WIDTH, changed, open_clip
from uwm_deploy.errors import ExitCode, InputError, PrerequisiteError
from uwm_deploy.pipeline.plan import plan_of
from uwm_deploy.pipeline.request import Request
from uwm_deploy.recipes.built import text_of_built
from uwm_deploy.recipes.recipe import recipe_from_toml
from uwm_deploy.recipes.resolve import recipe_of
from uwm_deploy.recipes.shipped import checkpoint_folder, names
from uwm_deploy.runtime.image import pixels_from_image
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.towers import refusal
from uwm_deploy.towers.library import library_of
from uwm_deploy.towers.load import load_model
from uwm_deploy.towers.protocol import LoadedModel, caption_tokens

CONFIG = "open_clip_config.json"
Folder = Callable[[str], Path]


@pytest.fixture
def copy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A folder of a library that the test may change."""
    return lambda library: Path(
        shutil.copytree(made_once(tmp_path_factory, f"small-{library}", MAKERS[library]), tmp_path / "model")
    )


def load(folder: Path) -> LoadedModel:
    return load_model(recipe_of(str(folder))[0], folder=folder, device="cpu")


def change(folder: Path, file: str, *keys: str, to: Any) -> Path:
    """Another value of one entry."""
    body = json.loads((folder / file).read_text())
    table = body
    for key in keys[:-1]:
        table = table[key]
    table[keys[-1]] = to
    (folder / file).write_text(json.dumps(body))
    return folder


LISTED: dict[str, tuple[str, str, tuple[str, ...], Any, str]] = {
    "unknown entry": ("open-clip", CONFIG, ("model_cfg", "text_cfg", "hedas"), 2, "unknown entry 'hedas'; did you"),
    "proj_type none with a projection": (
        "open-clip", CONFIG, ("model_cfg", "text_cfg", "proj_type"), "none", "text_projection",
    ),
    "heads that do not divide": ("open-clip", CONFIG, ("model_cfg", "text_cfg", "heads"), 3, "divisible by num_heads"),
    "CLIP's heads that do not divide": ("hf-clip", "config.json", ("text_config", "num_attention_heads"), 3, "multiple"),
    "unknown activation": ("hf-clip", "config.json", ("vision_config", "hidden_act"), "gelu9", "gelu9"),
    "quantised": ("hf-clip", "config.json", ("quantization_config",), {"quant_method": "bitsandbytes"}, "are quantised"),
    "no end token": ("hf-clip", "config.json", ("text_config", "eos_token_id"), None, "pools the text at token null"),
    "a list of end tokens": ("hf-clip", "config.json", ("text_config", "eos_token_id"), [906], r"at token \[906\]"),
    "no pad token": ("hf-clip", "tokenizer_config.json", ("pad_token",), None, "no pad_token"),
    "left padding": ("hf-clip", "tokenizer_config.json", ("padding_side",), "left", 'set padding_side to "right"'),
    "no mean": ("hf-clip", "preprocessor_config.json", ("image_mean",), [0.5, None, 0.5], "image_mean is"),
    "another crop": (
        "hf-clip", "preprocessor_config.json", ("crop_size",), {"height": 24, "width": 24}, "24 pixels, .*image_size is 16",
    ),
    "padded images": ("hf-clip", "preprocessor_config.json", ("do_pad",), True, "not supported"),
    "cuts at the start": ("hf-clip", "tokenizer_config.json", ("truncation_side",), "left", "set truncation_side to"),
    "cuts SigLIP at the start": ("siglip", "tokenizer_config.json", ("truncation_side",), "left", "set truncation_side to"),
    "a flag in words": ("open-clip", CONFIG, ("model_cfg", "quick_gelu"), "false", 'quick_gelu is "false"; it must be true'),
    "pools at a token that no caption has": (
        "open-clip", CONFIG, ("model_cfg", "text_cfg", "pool_type"), "eos", "the same embedding for every caption",
    ),
    "does not pool": ("open-clip", CONFIG, ("model_cfg", "text_cfg", "pool_type"), "none", r"shape \(2, 16, 8\)"),
    "captions cleaned otherwise": (
        "open-clip", CONFIG, ("model_cfg", "text_cfg", "tokenizer_kwargs"), {"clean": "canonicalize"}, "cleaned in another",
    ),
    "fewer layers than the files": ("siglip", "config.json", ("text_config", "num_hidden_layers"), 0, "beyond its config"),
    "absurdly many layers": ("open-clip", CONFIG, ("model_cfg", "vision_cfg", "layers"), 10**9, "holds 38 tensors"),
    "no head": ("siglip", "config.json", ("vision_config", "vision_use_head"), False, "vision_use_head is false"),
    "type is a list": ("hf-clip", "config.json", ("model_type",), ["clip"], "is of type"),
    "another table of words": ("siglip", "config.json", ("text_config", "vocab_size"), 100, r"\(512, 16\) in the files"),
}  # fmt: skip


def test_the_size_of_open_clips_images_is_the_models(copy: Folder) -> None:
    """open_clip itself puts it in place of another one in `preprocess_cfg`."""
    assert load(change(copy("open-clip"), CONFIG, "preprocess_cfg", "size", to=24)).ref.image.crop == 16


@pytest.mark.parametrize("case", LISTED)
def test_a_value_that_nobody_expects_is_said_in_one_line(case: str, copy: Folder) -> None:
    """What, in which file, and how to mend it."""
    library, file, keys, value, message = LISTED[case]
    folder = change(copy(library), file, *keys, to=value)
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert caught.value.exit_code is ExitCode.BAD_INPUT
    assert caught.value.fix
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("library", "keys", "message"),
    [
        ("open-clip", ("model_cfg", "embed_dim"), "has no embed_dim"),
        ("open-clip", ("model_cfg", "text_cfg"), "text_cfg is null, not an object"),
        ("open-clip", ("model_cfg",), "model_cfg is null, not an object"),
    ],
)
def test_a_missing_table_is_named(library: str, keys: tuple[str, ...], message: str, copy: Folder) -> None:
    """And so is the missing size of the embedding."""
    folder = copy(library)
    body = json.loads((folder / CONFIG).read_text())
    table = body
    for key in keys[:-1]:
        table = table[key]
    del table[keys[-1]]
    (folder / CONFIG).write_text(json.dumps(body))
    with pytest.raises(InputError, match=message):
        load(folder)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["[1, 2]", "null", "[" * 100_000, "\xff{"])
def test_json_that_is_no_table_is_refused(file: str, content: str, copy: Folder) -> None:
    """A list, nothing, endless brackets, no text."""
    folder = copy("hf-clip")
    (folder / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError):
        load(folder)


def test_a_failing_disk_is_no_fault_of_the_checkpoint() -> None:
    """Exit code 6 where the machine failed; another where a file is missing."""
    for error, kind in (
        (OSError(5, "Input/output error"), PrerequisiteError),
        (PermissionError(13, "Permission denied"), PrerequisiteError),
        (FileNotFoundError(2, "gone"), InputError),
    ):
        with pytest.raises(kind), refusal.refusals("x"):
            raise error
    with pytest.raises(PrerequisiteError, match="memory"), refusal.refusals("x"):
        raise MemoryError
    with pytest.raises(KeyboardInterrupt), refusal.refusals("x"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("library", ["hf-clip", "siglip"])
def test_processor_config_is_read_as_the_library_reads_it(library: str, copy: Folder) -> None:
    """Nested, as its release 5 writes it; it counts before the older file, and one without settings does not."""
    folder = copy(library)
    wanted, old = load(folder).ref.image, folder / "preprocessor_config.json"
    body = json.loads(old.read_text())
    newer = folder / "processor_config.json"
    newer.write_text(json.dumps({"image_processor": body, "processor_class": "Processor"}))
    old.unlink()
    assert load(folder).ref.image == wanted
    old.write_text(json.dumps({**body, "image_mean": [0.1, 0.1, 0.1]}))
    assert load(folder).ref.image == wanted
    newer.write_text(json.dumps({"processor_class": "Processor"}))
    assert load(folder).ref.image.mean == (0.1, 0.1, 0.1)


@pytest.mark.parametrize("library", ["hf-clip", "siglip"])
def test_missing_preprocessing_entries_are_the_librarys_defaults(library: str, copy: Folder) -> None:
    """Mean, deviation, filter and factor, which each class has of its own."""
    import transformers

    folder = copy(library)
    known = json.loads((folder / "preprocessor_config.json").read_text())
    sizes = {key: known[key] for key in ("size", "crop_size") if known.get(key)}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes))
    default = {"hf-clip": transformers.CLIPImageProcessor, "siglip": transformers.SiglipImageProcessor}[library]()
    found = load(folder).ref.image
    assert found.mean == tuple(default.image_mean)
    assert found.std == tuple(default.image_std)
    assert found.rescale == default.rescale_factor
    assert found.resample == "bicubic"


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("library", MAKERS)
def test_an_adapter_beside_the_weights_is_refused(library: str, file: str, copy: Folder) -> None:
    """Whether peft is installed or not, with its config or without."""
    folder = copy(library)
    (folder / file).write_text("{}")
    with pytest.raises(InputError, match=r"adapter.*merge"):
        load(folder)


def test_a_tokenizer_without_files_is_refused(copy: Folder) -> None:
    """The library would make an empty one, of which every caption is one word."""
    folder = copy("hf-clip")
    words = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer: no tokenizer\.json, and no vocab\.json"):
        load(folder)
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(InputError, match="has no tokenizer"):
        load(folder)
    body = json.loads(words)
    body["model"] |= {"vocab": {"<|startoftext|>": 905, "<|endoftext|>": 906}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(body))
    with pytest.raises(InputError, match="without a vocabulary"):
        load(folder)


def test_tokens_of_left_padding_are_those_of_the_mask(copy: Folder) -> None:
    """SigLIP has no mask and may pad on the left; its end token counts, although it is the padding."""
    from transformers import PreTrainedTokenizerFast

    folder = change(copy("siglip"), "tokenizer_config.json", "padding_side", to="left")
    model, captions = load(folder), ["a cat", "", "two dogs"]
    ids = torch.from_numpy(Tokenizer(model.tokenizer_json, model.ref.text).encode(captions))
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)(captions, padding="max_length", max_length=32)
    assert ids.tolist() == theirs["input_ids"]
    assert caption_tokens(model.ref.text)(ids, None).int().tolist() == theirs["attention_mask"]


@pytest.mark.parametrize(
    "text",
    [
        {"no_causal_mask": True},
        {"pool_type": "last"},
        {"pool_type": "last", "custom": True},
        {"pool_type": "eos", "eos_id": 49407, "proj_type": "none"},
    ],
    ids=str,
)
def test_what_open_clip_can_make_embeds_as_it_does(text: dict[str, Any], tmp_path: Path) -> None:
    """Rows whose padding counts are marked, and no others are."""
    import open_clip as library

    own = {key: value for key, value in text.items() if key != "custom"}
    config = {"embed_dim": WIDTH, "custom_text": "custom" in text, "text_cfg": {**OPEN_CLIP["text_cfg"], **own}}
    model = load(open_clip(tmp_path / "model", **config))
    theirs = library.create_model(f"local-dir:{tmp_path / 'model'}").eval()
    ids = torch.from_numpy(Tokenizer(model.tokenizer_json, model.ref.text).encode(["a cat", "two dogs and a bird"]))
    with torch.inference_mode():
        torch.testing.assert_close(model.text.embed(ids), theirs.encode_text(ids), rtol=1e-4, atol=1e-5)
        if "custom" not in text:  # its tower takes no shorter rows
            cut = model.text.embed(ids[:, :8])
            assert torch.allclose(cut, theirs.encode_text(ids), rtol=1e-4, atol=1e-5) is ("eos_id" in text)
    assert model.text.pools_at_end is ("eos_id" in text)
    assert model.ref.text.fixed_length is ("custom" in text or "eos_id" not in text)


def test_a_coca_folder_gets_the_rules_of_coca(tmp_path: Path) -> None:
    """Its text tower is a module of its own, so its layers have other names; so has a CLIP with such a tower."""
    decoder = {**OPEN_CLIP["text_cfg"], "attn_pooler_heads": 2, "mlp_ratio": 4}
    vision = {**OPEN_CLIP["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = {**OPEN_CLIP["text_cfg"], "embed_cls": True, "output_tokens": True}
    cases = {
        "coca": {"multimodal_cfg": decoder, "vision_cfg": vision, "text_cfg": text},
        "clip": {"custom_text": True},
    }
    for name, config in cases.items():
        folder = open_clip(tmp_path / name, **config)
        recipe, model = recipe_of(str(folder))[0], load(folder)
        assert model.architecture == name
        assert len(model.text.layers(recipe.entries.text.layers)) == 1
        assert len(model.image.layers(recipe.entries.image.layers)) == 1


def test_the_recipe_names_what_is_built(copy: Folder) -> None:
    """A folder by --model and by --checkpoint, and another commit: never the repository that the rules were written for."""
    folder = copy("hf-clip")
    for request in (Request(model=str(folder)), Request(model="clip-vit-b32", checkpoint=folder)):
        plan = plan_of(request)
        told = recipe_from_toml(plan.recipe_text, where="bundle").model
        assert (told.repo, told.revision) == ("local", "")
        assert "openai" not in plan.recipe_text.lower()
        assert str(folder) not in plan.recipe_text
    told = recipe_from_toml(plan_of(Request(model=str(folder))).recipe_text, where="bundle")
    assert (told.name, told.model.parameters, told.model.architecture) == ("model", "", None)
    other = plan_of(Request(model="clip-vit-b32", revision="f" * 40)).recipe_text
    assert recipe_from_toml(other, where="bundle").model.revision == "f" * 40
    with pytest.raises(InputError, match=r"came from a folder.*--checkpoint"):
        checkpoint_folder("local", "")


@pytest.mark.parametrize("name", names("export"))
def test_a_recipe_for_another_model_keeps_its_rules(name: str, tmp_path: Path) -> None:
    """Everything but the model is as it was; of the same model the text is as it was, too."""
    recipe, text = recipe_of(name)
    assert text_of_built(text, recipe) == text
    model = dataclasses.replace(recipe.model, repo=str(tmp_path), revision="")
    other = dataclasses.replace(recipe, name="other-1", model=model)
    again = recipe_from_toml(text_of_built(text, other), where="again")
    assert again == dataclasses.replace(other, model=dataclasses.replace(model, repo="local"))


def test_links_of_a_changed_folder_are_whole(copy: Folder, tmp_path: Path) -> None:
    """What the sweep starts from loads, so that a refusal is of the change."""
    folder = copy("siglip")
    body = json.loads((folder / "config.json").read_text())
    assert load(changed(folder, tmp_path / "linked", "config.json", body)).ref.image.crop == SIDE


@pytest.mark.parametrize(
    ("key", "name", "kind"),
    [
        ("image_processor_type", "SiglipImageProcessor", "Siglip"),
        ("image_processor_type", "SiglipImageProcessorFast", "Siglip"),
        ("image_processor_type", "ViTImageProcessor", "ViT"),
        ("image_processor_type", "ViTImageProcessorFast", "ViT"),
        ("feature_extractor_type", "ViTFeatureExtractor", "ViT"),
        ("image_processor_type", "BlipImageProcessor", "Blip"),
        ("feature_extractor_type", "CLIPFeatureExtractor", "CLIP"),
        ("image_processor_type", "BitImageProcessorFast", "Bit"),
    ],
)
@pytest.mark.parametrize("library", ["hf-clip", "siglip"])
def test_images_are_prepared_by_the_class_that_the_file_names(
    library: str, key: str, name: str, kind: str, copy: Folder
) -> None:
    """With that class's mean, filter and crop, whatever type of model it stands beside; as the library itself does it."""
    import transformers

    folder = copy(library)
    short = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    sizes = short if kind in ("CLIP", "Bit") else {"size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps({key: name, **sizes}))
    (folder / "processor_config.json").unlink(missing_ok=True)
    model = load(folder)
    wanted, found = getattr(transformers, f"{kind}ImageProcessorPil")(), model.ref.image
    assert (found.mean, found.std) == (tuple(wanted.image_mean), tuple(wanted.image_std))
    assert found.resample == {2: "bilinear", 3: "bicubic"}[wanted.resample]
    assert found.fit == ("crop" if wanted.do_center_crop else "squash")
    levels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    reference = library_of(recipe_of(str(folder))[0].model.family, model.source, folder, model.ref.text)
    theirs = reference.pixels(Image.fromarray(levels))
    np.testing.assert_allclose(pixels_from_image(Image.fromarray(levels), found), theirs, atol=0.03)


@pytest.mark.parametrize(
    "body",
    [
        {"image_processor_type": "CLIPImageProcesor"},
        {"image_processor_type": "ConvNextImageProcessor"},
        {"image_processor_type": ["CLIPImageProcessor"]},
        {"feature_extractor_type": "WhisperFeatureExtractor"},
        {"auto_map": {"AutoImageProcessor": "image_processing.Own"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_a_class_of_unknown_steps_is_refused(body: dict[str, Any], file: str, copy: Folder) -> None:
    """A misspelt one, one with steps of its own, code that came with the files: the library would take CLIP's instead."""
    folder = copy("hf-clip")
    sizes = json.loads((folder / "preprocessor_config.json").read_text())
    settings = {key: value for key, value in sizes.items() if key != "image_processor_type"} | body
    nested = settings if file == "preprocessor_config.json" else {"image_processor": settings}
    (folder / file).write_text(json.dumps(nested))
    with pytest.raises(
        InputError, match=rf"model/{file}: {next(iter(body))} is .* not known; name the one that"
    ) as caught:
        load(folder)
    assert caught.value.exit_code is ExitCode.BAD_INPUT


def test_the_config_of_the_model_names_the_class_where_the_settings_do_not(copy: Folder) -> None:
    """As the library looks it up."""
    folder = change(copy("hf-clip"), "config.json", "image_processor_type", to="SiglipImageProcessor")
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": SIDE, "width": SIDE}}))
    assert load(folder).ref.image.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("library", "files"),
    [("hf-clip", "tokenizer.json"), ("siglip", "tokenizer.json"), ("hf-clip", "vocab.json and merges.txt")],
)
def test_a_tokenizer_that_knows_no_word_is_said_to_have_no_vocabulary(library: str, files: str, copy: Folder) -> None:
    """And not what its ids do not fit: the advice would be wrong, and lead from one error to the next."""
    folder = copy(library)
    if files == "tokenizer.json":
        body = json.loads((folder / files).read_text())
        body["model"] |= {"vocab": {}, "merges": []}
        (folder / files).write_text(json.dumps(body))
    else:
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text("{}")
        (folder / "merges.txt").write_text("")
    with pytest.raises(InputError, match=r"has a tokenizer without a vocabulary.*copy the tokenizer files"):
        load(folder)


@pytest.mark.parametrize(
    ("library", "file", "keys", "value"),
    [
        ("hf-clip", "config.json", ("text_config", "hidden_act"), "swish9"),
        ("siglip", "config.json", ("vision_config", "hidden_act"), "gelu_fancy"),
    ],
)
@pytest.mark.parametrize("weights", ["checkpoint", "random"])
def test_a_value_that_is_looked_up_in_vain_is_named_with_its_key(
    library: str, file: str, keys: tuple[str, ...], value: str, weights: Literal["checkpoint", "random"], copy: Folder
) -> None:
    """The library says the value only."""
    folder = change(copy(library), file, *keys, to=value)
    with pytest.raises(InputError, match=rf'{".".join(keys)} is "{value}", which the library does not know'):
        load_model(recipe_of(str(folder))[0], folder=folder, device="cpu", weights=weights)


def test_a_recipes_activation_is_named_with_its_key() -> None:
    """So it is where no checkpoint is read."""
    recipe = recipe_of("clip-vit-b32")[0]
    tables = dataclasses.replace(recipe.model.architecture, text={"hidden_act": "swish9", "num_hidden_layers": 1})
    wrong = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, architecture=tables))
    with pytest.raises(InputError, match=r'text\.hidden_act is "swish9", which the library does not know'):
        load_model(wrong, folder=None, weights="random", device="cpu")


@pytest.mark.parametrize("library", ["hf-clip", "siglip"])
@pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
@pytest.mark.parametrize("keys", [(), ("text_config",), ("vision_config",)])
def test_quantised_towers_are_refused(library: str, method: str, keys: tuple[str, ...], copy: Folder) -> None:
    """Wherever the config says so, and before the library asks for a package."""
    folder = change(copy(library), "config.json", *keys, "quantization_config", to={"quant_method": method})
    name = ".".join([*keys, "quantization_config"])
    with pytest.raises(InputError, match=f"config.json has a {name}: its weights are quantised"):
        load(folder)
