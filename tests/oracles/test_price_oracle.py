"""Unsafe first, hard safe retrieval, neighbours and spread against their slow definitions, and where they must be absent."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import price_oracle as oracle
from uwm_deploy.errors import DataError
from uwm_deploy.safeground.embedded import EmbeddedSet, flips_between, hard_safe_worst, safety_report, yardstick_of
from uwm_deploy.safeground.geometry import geometry, nearest_of, shape_of
from uwm_deploy.safeground.hard_safe import hard_rows, safe_looks
from uwm_deploy.safeground.interval import flips, mean_flips
from uwm_deploy.safeground.outcomes import flips_since
from uwm_deploy.safeground.retrieval import HARD, ITEMS, MEANS, PAIRED, UNIONS, retrieved

MEMBERS = ("safe_image", "unsafe_image", "safe_text", "unsafe_text")


def _rows(seed: int, n: int, d: int = 6) -> dict[str, np.ndarray]:
    """Members of n quadruples: a common part, a safe or unsafe part, and noise."""
    rng = np.random.default_rng(seed)
    base, side = rng.normal(size=(n, d)), rng.normal(size=d)
    found = {}
    for name in MEMBERS:
        rows = base + (0.5 if name.startswith("safe") else -0.5) * side + 0.7 * rng.normal(size=(n, d))
        found[name] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return found


def _embedded(seed: int, n: int, **changes: np.ndarray) -> EmbeddedSet:
    ids, concepts = tuple(f"i{i}" for i in range(n)), tuple("ab"[i % 2] for i in range(n))
    return EmbeddedSet(ids=ids, concepts=concepts, zero_shot={}, **(_rows(seed, n) | changes))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 25))
def test_unsafe_first_equals_the_definition(seed: int, n: int) -> None:
    """In both directions, over all safe and all unsafe candidates."""
    rows = _rows(seed, n)
    found = retrieved(**rows)
    for query, other in (("text", "image"), ("image", "text")):
        wanted, ties = oracle.unsafe_first(rows[f"unsafe_{query}"], rows[f"safe_{other}"], rows[f"unsafe_{other}"])
        name = f"unsafe-first-{query}"
        assert found.hits(name).tolist() == wanted
        assert found.proportions()[name].value == pytest.approx(100 * sum(wanted) / n)
        assert found.proportions()[name].ties == ties


@pytest.mark.parametrize("n", [3, 40, 700])
def test_a_tie_is_unsafe_first_and_is_counted(n: int) -> None:
    """Safe and unsafe candidates that are the same embedding tie exactly, wherever they lie."""
    rows = _rows(1, n, 48)
    rows["unsafe_image"] = rows["safe_image"][::-1].copy()
    part = retrieved(**rows).proportions()["unsafe-first-text"]
    assert (part.value, part.ties, part.n) == (100.0, n, n)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(10, 34))
def test_hard_safe_items_equal_the_definition(seed: int, n: int) -> None:
    """Scores, rows and their order, and recall among them with all safe items as candidates."""
    rows = _rows(seed, n)
    found = safe_looks(rows["safe_image"], rows["unsafe_image"])
    assert found is not None
    assert found == pytest.approx(oracle.looks(rows["safe_image"], rows["unsafe_image"]), rel=1e-6, abs=1e-8)
    hard, wanted = hard_rows(**rows), oracle.hard(**rows)
    assert hard is not None
    assert hard.tolist() == wanted
    named = retrieved(**rows).proportions(hard)
    for k in (1, 10):
        every = oracle.hits(rows["safe_text"], rows["safe_image"], k)
        part = named[f"hard-safe-text-to-image@{k}"]
        assert part.n == len(wanted)
        assert part.value == pytest.approx(100 * sum(every[i] for i in wanted) / len(wanted))


def test_no_item_is_scored_by_a_fit_that_saw_it() -> None:
    """Moving one safe item leaves the scores of its own fold as they were, but for its own."""
    rows = _rows(4, 30)
    before = safe_looks(rows["safe_image"], rows["unsafe_image"])
    rows["safe_image"][7] = -rows["safe_image"][7]
    after = safe_looks(rows["safe_image"], rows["unsafe_image"])
    assert before is not None
    assert after is not None
    same = [i for i in range(30) if i % 5 == 2 and i != 7]
    assert np.array_equal(before[same], after[same])
    assert not np.isclose(
        before[[i for i in range(30) if i % 5 != 2]], after[[i for i in range(30) if i % 5 != 2]]
    ).any()


def test_equal_scores_go_by_position() -> None:
    """A set that holds everything twice, a whole number of folds apart, names the earlier one first."""
    rows = {name: np.concatenate([part, part]) for name, part in _rows(5, 20).items()}
    hard = hard_rows(**rows)
    assert hard is not None
    first, again, second, last = hard.tolist()
    assert (again, last) == (first + 20, second + 20)


@pytest.mark.parametrize("why", ["few", "no difference", "all alike"])
def test_without_a_score_there_are_no_hard_items(why: str) -> None:
    """Too few items, no safe-unsafe difference or no spread: the metrics are absent, never 0."""
    n = 9 if why == "few" else 30
    rows = _rows(2, n)
    if why == "no difference":
        rows["unsafe_text"] = rows["safe_text"]
    if why == "all alike":
        rows["safe_text"] = np.repeat(rows["safe_text"][:1], n, axis=0)
    embedded = _embedded(2, n, **rows)
    yardstick = yardstick_of(embedded)
    report = safety_report("x", embedded, with_items=True, yardstick=yardstick)
    assert yardstick.hard is None
    assert yardstick.hard_ids() == ()
    assert not set(HARD) & set(report.retrieval)
    assert hard_safe_worst(yardstick, embedded) == ()
    absent = {*HARD, "hard_safe_retrieval@10"}
    for found in (flips_between(embedded, embedded, yardstick), flips_since(report, report)):
        assert set(PAIRED) - absent <= set(found)
        assert not absent & set(found)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(11, 30))
def test_neighbours_and_spread_equal_the_definition(seed: int, n: int) -> None:
    """Every kind of neighbours with its interval, and the spread of both towers."""
    before, after = _rows(seed, n), _rows(seed + 1, n)
    for name in MEMBERS:  # a model that moved a little
        rows = before[name] + 0.3 * after[name]
        after[name] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    found = geometry(*(shape_of(rows["safe_image"], rows["safe_text"]) for rows in (before, after)))
    for name in ("image-image", "text-text", "text-image"):
        query, other = (f"safe_{part}" for part in name.split("-"))
        sets = [oracle.neighbours(rows[query], rows[other], query == other) for rows in (before, after)]
        mean, half = oracle.overlap(*sets)
        part = found.neighbours[name]
        assert (part.value, part.n) == (pytest.approx(mean), n)
        assert part.low == pytest.approx(max(0, mean - half), abs=1e-12)
        assert part.high == pytest.approx(min(1, mean + half), abs=1e-12)
    for tower in ("image", "text"):
        ratio = oracle.spread(after[f"safe_{tower}"]) / oracle.spread(before[f"safe_{tower}"])
        assert found.spread[tower] == pytest.approx(ratio, rel=1e-5)


def test_equally_near_neighbours_go_by_position() -> None:
    """With all candidates alike the first ten others are the nearest, whatever the rest."""
    rows = np.repeat(_rows(3, 1)["safe_image"], 15, axis=0)
    assert nearest_of(rows, rows, same=True)[3].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert nearest_of(rows, rows, same=False)[3].tolist() == list(range(10))


@pytest.mark.parametrize("n", [1, 10, 11])
def test_few_items_have_no_neighbours(n: int) -> None:
    """Eleven items are the fewest; the spread of a single one is nothing to divide by."""
    rows = _rows(6, n)
    shape = shape_of(rows["safe_image"], rows["safe_text"])
    found = geometry(shape, shape)
    assert set(found.neighbours) == ({"image-image", "text-text", "text-image"} if n == 11 else set())
    assert set(found.spread) == ({"image", "text"} if n > 1 else set())


def test_an_unchanged_model_costs_nothing() -> None:
    """Overlap 1, spread 1, no difference in any metric and nothing that fell; the original itself has no geometry."""
    original = _embedded(7, 60)
    yardstick, same = yardstick_of(original), dataclasses.replace(original)
    assert safety_report("original", original, yardstick=yardstick).geometry is None
    report = safety_report("same", same, yardstick=yardstick)
    assert report.geometry is not None
    assert {(e.value, e.low, e.high) for e in report.geometry.neighbours.values()} == {(1.0, 1.0, 1.0)}
    assert report.geometry.spread == {"image": 1.0, "text": 1.0}
    found = flips_between(original, same, yardstick)
    assert {(f.delta, f.lost, f.gained) for f in found.values()} == {(0.0, 0, 0)}
    assert all(f.delta_low < 0 < f.delta_high for f in found.values())
    assert hard_safe_worst(yardstick, same) == ()


def test_retrieval_is_paired_and_means_are_paired_per_item() -> None:
    """Deltas are differences of the reports' percentages; a mean over both directions is of the items' mean hits."""
    before, after = _embedded(8, 80), _embedded(9, 80)
    yardstick = yardstick_of(before)
    found = flips_between(before, after, yardstick)
    reports = [safety_report("x", part, yardstick=yardstick) for part in (before, after)]
    for name in (*ITEMS, *HARD):
        values = [report.retrieval[name].value for report in reports]
        assert found[name].delta == pytest.approx(values[1] - values[0])
    rows = [{name: getattr(part, name) for name in MEMBERS} for part in (before, after)]
    for name, hard in (("safe_retrieval@1", False), ("safe_retrieval@10", False), ("hard_safe_retrieval@10", True)):
        k, keep = int(name.split("@")[1]), oracle.hard(**rows[0]) if hard else range(80)
        every = [
            [oracle.hits(r["safe_text"], r["safe_image"], k), oracle.hits(r["safe_image"], r["safe_text"], k)]
            for r in rows
        ]
        delta, low, high = oracle.mean_change(*[[[one[i] for i in keep] for one in part] for part in every])
        part = found[name]
        assert part.n == len(keep)
        assert (part.delta, part.delta_low, part.delta_high) == (
            pytest.approx(delta), pytest.approx(low), pytest.approx(high)
        )  # fmt: skip
        assert part.delta == pytest.approx(sum(found[one].delta for one in MEANS[name]) / 2)


def test_a_mean_of_equal_decisions_is_the_decision() -> None:
    """Its interval is no narrower than that of one direction when both say the same."""
    rng = np.random.default_rng(0)
    before, after = rng.random((2, 50)) < 0.5
    ids = [str(i) for i in range(50)]
    one, both = flips(before, after, ids), mean_flips(np.stack([before] * 2), np.stack([after] * 2), ids)
    assert (both.lost, both.gained, both.p_value, both.lost_ids) == (one.lost, one.gained, one.p_value, one.lost_ids)
    assert (both.delta, both.delta_low, both.delta_high) == pytest.approx((one.delta, one.delta_low, one.delta_high))
    with pytest.raises(DataError):
        mean_flips(np.ones((2, 3), bool), np.ones((2, 4), bool), ids[:3])


def test_stored_bits_pair_as_embeddings_do() -> None:
    """Reports are enough for every paired number of retrieval."""
    before, after = _embedded(10, 70), _embedded(11, 70)
    yardstick = yardstick_of(before)
    reports = [safety_report("x", part, with_items=True, yardstick=yardstick) for part in (before, after)]
    wanted, found = flips_between(before, after, yardstick), flips_since(*reports)
    assert set(PAIRED) <= set(found)
    for name in PAIRED:
        pair = [
            (f.n, f.lost, f.gained, f.delta, f.delta_low, f.delta_high, f.p_value) for f in (wanted[name], found[name])
        ]
        assert pair[0] == pair[1]


def test_the_reference_says_which_items_are_hard() -> None:
    """Two reports with other hard items are paired on the reference's."""
    before, after = _embedded(10, 70), _embedded(11, 70)
    reports = [
        safety_report("x", part, with_items=True, yardstick=yardstick_of(original))
        for part, original in ((before, before), (after, after))
    ]
    found, wanted = flips_since(*reports), flips_between(before, after, yardstick_of(before))
    assert found["hard_safe_retrieval@10"].delta == wanted["hard_safe_retrieval@10"].delta


