"""Settings of the safety axis that a choice of strength tries; the same ones for the same seed."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np

from uwm_deploy.records.strength import AxisSetting

T = TypeVar("T")


def _setting(
    g: float,
    o: float,
    kappa: float,
    a: float,
    tau: float,
    rho: float = 1e-2,
    repel: tuple[int, float, float] = (0, 0, 0),
) -> AxisSetting:
    axes, image, text = repel
    return AxisSetting(
        g=g, o=o, kappa=kappa, a=a, tau=tau, rho=rho, axes=axes, repel_image=float(image), repel_text=float(text)
    )


PRESETS = {
    "R2": _setting(0.6, 0.0, 0.0, 1.0, 0.5),
    "G2": _setting(0.7, 0.5, 0.4, 1.0, 0.0),
    "G3": _setting(0.5, 0.5, 0.2, 1.0, 0.5),
    "G4": _setting(0.5, 1.0, 0.6, 0.5, 0.5),
}
"""Settings by their names in docs/background/safety-axis.md section 5."""

TABLE = (
    _setting(0.5, 1.0, 0.1, 1.0, 0.0, 3e-2, (3, 0.2, 0.2)),
    _setting(0.5, 1.0, 0.3, 1.0, 0.3, 3e-2, (2, 0.0, 0.1)),
    _setting(0.5, 1.0, 0.4, 1.0, 0.3, 1e-3, (6, 0.1, 0.0)),
    _setting(0.5, 1.0, 0.3, 0.5, 0.5, 1e-2, (3, 0.2, 0.2)),
    _setting(0.5, 1.0, 0.4, 0.5, 0.7, 1e-3, (4, 0.1, 0.1)),
    _setting(0.5, 1.0, 0.4, 0.5, 1.0, 1e-3, (2, 0.1, 0.1)),
)
"""Settings with repelling axes that a search on the demo found good."""

WEAK = (
    *(_setting(g, 0.0, 0.0, 1.0, 0.5) for g in (0.1, 0.2, 0.3, 0.4, 0.5)),
    *(_setting(g, 1.0, kappa, 1.0, 0.0) for g in (0.2, 0.4) for kappa in (0.02, 0.05, 0.1, 0.2)),
)
"""Settings that change little, for tight limits and for models whose similarities lie closer together than the demo's."""

_COUNT = 256
"""Candidates in all."""


def candidates_of(seed: int) -> tuple[AxisSetting, ...]:
    """Candidates: presets, the table, weak settings, and random settings from the ranges in which the table's ones lie."""
    known = (*PRESETS.values(), *TABLE, *WEAK)
    random = np.random.default_rng(seed)
    return (*known, *(_drawn(random) for _ in range(_COUNT - len(known))))


def _drawn(random: np.random.Generator) -> AxisSetting:
    """One random setting.

    tau, a and rho come from few values: settings with the same value share the costly part, a matrix or a solution.
    """
    axes = _pick(random, (0, 1, 2, 3, 4, 5))
    repel = (_pick(random, (0.0, 0.05, 0.075, 0.1)), _pick(random, (0.05, 0.075, 0.1, 0.15))) if axes else (0.0, 0.0)
    return _setting(
        g=_pick(random, (0.3, 0.4, 0.5, 0.6, 0.7)),
        o=_pick(random, (0.0, 0.25, 0.5, 1.0, 1.5)),
        kappa=_kappa(random),
        a=_pick(random, (0.5, 0.7, 0.85, 1.0)),
        tau=_pick(random, (0.0, 0.3, 0.5)),
        rho=_pick(random, (1e-3, 1e-2, 3e-2)),
        repel=(axes, *repel),
    )


def _kappa(random: np.random.Generator) -> float:
    """Zero with probability 0.1, else log-uniform from 0.05 to 0.6, rounded to two digits."""
    value = math.exp(random.uniform(math.log(0.05), math.log(0.6)))
    return 0.0 if random.random() < 0.1 else float(f"{value:.2g}")


def _pick(random: np.random.Generator, values: tuple[T, ...]) -> T:
    return values[int(random.integers(len(values)))]
