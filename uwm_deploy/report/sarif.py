"""SARIF 2.1.0, for code scanning."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from uwm_deploy.records import Check, Result, Verdict
from uwm_deploy.report.findings import findings, name_of
from uwm_deploy.report.gitlab import fingerprint_of

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif_from_verdict(verdict: Verdict, *, version: str, policy_file: str, lines: Mapping[str, int]) -> str:
    """One run with one rule per kind of check and one result per check that does not pass.

    Args:
        verdict: What was decided.
        version: Of this program.
        policy_file: Path of the policy in the repository, which results point at.
        lines: Rule to its line in that file.
    """
    found = findings(verdict)
    rules = {_rule_id(check): check for check in found}
    body = {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "uwm-deploy",
                        "semanticVersion": version,
                        "rules": [_rule(name, check) for name, check in rules.items()],
                    }
                },
                "results": [_result(check, list(rules), policy_file, lines) for check in found],
                "properties": {
                    "verdict": verdict.result.value,
                    "policyDigest": verdict.policy_digest,
                    "reportDigest": verdict.report_digest,
                },
            }
        ],
    }
    return json.dumps(body, indent=1, ensure_ascii=False) + "\n"


def _rule_id(check: Check) -> str:
    return "uwm/" + re.sub(r"[^A-Za-z0-9_.@-]+", "-", check.name)


def _rule(name: str, check: Check) -> dict[str, Any]:
    rule: dict[str, Any] = {"id": name, "shortDescription": {"text": check.name}}
    return rule | ({"help": {"text": check.advice}} if check.advice else {})


def _result(check: Check, rules: list[str], policy_file: str, lines: Mapping[str, int]) -> dict[str, Any]:
    place = {
        "artifactLocation": {"uri": quote(policy_file)},
        "region": {"startLine": lines.get(check.rule, 1)},
    }
    result: dict[str, Any] = {
        "ruleId": _rule_id(check),
        "ruleIndex": rules.index(_rule_id(check)),
        "level": "note" if check.waiver else "warning" if check.result is Result.INCONCLUSIVE else "error",
        "message": {"text": f"{check.subject}: {name_of(check)}: {check.result.value}: {check.detail}"},
        "locations": [{"physicalLocation": place}],
        "partialFingerprints": {"uwmDeployCheck/v1": fingerprint_of(check)},
    }
    if check.cause is not None:
        result["properties"] = {"cause": check.cause.value, "stage": check.stage}
    if check.waiver is not None:
        why = f"{check.waiver.reason} (owner {check.waiver.owner}, until {check.waiver.expires})"
        result["suppressions"] = [{"kind": "external", "justification": why}]
    return result
