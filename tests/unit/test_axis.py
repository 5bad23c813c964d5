"""The closed-form edit: what its parts promise, what it refuses, and that rounding does not choose its axes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from uwm_deploy.edits.axis import AffineMap, maps_of, repelling_rows, require_valid, ridged, score_direction
from uwm_deploy.edits.eigen import least_eigenvectors, top_eigenvectors
from uwm_deploy.edits.fold import folded_into_bias, folded_into_norm, with_bias, with_one
from uwm_deploy.edits.leace import eraser, leace_maps
from uwm_deploy.edits.moments import Moments, moments_of
from uwm_deploy.errors import DataError, InputError, IntegrityError
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting

SETTING = AxisSetting(g=0.6, o=0.5, kappa=0.4, a=0.5, tau=0.0)
REPELLING = replace(SETTING, tau=0.5, axes=2, repel_image=0.2, repel_text=0.1)


def _pairs(seed: int, n: int = 80, m: int = 10) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    safe = rng.normal(size=(n, m)) + rng.normal(size=m)
    return safe, safe + rng.normal(size=m) + 0.5 * rng.normal(size=(n, m))


def _world(
    d: int, m: int = 10, n: int = 80
) -> tuple[dict[TowerName, tuple[np.ndarray, np.ndarray]], dict[TowerName, np.ndarray]]:
    rng = np.random.default_rng(d)
    pairs = {tower: _pairs(d + seed, n, m) for seed, tower in enumerate(TowerName)}
    return pairs, {tower: rng.normal(size=(d, m)) / np.sqrt(m) for tower in TowerName}


def _moments(pairs: dict, weights: dict) -> dict[TowerName, Moments]:
    return {tower: moments_of(*pairs[tower], weights[tower]) for tower in TowerName}


def test_the_score_is_anchored() -> None:
    """The score is 0 on the mean safe input and -1 on the mean unsafe one, whatever its covariance is made of."""
    safe, unsafe = _pairs(1)
    moments = moments_of(safe, unsafe, np.eye(10))
    for a in (0.0, 0.3, 1.0):
        w = score_direction(moments, a, 1e-2)
        assert w @ (moments.mean_safe - moments.mean_safe) == 0
        assert w @ (unsafe.mean(0) - safe.mean(0)) == pytest.approx(-1)


def test_content_is_kept_and_the_spare_axes_carry_the_score() -> None:
    """Off the spare axes an embedding is what it was; on its own axis lies the score, on the other one a constant."""
    pairs, weights = _world(8)
    moments = _moments(pairs, weights)
    edit = maps_of(moments, weights, SETTING)
    keep = np.eye(8) - edit.spare @ edit.spare.T
    np.testing.assert_allclose(edit.spare.T @ edit.spare, np.eye(2), atol=1e-12)
    for tower, own in ((TowerName.IMAGE, 0), (TowerName.TEXT, 1)):
        before, after = pairs[tower][0] @ weights[tower].T, edit.maps[tower].apply(pairs[tower][0])
        np.testing.assert_allclose(after @ keep, before @ keep, atol=1e-12)
        length = moments[tower].mean_length
        assert (after @ edit.spare[:, own]).mean() == pytest.approx(0.6 * 0.5 * length)
        np.testing.assert_allclose(after @ edit.spare[:, 1 - own], 0.4 * length)
        unsafe = edit.maps[tower].apply(pairs[tower][1])
        assert (unsafe @ edit.spare[:, own]).mean() == pytest.approx(0.6 * (0.5 - 1) * length)
    np.testing.assert_array_equal(edit.constant_axis(TowerName.IMAGE), edit.spare[:, 1])
    np.testing.assert_array_equal(edit.constant_axis(TowerName.TEXT), edit.spare[:, 0])


def test_every_repelling_axis_is_a_spare_one_of_its_own() -> None:
    """Image axes come first, then the text tower's; a tower without a gain takes none, and u1, u2 stay."""
    pairs, weights = _world(9)
    moments = _moments(pairs, weights)
    both = maps_of(moments, weights, REPELLING)
    text = maps_of(moments, weights, replace(REPELLING, repel_image=0.0))
    assert both.spare.shape == (9, 6)
    assert text.spare.shape == (9, 4)
    np.testing.assert_allclose(both.spare.T @ both.spare, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(text.spare, both.spare[:, :4], atol=1e-12)
    on_axes = both.spare.T @ both.maps[TowerName.TEXT].weight
    np.testing.assert_allclose(on_axes[2:4], 0, atol=1e-12)
    assert np.abs(on_axes[4:6]).min(axis=1).all()


def test_repelling_rows_are_white_on_safe_inputs() -> None:
    """R S R' is the identity, so the length that safe inputs gain stays near its mean."""
    moments = moments_of(*_pairs(2), np.eye(10))
    rows = repelling_rows(moments, 4, 1e-2)
    np.testing.assert_allclose(rows @ ridged(moments.covariance_safe, 1e-2) @ rows.T, np.eye(4), atol=1e-9)
    gains = np.diag(rows @ moments.gram_difference @ rows.T)
    assert (np.diff(gains) < 0).all()


@pytest.mark.parametrize("d", [8, 14, 40])
@pytest.mark.parametrize("setting", [SETTING, REPELLING])
def test_rounding_chooses_no_axis(d: int, setting: AxisSetting) -> None:
    """A change of 1e-13, or another order of the sums, leaves the maps as they are, also where a null space is wide."""
    pairs, weights = _world(d)
    expected = maps_of(_moments(pairs, weights), weights, setting)
    rng = np.random.default_rng(0)
    order = rng.permutation(80)
    nudged = {t: tuple(x * (1 + 1e-13 * rng.normal(size=x.shape)) for x in pair) for t, pair in pairs.items()}
    for changed in (nudged, {t: tuple(x[order] for x in pair) for t, pair in pairs.items()}):
        again = maps_of(_moments(changed, weights), weights, setting)
        np.testing.assert_allclose(again.spare, expected.spare, atol=1e-6)
        for tower in TowerName:
            np.testing.assert_allclose(again.maps[tower].weight, expected.maps[tower].weight, atol=1e-6)
            np.testing.assert_allclose(again.maps[tower].bias, expected.maps[tower].bias, atol=1e-6)


def test_few_items_have_a_null_space_too() -> None:
    """With fewer items than dimensions the spare axes hold no content, and more repelling axes than pairs still fit."""
    pairs, weights = _world(30, m=30, n=4)
    edit = maps_of(_moments(pairs, weights), weights, replace(REPELLING, axes=6))
    for tower in TowerName:
        for rows in pairs[tower]:
            np.testing.assert_allclose(rows @ weights[tower].T @ edit.spare[:, :2], 0, atol=1e-9)
        assert np.isfinite(edit.maps[tower].weight).all()


def test_a_null_space_has_one_basis() -> None:
    """Any rotation of the vectors inside a null space gives the same columns, and equal pivots fall to the first."""
    values = np.diag([0.0, 0.0, 0.0, 1.0, 2.0])
    rotation, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(5, 5)))
    matrix = rotation @ values @ rotation.T
    noise = 1e-14 * np.random.default_rng(4).normal(size=(5, 5))
    np.testing.assert_allclose(
        least_eigenvectors(matrix, 4), least_eigenvectors(matrix + noise + noise.T, 4), atol=1e-9
    )
    np.testing.assert_allclose(top_eigenvectors(matrix, 5), top_eigenvectors(matrix + noise + noise.T, 5), atol=1e-9)
    np.testing.assert_allclose(least_eigenvectors(values, 3), np.eye(5)[:, :3], atol=1e-12)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"g": float("nan")}, "g"),
        ({"kappa": float("inf")}, "kappa"),
        ({"a": -0.1}, "a"),
        ({"a": 1.1}, "a"),
        ({"tau": -0.5}, "tau"),
        ({"rho": 0.0}, "rho"),
        ({"axes": -1}, "axes"),
        ({"axes": 3, "repel_image": 0.1, "repel_text": 0.1}, "spare axes"),
    ],
)
def test_a_setting_without_a_meaning_is_refused(change: dict[str, float], name: str) -> None:
    """Numbers out of range, and more axes than dimensions, are usage errors that name the value."""
    pairs, weights = _world(8)
    setting = replace(SETTING, **change)
    with pytest.raises(InputError, match=name):
        maps_of(_moments(pairs, weights), weights, setting)


