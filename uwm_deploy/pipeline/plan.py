"""From what a user asks for to the plan of a run; whatever costs nothing is checked here, before anything is computed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Literal

from uwm_deploy.bundle.downstream import read_downstream
from uwm_deploy.bundle.layout import RunFolder
from uwm_deploy.bundle.replace import refuse_foreign_folder
from uwm_deploy.data.source import check_own_pairs
from uwm_deploy.errors import InputError, PrerequisiteError
from uwm_deploy.pipeline.baseline import read_baseline
from uwm_deploy.pipeline.foreseen import shortages
from uwm_deploy.pipeline.request import Request, with_overrides
from uwm_deploy.recipes.built import text_of_built
from uwm_deploy.recipes.recipe import Recipe, is_folder
from uwm_deploy.recipes.resolve import calibration_set_of, policy_of, read_training, recipe_of
from uwm_deploy.records.edit import Method
from uwm_deploy.records.graph import Target
from uwm_deploy.records.training import TrainingRecord
from uwm_deploy.runtime.session import missing_package
from uwm_deploy.stages.job import Dtype, Plan

_DTYPES: dict[str, Dtype] = {"fp32": "float32", "bf16": "bfloat16"}


def plan_of(request: Request) -> Plan:
    """Everything that a run is made from.

    Raises:
        InputError: If a recipe, a data set, a policy or a baseline is not there, or two things that are asked for
            exclude each other.
    """
    recipe, text = recipe_of(request.model)
    recipe, trained = with_overrides(recipe, request), None
    calibration, _, calibration_base = calibration_set_of(recipe.data.calibration)
    if request.leave_out:
        calibration = dataclasses.replace(calibration, leave_out=request.leave_out)
    evaluation, evaluation_text, evaluation_base = calibration_set_of(recipe.data.evaluation)
    check_own_pairs(evaluation)
    if recipe.entries.method is Method.TRAINED:
        trained, recipe = recipe.model, _recipe_of_base(recipe, request)
    policy, policy_digest = policy_of(request.policy)
    weights: Literal["checkpoint", "random"] = "random" if request.weights == "random" else "checkpoint"
    return Plan(
        recipe=recipe,
        recipe_text=text_of_built(text, recipe),
        calibration=calibration,
        calibration_base=calibration_base,
        evaluation=evaluation,
        evaluation_text=evaluation_text,
        evaluation_base=evaluation_base,
        trained=trained,
        training=_training_at((trained or recipe.model).repo),
        policy=policy,
        policy_digest=policy_digest,
        baseline=read_baseline(request.baseline) if request.baseline else None,
        folder=RunFolder(request.work or Path(".uwm") / recipe.name),
        out=request.out or Path("dist") / recipe.name,
        asked_targets=frozenset(Target(target) for target in request.targets),
        weights=weights,
        device=request.device,
        workers=request.workers,
        batch_pairs=request.batch_pairs,
        score_dtype=_DTYPES[request.score_dtype],
        safety_head=request.safety_head,
        given=read_downstream(request.downstream),
    )


def check_first(plan: Plan, stages: frozenset[str]) -> None:
    """Refuses what would only come to light after hours, and can be known now; what may cost a download comes last.

    Args:
        plan: What the run is made from.
        stages: Names of the stages that will run.

    Raises:
        InputError: If the bundle's place is taken, or a data set, the safety head or the checkpoint cannot be read.
        PrerequisiteError: If a target that was asked for cannot be compiled here, or the hub cannot be reached.
    """
    if "package" in stages:
        refuse_foreign_folder(plan.out)
    len(plan.calibration_source)
    if "verify" in stages:
        len(plan.evaluation_source)
    if stages & {"export", "verify"}:
        _ = plan.head
    if plan.given is not None:
        plan.given.check_head(plan.head_digest)
    if "compile" in stages:
        for target in plan.recipe.compile.targets:
            if target in plan.asked_targets and (reason := missing_package(target)):
                raise PrerequisiteError(f"target {target.value}: {reason}", fix=f"install the extra [{target.value}]")
    _ = plan.checkpoint, plan.companion, plan.trained_folder


def foreseen(plan: Plan) -> list[str]:
    """Lines about checks of the policy that cannot pass on this evaluation set, known before anything is computed."""
    calibrated = Counter(plan.calibration_source.concepts)
    found = shortages(plan.policy, plan.evaluation.name, plan.evaluation_source, calibrated)
    return [f"note: {line}: the verdict cannot pass" for line in found]


def _recipe_of_base(recipe: Recipe, request: Request) -> Recipe:
    """The recipe with the base as its source model.

    Raises:
        InputError: If nobody says what that is.
    """
    source = recipe.model
    if request.weights == "random":
        raise InputError("method trained needs weights that were trained", fix="leave --weights random out")
    if not (request.original or source.base):
        raise InputError(
            f"method trained compares {recipe.name} with the model it was trained from, which its recipe does not name",
            fix="pass --original FOLDER with that model's weights, or put an edit on top with --method uwm",
        )
    base = str(request.original.resolve()) if request.original else source.base
    revision = "" if request.original else source.base_revision
    return dataclasses.replace(recipe, model=dataclasses.replace(source, repo=base, revision=revision))


def _training_at(repo: str) -> TrainingRecord | None:
    return read_training(Path(repo)) if is_folder(repo) else None
