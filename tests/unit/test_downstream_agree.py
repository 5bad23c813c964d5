"""Reports of captions and pictures, one rule at a time: numbers that cannot all be true, and what they are about."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from tests.downstream_reports import LENIENT, limits, made_report
from tests.reports import report as verify_report
from uwm_deploy.bundle.downstream import foreign, foreign_head
from uwm_deploy.recipes.policy import policy_from_toml
from uwm_deploy.records.downstream import ANY, REFUSED, DownstreamReport, Flagged, Judge
from uwm_deploy.records.verdict import Result
from uwm_deploy.safeground.interval import wilson
from uwm_deploy.stages.gate.gate import gate
from uwm_deploy.stages.gate.outputs_agree import contradictions
from uwm_deploy.studies.downstream.shares import Inputs, flagged_shares


def share(before: int, after: int) -> Flagged:
    """Of 30 unsafe outputs, the first ones flagged, with the intervals that follow."""
    inputs = Inputs(ids=tuple(map(str, range(30))), sides=("unsafe",) * 30, content=tuple(map(str, range(30))))
    rows = np.arange(30)
    return flagged_shares(inputs, {"x": rows < before}, {"x": rows < after})["x"]["unsafe"]


def with_shares(**unsafe: Flagged) -> DownstreamReport:
    """The honest report with other shares of unsafe outputs, by judge."""
    report = made_report()
    flagged = {name: {**report.flagged.get(name, {}), "unsafe": of} for name, of in unsafe.items()}
    judges = {judge.name: judge for judge in report.judges}
    judges |= {name: Judge(name=name, what="words", digest="sha256:3") for name in unsafe if name != ANY}
    return dataclasses.replace(report, judges=tuple(judges.values()), flagged={**report.flagged, **flagged})


def changed(of: Flagged, **change: int) -> Flagged:
    return dataclasses.replace(of, change=dataclasses.replace(of.change, **change))


def test_a_report_of_more_inputs_than_a_run_could_have_costs_no_memory() -> None:
    """Its numbers are computed again from its counts, one entry an input."""
    report = with_shares(any=share(20, 5), words=share(20, 5))
    told = list(contradictions(dataclasses.replace(report, n={**report.n, "unsafe": 10**12})))
    assert "any, unsafe: 1000000000000 inputs are none that could have been run" in told


@pytest.mark.parametrize(
    "wrong",
    [
        # A share with the interval of its own count, and what was lost and gained of another.
        dataclasses.replace(share(20, 5), edited=wilson(0, 30, clusters=30)),
        changed(share(20, 5), n=3000),
        changed(share(20, 5), lost=22, gained=7),
        changed(share(20, 5), lost=15, gained=1),
    ],
    ids=["a share of its own", "another n", "more lost than there was", "more gained"],
)
def test_a_share_that_does_not_follow_is_told(wrong: Flagged) -> None:
    """As a sentence, and no error of a computation."""
    assert not list(contradictions(with_shares(any=share(20, 5), words=share(20, 5))))
    assert "unsafe: the shares are not those of what was lost and gained" in "".join(
        contradictions(with_shares(any=wrong, words=share(20, 5)))
    )


@pytest.mark.parametrize(("before", "after"), [(20, 4), (19, 5)])
def test_no_judge_flags_more_than_any(before: int, after: int) -> None:
    """On either side; to decline is no part of it, so more may be declined."""
    less = with_shares(any=share(before, after), words=share(20, 5))
    assert list(contradictions(less)) == ["words, unsafe: more is flagged by it than by any"]
    report = with_shares(any=share(20, 5), words=share(20, 5), **{REFUSED: share(30, 30)})
    assert not list(contradictions(report))


@pytest.mark.parametrize("change", [{"shift": 110.0}, {"change": math.nan}])
def test_means_of_pictures_are_numbers_within_their_intervals(change: dict[str, float]) -> None:
    """Both means moved alike have the same change, and no interval."""
    report = made_report("draw")
    found = report.reference["clip_score"]["benign"]
    moved = {
        side: dataclasses.replace(part, value=part.value + change.get("shift", 0.0))
        for side, part in (("original", found.original), ("edited", found.edited))
    }
    moved["change"] = dataclasses.replace(found.change, value=change.get("change", found.change.value))
    wrong = {"clip_score": {**report.reference["clip_score"], "benign": dataclasses.replace(found, **moved)}}
    assert not list(contradictions(report))
    assert list(contradictions(dataclasses.replace(report, reference=wrong)))


@pytest.mark.parametrize(
    ("least", "outputs", "result", "only"),
    [
        (-99.0, False, Result.PASS, False),
        (-99.0, True, Result.INCONCLUSIVE, True),
        (99.0, True, Result.FAIL, False),
    ],
)
def test_only_outputs_block_where_something_blocks(least: float, outputs: bool, result: Result, only: bool) -> None:
    """A bundle may be opened to be measured where captions alone are missing; not where its edit fails as well."""
    text = LENIENT.replace("-99.0", str(least))
    text += limits("caption", {"kept.rouge_l": "at_least = 50.0"}) if outputs else ""
    verdict = gate(verify_report(), policy_from_toml(text, where="mine.toml"), policy_digest="", report_digest="")
    assert (verdict.result, verdict.only_outputs_block) == (result, only)


@pytest.mark.parametrize(
    ("kind", "own", "judged", "told"),
    [
        ("caption", "a", "a", ""),
        ("caption", "", "a", "a tower without the safety head that is judged with it"),
        ("caption", "b", "a", "another safety head"),
        ("caption", "b", "", "a safety head, and what is judged has none"),
        ("draw", "b", "a", ""),
    ],
)
def test_captions_are_of_one_safety_head_and_pictures_of_none(kind: str, own: str, judged: str, told: str) -> None:
    """What captions were made with is what is judged."""
    assert foreign_head(made_report(kind, head_digest=own), judged) == told


def test_a_variant_that_is_not_judged_is_told() -> None:
    """A report of an engine counts for a bundle that has this engine."""
    assert "variant other" in foreign(made_report(variant="other"), verify_report())
    assert not foreign(made_report(variant=verify_report().artifacts[0].variant), verify_report())
