"""Data of a training run: prepared quadruples, their embeddings by the frozen reference, and the split into rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uwm_deploy.data.embedding import PreparedSet
from uwm_deploy.data.nearest_captions import nearest_safe, stages_of
from uwm_deploy.errors import DataError
from uwm_deploy.records.model import TextSpec
from uwm_deploy.records.training import Trainer, TrainingSettings
from uwm_deploy.safeground.embedded import EmbeddedSet
from uwm_deploy.training.losses import (
    MemberEmbeddings,
    Targets,
    normalised_mean,
    safe_clip_terms,
    safer_clip_terms,
    weighted_sum,
)

LEAST = 16
"""Quadruples in either part; with fewer a loss says nothing."""


@dataclass(frozen=True, slots=True)
class TrainingData:
    """A set of n quadruples.

    Attributes:
        prepared: Inputs.
        text: Padding of captions.
        reference: Embeddings by the frozen reference, rows of length 1; made once, since the reference never changes.
        nearest: (n,) int64, training row whose safe caption is nearest to the unsafe caption of each row.
        stage: (n,) int64, 0 easy, 1 medium, 2 hard; of training rows.
        training: (t,) int64, rows that are trained on.
        validation: (v,) int64, rows by which the best epoch is chosen.
    """

    prepared: PreparedSet
    text: TextSpec
    reference: MemberEmbeddings
    nearest: np.ndarray
    stage: np.ndarray
    training: np.ndarray
    validation: np.ndarray

    def inputs(self, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs of some rows, the safe half first; ids are cut to the longest caption where the model allows it.

        Args:
            rows: (b,) int64.
            device: Device of the result.

        Returns:
            Ids (2b, L) int64, and pixels (2b, 3, H, W) float32.
        """
        ids = np.concatenate([self.prepared.safe_ids[rows], self.prepared.unsafe_ids[rows]])
        if not self.text.fixed_length and self.text.padding_side == "right":
            ids = ids[:, : int(((ids == self.text.eos_id).argmax(1) + 1).max())]
        pixels = np.concatenate([self.prepared.safe_pixels[rows], self.prepared.unsafe_pixels[rows]])
        return torch.from_numpy(ids).to(device), torch.from_numpy(pixels).to(device)

    def rows_of(self, epoch: int, settings: TrainingSettings) -> np.ndarray:
        """Training rows (m,) int64 of an epoch, counted from 1, in their order; the same whenever and wherever it is run."""
        rows = self.training
        if settings.method is Trainer.SAFER_CLIP:
            rows = rows[self.stage[rows] < epoch]
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(rows))
        found: np.ndarray = rows[order]
        return found

    def terms(self, student: MemberEmbeddings, rows: np.ndarray, method: Trainer) -> dict[str, Tensor]:
        """Every term of the loss on some rows.

        Args:
            student: Unit embeddings (b, d) of the rows by the model that is trained.
            rows: (b,) int64.
            method: Whose terms.

        Returns:
            Terms by name, () float32.
        """
        device = student.safe_text.device
        reference = MemberEmbeddings(*(part.to(device) for part in self.reference.rows(torch.from_numpy(rows))))
        if method is Trainer.SAFE_CLIP:
            return safe_clip_terms(student, reference)
        there = torch.from_numpy(self.nearest[rows])
        targets = Targets(self.reference.safe_text[there].to(device), self.reference.safe_image[there].to(device))
        return safer_clip_terms(student, reference, targets)


def total(terms: dict[str, Tensor], settings: TrainingSettings) -> Tensor:
    """The loss: Safe-CLIP's normalised mean, SafeR-CLIP's sum.

    Args:
        terms: Terms by name, () float32.
        settings: Method and weights.

    Returns:
        () float32.
    """
    combine = normalised_mean if settings.method is Trainer.SAFE_CLIP else weighted_sum
    return combine(terms, settings.weights)


def training_data(
    prepared: PreparedSet, embedded: EmbeddedSet, text: TextSpec, settings: TrainingSettings
) -> TrainingData:
    """Holds out some quadruples, and finds the nearest safe caption among the others.

    Args:
        prepared: Inputs.
        embedded: The same set embedded by the frozen reference.
        text: How captions are padded.
        settings: Seed and share of what is held out.

    Raises:
        DataError: If the set is too small, or the reference has no embedding of an item.
    """
    members = MemberEmbeddings(
        *(
            torch.from_numpy(part)
            for part in (embedded.safe_text, embedded.unsafe_text, embedded.safe_image, embedded.unsafe_image)
        )
    )
    finite = torch.stack([part.isfinite().all(1) for part in members]).all(0)
    if not bool(finite.all()):
        item = prepared.ids[int((~finite).nonzero()[0])]
        raise DataError(f"item {item} has no embedding by the model that is to be trained", fix="remove the item")
    n = len(prepared.ids)
    order = np.random.default_rng([settings.seed, 0]).permutation(n)
    held_out = round(settings.validation_share * n)
    validation, training = np.sort(order[:held_out]), np.sort(order[held_out:])
    if min(len(validation), len(training)) < LEAST:
        raise DataError(
            f"{len(training)} quadruples to train on and {len(validation)} held out are too few",
            fix=f"use a set with at least {LEAST} of either",
        )
    rows, cosine = nearest_safe(embedded.unsafe_text, embedded.safe_text[training])
    stage = np.zeros(n, dtype=np.int64)
    stage[training] = stages_of(cosine[training])
    return TrainingData(prepared, text, members, training[rows], stage, training, validation)
