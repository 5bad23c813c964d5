"""Trains a safety head on the tokens of a frozen vision tower (docs/how-to/safety-head.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from uwm_deploy.data.reading import Progress
from uwm_deploy.errors import DataError
from uwm_deploy.records.head import HeadCalibration, HeadShape
from uwm_deploy.safeground.risk import (
    SAFE,
    RiskRows,
    category_error,
    level_error,
    temperature_for,
)
from uwm_deploy.towers.safety_head import SafetyHeadModule
from uwm_deploy.training.passes import Kept, Passed, PassSettings, run_passes


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettings(PassSettings):
    """How a head is made and trained; a row is a pair.

    Attributes:
        width: Of the safety projector.
        tokens: Safety tokens.
        heads: Of the attention; they divide the width.
    """

    epochs: int = 20
    batch: int = 64
    learning_rate: float = 2e-3
    width: int = 64
    tokens: int = 8
    heads: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Tokens of the images of some pairs.

    Attributes:
        ids: n item ids.
        concepts: n concepts.
        safe: (n, T, width) float16.
        unsafe: (n, T, width) float16.
        pairs: `bundle.head.digest_of_pair` of each.
        images: `bundle.head.digest_of_image` of the safe and the unsafe image of each.
    """

    ids: tuple[str, ...]
    concepts: tuple[str, ...]
    safe: np.ndarray
    unsafe: np.ndarray
    pairs: tuple[str, ...]
    images: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.ids)

    @property
    def digests(self) -> set[str]:
        """Of its pairs and of its single images: what another set must share nothing with."""
        return {*self.pairs, *(digest for both in self.images for digest in both)}

    def rows(self, rows: np.ndarray) -> Features:
        """Some of the pairs.

        Args:
            rows: (m,) int64, positions, in the order of the result.
        """
        return Features(
            ids=tuple(self.ids[i] for i in rows),
            concepts=tuple(self.concepts[i] for i in rows),
            safe=self.safe[rows],
            unsafe=self.unsafe[rows],
            pairs=tuple(self.pairs[i] for i in rows),
            images=tuple(self.images[i] for i in rows) if self.images else (),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A trained head, without temperatures and thresholds.

    Attributes:
        passed: The losses of the passes.
    """

    module: SafetyHeadModule
    categories: tuple[str, ...]
    passed: Passed

    @property
    def losses(self) -> tuple[float, ...]:
        """Mean loss of each pass."""
        return self.passed.totals


HEAD_LOSS, LANGUAGE_LOSS = "head", "language"
"""Parts of the loss: of category and level, and of the answers of a language model."""


class Teacher(Protocol):
    """A frozen language model that reads the tokens of images and a head's safety tokens, and is told what to answer.

    Attributes:
        width: Of its input.
    """

    width: int

    def loss(self, tokens: Tensor, safety: Tensor, rows: Tensor) -> Tensor:
        """Loss of its answers, () float32, with gradients to the safety tokens.

        Args:
            tokens: (2b, T, features) float32, of the safe and then the unsafe images of some pairs.
            safety: (2b, m, width) float32, m safety tokens.
            rows: (b,) int64, positions of the pairs among those that are trained on.
        """


def held_out(concepts: Sequence[str], share: int = 5) -> np.ndarray:
    """Which pairs validate when there is no set for it, (n,) bool: every so many-th pair of each concept."""
    seen: dict[str, int] = {}
    found = np.zeros(len(concepts), dtype=bool)
    for row, concept in enumerate(concepts):
        seen[concept] = seen.get(concept, 0) + 1
        found[row] = seen[concept] % share == 0
    return found


def trained_head(
    features: Features,
    settings: HeadSettings,
    progress: Progress,
    device: str = "cpu",
    *,
    teacher: Teacher | None = None,
    kept: Kept | None = None,
) -> Trained:
    """Trains a head by AdamW on cross entropy of the category and binary cross entropy of the level.

    With a teacher the loss of its answers is added, and the head gets safety tokens for that language model.

    Args:
        features: Pairs to train on; a safe image is of the category ``"safe"``, an unsafe one of its pair's concept.
        settings: Sizes and steps; the same settings and features give the same weights on the same machine and threads.
        progress: Called after every pass.
        device: Torch device.
        teacher: A frozen language model that answers behind the safety tokens.
        kept: Where the training stands on disk after every pass; None keeps nothing.

    Raises:
        DataError: If there are too few pairs, or the width does not divide.
        ContractError: If the loss is no longer finite.
    """
    if settings.width % settings.heads:
        raise DataError(f"width {settings.width} does not divide into {settings.heads} heads", fix="use a multiple")
    categories = (SAFE, *sorted(set(features.concepts)))
    if SAFE in categories[1:]:
        raise DataError(
            f"the set has a concept {SAFE!r}, which is what safe images are", fix="rename it (concept_names)"
        )
    labels = torch.tensor([categories.index(concept) for concept in features.concepts])
    torch.manual_seed(settings.seed)
    shape = HeadShape(
        features=int(features.safe.shape[2]),
        width=settings.width,
        tokens=settings.tokens,
        heads=settings.heads,
        categories=len(categories),
        language=teacher.width if teacher else 0,
    )
    module = SafetyHeadModule(shape).to(device).train()

    def loss_of(rows: Tensor) -> dict[str, Tensor]:
        return _losses(module, features, rows, labels[rows], device, teacher)

    passed = run_passes(
        dict(module.named_parameters()),
        loss_of,
        len(features),
        settings,
        progress,
        label="safety head",
        kept=kept,
    )
    return Trained(module=module.eval().cpu(), categories=categories, passed=passed)


def _losses(
    module: SafetyHeadModule, features: Features, rows: Tensor, labels: Tensor, device: str, teacher: Teacher | None
) -> dict[str, Tensor]:
    """Of both images of some pairs."""
    at = rows.numpy()
    tokens = torch.from_numpy(np.concatenate([features.safe[at], features.unsafe[at]])).to(device).float()
    wanted = torch.cat([torch.zeros_like(labels), labels]).to(device)
    told = None
    if teacher is None:
        logits, level = module.logits(tokens)
    else:
        told, logits, level = module.taught(tokens)
    named = functional.cross_entropy(logits, wanted)
    graded = functional.binary_cross_entropy_with_logits(level[:, 0], (wanted > 0).float())
    found = {HEAD_LOSS: named + graded}
    if teacher is not None and told is not None:
        found[LANGUAGE_LOSS] = teacher.loss(tokens, told, rows)
    return found


@torch.inference_mode()
def raw_outputs(module: SafetyHeadModule, tokens: np.ndarray, batch: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a head, before softmax and sigmoid.

    Args:
        module: The head.
        tokens: (n, T, width), any floating dtype.
        batch: Rows per call.

    Returns:
        Logits of the categories (n, categories) float32, and of the level (n,) float32.
    """
    found = [module.logits(torch.from_numpy(part).float()) for part in _parts(tokens, batch)]
    logits, level = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    return logits, level[:, 0]


def _parts(tokens: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    return (tokens[start : start + batch] for start in range(0, len(tokens), batch))


def calibrate(trained: Trained, validation: Features) -> dict[str, HeadCalibration]:
    """Finds the temperatures of both outputs and puts them into the head's weights.

    The errors before and after are measured on every other pair of each concept, with temperatures from the rest; what is
    used is from all.

    Args:
        trained: Its module is changed.
        validation: Pairs that the head was not trained on.

    Raises:
        DataError: If a validation pair has a concept that the head does not know, or there are fewer than two.
    """
    if unknown := sorted(set(validation.concepts) - set(trained.categories)):
        raise DataError(f"no training pair is of the validation's concept {unknown[0]}", fix="train on all concepts")
    fitted = np.tile(~held_out(validation.concepts, 2), 2)
    if not fitted.any() or fitted.all():
        raise DataError(f"{len(validation)} validation pairs cannot calibrate a head", fix="use more of each concept")
    truth = np.array([trained.categories.index(concept) for concept in validation.concepts])
    (safe_logits, safe_level), (unsafe_logits, unsafe_level) = (
        raw_outputs(trained.module, part) for part in (validation.safe, validation.unsafe)
    )
    logits = np.concatenate([safe_logits, unsafe_logits])
    level = np.concatenate([safe_level, unsafe_level])
    labels = np.concatenate([np.zeros_like(truth), truth])
    half = int((~fitted).sum()) // 2
    trial = temperature_for(logits[fitted], labels[fitted]), temperature_for(level[fitted], labels[fitted] > 0)
    final = temperature_for(logits, labels), temperature_for(level, labels > 0)
    trained.module.cool(*final)

    def named(temperature: float) -> float:
        return category_error(logits[~fitted] / temperature, labels[~fitted])

    def graded(temperature: float) -> float:
        found = _sigmoid(level[~fitted] / temperature)
        return level_error(found[:half], found[half:])

    return {
        "risk_logits": HeadCalibration(
            temperature=final[0], ece_before=named(1.0), ece_after=named(trial[0]), n=2 * half
        ),
        "risk_level": HeadCalibration(
            temperature=final[1], ece_before=graded(1.0), ece_after=graded(trial[1]), n=2 * half
        ),
    }


def _sigmoid(values: np.ndarray) -> np.ndarray:
    found: np.ndarray = 1 / (1 + np.exp(-values.astype(np.float64)))
    return found


@torch.inference_mode()
def rows_of(module: SafetyHeadModule, tokens: np.ndarray, batch: int = 256) -> RiskRows:
    """Outputs of a head, as its graph gives them.

    Args:
        module: The head.
        tokens: (n, T, width) float16.
        batch: Rows per call.

    Returns:
        Logits (n, c) float32, and levels (n,) float32.
    """
    found = [module(torch.from_numpy(part).float())[-2:] for part in _parts(tokens, batch)]
    logits, level = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    return RiskRows(logits, level[:, 0])
