"""Verdicts in the forms of other tools, and criteria that were locked before the run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.reports import report
from uwm_deploy.cli import cli
from uwm_deploy.errors import EvidenceError, InputError
from uwm_deploy.pipeline.policy_lock import kept_lock, lock_policy
from uwm_deploy.recipes.resolve import policy_of
from uwm_deploy.records.codec import json_from_record, write_record
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.files import digest_of_bytes, digest_of_file
from uwm_deploy.records.verdict import Result, Verdict
from uwm_deploy.report.in_toto import evaluations_from_verdict
from uwm_deploy.report.oscal import oscal_from_verdict
from uwm_deploy.stages.gate.gate import gate

AT = datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC)


def judged(made: VerifyReport) -> Verdict:
    policy, policy_digest = policy_of("demo")
    content = json_from_record(made).encode()
    return gate(made, policy, policy_digest=policy_digest, report_digest=digest_of_bytes(content))


@pytest.fixture(scope="module")
def verdicts() -> list[Verdict]:
    """One that passes, and one in which something fails and something was not measured."""
    return [judged(report()), judged(dataclasses.replace(report(), calibration_overlap=3, edit_proof=None))]


def test_every_measured_check_is_a_statement(verdicts: list[Verdict]) -> None:
    """With metric, comparator, threshold, number of items, whether it passed and who says so."""
    for verdict in verdicts:
        lines = [json.loads(line) for line in evaluations_from_verdict(verdict, version="1").splitlines()]
        measured = [check for check in verdict.checks if check.measured is not None]
        assert len(lines) == len(measured)
        for line, check in zip(lines, measured, strict=True):
            said = line["predicate"]
            assert (said["metric"], said["threshold"], said["sampleSize"]) == (check.name, check.limit, check.n)
            assert said["passed"] is (check.result is Result.PASS)
            assert said["comparator"] == {"at_least": ">=", "at_most": "<=", "equals": "=="}[check.direction]
            assert said["assuranceLevel"] == "self_attested"
            assert "sha256:" + said["criteria"]["digest"]["sha256"] == verdict.policy_digest
            assert "sha256:" + said["evidence"]["digest"]["sha256"] == verdict.report_digest
            assert line["subject"]
    engine = next(line for line in lines if line["predicate"]["on"] == "onnxruntime-fp32")
    names = {part["name"]: part["digest"] for part in engine["subject"]}
    digests = verdicts[1].judged["onnxruntime-fp32"]
    assert names["onnxruntime-fp32/image"] == {"sha256-of-engine": digests["image"].removeprefix("sha256:")}


def test_oscal_has_an_observation_per_check_and_a_finding_per_subject(verdicts: list[Verdict]) -> None:
    """What does not pass is not satisfied, and every reference leads somewhere."""
    for verdict in verdicts:
        text = oscal_from_verdict(verdict, version="1", at=AT)
        assert text == oscal_from_verdict(verdict, version="1", at=AT)
        (result,) = json.loads(text)["assessment-results"]["results"]
        observed = {part["uuid"]: part for part in result["observations"]}
        assert len(observed) == len(verdict.checks)
        assert all(uuid.UUID(name).version == 5 for name in observed)
        states = {part["target"]["target-id"]: part["target"]["status"]["state"] for part in result["findings"]}
        failing = {check.subject for check in verdict.checks if check.blocks}
        assert {name.removeprefix("subject-") for name, state in states.items() if state == "not-satisfied"} == failing
        related = [ref["observation-uuid"] for part in result["findings"] for ref in part["related-observations"]]
        assert sorted(related) == sorted(observed)


def test_oscal_is_valid_by_the_schema(verdicts: list[Verdict]) -> None:
    """NIST's JSON schema of assessment results, which is not in this repository."""
    if not (file := os.environ.get("UWM_OSCAL_SCHEMA")):
        pytest.skip("not run: UWM_OSCAL_SCHEMA does not name oscal_assessment-results_schema.json")
    # Python's expressions have no classes of Unicode; ours are of ASCII.
    schema = json.loads(
        re.sub(r"\\\\p\{(\w)\}", lambda m: {"L": "[a-zA-Z]", "N": "[0-9]"}[m[1]], Path(file).read_text())
    )
    import jsonschema  # reads grammars for a second, and every worker imports this file

    for verdict in verdicts:
        body = json.loads(oscal_from_verdict(verdict, version="1", at=AT))
        jsonschema.Draft7Validator(schema).validate(body)
        body["assessment-results"]["results"][0]["findings"][0]["unknown"] = 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft7Validator(schema).validate(body)


def test_locked_criteria_are_kept(tmp_path: Path) -> None:
    """Another policy, another set, and a bundle from before the lock are refused; a lock is never replaced."""
    made, file = report(), tmp_path / "lock.json"
    lock, digest = lock_policy("demo", "demo-test", file, by="A. Name")
    assert digest == digest_of_file(file)
    assert {c.metric for c in lock.criteria} >= {"parity.cosine_min", "flips.any"}
    data = dataclasses.replace(made.evaluation, ids_digest=lock.ids_digest, content_digest=lock.content_digest)
    right = dataclasses.replace(made, evaluation=data)
    policy, strict = (lock.policy, lock.policy_digest), policy_of("strict")
    assert digest in kept_lock(file, policy, right, measured="9020-01-01T00:00:00+00:00")
    assert "not checked" in kept_lock(file, policy, right)
    for other in ((strict[0].name, strict[1]), ("strict", lock.policy_digest)):
        with pytest.raises(EvidenceError, match="policy strict is not the one that was locked: demo"):
            kept_lock(file, other, right)
    for part in ("ids_digest", "content_digest"):
        elsewhere = dataclasses.replace(data, **{part: f"sha256:{0:064x}"})
        with pytest.raises(EvidenceError, match="not the set that was locked"):
            kept_lock(file, policy, dataclasses.replace(made, evaluation=elsewhere))
    with pytest.raises(EvidenceError, match="after measuring began"):
        kept_lock(file, policy, right, measured="2020-01-01T00:00:00+00:00")
    for time in ("yesterday", "2026-11-27T10:00:00"):
        write_record(tmp_path / "odd.json", dataclasses.replace(lock, locked=time))
        with pytest.raises(InputError, match="no time"):
            kept_lock(tmp_path / "odd.json", policy, right, measured="2026-11-27T10:00:00+00:00")
    with pytest.raises(InputError, match="never replaced"):
        lock_policy("demo", "", file, by="A. Name")


def test_the_commands_lock_judge_and_export(tmp_path: Path) -> None:
    """A report is judged by what was locked, the verdict says so, and both exports are written."""
    (tmp_path / "verify.json").write_text(json_from_record(report()))
    lock, run = tmp_path / "lock.json", CliRunner().invoke
    done = run(cli, ["policy", "lock", "--policy", "demo", "--out", str(lock), "--by", "A. Name"])
    assert done.exit_code == 0, done.output
    assert digest_of_file(lock) in done.output
    words = ["gate", str(tmp_path / "verify.json"), "--lock", str(lock)]
    files = ["--in-toto", str(tmp_path / "e.jsonl"), "--oscal", str(tmp_path / "o.json")]
    done = run(cli, [*words, "--policy", "demo", "--json", *files])
    assert done.exit_code == 0, done.output
    assert any("criteria locked on" in note for note in json.loads(done.stdout)["notes"])
    assert (tmp_path / "e.jsonl").read_text().count("\n") > 20
    assert json.loads((tmp_path / "o.json").read_text())["assessment-results"]["metadata"]["oscal-version"] == "1.2.1"
    assert run(cli, [*words, "--policy", "default"]).exit_code == 5
