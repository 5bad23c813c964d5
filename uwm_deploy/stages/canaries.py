"""Stage `canaries`: inputs of the calibration set where the edited and the original model differ most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file

from uwm_deploy.data.encoded import bytes_of
from uwm_deploy.data.order import some_of
from uwm_deploy.data.source import PairBatch, QuadrupleSource
from uwm_deploy.edits.canary_files import canary_file, raw_canary_file
from uwm_deploy.records.codec import read_record
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.graph import Normalisation
from uwm_deploy.records.model import ImageSpec, TowerName
from uwm_deploy.runtime.image import pixels_from_image
from uwm_deploy.runtime.pixels import crops_from_pixels
from uwm_deploy.runtime.raw_canaries import RAW, RawCanaries
from uwm_deploy.safeground.canaries import choose
from uwm_deploy.stages.job import Job
from uwm_deploy.stages.models import Models
from uwm_deploy.stages.traced import normalisation_of
from uwm_deploy.towers.batch_size import USUAL_PAIRS
from uwm_deploy.towers.protocol import Tower

PAIRS = 64
"""Pairs of the calibration set that canaries are chosen from."""


def canaries_to_folder(
    original: Tower, edited: Tower, pairs: Iterable[PairBatch], folder: Path, normalisation: Normalisation | None = None
) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Chooses and saves the canaries of one tower.

    Args:
        original: The unedited tower.
        edited: The edited one.
        pairs: Inputs to choose from, at full length.
        folder: Where the file goes.
        normalisation: Of graphs that take crops: the file then holds crops, too.

    Returns:
        Id and side of the item of each canary, and the canaries' embeddings by the edited tower, (k, d) float32.
    """
    parts = [(batch.ids, side, getattr(batch, side)) for batch in pairs for side in ("safe", "unsafe")]
    inputs, items = np.concatenate([rows for *_, rows in parts]), [(i, side) for ids, side, _ in parts for i in ids]
    before, after = _embed(original, inputs), _embed(edited, inputs)
    rows = choose(before, after)
    if len(rows):  # else the models are the same, which the gate says better
        kept = inputs[rows] if normalisation is None else crops_from_pixels(inputs[rows], normalisation)
        chosen = {"inputs": kept, "original": before[rows], "edited": after[rows]}
        save_file(chosen, canary_file(folder, original.name))
    return [items[row] for row in rows], after[rows]


def raw_images(
    source: QuadrupleSource, items: Sequence[tuple[str, str]], edited: np.ndarray, tower: Tower, spec: ImageSpec
) -> RawCanaries:
    """Some canaries of the image tower as users send them, and one of them that lets the light through.

    Args:
        source: The set that they come from.
        items: Id and side of the item of each canary.
        edited: (k, d) float32, their embeddings by the edited tower.
        tower: The edited tower.
        spec: How it prepares images.
    """
    images = [member for member, _ in zip(_members(source, items, "image"), range(RAW), strict=False)]
    if not images:  # both models are the same, which the gate says better
        return RawCanaries((), edited)
    seen_through, embedding = _transparent(images, tower, spec)
    sent = (*(bytes_of(image) for image in images), bytes_of(seen_through))
    return RawCanaries(sent, np.concatenate([edited[: len(images)], embedding]))


def raw_texts(source: QuadrupleSource, items: Sequence[tuple[str, str]], edited: np.ndarray) -> RawCanaries:
    """Some canaries of the text tower as users send them.

    Args:
        source: The set that they come from.
        items: Id and side of the item of each canary.
        edited: (k, d) float32, their embeddings by the edited tower.
    """
    texts = list(_members(source, items, "text"))
    # What is written between such brackets is letters to a server, and a special token to the model.
    kept = [i for i, text in enumerate(texts) if "<" not in text][:RAW]
    return RawCanaries(tuple(texts[i].encode() for i in kept), edited[kept])


def _members(source: QuadrupleSource, items: Sequence[tuple[str, str]], kind: str) -> Iterator[Any]:
    """Texts or images of a set, one after the other."""
    places = {name: place for place, name in enumerate(source.ids)}
    return (getattr(source.read(places[name]), f"{side}_{kind}") for name, side in items)


def _transparent(images: Sequence[Image.Image], tower: Tower, spec: ImageSpec) -> tuple[Image.Image, np.ndarray]:
    """The image that tells best what is laid beneath it, with alpha in steps, and its embedding, (1, d) float32.

    A picture without an alpha channel is prepared alike whatever the record says of transparency.
    """
    layered = [_with_alpha(image) for image in images]
    other: Literal["white", "drop"] = "drop" if spec.alpha == "white" else "white"
    right, wrong = (
        _embed(tower, np.stack([pixels_from_image(image, replace(spec, alpha=alpha)) for image in layered]))
        for alpha in (spec.alpha, other)
    )
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (right, wrong)]
    best = int((units[0] * units[1]).sum(axis=1).argmin())
    return layered[best], right[best : best + 1]


def _with_alpha(image: Image.Image) -> Image.Image:
    """Half as wide again, from opaque at the left to invisible at the right: cropped and squashed are two things, too."""
    found = image.convert("RGB").resize((image.width * 3 // 2, image.height))
    steps = np.linspace(255, 0, found.width).astype(np.uint8)
    found.putalpha(Image.fromarray(np.tile(steps, (found.height, 1))))
    return found


@torch.inference_mode()
def _embed(tower: Tower, inputs: np.ndarray) -> np.ndarray:
    device = next(tower.graph_module().parameters()).device
    parts = [
        tower.embed(torch.from_numpy(rows).to(device)).float().cpu().numpy()
        for rows in np.split(inputs, range(16, len(inputs), 16))
    ]
    return np.concatenate(parts)


def make(job: Job, out: Path) -> None:
    """Chooses the canaries of every edited tower from the calibration set."""
    models, edit = job.shared(Models), read_record(EditRecord, job.folder.edit_record)
    source = some_of(job.plan.calibration_source, PAIRS)
    for tower in [name for name in TowerName if any(tensor.changed for tensor in edit.of(name))]:
        batch = USUAL_PAIRS[TowerName.IMAGE]
        pairs = models.pairs(source, tower, batch_pairs=batch, quiet=True, sort_by_length=False)
        by = normalisation_of(tower, models.edited.ref.image, job.plan.recipe.export)
        chosen, edited = canaries_to_folder(models.original.tower(tower), models.edited.tower(tower), pairs, out, by)
        if tower is TowerName.IMAGE:
            raw = raw_images(source, chosen, edited, models.edited.image, models.edited.ref.image)
        else:
            raw = raw_texts(source, chosen, edited)
        save_file(raw.tensors(), raw_canary_file(out, tower))
