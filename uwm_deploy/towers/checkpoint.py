"""Reads checkpoint folders, fail-closed: the checks and files that every model family needs before its own library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from uwm_deploy.errors import InputError
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.model import ImageSpec, TextSpec
from uwm_deploy.towers.protocol import MAPS

transformers_logging.disable_progress_bar()  # progress is ours to show

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FILTERS: dict[int, Literal["bicubic", "bilinear"]] = {2: "bilinear", 3: "bicubic"}


def json_file(folder: Path, name: str) -> dict[str, Any]:
    """One JSON file of a checkpoint.

    Raises:
        InputError: If it is missing or broken.
    """
    try:
        return cast(dict[str, Any], json.loads((folder / name).read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"checkpoint {folder.name} has no readable {name}", fix="use a complete checkpoint") from error
    except ValueError as error:
        raise InputError(f"{folder.name}/{name} is not JSON: {error}", fix="fetch the checkpoint again") from error


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
    return body


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each whole.

    Raises:
        InputError: If there are none, only pickles, or one is truncated.
    """
    files = sorted(file for file in folder.glob("*.safetensors") if file.name != MAPS)
    if not files:
        if pickles := [f.name for f in sorted(folder.iterdir()) if f.suffix in _PICKLES]:
            raise InputError(
                f"{folder.name}/{pickles[0]} is a pickle, which can run code when it is loaded",
                fix="convert the checkpoint to safetensors",
            )
        raise InputError(f"checkpoint {folder.name} has no weights (*.safetensors)", fix="use a complete checkpoint")
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{folder.name}/{file.name} is truncated or broken: {error}", fix="fetch it again"
            ) from error
    return files


def pretrained(loader: Any, folder: Path, **options: Any) -> Any:
    """A `transformers` model in float32, evaluation mode, attention in its plain form, with every weight from the file.

    Args:
        loader: A model class of `transformers`.
        folder: Checkpoint folder.
        options: Passed on to `from_pretrained`.

    Raises:
        InputError: If the checkpoint does not fit its config, lacks a weight, or holds NaN.
    """
    import torch

    weight_files(folder)
    try:
        model, info = loader.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, use_safetensors=True,
            local_files_only=True, **options,
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise does_not_fit(folder, error) from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"checkpoint {folder.name} lacks {len(missing)} weights, first {missing[0]}", fix="fetch it again"
        )
    check_finite(folder, model.named_parameters())
    return model.eval()


def does_not_fit(folder: Path, error: Exception) -> InputError:
    """The error for weights that do not fit their config."""
    line = str(error).strip().splitlines()[0][:200]
    return InputError(f"checkpoint {folder.name} does not fit its config: {line}", fix="fetch it again")


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


def tokenizer_of(folder: Path) -> Any:
    """The checkpoint's tokenizer, of the kind that a `tokenizer.json` describes.

    Raises:
        InputError: If it is missing or broken.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # transformers raises many types for a broken tokenizer
        line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(
            f"checkpoint {folder.name} has no usable tokenizer: {line}", fix="add its tokenizer.json"
        ) from error
    return tokenizer


def text_spec(tokenizer: Any, positions: int, *, fixed_length: bool = False) -> tuple[TextSpec, bytes]:
    """Spec of a `transformers` tokenizer, and the content of its `tokenizer.json`."""
    content: bytes = tokenizer.backend_tokenizer.to_str().encode()
    spec = TextSpec(
        context_length=positions,
        eos_id=int(tokenizer.eos_token_id),
        pad_id=int(tokenizer.pad_token_id),
        padding_side=tokenizer.padding_side,
        fixed_length=fixed_length,
        tokenizer_digest=digest_of_bytes(content),
    )
    return spec, content


def image_spec(folder: Path) -> ImageSpec:
    """Preprocessing that ``preprocessor_config.json`` asks for.

    Raises:
        InputError: If the runtime does not support it.
    """
    body = json_file(folder, "preprocessor_config.json")
    size, crop = body.get("size"), body.get("crop_size", body.get("size"))
    squash = isinstance(size, dict) and "height" in size and not body.get("do_center_crop", False)
    resize = size.get("height" if squash else "shortest_edge") if isinstance(size, dict) else size
    side = resize if squash else crop.get("height", crop.get("shortest_edge")) if isinstance(crop, dict) else crop
    square = all(not isinstance(s, dict) or s.get("height") == s.get("width") for s in ((size,) if squash else (crop,)))
    steps = [body.get(f"do_{step}", True) for step in ("resize", "rescale", "normalize")]
    steps.append(squash or body.get("do_center_crop", True))
    resample = _FILTERS.get(body.get("resample", 3))
    if not (isinstance(resize, int) and isinstance(side, int) and square and all(steps) and resample):
        raise InputError(
            f"{folder.name}/preprocessor_config.json asks for preprocessing that is not supported",
            fix="it must resize (short edge and a square crop, or to a square), rescale and normalise, bicubic or bilinear",
        )
    name = f"{folder.name}/preprocessor_config.json: image_mean or image_std"
    mean, std = (three(body.get(key, ()), name) for key in ("image_mean", "image_std"))
    if min(std) <= 0:
        raise InputError(f"{name} is not positive", fix="give three positive values")
    return ImageSpec(
        resize=resize,
        crop=side,
        resample=resample,
        rescale=float(body.get("rescale_factor", 1 / 255)),
        mean=mean,
        std=std,
        fit="squash" if squash else "crop",
    )


def three(values: Iterable[float], where: str) -> tuple[float, float, float]:
    """One number per colour channel.

    Raises:
        InputError: If there are not three.
    """
    numbers = [float(value) for value in values]
    if len(numbers) != 3:
        raise InputError(f"{where}: {len(numbers)} values", fix="give three values, one per channel")
    return numbers[0], numbers[1], numbers[2]


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
