"""Reads checkpoint folders, fail-closed: the checks and files that every model family needs before its own library."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from uwm_deploy.errors import InputError, unreadable
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.model import TextSpec
from uwm_deploy.records.plain_json import value_from_json
from uwm_deploy.records.tensor_file import open_tensors
from uwm_deploy.towers.protocol import MAPS
from uwm_deploy.towers.refusal import MEND, refusals

transformers_logging.disable_progress_bar()  # progress is ours to show

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def json_file(folder: Path, name: str) -> dict[str, Any]:
    """One JSON file of a checkpoint.

    Raises:
        InputError: If it is missing or broken.
    """
    with refusals(f"checkpoint {folder.name} has no readable {name}", fix="use a complete checkpoint"):
        content = (folder / name).read_bytes()
    with refusals(f"{folder.name}/{name} is not JSON", fix="fetch the checkpoint again"):
        body = value_from_json(content)
    return table(body, f"{folder.name}/{name}")


def table(value: object, where: str) -> dict[str, Any]:
    """A value of a JSON file that must be an object.

    Args:
        value: What the file has there.
        where: File and key, for the message.

    Raises:
        InputError: If it is something else.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where} is {json.dumps(value)[:60]}, not an object", fix="write { ... } with its entries")
    return value


def config_of_type(folder: Path, kinds: tuple[str, ...], family: str) -> dict[str, Any]:
    """Content of ``config.json``, of a type that the family knows.

    Raises:
        InputError: If it is of another type.
    """
    body = json_file(folder, "config.json")
    if body.get("model_type") not in kinds:
        raise InputError(
            f"checkpoint {folder.name} is of type {body.get('model_type')!r}",
            fix=f"family {family} needs a {' or '.join(f'`{k}`' for k in kinds)} checkpoint",
        )
    _refuse_quantised(folder, body)
    return body


def refuse_adapters(folder: Path) -> None:
    """Refuses an adapter beside the weights: a library adds it or not, depending on which packages are installed.

    Raises:
        InputError: If there is one.
    """
    if adapters := sorted(folder.glob("adapter_*")):
        raise InputError(
            f"checkpoint {folder.name} holds an adapter ({adapters[0].name}) that is not part of its weights",
            fix="merge it with peft (`PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(new)`), "
            "or remove its files to use the weights without it",
        )


def _refuse_quantised(folder: Path, body: Mapping[str, Any]) -> None:
    towers = {f"{key}.": part for key, part in body.items() if isinstance(part, dict)}
    for key, part in {"": body, **towers}.items():
        if part.get("quantization_config") is not None:
            raise InputError(
                f"{folder.name}/config.json has a {key}quantization_config: its weights are quantised",
                fix="use the checkpoint in float32 or bfloat16; --precision quantises what is built",
            )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each whole.

    Raises:
        InputError: If there are none, only pickles, an adapter beside them, or one is truncated.
    """
    refuse_adapters(folder)
    files = sorted(file for file in folder.glob("*.safetensors") if file.name != MAPS)
    if not files:
        if pickles := [f.name for f in sorted(folder.iterdir()) if f.suffix in _PICKLES]:
            raise InputError(
                f"{folder.name}/{pickles[0]} is a pickle, which can run code when it is loaded",
                fix="convert the checkpoint to safetensors",
            )
        raise InputError(f"checkpoint {folder.name} has no weights (*.safetensors)", fix="use a complete checkpoint")
    for file in files:
        with opened_weights(file) as opened:
            opened.keys()
    _check_index(folder, {file.name for file in files})
    return files


def _check_index(folder: Path, files: Set[str]) -> None:
    """Refuses an index that is broken, or names a file that is not there: part of the weights would be made up."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    where, fix = f"{folder.name}/{index.name}", "fetch it again"
    try:
        body = value_from_json(index.read_bytes())
    except OSError as error:
        raise unreadable(where, error, fix=fix, kind=InputError) from error
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}", fix=fix) from error
    named = body.get("weight_map") if isinstance(body, dict) else None
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise InputError(f"{where} does not say in which file a weight is", fix=fix)
    if lost := sorted(set(named.values()) - files):
        raise InputError(f"{where} names {lost[0]}, which is not there", fix=fix)


