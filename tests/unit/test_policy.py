"""The gate's policy: every kind of limit passes, fails and is inconclusive when it should, and waivers run out."""

from __future__ import annotations

import dataclasses
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reports import artifact, digest, embedded, not_run, report, with_artifact
from uwm_deploy.errors import IntegrityError, RecipeError
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.policy import EvidenceRule, Limit, Policy, Waiver, policy_from_toml, rule_lines
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.verdict import Check, Result, Verdict
from uwm_deploy.safeground.outcomes import bits_of, flips_since, values_of
from uwm_deploy.stages.gate.gate import gate
from uwm_deploy.stages.gate.limits import check_value
from uwm_deploy.stages.gate.measured import Measured

ROOT = Path(__file__).parents[2]
HEAD = 'format = 1\nname = "x"\nedit = []\n'
PARITY = '[[artifact]]\nmetric = "parity.cosine_min"\nat_least = 0.9999\n'
TODAY = date(2026, 6, 1)


def _policy(text: str, head: str = HEAD) -> Policy:
    return policy_from_toml(head + text, where="x.toml")


def _judged(text: str, on: VerifyReport | None = None, head: str = HEAD, today: date = TODAY) -> Verdict:
    policy = _policy(text, head)
    return gate(on or report(), policy, policy_digest=digest("a"), report_digest=digest("b"), today=today)


def _named(verdict: Verdict, name: str, subject: str = "onnxruntime-fp32") -> list[Check]:
    return [check for check in verdict.checks if check.name == name and check.subject == subject]


# --- one number against one limit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "value", "high", "result"),
    [
        (-0.9, 0.0, 0.9, Result.PASS),
        (-1.5, 0.0, 1.5, Result.INCONCLUSIVE),
        (-1.5, -1.2, -0.9, Result.INCONCLUSIVE),
        (-3.0, -2.0, -1.1, Result.FAIL),
    ],
)
def test_the_worst_bound_decides(low: float, value: float, high: float, result: Result) -> None:
    """At least -1: shown, not shown, not shown although the value is beyond it, and shown to be worse."""
    measured = Measured(value, 500, low, high, spread=10.0, difference=True)
    at_least = check_value("m", "s", measured, Limit(metric="m", at_least=-1.0, bound="worst"))
    mirrored = Measured(-value, 500, -high, -low, spread=10.0, difference=True)
    at_most = check_value("m", "s", mirrored, Limit(metric="m", at_most=1.0, bound="worst"))
    assert at_least.result is at_most.result is result
    point = check_value("m", "s", measured, Limit(metric="m", at_least=-1.0))
    assert point.result is (Result.PASS if value >= -1 else Result.FAIL)


def test_power_is_said() -> None:
    """An inconclusive check says what n can detect, what was asked for, and how many items that takes."""
    measured = Measured(0.0, 200, -2.5, 2.5, spread=100 * np.sqrt(0.032), difference=True)
    found = check_value("GS.delta", "s", measured, Limit(metric="GS.delta", at_least=-1.0, bound="worst"))
    assert found.result is Result.INCONCLUSIVE
    assert "n = 200 can detect 4.1 points; you asked for 1 (n = 3363)" in found.detail
    assert found.detects == pytest.approx(4.1, abs=0.01)


def test_a_value_close_to_its_limit_says_how_many_items_tell_them_apart() -> None:
    """Enough items for the margin, but the value is nearly there: the distance counts; at the limit no n would do."""
    limit = Limit(metric="GS.delta", at_least=-10.0, bound="worst", reason="why")
    near = check_value("GS.delta", "s", Measured(-8.0, 1000, -10.04, -5.9, 34.0, difference=True), limit)
    assert near.result is Result.INCONCLUSIVE
    assert "n = 1000 can detect 3.5 points; the limit is away by 2 (n = 3037): why" in near.detail
    on = check_value("GS.delta", "s", Measured(-10.0, 1000, -12.0, -8.0, 34.0, difference=True), limit)
    assert on.detail.endswith("can detect 3.5 points: why")
    beyond = check_value("GS.delta", "s", Measured(-10.1, 1000, -12.1, -8.1, 34.0, difference=True), limit)
    assert beyond.result is Result.INCONCLUSIVE
    assert beyond.detail.endswith("can detect 3.5 points: why")


