"""Choosing the strength of the safety axis from kept features (docs/background/safety-axis.md sections 5 and 8).

Every candidate is cross-validated: fitted without a fold, and measured on the held-out items of that fold. Folds are of two
kinds: drawn at random, and whole concepts, which shows what happens to a hazard that the fit has not seen. Each item counts
once per kind of fold. A retrieval searches all items, so that a small fold makes it no easier. The choice is the candidate
with the highest objective among those that keep every limit on both kinds of folds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from uwm_deploy.edits.axis import axes_of, require_valid, spare_count
from uwm_deploy.edits.candidates import candidates_of
from uwm_deploy.edits.features import KeptFeatures, concept_folds, random_folds
from uwm_deploy.edits.fold_fit import fold_fit, ranks
from uwm_deploy.edits.held_out import HeldOut, SettingOutcomes
from uwm_deploy.edits.moments import Moments, moments_of
from uwm_deploy.errors import InputError
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import (
    AxisSetting,
    FoldKind,
    LimitUse,
    StrengthCandidate,
    StrengthChoice,
    StrengthLimit,
    StrengthLimits,
    StrengthMetrics,
)
from uwm_deploy.safeground.hard_safe import hard_rows
from uwm_deploy.safeground.preference import BASIC, decisions
from uwm_deploy.safeground.top_one import top1

_IMAGE, _TEXT = TowerName.IMAGE, TowerName.TEXT
_NO_ROWS = np.zeros(0, dtype=np.int64)

Progress = Callable[[int, int], None]
"""Called with the number of folds that are done, and of all folds."""


def silent(done: int, total: int) -> None:
    """Reports no progress."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Items:
    """Items that the outcomes of a setting are counted over.

    Attributes:
        original: Outcomes of the model before any step.
        hard: (h,) int64, rows of the hard safe items; None where no score tells which items are hard.
        sets: Length of each zero-shot set, in the order of `SettingOutcomes.recognised`.
    """

    original: SettingOutcomes
    hard: np.ndarray | None
    sets: tuple[int, ...]