def opened_weights(file: Path) -> AbstractContextManager[Any]:
    """A file of a checkpoint's weights, see `open_tensors`.

    Raises:
        InputError: If it is truncated or broken.
    """
    return open_tensors(
        file, name=f"{file.parent.name}/{file.name}", said="is truncated or broken", fix="fetch it again"
    )


def pretrained(loader: Any, folder: Path, config: Any) -> Any:
    """A `transformers` model in float32, evaluation mode, attention in its plain form, with every weight from the file.

    Args:
        loader: A model class of `transformers`.
        folder: Checkpoint folder.
        config: Its config.

    Raises:
        InputError: If the checkpoint does not fit its config, lacks a weight, or holds NaN.
    """
    weight_files(folder)
    check_amount(folder, "config.json", lambda: loader._from_config(copy.deepcopy(config)))
    with fits(folder, "config.json"), _without_reports():
        model, info = loader.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, use_safetensors=True,
            local_files_only=True, ignore_mismatched_sizes=True, config=config,
        )  # fmt: skip
    if mismatched := sorted(info["mismatched_keys"]):
        name, *shapes = mismatched[0]
        held, described = (tuple(shape) for shape in shapes)
        raise InputError(
            f"checkpoint {folder.name} does not fit its config.json: {name} has shape {held} in the files, and the config "
            f"describes {described}",
            fix="correct the sizes in config.json, or fetch the checkpoint again",
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"checkpoint {folder.name} lacks {len(missing)} weights, first {missing[0]}", fix="fetch it again"
        )
    if unread := sorted(name for name in info["unexpected_keys"] if ".layers." in name):
        raise InputError(
            f"checkpoint {folder.name} holds {len(unread)} weights of layers beyond its config.json, first {unread[0]}",
            fix="correct num_hidden_layers, or fetch the checkpoint again",
        )
    check_finite(folder, model.named_parameters())
    return model.eval()


@contextlib.contextmanager
def _without_reports() -> Iterator[None]:
    """Without the library's own warnings and tables of what does not fit: what matters of them is one line of ours."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def fits(folder: Path, config: str) -> AbstractContextManager[None]:
    """Block in which weights are loaded into what a config describes.

    Args:
        folder: Checkpoint folder.
        config: Name of the file.
    """
    return refusals(f"checkpoint {folder.name} does not fit its {config}", fix=MEND)


def _shapes(folder: Path) -> list[tuple[int, ...]]:
    """Shape of every tensor in the files."""
    shapes = []
    for file in weight_files(folder):
        with opened_weights(file) as opened:
            shapes += [tuple(opened.get_slice(name).get_shape()) for name in opened.keys()]  # noqa: SIM118
    return shapes


def check_amount(folder: Path, config: str, make: Callable[[], Module]) -> None:
    """Refuses a config that describes far more weights than the files hold, before memory is taken for them.

    Up to twice as many are let pass: a library may fit positions to another size of image by itself, and compares shapes.

    Args:
        folder: Checkpoint folder.
        config: Name of its file.
        make: Makes the model; called where tensors take no memory.

    Raises:
        InputError: If it does, or the model cannot be made.
    """

    def entries() -> dict[str, Any]:
        return json_file(folder, config)

    what = f"{folder.name}/{config} describes no model that can be made"
    with refusals(what, entries=entries), torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in make().parameters())
    held = sum(math.prod(shape) for shape in _shapes(folder))
    if wanted > 2 * held:
        raise InputError(
            f"{folder.name}/{config} describes {wanted} weights, and the checkpoint holds {held}", fix=MEND
        )


def config_from(loader: Any, folder: Path, *, random: bool) -> Any:
    """The config of a `transformers` model with two towers, with its defaults for missing entries.

    Args:
        loader: A config class of `transformers`.
        folder: Checkpoint folder.
        random: Whether its weights will not be read.

    Raises:
        InputError: If an entry has a type or a value that the library refuses, or asks for absurdly many layers.
    """
    with refusals(f"{folder.name}/config.json cannot be used"), _without_reports():
        config = loader.from_pretrained(folder)
    for part in ("text_config", "vision_config"):
        if not random:
            layers = getattr(config, part).num_hidden_layers
            check_layers(folder, layers, f"{folder.name}/config.json: {part}.num_hidden_layers")
    return config


def check_layers(folder: Path, layers: object, where: str) -> None:
    """Refuses more layers than the files hold tensors: to make them would take hours before a library compares.

    Args:
        folder: Checkpoint folder.
        layers: What the config says.
        where: Its file and key, for the message.

    Raises:
        InputError: If there are more.
    """
    held = len(_shapes(folder))
    if isinstance(layers, (int, float)) and layers > held:
        raise InputError(f"{where} is {layers}, and the checkpoint holds {held} tensors", fix=MEND)


def check_finite(folder: Path, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Refuses weights with NaN or infinity.

    Args:
        folder: Checkpoint folder, for the message.
        parameters: Names and tensors, any floating dtype, any shape.

    Raises:
        InputError: If a tensor has such an entry.
    """
    for name, parameter in parameters:
        if not all(bool(end.isfinite()) for end in parameter.aminmax()):  # one pass; NaN wins over every number
            raise InputError(f"checkpoint {folder.name}: {name} holds NaN or infinity", fix="use an intact checkpoint")