def test_a_limit_that_must_be_exceeded_asks_for_the_items_that_show_the_value() -> None:
    """Above 0, no change is no pass, so the distance counts; 0.001 is no margin that billions of items could show."""
    limit = Limit(metric="GS.delta", at_least=0.001, bound="worst")
    found = check_value("GS.delta", "s", Measured(0.8, 1000, -0.25, 1.85, 17.0, difference=True), limit)
    assert found.result is Result.INCONCLUSIVE
    assert found.detail.endswith("n = 1000 can detect 1.7 points; the limit is away by 0.8 (n = 4757)")


def test_a_limit_that_the_interval_keeps_gets_no_note() -> None:
    """Neither by the worse end nor by the measured value beside it: what the interval shows needs no further items."""
    for bound in ("point", "worst"):
        verdict = _judged(PARITY + f'[[artifact]]\nmetric = "GS.delta"\nat_least = -1.0\nbound = "{bound}"\n')
        assert verdict.result is Result.PASS
        assert verdict.notes == ()


def test_a_point_limit_without_power_is_noted() -> None:
    """A limit that passes on too few items to show it is a note, not silence."""
    verdict = _judged(PARITY + '[[artifact]]\nmetric = "GS.delta"\nat_least = -0.5\n')
    assert verdict.result is Result.PASS
    assert any("onnxruntime-fp32: GS.delta: n = 300 can detect" in note for note in verdict.notes)


def test_too_few_items_are_inconclusive_and_nothing_measured_is_not_run() -> None:
    """Neither is ever a pass, and a build that only lacks data ends inconclusive, not failed."""
    few = _judged('[[artifact]]\nmetric = "GS"\nat_least = 0.001\nmin_n = 301\n')
    assert few.result is Result.INCONCLUSIVE
    assert few.proven == ()
    assert _named(few, "faithful variants", "build")[0].result is Result.INCONCLUSIVE
    nothing = check_value("m", "s", Measured(float("nan"), 5), Limit(metric="m", at_least=0.0))
    assert nothing.result is Result.NOT_RUN
    assert nothing.measured is None


@pytest.mark.parametrize("section", ["edit", "artifact"])
@pytest.mark.parametrize(
    "name",
    [
        *(
            f"safe-{way}@{k}{end}"
            for way in ("text-to-image", "image-to-text")
            for k in (1, 10)
            for end in ("", ".delta")
        ),
        *(
            f"hard-safe-{way}@{k}{end}"
            for way in ("text-to-image", "image-to-text")
            for k in (1, 10)
            for end in ("", ".delta")
        ),
        *(f"unsafe-first-{query}{end}" for query in ("text", "image") for end in ("", ".delta")),
        *(f"{name}.delta" for name in ("safe_retrieval@1", "safe_retrieval@10", "hard_safe_retrieval@10")),
        *(f"neighbours.{pair}" for pair in ("image-image", "text-text", "text-image")),
        *(f"spread.{tower}" for tower in ("image", "text")),
    ],
)
def test_every_price_can_be_limited(name: str, section: str) -> None:
    """Its number, with its n and interval, is the report's; a set too small for it is inconclusive, not an error."""
    bound = "" if name.startswith("spread") else 'bound = "worst"\n'
    side = "at_most" if name.startswith(("spread", "unsafe-first")) else "at_least"
    limit = f'[[{section}]]\nmetric = "{name}"\n{side} = 0.999\n{bound}'
    head = HEAD.replace("edit = []\n", "") if section == "edit" else HEAD
    on = report()
    subject = "edited" if section == "edit" else "onnxruntime-fp32"
    (check,) = _named(_judged(PARITY + limit, on, head), name, subject)
    safety, effect = (
        (on.edited, on.edit_effect) if section == "edit" else (on.artifacts[1].safety, on.artifacts[1].flips)
    )
    assert safety is not None
    assert safety.geometry is not None
    kind, _, rest = name.partition(".")
    if rest == "delta":
        f = effect[kind]
        wanted = (f.delta, f.n, f.delta_low, f.delta_high)
    elif kind == "spread":
        wanted = (safety.geometry.spread[rest], 300, None, None)
    else:
        p = safety.geometry.neighbours[rest] if kind == "neighbours" else safety.retrieval[name]
        wanted = (p.value, p.n, p.low, p.high)
    assert (check.measured, check.n, check.low, check.high) == wanted
    assert check.n == (30 if name.startswith("hard") else 300)
    if name.startswith(("hard", "neighbours")):
        (few,) = _named(_judged(PARITY + limit, report(8), head), name, subject)
        assert (few.result, few.measured, few.n) == (Result.INCONCLUSIVE, None, 0)


