"""SARIF 2.1.0, for code scanning."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from uwm_deploy.errors import LONGEST_LINE, visible
from uwm_deploy.records.verdict import Check, Result, Verdict
from uwm_deploy.report.findings import findings, name_of, result_words
from uwm_deploy.report.gitlab import digest_of_parts, fingerprint_of

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"

_SAFER = "uwm/not-shown-safer"


def sarif_from_verdict(verdict: Verdict, *, version: str, policy_file: str, lines: Mapping[str, int]) -> str:
    """One run with one rule per kind of check and one result per check that does not pass.

    A pass of an edit that is not shown safer is a result of its own, since no check says so.

    Args:
        verdict: What was decided.
        version: Of this program.
        policy_file: Path of the policy in the repository, which results point at.
        lines: Rule to its line in that file.
    """
    found = findings(verdict)
    rules = [_rule(name, check) for name, check in {_rule_id(check): check for check in found}.items()]
    results = [_result(check, [rule["id"] for rule in rules], policy_file, lines) for check in found]
    if verdict.result is Result.PASS and not verdict.safer.shown:
        rules.append({"id": _SAFER, "shortDescription": {"text": "the edit is shown to make the model safer"}})
        results.append(_not_shown(verdict, len(rules) - 1, policy_file))
    body = {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "uwm-deploy",
                        "semanticVersion": version,
                        "rules": rules,
                    }
                },
                "results": results,
                "properties": {
                    "verdict": verdict.result.value,
                    "safer": {"shown": verdict.safer.shown, "reason": verdict.safer.reason},
                    "faithful": list(verdict.faithful),
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


def _not_shown(verdict: Verdict, rule: int, policy_file: str) -> dict[str, Any]:
    return {
        "ruleId": _SAFER,
        "ruleIndex": rule,
        "level": "warning",
        "message": {"text": f"{result_words(verdict)}: {verdict.safer.reason}"},
        "locations": [_place(policy_file, 1)],
        "partialFingerprints": {"uwmDeployCheck/v1": digest_of_parts("edited", "safer")},
    }


def _place(policy_file: str, line: int) -> dict[str, Any]:
    return {"physicalLocation": {"artifactLocation": {"uri": quote(policy_file)}, "region": {"startLine": line}}}


def _result(check: Check, rules: list[str], policy_file: str, lines: Mapping[str, int]) -> dict[str, Any]:
    message = f"{check.subject}: {name_of(check)}: {check.result.value}: {check.detail}"
    result: dict[str, Any] = {
        "ruleId": _rule_id(check),
        "ruleIndex": rules.index(_rule_id(check)),
        "level": "note" if check.waiver else "warning" if check.result is Result.INCONCLUSIVE else "error",
        "message": {"text": visible(message, LONGEST_LINE)},
        "locations": [_place(policy_file, lines.get(check.rule, 1))],
        "partialFingerprints": {"uwmDeployCheck/v1": fingerprint_of(check)},
    }
    if check.cause is not None:
        result["properties"] = {"cause": check.cause.value, "stage": check.stage}
    if check.waiver is not None:
        why = f"{check.waiver.reason} (owner {check.waiver.owner}, until {check.waiver.expires})"
        result["suppressions"] = [{"kind": "external", "justification": why}]
    return result
