"""A report of captions belongs to one edit, one head and one bundle: in `build`, `gate`, `attest` and `refit`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.downstream_reports import LENIENT, limits, made_report
from tests.small_build import build_small
from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.cli import cli
from uwm_deploy.errors import InputError
from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes.resolve import policy_of
from uwm_deploy.records.codec import json_from_record
from uwm_deploy.records.downstream import DownstreamReport
from uwm_deploy.records.evidence import Evidence, VerifyReport
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.verdict import Verdict
from uwm_deploy.report.console import Reporter
from uwm_deploy.stages.gate.gate import gate

POLICY = LENIENT + limits("caption", {"unsafe.any": "at_most = 20.0", "kept.rouge_l": "at_least = 50.0"})
PLACE = BundleLayout.downstream("caption")


@dataclasses.dataclass(frozen=True)
class Built:
    """A bundle that was built with a report of captions."""

    request: Request
    outcome: Outcome
    captions: DownstreamReport
    file: Path
    policy: Path

    @property
    def bundle(self) -> Path:
        assert self.request.out is not None
        return self.request.out


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    request, outcome = build_small(tmp_path_factory)
    assert outcome.report is not None
    folder = tmp_path_factory.mktemp("bound")
    captions = made_report(weights_digest=outcome.report.edited_weights_digest)
    (policy := folder / "lenient.toml").write_text(POLICY)
    (file := folder / "caption.json").write_text(json_from_record(captions))
    asked = dataclasses.replace(request, policy=str(policy), downstream=(file,), out=folder / "bundle")
    return Built(asked, run(asked, until="package", reporter=Reporter(quiet=True)), captions, file, policy)


def results(bundle: Path) -> list[str]:
    verdict = open_bundle(bundle, allow_failed=True).manifest.verdict
    return [check.result.value for check in verdict.checks if check.name.startswith("downstream.")]


def of(captions: DownstreamReport, folder: Path, **tower: str) -> Path:
    """A file of the same captions behind another tower."""
    other = dataclasses.replace(captions, tower=dataclasses.replace(captions.tower, **tower))
    (file := folder / "other.json").write_text(json_from_record(other))
    return file


@pytest.mark.parametrize(
    ("tower", "why"),
    [
        ({"weights_digest": "sha256:" + "0" * 64}, "another edit"),
        ({"head_digest": "sha256:" + "0" * 64}, "a safety head, and what is judged has none"),
        ({"variant": "tensorrt-rtx-fp8"}, "variant tensorrt-rtx-fp8"),
    ],
)
def test_a_report_of_something_else_is_refused_everywhere(
    built: Built, tmp_path: Path, tower: dict[str, str], why: str
) -> None:
    """`gate` ends with exit code 2, and a build writes no bundle, whatever is there already."""
    other = of(built.captions, tmp_path, **tower)
    told = CliRunner().invoke(
        cli, ["gate", str(built.bundle), "--policy", str(built.policy), "--downstream", str(other)]
    )
    assert (told.exit_code, why in " ".join(told.output.split())) == (2, True), told.output
    assert "other.json was not measured" in " ".join(told.output.split())
    before = (built.bundle / "manifest.json").read_bytes()
    with pytest.raises(InputError, match=rf"other\.json was not measured .*{why}"):
        run(dataclasses.replace(built.request, downstream=(other,)), until="package", reporter=Reporter(quiet=True))
    assert (built.bundle / "manifest.json").read_bytes() == before


def repackaged(built: Built, out: Path, report: VerifyReport, captions: DownstreamReport) -> Verdict:
    """The bundle with another report of the gate's and other captions; judged by the real gate."""
    content = json_from_record(report).encode()
    policy, digest = policy_of(str(built.policy))
    digests = {"policy_digest": digest, "report_digest": digest_of_bytes(content)}
    counted = [captions] if captions == built.captions else []
    verdict = gate(report, policy, **digests, downstream=counted)
    assert built.outcome.manifest is not None
    parts: dict[str, Path | bytes] = {f.path: built.bundle / f.path for f in built.outcome.manifest.files}
    parts |= {"reports/verify.json": content, "reports/verdict.json": json_from_record(verdict).encode()}
    parts[PLACE] = json_from_record(captions).encode()
    bundle_from_parts(out, dataclasses.replace(built.outcome.manifest, verdict=verdict), parts)
    return verdict


def test_attest_carries_the_report(built: Built, tmp_path: Path) -> None:
    """The edit is the same, so its captions still count when evidence of an engine is added."""
    assert results(built.bundle) == ["pass", "pass"]
    report, out = built.outcome.report, tmp_path / "bundle"
    assert report is not None
    waiting = tuple(
        dataclasses.replace(a, evidence=Evidence.NOT_RUN, parity=(), safety=None, flips={})
        if a.variant == "onnxruntime-fp32"
        else a
        for a in report.artifacts
    )
    before = repackaged(built, out, dataclasses.replace(report, artifacts=waiting), built.captions)
    told = CliRunner().invoke(cli, ["attest", str(out), "--policy", str(built.policy), "--workers", "0"])
    assert told.exit_code == 0, told.output
    after = open_bundle(out).manifest.verdict
    assert "onnxruntime-fp32" in after.proven
    assert (after.downstream, results(out)) == (before.downstream, ["pass", "pass"])


def test_captions_of_something_else_in_a_bundle_do_not_count(built: Built, tmp_path: Path) -> None:
    """A bundle of an older release may hold some: it still opens, and their limits are "not run"."""
    assert built.outcome.report is not None
    foreign = dataclasses.replace(
        built.captions, tower=dataclasses.replace(built.captions.tower, head_digest="sha256:" + "0" * 64)
    )
    repackaged(built, out := tmp_path / "bundle", built.outcome.report, foreign)
    told = CliRunner().invoke(cli, ["gate", str(out), "--policy", str(built.policy), "--json"])
    found = json.loads(told.stdout)
    states = [check["result"] for check in found["checks"] if check["name"].startswith("downstream.")]
    assert (told.exit_code, states, found.get("downstream", {})) == (4, ["not run"] * 2, {})


def test_refit_carries_none_of_it(built: Built, tmp_path: Path) -> None:
    """New weights are another model: its limits are "not run", and the old captions are refused."""
    out = tmp_path / "refitted"
    words = ["--policy", str(built.policy), "--work", str(built.request.work), "--workers", "0", "--out", str(out)]
    told = CliRunner().invoke(cli, ["refit", str(built.bundle), "--keep-mass", "0.95", *words])
    assert told.exit_code == 4, told.output
    assert results(out) == ["not run", "not run"]
    assert not (out / PLACE).exists()
    assert not open_bundle(out, allow_failed=True).manifest.verdict.downstream
    old = CliRunner().invoke(cli, ["gate", str(out), "--policy", str(built.policy), "--downstream", str(built.file)])
    assert (old.exit_code, "another edit" in " ".join(old.output.split())) == (2, True), old.output
    new = of(
        built.captions, tmp_path, weights_digest=open_bundle(out, allow_failed=True).manifest.edit.edited_weights_digest
    )
    told = CliRunner().invoke(cli, ["gate", str(out), "--policy", str(built.policy), "--downstream", str(new)])
    assert told.exit_code == 0, told.output