def test_a_setting_is_checked_before_a_model_is_known() -> None:
    """Without the dimensions only what does not depend on them is refused."""
    require_valid(replace(SETTING, axes=100, repel_text=0.1))
    with pytest.raises(InputError, match="tau"):
        require_valid(replace(SETTING, tau=-1.0))


def test_data_that_cannot_be_fitted_is_refused() -> None:
    """One pair, pairs without a difference, inputs that do not vary, one tower alone: errors, never numbers."""
    pairs, weights = _world(8)
    moments = _moments(pairs, weights)
    safe = pairs[TowerName.TEXT][0]
    bad = {
        "too few": moments_of(safe[:1], safe[:1] + 1, weights[TowerName.TEXT]),
        "same mean": moments_of(safe, safe, weights[TowerName.TEXT]),
        "do not vary": moments_of(np.ones((5, 10)), np.zeros((5, 10)), weights[TowerName.TEXT]),
    }
    for message, broken in bad.items():
        with pytest.raises(DataError, match=message):
            maps_of({**moments, TowerName.TEXT: broken}, weights, replace(SETTING, a=1.0))
    with pytest.raises(InputError, match="missing"):
        maps_of({TowerName.TEXT: moments[TowerName.TEXT]}, weights, SETTING)
    with pytest.raises(InputError, match="dimensions"):
        maps_of(moments, {**weights, TowerName.TEXT: weights[TowerName.TEXT][:-1]}, SETTING)
    with pytest.raises(InputError, match="features"):
        maps_of(moments, {**weights, TowerName.TEXT: weights[TowerName.TEXT][:, 1:]}, SETTING)


