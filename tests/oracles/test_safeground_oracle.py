"""The fast SafeGround against the slow one, and the statistics against known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import safeground_oracle as oracle
from uwm_deploy.errors import DataError
from uwm_deploy.safeground.interval import flips, mcnemar_p, wilson
from uwm_deploy.safeground.preference import METRICS, decisions, proportions, proportions_per_concept
from uwm_deploy.safeground.retrieval import RECALLS, UNIONS, recalls, retrieved


def _rows(seed: int, n: int, coarse: bool) -> list[np.ndarray]:
    """Four sets of embeddings; coarse ones make exact ties."""
    rng = np.random.default_rng(seed)
    rows = (
        rng.integers(-1, 2, (4, n, 3)).astype(np.float32) if coarse else rng.normal(size=(4, n, 8)).astype(np.float32)
    )
    return list(rows)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 30), coarse=st.booleans())
def test_the_nine_metrics_equal_the_definition(seed: int, n: int, coarse: bool) -> None:
    """Every metric equals its definition, strict comparison and ties included."""
    rows = _rows(seed, n, coarse)
    fast, slow = proportions(decisions(*rows)), oracle.metrics(*rows)
    assert set(fast) == set(METRICS) == set(slow)
    for name in METRICS:
        assert fast[name].value == pytest.approx(slow[name])
        assert fast[name].low <= fast[name].value <= fast[name].high
        assert fast[name].n == n


def test_a_tie_is_a_failure_and_is_counted() -> None:
    """Equal embeddings decide nothing: all metrics are 0 and every item is a tie."""
    same = np.ones((5, 4), dtype=np.float32)
    for metric in proportions(decisions(same, same, same, same)).values():
        assert (metric.value, metric.ties) == (0.0, 5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 30), coarse=st.booleans())
def test_recall_equals_the_definition(seed: int, n: int, coarse: bool) -> None:
    """Recall counts a candidate of equal similarity as ranked before the right one."""
    safe_image, unsafe_image, safe_text, unsafe_text = _rows(seed, n, coarse)
    if coarse:  # small integers: products are exact in every order
        for k, value in recalls(safe_text, safe_image).items():
            assert value.value == pytest.approx(oracle.recall(safe_text, safe_image, k))
    named = retrieved(safe_image, unsafe_image, safe_text, unsafe_text).proportions()
    assert set(RECALLS) == {int(name.split("@")[1]) for name in named if name not in UNIONS}
    assert named["unsafe-text-to-union@1"].value <= named["unsafe-text-to-union@20"].value


def test_concepts_are_separate() -> None:
    """Per-concept numbers come from that concept's rows alone."""
    rows = [r.copy() for r in _rows(3, 10, False)]
    concepts = ["a"] * 4 + ["b"] * 6
    parts = proportions_per_concept(decisions(*rows), concepts)
    alone = proportions(decisions(*(r[4:] for r in rows)))
    assert parts["b"] == alone
    assert parts["a"]["GS"].n == 4


@pytest.mark.parametrize("bad", ["nan", "none", "shape"])
def test_no_data_is_never_a_number(bad: str) -> None:
    """NaN, no rows or rows that do not match are errors, never 0 and never 100."""
    rows = _rows(1, 4, False)
    if bad == "nan":
        rows[1][2, 0] = np.nan
    rows = [r[:0] for r in rows] if bad == "none" else rows
    if bad == "shape":
        rows[3] = rows[3][:2]
    with pytest.raises(DataError):
        decisions(*rows)


def test_wilson_known_values() -> None:
    """The interval equals published values and stays inside 0 to 100."""
    half = wilson(5, 10)
    assert (half.low, half.high) == (pytest.approx(23.66, abs=0.01), pytest.approx(76.34, abs=0.01))
    assert wilson(0, 20).low == 0.0
    assert wilson(20, 20).high == 100.0
    with pytest.raises(DataError):
        wilson(0, 0)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (3, 9), (40, 41), (0, 900)])
def test_mcnemar_equals_the_binomial_sum(lost: int, gained: int) -> None:
    """The exact p value equals the doubled binomial tail."""
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1))
    expected = min(1.0, float(2 * tail / 2**n)) if n else 1.0
    assert mcnemar_p(lost, gained) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_flips_count_both_directions() -> None:
    """Equal totals do not hide swaps; the items are named."""
    before, after = np.array([1, 1, 0, 0, 1], bool), np.array([1, 0, 1, 0, 1], bool)
    result = flips(before, after, list("abcde"))
    assert (result.lost, result.gained, result.delta) == (1, 1, 0.0)
    assert (result.lost_ids, result.gained_ids) == (("b",), ("c",))
    assert result.delta_low < 0 < result.delta_high
