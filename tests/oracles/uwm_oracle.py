"""Unsafe Weights Manipulation written straight from method.md sections 2 and 3: slow, explicit, plain numpy float64."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np


def saliency_over_std(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Phi (out, in) of one sample with activations x (tokens, in); Eq. 8 and 9."""
    norm = np.sqrt((x**2).sum(0))
    std = x.std(0, ddof=1) + eps
    product = norm[None, :] * np.abs(weight)
    saliency = product.mean(1, keepdims=True) * product.mean(0, keepdims=True)
    return saliency / std[None, :]


def score(safe: list[np.ndarray], unsafe: list[np.ndarray], weight: np.ndarray, rule: str, eps: float) -> np.ndarray:
    """Eq. 10, mean of per-pair ratios."""
    ratios = [
        saliency_over_std(u, weight, eps) / saliency_over_std(s, weight, eps) for s, u in zip(safe, unsafe, strict=True)
    ]
    result = np.mean(ratios, axis=0)
    return result * np.abs(weight) if rule == "ratio-times-abs-weight" else result


def score_of_means(safe: list[np.ndarray], unsafe: list[np.ndarray], weight: np.ndarray, eps: float) -> np.ndarray:
    """Eq. 10 in the paper's wording: one ratio of two means."""
    over = np.mean([saliency_over_std(u, weight, eps) for u in unsafe], axis=0)
    return over / np.mean([saliency_over_std(s, weight, eps) for s in safe], axis=0)


def score_of_unsafe(unsafe: list[np.ndarray], weight: np.ndarray, rule: str, eps: float) -> np.ndarray:
    """Ablation: mean of Phi over the unsafe side alone."""
    result = np.mean([saliency_over_std(u, weight, eps) for u in unsafe], axis=0)
    return result * np.abs(weight) if rule == "ratio-times-abs-weight" else result


def score_of_difference(
    safe: list[np.ndarray], unsafe: list[np.ndarray], weight: np.ndarray, rule: str, eps: float
) -> np.ndarray:
    """Ablation: mean of the differences of Phi, unsafe minus safe."""
    differences = [
        saliency_over_std(u, weight, eps) - saliency_over_std(s, weight, eps) for s, u in zip(safe, unsafe, strict=True)
    ]
    result = np.mean(differences, axis=0)
    return result * np.abs(weight) if rule == "ratio-times-abs-weight" else result


def selected_hard(scores: np.ndarray, keep: Fraction) -> np.ndarray:
    """Flat indices of all but the lowest ``floor(keep * entries)`` scores; of equals the earlier ones are lower."""
    flat = scores.astype(np.float64).ravel()
    order = sorted(range(flat.size), key=lambda i: (flat[i], i))
    return np.sort(np.array(order[math.floor(keep * flat.size) :], dtype=np.int64))


def selected(scores: np.ndarray, keep_mass: float) -> np.ndarray:
    """Eq. 11: flat indices whose cumulative normalised mass, ascending, is above keep_mass."""
    flat = scores.astype(np.float64).ravel()
    order = np.argsort(flat, kind="stable")
    mass = np.cumsum(flat[order]) / flat.sum()
    return np.sort(order[mass > keep_mass])
