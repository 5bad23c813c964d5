"""What the gate says: every output leads with what failed, holds the waivers, and is what its reader can parse."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard

from tests.reports import artifact, digest, embedded, not_run, report, with_artifact
from uwm_deploy.cli import cli
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.policy import policy_from_toml, rule_lines
from uwm_deploy.recipes.recipe import recipe_from_toml
from uwm_deploy.records.codec import json_from_record, plain_from_record, record_from_json
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.edit import EditRecord, EditStep, Method, TensorEdit
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.model import SCHEMA_VERSION, TowerName
from uwm_deploy.records.schema import PUBLISHED, schema_of, text_of
from uwm_deploy.records.verdict import Result, Safer, Verdict
from uwm_deploy.report.card import card_of, is_non_commercial
from uwm_deploy.report.findings import findings, safer_line, verdict_line
from uwm_deploy.report.github import ANNOTATIONS, annotations_from_verdict, outputs_from_verdict
from uwm_deploy.report.gitlab import code_quality_from_verdict, metrics_from_verdict
from uwm_deploy.report.junit import junit_from_verdict
from uwm_deploy.report.markdown import markdown_from_verdict
from uwm_deploy.report.sarif import sarif_from_verdict
from uwm_deploy.safeground.fidelity import row_parity
from uwm_deploy.safeground.geometry import geometry
from uwm_deploy.stages.gate.gate import gate

ROOT = Path(__file__).parents[2]
POLICY = """format = 1
name = "x"
edit = []
required = ["tensorrt-fp32"]

[[artifact]]
metric = "flips.any"
at_most = 1.0

[[artifact]]
metric = "P_vu"
bound = "worst"
at_least = 5.0

[[artifact]]
metric = "GS"
at_least = 100.0

[[waiver]]
check = "GS"
subject = "onnx"
owner = "jo@example.org"
reason = "impossible | on <purpose>"
expires = 2026-12-31

