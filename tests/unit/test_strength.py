"""The choice of strength on a small world: what is chosen keeps the limits, and the numbers are those of the slow way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from uwm_deploy.edits.axis import maps_of, require_valid
from uwm_deploy.edits.candidates import PRESETS, candidates_of
from uwm_deploy.edits.features import KeptFeatures, TowerFeatures, ZeroShotFeatures, concept_folds, random_folds
from uwm_deploy.edits.moments import moments_of
from uwm_deploy.edits.strength import choose_strength, chosen_setting
from uwm_deploy.errors import DataError, InputError
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import (
    AxisSetting,
    FoldKind,
    StrengthChoice,
    StrengthLimit,
    StrengthLimits,
    StrengthMetrics,
)
from uwm_deploy.safeground.hard_safe import hard_rows
from uwm_deploy.safeground.preference import decisions
from uwm_deploy.safeground.top_one import top1

IMAGE, TEXT = TowerName.IMAGE, TowerName.TEXT
SETTINGS = (
    AxisSetting(g=0.02, o=0.5, kappa=0.01, a=1.0, tau=0.0),
    AxisSetting(g=0.3, o=0.5, kappa=0.3, a=0.5, tau=0.0),
    AxisSetting(g=0.3, o=1.0, kappa=0.6, a=0.5, tau=0.0),
    AxisSetting(g=0.6, o=0.0, kappa=0.0, a=1.0, tau=0.3, rho=3e-2, axes=2, repel_text=0.1),
    AxisSetting(g=0.5, o=1.0, kappa=0.4, a=0.5, tau=0.5, axes=3, repel_image=0.2, repel_text=0.1),
    AxisSetting(g=2.0, o=2.0, kappa=3.0, a=0.5, tau=1.0, axes=1, repel_image=0.3),
)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _kept(n: int = 150, d: int = 14, m: int = 12, concepts: int = 6) -> KeptFeatures:
    """Images and texts of one content, with a direction per concept that makes them unsafe; two zero-shot sets."""
    rng = np.random.default_rng(0)
    content, names = rng.normal(size=(n, 9)), rng.integers(concepts, size=n)
    content[:, 7:] *= 0.3  # two dimensions hold what is unsafe, and little else
    angles = rng.uniform(0, 1.5, size=concepts)[names]
    unsafe = content + 0.2 * rng.normal(size=(n, 9))
    unsafe[:, 7:] += np.stack([np.cos(angles), np.sin(angles)], axis=1)
    mixing = rng.normal(size=(9, m))
    to_joint = rng.normal(size=(d, m)) / np.sqrt(m)
    classes = rng.normal(size=(5, 9)) * ([1.0] * 7 + [0.3] * 2)
    labels = rng.integers(5, size=41)
    pictures = classes[labels] + 0.5 * rng.normal(size=(41, 9)) * ([1.0] * 7 + [0.3] * 2)

    def seen(rows: np.ndarray) -> np.ndarray:
        return (rows @ mixing + 0.3 * rng.normal(size=(len(rows), m)) + 1).astype(np.float32)

    towers = {}
    for tower in TowerName:
        safe, not_safe, weight = seen(content), seen(unsafe), to_joint.astype(np.float32)
        towers[tower] = TowerFeatures(
            safe=safe,
            unsafe=not_safe,
            weight=weight,
            original_safe=_unit(safe @ weight.T),
            original_unsafe=_unit(not_safe @ weight.T),
        )
    z, c = seen(pictures), seen(classes)
    weight = to_joint.astype(np.float32)
    zero_shot = {
        name: ZeroShotFeatures(
            images=z[rows],
            labels=labels[rows],
            classes=c,
            original_images=_unit(z[rows] @ weight.T),
            original_classes=_unit(c @ weight.T),
        )
        for name, rows in {"first": np.arange(30), "second": np.arange(30, 41)}.items()
    }
    return KeptFeatures(
        ids=tuple(str(i) for i in range(n)),
        concepts=tuple(f"concept-{i}" for i in names),
        towers=towers,
        zero_shot=zero_shot,
    )


LOOSE = StrengthLimits(retrieval_loss=60, hard_safe_loss=60, zero_shot_loss=60)


@pytest.fixture(scope="module")
def kept() -> KeptFeatures:
    return _kept()


@pytest.fixture(scope="module")
def choice(kept: KeptFeatures) -> StrengthChoice:
    return choose_strength(kept, LOOSE, candidates=SETTINGS)


def _slowly(kept: KeptFeatures, setting: AxisSetting, folds: list[np.ndarray]) -> StrengthMetrics:
    """Each fold with `maps_of`, whole embeddings and the functions of the evaluation."""
    n = len(kept.ids)
    originals = [
        getattr(kept.towers[tower], name) for tower in TowerName for name in ("original_safe", "original_unsafe")
    ]
    hard = hard_rows(*originals)
    chosen, ranks = np.zeros((4, n), dtype=bool), np.zeros((2, n))
    hits = {name: np.zeros(len(part.labels), dtype=bool) for name, part in kept.zero_shot.items()}
    for position, held in enumerate(folds):
        rest = np.setdiff1d(np.arange(n), held)
        moments = {t: moments_of(p.safe[rest], p.unsafe[rest], p.weight) for t, p in kept.towers.items()}
        maps = maps_of(moments, {t: p.weight for t, p in kept.towers.items()}, setting).maps
        safe = {t: _unit(maps[t].apply(p.safe)) for t, p in kept.towers.items()}
        unsafe = {t: _unit(maps[t].apply(p.unsafe[held])) for t, p in kept.towers.items()}
        decided = decisions(safe[IMAGE][held], unsafe[IMAGE], safe[TEXT][held], unsafe[TEXT])
        chosen[:, held] = [decided.chosen[name] for name in ("P_ts", "P_tu", "P_vs", "P_vu")]
        for row, (query, gallery) in enumerate(((TEXT, IMAGE), (IMAGE, TEXT))):
            similarity = safe[query][held] @ safe[gallery].T
            right = similarity[np.arange(len(held)), held]
            ranks[row, held] = (similarity >= right[:, None] - 1e-9).sum(1) - 1
        for name, part in kept.zero_shot.items():
            rows = np.arange(position, len(part.labels), len(folds))
            images, classes = maps[IMAGE].apply(part.images[rows]), maps[TEXT].apply(part.classes)
            hits[name][rows] = top1(_unit(images), part.labels[rows], _unit(classes)).hits
    return StrengthMetrics(
        gs=100 * chosen.all(0).mean(),
        ps=100 * (chosen[0] & chosen[2]).mean(),
        **dict(zip(("p_ts", "p_tu", "p_vs", "p_vu"), 100 * chosen.mean(1), strict=True)),
        recall_at_1=100 * (ranks < 1).mean(),
        hard_safe_recall_at_10=100 * (ranks[:, hard] < 10).mean(),
        zero_shot=100 * np.mean([part.mean() for part in hits.values()]),
    )


def test_numbers_equal_the_slow_way(kept: KeptFeatures, choice: StrengthChoice) -> None:
    """Low-rank similarities per fold give what mapping, normalising and evaluating each fold gives, for every setting."""
    concepts = np.array(kept.concepts)
    folds = {
        FoldKind.RANDOM: random_folds(len(concepts), 0),
        FoldKind.CONCEPTS: [np.flatnonzero(np.isin(concepts, names)) for names in choice.concepts_left_out],
    }
    for candidate in choice.candidates:
        for kind, held in folds.items():
            slow, fast = _slowly(kept, candidate.setting, held), candidate.measured[kind.value]
            for name in StrengthMetrics.__slots__:
                assert getattr(fast, name) == pytest.approx(getattr(slow, name)), (candidate.setting, kind, name)


def test_an_edit_of_nothing_measures_the_original(kept: KeptFeatures) -> None:
    """With hardly any strength and no spare content, numbers are the original's, and all limits of zero are kept."""
    nothing = AxisSetting(g=1e-6, o=0.0, kappa=0.0, a=1.0, tau=0.0)
    tight = StrengthLimits(retrieval_loss=0, hard_safe_loss=0, zero_shot_loss=0)
    found = choose_strength(kept, tight, candidates=[nothing])
    assert found.chosen == 0
    for kind in FoldKind:
        for name in StrengthMetrics.__slots__:
            expected = getattr(found.original[kind.value], name)
            assert getattr(found.candidates[0].measured[kind.value], name) == pytest.approx(expected)


