"""The command `evaluate`: models and bundles on one evaluation set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uwm_deploy.commands.fields import PATH, flag, option, repeated, takes_options
from uwm_deploy.commands.names import DATA_SETS, RECIPES
from uwm_deploy.commands.options import TrustOptions, WorkerOptions, ZeroShotDataOptions
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.commands.until import join_group, request_of
from uwm_deploy.errors import InputError

if TYPE_CHECKING:
    from uwm_deploy.records.metrics import SafetyReport
    from uwm_deploy.studies.subjects import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """What is measured, and on what."""

    model: str | None = option(
        "--model", shell_complete=RECIPES, help="Recipe name, recipe file or checkpoint folder. [default: demo]"
    )
    bundle: Path | None = option("--bundle", type=PATH, help="Measure a bundle instead, without torch.")
    compared: tuple[str, ...] = repeated(
        "--compare",
        metavar="[LABEL=]MODEL[:METHOD]",
        help="One row of the paper's table: recipe, checkpoint or saved edited folder, or bundle; with a method, edited "
        "first. Repeatable; all rows are measured on the same items.",
    )
    evaluation: str | None = option(
        "--evaluation",
        shell_complete=DATA_SETS,
        help="Evaluation set: name or TOML file. [default: the first model's]",
    )
    zero_shot: tuple[str, ...] = repeated(
        "--zero-shot",
        help="Zero-shot sets: all, none, names separated by commas, or imagefolder:PATH::TEMPLATE; repeatable. "
        "[default: the evaluation set's]",
    )
    data: ZeroShotDataOptions
    leave_out: str | None = option(
        "--leave-out",
        metavar="CONCEPTS",
        help="Concepts, separated by commas, that edits are made without. Only their items are measured: "
        "this shows what becomes of an unseen hazard.",
    )
    markdown: bool = flag("--markdown", help="Print the paper's table in Markdown.")


@click.command()
@takes_options
@prints
def evaluate(asked: MeasureOptions, workers: WorkerOptions, trust: TrustOptions) -> Shown:
    """Measures models and bundles on an evaluation set.

    It measures SafeGround, retrieval and zero-shot.

    \b
    Example:
      uwm-deploy evaluate --model demo
      uwm-deploy evaluate --bundle dist/demo --evaluation demo-test
      uwm-deploy evaluate --compare CLIP=demo --compare UWM=demo:uwm --zero-shot shape,colour --markdown
      uwm-deploy evaluate --compare none=demo --compare axis=demo:safety-axis --leave-out fire,smoke
    """
    from uwm_deploy.data.zero_shot_suite import names_from
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.tables.evaluated import print_evaluated
    from uwm_deploy.report.tables.safety_numbers import print_measured
    from uwm_deploy.studies.evaluate import evaluate as measure
    from uwm_deploy.studies.subjects import concepts_from

    if sum(map(bool, (asked.model, asked.bundle, asked.compared))) > 1:
        raise InputError("--model, --bundle and --compare are given together", fix="name every row with --compare")
    without = concepts_from(asked.leave_out) if asked.leave_out is not None else ()
    subjects, ranks = _subjects(asked, workers, trust, without), join_group("auto")
    reports = measure(
        subjects,
        evaluation=asked.evaluation,
        zero_shot=names_from(asked.zero_shot) if asked.zero_shot else None,
        data=asked.data.data,
        workers=workers.workers,
        reporter=Reporter(quiet=not ranks.first),
        ranks=ranks,
    )
    if not ranks.first:
        return Shown()
    labels = [subject.label for subject in subjects]
    data = _table(labels, reports, without) if asked.compared else reports[0]
    if asked.markdown or asked.compared:
        return Shown(data=data, text=lambda: print_evaluated(labels, reports, without=without, markdown=asked.markdown))
    return Shown(data=data, text=lambda: print_measured(reports[0]))


def _subjects(
    asked: MeasureOptions, workers: WorkerOptions, trust: TrustOptions, without: tuple[str, ...]
) -> list[Subject]:
    """What is to be measured, with what is asked of every bundle among it."""
    from uwm_deploy.studies.subjects import Subject, subject_from, trusted, without_concepts

    request = request_of(workers, leave_out=without)
    single = str(asked.bundle or asked.model or "demo")
    subjects = [subject_from(text, request) for text in asked.compared] or [
        Subject(label=single, model=single, bundle=asked.bundle is not None, request=request)
    ]
    return without_concepts(trusted(subjects, trust.public_key, trust.min_bundle_version))


def _table(labels: Sequence[str], reports: Sequence[SafetyReport], without: tuple[str, ...]) -> dict[str, Any]:
    from uwm_deploy.report.paper_table import plain_comparison

    return plain_comparison(labels, reports) | ({"leave_out": list(without)} if without else {})
