"""Commands about the accepted report that later ones are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from uwm_deploy.commands.fields import PATH, option, takes_options
from uwm_deploy.commands.group import InOrder
from uwm_deploy.commands.options import PolicyOptions, SigningOptions
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.commands.verdicts import exit_code_of, resigning
from uwm_deploy.report.lines import Whole


@click.group(cls=InOrder)
def baseline() -> None:
    """Keeps the accepted report that others are compared with.

    \b
    Example:
      uwm-deploy baseline set dist/demo --at ci/baseline --by "A. Name" --reason "release 1.0"
      uwm-deploy baseline compare dist/demo --baseline ci/baseline
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptOptions:
    """Where the report is kept, who accepts it, and why."""

    at: Path = option("--at", required=True, type=PATH, help="Folder, or a bundle, that the baseline is stored in.")
    by: str = option("--by", required=True, help="Who accepts the report.")
    reason: str = option("--reason", required=True, help="Reason to accept it.")


@baseline.command("set")
@click.argument("report", type=PATH)
@takes_options
@prints
def baseline_set(report: Path, asked: AcceptOptions, policy: PolicyOptions, signing: SigningOptions) -> Shown:
    """Stores a report as the baseline, if it passes the policy.

    REPORT is a verify.json or a bundle. The keys are for a bundle as the place: a signed one is signed again with --key.

    \b
    Example:
      uwm-deploy baseline set dist/demo --at ci/baseline --by "A. Name" --reason "release 1.0"
    """
    from uwm_deploy.pipeline.accept import accept_baseline
    from uwm_deploy.records.codec import plain_from_record
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.findings import verdict_line
    from uwm_deploy.report.tables.verdict_lines import print_verdict

    verdict, digest = accept_baseline(
        report,
        policy.policy,
        asked.at,
        by=asked.by,
        reason=asked.reason,
        reporter=Reporter(),
        signing=resigning(signing),
    )
    code = exit_code_of(verdict)
    if digest is None:
        click.echo("error: nothing was stored: the report does not pass", err=True)
        found = {"baseline": None, "digest": None, "verdict": plain_from_record(verdict)}
        return Shown(data=found, text=lambda: print_verdict(verdict), code=code)
    text = (Whole(f"baseline: {asked.at}"), f"digest: {digest}", verdict_line(verdict))
    return Shown(data={"baseline": str(asked.at), "digest": digest}, text=text, code=code)


@baseline.command("show")
@click.argument("path", type=PATH)
@prints
def baseline_show(path: Path) -> Shown:
    """Shows the baseline in a folder, a bundle or a file.

    The digest of the baseline at PATH is checked first.

    \b
    Example:
      uwm-deploy baseline show ci/baseline
    """
    from uwm_deploy.pipeline.baseline import read_baseline
    from uwm_deploy.report.tables.baselines import print_baseline

    found, digest = read_baseline(path)
    return Shown(data=found, text=lambda: print_baseline(found, digest))


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherOptions:
    """Which baseline."""

    baseline: Path = option("--baseline", required=True, type=PATH, help="Folder, bundle or file.")


@baseline.command("compare")
@click.argument("report", type=PATH)
@takes_options
@prints
def baseline_compare(report: Path, other: OtherOptions) -> Shown:
    """Shows every metric of a report beside the baseline's.

    REPORT is compared item by item. Nothing is judged.

    \b
    Example:
      uwm-deploy baseline compare dist/demo --baseline ci/baseline
    """
    from uwm_deploy.pipeline.baseline import changes, read_baseline
    from uwm_deploy.pipeline.judge import report_at
    from uwm_deploy.records.codec import plain_from_record
    from uwm_deploy.report.tables.baselines import print_changes

    found = changes(report_at(report)[0], read_baseline(other.baseline)[0])
    return Shown(data=[plain_from_record(change) for change in found], text=lambda: print_changes(found))
