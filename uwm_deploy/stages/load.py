"""Stage `load`: a checkpoint folder to towers, fail-closed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, CLIPConfig, CLIPModel
from transformers.utils import logging as transformers_logging

from uwm_deploy.errors import InputError, PrerequisiteError
from uwm_deploy.recipe import Recipe
from uwm_deploy.records import ImageSpec, ModelRef, TextSpec, TowerName
from uwm_deploy.towers.hf_clip import HfClipTower, random_clip
from uwm_deploy.towers.protocol import LoadedModel
from uwm_deploy.uwm.digests import digest_of_weights
from uwm_deploy.workspace import digest_of_bytes

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
transformers_logging.disable_progress_bar()  # progress is ours to show
_FILTERS: dict[int, Literal["bicubic", "bilinear"]] = {2: "bilinear", 3: "bicubic"}


def load_model(
    recipe: Recipe, *, folder: Path, weights: Literal["checkpoint", "random"] = "checkpoint", device: str = "auto"
) -> LoadedModel:
    """Loads both towers in float32, in evaluation mode, with attention in its plain form.

    Args:
        recipe: Names the family.
        folder: Hugging Face checkpoint folder.
        weights: `random` takes only the architecture from the folder; such a model never passes the gate.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: Missing, truncated or pickled checkpoint, missing or NaN weights, unsupported preprocessing.
        PrerequisiteError: If the device is not there.
    """
    where = resolve_device(device)
    config = _config(folder)
    model = random_clip(config) if weights == "random" else _checkpoint(folder, config)
    model.to(where)
    text, tokenizer_json = _text_spec(folder, int(config.text_config.max_position_embeddings))
    _check_end_token(config, text)
    ref = ModelRef(
        name=recipe.name,
        family=recipe.model.family,
        repo="random" if weights == "random" else _public_name(recipe.model.repo),
        revision=recipe.model.revision,
        weights_digest=digest_of_weights(dict(model.named_parameters())),
        embed_dim=int(config.projection_dim),
        image=_image_spec(folder),
        text=text,
    )
    image_tower = HfClipTower(model, TowerName.IMAGE, text.eos_id)
    text_tower = HfClipTower(model, TowerName.TEXT, text.eos_id)
    return LoadedModel(ref, model, image_tower, text_tower, tokenizer_json, folder)


def resolve_device(device: str) -> str:
    """Torch device for `auto`, `cpu` or `cuda`.

    Raises:
        PrerequisiteError: If CUDA is asked for and not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise PrerequisiteError("device cuda was asked for and this machine has none", fix="use --device cpu")
    if not device.startswith(("cpu", "cuda")):
        raise InputError(f"unknown device {device!r}", fix="use auto, cpu or cuda")
    return device


def _public_name(repo: str) -> str:
    """Hub ids and shipped models by name; a local folder's path is nobody's business."""
    return "local" if Path(repo).is_dir() else repo


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads((folder / name).read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"checkpoint {folder.name} has no readable {name}", fix="use a complete checkpoint") from error
    except ValueError as error:
        raise InputError(f"{folder.name}/{name} is not JSON: {error}", fix="fetch the checkpoint again") from error


def _config(folder: Path) -> CLIPConfig:
    kind = _json(folder, "config.json").get("model_type")
    if kind != "clip":
        raise InputError(
            f"checkpoint {folder.name} is of type {kind!r}", fix="family hf-clip needs a `clip` checkpoint"
        )
    return CLIPConfig.from_pretrained(folder)


def _checkpoint(folder: Path, config: CLIPConfig) -> CLIPModel:
    files = sorted(folder.glob("*.safetensors"))
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
    try:
        model, info = CLIPModel.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True,
            use_safetensors=True, local_files_only=True,
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        line = str(error).strip().splitlines()[0][:200]
        raise InputError(f"checkpoint {folder.name} does not fit its config: {line}", fix="fetch it again") from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"checkpoint {folder.name} lacks {len(missing)} weights, first {missing[0]}", fix="fetch it again"
        )
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(f"checkpoint {folder.name}: {name} holds NaN or infinity", fix="use an intact checkpoint")
    return cast(CLIPModel, model.eval())


def _check_end_token(config: CLIPConfig, text: TextSpec) -> None:
    """Both pooling rules in use for CLIP must find the tokenizer's end token.

    With eos_token_id 2 in the config the position of the *largest id* is pooled: right only if the end token has it.
    """
    pooled = int(config.text_config.eos_token_id)
    if pooled == 2 and text.eos_id == int(config.text_config.vocab_size) - 1:
        return
    if pooled != text.eos_id:
        raise InputError(
            f"config pools the text at token {pooled}, but the tokenizer ends texts with {text.eos_id}",
            fix="set text_config.eos_token_id to the tokenizer's end token",
        )


def _text_spec(folder: Path, positions: int) -> tuple[TextSpec, bytes]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        content = tokenizer.backend_tokenizer.to_str().encode()
    except Exception as error:  # transformers raises many types for a broken tokenizer
        line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(
            f"checkpoint {folder.name} has no usable tokenizer: {line}", fix="add its tokenizer.json"
        ) from error
    spec = TextSpec(
        context_length=positions,
        bos_id=int(tokenizer.bos_token_id),
        eos_id=int(tokenizer.eos_token_id),
        pad_id=int(tokenizer.pad_token_id),
        tokenizer_digest=digest_of_bytes(content),
    )
    return spec, content


def _image_spec(folder: Path) -> ImageSpec:
    body = _json(folder, "preprocessor_config.json")
    size, crop = body.get("size"), body.get("crop_size", body.get("size"))
    resize = size.get("shortest_edge") if isinstance(size, dict) else size
    side = crop.get("height", crop.get("shortest_edge")) if isinstance(crop, dict) else crop
    square = not isinstance(crop, dict) or crop.get("height") == crop.get("width")
    steps = [body.get(f"do_{step}", True) for step in ("resize", "center_crop", "rescale", "normalize")]
    resample = _FILTERS.get(body.get("resample", 3))
    if not (isinstance(resize, int) and isinstance(side, int) and square and all(steps) and resample):
        raise InputError(
            f"{folder.name}/preprocessor_config.json asks for preprocessing that is not supported",
            fix="it must resize the short edge, crop a square, rescale and normalise, bicubic or bilinear",
        )
    mean, std = (tuple(float(v) for v in body.get(key, ())) for key in ("image_mean", "image_std"))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise InputError(
            f"{folder.name}/preprocessor_config.json: image_mean or image_std", fix="give three values each"
        )
    return ImageSpec(
        resize=resize,
        crop=side,
        resample=resample,
        rescale=float(body.get("rescale_factor", 1 / 255)),
        mean=mean,
        std=std,
    )