def test_moments_refuse_what_is_not_a_number() -> None:
    """NaN, infinity and rows that do not pair up never get into a sum."""
    safe, unsafe = _pairs(0)
    broken = safe.copy()
    broken[3, 2] = np.nan
    with pytest.raises(DataError, match="NaN"):
        moments_of(broken, unsafe, np.eye(10))
    with pytest.raises(DataError, match="unsafe"):
        moments_of(safe, np.where(np.isnan(broken), np.inf, unsafe), np.eye(10))
    with pytest.raises(DataError, match="shapes"):
        moments_of(safe, unsafe[1:], np.eye(10))
    with pytest.raises(DataError, match="cannot be added"):
        moments_of(safe, unsafe, np.eye(10)) + moments_of(safe[:, 1:], unsafe[:, 1:], np.eye(9))


def test_moments_survive_a_file() -> None:
    """Arrays of both towers lie in one file; what is missing, of another type or not finite is refused by name."""
    moments = moments_of(*_pairs(0), np.eye(10))
    tensors = moments.to_tensors("image") | moments.to_tensors("text")
    again = Moments.from_tensors(tensors, "image")
    assert (again.count, again.length_sum) == (80, moments.length_sum)
    np.testing.assert_array_equal(again.gram_cross, moments.gram_cross)
    gram = tensors["image.gram_safe"]
    for value in (gram[:, 1:], gram.astype(np.float32), np.where(gram > 0, np.nan, gram)):
        with pytest.raises(IntegrityError, match=r"image\.gram_safe"):
            Moments.from_tensors({**tensors, "image.gram_safe": value}, "image")
    with pytest.raises(IntegrityError, match=r"other\.sum_safe is missing"):
        Moments.from_tensors(tensors, "other")