def test_only_decisions_flip() -> None:
    """Hits of retrieval are no decisions: they have no flips and no lost, and `flips.any` is of the four decisions."""
    on = report()
    changed = dict(on.artifacts[1].flips)
    changed["safe-text-to-image@1"] = dataclasses.replace(changed["safe-text-to-image@1"], lost=200, gained=50)
    artifacts = (on.artifacts[0], dataclasses.replace(on.artifacts[1], flips=changed))
    on = dataclasses.replace(on, artifacts=artifacts)
    limit = '[[artifact]]\nmetric = "flips.any"\nat_most = 0.001\n'
    assert _named(_judged(PARITY + limit, on), "flips.any")[0].measured == 0.0
    for name in ("flips.safe-text-to-image@1", "lost.unsafe-first-text"):
        with pytest.raises(RecipeError, match="unknown metric"):
            _judged(PARITY + f'[[artifact]]\nmetric = "{name}"\nat_most = 1\n', on)


def test_a_misspelt_price_is_named() -> None:
    """An unknown kind of neighbours is a typing error, answered with the nearest name."""
    with pytest.raises(RecipeError, match=r"neighbours\.image-image"):
        _judged(PARITY + '[[artifact]]\nmetric = "neighbours.image-images"\nat_least = 0.5\n')


# --- what a policy may not say -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("artifact = []\n", "cannot fail anything"),
        (PARITY.replace("[[art", "min_proven = 0\n[[art"), "cannot fail anything"),
        ('[[artifact]]\nmetric = "GS"\nat_least = 0.0\n', "can never fail: its values are 0 to 100"),
        ('[[artifact]]\nmetric = "GS.delta"\nat_least = -100\n', "can never fail: its values are -100 to 100"),
        ('[[artifact]]\nmetric = "flips.any"\nat_most = 100\n', "can never fail"),
        (
            '[[artifact]]\nmetric = "unsafe-first-text"\nat_most = 100\n',
            "can never fail: its values are 0 to 100",
        ),
        ('[[artifact]]\nmetric = "safe_retrieval@1.delta"\nat_least = -100\n', "its values are -100 to 100"),
        (
            '[[artifact]]\nmetric = "neighbours.image-image"\nat_least = 0\n',
            "can never fail: its values are shares, 0 to 1",
        ),
        (
            '[[artifact]]\nmetric = "neighbours.image-image"\nat_most = 1\n',
            "can never fail: its values are shares, 0 to 1",
        ),
        ('[[artifact]]\nmetric = "spread.image"\nat_least = 0.0\n', "can never fail: its values are 0 to inf"),
        ('[[artifact]]\nmetric = "spread.image"\nat_least = 0.5\nbound = "worst"\n', "no interval"),
        ('[[artifact]]\nmetric = "parity.cosine_min"\nat_least = -1.0\n', "can never fail"),
        ('[[artifact]]\nmetric = "parity.max_abs"\nat_most = inf\n', "a finite number, is Infinity"),
        ('[[artifact]]\nmetric = "GS"\nat_least = nan\n', "a finite number, is NaN"),
        ('[[artifact]]\nmetric = "GS"\nat_least = 1\nat_most = 2\n', "exactly one"),
        ('[[artifact]]\nmetric = "GS"\n', "exactly one"),
        (
            '[[artifact]]\nmetric = "GS"\natleast = 1\n',
            r"artifact\[0\]: unknown key 'atleast'; did you mean 'at_least'",
        ),
        ('[[artifact]]\nmetric = "GS"\nat_least = 1\nmin_n = 0\n', "min_n is 0"),
        ('[[artifact]]\nmetric = "parity.cosine_min"\nat_most = 0.9\n', "on the wrong side: more is better"),
        ('[[artifact]]\nmetric = "flips.any"\nat_least = 2\n', "on the wrong side: less is better"),
        ('[[artifact]]\nmetric = "unsafe-first-text.delta"\nat_least = 2\n', "on the wrong side: less is better"),
        (PARITY + '[[concept]]\nmetric = "lost.GS"\nat_least = 2\n', "concept.0. on lost.GS is on the wrong side"),
        ('[[artifact]]\nmetric = "GS"\nat_least = 100.5\n', "can never pass"),
        ('[[artifact]]\nmetric = "flips.any"\nat_most = -1\n', "can never pass"),
        ('[[artifact]]\nmetric = "flips.any"\nat_most = 0\nbound = "worst"\n', "no interval ends there"),
        ('[[artifact]]\nmetric = "GS"\nat_least = "50"\n', 'should be a number, is "50"'),
        ('[[artifact]]\nmetric = "GS"\nat_least = true\n', "should be a number, is true"),
        (PARITY + 'bound = "worst"\n', "no interval"),
        (PARITY + 'bound = "best"\n', "worst"),
        (PARITY + 'of = "edit"\n', "belongs to"),
        (PARITY + '[[baseline]]\nmetric = "GS"\nat_least = 5\n', "no difference from the baseline"),
        (PARITY + '[[concept]]\nof = "edit"\nprecision = ["fp16"]\nmetric = "GS"\nat_least = 5\n', "no precision"),
        (PARITY + '[[evidence]]\ntarget = "tensorflow"\n', "tensorrt"),
        (PARITY.replace("[[art", 'baseline_digest = "abc"\n[[art'), "no digest"),
        (PARITY + '[[waiver]]\ncheck = "GS"\n', "missing key"),
    ],
)
def test_a_policy_with_a_mistake_is_refused(text: str, message: str) -> None:
    """Limits that nothing can break, typing errors and contradictions are one line that names the place."""
    with pytest.raises(RecipeError, match=message):
        _policy(text)


