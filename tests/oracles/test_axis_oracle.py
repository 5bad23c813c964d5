"""The closed-form edit and its fold against the slow formulas."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracles import axis_oracle as oracle
from uwm_deploy.edits.axis import maps_of
from uwm_deploy.edits.fold import folded_into_norm
from uwm_deploy.edits.moments import Moments, moments_of
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting

LETTER = {TowerName.IMAGE: "v", TowerName.TEXT: "t"}


def _world(seed: int, n: int = 61, m: tuple[int, int] = (13, 11), d: int = 9) -> tuple[dict, dict]:
    """Random pooled features of odd sizes whose unsafe members are shifted, and two projections."""
    rng = np.random.default_rng(seed)
    x, weights = {}, {}
    for letter, size in zip("vt", m, strict=True):
        mixing = rng.normal(size=(size, size)) / np.sqrt(size)
        safe = rng.normal(size=(n, size)) @ mixing + rng.normal(size=size)
        x[letter + "s"] = safe
        x[letter + "u"] = safe + 0.7 * rng.normal(size=size) + 0.5 * rng.normal(size=(n, size)) @ mixing
        weights[letter] = rng.normal(size=(d, size)) / np.sqrt(size)
    return x, weights


def _normalised(x: dict, weights: dict) -> tuple[dict, dict]:
    """The placement `embedding`: x is the embedding of length 1, the weight the identity."""
    unit = {key: rows @ weights[key[0]].T for key, rows in x.items()}
    unit = {key: e / np.linalg.norm(e, axis=1, keepdims=True) for key, e in unit.items()}
    return unit, {letter: np.eye(len(weights[letter])) for letter in "vt"}


def _moments(x: dict, weights: dict, batch: int = 10**6) -> dict[TowerName, Moments]:
    result = {}
    for tower, letter in LETTER.items():
        safe, unsafe = x[letter + "s"], x[letter + "u"]
        parts = [
            moments_of(safe[i : i + batch], unsafe[i : i + batch], weights[letter]) for i in range(0, len(safe), batch)
        ]
        result[tower] = sum(parts[1:], start=parts[0])
    return result


def _weights(weights: dict) -> dict[TowerName, np.ndarray]:
    return {tower: weights[letter] for tower, letter in LETTER.items()}


@pytest.mark.parametrize("placement", ["weights", "embedding"])
@pytest.mark.parametrize("axes", [0, 1, 3])
@pytest.mark.parametrize("tau", [0.0, 0.6])
@pytest.mark.parametrize("h", [(0.2, 0.1), (0.0, 0.3)])
def test_maps_equal_the_formulas(placement: str, axes: int, tau: float, h: tuple[float, float]) -> None:
    """Edited embeddings of unseen inputs equal formulas 1 to 5, with and without repelling axes and redirect."""
    x, weights = _world(axes + int(10 * tau))
    new, _ = _world(99)
    if placement == "embedding":
        new, _ = _normalised(new, weights)
        x, weights = _normalised(x, weights)
    parts = {"g": 0.6, "o": 0.4, "kappa": 0.3, "a": 0.7, "tau": tau, "rho": 2e-2}
    h = h if axes else (0.0, 0.0)  # gains need axes: a setting with gains alone is refused
    setting = AxisSetting(**parts, axes=axes, repel_image=h[0], repel_text=h[1])
    slow = oracle.edited(x, weights, **parts, k=axes, h={"v": h[0], "t": h[1]}, inputs=new)
    maps = maps_of(_moments(x, weights), _weights(weights), setting).maps
    for key, expected in slow.items():
        fast = maps[TowerName.IMAGE if key[0] == "v" else TowerName.TEXT].apply(new[key])
        np.testing.assert_allclose(fast, expected, atol=1e-6 * np.linalg.norm(expected, axis=1).mean())


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches_do_not_matter(batch: int) -> None:
    """Moments summed batch by batch, or over the items in another order, give the same maps."""
    x, weights = _world(5, n=129)
    setting = AxisSetting(g=0.5, o=1.0, kappa=0.4, a=0.5, tau=0.5, axes=2, repel_image=0.1, repel_text=0.2)
    whole = maps_of(_moments(x, weights), _weights(weights), setting)
    order = np.random.default_rng(0).permutation(129)
    mixed = {key: rows[order] for key, rows in x.items()}
    parts = maps_of(_moments(mixed, weights, batch), _weights(weights), setting)
    for tower in TowerName:
        np.testing.assert_allclose(parts.maps[tower].weight, whole.maps[tower].weight, atol=1e-6)
        np.testing.assert_allclose(parts.maps[tower].bias, whole.maps[tower].bias, atol=1e-6)


@pytest.mark.parametrize(("d", "axes"), [(13, 0), (13, 3), (8, 0), (8, 2)])
def test_the_fold_is_exact(d: int, axes: int) -> None:
    """Projection and LayerNorm bias together give the edited embedding of every LayerNorm output, for m = d and m > d."""
    rng = np.random.default_rng(d + axes)
    norm = {letter: (rng.uniform(0.3, 2, 13), rng.normal(size=13)) for letter in "vt"}
    x, weights = _world(d, m=(13, 13), d=d)
    x = {key: oracle.layer_norm(rows, *norm[key[0]]) for key, rows in x.items()}
    h = (0.2, 0.1) if axes else (0.0, 0.0)
    setting = AxisSetting(g=0.6, o=0.3, kappa=0.4, a=0.5, tau=0.5, axes=axes, repel_image=h[0], repel_text=h[1])
    edit = maps_of(_moments(x, weights), _weights(weights), setting)
    for tower, letter in LETTER.items():
        gamma, beta = norm[letter]
        folded = folded_into_norm(edit.maps[tower], gamma, beta, edit.constant_axis(tower))
        hidden = rng.normal(size=(50, 13)) * 3 + 1
        expected = edit.maps[tower].apply(oracle.layer_norm(hidden, gamma, beta))
        found = oracle.layer_norm(hidden, gamma, folded.norm_bias) @ folded.weight.T
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.linalg.norm(expected, axis=1).mean())
