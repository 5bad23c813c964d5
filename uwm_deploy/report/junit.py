"""JUnit XML: one suite per subject, one case per check.

Attributes and order are those of the schema that Jenkins' xunit plugin and pytest use (junit-10.xsd).
"""

from __future__ import annotations

from xml.etree import ElementTree as ET

from uwm_deploy.errors import LONGEST_LINE, visible
from uwm_deploy.records.verdict import Check, Verdict
from uwm_deploy.report.findings import (
    cause_line,
    limit_text,
    measured_text,
    name_of,
    result_words,
    safer_line,
    variants_by_word,
    waiver_line,
)


def junit_from_verdict(verdict: Verdict) -> str:
    """The whole file. What blocks is a failure, whose type says fail, not run or inconclusive; what is waived is skipped."""
    root = ET.Element("testsuites", _counts(list(verdict.checks)) | {"name": "uwm-deploy gate", "time": "0"})
    for subject in dict.fromkeys(check.subject for check in verdict.checks):
        checks = [check for check in verdict.checks if check.subject == subject]
        suite = ET.SubElement(root, "testsuite", _counts(checks) | {"name": _clean(subject), "time": "0"})
        suite.set("skipped", str(sum(check.waiver is not None for check in checks)))
        _properties(suite, verdict)
        for check in checks:
            _case(suite, check)
    ET.indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _counts(checks: list[Check]) -> dict[str, str]:
    failures = sum(check.blocks for check in checks)
    return {"tests": str(len(checks)), "failures": str(failures), "errors": "0"}


def _properties(suite: ET.Element, verdict: Verdict) -> None:
    properties = ET.SubElement(suite, "properties")
    values = {
        "verdict": result_words(verdict),
        "safer": safer_line(verdict),
        "policy": f"{verdict.policy} {verdict.policy_digest}",
        "report": verdict.report_digest,
        "edited_weights": verdict.edited_weights_digest,
    }
    values |= {word: ", ".join(names) for word, names in variants_by_word(verdict).items()}
    if verdict.baseline_digest:
        values["baseline"] = verdict.baseline_digest
    values |= {f"cause {number}": cause_line(blame) for number, blame in enumerate(verdict.causes, start=1)}
    values |= {f"waiver {number}": waiver_line(waiver) for number, waiver in enumerate(verdict.waivers, start=1)}
    for name, value in values.items():
        ET.SubElement(properties, "property", {"name": name, "value": _clean(value)})


def _case(suite: ET.Element, check: Check) -> None:
    name = f"{name_of(check)} [{check.rule}]" if check.rule else name_of(check)
    case = ET.SubElement(suite, "testcase", {"name": _clean(name), "classname": _clean(check.subject), "time": "0"})
    lines = [f"measured: {measured_text(check)}", f"limit: {limit_text(check)}", f"n: {check.n}", check.detail]
    text = "\n".join(map(_clean, lines))
    if check.waiver is not None:
        skipped = ET.SubElement(case, "skipped", {"message": _clean(waiver_line(check.waiver))})
        skipped.text = text
    elif check.blocks:
        found = ET.SubElement(case, "failure", {"message": _clean(check.detail), "type": check.result.value})
        found.text = f"{text}\n{_clean(f'try: {check.advice}')}" if check.advice else text


def _clean(text: str) -> str:
    """Every character can be seen: some cannot be in XML at all, and others reorder what stands around them."""
    return visible(text, LONGEST_LINE)