def test_an_unknown_metric_is_refused_with_the_nearest() -> None:
    """A mistyped metric is never silently left out."""
    with pytest.raises(RecipeError, match=r"unknown metric .GS.dleta.; nearest: .*GS.delta"):
        _judged('[[artifact]]\nmetric = "GS.dleta"\nat_least = -1\n')


@pytest.mark.parametrize("name", resources.names("ci"))
def test_every_shipped_policy_stops_the_unedited_model(name: str) -> None:
    """An artifact that is the original model under the edited name fails each of them, and is not proven."""
    original, edited = embedded(1500, 0.0), embedded(1500, 0.7)
    wrong = artifact("onnxruntime-fp32", Precision.FP32, edited, original)
    right = artifact("onnx", Precision.FP32, edited, edited)
    text, where = resources.read_toml("ci", name)
    verdict = gate(
        report(1500, artifacts=(right, wrong)),
        policy_from_toml(text, where=where),
        policy_digest=digest("a"),
        report_digest=digest("b"),
    )
    assert verdict.result is Result.FAIL
    assert verdict.failed[-1] == "onnxruntime-fp32"
    assert any(c.name == "flips.any" and c.result is Result.FAIL for c in verdict.checks)
    assert verdict.worst
    assert all(item.lost for item in verdict.worst[:3])


def test_a_variant_that_no_limit_is_for_is_not_proven() -> None:
    """A precision that the policy forgot fails instead of passing nothing."""
    edited = embedded(300, 0.7)
    on = with_artifact(report(), artifact("onnxruntime-fp8", Precision.FP8, edited, edited))
    verdict = _judged(PARITY + 'precision = ["fp32"]\n', on)
    assert verdict.proven == ("onnxruntime-fp32",)
    assert verdict.failed == ("onnxruntime-fp8",)
    assert _named(verdict, "limits apply", "onnxruntime-fp8")[0].result is Result.FAIL


def test_the_page_documents_every_key() -> None:
    """docs/reference/policy.md has every key of the schema."""
    page = (ROOT / "docs" / "reference" / "policy.md").read_text()
    for record in (Policy, Limit, EvidenceRule, Waiver):
        for key in dataclasses.fields(record):
            assert f"`{key.name}`" in page or f"`[[{key.name}]]`" in page, (record.__name__, key.name)
    for name in resources.names("ci"):
        assert f"`{name}`" in page


def test_rules_have_lines() -> None:
    """Annotations point at the rule that failed."""
    text = HEAD + "required = []\n" + PARITY + "\n" + PARITY + '  [[ concept ]]\nmetric = "GS"\n'
    assert rule_lines(text) == {"required": 4, "artifact[0]": 5, "artifact[1]": 9, "concept[0]": 12}


# --- concepts ------------------------------------------------------------------------------------------------------------


def _one_concept_lost() -> VerifyReport:
    """An artifact that is the edited model but for the items of one concept, where it is the original."""
    original, edited = embedded(300, 0.0), embedded(300, 0.7)
    rows = np.asarray(edited.concepts) == "blade"
    members = ("safe_image", "unsafe_image", "safe_text", "unsafe_text")
    mixed = {m: np.where(rows[:, None], getattr(original, m), getattr(edited, m)) for m in members}
    wrong = artifact("onnxruntime-fp32", Precision.FP32, edited, dataclasses.replace(edited, **mixed))
    return report(artifacts=(artifact("onnx", Precision.FP32, edited, edited), wrong))


