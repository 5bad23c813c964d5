"""The model: its towers, what they take in, and which weights they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from uwm_deploy.records.shape import LATER

SCHEMA_VERSION = 2
"""Version of every JSON file the project writes; readers refuse a newer one."""


Digest = str
"""``sha256:`` followed by 64 lower-case hex digits."""


LOCAL = "local"
"""Repository of a model that came from a folder: its path gets into no record."""


Architecture = Literal["clip", "siglip", "coca"]
"""How a model is built and was trained, whatever its name and whichever library loads it."""


class TowerName(StrEnum):
    """The two encoders of a CLIP-like model, each exported as its own graph."""

    IMAGE = "image"
    TEXT = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """Preprocessing of one image, exactly as the source model's processor does it.

    Attributes:
        resize: Shortest edge after resizing, or both edges when `fit` is ``"squash"``, pixels.
        crop: Side of the square centre crop, pixels.
        resample: Pillow filter name, ``"bicubic"`` or ``"bilinear"``.
        rescale: Factor from 0..255 to 0..1.
        mean: Per channel, RGB, after rescaling.
        std: Per channel, RGB, after rescaling.
        fit: Keep the shape and crop, or squash to a square.
        crop_offset: How half a pixel of the crop's corner is rounded: down, or to even.
        alpha: Transparency is laid over white, or its channel is dropped.
    """

    resize: int
    crop: int
    resample: Literal["bicubic", "bilinear"]
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Literal["crop", "squash"] = "crop"
    crop_offset: Literal["floor", "round"] = "floor"
    alpha: Literal["white", "drop"] = "white"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """Tokenisation of one caption, exactly as the source model's tokenizer does it.

    Attributes:
        context_length: Positions per caption; longer ones are cut and keep their end token.
        eos_id: Id of the end token.
        pad_id: Id that fills the row.
        tokenizer_digest: Digest of ``tokenizer.json``.
        padding_side: Where a short row is filled.
        fixed_length: Whether the padding belongs to the input (SigLIP, CoCa), so that a row may not be cut to its tokens.
        cleaning: What is done to a caption before `tokenizer.json` sees it.
        vocabulary: Rows of the table of embeddings, so ids are smaller; 0 in bundles of older releases, which do not say it.
    """

    context_length: int
    eos_id: int
    pad_id: int
    tokenizer_digest: Digest
    padding_side: Literal["right", "left"] = "right"
    fixed_length: bool = False
    cleaning: Literal["none", "open-clip"] = "none"
    vocabulary: int = field(default=0, metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Which weights this is about.

    Attributes:
        name: Recipe name, for people.
        family: Tower adapter, e.g. ``"hf-clip"``.
        repo: Hub id, or ``"local"``, or ``"shipped"``, or ``"random"`` (random weights are never gate-able).
        revision: Hub commit, or empty.
        weights_digest: Over every parameter's name, dtype, shape and bytes, in name order.
        embed_dim: Size of the shared embedding space.
    """

    name: str
    family: str
    repo: str
    revision: str
    weights_digest: Digest
    embed_dim: int
    image: ImageSpec
    text: TextSpec