[[waiver]]
check = "GS"
subject = "onnxruntime-fp32"
owner = "jo@example.org"
reason = "was"
expires = 2026-01-01
"""
PLACE = {"policy_file": "ci/x.toml", "lines": rule_lines(POLICY)}


@pytest.fixture(scope="module")
def failing() -> Verdict:
    """An engine that is the unedited model, a required variant that was not run, one waiver good and one run out."""
    original, edited = embedded(300, 0.0), embedded(300, 0.7)
    parts = (
        artifact("onnx", Precision.FP32, edited, edited),
        # Its rows are left out, which no policy can: the policy's own limits are what is shown here.
        dataclasses.replace(
            artifact("onnxruntime-fp32", Precision.FP32, edited, original),
            rows=row_parity(edited, edited, None),
            geometry=geometry(edited.shape(), edited.shape()),
        ),
    )
    on = with_artifact(report(artifacts=parts), not_run("tensorrt-fp32"))
    policy = policy_from_toml(POLICY, where="x")
    return gate(on, policy, policy_digest=digest("a"), report_digest=digest("b"), today=date(2026, 6, 1))


def test_what_failed_comes_first_and_worst_first(failing: Verdict) -> None:
    """Blocking checks before waived ones, failures before what was not run, the consequence after its causes."""
    found = findings(failing)
    assert [(c.subject, c.name) for c in found] == [
        ("onnxruntime-fp32", "flips.any"),
        ("onnxruntime-fp32", "GS"),
        ("onnxruntime-fp32", "P_vu"),
        ("onnxruntime-fp32", "not better than the edited model"),
        ("tensorrt-fp32", "required evidence"),
        ("build", "faithful variants"),
        ("onnx", "GS"),
    ]
    assert len(failing.worst) == 10
    assert {item.subject for item in failing.worst} == {"onnxruntime-fp32"}
    falls = [item.margin - item.reference_margin for item in failing.worst]
    assert falls == sorted(falls)
    assert all(item.lost and item.margin <= 0 < item.reference_margin for item in failing.worst)


def test_junit_has_one_case_per_check(failing: Verdict) -> None:
    """Counts are those of the cases; what blocks is a failure with what to try, what is waived is skipped."""
    root = ET.fromstring(junit_from_verdict(failing))
    cases = root.findall("./testsuite/testcase")
    assert len(cases) == len(failing.checks) == int(root.get("tests"))
    assert len(root.findall(".//failure")) == int(root.get("failures")) == 6
    assert [f.get("type") for f in root.findall(".//failure")].count("not run") == 1
    assert all("try:" in f.text for f in root.findall(".//failure"))
    [skipped] = root.findall(".//skipped")
    assert "jo@example.org" in skipped.get("message")
    for suite in root.findall("testsuite"):
        assert int(suite.get("tests")) == len(suite.findall("testcase"))
        assert int(suite.get("failures")) == len(suite.findall(".//failure"))
        names = [case.get("name") for case in suite.findall("testcase")]
        assert len(names) == len(set(names))


def test_characters_that_xml_cannot_hold_are_replaced(failing: Verdict) -> None:
    """A file name with control characters does not make the report unreadable."""
    bad = dataclasses.replace(failing.checks[0], subject='a\x00b\x1b]\ufffe<&"', result=Result.FAIL, detail="\x08")
    root = ET.fromstring(junit_from_verdict(dataclasses.replace(failing, checks=(bad,))))
    assert root.find("testsuite").get("name") == r'a\u{0}b\u{1b}]\u{fffe}<&"'


def test_markdown_leads_with_the_result_and_cannot_be_broken(failing: Verdict) -> None:
    """Verdict, then what failed; a reason cannot end its cell, start HTML or mention anybody."""
    text = markdown_from_verdict(failing)
    assert text.startswith("### verdict: fail")
    assert text.index("flips.any") < text.index("GS") < text.index("<details>")
    assert "WAIVER EXPIRED: onnxruntime-fp32: GS: was" in text
    assert "impossible \\| on &lt;purpose>" in text
    assert "jo@example.org" not in text
    assert text.count(f"`{failing.worst[0].id}`") == 1
    rows = [line for line in text.splitlines() if line.startswith("| fail")]
    assert rows
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 8 for row in rows)


def test_markdown_is_cut_at_a_line(failing: Verdict) -> None:
    """GitHub drops a summary that is too long as a whole."""
    text = markdown_from_verdict(failing, limit_bytes=600)
    assert len(text.encode()) <= 600
    assert text.startswith("### verdict: fail")
    assert "cut: too long" in text


def test_github_annotations_are_few_escaped_and_at_the_rule(failing: Verdict) -> None:
    """Ten errors at most, the last of which counts the others; a line break cannot start a command of its own."""
    lines = annotations_from_verdict(failing, **PLACE)
    assert lines[0].startswith("::error file=ci/x.toml,line=6,title=onnxruntime-fp32%3A flips.any::fail: measured ")
    assert sum(line.startswith("::warning") for line in lines) == 1
    evil = dataclasses.replace(failing.checks[0], subject="a,b::c", result=Result.FAIL, detail="x\r\n::set-output 100%")
    many = annotations_from_verdict(dataclasses.replace(failing, checks=(evil,) * 25), **PLACE)
    assert len(many) == ANNOTATIONS
    assert all("\n" not in line and "\r" not in line for line in many)
    assert "title=a%2Cb%3A%3Cc" not in many[0]
    assert "title=a%2Cb%3A%3Ac%3A " in many[0]
    assert r"x\u{d}\u{a}::set-output 100%25" in many[0]
    assert "16 more" in many[-1]
    outputs = dict(line.split("=", 1) for line in outputs_from_verdict(failing).splitlines())
    assert outputs["verdict"] == "fail"
    assert outputs["failed"] == "onnxruntime-fp32"


def test_gitlab_reports(failing: Verdict) -> None:
    """The fields that GitLab reads, with fingerprints that do not depend on what was measured; metrics that parse."""
    issues = json.loads(code_quality_from_verdict(failing, **PLACE))
    assert len(issues) == len(findings(failing))
    for issue in issues:
        assert set(issue) == {"description", "check_name", "fingerprint", "severity", "location"}
        assert issue["severity"] in ("info", "minor", "major", "critical", "blocker")
        assert issue["location"]["path"] == "ci/x.toml"
        assert issue["location"]["lines"]["begin"] >= 1
    assert len({issue["fingerprint"] for issue in issues}) == len(issues)
    moved = tuple(dataclasses.replace(c, measured=(c.measured or 0) + 0.01, detail="other") for c in failing.checks)
    again = json.loads(code_quality_from_verdict(dataclasses.replace(failing, checks=moved), **PLACE))
    assert {i["fingerprint"] for i in again} == {i["fingerprint"] for i in issues}
    metrics = metrics_from_verdict(failing)
    assert metrics.endswith("\nuwm_deploy_verdict_pass 0\n# EOF\n")
    samples = [line for line in metrics.splitlines() if not line.startswith("#")]
    pattern = r'[a-z_]+(\{[a-z]+="(?:[^"\\]|\\.)*"(,[a-z]+="(?:[^"\\]|\\.)*")*\})? -?[0-9.e+-]+'
    assert all(re.fullmatch(pattern, line) for line in samples)
    assert len(samples) == len({line.rsplit(" ", 1)[0] for line in samples})
    clean = dataclasses.replace(failing, checks=())
    assert json.loads(code_quality_from_verdict(clean, **PLACE)) == []


def test_sarif_results_have_rules_places_and_fingerprints(failing: Verdict) -> None:
    """One result per check that does not pass, at the policy's line; a waiver is a suppression."""
    body = json.loads(sarif_from_verdict(failing, version="1.2.3", **PLACE))
    assert body["version"] == "2.1.0"
    [run] = body["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert len(rules) == len(set(rules))
    assert len(run["results"]) == len(findings(failing))
    for result in run["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]
        place = result["locations"][0]["physicalLocation"]
        assert place["artifactLocation"]["uri"] == "ci/x.toml"
        assert place["region"]["startLine"] >= 1
        assert result["partialFingerprints"]["uwmDeployCheck/v1"]
    assert [r["level"] for r in run["results"]] == ["error"] * 6 + ["note"]
    [suppression] = run["results"][-1]["suppressions"]
    assert suppression["kind"] == "external"
    assert "until 2026-12-31" in suppression["justification"]


@pytest.mark.parametrize(
    "render",
    [
        junit_from_verdict,
        markdown_from_verdict,
        json_from_record,
        lambda v: "\n".join(annotations_from_verdict(v, **PLACE)),
        lambda v: code_quality_from_verdict(v, **PLACE),
        lambda v: sarif_from_verdict(v, version="1", **PLACE),
    ],
    ids=["junit", "markdown", "json", "github", "gitlab", "sarif"],
)
def test_every_output_names_every_finding(failing: Verdict, render) -> None:
    """Nothing that does not pass is left out of any of them."""
    text = render(failing)
    for check in findings(failing):
        assert check.name in text
        assert check.subject in text


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_schemas_are_current(name: str) -> None:
    """docs/schema/ holds what the records say; `python -m uwm_deploy.records.schema NAME` writes it."""
    import jsonschema  # reads grammars for a second, and every worker imports this file

    record = PUBLISHED[name]
    assert (ROOT / "docs" / "schema" / f"{name}.schema.json").read_text() == text_of(record)
    jsonschema.Draft202012Validator.check_schema(schema_of(record))


def test_what_is_written_follows_the_schemas(built, failing: Verdict) -> None:
    """The bundle's reports are valid; a missing or unknown key, or a wrong type, is not."""
    import jsonschema

    request, _ = built
    for name in ("verdict", "verify"):
        body = json.loads((request.out / "reports" / f"{name}.json").read_text())
        jsonschema.validate(body, schema_of(PUBLISHED[name]))
    body = json.loads(json_from_record(failing))
    validator = jsonschema.Draft202012Validator(schema_of(Verdict))
    assert validator.is_valid(body)
    newer = {"schema_version": SCHEMA_VERSION + 1}
    for change in ({"result": "perhaps"}, {"extra": 1}, {"checks": None}, newer, {"proven": [1]}):
        assert not validator.is_valid(body | change), change
    assert not validator.is_valid({key: value for key, value in body.items() if key != "policy"})


# --- the commands, on a real bundle ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One policy that the small bundle passes, one that it fails, one that it has too few items for."""
    folder = tmp_path_factory.mktemp("policies")
    head = 'format = 1\nname = "{0}"\nedit = []\n[[artifact]]\n'
    rules = {
        "good": 'metric = "parity.cosine_min"\nat_least = 0.999\n',
        "bad": 'metric = "GS"\nat_least = 100.0\nreason = "to see it fail"\n',
        "few": 'metric = "GS"\nat_least = 0.001\nmin_n = 100000\n',
    }
    for name, rule in rules.items():
        (folder / f"{name}.toml").write_text(head.format(name) + rule)
    return folder


def test_the_gate_writes_everything_at_once(built, policies: Path, tmp_path: Path, monkeypatch) -> None:
    """Every output of one run says what the exit code says; with --json standard output is the verdict alone."""
    request, _ = built
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "output"))
    (tmp_path / "summary.md").write_text("before\n")
    command = ["gate", str(request.out), "--policy", str(policies / "bad.toml"), "--github", "--gitlab", str(tmp_path)]
    for name in ("junit", "markdown", "sarif"):
        command += [f"--{name}", str(tmp_path / name)]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 3, done.output
    assert "::error file=bad.toml,line=4,title=onnx" in done.output
    assert "try: " in done.output
    assert (tmp_path / "summary.md").read_text().startswith("before\n### verdict: fail")
    assert "verdict=fail\n" in (tmp_path / "output").read_text()
    assert ET.parse(tmp_path / "junit").getroot().get("failures") == "3"
    assert json.loads((tmp_path / "gl-code-quality-report.json").read_text())
    quiet = CliRunner().invoke(cli, [*command, "--json"])
    verdict = record_from_json(Verdict, quiet.stdout, where="stdout")
    assert verdict.result is Result.FAIL
    assert "::error" in quiet.stderr


