"""Faults before and beside the model: images, captions and data sets that are not what they should be."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from uwm_deploy.data.source import record_of
from uwm_deploy.recipes.resolve import calibration_set_of
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.model import ImageSpec
from uwm_deploy.runtime.image import crop_from_image, pixels_from_crops, pixels_from_image
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.studies.selftest.honest_builds import QUADRUPLES, Build, HonestBuild, Pixels, as_rows, data_file

Plant = Callable[[HonestBuild, Path], Build]


# --- images ---------------------------------------------------------------------------------------------------------


def prepared_by(pixels: Pixels) -> Plant:
    """A runtime that prepares images in another way; reference and artifacts see the same pixels.

    Args:
        pixels: Preprocessing of an image, to (3, H, W) float32.
    """

    def plant(world: HonestBuild, _: Path) -> Build:
        return dataclasses.replace(world.honest, prepared=world.prepare(pixels=pixels), pixels=pixels)

    return plant


def bilinear(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Pixels (3, H, W) float32, resized by another filter."""
    return pixels_from_image(image, dataclasses.replace(spec, resample="bilinear"))


def blue_first(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Pixels (3, H, W) float32, channels in the order blue, green, red, as some decoders give them."""
    crop = np.ascontiguousarray(crop_from_image(image, spec)[..., ::-1])
    return pixels_from_crops(crop, spec)


def other_statistics(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Pixels (3, H, W) float32, normalised with the mean and deviation of ImageNet."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return pixels_from_crops(crop_from_image(image, spec), dataclasses.replace(spec, mean=mean, std=std))


def crop_off_by_one(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Pixels (3, H, W) float32, cropped one pixel too far down and to the right."""
    larger = dataclasses.replace(spec, crop=spec.crop + 2)
    crop = crop_from_image(image.convert("RGB"), larger)[2:, 2:]
    return pixels_from_crops(np.ascontiguousarray(crop), spec)


def squashed(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Pixels (3, H, W) float32, resized to a square instead of cropped to one."""
    return pixels_from_image(image, dataclasses.replace(spec, fit="squash"))


# --- captions -------------------------------------------------------------------------------------------------------


def cut_ids(world: HonestBuild, _: Path) -> Build:
    """Captions cut to a quarter of the length, their end token lost."""
    ref = world.original.ref
    whole = Tokenizer(world.original.tokenizer_json, ref.text)

    def encode(texts: Sequence[str]) -> np.ndarray:
        rows = whole.encode(texts)
        rows[:, ref.text.context_length // 4 :] = ref.text.pad_id
        return rows

    return dataclasses.replace(world.honest, prepared=world.prepare(encode=encode), encode=encode)


def other_tokenizer(world: HonestBuild, _: Path) -> Build:
    """A tokenizer of the same size whose words have other ids."""
    body = json.loads(world.original.tokenizer_json)
    vocabulary = body["model"]["vocab"]
    special = {token["content"] for token in body["added_tokens"]}
    words = [word for word in vocabulary if word not in special]
    ids = [vocabulary[word] for word in words]
    vocabulary.update(zip(words, ids[1:] + ids[:1], strict=True))
    content = json.dumps(body).encode()
    spec = dataclasses.replace(world.original.ref.text, tokenizer_digest=digest_of_bytes(content))
    encode = Tokenizer(content, spec).encode
    return dataclasses.replace(world.honest, prepared=world.prepare(encode=encode), encode=encode)


# --- data -----------------------------------------------------------------------------------------------------------


def measured_on_calibration(world: HonestBuild, folder: Path) -> Build:
    """The scores come from the items that they are measured on."""
    source = world.open(data_file(folder, "leak", "calibration", QUADRUPLES))
    return dataclasses.replace(
        world.honest,
        prepared=world.prepare(source),
        evaluation=source.record,
        overlap=world.shares_with_calibration(source),
    )


def partners_shuffled(world: HonestBuild, _: Path) -> Build:
    """Texts and images of different items stand together."""
    there = world.honest.prepared
    order = np.random.default_rng(0).permutation(len(there.ids))
    safe, unsafe = (as_rows(part)[order] for part in (there.safe_pixels, there.unsafe_pixels))
    prepared = dataclasses.replace(there, safe_pixels=safe, unsafe_pixels=unsafe)
    return dataclasses.replace(world.honest, prepared=prepared)


def members_swapped(world: HonestBuild, _: Path) -> Build:
    """In half of the items the safe and the unsafe image have changed places."""
    there = world.honest.prepared
    half = (np.arange(len(there.ids)) % 2 == 0)[:, None, None, None]
    safe, unsafe = as_rows(there.safe_pixels), as_rows(there.unsafe_pixels)
    prepared = dataclasses.replace(
        there, safe_pixels=np.where(half, unsafe, safe), unsafe_pixels=np.where(half, safe, unsafe)
    )
    return dataclasses.replace(world.honest, prepared=prepared)


def concept_dropped(world: HonestBuild, _: Path) -> Build:
    """A filter that loses a concept without a word."""
    there, spec = world.honest.prepared, calibration_set_of(world.test)[0]
    lost = there.concepts[0]
    rows = np.array([i for i, concept in enumerate(there.concepts) if concept != lost])
    ids, concepts = (tuple(part[i] for i in rows) for part in (there.ids, there.concepts))
    prepared = dataclasses.replace(
        there,
        ids=ids,
        concepts=concepts,
        safe_pixels=as_rows(there.safe_pixels)[rows],
        unsafe_pixels=as_rows(there.unsafe_pixels)[rows],
        safe_ids=there.safe_ids[rows],
        unsafe_ids=there.unsafe_ids[rows],
    )
    record = record_of(spec, ids, concepts, world.honest.evaluation.content_digest)
    return dataclasses.replace(world.honest, prepared=prepared, evaluation=record)


def nothing_measured(world: HonestBuild, folder: Path) -> Build:
    """A set whose file is empty."""
    (folder / "empty.jsonl").write_text("", encoding="utf-8")
    text = 'format = 1\nname = "empty"\nsource = "manifest"\nmanifest = "empty.jsonl"\n'
    (folder / "empty.toml").write_text(text, encoding="utf-8")
    source = world.open(str(folder / "empty.toml"))
    return dataclasses.replace(world.honest, prepared=world.prepare(source), evaluation=source.record)
