"""Classifies images by the names of classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from uwm_deploy.errors import DataError, InputError
from uwm_deploy.runtime.image import ImageLike
from uwm_deploy.runtime.results import Embeddings, Predictions

TEMPLATE = "a photo of a {}."
"""CLIP's own."""


class ImageEncoder(Protocol):
    """What a classifier needs of `SafeEncoder`."""

    def encode_image(self, images: ImageLike | Iterable[ImageLike]) -> Embeddings:
        """Embeds images.

        Args:
            images: See `SafeEncoder.encode_image`; arrays are (H, W, 3), (H, W) or (n, H, W, 3) uint8.

        Returns:
            (n, d) float32, rows of length 1.
        """

    async def aencode_image(self, images: ImageLike | Iterable[ImageLike]) -> Embeddings:
        """The same from an event loop.

        Args:
            images: See `SafeEncoder.encode_image`; arrays are (H, W, 3), (H, W) or (n, H, W, 3) uint8.

        Returns:
            (n, d) float32, rows of length 1.
        """


class ZeroShotClassifier:
    """A classifier; `SafeEncoder.zero_shot` makes it, and computes the texts once.

    Args:
        encoder: Embeds the images.
        labels: The classes.
        weights: (classes, d) float32, rows of length 1.
    """

    def __init__(self, encoder: ImageEncoder, labels: Sequence[str], weights: np.ndarray) -> None:
        self._encoder, self.labels, self.weights = encoder, tuple(labels), weights

    def classify(self, images: ImageLike | Iterable[ImageLike]) -> Predictions:
        """Scores of each image for each class; a broken image has none, see `Predictions`.

        Args:
            images: See `SafeEncoder.encode_image`; arrays are (H, W, 3), (H, W) or (n, H, W, 3) uint8.
        """
        return self._scored(self._encoder.encode_image(images))

    async def aclassify(self, images: ImageLike | Iterable[ImageLike]) -> Predictions:
        """The same from an event loop.

        Args:
            images: See `SafeEncoder.encode_image`; arrays are (H, W, 3), (H, W) or (n, H, W, 3) uint8.
        """
        return self._scored(await self._encoder.aencode_image(images))

    def _scored(self, embeddings: Embeddings) -> Predictions:
        return Predictions(self.labels, np.asarray(embeddings) @ self.weights.T, embeddings.errors)


def prompts_of(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every label in every template, label by label.

    Raises:
        InputError: If there are no labels, one occurs twice, or a template has no place for it.
    """
    if not labels or len(set(labels)) != len(labels):
        raise InputError("labels are empty, or one occurs twice", fix="pass each class once")
    for template in templates:
        if "{}" not in template:
            raise InputError(f"the template {template!r} has no {{}}", fix='write it like "a photo of a {}."')
    # Not str.format: a label may have braces, and a template is no place for expressions.
    return [template.replace("{}", label) for label in labels for template in templates]


def weights_from(embeddings: Embeddings, classes: int) -> np.ndarray:
    """Weights of a classifier: the mean embedding of each label's templates, divided by its length.

    Args:
        embeddings: (classes * templates, d) float32, rows of length 1, label by label.
        classes: Number of labels.

    Returns:
        (classes, d) float32, rows of length 1.

    Raises:
        DataError: If a prompt could not be encoded.
    """
    if embeddings.errors:
        raise DataError(f"prompt {embeddings.errors[0]}", fix="mend the label")
    mean = np.asarray(embeddings).reshape(classes, -1, embeddings.shape[-1]).mean(axis=1)
    weights: np.ndarray = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return weights
