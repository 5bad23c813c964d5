"""A checkpoint, or an architecture with random weights, to towers."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import nn

from uwm_deploy.errors import InputError, PrerequisiteError
from uwm_deploy.recipes.recipe import Architecture, Family, Recipe, public_repo
from uwm_deploy.records.model import ModelRef
from uwm_deploy.runtime.memory import without_collection
from uwm_deploy.towers.checkpoint import json_file
from uwm_deploy.towers.digests import digest_of_weights
from uwm_deploy.towers.embedding_map import load_maps
from uwm_deploy.towers.first_rows import check_first_rows
from uwm_deploy.towers.protocol import MAPS, LoadedModel, LoadedParts
from uwm_deploy.towers.refusal import refusals
from uwm_deploy.towers.token_table import with_vocabulary

_ADAPTERS: dict[Family, str] = {
    "hf-clip": "uwm_deploy.towers.hf_clip",
    "siglip": "uwm_deploy.towers.siglip",
    "open-clip": "uwm_deploy.towers.open_clip",
    "llava": "uwm_deploy.towers.llava",
}
"""Module per family, by its whole name, so that the sources a stage reaches can be read from the code. A module is
imported when it is asked for, since each brings a library."""


class Adapter(Protocol):
    """Functions of a family's module."""

    def from_folder(self, folder: Path, *, random: bool, **companion: Path | None) -> LoadedParts:
        """Loads a checkpoint folder, or only its architecture; a vision tower without a text tower needs its companion."""

    def from_architecture(self, architecture: Architecture) -> LoadedParts:
        """Random weights without a checkpoint."""


def load_model(
    recipe: Recipe,
    *,
    folder: Path | None,
    companion: Path | None = None,
    weights: Literal["checkpoint", "random"] = "checkpoint",
    device: str = "auto",
) -> LoadedModel:
    """Loads both towers in float32, in evaluation mode, with attention in its plain form.

    Args:
        recipe: Names the family.
        folder: Checkpoint folder; None takes the recipe's architecture with random weights.
        companion: Checkpoint folder of the recipe's companion, for a model that needs one.
        weights: `random` takes only the architecture from the folder; such a model never passes the gate.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: Missing, truncated or pickled checkpoint, missing or NaN weights, unsupported preprocessing.
        PrerequisiteError: If the device is not there.
    """
    resolve_device(device)  # before anything is read
    with without_collection():
        adapter = cast(Adapter, importlib.import_module(_ADAPTERS[recipe.model.family]))
    if folder is not None:
        parts = _from_folder(adapter, folder, companion, random=weights == "random")
    elif recipe.model.architecture is not None:
        architecture = recipe.model.architecture
        what = f"recipe {recipe.name}: model.architecture cannot be made"
        with refusals(what, fix="correct its entries", entries=lambda: dataclasses.asdict(architecture)):
            parts = adapter.from_architecture(architecture)
    else:
        raise InputError(f"recipe {recipe.name} has no model.architecture", fix="add it, or use the checkpoint")
    ref = ModelRef(
        name=recipe.name,
        family=recipe.model.family,
        repo="random" if weights == "random" or folder is None else public_repo(recipe.model.repo),
        revision=recipe.model.revision,
        weights_digest=digest_of_weights(dict(parts.source.named_parameters())),
        embed_dim=parts.embed_dim,
        image=parts.image,
        text=with_vocabulary(parts, recipe.name),
    )
    check_first_rows(parts, *_sizes_of(recipe, folder))
    model = LoadedModel(ref, parts.source, parts.image_tower, parts.text_tower, parts.tokenizer_json, parts.save)
    model.architecture = parts.architecture
    if folder is not None and (folder / MAPS).is_file() and weights != "random":
        load_maps(model, folder / MAPS)
        model.ref = dataclasses.replace(ref, weights_digest=digest_of_weights(model.named_parameters()))
    model.to(resolve_device(device, needed_bytes=_NEEDED * weights_bytes(parts.source)))
    return model


def _from_folder(adapter: Adapter, folder: Path, companion: Path | None, *, random: bool) -> LoadedParts:
    """A checkpoint folder; whatever a library raises is an error of one line."""
    further = {"companion": companion} if companion else {}

    def entries() -> dict[str, Any]:
        return json_file(folder, _config_in(folder))

    with refusals(f"checkpoint {folder.name} cannot be loaded", entries=entries):
        return adapter.from_folder(folder, random=random, **further)


def _sizes_of(recipe: Recipe, folder: Path | None) -> tuple[str, str]:
    """Name of a model, and what names the sizes of its towers, for messages."""
    if folder is None:
        return f"recipe {recipe.name}", "model.architecture"
    return f"checkpoint {folder.name}", _config_in(folder)


def _config_in(folder: Path) -> str:
    return next((file for file in _CONFIGS if (folder / file).is_file()), _CONFIGS[-1])


_CONFIGS = ("open_clip_config.json", "config.json")
"""Files with the sizes of the towers."""


_NEEDED = 3
"""Free memory that `auto` asks of a GPU, as a multiple of the size of the weights: weights, scores, activations."""


def weights_bytes(module: nn.Module) -> int:
    """Size of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def resolve_device(device: str, *, needed_bytes: int = 0) -> str:
    """Torch device for `auto`, `cpu` or `cuda`.

    Args:
        device: `auto` takes the GPU with the most free memory, under torchrun this process's own, if it has enough.
        needed_bytes: Free memory that a GPU must have to be taken by `auto`.

    Raises:
        InputError: If the device is unknown.
        PrerequisiteError: If CUDA is asked for and not there.
    """
    if device == "auto":
        return _roomiest(needed_bytes)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise PrerequisiteError("device cuda was asked for and this machine has none", fix="use --device cpu")
    if not device.startswith(("cpu", "cuda")):
        raise InputError(f"unknown device {device!r}", fix="use auto, cpu or cuda")
    return device


def _roomiest(needed_bytes: int) -> str:
    if not torch.cuda.is_available():
        return "cpu"
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    choice = [torch.cuda.current_device()] if grouped else list(range(torch.cuda.device_count()))
    free = {index: torch.cuda.mem_get_info(index)[0] for index in choice}
    best = max(free, key=free.__getitem__)
    return f"cuda:{best}" if free[best] >= needed_bytes else "cpu"
