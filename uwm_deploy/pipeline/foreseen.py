"""What an evaluation set lacks for a policy: known from its counts, before anything is scored."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from uwm_deploy.data.check import Checked, problems_of_an_evaluation
from uwm_deploy.data.reading import Progress
from uwm_deploy.data.source import QuadrupleSource, check_own_pairs
from uwm_deploy.recipes.policy import Limit, Policy
from uwm_deploy.recipes.resolve import policy_of
from uwm_deploy.records.data import DataReport
from uwm_deploy.safeground.hard_safe import SHARE
from uwm_deploy.stages.gate.soundness import BY_CHANCE, absent_from

_ZERO_SHOT = "zero_shot"
_HARD = ("hard_safe", "hard-safe")
"""Starts of metrics that are counted in other items than quadruples."""


def checked_for_build(
    checked: Checked, others: Sequence[Checked], report: DataReport, policy: str, *, workers: int, progress: Progress
) -> DataReport:
    """The report on a set, with what keeps a build that is measured on it from passing.

    Args:
        checked: The set, with its zero-shot sets.
        others: Calibration sets; none where they are not known.
        report: What `check` found.
        policy: Name or file.
        workers: Decoding processes; 0 decodes here.
        progress: Called as it goes on.

    Raises:
        InputError: If there is no such policy.
        DataError: If the set is not paired as it was made.
    """
    check_own_pairs(checked.spec)
    calibrated = Counter(concept for other in others for concept in other.source.concepts)
    lost = shortages(policy_of(policy)[0], checked.spec.name, checked.source, calibrated)
    more = problems_of_an_evaluation(checked, report, workers=workers, progress=progress)
    return dataclasses.replace(report, problems=(*report.problems, *more, *lost))


def shortages(policy: Policy, name: str, source: QuadrupleSource, calibrated: Mapping[str, int]) -> list[str]:
    """Why no verdict on a set can pass, whatever the edit: one line each.

    Args:
        policy: The limits.
        name: Of the set.
        source: The set.
        calibrated: Concepts of the calibration set, with their number of items; empty where it is not known.
    """
    limits = [*policy.edit, *policy.artifact]
    return [
        *_too_few(limits, policy.name, name, len(source)),
        *_no_concept(policy, name, source),
        *_no_zero_shot(limits, policy.name, name, source),
        *_not_measured(name, source, calibrated),
    ]


def _too_few(limits: list[Limit], policy: str, name: str, n: int) -> Iterator[str]:
    quadruples = [limit for limit in limits if not limit.metric.startswith((_ZERO_SHOT, *_HARD))]
    wanted = max((limit.min_n for limit in quadruples), default=0)
    if n < wanted:
        yield f"policy {policy} asks for {wanted} quadruples, {name} has {n}"
    hard, wanted = math.ceil(SHARE * n), _most(limits, _HARD)
    if hard < wanted:
        yield f"policy {policy} asks for {wanted} hard safe items, a tenth of {name} is {hard}"


def _no_concept(policy: Policy, name: str, source: QuadrupleSource) -> Iterator[str]:
    sizes = Counter(source.concepts)
    largest, wanted = max(sizes.values(), default=0), min((limit.min_n for limit in policy.concept), default=0)
    if largest < wanted:
        yield f"policy {policy.name} asks for {wanted} items of a concept, no concept of {name} has more than {largest}"


def _no_zero_shot(limits: list[Limit], policy: str, name: str, source: QuadrupleSource) -> Iterator[str]:
    wanted = _most(limits, (_ZERO_SHOT,))
    if not wanted:
        return
    if not source.zero_shot_names:
        missing = ", ".join(f"{part}: {why}" for part, why in sorted(source.zero_shot_missing.items()))
        yield f"policy {policy} limits zero-shot, {name} has no zero-shot set here ({missing or 'it names none'})"
    elif (n := sum(len(source.zero_shot(part)) for part in source.zero_shot_names)) < wanted:
        yield f"policy {policy} asks for {wanted} zero-shot images, {name} has {n}"


def _not_measured(name: str, source: QuadrupleSource, calibrated: Mapping[str, int]) -> Iterator[str]:
    there = sorted(set(source.concepts))
    for concept, chance in absent_from(there, len(source), calibrated).items():
        if chance < BY_CHANCE:
            near = difflib.get_close_matches(concept, there, n=1)
            hint = f"; is it {near[0]!r} there?" if near else ""
            yield f"{name} has no item of the concept {concept!r}, which is calibrated on{hint}"


def _most(limits: list[Limit], starts: tuple[str, ...]) -> int:
    """Largest number of items that limits on some metrics ask for."""
    return max((limit.min_n for limit in limits if limit.metric.startswith(starts)), default=0)
