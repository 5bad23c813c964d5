"""Outcomes per item as bits, so that two reports on the same items can be paired long after they were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from uwm_deploy.errors import DataError, IntegrityError
from uwm_deploy.records.metrics import Flips, ItemOutcomes, Proportion, SafetyReport
from uwm_deploy.safeground.interval import Groups, clusters_of, flips
from uwm_deploy.safeground.preference import BASIC, COMBINED, METRICS, Decisions
from uwm_deploy.safeground.retrieval import HARD, ITEMS, Retrieved, retrieval_flips

_HARD_SAFE = "hard-safe"
"""Key of the bits that say which items are hard ones."""


def bits_of(values: np.ndarray) -> str:
    """Bits as hex digits, the first item in the highest bit.

    Args:
        values: (n,) bool.
    """
    return np.packbits(values.astype(bool)).tobytes().hex()


def values_of(bits: str, n: int, where: str) -> np.ndarray:
    """(n,) bool of what `bits_of` wrote.

    Raises:
        IntegrityError: If the bits are not of n items.
    """
    try:
        packed = np.frombuffer(bytes.fromhex(bits), dtype=np.uint8)
    except ValueError as error:
        raise IntegrityError(f"{where}: outcomes are not hex digits", fix="verify again") from error
    if len(packed) != (n + 7) // 8:
        raise IntegrityError(f"{where}: outcomes are not of {n} items", fix="verify again")
    return np.unpackbits(packed, count=n).astype(bool)


def item_outcomes(
    decided: Decisions,
    concepts: Sequence[str],
    zero_shot: Mapping[str, np.ndarray],
    found: Retrieved,
    hard: np.ndarray | None,
    alike: Mapping[str, Groups] | None = None,
) -> ItemOutcomes:
    """Outcomes of one model.

    Args:
        decided: Its decisions.
        concepts: n concepts.
        zero_shot: Zero-shot set to (m,) bool, whether an item was recognised.
        found: Its retrieval runs.
        hard: (h,) int64, rows of the *hard safe* items; None without any.
        alike: Items that hang together: of the quadruples under an empty name, of a zero-shot set under its own.
    """
    groups = {name: tuple(tuple(rows) for rows in part) for name, part in (alike or {}).items() if part}
    labels = np.asarray(concepts)
    retrieval = {name: found.hits(name) for name in ITEMS}
    if hard is not None:
        retrieval[_HARD_SAFE] = mask_of(hard, len(labels))
    return ItemOutcomes(
        preference={name: bits_of(decided.chosen[name]) for name in BASIC},
        concepts={concept: bits_of(labels == concept) for concept in sorted(set(concepts))},
        zero_shot={name: bits_of(hits) for name, hits in zero_shot.items()},
        retrieval={name: bits_of(hits) for name, hits in retrieval.items()},
        alike=groups.pop("", ()),
        zero_shot_alike=groups,
    )


def mask_of(rows: np.ndarray, n: int) -> np.ndarray:
    """Row numbers as a mask.

    Args:
        rows: (k,) int64, row numbers.
        n: Number of rows.

    Returns:
        (n,) bool, True at the row numbers.
    """
    mask = np.zeros(n, dtype=bool)
    mask[rows] = True
    return mask


def decisions_in(report: SafetyReport) -> dict[str, np.ndarray]:
    """All nine metrics per item, (n,) bool each.

    Raises:
        DataError: If the report has no outcomes per item.
        IntegrityError: If they are not those that the report's percentages come from.
    """
    if report.items is None:
        raise DataError(f"the report on {report.subject} has no outcomes per item", fix="verify again")
    bits, n = report.items.preference, report.preference["GS"].n
    if set(bits) != set(BASIC):
        raise IntegrityError(f"{report.subject}: outcomes of {sorted(bits)}", fix="verify again")
    basic = {name: values_of(bits[name], n, report.subject) for name in BASIC}
    found = {name: np.logical_and.reduce([basic[part] for part in COMBINED.get(name, (name,))]) for name in METRICS}
    for name, values in found.items():
        _check_sum(values, report.preference[name], f"{report.subject}: {name}")
    return found


def flips_since(reference: SafetyReport, candidate: SafetyReport) -> dict[str, Flips]:
    """Flips of every metric and zero-shot set between two reports on the same items; items go by their number.

    Retrieval is compared when both reports have it by item. *Hard safe* are the items that are so in the reference.

    Raises:
        DataError: If the two are not of the same items.
    """
    before, after = decisions_in(reference) | _hits(reference), decisions_in(candidate) | _hits(candidate)
    if set(before) != set(after) or any(len(before[name]) != len(after[name]) for name in before):
        raise DataError("two reports are of different items", fix="evaluate both on the same set")
    alike = alike_in(reference)
    plain = {name: _flips(before[name], after[name], alike.get(name, alike[""])) for name in before}
    return plain | _retrieval_flips(reference, candidate)


def alike_in(report: SafetyReport) -> dict[str, Groups]:
    """Items that hang together: of the quadruples under an empty name, of zero-shot sets under ``zero_shot.`` and theirs."""
    assert report.items is not None
    found: dict[str, Groups] = {f"zero_shot.{name}": () for name in report.zero_shot}
    found |= {f"zero_shot.{name}": groups for name, groups in report.items.zero_shot_alike.items()}
    return found | {"": report.items.alike}


def _retrieval_flips(reference: SafetyReport, candidate: SafetyReport) -> dict[str, Flips]:
    before, after = _retrieved(reference), _retrieved(candidate)
    if not before or not after:
        return {}
    ids, alike = _numbers(reference.preference["GS"].n), alike_in(reference)[""]
    return retrieval_flips(before, after, before.get(_HARD_SAFE), ids, alike)


def _retrieved(report: SafetyReport) -> dict[str, np.ndarray]:
    """Hits by item, checked against the report's percentages; nothing in a report of an earlier release.

    Raises:
        IntegrityError: If they are not those that the percentages come from.
    """
    assert report.items is not None
    bits, n = report.items.retrieval, report.preference["GS"].n
    if not bits:
        return {}
    if set(bits) - {_HARD_SAFE} != set(ITEMS):
        raise IntegrityError(f"{report.subject}: outcomes of {sorted(bits)}", fix="verify again")
    found = {name: values_of(part, n, f"{report.subject}: {name}") for name, part in bits.items()}
    for name in ITEMS:
        _check_sum(found[name], report.retrieval[name], f"{report.subject}: {name}")
    for name, of in HARD.items() if _HARD_SAFE in found else ():
        _check_sum(found[of][found[_HARD_SAFE]], report.retrieval[name], f"{report.subject}: {name}")
    return found


def flips_by_concept(reference: SafetyReport, candidate: SafetyReport) -> dict[str, dict[str, Flips]]:
    """Concept to flips of the nine metrics between two models of one report."""
    before, after = decisions_in(reference), decisions_in(candidate)
    assert candidate.items is not None
    n, result, alike = candidate.preference["GS"].n, {}, alike_in(reference)[""]
    for concept, bits in candidate.items.concepts.items():
        rows = values_of(bits, n, concept)
        k = clusters_of(alike, rows)
        ids = _numbers(int(rows.sum()))
        result[concept] = {name: flips(before[name][rows], after[name][rows], ids, k) for name in METRICS}
    return result


def _flips(before: np.ndarray, after: np.ndarray, alike: Groups) -> Flips:
    n = len(before)
    return flips(before, after, _numbers(n), clusters_of(alike, np.ones(n, dtype=bool)))


def _numbers(n: int) -> list[str]:
    return [f"#{i}" for i in range(n)]


def _hits(report: SafetyReport) -> dict[str, np.ndarray]:
    assert report.items is not None
    result = {}
    for name, part in report.zero_shot.items():
        hits = values_of(report.items.zero_shot.get(name, ""), part.n, f"{report.subject}: {name}")
        _check_sum(hits, part, f"{report.subject}: {name}")
        result[f"zero_shot.{name}"] = hits
    return result


def _check_sum(values: np.ndarray, stated: Proportion, where: str) -> None:
    """A percentage and the items it comes from must agree, or one of them was changed."""
    if len(values) != stated.n or int(values.sum()) != round(stated.value * stated.n / 100):
        raise IntegrityError(f"{where}: percentage and outcomes per item disagree", fix="verify again")