def test_what_is_chosen_keeps_the_limits(kept: KeptFeatures) -> None:
    """The chosen one has the highest objective of those that keep every limit, margin included, on both kinds of folds."""
    limits = StrengthLimits(retrieval_loss=15, hard_safe_loss=15, zero_shot_loss=15)
    choice = choose_strength(kept, limits, candidates=SETTINGS)
    assert choice.chosen is not None
    best = choice.candidates[choice.chosen]
    assert chosen_setting(choice) == best.setting == SETTINGS[1]
    assert any(not candidate.keeps for candidate in choice.candidates)
    for candidate in choice.candidates:
        assert candidate.keeps == (candidate.broken is None) == (candidate.tightest.over <= 0)
        assert not candidate.keeps or candidate.objective <= best.objective
    for kind, original in choice.original.items():
        measured = best.measured[kind]
        assert measured.ps >= original.ps
        assert original.recall_at_1 - measured.recall_at_1 <= 15
        assert original.hard_safe_recall_at_10 - measured.hard_safe_recall_at_10 <= 15
        assert original.zero_shot - measured.zero_shot <= 15
    assert best.measured[FoldKind.RANDOM.value].gs > choice.original[FoldKind.RANDOM.value].gs


@pytest.mark.parametrize(
    ("limit", "name", "tight"),
    [
        (StrengthLimit.PS, "ps", {}),
        (StrengthLimit.RETRIEVAL, "recall_at_1", {"retrieval_loss": -1000.0}),
        (StrengthLimit.HARD_SAFE, "hard_safe_recall_at_10", {"hard_safe_loss": -1000.0}),
        (StrengthLimit.ZERO_SHOT, "zero_shot", {"zero_shot_loss": -1000.0}),
    ],
)
def test_a_limit_is_on_the_number_that_is_reported(
    kept: KeptFeatures, limit: StrengthLimit, name: str, tight: dict[str, float]
) -> None:
    """Of each limit, what a setting uses up is what its numbers lie below the original's, on the worse kind of folds."""
    wide = {"retrieval_loss": 1000.0, "hard_safe_loss": 1000.0, "zero_shot_loss": 1000.0}
    limits = StrengthLimits(margin=0, **wide | tight)
    found = choose_strength(kept, limits, candidates=SETTINGS)
    for candidate in found.candidates:
        losses = [getattr(found.original[k], name) - getattr(candidate.measured[k], name) for k in found.original]
        assert candidate.tightest.limit is limit
        assert candidate.tightest.loss == pytest.approx(max(losses), abs=1e-9)


