"""Commands that make and measure many edits, methods or published rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from uwm_deploy.commands.fields import PATH, filled, flag, option, repeated, takes_options
from uwm_deploy.commands.names import DATA_SETS
from uwm_deploy.commands.options import (
    DataOptions,
    DeviceOptions,
    MarkdownOptions,
    MethodOptions,
    ModelOptions,
    SelectionOptions,
    WorkerOptions,
    WorkOptions,
    ZeroShotDataOptions,
)
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.commands.until import request_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOptions:
    """Which points are measured, on what, and which one is picked."""

    on: str | None = option(
        "--on", shell_complete=DATA_SETS, help="Set that every point is measured on. [default: the calibration set]"
    )
    keep_masses: str | None = option(
        "--keep-mass", help="LOW:HIGH, LOW:HIGH:POINTS, or a list 0.95,0.98. [default: 0.9:0.995]"
    )
    factors: str | None = option(
        "--factor", help="List of multipliers, e.g. -1,0,0.5. [default: the recipe's or the method's]"
    )
    losses: str | None = option(
        "--max-retrieval-loss",
        help="For an edit with a safety axis: most points of safe R@1 that each chosen strength may lose. "
        "[default: 1,2,4,8,16]",
    )
    max_drop: float | None = option(
        "--pick",
        type=click.FloatRange(min=0),
        help="Pick the highest GS among the points that lose at most this many points of zero-shot mean.",
    )
    out: Path | None = option("--out", type=PATH, help="Folder of the results. [default: .uwm/MODEL/sweep]")


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptOptions:
    """Which edits there are points of."""

    model: ModelOptions
    data: DataOptions
    method: MethodOptions
    selection: SelectionOptions
    work: WorkOptions
    device: DeviceOptions
    workers: WorkerOptions


@click.command()
@takes_options
@prints
def sweep(swept: SweptOptions, asked: SweepOptions) -> Shown:
    """Measures many edits from one scoring pass.

    It writes a table and a picture of safety gained against knowledge kept. Points are measured, and one may be picked, on
    the calibration set or the set of --on, never on the evaluation set.

    \b
    Example:
      uwm-deploy sweep --model demo --method safety-axis --max-retrieval-loss 1,2,4,8
      uwm-deploy sweep --model demo --method uwm --keep-mass 0.9:0.995 --factor -1,0,0.5 --pick 3
      uwm-deploy sweep --model demo --method gradient-unsafe --keep-mass 0.9,0.965
    """
    from uwm_deploy.pipeline.request import resolved_recipe
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.tables.sweep_points import print_sweep
    from uwm_deploy.studies.sweep import sweep as run_sweep
    from uwm_deploy.studies.sweep_values import factors_of, keep_masses_of, losses_of

    request = request_of(swept)
    folder = asked.out or (request.work or Path(".uwm") / resolved_recipe(request).name) / "sweep"
    found = run_sweep(
        request,
        keep_masses=keep_masses_of(asked.keep_masses) if asked.keep_masses is not None else None,
        factors=factors_of(asked.factors) if asked.factors is not None else None,
        on=asked.on,
        max_drop=asked.max_drop,
        out=folder,
        reporter=Reporter(),
        losses=losses_of(asked.losses) if asked.losses is not None else None,
    )
    return Shown(data=found, text=lambda: print_sweep(found, folder))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOptions:
    """Which methods are compared."""

    methods: str = option(
        "--methods",
        default="none,uwm,safety-axis,safety-axis@embedding,uwm+safety-axis,leace,gradient-unsafe,gradient-safe-clip,"
        "safe-clip,safer-clip,uwm+safe-clip",
        help="Rows, separated by commas: a --method of build, a command of train, an edit on top of it (uwm+safe-clip), or "
        "LABEL=MODEL[:METHOD] as in evaluate. The others are compared with the first.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedOptions:
    """What they are made and measured on, and what is passed on to training."""

    calibration: str | None = option(
        "--calibration",
        shell_complete=DATA_SETS,
        help="Set that all rows are made on: name or TOML. [default: the recipe's]",
    )
    evaluation: str | None = option(
        "--evaluation", shell_complete=DATA_SETS, help="Set that all rows are measured on. [default: the recipe's]"
    )
    zero_shot: tuple[str, ...] = repeated(
        "--zero-shot", help="Zero-shot sets, as in evaluate. [default: the evaluation set's]"
    )
    data: ZeroShotDataOptions
    train_options: tuple[str, ...] = repeated(
        "--train-option",
        metavar="--NAME=VALUE",
        help="Option for every train command, such as --epochs=3; repeatable.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonFolders:
    """Where models and tables go."""

    work: Path | None = option("--work", type=PATH, help="Folder of the models. [default: .uwm/MODEL/compare]")
    out: Path | None = option("--out", type=PATH, help="Folder of tables and picture. [default: WORK/report]")


@click.command()
@takes_options
@prints
def compare(
    rows: RowOptions,
    model: ModelOptions,
    asked: ComparedOptions,
    folders: ComparisonFolders,
    device: DeviceOptions,
    workers: WorkerOptions,
) -> Shown:
    """Compares every safety method on one model.

    All are made, measured on the same items, and shown with intervals and cost (docs/how-to/compare-methods.md). What was
    made is reused by the next run. The exit code is 6 when a row could not run.

    \b
    Example:
      uwm-deploy compare --model demo
      uwm-deploy compare --methods none,uwm,published=safe-clip-vit-l14 --model clip-vit-l14
    """
    from uwm_deploy.data.zero_shot_suite import names_from
    from uwm_deploy.pipeline.request import resolved_recipe
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.tables.compared_methods import print_compared
    from uwm_deploy.studies.compare import compare as measure
    from uwm_deploy.studies.compare import exit_code_of_comparison
    from uwm_deploy.studies.comparison_rows import CompareRequest, rows_from

    work = folders.work or Path(".uwm") / resolved_recipe(request_of(model)).name / "compare"
    out = folders.out or work / "report"
    request = filled(
        CompareRequest,
        *(model, asked, device, workers),
        rows=rows_from(rows.methods),
        zero_shot=names_from(asked.zero_shot) if asked.zero_shot else None,
        work=work,
        out=out,
    )
    result = measure(request, Reporter())
    return Shown(data=result, text=lambda: print_compared(result, out), code=exit_code_of_comparison(result))


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedOptions:
    """What a published table is measured with."""

    demo: bool = flag("--demo", help="Run the code on the demo model and its sets; nothing is published for it.")
    calibration: str | None = option(
        "--calibration", shell_complete=DATA_SETS, help="Set that edits are made from. [default: the table's]"
    )
    evaluation: str | None = option(
        "--evaluation", shell_complete=DATA_SETS, help="Set of quadruples. [default: the table's]"
    )
    data: ZeroShotDataOptions
    checkpoints: tuple[str, ...] = repeated(
        "--checkpoint",
        metavar="RECIPE=FOLDER",
        help="Folder with a recipe's weights; repeatable. [default: the hub's cache]",
    )
    downstream: tuple[str, ...] = repeated(
        "--downstream",
        metavar="ROW=FILE",
        help="For uwm-captions and safe-clip-i2p: a caption.json or draw.json for a row, whose name is as printed; "
        "repeatable.",
    )
    download: bool = flag("--download", help="Fetch weights that are not on this machine.")
    work: Path | None = option("--work", type=PATH, help="Folder for the run folders of edits. [default: .uwm/methods]")


@click.command()
@click.argument("table")
@takes_options
@prints
def reproduce(
    table: str, asked: PublishedOptions, device: DeviceOptions, workers: WorkerOptions, form: MarkdownOptions
) -> Shown:
    """Measures a published table again, and shows both.

    TABLE is uwm-table-1, uwm-zero-shot, uwm-architectures, uwm-captions or safe-clip-i2p; the tolerance is shown too. Rows
    without data or weights here are "not run". Exit codes: 0 all that ran agrees, 3 something does not, 6 nothing could run.

    \b
    Example:
      uwm-deploy reproduce uwm-table-1 --demo
      uwm-deploy reproduce uwm-zero-shot --data /data/zero-shot --download
      uwm-deploy reproduce uwm-captions --downstream "LLaVA + UWM=captions/caption.json"
    """
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.tables.published_numbers import print_reproduction
    from uwm_deploy.studies.published_outputs import reports_from
    from uwm_deploy.studies.reproduce import ReproduceSettings, checkpoints_from
    from uwm_deploy.studies.reproduce import reproduce as measure

    checkpoints, reports = checkpoints_from(asked.checkpoints), reports_from(asked.downstream)
    settings = filled(ReproduceSettings, asked, device, workers, checkpoints=checkpoints, downstream=reports)
    result = measure(table, settings, Reporter())
    return Shown(
        data=result, text=lambda: print_reproduction(result, markdown=form.markdown), code=int(result.exit_code)
    )
