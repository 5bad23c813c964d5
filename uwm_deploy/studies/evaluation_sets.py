"""The sets that subjects are measured on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uwm_deploy.data.evaluation import check_measured_on, evaluation_set_in, of_bundle
from uwm_deploy.data.open import open_source
from uwm_deploy.data.source import QuadrupleSource, check_own_pairs
from uwm_deploy.data.zero_shot_suite import Suite, open_suite
from uwm_deploy.pipeline.judge import report_of_bundle
from uwm_deploy.recipes.data_set import CalibrationSet
from uwm_deploy.recipes.resolve import calibration_set_of, recipe_of
from uwm_deploy.studies.subjects import Subject, open_subject_bundle


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSets:
    """What every subject is measured on.

    Attributes:
        name: Of the set of quadruples; its source would read all of them to tell.
        source: Quadruples; None when only zero-shot is wanted.
        suite: Zero-shot sets.
    """

    name: str = "zero-shot sets"
    source: QuadrupleSource | None
    suite: Suite


def open_evaluation_sets(
    evaluation: str | None,
    zero_shot: Sequence[str] | None,
    *,
    data: Path | None,
    default: Subject,
    concepts: Sequence[str] = (),
) -> EvaluationSets:
    """Opens the evaluation set and its zero-shot sets.

    Args:
        evaluation: Name or TOML file; None takes the one of `default`.
        zero_shot: Names; None takes those the evaluation set names.
        data: Folder of the zero-shot sets; None takes `$UWM_DEPLOY_DATA/zero-shot`.
        default: The first subject.
        concepts: Only items of these are measured; all when empty.

    Raises:
        InputError: If there is no such set, or it is not the one that the bundle was measured on.
        DataError: If it is empty or malformed.
    """
    spec, base = _evaluation_of(default) if evaluation is None else calibration_set_of(evaluation)[::2]
    check_own_pairs(spec)
    names = spec.zero_shot if zero_shot is None else zero_shot
    demo_split = spec.split if spec.source == "demo" and zero_shot is None else "test"
    own = zero_shot is None
    suite = open_suite(
        names,
        data=data,
        base=base if own else None,
        demo_split=demo_split,
        limit=spec.zero_shot_limit if own else 0,
    )
    only = tuple(concepts) or spec.concepts
    with of_bundle() if evaluation is None and default.is_bundle else contextlib.nullcontext():
        source = open_source(dataclasses.replace(spec, zero_shot=(), concepts=only), base=base)
        if evaluation is None and default.is_bundle and not concepts:
            check_measured_on(source, report_of_bundle(open_subject_bundle(default))[0].evaluation)
    return EvaluationSets(name=spec.name, source=source, suite=suite)


def _evaluation_of(subject: Subject) -> tuple[CalibrationSet, Path | None]:
    if subject.is_bundle:
        return evaluation_set_in(open_subject_bundle(subject))
    return calibration_set_of(recipe_of(subject.model)[0].data.evaluation)[::2]
