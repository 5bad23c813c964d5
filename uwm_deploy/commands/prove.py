"""Commands that judge what was built, and that test the judge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from uwm_deploy.commands.fields import FILE, PATH, option, repeated, takes_options
from uwm_deploy.commands.options import (
    BundleEvaluationOptions,
    DownstreamOptions,
    OutputOptions,
    PolicyOptions,
    SigningOptions,
    TrustOptions,
    WorkerOptions,
)
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.commands.verdicts import resigning, shown_verdict
from uwm_deploy.errors import ExitCode

if TYPE_CHECKING:
    from uwm_deploy.pipeline.judge import Execute


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptedOptions:
    """Which accepted report is compared with."""

    baseline: Path | None = option(
        "--baseline",
        type=PATH,
        help="Accepted report to compare with: folder, bundle or file. [default: the bundle's own]",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedOptions:
    """Criteria from before the run."""

    lock: Path | None = option("--lock", type=FILE, help="Lock of the criteria; others are refused (`policy lock`).")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecuteOptions:
    """Whether the artifacts themselves are asked."""

    execute: bool = option(
        "--execute",
        is_flag=True,
        help="Run the bundle's artifacts here: its canaries, and a sample of the evaluation set.",
    )


@click.command()
@click.argument("report", type=PATH)
@takes_options
@prints
def gate(
    report: Path,
    policy: PolicyOptions,
    accepted: AcceptedOptions,
    locked: LockedOptions,
    executed: ExecuteOptions,
    behind: DownstreamOptions,
    measured_on: BundleEvaluationOptions,
    trust: TrustOptions,
    outputs: OutputOptions,
) -> Shown:
    """Judges a report or a bundle by a policy.

    REPORT is a verify.json or a bundle. This needs the base install only; with --execute also what runs the artifacts.

    \b
    Example:
      uwm-deploy gate dist/demo --policy ci/default.toml
      uwm-deploy gate dist/demo --policy strict --baseline ci/baseline --junit gate.xml --github
      uwm-deploy gate dist/demo --public-key key.pub --min-bundle-version 3
      uwm-deploy gate dist/demo --execute
    """
    from uwm_deploy.pipeline.judge import judge_file

    verdict = judge_file(
        report,
        policy.policy,
        accepted.baseline,
        public_key=trust.public_key,
        min_bundle_version=trust.min_bundle_version,
        lock=locked.lock,
        downstream=behind.downstream,
        execute=_execute(measured_on.evaluation) if executed.execute else None,
    )
    return shown_verdict(verdict, policy.policy, outputs)


def _execute(evaluation: str | None) -> Execute:
    from uwm_deploy.pipeline.executed_here import executed_here
    from uwm_deploy.pipeline.shipping import evaluation_source_of
    from uwm_deploy.report.console import Reporter

    return lambda bundle, report: executed_here(bundle, evaluation_source_of(bundle, evaluation), report, Reporter())


@click.command()
@click.argument("bundle", type=PATH)
@takes_options
@prints
def attest(
    bundle: Path,
    policy: PolicyOptions,
    measured_on: BundleEvaluationOptions,
    workers: WorkerOptions,
    signing: SigningOptions,
    outputs: OutputOptions,
) -> Shown:
    """Executes what is unproven in a bundle, and adds evidence.

    It executes those variants of BUNDLE that this machine can run. A signed bundle is signed again with --key; without it
    nothing is changed, unless --unsigned is given.

    \b
    Example (on the machine with the GPU):
      uwm-deploy attest dist/demo
      uwm-deploy attest dist/demo --key key.pem
    """
    from uwm_deploy.pipeline.attest import attest_bundle
    from uwm_deploy.report.console import Reporter

    verdict = attest_bundle(
        bundle, policy.policy, measured_on.evaluation, workers.workers, Reporter(), resigning(signing)
    )
    return shown_verdict(verdict, policy.policy, outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignerOptions:
    """Who must have signed a bundle, and how old it may be."""

    public_key: Path = option("--public-key", required=True, type=PATH, help="Key in PEM that must have signed it.")
    min_bundle_version: int = option(
        "--min-bundle-version",
        default=0,
        type=click.IntRange(min=0),
        help="Refuse a bundle of an older version (docs/reference/bundle.md).",
    )


@click.command("verify-signature")
@click.argument("bundle", type=PATH)
@takes_options
@prints
def verify_signature(bundle: Path, trust: SignerOptions) -> Shown:
    """Checks the signature of a bundle, and all its digests.

    Signature, every digest, version and verdict of BUNDLE are checked as the runtime checks them. The exit code is 5 if
    one is wrong.

    \b
    Example:
      uwm-deploy verify-signature dist/demo --public-key key.pub --min-bundle-version 3
    """
    from uwm_deploy.bundle.sign import verify_bundle
    from uwm_deploy.records.codec import plain_from_record
    from uwm_deploy.report.plain import plain_lines

    found = plain_from_record(verify_bundle(bundle, trust.public_key, min_bundle_version=trust.min_bundle_version))
    return Shown(data=found, text=plain_lines(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class SelftestOptions:
    """What the gate is tested with."""

    faults: tuple[str, ...] = repeated(
        "--fault", metavar="NAME", help="Plant only this fault; repeatable. [default: all]"
    )
    rebuilds: int = option("--rebuilds", default=60, type=click.IntRange(min=0), help="Number of honest rebuilds.")
    peers: bool = option("--peers/--no-peers", default=True, help="Put the artifacts through other tools' checks.")
    markdown: Path | None = option("--markdown", type=FILE, help="Write the table to this file.")


@click.command()
@takes_options
@prints
def selftest(asked: SelftestOptions) -> Shown:
    """Tests the gate with planted faults and honest rebuilds.

    Planted faults must fail with the right cause, honest rebuilds of the demo must pass.

    \b
    Example:
      uwm-deploy selftest
      uwm-deploy selftest --fault stale-engine --rebuilds 0
    """
    import tempfile

    from uwm_deploy.records.files import write_output
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.tables import planted_faults
    from uwm_deploy.report.terminal import print_lines, print_rows
    from uwm_deploy.studies.selftest import run

    with tempfile.TemporaryDirectory(prefix="uwm-deploy-") as folder:
        progress = Reporter().progress
        found = run.selftest(Path(folder), asked.faults, asked.rebuilds, peers=asked.peers, progress=progress)
    if asked.markdown:
        write_output(asked.markdown, planted_faults.markdown_of(found))

    def text() -> None:
        print_rows(planted_faults.fault_rows(found))
        print_lines(planted_faults.summary_lines(found))

    return Shown(data=found, text=text, code=ExitCode.PASS if run.passed(found) else ExitCode.GATE_FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnosedOptions:
    """What is looked into."""

    variant: str | None = option(
        "--variant", help="Variant to walk through. [default: those that failed, or all when none did]"
    )


@click.command()
@click.argument("path", type=PATH)
@takes_options
@prints
def diagnose(path: Path, asked: DiagnosedOptions) -> Shown:
    """Finds the first layer where an artifact goes wrong.

    It names the first layer where an artifact of a bundle or a run folder PATH leaves the exported graph.

    \b
    Example:
      uwm-deploy diagnose .uwm/demo --variant onnxruntime-int8
    """
    from uwm_deploy.report.tables.diagnoses import print_diagnosis
    from uwm_deploy.studies.diagnose import diagnose as look

    found = look(path, asked.variant)
    return Shown(data=found, text=lambda: print_diagnosis(found))
