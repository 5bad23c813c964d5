"""Every safety method on one model and one set: made in a process of its own, measured on the same items, with its cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from uwm_deploy.data.open import open_source
from uwm_deploy.errors import ExitCode, InputError, PrerequisiteError
from uwm_deploy.pipeline.request import Request, resolved_recipe
from uwm_deploy.pipeline.run import load_source
from uwm_deploy.recipes.resolve import calibration_set_of
from uwm_deploy.records.files import locked, whole_folder
from uwm_deploy.records.metrics import Flips, SafetyReport
from uwm_deploy.records.studies import ComparedMethod, MethodComparison
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.study_files import write_comparison
from uwm_deploy.runtime.machine import machine
from uwm_deploy.runtime.versions import versions
from uwm_deploy.safeground.outcomes import flips_since
from uwm_deploy.studies.comparison_rows import CompareRequest
from uwm_deploy.studies.encoders import open_encoders
from uwm_deploy.studies.evaluate import Evaluator
from uwm_deploy.studies.evaluation_sets import open_evaluation_sets
from uwm_deploy.studies.made_models import MadeModel, ModelMaker
from uwm_deploy.studies.subjects import Subject

_PACKAGES = ("torch", "transformers", "peft", "numpy", "pillow")


def compare(request: CompareRequest, reporter: Reporter) -> MethodComparison:
    """Makes, measures and writes.

    Raises:
        InputError: If calibration and evaluation are one set, or there is no such set.
        PrerequisiteError: If no row could run.
        UwmError: If a model cannot be measured.
    """
    asked = Request(
        model=request.model, checkpoint=request.checkpoint, revision=request.revision, device=request.device
    )
    recipe = resolved_recipe(asked)
    calibration = request.calibration or recipe.data.calibration
    evaluation = request.evaluation or recipe.data.evaluation
    _check_apart(calibration, evaluation)
    with locked(request.work):
        maker = ModelMaker(request, calibration, reporter)
        made = [maker.made(row) for row in request.rows]
        whole = Subject(label="", model=request.model, request=asked)
        sets = open_evaluation_sets(evaluation, request.zero_shot, data=request.data, default=whole)
        evaluator = Evaluator(sets, workers=request.workers, reporter=reporter, with_items=True)
        rows: list[ComparedMethod] = []
        for row in made:
            first = next((found.safety for found in rows if found.safety is not None), None)
            rows.append(_measured(row, evaluator, reporter, first))
    if not any(row.safety for row in rows):
        raise PrerequisiteError(f"no method could run: {rows[0].reason}", fix="see `uwm-deploy doctor`")
    result = MethodComparison(
        model=load_source(asked, reporter).ref,
        calibration=calibration_set_of(calibration)[0].name,
        measured_on=sets.name,
        n=len(sets.source) if sets.source else 0,
        rows=tuple(rows),
        machine=machine(),
        versions=versions(_PACKAGES),
    )
    with whole_folder(request.out) as folder:
        write_comparison(result, folder)
    return result


def _check_apart(calibration: str, evaluation: str) -> None:
    """Items that a method was made on must not be among those that it is measured on."""
    sets = []
    for name in (calibration, evaluation):
        spec, _, base = calibration_set_of(name)
        sets.append(set(open_source(dataclasses.replace(spec, zero_shot=()), base=base).ids))
    if common := sets[0] & sets[1]:
        raise InputError(
            f"{calibration} and {evaluation} share {len(common)} items", fix="measure on another set by --evaluation"
        )


def _measured(made: MadeModel, evaluator: Evaluator, reporter: Reporter, first: SafetyReport | None) -> ComparedMethod:
    if made.subject is None:
        return ComparedMethod(
            label=made.label, weights_digest="", safety=None, change={}, cost=None, reason=made.reason
        )
    encoders = open_encoders(made.subject, reporter)
    report = dataclasses.replace(evaluator.measure(encoders), subject=made.label)
    change: Mapping[str, Flips] = {}
    if first is not None:
        change = {name: _without_ids(part) for name, part in flips_since(first, report).items()}
    return ComparedMethod(
        label=made.label, weights_digest=encoders.weights_digest, safety=report, change=change, cost=made.cost
    )


def _without_ids(part: Flips) -> Flips:
    return dataclasses.replace(part, lost_ids=(), gained_ids=())


def exit_code_of_comparison(result: MethodComparison) -> ExitCode:
    """6 when a row could not run, which is no comparison of what was asked for."""
    return ExitCode.ENVIRONMENT if any(row.safety is None for row in result.rows) else ExitCode.PASS