CONCEPT = (
    '[[artifact]]\nmetric = "P_ts"\nat_least = 1\n[[concept]]\nof = "artifact"\nmetric = "lost.P_vu"\nat_most = 5\n'
)


def test_one_concept_that_got_worse_fails_and_is_named() -> None:
    """The others cannot hide it."""
    verdict = _judged(CONCEPT + "min_n = 50\n", _one_concept_lost())
    found = {c.concept: c.result for c in _named(verdict, "lost.P_vu")}
    assert found == {"fire": Result.PASS, "blade": Result.FAIL, "spill": Result.PASS}
    assert verdict.result is Result.FAIL


def test_concepts_with_too_few_items_are_said() -> None:
    """Some too small: a note. All too small: inconclusive, never a silent pass."""
    edited = embedded(300, 0.7)
    small = dataclasses.replace(edited, concepts=("rare", *edited.concepts[1:]))
    on = report(artifacts=(artifact("onnxruntime-fp32", Precision.FP32, edited, small),))
    verdict = _judged(CONCEPT + "min_n = 50\n", on)
    assert verdict.result is Result.PASS
    assert any("fewer than 50 items: rare (1)" in note for note in verdict.notes)
    none = _judged(CONCEPT + "min_n = 500\n", on)
    assert none.result is Result.INCONCLUSIVE
    assert {c.result for c in _named(none, "lost.P_vu")} == {Result.INCONCLUSIVE}


# --- evidence ------------------------------------------------------------------------------------------------------------

GPU = '[[evidence]]\ntarget = "tensorrt"\ndevice = "gpu"\ncompute_capability = ["9.0"]\n'


@pytest.mark.parametrize(
    ("where", "good"),
    [
        ({"device": "GPU A", "compute_capability": "9.0"}, True),
        ({"device": "GPU B", "compute_capability": "8.9"}, False),
        ({"provider": "CPUExecutionProvider", "device": "GPU"}, False),
    ],
)
def test_an_engine_must_have_run_on_the_named_gpu(where: dict[str, str], good: bool) -> None:
    """Another GPU, or the CPU of a machine whose package is built for GPUs, is not the evidence that was asked for."""
    edited = embedded(300, 0.7)
    on = with_artifact(report(), artifact("tensorrt-fp16", Precision.FP16, edited, edited, where))
    verdict = _judged(PARITY + GPU, on)
    assert (verdict.result is Result.PASS) is good
    assert ("tensorrt-fp16" in verdict.proven) is good
    [found] = _named(verdict, "required evidence", "tensorrt-fp16")
    assert good or "9.0" in found.detail


def test_evidence_that_is_missing_is_not_run() -> None:
    """A variant that was not executed, or a target that was not built, fails; with if_built only the former."""
    waiting = with_artifact(report(), not_run("tensorrt-fp32"))
    assert _judged(PARITY + GPU, waiting).result is Result.FAIL
    assert _judged(PARITY + GPU).result is Result.FAIL
    assert _judged(PARITY + GPU + "if_built = true\n").result is Result.PASS
    assert _judged(PARITY + GPU + "if_built = true\n", waiting).result is Result.FAIL
    assert _judged(PARITY, waiting).result is Result.PASS


# --- waivers -------------------------------------------------------------------------------------------------------------


def _waiver(check: str, subject: str, expires: str) -> str:
    return (
        f'[[waiver]]\ncheck = "{check}"\nsubject = "{subject}"\nowner = "jo@example.org"\nreason = "known"\n'
        f"expires = {expires}\n"
    )


IMPOSSIBLE = PARITY + '[[artifact]]\nmetric = "GS"\nat_least = 100.0\n'


def test_a_waiver_works_until_its_last_day() -> None:
    """It counts on its last day and not on the next; the check keeps its result and the waiver is in the verdict."""
    waivers = _waiver("GS", "onnxruntime-fp32", "2026-06-01") + _waiver("GS", "onnx", "2026-06-01")
    verdict = _judged(IMPOSSIBLE + waivers)
    assert verdict.result is Result.PASS
    assert verdict.proven == ("onnxruntime-fp32",)
    [found] = _named(verdict, "GS")
    assert found.result is Result.FAIL
    assert found.waiver is not None
    assert not found.blocks
    assert [w.state for w in verdict.waivers] == ["applied", "applied"]
    late = _judged(IMPOSSIBLE + waivers, today=date(2026, 6, 2))
    assert late.result is Result.FAIL
    assert [w.state for w in late.waivers] == ["expired", "expired"]
    assert all(check.waiver is None for check in late.checks)


