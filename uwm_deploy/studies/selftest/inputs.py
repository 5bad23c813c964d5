"""Faults before and beside the model: images, captions and data sets that are not what they should be."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from uwm_deploy.data.source import Quadruple, QuadrupleSource, record_of
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


def lanczos(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Pixels (3, H, W) float32, resized by a filter that hardly differs."""
    scale = spec.resize / min(image.size)
    size = [max(spec.resize, int(scale * length)) for length in image.size]
    whole = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return pixels_from_image(whole.resize((size[0], size[1]), Image.Resampling.LANCZOS), spec)


def on_black(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Pixels (3, H, W) float32; what is transparent is laid on black, where libraries drop the transparency."""
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return pixels_from_image(image, spec)


def deep_cut(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Pixels (3, H, W) float32; of 16 bits the lower eight are read."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) & 255).astype(np.uint8))
    return pixels_from_image(image, spec)


def ink_inverted(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Pixels (3, H, W) float32; colours of printers are read as if ink were light."""
    if image.mode == "CMYK":
        image = Image.fromarray(255 - np.asarray(image), mode="CMYK")
    return pixels_from_image(image, spec)


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


def swapped(members: Sequence[str], share: float) -> Plant:
    """In some rows the safe and the unsafe side have changed places.

    Args:
        members: What is exchanged: ``pixels``, ``ids`` or both.
        share: Of the rows, spread over the set.
    """

    def plant(world: HonestBuild, _: Path) -> Build:
        there = world.honest.prepared
        rows = np.random.default_rng(0).random(len(there.ids)) < share
        changes: dict[str, Any] = {}
        for member in members:
            safe, unsafe = (as_rows(getattr(there, f"{side}_{member}")) for side in ("safe", "unsafe"))
            mask = rows.reshape(-1, *[1] * (safe.ndim - 1))
            changes[f"safe_{member}"] = np.where(mask, unsafe, safe)
            changes[f"unsafe_{member}"] = np.where(mask, safe, unsafe)
        return dataclasses.replace(world.honest, prepared=dataclasses.replace(there, **changes))

    return plant


columns_swapped = swapped(("pixels", "ids"), 1.0)


class _Swapped:
    """A set whose items have their safe members in the place of the unsafe ones in some rows."""

    def __init__(self, source: QuadrupleSource, every: int) -> None:
        self._source, self._every = source, every

    def __len__(self) -> int:
        return len(self._source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, index: int) -> Quadruple:
        """One quadruple."""
        item = self._source.read(index)
        if index % self._every:
            return item
        return dataclasses.replace(
            item,
            safe_image=item.unsafe_image,
            unsafe_image=item.safe_image,
            safe_text=item.unsafe_text,
            unsafe_text=item.safe_text,
        )

    def read_texts(self, index: int) -> tuple[str, str] | None:
        """Both captions of one quadruple."""
        pair = self._source.read_texts(index)
        return pair if pair is None or index % self._every else (pair[1], pair[0])


def calibration_swapped(world: HonestBuild, _: Path) -> Build:
    """Every third calibration item has its sides exchanged."""
    return dataclasses.replace(world.honest, calibration=cast(QuadrupleSource, _Swapped(world.honest.calibration, 3)))


def repeated(members: Sequence[str]) -> Plant:
    """Three of ten items repeat another one, under an id of their own, in some of their members.

    Args:
        members: Which, such as ``safe_pixels``; the others are their own.
    """

    def plant(world: HonestBuild, _: Path) -> Build:
        there = world.honest.prepared
        n = len(there.ids)
        rows = np.arange(n)
        last = rows >= n - 3 * n // 10
        same = np.array([i for i in rows if not last[i]])
        concepts = np.asarray(there.concepts)
        # Of the same concept: a copy of an item is as good an item of it.
        partner = [int(same[concepts[same] == concepts[i]][i % 5]) if last[i] else int(i) for i in rows]
        changes: dict[str, Any] = {member: as_rows(getattr(there, member))[partner] for member in members}
        return dataclasses.replace(world.honest, prepared=dataclasses.replace(there, **changes))

    return plant


ALL_MEMBERS = ("safe_pixels", "unsafe_pixels", "safe_ids", "unsafe_ids")


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
