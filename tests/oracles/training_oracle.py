"""Losses of Safe-CLIP and SafeR-CLIP in plain numpy, written from the formulas, one row at a time."""

from __future__ import annotations

import numpy as np

SCALE = float(np.exp(4.6052))


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    """Cosine of two vectors."""
    return float(left @ right / (np.sqrt(left @ left) * np.sqrt(right @ right)))


def distance(left: np.ndarray, right: np.ndarray) -> float:
    """Mean of one minus the cosine of rows that belong together."""
    return float(np.mean([1 - cosine(a, b) for a, b in zip(left, right, strict=True)]))


def contrast(left: np.ndarray, right: np.ndarray) -> float:
    """Half the sum of the cross-entropies of both directions; the right answer of row i is row i."""

    def one_way(queries: np.ndarray, answers: np.ndarray) -> float:
        losses = []
        for i, query in enumerate(queries):
            logits = np.array([SCALE * cosine(query, answer) for answer in answers])
            losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[i])
        return float(np.mean(losses))

    return 0.5 * (one_way(left, right) + one_way(right, left))


def relative(query: np.ndarray, unsafe: np.ndarray, target: np.ndarray) -> float:
    """Mean of log(1 + exp(cosine with the unsafe counterpart - cosine with the target))."""
    rows = zip(query, unsafe, target, strict=True)
    return float(np.mean([np.log(1 + np.exp(cosine(q, u) - cosine(q, t))) for q, u, t in rows]))


def safe_clip(student: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, float]:
    """The eight terms."""
    text, image = reference["safe_text"], reference["safe_image"]
    return {
        "text_preservation": distance(student["safe_text"], text),
        "text_redirection": distance(student["unsafe_text"], text),
        "image_preservation": distance(student["safe_image"], image),
        "image_redirection": distance(student["unsafe_image"], image),
        "text_contrast_preservation": contrast(student["safe_text"], image),
        "text_contrast_redirection": contrast(student["unsafe_text"], image),
        "image_contrast_preservation": contrast(student["safe_image"], text),
        "image_contrast_redirection": contrast(student["unsafe_image"], text),
    }


def safer_clip(
    student: dict[str, np.ndarray], reference: dict[str, np.ndarray], target_text: np.ndarray, target_image: np.ndarray
) -> dict[str, float]:
    """The six terms."""
    return {
        "text_relative": relative(student["unsafe_text"], reference["unsafe_image"], target_image),
        "image_relative": relative(student["unsafe_image"], reference["unsafe_text"], target_text),
        "text_redirection": distance(student["unsafe_text"], target_text),
        "image_redirection": distance(student["unsafe_image"], target_image),
        "text_preservation": distance(student["safe_text"], reference["safe_text"]),
        "image_preservation": distance(student["safe_image"], reference["safe_image"]),
    }


def nearest(unsafe: np.ndarray, safe: np.ndarray) -> list[int]:
    """Position of the safe row with the largest cosine, for every unsafe row."""
    return [max(range(len(safe)), key=lambda j: (cosine(row, safe[j]), -j)) for row in unsafe]


def recall_at_1(queries: np.ndarray, answers: np.ndarray) -> float:
    """Percent of queries whose own answer is strictly the nearest."""
    hits = 0
    for i, query in enumerate(queries):
        own = cosine(query, answers[i])
        hits += all(cosine(query, answer) < own for j, answer in enumerate(answers) if j != i)
    return 100 * hits / len(queries)
