"""OSCAL assessment results (NIST, 1.2): every check is an observation, and every subject a finding."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from uwm_deploy.errors import LONGEST_LINE, visible
from uwm_deploy.records.verdict import Check, Result, Verdict
from uwm_deploy.report.findings import cause_line, limit_text, measured_text, name_of, safer_line, verdict_line

OSCAL_VERSION = "1.2.1"
NAMESPACE = "urn:uwm-deploy:oscal"
"""Of properties that OSCAL does not know; a name."""


def oscal_from_verdict(verdict: Verdict, *, version: str, at: datetime) -> str:
    """Assessment results as JSON.

    The criteria are the policy's, so the plan that OSCAL asks for is the policy, by its digest; there is no catalogue of
    controls behind it.

    Args:
        verdict: What was decided.
        version: Of this tool.
        at: When, with its zone.
    """
    when = at.isoformat(timespec="seconds")
    observations = [_observation(check, number, verdict, when) for number, check in enumerate(verdict.checks)]
    subjects = list(dict.fromkeys(check.subject for check in verdict.checks))
    body = {
        "uuid": _uuid(verdict, "results", when),
        "metadata": {
            "title": _line(f"Verdict by policy {verdict.policy}"),
            "last-modified": when,
            "version": version,
            "oscal-version": OSCAL_VERSION,
        },
        "import-ap": {"href": f"urn:uwm-deploy:policy:{verdict.policy_digest}"},
        "results": [
            {
                "uuid": _uuid(verdict, "result", when),
                "title": _line(verdict_line(verdict)),
                "description": _line(safer_line(verdict)),
                "start": when,
                "props": [_prop("result", verdict.result.value), _prop("report", verdict.report_digest),
                          _prop("edited-weights", verdict.edited_weights_digest),
                          *(_prop("cause", cause_line(blame)) for blame in verdict.causes)],
                "reviewed-controls": {"control-selections": [{"description": "the limits of the policy, and what no "
                                                              "policy can switch off", "include-all": {}}]},
                "observations": observations,
                "findings": [_finding(subject, verdict, observations) for subject in subjects],
            }
        ],
    }  # fmt: skip
    return json.dumps({"assessment-results": body}, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _observation(check: Check, number: int, verdict: Verdict, when: str) -> dict[str, Any]:
    return {
        "uuid": _uuid(verdict, "observation", str(number)),
        "title": _line(name_of(check)),
        "description": _line(f"{check.subject}: measured {measured_text(check)}, must be {limit_text(check)}"),
        "props": [
            _prop("subject", check.subject),
            _prop("result", check.result.value),
            _prop("rule", check.rule or "always"),
            _prop("sample-size", str(check.n)),
        ],
        "methods": ["TEST"],
        "collected": when,
        **({"remarks": _line(check.detail)} if check.detail.strip() else {}),
    }


def _finding(subject: str, verdict: Verdict, observations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Satisfied when nothing of the subject blocks; inconclusive is not."""
    pairs = [pair for pair in zip(verdict.checks, observations, strict=True) if pair[0].subject == subject]
    blocking = [check for check, _ in pairs if check.blocks]
    state = "not-satisfied" if blocking else "satisfied"
    waived = sum(check.result is not Result.PASS and check.waiver is not None for check, _ in pairs)
    return {
        "uuid": _uuid(verdict, "finding", subject),
        "title": _line(f"{subject}: {len(pairs) - len(blocking)} of {len(pairs)} checks do not block"),
        "description": _line("; ".join(name_of(check) for check in blocking) or "every check passes or is waived"),
        "props": [_prop("waived", str(waived))],
        "target": {"type": "objective-id", "target-id": _token(subject), "status": {"state": state}},
        "related-observations": [{"observation-uuid": part["uuid"]} for _, part in pairs],
    }


def _prop(name: str, value: str) -> dict[str, str]:
    return {"name": name, "ns": NAMESPACE, "value": _line(value)}


def _line(text: str) -> str:
    """OSCAL's one-line strings have no space at an end, and are not empty."""
    return visible(" ".join(text.split()), LONGEST_LINE) or "-"


def _token(text: str) -> str:
    """A name without a colon or a space, which begins with a letter."""
    return "subject-" + (re.sub(r"[^0-9A-Za-z._-]", "-", text) or "none")


def _uuid(verdict: Verdict, *parts: str) -> str:
    """From the content, so that the same verdict has the same numbers."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "/".join([verdict.report_digest, verdict.policy_digest, *parts])))
