"""The numbers of a report computed again from the embeddings beside it: all that a verdict on the edit is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np

from uwm_deploy.errors import IntegrityError
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.metrics import Flips, Geometry, ItemOutcomes, Proportion, SafetyReport
from uwm_deploy.safeground.embedded import EmbeddedSet, flips_between, safety_report, yardstick_of
from uwm_deploy.safeground.outcomes import values_of

_NEARLY_TIED = 2
"""Items that may be decided otherwise when it is computed again: another processor adds in another order."""

_GEOMETRY = 0.01
"""The same for overlaps of neighbours (0 to 1) and ratios of spread."""

T = TypeVar("T")


def departures_from(report: VerifyReport, original: EmbeddedSet, edited: EmbeddedSet) -> Iterator[str]:
    """Numbers of a report that the embeddings do not give, in words.

    Args:
        report: The report.
        original: The evaluation set, embedded by the source model.
        edited: The same by the edited model.

    Raises:
        DataError, ValueError: If they cannot be measured.
    """
    yardstick = yardstick_of(original)
    for said, part in ((report.original, original), (report.edited, edited)):
        yield from _of_model(said, safety_report(said.subject, part, with_items=True, yardstick=yardstick))
    yield from _each("{} of the edit", report.edit_effect, flips_between(original, edited, yardstick), _same_flips)


def _of_model(said: SafetyReport, found: SafetyReport) -> Iterator[str]:
    model = f"of the {said.subject} model"
    for left, right in ((said.preference, found.preference), (said.retrieval, found.retrieval),
                        (said.zero_shot, found.zero_shot)):  # fmt: skip
        yield from _each(f"{{}} {model}", left, right, _same_proportion)
    for concept in sorted(said.per_concept.keys() | found.per_concept.keys()):
        left, right = said.per_concept.get(concept, {}), found.per_concept.get(concept, {})
        yield from _each(f"{{}} of {concept} {model}", left, right, _same_proportion)
    if not _same_items(said.items, found.items):
        yield f"what single items came to {model} is not what the embeddings give"
    if not _same_geometry(said.geometry, found.geometry):
        yield f"the geometry {model} is not what the embeddings give"


def _each(words: str, said: Mapping[str, T], found: Mapping[str, T], same: Callable[[T, T], bool]) -> Iterator[str]:
    for name in sorted(said.keys() | found.keys()):
        left, right = said.get(name), found.get(name)
        if left is None or right is None or not same(left, right):
            what = words.format(name)
            yield f"{what} is {_value(left)} in the report, its embeddings give {_value(right)}"


def _value(part: object) -> str:
    if isinstance(part, Flips):
        return f"{part.delta:+.4g} ({part.delta_low:+.4g} to {part.delta_high:+.4g})"
    if isinstance(part, Proportion):
        return f"{part.value:.4g} ({part.low:.4g} to {part.high:.4g})"
    return "nothing"


def _same_proportion(left: Proportion, right: Proportion) -> bool:
    if (left.n, left.clusters) != (right.n, right.clusters):
        return False
    ends = ((left.low, right.low), (left.high, right.high))
    return _near(left.value, right.value, left.n) and all(_near(*pair, left.independent, 2) for pair in ends)


def _same_flips(left: Flips, right: Flips) -> bool:
    if (left.n, left.clusters) != (right.n, right.clusters):
        return False
    counts = ((left.lost, right.lost), (left.gained, right.gained))
    ends = ((left.delta_low, right.delta_low), (left.delta_high, right.delta_high))
    return (
        all(abs(one - other) <= _NEARLY_TIED for one, other in counts)
        and _near(left.delta, right.delta, left.n)
        and all(_near(*pair, left.independent, 2) for pair in ends)
        and (any(one != other for one, other in counts) or abs(left.p_value - right.p_value) < 1e-6)
    )


def _near(left: float, right: float, n: int, times: int = 1) -> bool:
    """Whether two percentages of n items differ by no more than what may be decided otherwise."""
    return abs(left - right) * n <= 100 * times * (_NEARLY_TIED + 0.5)


def _same_items(left: ItemOutcomes | None, right: ItemOutcomes | None) -> bool:
    if left is None or right is None:
        return left is right
    if (left.concepts, left.alike, left.zero_shot_alike) != (right.concepts, right.alike, right.zero_shot_alike):
        return False
    parts = ((left.preference, right.preference), (left.zero_shot, right.zero_shot), (left.retrieval, right.retrieval))
    return all(
        one.keys() == other.keys() and all(_bits_apart(one[name], other[name]) <= _NEARLY_TIED for name in one)
        for one, other in parts
    )


def _bits_apart(left: str, right: str) -> int:
    """Items whose bit differs; all of them where the two are not of as many items."""
    try:
        one, other = (values_of(bits, 4 * len(right), "report") for bits in (left, right))
    except IntegrityError:
        return 4 * max(len(left), len(right), 1)
    return int(np.count_nonzero(one != other))


def _same_geometry(left: Geometry | None, right: Geometry | None) -> bool:
    if left is None or right is None:
        return left is right
    if left.neighbours.keys() != right.neighbours.keys() or left.spread.keys() != right.spread.keys():
        return False
    pairs = [(left.neighbours[name].value, right.neighbours[name].value) for name in left.neighbours]
    pairs += [(left.spread[name], right.spread[name]) for name in left.spread]
    return all(abs(one - other) <= _GEOMETRY for one, other in pairs)
