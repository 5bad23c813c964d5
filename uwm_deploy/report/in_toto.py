"""One in-toto statement per measured check: what was compared with what, on how many items, and who says so.

The fields are those of the evaluation-result predicate that is proposed to in-toto (metric, comparator, threshold, passed,
sampleSize, assuranceLevel). It is a draft, so the predicate type here is a name of this project's own.
"""

from __future__ import annotations

import json
from typing import Any

from uwm_deploy.errors import visible
from uwm_deploy.records.graph import EXPORTED
from uwm_deploy.records.model import Digest
from uwm_deploy.records.verdict import Check, Verdict

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:uwm-deploy:evaluation-result:v1"
"""docs/how-to/evidence.md has its fields."""

SELF = "self_attested"
"""Who measures is who builds; a signature says who that is, and `gate --execute` measures again."""

_COMPARATORS = {"at_least": ">=", "at_most": "<=", "equals": "=="}


def evaluations_from_verdict(verdict: Verdict, *, version: str) -> str:
    """JSON lines, one statement each; what was not measured has none.

    Args:
        verdict: What was decided.
        version: Of this tool.
    """
    lines = [_statement(verdict, check, version) for check in verdict.checks if check.measured is not None]
    return "".join(json.dumps(line, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n" for line in lines)


def _statement(verdict: Verdict, check: Check, version: str) -> dict[str, Any]:
    return {
        "_type": STATEMENT_TYPE,
        "subject": _subjects(verdict, check),
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "metric": visible(check.name),
            "on": visible(check.subject),
            **({"concept": visible(check.concept)} if check.concept else {}),
            "measured": check.measured,
            **_interval(check),
            "comparator": _COMPARATORS[check.direction],
            "threshold": check.limit,
            "bound": check.bound,
            "sampleSize": check.n,
            "passed": check.result.value == "pass",
            "result": check.result.value,
            "waived": check.waiver is not None,
            "assuranceLevel": SELF,
            "criteria": {
                "policy": visible(verdict.policy),
                "rule": visible(check.rule),
                "digest": _digest(verdict.policy_digest),
            },
            "evidence": {"name": "verify.json", "digest": _digest(verdict.report_digest)},
            "harness": {"name": "uwm-deploy", "version": version},
        },
    }


def _interval(check: Check) -> dict[str, Any]:
    if check.low is None or check.high is None:
        return {}
    return {"interval": {"level": 0.95, "low": check.low, "high": check.high}}


def _subjects(verdict: Verdict, check: Check) -> list[dict[str, Any]]:
    """What the check is about: the files of a variant, otherwise the edited weights."""
    if files := verdict.judged.get(check.subject):
        kind = "onnx" if check.subject == EXPORTED else "engine"
        return [
            {"name": visible(f"{check.subject}/{tower}"), "digest": _own(digest, kind)}
            for tower, digest in files.items()
        ]
    return [{"name": "edited model", "digest": _own(verdict.edited_weights_digest, "weights")}]


def _own(digest: Digest, of: str) -> dict[str, str]:
    """Not over a file's bytes, so not under the name of the algorithm alone."""
    return {f"sha256-of-{of}": digest.removeprefix("sha256:")}


def _digest(digest: Digest) -> dict[str, str]:
    return {"sha256": digest.removeprefix("sha256:")}
