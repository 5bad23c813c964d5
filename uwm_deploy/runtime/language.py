"""What a language model behind the image tower is given: patch features, safety tokens and safety prompts; numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from uwm_deploy.errors import ContractError, DataError, InputError
from uwm_deploy.records.head import RISK_LEVEL, RISK_LOGITS, SAFETY_TOKENS, SafetyHead
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.image import ImageLike, image_from, pixels_from_image
from uwm_deploy.runtime.results import Risks
from uwm_deploy.runtime.risk import risks_from
from uwm_deploy.runtime.session import Session

if TYPE_CHECKING:
    from uwm_deploy.runtime.encoder import SafeEncoder

PATCH_FEATURES = "patch_features"
"""Output of the image graph of family llava."""


@dataclass(frozen=True, slots=True)
class LanguageInputs:
    """What a language model is given for n images, all from one run of one graph.

    Attributes:
        features: (n, patches, width) float32, for the language model's own projector.
        safety_tokens: (n, m, d) float32 of the m tokens. They join its input of width d after the projected patches, of the
            images in `mixed_in` only. None where the bundle's head has none.
        risk: Risks of the images, and with them the safety prompt of each; None without a safety head.
    """

    features: np.ndarray
    safety_tokens: np.ndarray | None
    risk: Risks | None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.features)

    @property
    def mixed_in(self) -> np.ndarray:
        """(n,) bool: images whose safety prompt and safety tokens are mixed in; the others are asked as without a head."""
        if self.risk is None:
            return np.zeros(len(self), dtype=bool)
        return np.array([self.risk[row].mixed_in for row in range(len(self))], dtype=bool)

    @property
    def safety_prompts(self) -> tuple[str, ...]:
        """What comes before the question about each image; empty where nothing is mixed in."""
        if self.risk is None:
            return ("",) * len(self)
        return tuple(self.risk[row].safety_prompt for row in range(len(self)))


def language_inputs(encoder: SafeEncoder, images: Sequence[ImageLike]) -> LanguageInputs:
    """What a language model behind the image tower is given, from the graph that was proven and is served.

    Args:
        encoder: An open bundle of family llava.
        images: See `SafeEncoder.encode_image`; arrays are (H, W, 3) or (H, W) uint8.

    Raises:
        DataError: If an image is broken; its position is named.
        InputError: If there is no image, or the bundle's image graph gives no patch features.
    """
    manifest, pixels = encoder.manifest, []
    for position, image in enumerate(images):
        try:
            pixels.append(pixels_from_image(image_from(image), manifest.model.image))
        except DataError as error:
            raise DataError(f"image {position}: {error.what}", fix=error.fix) from error
    if not pixels:
        raise InputError("there is no image", fix="give one or several")
    return language_inputs_of(encoder.session(TowerName.IMAGE), manifest.head, np.stack(pixels), manifest.name)


def language_inputs_of(session: Session, head: SafetyHead | None, pixels: np.ndarray, name: str) -> LanguageInputs:
    """Runs an image graph on images that are preprocessed already.

    Args:
        session: Runs the image tower.
        head: The bundle's safety head.
        pixels: (n, 3, H, W) float32.
        name: Of the bundle, for messages.

    Raises:
        InputError: If the graph gives no patch features.
        ContractError: If it lacks an output of the head.
    """
    most = session.max_batch
    parts = [session.run_all(pixels[start : start + most]) for start in range(0, len(pixels), most)]
    if any(PATCH_FEATURES not in part for part in parts):
        raise InputError(
            f"{name} gives no {PATCH_FEATURES}, which a language model reads",
            fix="use a bundle of family llava, made from the language model's own checkpoint",
        )
    try:
        found = {key: np.concatenate([part[key] for part in parts]) for key in _wanted(head)}
    except KeyError as error:
        raise ContractError(f"{name} does not give the head's output {error}", fix="build the bundle again") from error
    return LanguageInputs(
        features=found[PATCH_FEATURES],
        safety_tokens=found.get(SAFETY_TOKENS),
        risk=risks_from(head, found[RISK_LOGITS], found[RISK_LEVEL]) if head is not None else None,
    )


def _wanted(head: SafetyHead | None) -> tuple[str, ...]:
    return (PATCH_FEATURES, *(head.shape.outputs if head is not None else ()))
