"""Options of the pipeline up to each stage, and the run that they ask for.

What a stage's command takes is what its settings read: the options of the stage before, and those that it adds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uwm_deploy.commands.fields import PATH, filled, option
from uwm_deploy.commands.options import (
    DataOptions,
    DeviceOptions,
    DownstreamOptions,
    EntryOptions,
    EvaluationOptions,
    HeadOptions,
    MethodOptions,
    ModelOptions,
    OutputOptions,
    PolicyOptions,
    ScoringOptions,
    SelectionOptions,
    StrengthOptions,
    TargetOptions,
    TowerOptions,
    WeightsOptions,
    WorkerOptions,
    WorkOptions,
)
from uwm_deploy.commands.shown import Shown
from uwm_deploy.commands.verdicts import ci_lines, exit_code_of
from uwm_deploy.data.ranks import ALONE, Ranks
from uwm_deploy.report.lines import Whole

if TYPE_CHECKING:
    from uwm_deploy.pipeline.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class UntilScore:
    """What scores depend on."""

    model: ModelOptions
    weights: WeightsOptions
    data: DataOptions
    method: MethodOptions
    towers: TowerOptions
    work: WorkOptions
    device: DeviceOptions
    workers: WorkerOptions
    scoring: ScoringOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class UntilFit:
    """The same of the sums for a closed-form step, which may come after another step."""

    before: UntilScore
    selection: SelectionOptions
    entries: EntryOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class UntilEdit:
    """The same of the edited model."""

    before: UntilFit
    strength: StrengthOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class UntilExport:
    """The same of the exported graphs."""

    before: UntilEdit
    head: HeadOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class UntilCompile:
    """The same of the engines."""

    before: UntilExport
    targets: TargetOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class UntilVerify:
    """The same of the report."""

    before: UntilCompile
    evaluation: EvaluationOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleOptions:
    """What the bundle is compared with, where it goes, and its version."""

    baseline: Path | None = option(
        "--baseline",
        type=PATH,
        help="Accepted report to compare with: folder, bundle or file (docs/reference/policy.md); kept in the bundle.",
    )
    out: Path | None = option("--out", type=PATH, help="Bundle folder. [default: dist/MODEL]")
    bundle_version: int | None = option(
        "--bundle-version",
        type=click.IntRange(min=0),
        help="Release counter, so that older bundles can be refused. [default: the recipe's, 0]",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class UntilPackage:
    """The same of the bundle."""

    before: UntilVerify
    policy: PolicyOptions
    behind: DownstreamOptions
    bundle: BundleOptions


def request_of(*records: Any, **more: Any) -> Request:
    """The request that options come to; see `filled`."""
    from uwm_deploy.pipeline.request import Request

    return filled(Request, *records, **more)


def join_group(device: str) -> Ranks:
    """The processes that torchrun started; torch is imported only if it did."""
    if "WORLD_SIZE" not in os.environ:
        return ALONE
    from uwm_deploy.data.torchrun import join

    return join(device)


def run_until(stage: str, asked: Any, outputs: OutputOptions | None = None) -> Shown:
    """Runs the pipeline through a stage and shows what it made; only the first process of a group speaks.

    Args:
        stage: Last one.
        asked: Options up to it.
        outputs: What is written of the verdict besides.
    """
    from uwm_deploy.pipeline.measure_next import measure_next
    from uwm_deploy.pipeline.run import run
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.tables.run_outcome import outcome_as_plain, print_outcome

    request = request_of(asked)
    ranks = join_group(request.device)
    outcome = run(request, until=stage, reporter=Reporter(quiet=not ranks.first), ranks=ranks)

    def ended() -> tuple[int, tuple[str, ...]]:
        if outcome.verdict is None:
            return 0, ()
        lines = ci_lines(outcome.verdict, request.policy, outputs)
        return exit_code_of(outcome.verdict), (*lines, *map(Whole, measure_next(outcome)))

    code, notes = ranks.first_only(ended)
    if not ranks.first:
        return Shown(code=code)
    return Shown(data=outcome_as_plain(outcome), text=lambda: print_outcome(outcome), notes=notes, code=code)