def test_a_waiver_is_for_one_check_of_one_subject() -> None:
    """Another subject, or another check, still blocks; a waiver that nothing needs is said to be unused."""
    one = _judged(IMPOSSIBLE + _waiver("GS", "onnx", "2026-12-31"))
    assert one.result is Result.FAIL
    idle = _judged(PARITY + _waiver("parity.cosine_min", "onnx", "2026-12-31"))
    assert idle.result is Result.PASS
    assert [w.state for w in idle.waivers] == ["unused"]


@pytest.mark.parametrize("name", ["outputs are finite", "weights come from a checkpoint", "faithful variants", "GS"])
def test_what_no_policy_can_switch_off_cannot_be_waived(name: str) -> None:
    """Nor can a check that no rule makes, which would be a typing error."""
    with pytest.raises(RecipeError, match="no rule of this policy makes a check"):
        _policy(PARITY + _waiver(name, "onnx", "2026-12-31"))


@pytest.mark.parametrize("line", ['expires = "2026-01-01"', 'owner = ""', 'expires = 2026-01-01\nreason = " "'])
def test_a_waiver_needs_owner_reason_and_a_date(line: str) -> None:
    """A waiver that nobody answers for, or without an end, is refused."""
    text = _waiver("parity.cosine_min", "onnx", "2026-12-31")
    for change in line.split("\n"):
        key = change.split(" ")[0]
        text = "".join(f"{change}\n" if row.startswith(key) else f"{row}\n" for row in text.splitlines())
    with pytest.raises(RecipeError, match=r"expires|owner|reason"):
        _policy(PARITY + text)


def test_required_variants_can_be_waived_but_stay_unproven() -> None:
    """A waiver is no evidence."""
    head = HEAD + 'required = ["tensorrt-fp32"]\n'
    on = with_artifact(report(), not_run("tensorrt-fp32"))
    assert _judged(PARITY, on, head).result is Result.FAIL
    verdict = _judged(PARITY + _waiver("required evidence", "tensorrt-fp32", "2026-12-31"), on, head)
    assert verdict.result is Result.PASS
    assert verdict.unproven == ("tensorrt-fp32",)


# --- outcomes per item -----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits_round_trip(values: list[bool]) -> None:
    """What is packed is what is read; another number of items is refused."""
    array = np.array(values)
    assert values_of(bits_of(array), len(values), "x").tolist() == values
    with pytest.raises(IntegrityError):
        values_of(bits_of(array), len(values) + 8, "x")


def test_outcomes_that_do_not_add_up_are_refused() -> None:
    """Bits of another model under this one's percentages are an integrity error."""
    good, other = report().edited, report().original
    assert flips_since(good, good)["GS"].lost == 0
    with pytest.raises(IntegrityError, match="disagree"):
        flips_since(good, dataclasses.replace(good, items=other.items))


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ('metric = "neighbours.text-text"\nat_least = 50', "can never pass: its values are shares"),
        ('metric = "neighbours.text-text"\nat_least = 0', "can never fail"),
        ('metric = "spread.text"\nat_least = 0', "can never fail"),
    ],
)
def test_limits_on_shares_are_no_percentages(rule: str, said: str) -> None:
    """Neighbours and spread are numbers from 0, not percent; the slip is named when the policy is read."""
    text = f'format = 1\nname = "p"\n[[edit]]\n{rule}\n[[artifact]]\nmetric = "flips.any"\nat_most = 1\n'
    with pytest.raises(RecipeError, match=said):
        policy_from_toml(text, where="p.toml")


@pytest.mark.parametrize("metric", ["neighbours.text-text.delta", "spread.text.delta"])
def test_differences_that_do_not_exist_are_unknown_metrics(metric: str) -> None:
    """They are not said to be unable to fail; the gate names what there is."""
    text = f'format = 1\nname = "p"\nedit = []\n[[artifact]]\nmetric = "{metric}"\nat_least = -0.1\n'
    assert policy_from_toml(text, where="p.toml").artifact[0].metric == metric