_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Files that a vocabulary is read from: one of these sets is needed. Without, the library makes an empty one."""


def tokenizer_of(folder: Path) -> Any:
    """The checkpoint's tokenizer, of the kind that a `tokenizer.json` describes.

    Raises:
        InputError: If it is missing or broken.
    """
    fix = "copy the tokenizer files of the model that it was made from"
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        raise InputError(
            f"checkpoint {folder.name} has no tokenizer: no tokenizer.json, and no vocab.json with merges.txt", fix=fix
        )
    with refusals(f"checkpoint {folder.name} has no usable tokenizer", fix=fix):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.backend_tokenizer.to_str()
    check_vocabulary(tokenizer, folder)
    return tokenizer


def check_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Refuses a tokenizer that knows no word: what its ids then do not fit is no help to whoever reads it.

    Args:
        tokenizer: Of `transformers`.
        folder: Checkpoint folder, for the message.

    Raises:
        InputError: If its vocabulary is empty, but for special tokens and what was added.
    """
    backend = tokenizer.backend_tokenizer
    added = {str(token) for token in backend.get_added_tokens_decoder().values()}
    if not set(backend.get_vocab(with_added_tokens=False)) - added - set(tokenizer.all_special_tokens):
        raise InputError(
            f"checkpoint {folder.name} has a tokenizer without a vocabulary: it knows no word, only special tokens",
            fix="copy the tokenizer files of the model that it was made from",
        )


def text_spec(tokenizer: Any, positions: int, where: str, *, fixed_length: bool = False) -> tuple[TextSpec, bytes]:
    """Spec of a `transformers` tokenizer, and the content of its `tokenizer.json`.

    Args:
        tokenizer: The tokenizer.
        positions: Length of a row.
        where: Name of the checkpoint, for messages.
        fixed_length: See `TextSpec`.

    Raises:
        InputError: If it has no end token or no padding token, or cuts long captions at their start.
    """
    if tokenizer.truncation_side != "right":
        raise InputError(
            f"{where}: the tokenizer cuts long captions on the {tokenizer.truncation_side}, which is not supported",
            fix='set truncation_side to "right" in tokenizer_config.json',
        )
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("eos", "pad")}
    for name, number in ids.items():
        if not isinstance(number, int):
            raise InputError(
                f"{where}: the tokenizer has no {name}_token",
                fix=f"name it in tokenizer_config.json as {name}_token; its vocabulary must hold it",
            )
    content: bytes = tokenizer.backend_tokenizer.to_str().encode()
    spec = TextSpec(
        context_length=positions,
        eos_id=ids["eos"],
        pad_id=ids["pad"],
        padding_side=tokenizer.padding_side,
        fixed_length=fixed_length,
        tokenizer_digest=digest_of_bytes(content),
    )
    return spec, content


_NOT_SIDE = ("config.json", "model.safetensors.index.json", "training.json")
"""Files that are not copied beside a saved model; the last is the training record of that folder's own weights."""


def copy_side_files(source: Path, folder: Path) -> None:
    """Copies tokenizer and preprocessor files into a folder to which a model was saved."""
    for file in sorted(source.glob("*")):
        if file.suffix in (".json", ".txt") and file.name not in _NOT_SIDE:
            shutil.copyfile(file, folder / file.name)


def readable(folder: Path) -> None:
    """Makes the files of a folder readable for all: libraries save with a mode that only the writer can read."""
    for file in folder.iterdir():
        file.chmod(0o644)
