"""Models that were trained for safety."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.model import Digest, ModelRef


class Trainer(StrEnum):
    """How a model was trained for safety; docs/how-to/training.md."""

    SAFE_CLIP = "safe-clip"
    SAFER_CLIP = "safer-clip"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """Everything that a training run depends on besides model and data.

    Attributes:
        rank: Of the adapters (LoRA).
        alpha: An adapter is scaled by ``alpha / rank``.
        dropout: Of the adapters' inputs.
        targets: Modules with an adapter, by the last part of their name.
        rate: Learning rate of Adam.
        epochs: At most so many.
        batch: Quadruples per step and process.
        patience: Epochs in which neither validation loss nor recall becomes better before it ends.
        validation_share: Share of the calibration set that is held out to choose the best epoch.
        weights: Term of the loss to its weight.
        best: What the best epoch is chosen by.
        precision: Of the forward passes; weights are float32.
    """

    method: Trainer
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    rate: float
    epochs: int
    batch: int
    patience: int
    validation_share: float
    weights: Mapping[str, float]
    best: Literal["loss", "recall"]
    precision: Literal["fp32", "bf16"]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochResult:
    """One epoch of a training run.

    Attributes:
        epoch: From 1.
        n: Quadruples that it went through, all processes together.
        terms: Mean of every term of the loss over its steps.
        loss: Mean of the loss.
        validation_loss: On the held-out quadruples, after it.
        recall_sum: Sum of six recalls at 1 in percent, on the same.
    """

    epoch: int
    n: int
    terms: Mapping[str, float]
    loss: float
    validation_loss: float
    recall_sum: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecord:
    """Where a trained model comes from: `training.json` beside its weights, and in every bundle made from them.

    Attributes:
        base: The model before training.
        calibration: The set, training and held-out quadruples together.
        trained_weights_digest: Of the whole model after training.
        weights: Parameter that was trained to its digest; all others are the base's.
        reference_digest: Of the frozen reference after training; it must be the base's.
        best_epoch: Whose adapters were merged.
        trainable_parameters: Of the adapters.
        examples_seen: Quadruples over all epochs, repetitions counted.
        seconds: Wall time of all epochs, validation included.
        peak_gpu_bytes: Most GPU memory that was in use; 0 without a GPU.
        recipe: Text of the base's recipe, verbatim.
    """

    settings: TrainingSettings
    base: ModelRef
    calibration: CalibrationRecord
    n_training: int
    n_validation: int
    trained_weights_digest: Digest
    weights: Mapping[str, Digest]
    reference_digest: Digest
    epochs: tuple[EpochResult, ...]
    best_epoch: int
    stopped_early: bool
    trainable_parameters: int
    parameters: int
    examples_seen: int
    seconds: float
    processes: int
    device: str
    peak_gpu_bytes: int
    versions: Mapping[str, str]
    recipe: str