def test_a_margin_makes_limits_tighter(kept: KeptFeatures) -> None:
    """More standard errors leave fewer settings, and the margin is a part of what is recorded."""
    kept_ones = []
    for margin in (0.0, 1.0, 8.0):
        choice = choose_strength(kept, replace(LOOSE, retrieval_loss=12, margin=margin), candidates=SETTINGS)
        kept_ones.append(sum(candidate.keeps for candidate in choice.candidates))
        assert (choice.candidates[-1].tightest.margin > 0) == (margin > 0)
    assert kept_ones == sorted(kept_ones, reverse=True)
    assert kept_ones[0] > kept_ones[-1]


@pytest.mark.parametrize(
    ("change", "limit", "way_out"),
    [
        ({"retrieval_loss": -200.0}, StrengthLimit.RETRIEVAL, "raise --max-retrieval-loss"),
        ({"hard_safe_loss": -200.0}, StrengthLimit.HARD_SAFE, r"raise edit\.axis\.\w+ in the recipe"),
        ({"zero_shot_loss": -200.0}, StrengthLimit.ZERO_SHOT, r"raise edit\.axis\.\w+ in the recipe"),
    ],
)
def test_an_impossible_limit_is_named(
    kept: KeptFeatures, change: dict[str, float], limit: StrengthLimit, way_out: str
) -> None:
    """Nothing is chosen, and the error says which limit was nearest to being kept, by how much, and what to do."""
    choice = choose_strength(kept, replace(LOOSE, **change), candidates=SETTINGS)
    assert choice.chosen is None
    assert {candidate.broken for candidate in choice.candidates} == {limit}
    with pytest.raises(InputError, match=rf"points of {limit.value} .*-200.0 are allowed; {way_out}, or .* --axis"):
        chosen_setting(choice)


def test_the_choice_is_the_same_every_time(kept: KeptFeatures, choice: StrengthChoice) -> None:
    """Two runs differ in their wall time only, and the record survives JSON."""
    again = choose_strength(kept, LOOSE, candidates=SETTINGS)
    assert replace(again, seconds=0.0) == replace(choice, seconds=0.0)
    assert record_from_json(StrengthChoice, json_from_record(choice), where="strength.json") == choice


def test_every_fold_is_reported(kept: KeptFeatures) -> None:
    """Progress counts the folds of both kinds."""
    told: list[tuple[int, int]] = []
    choose_strength(kept, LOOSE, candidates=SETTINGS[:1], progress=lambda done, total: told.append((done, total)))
    assert told == [(i, 8) for i in range(1, 9)]