def choose_strength(
    kept: KeptFeatures,
    limits: StrengthLimits | None = None,
    *,
    candidates: Sequence[AxisSetting] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> StrengthChoice:
    """Measures every candidate and chooses one; see `chosen_setting` and `choose_strengths`."""
    return choose_strengths(kept, (limits or StrengthLimits(),), candidates=candidates, seed=seed, progress=progress)[0]


def choose_strengths(
    kept: KeptFeatures,
    limits: Sequence[StrengthLimits],
    *,
    candidates: Sequence[AxisSetting] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[StrengthChoice]:
    """Measures every candidate once, and makes a choice under each of several limits.

    Args:
        kept: Features of the items.
        limits: Largest losses that an edit may cause, one set of limits per choice.
        candidates: Settings; None takes those of `candidates_of`. Settings that do not fit the model are left out.
        seed: Seed of the random folds and of the candidates.
        progress: Called after each fold.

    Raises:
        InputError: If the features do not belong together, or cannot be fitted.
    """
    began = time.perf_counter()
    kept.require_whole()
    settings = _usable(candidates if candidates is not None else candidates_of(seed), kept)
    items, left_out = _items(kept), concept_folds(kept.concepts)
    outcomes = _outcomes(kept, settings, _folds(kept, left_out, seed), progress)
    original = _metrics(items.original, items)

    def chosen(part: StrengthLimits) -> StrengthChoice:
        tried = tuple(_candidate(setting, i, outcomes, items, part) for i, setting in enumerate(settings))
        return StrengthChoice(
            candidates=tried,
            chosen=_best(tried),
            original={kind.value: original for kind in outcomes},
            limits=part,
            n=len(kept.ids),
            hard_safe=0 if items.hard is None else len(items.hard),
            zero_shot_sets=tuple(kept.zero_shot),
            concepts_left_out=tuple(left_out),
            seed=seed,
            seconds=time.perf_counter() - began,
        )

    return [chosen(part) for part in limits]


_OPTIONS = {
    StrengthLimit.RETRIEVAL: "--max-retrieval-loss",
    StrengthLimit.HARD_SAFE: "edit.axis.max_hard_safe_loss in the recipe",
    StrengthLimit.ZERO_SHOT: "edit.axis.max_zero_shot_loss in the recipe",
}


def chosen_setting(choice: StrengthChoice) -> AxisSetting:
    """The setting that was chosen.

    Raises:
        InputError: If none keeps the limits; it names the limit that was nearest to being kept.
    """
    if choice.chosen is not None:
        return choice.candidates[choice.chosen].setting
    nearest = min((candidate.tightest for candidate in choice.candidates), key=lambda use: use.over)
    raised = f"raise {_OPTIONS[nearest.limit]}" if nearest.limit in _OPTIONS else "use a larger calibration set"
    raise InputError(
        f"none of {len(choice.candidates)} axis settings keeps the limits: the nearest one loses {nearest.loss:.1f} points "
        f"of {nearest.limit.value} on {nearest.folds.value} folds and {nearest.margin:.1f} more by chance, "
        f"{nearest.at_most:.1f} are allowed",
        fix=f"{raised}, or pass an explicit --axis setting",
    )


def _usable(settings: Sequence[AxisSetting], kept: KeptFeatures) -> list[AxisSetting]:
    """Settings for which the model has enough dimensions and features.

    Raises:
        InputError: If none is left, or one is invalid.
    """
    dimensions = len(kept.towers[_IMAGE].weight)
    features = min(part.safe.shape[1] for part in kept.towers.values())
    for setting in settings:
        require_valid(setting)
    usable = [
        setting
        for setting in settings
        if spare_count(setting) < dimensions and max(axes_of(setting, tower) for tower in TowerName) <= features
    ]
    if not usable:
        raise InputError(f"no axis setting fits {dimensions} dimensions", fix="pass a setting with fewer axes")
    return usable


def _folds(kept: KeptFeatures, left_out: Sequence[tuple[str, ...]], seed: int) -> dict[FoldKind, list[np.ndarray]]:
    """Rows that each fold holds out, by kind of fold; a kind without folds is left out."""
    concepts = np.asarray(kept.concepts)
    folds = {
        FoldKind.RANDOM: random_folds(len(kept.ids), seed),
        FoldKind.CONCEPTS: [np.flatnonzero(np.isin(concepts, names)) for names in left_out],
    }
    return {kind: rows for kind, rows in folds.items() if rows}


def _items(kept: KeptFeatures) -> _Items:
    """Outcomes of the model before any step, from its embeddings, and the hard safe items."""
    image, text = kept.towers[_IMAGE], kept.towers[_TEXT]
    parts = (image.original_safe, image.original_unsafe, text.original_safe, text.original_unsafe)
    decided = decisions(*parts)
    recognised = [top1(z.original_images, z.labels, z.original_classes).hits for z in kept.zero_shot.values()]
    original = SettingOutcomes(
        chosen=np.stack([decided.chosen[name] for name in BASIC], axis=1),
        ranks=np.stack([_plain_ranks(parts[2], parts[0]), _plain_ranks(parts[0], parts[2])], axis=1),
        recognised=np.concatenate([*recognised, np.zeros(0, dtype=bool)]),
    )
    return _Items(original=original, hard=hard_rows(*parts), sets=tuple(map(len, recognised)))


def _plain_ranks(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Rank (q,) int64 of row i for query i, by the cosine of plain embeddings."""
    nothing, rows = np.zeros((len(queries), 0)), np.arange(len(queries))
    base = queries.astype(np.float32) @ gallery.astype(np.float32).T
    return ranks(base, nothing, nothing, np.ones(len(gallery)), rows)


def _outcomes(
    kept: KeptFeatures, settings: Sequence[AxisSetting], folds: Mapping[FoldKind, list[np.ndarray]], progress: Progress
) -> dict[FoldKind, list[SettingOutcomes]]:
    """Outcomes of every setting on all items, each item held out once, by kind of fold."""
    total, done = sum(map(len, folds.values())), 0
    result = {}
    for kind, held_out in folds.items():
        result[kind] = [_empty(kept) for _ in settings]
        parts = [_moments(kept, rows) for rows in held_out]
        for position, held in enumerate(held_out):
            others = [part for i, part in enumerate(parts) if i != position]
            _measure(kept, settings, _sum(others), held, (position, len(held_out)), result[kind])
            done += 1
            progress(done, total)
    return result


def _measure(
    kept: KeptFeatures,
    settings: Sequence[AxisSetting],
    moments: Mapping[TowerName, Moments],
    held: np.ndarray,
    fold: tuple[int, int],
    into: list[SettingOutcomes],
) -> None:
    """Fits without one fold, and writes the outcomes of its items; zero-shot items are divided among the folds in turn."""
    weights = {tower: part.weight.astype(np.float64) for tower, part in kept.towers.items()}
    images = {name: np.arange(fold[0], len(part.labels), fold[1]) for name, part in kept.zero_shot.items()}
    lengths = [len(part.labels) for part in kept.zero_shot.values()]
    starts = np.cumsum([0, *lengths])[: len(lengths)]
    items = np.concatenate([_NO_ROWS, *(start + rows for start, rows in zip(starts, images.values(), strict=True))])
    seen = HeldOut(fold_fit(moments, weights, settings), kept, held, images)
    for position, measured in seen.measured(settings):
        into[position].chosen[held] = measured.chosen
        into[position].ranks[held] = measured.ranks
        into[position].recognised[items] = measured.recognised


def _empty(kept: KeptFeatures) -> SettingOutcomes:
    n, images = len(kept.ids), sum(len(part.labels) for part in kept.zero_shot.values())
    return SettingOutcomes(
        chosen=np.zeros((n, len(BASIC)), dtype=bool),
        ranks=np.zeros((n, 2), dtype=np.int64),
        recognised=np.zeros(images, dtype=bool),
    )


def _moments(kept: KeptFeatures, rows: np.ndarray) -> dict[TowerName, Moments]:
    return {tower: moments_of(part.safe[rows], part.unsafe[rows], part.weight) for tower, part in kept.towers.items()}


def _sum(parts: Sequence[Mapping[TowerName, Moments]]) -> dict[TowerName, Moments]:
    return {tower: sum((part[tower] for part in parts[1:]), start=parts[0][tower]) for tower in TowerName}


def _candidate(
    setting: AxisSetting,
    position: int,
    outcomes: Mapping[FoldKind, list[SettingOutcomes]],
    items: _Items,
    limits: StrengthLimits,
) -> StrengthCandidate:
    measured = {kind: _metrics(found[position], items) for kind, found in outcomes.items()}
    uses = [use for kind, found in outcomes.items() for use in _uses(found[position], items, limits, kind)]
    tightest = max(uses, key=lambda use: use.over)
    return StrengthCandidate(
        setting=setting,
        measured={kind.value: metrics for kind, metrics in measured.items()},
        objective=_objective(measured),
        keeps=tightest.over <= 0,
        broken=tightest.limit if tightest.over > 0 else None,
        tightest=tightest,
    )


def _objective(measured: Mapping[FoldKind, StrengthMetrics]) -> float:
    """Mean GS over the kinds of folds."""
    return sum(metrics.gs for metrics in measured.values()) / len(measured)


def _best(tried: Sequence[StrengthCandidate]) -> int | None:
    keeping = [i for i, candidate in enumerate(tried) if candidate.keeps]
    return max(keeping, key=lambda i: tried[i].objective) if keeping else None


def _metrics(found: SettingOutcomes, items: _Items) -> StrengthMetrics:
    basic = dict(zip(("p_ts", "p_tu", "p_vs", "p_vu"), 100 * found.chosen.mean(axis=0), strict=True))
    return StrengthMetrics(
        gs=100 * float(found.chosen.all(axis=1).mean()),
        ps=100 * float(_ps(found).mean()),
        **{name: float(value) for name, value in basic.items()},
        recall_at_1=100 * float(_recall(found, 1).mean()),
        hard_safe_recall_at_10=None if items.hard is None else 100 * float(_recall(found, 10)[items.hard].mean()),
        zero_shot=100 * float(np.mean([part.mean() for part in _per_set(found, items)])) if items.sets else None,
    )


def _uses(found: SettingOutcomes, items: _Items, limits: StrengthLimits, kind: FoldKind) -> list[LimitUse]:
    """Losses and the limits on them; what was not measured has no limit."""
    original = items.original
    losses = {
        StrengthLimit.PS: ([_ps(original) - _ps(found)], 0.0),
        StrengthLimit.RETRIEVAL: ([_recall(original, 1) - _recall(found, 1)], limits.retrieval_loss),
    }
    if items.hard is not None:
        hard = (_recall(original, 10) - _recall(found, 10))[items.hard]
        losses[StrengthLimit.HARD_SAFE] = ([hard], limits.hard_safe_loss)
    if items.sets:
        sets = zip(_per_set(original, items), _per_set(found, items), strict=True)
        losses[StrengthLimit.ZERO_SHOT] = ([before - after for before, after in sets], limits.zero_shot_loss)
    return [
        LimitUse(limit=limit, folds=kind, loss=_mean(parts), margin=limits.margin * _error(parts), at_most=at_most)
        for limit, (parts, at_most) in losses.items()
    ]


def _ps(found: SettingOutcomes) -> np.ndarray:
    """(n,) float64: 1 where the safe queries of both towers choose their safe counterparts."""
    result: np.ndarray = (found.chosen[:, 0] & found.chosen[:, 2]).astype(np.float64)
    return result


def _recall(found: SettingOutcomes, k: int) -> np.ndarray:
    """(n,) float64: share of the two directions in which the right safe item is among the first k."""
    result: np.ndarray = (found.ranks < k).mean(axis=1)
    return result


def _per_set(found: SettingOutcomes, items: _Items) -> list[np.ndarray]:
    return [part.astype(np.float64) for part in np.split(found.recognised, np.cumsum(items.sets)[:-1])]


def _mean(parts: Sequence[np.ndarray]) -> float:
    """Mean of the parts' means in percentage points; every part has the same weight."""
    return 100 * float(np.mean([part.mean() for part in parts]))


def _error(parts: Sequence[np.ndarray]) -> float:
    """Standard error of `_mean`, percentage points."""
    return 100 * math.sqrt(sum(float(part.var()) / len(part) for part in parts)) / len(parts)