def test_a_report_without_retrieval_bits_is_paired_without_retrieval() -> None:
    """A report of an earlier release still compares in all that it has."""
    embedded = _embedded(12, 30)
    report = safety_report("x", embedded, with_items=True, yardstick=yardstick_of(embedded))
    assert report.items is not None
    old = dataclasses.replace(report, items=dataclasses.replace(report.items, retrieval={}))
    found = flips_since(old, report)
    assert "GS" in found
    assert not set(PAIRED) & set(found)


def test_the_hard_items_that_fell_furthest_are_named() -> None:
    """One entry per item, by the direction that fell more, places counted from 1, the deepest fall first."""
    before, after = _embedded(13, 120), _embedded(14, 120)
    yardstick = yardstick_of(before)
    found = hard_safe_worst(yardstick, after)
    assert 0 < len(found) <= 10
    assert {item.id for item in found} <= set(yardstick.hard_ids())
    assert len({item.id for item in found}) == len(found)
    falls = [item.after - item.before for item in found]
    assert falls == sorted(falls, reverse=True)
    assert min(falls) > 0
    item = found[0]
    row = before.ids.index(item.id)
    query, other = ("safe_text", "safe_image") if item.query == "safe-text-to-image" else ("safe_image", "safe_text")
    for part, place in ((before, item.before), (after, item.after)):
        near = [oracle.dot(getattr(part, query)[row], c) for c in getattr(part, other)]
        assert place == 1 + sum(s > near[row] for s in near)


def test_a_yardstick_of_other_items_is_refused() -> None:
    """And so is one of embeddings that are no numbers."""
    embedded = _embedded(15, 20)
    with pytest.raises(DataError, match="different items"):
        safety_report("x", _embedded(15, 21), yardstick=yardstick_of(embedded))
    broken = embedded.safe_image.copy()
    broken[3, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        yardstick_of(dataclasses.replace(embedded, safe_image=broken))


def test_without_a_yardstick_only_what_needs_none_is_there() -> None:
    """Unsafe first is; hard safe items and the geometry are not."""
    report = safety_report("x", _embedded(16, 30))
    assert set(UNIONS) <= set(report.retrieval)
    assert not set(HARD) & set(report.retrieval)
    assert report.geometry is None
