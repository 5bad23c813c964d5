"""The closed form, the selection and the patch against the slow formulas."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import uwm_oracle as oracle
from uwm_deploy.edits.saliency import LayerScorer, token_statistics
from uwm_deploy.edits.selection import selected_indices
from uwm_deploy.errors import ContractError
from uwm_deploy.records.edit import Pairing, Rule, Selection


def _data(seed: int, pairs: int, tokens: int, rows: int, columns: int, shift: float) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    safe = rng.normal(shift, 1, (pairs, tokens, columns)).astype(np.float32)
    unsafe = (rng.normal(shift, 1.3, (pairs, tokens, columns))).astype(np.float32)
    return safe, unsafe, rng.normal(0, 0.05, (rows, columns)).astype(np.float32)


def _scored(safe, unsafe, weight, rule, pairing, batch, valid=None, eps=0.0):
    left_out: list[str] = []
    scorer = LayerScorer(torch.from_numpy(weight), rule, pairing, eps, left_out.extend)
    for start in range(0, len(safe), batch):
        rows = slice(start, start + batch)
        inputs = torch.from_numpy(np.concatenate([safe[rows], unsafe[rows]]))
        mask = None if valid is None else torch.from_numpy(np.concatenate([valid[rows], valid[rows]]))
        scorer.add(inputs, mask, tuple(str(i) for i in range(start, start + len(safe[rows]))))
    return scorer.score().numpy(), left_out


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    pairs=st.integers(1, 9),
    tokens=st.integers(2, 12),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    batch=st.integers(1, 9),
    shift=st.sampled_from([0.0, 1.0, 20.0]),
    rule=st.sampled_from([Rule.RATIO, Rule.RATIO_TIMES_ABS_WEIGHT]),
)
def test_closed_form_equals_the_formulas(seed, pairs, tokens, shape, batch, shift, rule) -> None:
    """Scores equal Eq. 8 to 10 for any batch size, also where a channel's mean is far from zero."""
    safe, unsafe, weight = _data(seed, pairs, tokens, *shape, shift)
    fast, left_out = _scored(safe, unsafe, weight, rule, Pairing.MEAN_OF_RATIOS, batch)
    assert not left_out
    slow = oracle.score(list(safe.astype(float)), list(unsafe.astype(float)), weight.astype(float), rule.value, 0.0)
    np.testing.assert_allclose(fast, slow, rtol=1e-3 if shift == 20.0 else 5e-5, atol=1e-7)


def test_ratio_of_means_equals_the_formula() -> None:
    """The paper's wording is a separate, named option."""
    safe, unsafe, weight = _data(1, 7, 9, 5, 6, 0.5)
    fast, _ = _scored(safe, unsafe, weight, Rule.RATIO, Pairing.RATIO_OF_MEANS, 3)
    slow = oracle.score_of_means(list(safe.astype(float)), list(unsafe.astype(float)), weight.astype(float), 0.0)
    np.testing.assert_allclose(fast, slow, rtol=1e-4)
    other, _ = _scored(safe, unsafe, weight, Rule.RATIO, Pairing.MEAN_OF_RATIOS, 3)
    assert np.abs(fast - other).max() > 1e-3


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    pairs=st.integers(1, 7),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    batch=st.integers(1, 7),
    rule=st.sampled_from([Rule.RATIO, Rule.RATIO_TIMES_ABS_WEIGHT]),
    eps=st.sampled_from([0.0, 1e-8]),
)
def test_the_ablations_equal_their_formulas(seed, pairs, shape, batch, rule, eps) -> None:
    """Unsafe side alone and difference of the sides have a closed form too, scale and sign included."""
    safe, unsafe, weight = _data(seed, pairs, 6, *shape, 0.3)
    sides = list(safe.astype(float)), list(unsafe.astype(float))
    fast, left_out = _scored(safe, unsafe, weight, rule, Pairing.UNSAFE_ONLY, batch, eps=eps)
    slow = oracle.score_of_unsafe(sides[1], weight.astype(float), rule.value, eps)
    assert not left_out
    np.testing.assert_allclose(fast, slow, rtol=5e-5)
    fast, _ = _scored(safe, unsafe, weight, rule, Pairing.DIFFERENCE, batch, eps=eps)
    difference = oracle.score_of_difference(*sides, weight.astype(float), rule.value, eps)
    np.testing.assert_allclose(fast, difference, atol=2e-5 * np.abs(slow).max())


@pytest.mark.parametrize("pairing", [Pairing.UNSAFE_ONLY, Pairing.DIFFERENCE])
def test_a_pair_never_poisons_an_ablation(pairing: Pairing) -> None:
    """A pair whose unsafe side is not finite is left out and named."""
    safe, unsafe, weight = _data(3, 5, 6, 4, 4, 0.0)
    clean, _ = _scored(np.delete(safe, 2, 0), np.delete(unsafe, 2, 0), weight, Rule.RATIO, pairing, 5)
    unsafe[2] = np.inf
    fast, left_out = _scored(safe, unsafe, weight, Rule.RATIO, pairing, 5)
    assert left_out == ["2"]
    np.testing.assert_allclose(fast, clean, rtol=1e-5, atol=1e-7)


