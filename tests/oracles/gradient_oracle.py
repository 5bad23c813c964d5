"""Losses of the gradient baselines and their importance by finite differences: numpy float64, no autograd."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

STEP = 1e-5


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def loss_unsafe(query: np.ndarray, _: np.ndarray, other_safe: np.ndarray, other_unsafe: np.ndarray) -> float:
    """-(1 - cos(query, other safe)) + (1 - cos(query, other unsafe)), means over the batch."""
    return float(-(1 - _cosines(query, other_safe)).mean() + (1 - _cosines(query, other_unsafe)).mean())


def loss_safe_clip(query: np.ndarray, own_unsafe: np.ndarray, _: np.ndarray, other_unsafe: np.ndarray) -> float:
    """InfoNCE of query and the other tower's unsafe member in both directions, scale exp(4.6052), plus 1 - cos."""
    n = len(query)
    logits = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            a, b = query[i], other_unsafe[j]
            logits[i, j] = np.exp(4.6052) * (a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))
    forth = [np.log(np.exp(logits[i] - logits[i, i]).sum()) for i in range(n)]
    back = [np.log(np.exp(logits[:, i] - logits[i, i]).sum()) for i in range(n)]
    return float(0.5 * (np.mean(forth) + np.mean(back)) + (1 - _cosines(query, own_unsafe)).mean())


def importance(
    loss: Callable[..., float],
    embed: Callable[[np.ndarray, np.ndarray], np.ndarray],
    weight: np.ndarray,
    inputs: np.ndarray,
    fixed: tuple[np.ndarray, np.ndarray, np.ndarray],
    batch: int,
) -> np.ndarray:
    """Mean over batches of the absolute central difference of a batch's loss by every entry of the weight.

    Args:
        loss: Of query, own unsafe, other safe and other unsafe embeddings.
        embed: Weight and inputs to embeddings.
        weight: (out, in).
        inputs: Inputs of the safe queries.
        fixed: The other three embeddings, which do not move.
        batch: Pairs per gradient.
    """
    gradients = []
    for start in range(0, len(inputs), batch):
        rows = slice(start, start + batch)
        gradient = np.zeros_like(weight)
        for at in np.ndindex(weight.shape):
            values = []
            for step in (STEP, -STEP):
                moved = weight.copy()
                moved[at] += step
                values.append(loss(embed(moved, inputs[rows]), *(part[rows] for part in fixed)))
            gradient[at] = (values[0] - values[1]) / (2 * STEP)
        gradients.append(np.abs(gradient))
    return np.mean(gradients, axis=0)
