"""Passes of AdamW over a set, with a warm-up and a cosine; after each one it is on disk where the training stands."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from uwm_deploy.data.reading import Progress
from uwm_deploy.errors import ContractError, IntegrityError
from uwm_deploy.records.files import write_atomic
from uwm_deploy.records.plain_json import value_from_json
from uwm_deploy.training.checkpoints import moments_of, put_moments

WEIGHT_DECAY = 0.01
WARM_UP_SHARE = 0.05
"""Of the steps, in which the learning rate grows from 0."""

FILE = "passes.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSettings:
    """How often and how fast.

    Attributes:
        epochs: Passes over the set.
        batch: Rows per step.
        learning_rate: At its peak; it falls to 0 along a cosine.
        seed: Of the order, of what is drawn at random in a pass, and of first weights.
    """

    epochs: int
    batch: int
    learning_rate: float
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """What the passes showed.

    Attributes:
        losses: Mean of each part of the loss in each pass; the parts add up to what was minimised.
        seconds: Wall time of all passes, those of an interrupted run included.
    """

    losses: tuple[Mapping[str, float], ...]
    seconds: float

    @property
    def totals(self) -> tuple[float, ...]:
        """Mean loss of each pass."""
        return tuple(sum(parts.values()) for parts in self.losses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Where a training stands on disk.

    Attributes:
        folder: Keeps one file, written whole after every pass.
        key: Digest of everything that the training depends on; the file of another one is not taken.
    """

    folder: Path
    key: str

    @property
    def file(self) -> Path:
        """The file."""
        return self.folder / FILE


Loss = Callable[[Tensor], Mapping[str, Tensor]]
"""From (b,) int64 rows to the parts of their mean loss, () float32 each."""


def run_passes(
    parameters: Mapping[str, Tensor],
    loss_of: Loss,
    rows: int,
    settings: PassSettings,
    progress: Progress,
    *,
    label: str,
    kept: Kept | None = None,
) -> Passed:
    """Trains parameters in place; goes on where an interrupted run of the same key was.

    Args:
        parameters: What is trained, by name: float32, any shape.
        loss_of: From (b,) int64 rows to the parts of their mean loss, () float32 each.
        rows: Number of rows.
        settings: How often and how fast; the same ones give the same numbers on the same machine and threads.
        progress: Called after every pass.
        label: For the progress bar.
        kept: Where it stands on disk; None keeps nothing.

    Raises:
        ContractError: If the loss is no longer finite.
        IntegrityError: If the file of an interrupted run is damaged.
    """
    steps = settings.epochs * math.ceil(rows / settings.batch)
    optimiser = torch.optim.AdamW(list(parameters.values()), lr=settings.learning_rate, weight_decay=WEIGHT_DECAY)
    losses, seconds = _resumed(parameters, optimiser, kept)
    done = len(losses)
    order = torch.Generator().manual_seed(settings.seed)
    for epoch in range(settings.epochs):
        shuffled = torch.randperm(
            rows, generator=order
        )  # also of passes that are done, so that the next ones are the same
        if epoch < done:
            continue
        torch.manual_seed(settings.seed + epoch)
        started, parts = time.perf_counter(), torch.split(shuffled, settings.batch)
        losses.append(_one_pass(parts, loss_of, optimiser, settings.learning_rate, epoch * len(parts), steps))
        seconds += time.perf_counter() - started
        total = sum(losses[-1].values())
        if not math.isfinite(total):
            raise ContractError(f"the loss is {total} after pass {epoch + 1}", fix="use a smaller learning rate")
        if kept is not None:
            _write(kept, parameters, optimiser, losses, seconds)
        progress(f"{label}, loss {total:.3f}", epoch + 1, settings.epochs)
    return Passed(losses=tuple(losses), seconds=seconds)


def _one_pass(
    parts: tuple[Tensor, ...], loss_of: Loss, optimiser: torch.optim.Optimizer, peak: float, step: int, steps: int
) -> dict[str, float]:
    """Mean of every part of the loss over one pass."""
    sums: dict[str, float] = {}
    for number, rows in enumerate(parts):
        for group in optimiser.param_groups:
            group["lr"] = peak * _rate(step + number, steps)
        found = loss_of(rows)
        optimiser.zero_grad()
        torch.autograd.backward(torch.stack(list(found.values())).sum())
        optimiser.step()
        for name, part in found.items():
            sums[name] = sums.get(name, 0.0) + float(part.detach()) * len(rows)
    total = sum(map(len, parts))
    return {name: value / total for name, value in sums.items()}


def _rate(step: int, steps: int) -> float:
    warm = max(1, int(WARM_UP_SHARE * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _write(
    kept: Kept,
    parameters: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    losses: list[dict[str, float]],
    seconds: float,
) -> None:
    tensors = {f"parameters/{name}": part.detach().cpu().contiguous() for name, part in parameters.items()}
    for name, parts in moments_of(optimiser, parameters).items():
        tensors |= {f"moments/{name}/{kind}": part.contiguous() for kind, part in parts.items()}
    about = {"key": kept.key, "losses": losses, "seconds": seconds}
    kept.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(kept.file, save(tensors, {"about": json.dumps(about, sort_keys=True)}))


@torch.no_grad()
def _resumed(
    parameters: Mapping[str, Tensor], optimiser: torch.optim.Optimizer, kept: Kept | None
) -> tuple[list[dict[str, float]], float]:
    """Losses of the passes that are done and their time; the parameters and the optimiser are put where they were."""
    if kept is None or not kept.file.is_file():
        return [], 0.0
    try:
        with safe_open(str(kept.file), framework="pt") as file:
            about: dict[str, Any] = value_from_json((file.metadata() or {})["about"])
            if about["key"] != kept.key:
                return [], 0.0
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
        losses, seconds = [dict(part) for part in about["losses"]], float(about["seconds"])
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
        for name, parameter in parameters.items():
            parameter.copy_(tensors.pop(f"parameters/{name}"))
        for place, part in tensors.items():
            name, _, kind = place.removeprefix("moments/").rpartition("/")
            moments[name][kind] = part
        put_moments(optimiser, parameters, moments)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise IntegrityError(
            f"{kept.file.name} cannot be read: {error}", fix=f"remove {kept.folder.name}; training starts again"
        ) from error
    return losses, seconds