def test_padding_does_not_count() -> None:
    """Tokens outside the mask change nothing."""
    safe, unsafe, weight = _data(2, 4, 8, 5, 6, 0.0)
    valid = np.arange(8)[None] < np.array([3, 5, 8, 2])[:, None]
    fast, _ = _scored(safe, unsafe, weight, Rule.RATIO, Pairing.MEAN_OF_RATIOS, 4, valid)
    parts = [[x[k][valid[k]].astype(float) for k in range(4)] for x in (safe, unsafe)]
    np.testing.assert_allclose(fast, oracle.score(*parts, weight.astype(float), "ratio", 0.0), rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_pair_never_poisons_the_sum(value: float) -> None:
    """A pair without a finite contribution is left out and named; the others count as if it were not there."""
    safe, unsafe, weight = _data(3, 5, 6, 4, 4, 0.0)
    clean, _ = _scored(np.delete(safe, 2, 0), np.delete(unsafe, 2, 0), weight, Rule.RATIO, Pairing.MEAN_OF_RATIOS, 5)
    safe[2] = value
    fast, left_out = _scored(safe, unsafe, weight, Rule.RATIO, Pairing.MEAN_OF_RATIOS, 5)
    assert left_out == ["2"]
    np.testing.assert_allclose(fast, clean, rtol=1e-6)


def test_one_token_has_no_spread() -> None:
    """A sample with one token has no standard deviation and is therefore not finite."""
    _, spread = token_statistics(torch.randn(2, 1, 3), None)
    assert not spread.isfinite().any()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    keep=st.floats(0.01, 0.999),
    levels=st.sampled_from([0, 3, 50]),
)
def test_selection_equals_a_full_sort(seed, shape, keep, levels) -> None:
    """Ordering only the tail selects what a full stable sort selects, ties included."""
    scores = np.random.default_rng(seed).gamma(2.0, 1.0, shape).astype(np.float32)
    if levels:
        scores = np.ceil(scores * levels / scores.max()).astype(np.float32)
    fast, slow = selected_indices(torch.from_numpy(scores), keep).numpy(), oracle.selected(scores, keep)
    # Both decide in float64, but sum from opposite ends: the boundary entry may differ by rounding.
    assert len(np.setxor1d(fast, slow)) <= 1
    flat = scores.astype(np.float64).ravel()
    assert flat[fast].sum() >= (1 - keep) * flat.sum() * (1 - 1e-9) - flat.max()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    keep=st.integers(1, 999),
    levels=st.sampled_from([0, 3, 50]),
    shift=st.sampled_from([0.0, -2.0]),
)
def test_hard_selection_equals_a_full_sort(seed, shape, keep, levels, shift) -> None:
    """All but floor(keep * entries) are selected, ties by flat index, negative scores included."""
    scores = (np.random.default_rng(seed).gamma(2.0, 1.0, shape) + shift).astype(np.float32)
    if levels:
        scores = np.ceil(scores * levels / np.abs(scores).max()).astype(np.float32)
    if not scores.any():
        return
    fast = selected_indices(torch.from_numpy(scores), keep / 1000, Selection.HARD).numpy()
    np.testing.assert_array_equal(fast, oracle.selected_hard(scores, Fraction(keep, 1000)))


@pytest.mark.parametrize("selection", list(Selection))
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_scores_without_a_meaning_are_refused(selection: Selection, value: float) -> None:
    """Scores that are not finite, or all zero, select nothing by accident."""
    scores = np.zeros((3, 4), dtype=np.float32)
    scores[0, 0] = value
    with pytest.raises(ContractError, match=r"not finite|all zero"):
        selected_indices(torch.from_numpy(scores), 0.5, selection)


def test_negative_scores_have_no_mass() -> None:
    """An adaptive selection of signed scores is refused; a hard one is not."""
    scores = torch.tensor([[-1.0, 2.0], [1.0, 3.0]])
    with pytest.raises(ContractError, match="negative"):
        selected_indices(scores, 0.5)
    assert selected_indices(scores, 0.5, Selection.HARD).tolist() == [1, 3]


def test_masks_agree_on_a_large_layer() -> None:
    """Selections from the fast and the slow scores agree in more than 99.95% of the entries."""
    safe, unsafe, weight = _data(5, 12, 20, 96, 128, 0.3)
    fast, _ = _scored(safe, unsafe, weight, Rule.RATIO_TIMES_ABS_WEIGHT, Pairing.MEAN_OF_RATIOS, 5)
    slow = oracle.score(
        list(safe.astype(float)), list(unsafe.astype(float)), weight.astype(float), "ratio-times-abs-weight", 0.0
    )
    chosen = selected_indices(torch.from_numpy(fast), 0.98).numpy()
    assert len(np.setxor1d(chosen, oracle.selected(slow, 0.98))) <= 0.0005 * weight.size
    assert 0 < len(chosen) < 0.02 * weight.size
