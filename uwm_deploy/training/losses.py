"""Every term of the trained systems' losses: pure functions of embeddings (docs/how-to/training.md).

Safe-CLIP's terms are those of its released script, SafeR-CLIP's those of its paper; weights are in `training.settings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from uwm_deploy.edits.gradient import LOGIT_SCALE
from uwm_deploy.errors import ContractError


class MemberEmbeddings(NamedTuple):
    """Embeddings of b quadruples.

    Attributes:
        safe_text: (b, d) float32.
        unsafe_text: (b, d) float32.
        safe_image: (b, d) float32.
        unsafe_image: (b, d) float32.
    """

    safe_text: Tensor
    unsafe_text: Tensor
    safe_image: Tensor
    unsafe_image: Tensor

    def rows(self, rows: Tensor) -> MemberEmbeddings:
        """Some of the quadruples.

        Args:
            rows: (m,) int64, positions, in the order of the result.
        """
        return MemberEmbeddings(*(part[rows] for part in self))

    def unit(self) -> MemberEmbeddings:
        """The same with rows of length 1, in float32."""
        return MemberEmbeddings(*(functional.normalize(part.float(), dim=1) for part in self))


class Targets(NamedTuple):
    """Targets of unsafe members: embeddings of a safe caption and of its image by the frozen reference.

    Attributes:
        text: (b, d) float32, rows of length 1.
        image: (b, d) float32, rows of length 1.
    """

    text: Tensor
    image: Tensor


def cosine_distance(left: Tensor, right: Tensor) -> Tensor:
    """Mean of ``1 - cos`` over the rows.

    Args:
        left: (b, d) float32, rows of length 1.
        right: (b, d) float32, rows of length 1.

    Returns:
        () float32.
    """
    return (1 - (left * right).sum(1)).mean()


def info_nce(left: Tensor, right: Tensor) -> Tensor:
    """Symmetric contrastive loss of embeddings whose rows belong together, with the fixed scale of 100.

    Args:
        left: (b, d) float32, rows of length 1.
        right: (b, d) float32, rows of length 1.

    Returns:
        () float32.
    """
    logits = LOGIT_SCALE * left @ right.T
    labels = torch.arange(len(logits), device=logits.device)
    return 0.5 * (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels))


def relative(query: Tensor, unsafe: Tensor, target: Tensor) -> Tensor:
    """Mean of ``log(1 + exp(cos(query, unsafe) - cos(query, target)))``: one hard negative per row.

    Args:
        query: (b, d) float32, rows of length 1.
        unsafe: (b, d) float32, rows of length 1, the negatives.
        target: (b, d) float32, rows of length 1, the positives.

    Returns:
        () float32.
    """
    return functional.softplus((query * unsafe).sum(1) - (query * target).sum(1)).mean()


def safe_clip_terms(student: MemberEmbeddings, reference: MemberEmbeddings) -> dict[str, Tensor]:
    """The eight terms of Safe-CLIP.

    Safe members stay where they are, unsafe ones go to their safe counterparts: in their own modality by cosine, in the
    other by contrast within the batch.

    Args:
        student: Unit embeddings (b, d) of the model that is trained.
        reference: Unit embeddings (b, d) of the frozen one; only its safe members are used.

    Returns:
        Terms by name, () float32.
    """
    text, image = reference.safe_text, reference.safe_image
    return {
        "text_preservation": cosine_distance(student.safe_text, text),
        "text_redirection": cosine_distance(student.unsafe_text, text),
        "image_preservation": cosine_distance(student.safe_image, image),
        "image_redirection": cosine_distance(student.unsafe_image, image),
        "text_contrast_preservation": info_nce(student.safe_text, image),
        "text_contrast_redirection": info_nce(student.unsafe_text, image),
        "image_contrast_preservation": info_nce(student.safe_image, text),
        "image_contrast_redirection": info_nce(student.unsafe_image, text),
    }


def safer_clip_terms(student: MemberEmbeddings, reference: MemberEmbeddings, targets: Targets) -> dict[str, Tensor]:
    """The six terms of SafeR-CLIP.

    Args:
        student: Unit embeddings (b, d) of the model that is trained.
        reference: Unit embeddings (b, d) of the frozen one.
        targets: Unit embeddings (b, d) of each unsafe caption's nearest safe caption, and of the image of that.

    Returns:
        Terms by name, () float32.
    """
    return {
        "text_relative": relative(student.unsafe_text, reference.unsafe_image, targets.image),
        "image_relative": relative(student.unsafe_image, reference.unsafe_text, targets.text),
        "text_redirection": cosine_distance(student.unsafe_text, targets.text),
        "image_redirection": cosine_distance(student.unsafe_image, targets.image),
        "text_preservation": cosine_distance(student.safe_text, reference.safe_text),
        "image_preservation": cosine_distance(student.safe_image, reference.safe_image),
    }


def normalised_mean(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Weighted mean () of the terms (), divided by their number, as Safe-CLIP's script has it.

    Args:
        terms: Terms by name, () float32.
        weights: Weights by name.

    Returns:
        () float32.

    Raises:
        ContractError: If terms and weights are not of the same names.
    """
    return weighted_sum(terms, weights) / (sum(weights.values()) * len(terms))


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Weighted sum () of the terms ().

    Args:
        terms: Terms by name, () float32.
        weights: Weights by name.

    Returns:
        () float32.

    Raises:
        ContractError: If terms and weights are not of the same names.
    """
    if set(terms) != set(weights):
        raise ContractError(f"weights are of {sorted(weights)}, terms of {sorted(terms)}", fix="report this")
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()
