"""GitLab: a code quality report (the subset of the CodeClimate format that GitLab reads) and a metrics report."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

from uwm_deploy.errors import LONGEST_LINE, visible
from uwm_deploy.records.verdict import Check, Result, Verdict
from uwm_deploy.report.findings import findings, name_of, result_words

CODE_QUALITY = "gl-code-quality-report.json"
METRICS = "metrics.txt"


def code_quality_from_verdict(verdict: Verdict, *, policy_file: str, lines: Mapping[str, int]) -> str:
    """JSON: one issue per check that does not pass, at its line of the policy; an empty list when all pass.

    A pass of an edit that is not shown safer is an issue of its own, since no check says so.
    """
    issues = [
        {
            "description": visible(f"{check.subject}: {name_of(check)}: {check.detail}", LONGEST_LINE),
            "check_name": f"uwm-deploy/{check.name}",
            "fingerprint": fingerprint_of(check),
            "severity": _severity(check),
            "location": {"path": policy_file, "lines": {"begin": lines.get(check.rule, 1)}},
        }
        for check in findings(verdict)
    ]
    if verdict.result is Result.PASS and not verdict.safer.shown:
        issues.append(
            {
                "description": f"{result_words(verdict)}: {verdict.safer.reason}",
                "check_name": "uwm-deploy/safer",
                "fingerprint": digest_of_parts("edited", "safer"),
                "severity": "minor",
                "location": {"path": policy_file, "lines": {"begin": 1}},
            }
        )
    return json.dumps(issues, indent=1, ensure_ascii=False) + "\n"


def metrics_from_verdict(verdict: Verdict) -> str:
    """OpenMetrics text: every measured number of a check, so that merge requests show what changed."""
    lines = ["# TYPE uwm_deploy_check gauge"]
    seen = set()
    for check in verdict.checks:
        labels = {"check": check.name, "subject": check.subject, "concept": check.concept}
        text = ",".join(f'{key}="{_label(value)}"' for key, value in labels.items() if value)
        if check.measured is not None and check.direction != "equals" and text not in seen:
            seen.add(text)  # two limits on one metric are one number
            lines.append(f"uwm_deploy_check{{{text}}} {check.measured:.10g}")
    lines += ["# TYPE uwm_deploy_edit_shown_safer gauge", f"uwm_deploy_edit_shown_safer {int(verdict.safer.shown)}"]
    lines += ["# TYPE uwm_deploy_verdict_pass gauge", f"uwm_deploy_verdict_pass {int(verdict.result is Result.PASS)}"]
    return "\n".join([*lines, "# EOF"]) + "\n"


def fingerprint_of(check: Check) -> str:
    """The same for the same check of two runs, whatever was measured."""
    return digest_of_parts(check.subject, check.name, check.concept, check.rule)


def digest_of_parts(*parts: str) -> str:
    """Fingerprint of what has these parts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def _severity(check: Check) -> str:
    if check.waiver is not None:
        return "info"
    return {Result.FAIL: "blocker", Result.NOT_RUN: "critical", Result.INCONCLUSIVE: "major"}[check.result]


def _label(text: str) -> str:
    return re.sub(r'(["\\])', r"\\\1", visible(text))
