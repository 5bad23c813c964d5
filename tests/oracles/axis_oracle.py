"""The safety axis written straight from docs/background/safety-axis.md sections 3 and 4: loops, two passes, float64.

Statistics subtract the mean first, solutions come from the data rather than from sums, and an equation is minimised by least
squares wherever the document states it as an argmin.
"""

from __future__ import annotations

import numpy as np

Features = dict[str, np.ndarray]
"""Keys vs, vu, ts, tu: (n, m) pooled features, safe and unsafe, image and text."""


def covariance(rows: np.ndarray) -> np.ndarray:
    mean = sum(rows) / len(rows)
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for row in rows:
        total += np.outer(row - mean, row - mean)
    return total / (len(rows) - 1)


def ridge(matrix: np.ndarray, rho: float) -> np.ndarray:
    return matrix + rho * np.trace(matrix) / len(matrix) * np.eye(len(matrix))


def score(safe: np.ndarray, unsafe: np.ndarray, a: float, rho: float) -> np.ndarray:
    delta = safe.mean(0) - unsafe.mean(0)
    spread = ridge((1 - a) * covariance(safe - unsafe) + a * covariance(safe), rho)
    w = np.linalg.inv(spread) @ delta
    return w / (delta @ w)


def mean_length(safe: np.ndarray, weight: np.ndarray) -> float:
    return float(np.mean([np.sqrt(sum((weight @ x) ** 2)) for x in safe]))


def positive(vector: np.ndarray) -> np.ndarray:
    return vector * np.sign(vector[np.argmax(np.abs(vector))])


def null_columns(vectors: np.ndarray, count: int) -> list[np.ndarray]:
    """Projects unit vectors into the span one after another, always the one that is nearest to what is left of it."""
    projector, chosen = vectors @ vectors.T, []
    for _ in range(count):
        inside = np.diag(projector)
        pivot = next(i for i in range(len(inside)) if inside[i] >= inside.max() * (1 - 1e-6))
        column = projector[:, pivot] / np.sqrt(projector[pivot, pivot])
        chosen.append(column)
        projector = projector - np.outer(column, column)
    return chosen


def spare_axes(x: Features, weights: Features, count: int) -> np.ndarray:
    d = len(weights["v"])
    moment = np.zeros((d, d))
    for key, rows in x.items():
        length = mean_length(x[key[0] + "s"], weights[key[0]])
        for row in rows:
            e = weights[key[0]] @ row
            moment += np.outer(e, e) / len(rows) / length
    values, vectors = np.linalg.eigh(moment)
    null = int(sum(values <= 1e-10 * values[-1]))
    columns = null_columns(vectors[:, :null], min(null, count))
    columns += [vectors[:, j] for j in range(null, count)]
    return np.stack([positive(column) for column in columns[:count]], axis=1)


def redirected(safe: np.ndarray, unsafe: np.ndarray, weight: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """Formula 4 as one least-squares problem: the rows of the data, and a row per entry of the ridge."""
    n, m = safe.shape
    both = np.concatenate([safe, unsafe])
    s = np.mean(both**2)
    targets = np.concatenate([safe @ weight.T, unsafe @ weight.T + tau * (safe - unsafe) @ weight.T])
    rows = np.concatenate([both, np.ones((2 * n, 1))], axis=1) / np.sqrt(2 * n)
    strength = np.sqrt(1e-2 * s)
    pull = np.concatenate([strength * np.eye(m), np.zeros((m, 1))], axis=1)
    left = np.concatenate([rows, pull])
    right = np.concatenate([targets / np.sqrt(2 * n), strength * weight.T])
    solution = np.linalg.lstsq(left, right, rcond=None)[0]
    return solution[:m].T, solution[m]


def repelling(safe: np.ndarray, unsafe: np.ndarray, k: int, rho: float) -> np.ndarray:
    pairs = np.mean([np.outer(u - s, u - s) for s, u in zip(safe, unsafe, strict=True)], axis=0)
    spread = ridge(covariance(safe), rho)
    values, vectors = np.linalg.eig(np.linalg.inv(spread) @ pairs)
    order = np.argsort(-values.real)[:k]
    rows = []
    for j in order:
        r = vectors[:, j].real
        rows.append(positive(r / np.sqrt(r @ spread @ r)))
    return np.stack(rows)


def edited(
    x: Features,
    weights: Features,
    *,
    g: float,
    o: float,
    kappa: float,
    a: float,
    tau: float,
    rho: float,
    k: int,
    h: dict[str, float],
    inputs: Features,
) -> Features:
    """Formula 3 row by row: the edited embeddings of `inputs`, before normalisation."""
    taken = {tower: k if h[tower] else 0 for tower in "vt"}
    spare = spare_axes(x, weights, 2 + taken["v"] + taken["t"])
    keep = np.eye(len(spare)) - sum(np.outer(u, u) for u in spare.T)
    result = {}
    for key, rows in inputs.items():
        tower = key[0]
        safe, unsafe, weight = x[tower + "s"], x[tower + "u"], weights[tower]
        own, other = (spare[:, 0], spare[:, 1]) if tower == "v" else (spare[:, 1], spare[:, 0])
        w, n, mean = score(safe, unsafe, a, rho), mean_length(safe, weight), safe.mean(0)
        content, constant = weight, np.zeros(len(weight))
        if tower == "v":
            content, constant = redirected(safe, unsafe, weight, tau)
        lines = repelling(safe, unsafe, k, rho) if taken[tower] else []
        first = 2 if tower == "v" else 2 + taken["v"]
        out = []
        for row in rows:
            e = keep @ (content @ row + constant) + own * g * n * (w @ (row - mean) + o) + other * kappa * n
            for j, line in enumerate(lines):
                e = e + spare[:, first + j] * h[tower] * n / np.sqrt(k) * (line @ (row - mean))
            out.append(e)
        result[key] = np.stack(out)
    return result


def layer_norm(hidden: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    centred = hidden - hidden.mean(1, keepdims=True)
    return gamma * centred / np.sqrt(np.mean(centred**2, axis=1, keepdims=True) + 1e-5) + beta
