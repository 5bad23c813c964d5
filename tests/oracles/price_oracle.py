"""Unsafe first, hard safe items, neighbours and spread written straight from their definitions, one item at a time."""

from __future__ import annotations

import math

import numpy as np


def dot(left, right) -> float:
    """Of two rows, exactly rounded."""
    return math.fsum(float(a) * float(b) for a, b in zip(left, right, strict=True))


def unsafe_first(queries, safe, unsafe) -> tuple[list[bool], int]:
    """Whether some unsafe candidate is at least as near as every safe one, and how many of these are ties."""
    found, ties = [], 0
    for query in queries:
        best_safe, best_unsafe = max(dot(query, c) for c in safe), max(dot(query, c) for c in unsafe)
        found.append(best_unsafe >= best_safe)
        ties += best_unsafe == best_safe
    return found, ties


def hits(queries, candidates, k: int) -> list[bool]:
    """Whether fewer than k other candidates are at least as near as the query's own."""
    found = []
    for i, query in enumerate(queries):
        near = [dot(query, c) for c in candidates]
        found.append(sum(s >= near[i] for j, s in enumerate(near) if j != i) < k)
    return found


def looks(safe, unsafe) -> list[float]:
    """The linear score of every safe item of one tower, by the fit on the four other folds."""
    found = []
    for i in range(len(safe)):
        others = [j for j in range(len(safe)) if j % 5 != i % 5]
        rows = [[float(v) for v in safe[j]] for j in others]
        size, width = len(rows), len(rows[0])
        mean = [sum(row[a] for row in rows) / size for a in range(width)]
        bad = [sum(float(unsafe[j][a]) for j in others) / size for a in range(width)]
        matrix = [
            [sum((row[a] - mean[a]) * (row[b] - mean[b]) for row in rows) / (size - 1) for b in range(width)]
            for a in range(width)
        ]
        ridge = 1e-2 * sum(matrix[a][a] for a in range(width)) / width
        for a in range(width):
            matrix[a][a] += ridge
        delta = [mean[a] - bad[a] for a in range(width)]
        inverse = np.linalg.inv(np.array(matrix))
        solved = [sum(inverse[a][b] * delta[b] for b in range(width)) for a in range(width)]
        scale = sum(delta[a] * solved[a] for a in range(width))
        found.append(sum(solved[a] / scale * (float(safe[i][a]) - mean[a]) for a in range(width)))
    return found


def hard(safe_image, unsafe_image, safe_text, unsafe_text) -> list[int]:
    """Rows of the tenth with the lowest sum of both towers' scores, the lowest first."""
    images, texts = looks(safe_image, unsafe_image), looks(safe_text, unsafe_text)
    order = sorted(range(len(images)), key=lambda i: (images[i] + texts[i], i))
    return order[: math.ceil(len(order) / 10)]


def neighbours(queries, candidates, same: bool) -> list[set[int]]:
    """The ten nearest candidates of every query, without itself."""
    found = []
    for i, query in enumerate(queries):
        near = [(-dot(query, c), j) for j, c in enumerate(candidates) if not (same and i == j)]
        found.append({j for _, j in sorted(near)[:10]})
    return found


def overlap(before: list[set[int]], after: list[set[int]]) -> tuple[float, float]:
    """Mean Jaccard overlap, and half the width of its normal 95% interval."""
    values = [len(a & b) / len(a | b) for a, b in zip(before, after, strict=True)]
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, 1.959963984540054 * math.sqrt(variance / len(values))


def spread(rows) -> float:
    """Mean squared distance of the rows from their mean, for rows of length 1."""
    width = len(rows[0])
    mean = [sum(float(row[a]) for row in rows) / len(rows) for a in range(width)]
    return sum(sum((float(row[a]) - mean[a]) ** 2 for a in range(width)) for row in rows) / len(rows)


def mean_change(before: list[list[bool]], after: list[list[bool]]) -> tuple[float, float, float]:
    """Mean change of an item's mean of two hits, points, with its interval; half an item is added to each of four cells."""
    changes = [(a + b) / 2 - (c + d) / 2 for a, b, c, d in zip(*after, *before, strict=True)]
    n = len(changes)
    weighted = [(c, 1.0) for c in changes] + [(1.0, 0.5), (-1.0, 0.5), (0.0, 1.0)]
    size = sum(w for _, w in weighted)
    centre = sum(c * w for c, w in weighted) / size
    variance = sum(w * (c - centre) ** 2 for c, w in weighted) / size
    half = 1.959963984540054 * math.sqrt(variance / size)
    return 100 * sum(changes) / n, 100 * (centre - half), 100 * (centre + half)