def test_a_fold_that_cannot_be_exact_is_refused() -> None:
    """A gamma of (nearly) zero, and a constant that the projection cannot reach because m < d, name the other placement."""
    pairs, weights = _world(10)
    edit = maps_of(_moments(pairs, weights), weights, SETTING)
    wanted, carrier = edit.maps[TowerName.IMAGE], edit.constant_axis(TowerName.IMAGE)
    for small in (0.0, 1e-7, np.nan):
        gamma = np.ones(10)
        gamma[3] = small
        with pytest.raises(InputError, match="placement embedding"):
            folded_into_norm(wanted, gamma, np.zeros(10), carrier)
    pairs, weights = _world(14)
    edit = maps_of(_moments(pairs, weights), weights, SETTING)
    with pytest.raises(InputError, match="is missing; use the placement embedding"):
        folded_into_norm(edit.maps[TowerName.IMAGE], np.ones(10), np.ones(10), edit.constant_axis(TowerName.IMAGE))


def test_a_projection_with_a_bias_takes_the_constant() -> None:
    """Fitted on inputs with a constant 1, the edit is a new weight and a new bias, exactly."""
    pairs, weights = _world(8)
    bias = {tower: np.random.default_rng(1).normal(size=8) for tower in TowerName}
    pairs = {tower: (with_one(safe), with_one(unsafe)) for tower, (safe, unsafe) in pairs.items()}
    weights = {tower: with_bias(weights[tower], bias[tower]) for tower in TowerName}
    for setting in (SETTING, REPELLING):
        edit = maps_of(_moments(pairs, weights), weights, setting)
        for tower in TowerName:
            folded = folded_into_bias(edit.maps[tower])
            rows = pairs[tower][0]
            np.testing.assert_allclose(
                rows[:, :-1] @ folded.weight.T + folded.bias, edit.maps[tower].apply(rows), atol=1e-12
            )


def _erased(m: int) -> tuple[np.ndarray, np.ndarray, AffineMap]:
    safe, unsafe = _pairs(7, m=m)
    return safe, unsafe, eraser(moments_of(safe, unsafe, np.eye(m)))


@pytest.mark.parametrize("rank", [10, 6])
def test_nothing_linear_is_left_after_the_eraser(rank: int) -> None:
    """Class means are equal, so the best linear probe is a constant; also where the features fill a subspace only."""
    safe, unsafe = (rows @ np.random.default_rng(9).normal(size=(rank, 10)) for rows in _pairs(7, m=rank))
    erase = eraser(moments_of(safe, unsafe, np.eye(10)))
    np.testing.assert_allclose(erase.apply(safe).mean(0), erase.apply(unsafe).mean(0), atol=1e-9)
    rows = np.concatenate([erase.apply(safe), erase.apply(unsafe)])
    label = np.repeat([1.0, 0.0], len(safe))
    probe = np.linalg.lstsq(with_one(rows), label, rcond=1e-9)[0]
    np.testing.assert_allclose(with_one(rows) @ probe, 0.5, atol=1e-6)
    centre = np.concatenate([safe, unsafe]).mean(0)
    np.testing.assert_allclose(erase.apply(centre[None])[0], centre, atol=1e-9)


def test_the_eraser_changes_least() -> None:
    """No other affine map without class information is nearer to the identity in mean square.

    Such maps are those with ``A d = 0``; the best of them solves a least-squares problem with that constraint, here by a
    basis of the directions that A may read.
    """
    safe, unsafe, erase = _erased(10)
    rows = np.concatenate([safe, unsafe])
    delta = safe.mean(0) - unsafe.mean(0)
    readable = np.linalg.svd(delta[None])[2][1:]
    inputs = with_one(rows @ readable.T)
    best = inputs @ np.linalg.lstsq(inputs, rows, rcond=None)[0]
    np.testing.assert_allclose(erase.apply(rows), best, atol=1e-9)


def test_leace_goes_through_the_projection() -> None:
    """The baseline's map is the eraser, then W; equal class means stay equal."""
    pairs, weights = _world(8)
    maps = leace_maps(_moments(pairs, weights), weights)
    for tower in TowerName:
        safe, unsafe = (maps[tower].apply(rows) for rows in pairs[tower])
        np.testing.assert_allclose(safe.mean(0), unsafe.mean(0), atol=1e-12)
    with pytest.raises(DataError, match="same mean"):
        eraser(moments_of(np.ones((4, 3)), np.ones((4, 3)), np.eye(3)))
