"""Whether an engine computes attention in steps or as one node.

Its numbers on calibration inputs decide first, then its time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from uwm_deploy.errors import ContractError, PrerequisiteError
from uwm_deploy.records.graph import EngineArtifact, Precision, Profile
from uwm_deploy.runtime.session import Session, external_data_of, open_engine

Way = Literal["steps", "fused"]

ROWS = 16
"""Calibration inputs of each class that the numbers are compared on."""

FASTER = 0.97
"""One node must take at most this share of the time of the steps; two runs of one engine can differ by more than nothing."""

APART = {Precision.FP32: 1e-5}
"""Largest difference of an embedding's entry, as a share of the largest entry, by precision."""

APART_LOWER = 5e-3
"""The same in any lower precision, where a number may be rounded to the next step."""

_ROUNDS, _SECONDS = (5, 60), 2.0
"""Turns that are timed at one batch size: so many, and until this time is over."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Which way was chosen.

    Attributes:
        fused: Whether each attention is one node.
        why: What was measured, for the record.
    """

    fused: bool
    why: str


def engine_by_measurement(
    build: Callable[[Way, Path], EngineArtifact], folder: Path, rows: np.ndarray
) -> EngineArtifact:
    """Builds an engine both ways, and leaves the one that is better here.

    Args:
        build: Builds it one way, in a folder.
        folder: Where the engine goes.
        rows: (n, ...) float32, uint8 or integers: calibration inputs, as the engine takes them.
    """
    steps = build("steps", folder)
    if not steps.runnable:
        return _noted(steps, "not measured: the engine cannot be executed here")
    # Beside the folder, and as deep: the settings of a build have relative paths.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-attention-") as name:
        other = Path(name)
        try:
            fused = build("fused", other)
            decision = _measured(steps, folder, fused, other, rows)
        except (ContractError, PrerequisiteError) as error:
            return _noted(steps, f"one node refused: {error.what}")
        if not decision.fused:
            return _noted(steps, decision.why)
        for file in other.iterdir():
            file.replace(folder / file.name)
    return _noted(fused, decision.why)


def decide(steps: Session, fused: Session, rows: np.ndarray, profile: Profile, limit: float) -> Decision:
    """Compares two engines of one tower.

    Args:
        steps: With attention in steps.
        fused: With one node for each attention.
        rows: (n, ...) float32, uint8 or integers: calibration inputs, as the engines take them.
        profile: Its smallest and its most usual batch are run.
        limit: Largest difference of an entry of an embedding, as a share of the largest entry.
    """
    sizes = sorted({profile.min, profile.opt})
    worst = max(_difference(steps, fused, rows, size) for size in sizes)
    if not worst <= limit:
        why = f"one node refused: embeddings differ by {worst:.2g}, and may by {limit:.0e}"
        return Decision(fused=False, why=why)
    shares = [_share_of_time(steps, fused, np.resize(rows, (size, *rows.shape[1:]))) for size in sizes]
    took = ", ".join(f"{share:.2f} at batch {size}" for share, size in zip(shares, sizes, strict=True))
    why = f"one node takes {took} of the time of steps; embeddings differ by {worst:.1g}"
    return Decision(fused=statistics.geometric_mean(shares) <= FASTER, why=why)


def _measured(
    steps: EngineArtifact, steps_folder: Path, fused: EngineArtifact, fused_folder: Path, rows: np.ndarray
) -> Decision:
    limit = APART.get(Precision(steps.precision), APART_LOWER)
    with _opened(steps, steps_folder) as first, _opened(fused, fused_folder) as second:
        return decide(first, second, rows, steps.profile, limit)


@contextlib.contextmanager
def _opened(engine: EngineArtifact, folder: Path) -> Iterator[Session]:
    content, external = (folder / engine.file).read_bytes(), external_data_of(folder, engine.external_data)
    session = open_engine(engine, content, external)
    try:
        yield session
    finally:
        session.close()


def _difference(steps: Session, fused: Session, rows: np.ndarray, size: int) -> float:
    """Largest difference of an entry, as a share of the largest entry; infinite where a number is none."""
    parts = [rows[at : at + size] for at in range(0, len(rows), size)]
    wanted, found = (np.concatenate([session.run(part) for part in parts]) for session in (steps, fused))
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def _share_of_time(steps: Session, fused: Session, batch: np.ndarray) -> float:
    """How long one node takes, divided by how long the steps take: they take turns, and begin in turns.

    Of each the fastest call counts, because other work on the machine only adds to a call.
    """
    sessions, begun = (steps, fused), time.perf_counter()
    took: tuple[list[float], list[float]] = ([], [])
    least, most = _ROUNDS
    while len(took[0]) < least or (len(took[0]) < most and time.perf_counter() - begun < _SECONDS):
        order: Sequence[int] = (0, 1) if len(took[0]) % 2 else (1, 0)
        for which in order:
            started = time.perf_counter()
            sessions[which].run(batch)
            took[which].append(time.perf_counter() - started)
    return min(took[1]) / min(took[0])


def _noted(engine: EngineArtifact, why: str) -> EngineArtifact:
    return dataclasses.replace(engine, settings={**engine.settings, "attention_why": why})
