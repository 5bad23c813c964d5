"""Trains a safety head on the tokens of a frozen vision tower (docs/how-to/safety-head.md)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from uwm_deploy.data.reading import Progress
from uwm_deploy.errors import ContractError, DataError
from uwm_deploy.records.head import HeadCalibration, HeadShape
from uwm_deploy.safeground.risk import (
    SAFE,
    RiskRows,
    category_error,
    level_error,
    temperature_for,
)
from uwm_deploy.towers.safety_head import SafetyHeadModule

WEIGHT_DECAY = 0.01
WARM_UP_SHARE = 0.05
"""Of the steps, in which the learning rate grows from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettings:
    """How a head is trained.

    Attributes:
        width: Of the safety projector.
        tokens: Safety tokens.
        heads: Of the attention; they divide the width.
        epochs: Passes over the pairs.
        batch: Pairs per step.
        learning_rate: At its peak; it falls to 0 along a cosine.
        seed: Of the first weights and of the order of the pairs.
    """

    width: int = 64
    tokens: int = 8
    heads: int = 4
    epochs: int = 20
    batch: int = 64
    learning_rate: float = 2e-3
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Tokens of the images of some pairs.

    Attributes:
        ids: n item ids.
        concepts: n concepts.
        safe: (n, T, width) float16.
        unsafe: (n, T, width) float16.
        pairs: `bundle.head.digest_of_pair` of each.
    """

    ids: tuple[str, ...]
    concepts: tuple[str, ...]
    safe: np.ndarray
    unsafe: np.ndarray
    pairs: tuple[str, ...]

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.ids)

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
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A trained head, without temperatures and thresholds.

    Attributes:
        losses: Mean loss of each pass.
    """

    module: SafetyHeadModule
    categories: tuple[str, ...]
    losses: tuple[float, ...]
    seconds: float


def held_out(concepts: Sequence[str], share: int = 5) -> np.ndarray:
    """Which pairs validate when there is no set for it, (n,) bool: every so many-th pair of each concept."""
    seen: dict[str, int] = {}
    found = np.zeros(len(concepts), dtype=bool)
    for row, concept in enumerate(concepts):
        seen[concept] = seen.get(concept, 0) + 1
        found[row] = seen[concept] % share == 0
    return found


def trained_head(features: Features, settings: HeadSettings, progress: Progress, device: str = "cpu") -> Trained:
    """Trains a head by AdamW on cross entropy of the category and binary cross entropy of the level.

    Args:
        features: Pairs to train on; a safe image is of the category ``"safe"``, an unsafe one of its pair's concept.
        settings: Sizes and steps; the same settings and features give the same weights on the same machine and threads.
        progress: Called after every pass.
        device: Torch device.

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
    )
    module = SafetyHeadModule(shape).to(device).train()
    steps = settings.epochs * math.ceil(len(features) / settings.batch)
    optimiser = torch.optim.AdamW(module.parameters(), lr=settings.learning_rate, weight_decay=WEIGHT_DECAY)
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    order = torch.Generator().manual_seed(settings.seed)
    started, losses = time.perf_counter(), []
    for epoch in range(settings.epochs):
        total = 0.0
        for rows in torch.split(torch.randperm(len(features), generator=order), settings.batch):
            loss = _loss(module, features, rows, labels[rows], device)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            rates.step()
            total += float(loss.detach()) * len(rows)
        losses.append(total / len(features))
        if not math.isfinite(losses[-1]):
            raise ContractError(f"the loss is {losses[-1]} after pass {epoch + 1}", fix="use a smaller --learning-rate")
        progress(f"safety head, loss {losses[-1]:.3f}", epoch + 1, settings.epochs)
    return Trained(
        module=module.eval().cpu(), categories=categories, losses=tuple(losses), seconds=time.perf_counter() - started
    )


def _rate(step: int, steps: int) -> float:
    warm = max(1, int(WARM_UP_SHARE * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _loss(module: SafetyHeadModule, features: Features, rows: Tensor, labels: Tensor, device: str) -> Tensor:
    """Of both images of some pairs."""
    at = rows.numpy()
    both = np.concatenate([features.safe[at], features.unsafe[at]])
    logits, level = module.logits(torch.from_numpy(both).to(device).float())
    wanted = torch.cat([torch.zeros_like(labels), labels]).to(device)
    named = functional.cross_entropy(logits, wanted)
    return named + functional.binary_cross_entropy_with_logits(level[:, 0], (wanted > 0).float())


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
    found = [module(torch.from_numpy(part).float()) for part in _parts(tokens, batch)]
    logits, level = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    return RiskRows(logits, level[:, 0])
