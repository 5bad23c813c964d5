"""Writes what the gate says for CI systems: files, and the lines that GitHub reads."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from uwm_deploy import __version__
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.policy import rule_lines
from uwm_deploy.records.files import write_atomic, write_output
from uwm_deploy.records.machine import disk_errors
from uwm_deploy.records.verdict import Verdict
from uwm_deploy.report.github import annotations_from_verdict, outputs_from_verdict
from uwm_deploy.report.gitlab import CODE_QUALITY, METRICS, code_quality_from_verdict, metrics_from_verdict
from uwm_deploy.report.in_toto import evaluations_from_verdict
from uwm_deploy.report.junit import junit_from_verdict
from uwm_deploy.report.lines import Whole
from uwm_deploy.report.markdown import markdown_from_verdict
from uwm_deploy.report.oscal import oscal_from_verdict
from uwm_deploy.report.sarif import sarif_from_verdict


def write_outputs(
    verdict: Verdict,
    policy: str,
    *,
    junit: Path | None = None,
    markdown: Path | None = None,
    sarif: Path | None = None,
    in_toto: Path | None = None,
    oscal: Path | None = None,
    gitlab: Path | None = None,
    github: bool = False,
) -> list[str]:
    """Writes every file that is asked for.

    Args:
        verdict: What was decided.
        policy: Name or path of the policy, whose lines annotations point at.
        junit: File.
        markdown: File.
        sarif: File.
        in_toto: File.
        oscal: File.
        gitlab: Folder.
        github: Annotations, and the files that the environment names.

    Returns:
        Lines for the log: the annotations.
    """
    text, where = resources.read_toml("ci", policy)
    place: dict[str, Any] = {"policy_file": _relative(where), "lines": rule_lines(text)}
    if junit:
        write_output(junit, junit_from_verdict(verdict))
    if markdown:
        write_output(markdown, markdown_from_verdict(verdict))
    if sarif:
        write_output(sarif, sarif_from_verdict(verdict, version=__version__, **place))
    if in_toto:
        write_output(in_toto, evaluations_from_verdict(verdict, version=__version__))
    if oscal:
        write_output(oscal, oscal_from_verdict(verdict, version=__version__, at=datetime.now(UTC)))
    if gitlab:
        write_atomic(gitlab / CODE_QUALITY, code_quality_from_verdict(verdict, **place))
        write_atomic(gitlab / METRICS, metrics_from_verdict(verdict))
    if not github:
        return []
    _append("GITHUB_STEP_SUMMARY", markdown_from_verdict(verdict))
    _append("GITHUB_OUTPUT", outputs_from_verdict(verdict))
    return list(map(Whole, annotations_from_verdict(verdict, **place)))


def _relative(where: str) -> str:
    """Path from the checkout's root, as CI systems want it, if the file is below it."""
    path = Path(where)
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix() if path.is_absolute() else path.as_posix()
    except ValueError:
        return path.name


def _append(variable: str, text: str) -> None:
    """To the file that the runner names; nothing outside a runner."""
    if name := os.environ.get(variable):
        with disk_errors(Path(name)), Path(name).open("a", encoding="utf-8") as stream:
            stream.write(text)