def test_without_zero_shot_sets_there_is_no_such_limit(kept: KeptFeatures) -> None:
    """It is recorded as not measured, never as a number, and does not stand in the way."""
    choice = choose_strength(
        replace(kept, zero_shot={}), replace(LOOSE, zero_shot_loss=-200.0), candidates=SETTINGS[:2]
    )
    assert choice.zero_shot_sets == ()
    assert choice.original[FoldKind.RANDOM.value].zero_shot is None
    assert all(part.zero_shot is None for candidate in choice.candidates for part in candidate.measured.values())
    assert choice.chosen is not None
    json_from_record(choice)


def test_one_concept_has_no_folds_of_concepts(kept: KeptFeatures) -> None:
    """Nothing would be left to fit; the record says so by having no such kind."""
    choice = choose_strength(replace(kept, concepts=("fire",) * 150), LOOSE, candidates=SETTINGS[:2])
    assert choice.concepts_left_out == ()
    assert set(choice.original) == {FoldKind.RANDOM.value}


def test_embeddings_are_enough(kept: KeptFeatures) -> None:
    """The placement `embedding`: x is the embedding of length 1, the weight the identity."""
    towers = {
        tower: replace(part, safe=part.original_safe, unsafe=part.original_unsafe, weight=np.eye(14))
        for tower, part in kept.towers.items()
    }
    sets = {
        name: replace(part, images=part.original_images, classes=part.original_classes)
        for name, part in kept.zero_shot.items()
    }
    choice = choose_strength(replace(kept, towers=towers, zero_shot=sets), LOOSE, candidates=SETTINGS[:2])
    assert choice.chosen is not None


def test_concepts_are_dealt_by_size() -> None:
    """Larger ones first, each to the fold with the fewest items; fewer than four concepts make as many folds."""
    concepts = ["a"] * 9 + ["b"] * 5 + ["c"] * 4 + ["d"] * 3 + ["e"] * 2 + ["f"]
    assert concept_folds(concepts) == [("a",), ("b",), ("c", "f"), ("d", "e")]
    assert concept_folds(["a", "b", "b", "c"]) == [("b",), ("a",), ("c",)]
    assert concept_folds(["a", "a"]) == []


def test_random_folds_hold_every_item_out_once() -> None:
    """Folds differ by at most one item in size, and another seed deals them differently."""
    folds = random_folds(150, 3)
    assert sorted(np.concatenate(folds)) == list(range(150))
    assert {len(fold) for fold in folds} == {37, 38}
    assert any((a != b).any() for a, b in zip(folds, random_folds(150, 4), strict=True) if len(a) == len(b))


def test_settings_that_do_not_fit_are_left_out(kept: KeptFeatures) -> None:
    """A candidate with more axes than the model has dimensions is no candidate; without any there is an error."""
    wide = replace(SETTINGS[3], axes=12)
    choice = choose_strength(kept, LOOSE, candidates=(*SETTINGS[:2], wide))
    assert [candidate.setting for candidate in choice.candidates] == list(SETTINGS[:2])
    with pytest.raises(InputError, match="no axis setting fits 14 dimensions"):
        choose_strength(kept, LOOSE, candidates=[wide])
    with pytest.raises(InputError, match="rho"):
        choose_strength(kept, LOOSE, candidates=[replace(SETTINGS[0], rho=-1.0)])


def test_features_that_do_not_belong_together_are_refused(kept: KeptFeatures) -> None:
    """Too few items, missing rows and NaN are named, never measured."""
    text = kept.towers[TEXT]
    broken = text.unsafe.copy()
    broken[7, 3] = np.nan
    wrong = {
        "text unsafe has 149 rows for 150": replace(text, unsafe=text.unsafe[1:]),
        "text unsafe holds NaN": replace(text, unsafe=broken),
    }
    for message, part in wrong.items():
        with pytest.raises(DataError, match=message):
            choose_strength(replace(kept, towers={**kept.towers, TEXT: part}), LOOSE)
    with pytest.raises(DataError, match="concepts has 149 rows"):
        choose_strength(replace(kept, concepts=kept.concepts[1:]), LOOSE)
    with pytest.raises(DataError, match="19 items are too few"):
        choose_strength(_kept(n=19), LOOSE)


def test_candidates_are_the_same_every_time() -> None:
    """The list begins with the presets, holds no setting without a meaning, and depends on nothing but the seed."""
    settings = candidates_of(0)
    assert settings == candidates_of(0) != candidates_of(1)
    assert settings[: len(PRESETS)] == tuple(PRESETS.values())
    assert 200 <= len(settings) <= 300
    for setting in settings:
        require_valid(setting, 64)
