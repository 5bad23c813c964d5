"""The safety head: its shape, thresholds and training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.model import Digest
from uwm_deploy.records.shape import LATER

RISK_LOGITS, RISK_LEVEL = "risk_logits", "risk_level"


RISK_OUTPUTS = (RISK_LOGITS, RISK_LEVEL)
"""Outputs that every safety head adds to the image graph."""

SAFETY_TOKENS = "safety_tokens"
"""Output of a head that was trained with a language model: what joins its input after the image's patches."""


class Action(StrEnum):
    """What becomes of an image by its risk, the mildest first; each has its threshold, but for the first."""

    ALLOW = "allow"
    FLAG = "flag"
    REDIRECT = "redirect"
    BLOCK = "block"


MIXED_FROM = Action.REDIRECT
"""The mildest action at which a language model gets the safety prompt and the safety tokens of an image."""

MIXED_IN = (MIXED_FROM, Action.BLOCK)
"""A flagged image is only recorded: its embedding and its answer are what they would be without a head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """Sizes of a safety head.

    Attributes:
        features: Width of the vision tower's tokens.
        width: Of the safety projector and of the attention.
        tokens: Learned safety tokens.
        heads: Of the attention.
        categories: Of `risk_logits`, ``"safe"`` among them.
        language: Width of the language model's input that `safety_tokens` are for; 0 without a language model.
    """

    features: int
    width: int
    tokens: int
    heads: int
    categories: int
    language: int = field(default=0, metadata=LATER)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Outputs that the head adds to the image graph, in order."""
        return (SAFETY_TOKENS, *RISK_OUTPUTS) if self.language else RISK_OUTPUTS


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCalibration:
    """One of a head's two probabilities before and after its temperature, on items that the temperature is not from.

    Attributes:
        temperature: What logits are divided by; in the head's weights already.
        ece_before: Expected calibration error, percentage points, 15 bins.
        ece_after: The same with the temperature.
        n: Images it was measured on.
    """

    temperature: float
    ece_before: float
    ece_after: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTraining:
    """How a safety head was trained.

    Attributes:
        data: The set that it was trained on.
        validation: The set that temperatures and thresholds are from; None when it is a part of the other one.
        pairs: Pairs of images that it was trained on.
        validation_pairs: Pairs that temperatures and thresholds are from.
        loss_first: Mean loss of the first pass over the pairs.
        loss_last: Mean loss of the last one.
        seconds: Wall time of the passes, features apart.
    """

    data: CalibrationRecord
    validation: CalibrationRecord | None
    pairs: int
    validation_pairs: int
    epochs: int
    batch: int
    learning_rate: float
    seed: int
    loss_first: float
    loss_last: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageTraining:
    """The frozen language model that a head's safety tokens were trained with; for any other they mean nothing.

    Attributes:
        model: Folder name of its checkpoint, with the digest of its files in `model_digest`.
        question: What it was asked about every image.
        refusal: What it was taught to answer about an unsafe image, with ``{category}`` for the concept.
        weight: Of its loss, beside those of category and level.
        loss_first: Mean loss of its answers in the first pass.
        loss_last: In the last one.
    """

    model: str
    model_digest: Digest
    question: str
    refusal: str
    weight: float
    loss_first: float
    loss_last: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyHead:
    """A head on the tokens of the edited image tower (docs/how-to/safety-head.md); its weights are a file beside the record.

    Attributes:
        categories: Of `risk_logits`, in order; the first is ``"safe"``, the others are the set's concepts.
        edited_weights_digest: The edited model whose tokens it was trained on; on any other it means nothing.
        weights_digest: Of the file with its weights.
        texts_digest: Of the file with the safe texts that a redirect chooses from.
        items_digest: Of the file that tells the images it was trained and calibrated on from those of an evaluation set.
        thresholds: Action to the risk level from which on it, or a stricter one, is taken.
        false_positive_rates: Action to the share of safe images, in percent, that its threshold was chosen for.
        calibration: Output to its calibration.
        language: The language model that its safety tokens are for; None for a head without them.
        prompts: Category to what a language model is told before the question, instead of the usual words.
    """

    shape: HeadShape
    categories: tuple[str, ...]
    edited_weights_digest: Digest
    weights_digest: Digest
    texts_digest: Digest
    items_digest: Digest
    thresholds: Mapping[str, float]
    false_positive_rates: Mapping[str, float]
    calibration: Mapping[str, HeadCalibration]
    training: HeadTraining
    language: LanguageTraining | None = field(default=None, metadata=LATER)
    prompts: Mapping[str, str] = field(default_factory=dict, metadata=LATER)
