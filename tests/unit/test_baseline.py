"""Baselines: what was accepted is stored, pinned, and compared only with what was measured alike."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.reports import artifact, digest, embedded, report
from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.cli import cli
from uwm_deploy.errors import InputError, IntegrityError
from uwm_deploy.pipeline.baseline import BASELINE, accepted, changes, read_baseline, write_baseline
from uwm_deploy.recipes.policy import policy_from_toml
from uwm_deploy.records.codec import json_from_record
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.metrics import SafetyReport
from uwm_deploy.records.verdict import Baseline, Result, Verdict
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.safeground.embedded import flips_between, yardstick_of
from uwm_deploy.safeground.retrieval import MEANS, PAIRED
from uwm_deploy.stages.gate.gate import gate

POLICY = (
    'format = 1\nname = "x"\nedit = []\n[[artifact]]\nmetric = "P_ts"\nat_least = 1\n'
    '[[baseline]]\nmetric = "P_vu.delta"\nat_least = -2.0\nbound = "worst"\n'
)


def _judged(now: VerifyReport, then: Baseline | None, extra: str = "", baseline_digest: str = digest("9")) -> Verdict:
    policy = policy_from_toml(POLICY.replace("edit = []", f"edit = []\n{extra}"), where="x")
    given = {"baseline": then, "baseline_digest": baseline_digest if then else ""}
    return gate(now, policy, policy_digest=digest("a"), report_digest=digest("b"), **given)


def _accepted(on: VerifyReport) -> Baseline:
    return accepted(on, _judged(on, None), by="jo", reason="first")


def _less_safe(share: float) -> VerifyReport:
    """A build whose engine decides like the original model on a share of the items."""
    original, edited = embedded(300, 0.0), embedded(300, 0.7)
    rows = [i < share * 300 for i in range(300)]
    members = ("safe_image", "unsafe_image", "safe_text", "unsafe_text")
    mixed = {m: getattr(edited, m).copy() for m in members}
    for m in members:
        mixed[m][rows] = getattr(original, m)[rows]
    wrong = artifact("onnxruntime-fp32", Precision.FP32, edited, dataclasses.replace(edited, **mixed))
    return report(artifacts=(artifact("onnx", Precision.FP32, edited, edited), wrong))


def test_the_same_report_passes_and_a_worse_one_fails() -> None:
    """Nothing changed: pass. An engine that lost decisions: fail, at the engine, with the lost share."""
    base = _accepted(report())
    assert _judged(report(), base).result is Result.PASS
    worse = _judged(_less_safe(0.5), base)
    assert worse.result is Result.FAIL
    failed = {c.subject for c in worse.checks if c.result is Result.FAIL and c.name.endswith("since the baseline")}
    assert failed == {"onnxruntime-fp32"}
    assert worse.baseline_digest == digest("9")


def test_without_a_baseline_its_limits_are_not_run() -> None:
    """A policy that compares never passes when there is nothing to compare with."""
    verdict = _judged(report(), None)
    assert verdict.result is Result.FAIL
    found = [c for c in verdict.checks if c.name == "P_vu.delta since the baseline"]
    assert {c.result for c in found} == {Result.NOT_RUN}
    assert "baseline set" in found[0].advice


def test_changes_are_paired_item_by_item() -> None:
    """The stored bits give the flips that the embeddings give, for every metric and zero-shot set."""
    base, now = _accepted(report()), _less_safe(0.2)
    found = {(c.subject, c.metric): c.flips for c in changes(now, base)}
    edited = embedded(300, 0.7)
    wanted = now.artifacts[1].flips
    assert set(wanted) == set(flips_between(edited, edited, yardstick_of(embedded(300, 0.0))))
    assert set(PAIRED) <= set(wanted)
    for metric, flips in wanted.items():
        mine = found["onnxruntime-fp32", metric]
        assert (mine.lost, mine.gained, mine.delta_low) == (flips.lost, flips.gained, flips.delta_low)
    assert found["onnxruntime-fp32", "P_vu"].lost > 0
    for change in changes(now, base):
        if change.metric in PAIRED:
            assert change.after - change.before == pytest.approx(change.flips.delta)
    assert set(MEANS) <= {change.metric for change in changes(now, base)}


def test_retrieval_is_limited_since_the_baseline() -> None:
    """A less accurate engine fails a limit on retrieval; a baseline without hits by item leaves it inconclusive."""
    limit = '[[baseline]]\nof = "artifact"\nmetric = "{}.delta"\n{} = {}\nbound = "worst"\n'
    now, base = _less_safe(0.5), _accepted(report())
    for name in ("safe_retrieval@10", "hard-safe-text-to-image@10", "unsafe-first-text"):
        keys = ("at_most", 90) if name.startswith("unsafe") else ("at_least", -90)
        found = [c for c in _judged(now, base, limit.format(name, *keys)).checks if c.name.startswith(name)]
        assert {(c.subject, c.result) for c in found} == {("onnx", Result.PASS), ("onnxruntime-fp32", Result.PASS)}
    strict = limit.format("unsafe-first-text", "at_most", 0.0)
    (worse,) = [
        c for c in _judged(now, base, strict).checks if c.name.startswith("unsafe-first") and c.subject.endswith("fp32")
    ]
    assert worse.result is Result.FAIL
    old = _without_hits(report())
    found = [c for c in _judged(now, _accepted(old), strict).checks if c.name.startswith("unsafe-first")]
    assert {c.result for c in found} == {Result.INCONCLUSIVE}
    assert "n = 0, the limit needs 1" in found[0].detail


def _without_hits(of: VerifyReport) -> VerifyReport:
    """A report as an earlier release wrote it."""

    def old(safety: SafetyReport | None) -> SafetyReport | None:
        if safety is None or safety.items is None:
            return safety
        return dataclasses.replace(safety, items=dataclasses.replace(safety.items, retrieval={}))

    artifacts = tuple(dataclasses.replace(a, safety=old(a.safety)) for a in of.artifacts)
    return dataclasses.replace(of, edited=old(of.edited), artifacts=artifacts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: dataclasses.replace(r, evaluation=dataclasses.replace(r.evaluation, ids_digest=digest("f"))),
            "other items",
        ),
        (
            lambda r: dataclasses.replace(r, evaluation=dataclasses.replace(r.evaluation, content_digest=digest("f"))),
            "other content",
        ),
        (lambda r: dataclasses.replace(r, zero_shot_digests={"shape": digest("f")}), "other zero-shot sets"),
        (
            lambda r: dataclasses.replace(
                r, model=dataclasses.replace(r.model, image=dataclasses.replace(r.model.image, resample="bilinear"))
            ),
            "other image preprocessing",
        ),
        (
            lambda r: dataclasses.replace(
                r, model=dataclasses.replace(r.model, text=dataclasses.replace(r.model.text, pad_id=9))
            ),
            "other tokenisation",
        ),
        (
            lambda r: dataclasses.replace(r, edited=dataclasses.replace(r.edited, items=None)),
            "no outcomes per item",
        ),
    ],
)
def test_unlike_is_not_compared(change, message: str) -> None:
    """Other items, other pixels or other ids are refused, with the command that measures again."""
    with pytest.raises(InputError, match=f"{message}.*uwm-deploy verify --model made-up-model"):
        _judged(change(report()), _accepted(report()))


def test_a_changed_baseline_is_refused(tmp_path: Path) -> None:
    """A number edited in the file, or another file than the policy pins, ends with exit code 5."""
    base = _accepted(report())
    pinned = write_baseline(tmp_path, base)
    assert read_baseline(tmp_path) == (base, pinned)
    extra = f'baseline_digest = "{pinned}"'
    assert _judged(report(), base, extra, pinned).result is Result.PASS
    with pytest.raises(IntegrityError, match="policy pins"):
        _judged(report(), base, extra, digest("8"))
    body = json.loads((tmp_path / BASELINE).read_text())
    body["report"]["edited"]["preference"]["GS"]["value"] += 1.0
    (tmp_path / BASELINE).write_text(json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    with pytest.raises(IntegrityError, match="not the report that was accepted"):
        read_baseline(tmp_path)
    (tmp_path / BASELINE).write_text(json_from_record(report()))
    with pytest.raises(IntegrityError, match="holds a 'VerifyReport'"):
        read_baseline(tmp_path)
    with pytest.raises(InputError, match="baseline set"):
        read_baseline(tmp_path / "nowhere")


def test_a_new_variant_is_compared_with_the_accepted_model() -> None:
    """A precision that is new since the baseline is judged too, and it says how; one that is gone is noted."""
    then = report()
    base = _accepted(dataclasses.replace(then, artifacts=then.artifacts[:1]))
    verdict = _judged(then, base)
    assert verdict.result is Result.PASS
    assert any("onnxruntime-fp32 is not in the baseline" in note for note in verdict.notes)
    gone = _judged(dataclasses.replace(then, artifacts=then.artifacts[:1]), _accepted(then))
    assert any("onnxruntime-fp32 was executed in the baseline and is not here" in note for note in gone.notes)


def test_the_commands_on_a_real_bundle(built, tmp_path: Path) -> None:
    """set, show, compare and gate: a bundle is its own baseline; without a reason, or failing, nothing is stored."""
    request, _ = built
    runner, bundle, at = CliRunner(), str(request.out), tmp_path / "base"
    (tmp_path / "x.toml").write_text(POLICY.replace("at_least = -2.0\n", "at_least = -2.0\n"))
    policy = ["--policy", str(tmp_path / "x.toml")]
    assert runner.invoke(cli, ["gate", bundle, *policy]).exit_code == 3
    stored = runner.invoke(cli, ["baseline", "set", bundle, "--at", str(at), "--by", "jo", "--reason", "1.0", *policy])
    assert stored.exit_code == 0, stored.output
    assert read_baseline(at)[1] in stored.output
    assert "accepted" in runner.invoke(cli, ["baseline", "show", str(at)]).output
    compared = json.loads(runner.invoke(cli, ["baseline", "compare", bundle, "--baseline", str(at), "--json"]).output)
    assert {row["flips"]["lost"] for row in compared} == {0}
    passed = runner.invoke(cli, ["gate", bundle, *policy, "--baseline", str(at)])
    assert passed.exit_code == 0, passed.output
    (tmp_path / "hard.toml").write_text(
        POLICY.replace("at_least = 1\n", "at_least = 100.0\n").replace('name = "x"', 'name = "hard"')
    )
    hard = ["--policy", str(tmp_path / "hard.toml"), "--by", "jo", "--reason", "1.0"]
    refused = runner.invoke(cli, ["baseline", "set", bundle, "--at", str(tmp_path / "no"), *hard])
    assert refused.exit_code == 3
    assert "nothing was stored" in refused.output
    assert not (tmp_path / "no").exists()
    nobody = ["baseline", "set", bundle, "--at", str(at), "--by", " ", "--reason", "1.0", *policy]
    assert runner.invoke(cli, nobody).exit_code == 2


def test_a_bundle_can_hold_its_baseline(built, tmp_path: Path) -> None:
    """The bundle stays whole and served, the gate finds the baseline by itself, and a changed one is refused."""
    import shutil

    request, _ = built
    bundle = tmp_path / "bundle"
    shutil.copytree(request.out, bundle)
    (tmp_path / "x.toml").write_text(POLICY)
    policy = ["--policy", str(tmp_path / "x.toml")]
    runner = CliRunner()
    command = ["baseline", "set", str(request.out), "--at", str(bundle), "--by", "jo", "--reason", "1.0", *policy]
    assert runner.invoke(cli, command).exit_code == 0
    assert BASELINE in {file.path for file in open_bundle(bundle).manifest.files}
    assert SafeEncoder.open(bundle).variant == "onnxruntime-fp32"
    assert runner.invoke(cli, ["gate", str(bundle), *policy]).exit_code == 0
    (bundle / BASELINE).write_text((bundle / BASELINE).read_text().replace('"jo"', '"al"'))
    assert runner.invoke(cli, ["gate", str(bundle), *policy]).exit_code == 5
