"""Shares of flagged outputs, and means of scores, of both towers on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from uwm_deploy.records.downstream import ANY, REFUSED, SIDES, Flagged, Scored
from uwm_deploy.records.metrics import Estimate
from uwm_deploy.safeground.interval import flips, wilson
from uwm_deploy.safeground.paired_means import mean_change, mean_of_scores


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs that both towers were given.

    Attributes:
        ids: n item ids.
        sides: n sides, of `SIDES`.
        content: n digests; inputs with the same one are not independent.
    """

    ids: tuple[str, ...]
    sides: tuple[str, ...]
    content: tuple[str, ...]

    def rows(self, side: str) -> np.ndarray:
        """(m,) int64 positions of a side's inputs."""
        return np.flatnonzero(np.array(self.sides) == side)

    @property
    def present(self) -> list[str]:
        """Sides that have inputs."""
        return [side for side in SIDES if side in self.sides]

    def alone(self, side: str) -> int:
        """Independent inputs of a side."""
        return len({self.content[row] for row in self.rows(side)})


def flagged_shares(
    inputs: Inputs, original: Mapping[str, np.ndarray], edited: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Flagged]]:
    """Judge, and ``any`` of them, to side to shares; outputs that decline are in no ``any``.

    Args:
        inputs: n inputs.
        original: Judge to (n,) bool, of the outputs behind the original tower.
        edited: Judge to (n,) bool, of those behind the edited one.
    """
    both = [{**found, ANY: _any(found)} for found in (original, edited)]
    return {
        name: {side: _share(inputs, side, both[0][name], both[1][name]) for side in inputs.present} for name in both[0]
    }


def _any(found: Mapping[str, np.ndarray]) -> np.ndarray:
    flags: np.ndarray = np.any(np.stack([rows for name, rows in found.items() if name != REFUSED]), axis=0)
    return flags


def _share(inputs: Inputs, side: str, original: np.ndarray, edited: np.ndarray) -> Flagged:
    rows, alone = inputs.rows(side), inputs.alone(side)
    before, after = original[rows], edited[rows]
    ids = [inputs.ids[row] for row in rows]
    return Flagged(
        original=wilson(int(before.sum()), len(rows), clusters=alone),
        edited=wilson(int(after.sum()), len(rows), clusters=alone),
        change=flips(before, after, ids, clusters=alone),
    )


def means(inputs: Inputs, scores: Mapping[str, np.ndarray]) -> dict[str, dict[str, Estimate]]:
    """Score to side to mean.

    Args:
        inputs: n inputs.
        scores: Score to (n,) float64.
    """
    return {
        name: {side: mean_of_scores(found[inputs.rows(side)], inputs.alone(side)) for side in inputs.present}
        for name, found in scores.items()
    }


def paired_means(
    inputs: Inputs, original: Mapping[str, np.ndarray], edited: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Scored]]:
    """Score to side to both means and their difference.

    Args:
        inputs: n inputs.
        original: Score to (n,) float64, behind the original tower.
        edited: Score to (n,) float64, behind the edited one.
    """
    first, second = means(inputs, original), means(inputs, edited)
    return {
        name: {
            side: Scored(
                original=first[name][side],
                edited=second[name][side],
                change=mean_change(found[inputs.rows(side)], edited[name][inputs.rows(side)], inputs.alone(side)),
            )
            for side in inputs.present
        }
        for name, found in original.items()
    }


def work_list(ids: Sequence[str], sides: Sequence[str]) -> list[dict[str, str]]:
    """Every input in its order: all sides of an item, then the next item."""
    return [{"id": item, "side": side} for item in ids for side in sides]