def test_an_output_that_cannot_be_written_is_one_line(built, policies: Path, tmp_path: Path) -> None:
    """A file in the way of a folder ends with exit code 2, not with a pass."""
    request, _ = built
    (tmp_path / "file").write_text("")
    command = ["gate", str(request.out), "--policy", str(policies / "good.toml"), "--junit", str(tmp_path / "file/x")]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 2
    assert "Traceback" not in done.output


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `uwm-deploy` is a command, as a runner has it."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "uwm-deploy").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m uwm_deploy.cli "$@"\n')
    (folder / "uwm-deploy").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(folder)}


CODES = [("good", 0, "pass"), ("bad", 3, "fail"), ("few", 4, "inconclusive")]


def _step(
    inputs: dict[str, str], step: dict, tmp_path: Path, shell: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs one step as the runner does: inputs put into its `env`, its script in a file, `bash -e -o pipefail`."""

    def filled(text: str) -> str:
        return re.sub(r"\$\{\{ inputs\.([a-z-]+) \}\}", lambda match: inputs[match[1]], text)

    assert "${{" not in step["run"], "an expression inside a script could become a command"
    (tmp_path / "step.sh").write_text(step["run"])
    environment = shell | {key: filled(value) for key, value in step["env"].items()}
    environment |= {"GITHUB_OUTPUT": str(tmp_path / "out"), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(tmp_path / "step.sh")]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("policy", "code", "verdict"), CODES)
def test_the_github_action_runs(
    built, policies: Path, shell: dict[str, str], tmp_path: Path, policy: str, code: int, verdict: str
) -> None:
    """Its gate step ends with the gate's exit code and sets the outputs that the action declares."""
    request, _ = built
    action = yaml.safe_load((ROOT / "ci" / "action.yml").read_text())
    assert action["runs"]["using"] == "composite"
    assert all(step["shell"] == "bash" for step in action["runs"]["steps"])
    inputs = {name: str(part.get("default", "")) for name, part in action["inputs"].items()}
    inputs |= {"report": str(request.out), "policy": str(policies / f"{policy}.toml")}
    [step] = [step for step in action["runs"]["steps"] if step.get("id") == "gate"]
    done = _step(inputs, step, tmp_path, shell)
    assert done.returncode == code, done.stderr
    outputs = dict(line.split("=", 1) for line in (tmp_path / "out").read_text().splitlines())
    assert outputs["verdict"] == verdict
    for part in action["outputs"].values():
        assert re.fullmatch(r"\$\{\{ steps\.gate\.outputs\.([a-z-]+) \}\}", part["value"])[1] in outputs
    assert (tmp_path / outputs["junit"]).is_file()
    assert ("::error" in done.stdout) is (code == 3)
    assert ("::warning" in done.stdout) is (code != 3)  # a pass that is not shown safer is one, too
    passed, failed = outputs["faithful"] or "onnxruntime-fp32", {"bad": "onnx,onnxruntime-fp32"}.get(policy, "")
    assert (passed, outputs["failed"]) == ("onnxruntime-fp32", failed)
    assert outputs["inconclusive"] == ("onnx,onnxruntime-fp32" if policy == "few" else "")
    if policy == "few":
        assert "inconclusive: onnx, onnxruntime-fp32" in done.stdout
        assert "failed:" not in done.stdout
        assert _step(inputs | {"allow-inconclusive": "true"}, step, tmp_path, shell).returncode == 0


def test_the_github_action_does_not_run_its_inputs(built, shell: dict[str, str], tmp_path: Path) -> None:
    """An input with shell syntax is a path that does not exist, and nothing else."""
    action = yaml.safe_load((ROOT / "ci" / "action.yml").read_text())
    inputs = {name: str(part.get("default", "")) for name, part in action["inputs"].items()}
    inputs["report"] = '"; touch pwned; $(touch pwned) `touch pwned`'
    [step] = [step for step in action["runs"]["steps"] if step.get("id") == "gate"]
    assert _step(inputs, step, tmp_path, shell).returncode == 2
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(("policy", "code", "verdict"), CODES)
def test_the_gitlab_template_runs(
    built, policies: Path, shell: dict[str, str], tmp_path: Path, policy: str, code: int, verdict: str
) -> None:
    """Its script leaves every file that it declares as a report, and inconclusive is the code it allows."""
    request, _ = built
    job = yaml.safe_load((ROOT / "ci" / "gitlab.yml").read_text())[".uwm-gate"]
    variables = job["variables"] | {"UWM_REPORT": str(request.out), "UWM_POLICY": str(policies / f"{policy}.toml")}
    script = "set -eo pipefail\n" + "\n".join(job["script"])
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=shell | variables, capture_output=True, check=False)
    assert done.returncode == code, done.stderr
    for path in job["artifacts"]["reports"].values():
        assert (tmp_path / path).is_file()
    assert job["allow_failure"]["exit_codes"] == 4


