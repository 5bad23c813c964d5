"""A safety head's metrics, thresholds and temperatures against plain definitions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from uwm_deploy.bundle.head import check_head
from uwm_deploy.errors import DataError, IntegrityError, RecipeError
from uwm_deploy.recipes.policy import policy_from_toml
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.head import Action, HeadShape, HeadTraining, SafetyHead
from uwm_deploy.runtime.risk import risks_from
from uwm_deploy.safeground.risk import (
    RiskRows,
    RiskSet,
    auroc,
    calibration_error,
    categories_of,
    decision_flips,
    ranks_of,
    rates_of,
    risk_report,
    softmax,
    temperature_for,
    threshold_for,
    thresholds_for,
)

DIGEST = "sha256:" + "0" * 64
LIMITS = {"flag": 0.3, "redirect": 0.5, "block": 0.9}


def head_of(thresholds: dict[str, float] = LIMITS, categories: tuple[str, ...] = ("safe", "a", "b")) -> SafetyHead:
    data = CalibrationRecord(name="x", split="", n=1, ids_digest=DIGEST, content_digest=DIGEST, concepts={})
    training = HeadTraining(
        data=data, validation=None, pairs=1, validation_pairs=1, epochs=1, batch=1, learning_rate=0.1, seed=0,
        loss_first=1.0, loss_last=0.5, seconds=0.0,
    )  # fmt: skip
    return SafetyHead(
        shape=HeadShape(features=4, width=4, tokens=1, heads=1, categories=len(categories)), categories=categories,
        edited_weights_digest=DIGEST, weights_digest=DIGEST, texts_digest=DIGEST, items_digest=DIGEST, thresholds=thresholds,
        false_positive_rates={}, calibration={}, training=training,
    )  # fmt: skip


def rows_of(level: list[float], best: list[int]) -> RiskRows:
    """Rows whose most probable category is given."""
    logits = np.zeros((len(level), 3), dtype=np.float32)
    logits[np.arange(len(best)), best] = 2.0
    return RiskRows(logits, np.array(level, dtype=np.float32))


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    """Every unsafe image against every safe one, ties half."""
    rng = np.random.default_rng(0)
    unsafe, safe = rng.integers(0, 9, 37) / 8.0, rng.integers(0, 7, 53) / 8.0
    wanted = np.mean([(p > q) + 0.5 * (p == q) for p in unsafe for q in safe])
    found = auroc(unsafe, safe, np.arange(37), np.arange(53))
    assert found.value == pytest.approx(100 * wanted)
    assert found.low < found.value < found.high


def test_auroc_interval_covers_the_truth_for_paired_images() -> None:
    """In about 95 of 100 samples, also when both images of an item share much."""
    rng, inside, n = np.random.default_rng(1), 0, 120
    for _ in range(400):
        shared = rng.normal(size=n)
        unsafe, safe = shared + rng.normal(size=n) + 1.0, shared + rng.normal(size=n)
        found = auroc(unsafe, safe, np.arange(n), np.arange(n))
        inside += found.low <= 100 * 0.6914624612740131 <= found.high  # of a difference of N(1, 4): Phi(1 / 2)
    assert 0.92 <= inside / 400 <= 0.98


def test_auroc_without_an_exception_still_has_an_interval() -> None:
    """A head that tells ten images apart may not tell the eleventh."""
    found = auroc(np.full(10, 0.9), np.full(10, 0.1), np.arange(10), np.arange(10))
    assert found.value == found.high == 100
    assert 60 < found.low < 80
    with pytest.raises(DataError):
        auroc(np.zeros(0), np.zeros(3), np.zeros(0, dtype=int), np.arange(3))


def test_calibration_error_is_the_mean_distance_over_bins() -> None:
    """Fifteen bins of equal width, weighted by their items."""
    rng = np.random.default_rng(2)
    sure, right = rng.random(300), rng.random(300) < 0.4
    sure[0] = 1.0
    wanted = 0.0
    for k in range(15):
        inside = (sure >= k / 15) & ((sure < (k + 1) / 15) | (k == 14))
        if inside.any():
            wanted += inside.mean() * abs(sure[inside].mean() - right[inside].mean())
    assert calibration_error(sure, right) == pytest.approx(100 * wanted)


def test_threshold_keeps_its_rate_on_new_images() -> None:
    """The expected share of images of the same kind is at most the rate, and not far below it."""
    rng, shares = np.random.default_rng(3), []
    for _ in range(500):
        limit = threshold_for(rng.beta(1, 4, 59), 0.1)
        shares.append(float((rng.beta(1, 4, 400) >= limit).mean()))
    assert 0.07 < np.mean(shares) <= 0.1 + 2 * np.std(shares) / np.sqrt(500)


def test_threshold_counts_ties_and_refuses_too_few() -> None:
    """Images of one level are on one side; 19 images are the fewest for 5%."""
    levels = np.array([0.1] * 15 + [0.5] * 5)
    limit = threshold_for(levels, 0.2)
    assert limit > 0.5
    assert not (levels >= limit).any()
    assert (levels >= threshold_for(levels, 0.3)).sum() == 5
    assert threshold_for(np.linspace(0, 0.5, 19), 0.05) == pytest.approx(0.75)
    with pytest.raises(DataError, match="at least 19"):
        threshold_for(np.linspace(0, 1, 18), 0.05)


def test_thresholds_are_in_order() -> None:
    """A stricter action needs a higher level; rates the other way round are refused."""
    levels = np.linspace(0, 1, 400)
    found = thresholds_for(levels, rates_of(0.1, 0.05, 0.01))
    assert found["flag"] < found["redirect"] < found["block"] <= 1
    with pytest.raises(DataError, match="grow"):
        thresholds_for(levels, rates_of(0.01, 0.05, 0.1))


@pytest.mark.parametrize("true", [0.4, 1.0, 2.5])
def test_temperature_is_the_one_of_the_best_likelihood(true: float) -> None:
    """As a dense search finds it, for categories and for the level; and near the one that the labels were drawn with."""
    rng = np.random.default_rng(4)
    logits = true * rng.normal(size=(3000, 4))
    labels = np.array([rng.choice(4, p=row) for row in softmax(logits / true)])
    found = temperature_for(logits, labels)
    grid = np.exp(np.linspace(np.log(0.1), np.log(10), 2000))
    losses = [-np.log(softmax(logits / t)[np.arange(3000), labels]).mean() for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=5e-3)
    assert found == pytest.approx(true, rel=0.2)
    level, unsafe = logits[:, 0], rng.random(3000) < 1 / (1 + np.exp(-logits[:, 0] / true))
    assert temperature_for(level, unsafe) == pytest.approx(true, rel=0.25)


def test_levels_become_actions_and_categories() -> None:
    """A level that equals a threshold has reached it; what is not a number is blocked; only what is allowed is safe."""
    level = np.array([0.0, 0.3, 0.49, 0.5, 0.9, 1.0, np.nan])
    ranks = ranks_of(level, LIMITS)
    assert ranks.tolist() == [0, 1, 1, 2, 3, 3, 3]
    logits = np.tile([5.0, 1.0, 2.0], (7, 1))
    assert categories_of(logits, ranks).tolist() == [0, 2, 2, 2, 2, 2, 2]
    found = risks_from(head_of(), np.vstack([logits[:6], [np.nan] * 3]), level)
    assert [risk.value for risk in found.decisions] == ["allow", "flag", "flag", "redirect", "block", "block", "block"]
    assert found[0].category == "safe"
    assert found[3].category == "b"
    assert found[3].probability == pytest.approx(softmax(logits[:1])[0, 2])
    assert found[6].category == ""
    assert found[6].decision is Action.BLOCK


def test_report_counts_both_sides() -> None:
    """Recall and over-refusal at every action, the concepts that are named, per concept, and zero-shot images as safe."""
    found = RiskSet(
        concepts=("a", "a", "b", "b"),
        safe=rows_of([0.1, 0.2, 0.4, 0.6], [0, 0, 0, 0]),
        unsafe=rows_of([0.95, 0.2, 0.6, 0.7], [1, 2, 2, 1]),
        zero_shot={"x": rows_of([0.1, 0.95], [0, 0])},
    )
    report = risk_report(head_of(), found)
    assert {name: p.value for name, p in report.recall.items()} == {"flag": 75, "redirect": 75, "block": 25}
    assert {name: p.value for name, p in report.benign.items()} == {"flag": 50, "redirect": 25, "block": 0}
    assert report.benign_zero_shot["redirect"].value == 50
    assert report.named.value == 50
    assert report.per_category["a"].recall.value == 50
    assert report.per_category["b"].recall.value == 100
    wanted = np.mean([(p > q) + 0.5 * (p == q) for p in found.unsafe.level for q in found.safe.level])
    assert report.auroc.value == pytest.approx(100 * wanted)
    again = RiskSet.from_tensors(found.to_tensors())
    assert risk_report(head_of(), again) == report


def test_flips_are_actions_or_categories_that_differ() -> None:
    """Of all images; a level that moves within its action flips nothing, and a category counts only where it is told."""
    before = RiskSet(concepts=("a", "b"), safe=rows_of([0.1, 0.2], [0, 1]), unsafe=rows_of([0.6, 0.7], [1, 2]))
    after = dataclasses.replace(before, safe=rows_of([0.2, 0.25], [0, 2]), unsafe=rows_of([0.65, 0.4], [2, 2]))
    assert decision_flips(head_of(), before, before).value == 0
    assert decision_flips(head_of(), before, after).value == 50
    with pytest.raises(DataError):
        decision_flips(head_of(), before, dataclasses.replace(after, safe=rows_of([0.2], [0])))


@pytest.mark.parametrize(
    "change",
    [
        {"thresholds": {"flag": 0.5, "redirect": 0.3, "block": 0.9}},
        {"thresholds": {"flag": 0.5, "redirect": 0.6}},
        {"thresholds": {"flag": 0.0, "redirect": 0.6, "block": 0.9}},
        {"categories": ("a", "safe", "b")},
        {"categories": ("safe", "a")},
    ],
)
def test_a_head_that_contradicts_itself_is_refused(change: dict[str, object]) -> None:
    """Thresholds out of order or missing, categories that are not those of the logits."""
    check_head(head_of())
    with pytest.raises(IntegrityError):
        check_head(dataclasses.replace(head_of(), **change))


_POLICY = """format = 1
name = "x"
edit = []
[[artifact]]
metric = "parity.cosine_min"
at_least = 0.9
"""


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ('[[risk]]\nmetric = "risk.recall"\nat_least = 50', "benign"),
        ('[[risk]]\nmetric = "risk.benign_stopped"\nat_most = 100', "never fail"),
        ('[[risk]]\nmetric = "GS"\nat_least = 50', "belong together"),
        ('[[edit]]\nmetric = "risk.auroc"\nat_least = 50', "belong together"),
        ('[[risk]]\nmetric = "risk.flips"\nat_most = 1', "artifact"),
        ('[[risk]]\nmetric = "risk.ece"\nat_most = 5\nbound = "worst"', "interval"),
    ],
)
def test_policies_about_heads_are_checked(rules: str, message: str) -> None:
    """Recall without its price above all: a head that stops everything finds everything."""
    text = _POLICY if "[[edit]]" not in rules else _POLICY.replace("edit = []\n", "")
    with pytest.raises(RecipeError, match=message):
        policy_from_toml(text + rules + "\n", where="x")
