"""Expected flips: near what is counted on many decisions, and steadier than counting on few."""

from __future__ import annotations

import numpy as np
import pytest

from uwm_deploy.safeground.expected_flips import expected_flips
from uwm_deploy.safeground.preference import BASIC, Decisions


def decided(margins: np.ndarray) -> Decisions:
    rows = dict.fromkeys(BASIC, margins)
    return Decisions({n: m > 0 for n, m in rows.items()}, {n: m == 0 for n, m in rows.items()}, rows)


def drawn(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Margins, and the same after a change that is larger far from a tie, as that of rounding is."""
    rng = np.random.default_rng(seed)
    before = rng.normal(0.05, 0.2, n)
    return before, before + rng.normal(0, 0.002 + 0.01 * np.abs(before))


def counted(before: np.ndarray, after: np.ndarray) -> float:
    return 100 * float(np.mean((before > 0) != (after > 0)))


def test_it_is_near_the_count_of_many() -> None:
    before, after = drawn(200_000, 0)
    assert expected_flips(decided(before), decided(after)) == pytest.approx(counted(before, after), rel=0.1)


def test_it_varies_less_than_the_count_of_few() -> None:
    pairs = [drawn(512, seed) for seed in range(40)]
    estimates = [expected_flips(decided(before), decided(after)) for before, after in pairs]
    assert np.std(estimates) < 0.75 * np.std([counted(before, after) for before, after in pairs])


@pytest.mark.parametrize("n", [1, 3, 64, 65, 66])
def test_without_a_change_nothing_flips_and_few_items_are_enough(n: int) -> None:
    """A change that is as large as every margin flips half of them: the other half leads away from the tie."""
    before = np.linspace(0.1, 0.2, n)
    assert expected_flips(decided(before), decided(before)) == 0
    assert expected_flips(decided(before), decided(-before)) == 50
    before[0] = 0  # a tie
    assert expected_flips(decided(before), decided(before)) == 0