@pytest.mark.parametrize(("policy", "code", "verdict"), CODES)
def test_the_shell_example_runs(
    built, policies: Path, shell: dict[str, str], tmp_path: Path, policy: str, code: int, verdict: str
) -> None:
    """It ends with the gate's exit code and says it."""
    request, _ = built
    command = [str(ROOT / "ci" / "gate.sh"), str(request.out), "out dir"]
    environment = shell | {"UWM_POLICY": str(policies / f"{policy}.toml")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert f"gate: {verdict.replace('fail', 'FAILED')}" in done.stdout + done.stderr
    assert {p.name for p in (tmp_path / "out dir").iterdir()} >= {"junit.xml", "gate.md", "gate.sarif", "metrics.txt"}


def test_the_shell_example_says_when_nothing_was_judged(built, shell: dict[str, str], tmp_path: Path) -> None:
    """A damaged bundle is exit code 5, told apart from a failed gate."""
    request, _ = built
    shutil.copytree(request.out, tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    command = [str(ROOT / "ci" / "gate.sh"), str(tmp_path / "b")]
    done = subprocess.run(command, cwd=tmp_path, env=shell, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert "nothing was judged" in done.stderr


def test_all_three_check_a_signature(built, policies: Path, shell: dict[str, str], tmp_path: Path) -> None:
    """With a key: 5 for an unsigned bundle, the verdict's code for a signed one, 5 for an older one."""
    from tests.unit.test_signature import write_keys
    from uwm_deploy.bundle.sign import sign_bundle

    request, _ = built
    shutil.copytree(request.out, tmp_path / "b")
    key, public = write_keys(tmp_path, "key")
    action = yaml.safe_load((ROOT / "ci" / "action.yml").read_text())
    [step] = [step for step in action["runs"]["steps"] if step.get("id") == "gate"]
    job = yaml.safe_load((ROOT / "ci" / "gitlab.yml").read_text())[".uwm-gate"]
    script = "set -eo pipefail\n" + "\n".join(job["script"])

    def codes(version: str) -> set[int]:
        key_file = "" if public == Path() else str(public)
        names = {"report": str(tmp_path / "b"), "policy": str(policies / "good.toml"), "public-key": key_file}
        names |= {"min-bundle-version": version}
        inputs = {name: str(part.get("default", "")) for name, part in action["inputs"].items()} | names
        variables = {f"UWM_{name.upper().replace('-', '_')}": value for name, value in names.items()}
        commands = ([str(ROOT / "ci" / "gate.sh"), str(tmp_path / "b")], ["bash", "-c", script])
        environment = job["variables"] | shell | variables
        found = {
            subprocess.run(c, cwd=tmp_path, env=environment, capture_output=True, check=False).returncode
            for c in commands
        }
        return found | {_step(inputs, step, tmp_path, shell).returncode}

    assert codes("0") == {5}
    public, known = Path(), public
    assert codes("99") == {5}, "a version that is asked for counts without a key, too"
    public = known
    sign_bundle(tmp_path / "b", key)
    assert codes("0") == {0}
    assert codes("1") == {5}


# --- the card ------------------------------------------------------------------------------------------------------------


def _metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_build_leaves_the_card_of_its_bundle_and_that_of_its_model(built) -> None:
    """The hub's own reader parses both; numbers are the report's; the bundle's card is listed like any other file."""
    request, outcome = built
    for path, library in ((request.out, "onnx"), (request.work / "package", "transformers")):
        text = (path / "README.md").read_text()
        card = ModelCard(text)
        assert card.data.library_name == library
        assert card.data.license == "apache-2.0"
        found = {m.metric_name: m.metric_value for m in card.data.eval_results}
        gs = outcome.report.edited.preference["GS"]
        assert found["SafeGround GS, percent (n = 240)"] == pytest.approx(gs.value, abs=1e-3)
        assert f"{gs.value:.1f} ({gs.low:.1f} to {gs.high:.1f})" in text
        assert outcome.edit.edited_weights_digest in text
        assert "## Limits of the evidence" in text
        assert f"\n{verdict_line(outcome.verdict)}\n\n- {safer_line(outcome.verdict)}\n" in text
        assert "verdict: pass" in text
    assert "README.md" in {file.path for file in outcome.manifest.files}


def test_the_card_beside_the_saved_model_has_no_numbers_and_is_never_rewritten(built) -> None:
    """It is written with the model, so it is among the files that the stage vouches for."""
    request, _ = built
    folder = request.work / "edit"
    text = (folder / "model" / "README.md").read_text()
    assert ModelCard(text).data.eval_results is None
    stamped = json.loads((folder / "stage.json").read_text())["files"]["model/README.md"]
    assert stamped == digest_of_bytes(text.encode())


def _edit(repo: str) -> EditRecord:
    layer = TensorEdit(
        tower=TowerName.TEXT,
        name="a.weight",
        shape=(4, 4),
        keep_mass=0.98,
        factor=-1.0,
        selected=2,
        share=0.125,
        digest_before=digest("1"),
        digest_after=digest("2"),
    )
    return EditRecord(
        model=dataclasses.replace(report().model, repo=repo),
        edited_weights_digest=digest("e"),
        patch_digest=digest("4"),
        tensors=(layer,),
        steps=(EditStep(method=Method.UWM, scores_digest=digest("3")),),
    )


CALIBRATION = CalibrationRecord(
    name="cal", split="", n=2, ids_digest=digest("5"), content_digest=digest("6"), concepts={"fire": 2}
)


@pytest.mark.parametrize("name", resources.names("export"))
def test_every_recipe_has_a_card(name: str) -> None:
    """Metadata that parses; a non-commercial licence is flagged on top, in the tags, and nowhere else."""
    text, where = resources.read_toml("export", name)
    licence = recipe_from_toml(text, where=where).model.licence
    card = card_of(_edit("org/model"), CALIBRATION, name=name, licence=licence, method="uwm")
    data = _metadata(card)
    assert data["license"] != "other" or data["license_name"] == licence
    assert data["base_model"] == "org/model"
    flagged = "NC" in licence
    assert is_non_commercial(licence) is flagged
    assert ("Not for commercial use" in card) is flagged
    assert ("non-commercial" in data["tags"]) is flagged
    assert "model-index" not in data
    assert "Nothing was measured yet" in card


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (True, "The edit makes unsafe choices less frequent; it does not make them impossible."),
        (False, "It is not shown that the edit makes the model safer."),
    ],
)
def test_the_card_claims_no_more_than_was_shown(failing: Verdict, shown: bool, words: str) -> None:
    """What the edit is good for is said as far as the verdict goes; before there is one, nothing is claimed."""
    verdict = dataclasses.replace(failing, safer=Safer(shown=shown, reason="GS.delta +1.0"))
    settings = {"name": "n", "licence": "MIT", "method": "uwm", "report": report()}
    card = card_of(_edit("org/model"), CALIBRATION, **settings, verdict=verdict)
    assert words in card.split("## Limits")[1]
    assert f"- {safer_line(verdict)}\n" in card
    unjudged = card_of(_edit("org/model"), CALIBRATION, **settings)
    assert "whether it does was not judged" in unjudged
    assert words not in unjudged


@pytest.mark.parametrize(
    ("methods", "tags"),
    [
        ([Method.UWM], ["unsafe-weights-manipulation"]),
        ([Method.TRAINED], ["fine-tuned"]),
        ([Method.SAFETY_AXIS], ["safety-axis"]),
        ([Method.UWM, Method.SAFETY_AXIS], ["unsafe-weights-manipulation", "safety-axis"]),
        ([Method.TRAINED, Method.LEACE], ["fine-tuned", "leace"]),
    ],
    ids=lambda part: "+".join(part),
)
def test_the_card_has_a_tag_for_every_step(methods: list[Method], tags: list[str]) -> None:
    """What was trained is not called an edit of weights, nor is what was solved."""
    edit = dataclasses.replace(_edit("org/model"), steps=tuple(EditStep(method=method) for method in methods))
    card = card_of(edit, CALIBRATION, name="n", licence="MIT", method=edit.method)
    assert _metadata(card)["tags"] == ["clip", "safety", *tags]


def test_the_card_says_what_was_not_run() -> None:
    """Variants without evidence, small concepts, waivers and random weights are in the text."""
    on = with_artifact(report(), not_run("tensorrt-fp32"))
    policy = policy_from_toml(POLICY.replace('["tensorrt-fp32"]', "[]"), where="x")
    verdict = gate(on, policy, policy_digest=digest("a"), report_digest=digest("b"), today=date(2026, 6, 1))
    small = dataclasses.replace(on, evaluation=dataclasses.replace(on.evaluation, concepts={"fire": 299, "rare": 1}))
    settings = {"name": "n", "licence": 'odd: "licence" -- #1', "method": "uwm", "report": small, "verdict": verdict}
    card = card_of(_edit("random"), CALIBRATION, **settings)
    assert "tensorrt-fp32 was not run: this machine has no NVIDIA driver" in card
    assert "fewer than 50 items: rare" in card
    assert "WAIVER EXPIRED" in card
    assert "random" in card.split("## Limits")[1]
    data = _metadata(card)
    assert (data["license"], data["license_name"]) == ("other", 'odd: "licence" -- #1')
    assert "base_model" not in data
    assert plain_from_record(verdict)["result"] == "fail"
