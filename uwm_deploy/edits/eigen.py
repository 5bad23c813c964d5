"""Eigenvectors that do not depend on rounding: their signs and the basis of a null space are fixed."""

from __future__ import annotations

import numpy as np

NULL_SHARE = 1e-10
"""Eigenvalues below this share of the largest count as zero: only rounding made them otherwise."""

_EQUAL = 1e-6
"""Relative difference below which entries count as equal; the first of them is taken."""


def least_eigenvectors(matrix: np.ndarray, count: int) -> np.ndarray:
    """Eigenvectors of least eigenvalue, ascending.

    Args:
        matrix: (d, d) float64, symmetric and positive semidefinite up to rounding.
        count: Number of eigenvectors, at most d.

    Returns:
        (d, count) float64, columns of length 1.
    """
    values, vectors = np.linalg.eigh(matrix)
    null = _null_count(values)
    fixed = np.concatenate([_null_basis(vectors[:, :null], min(null, count)), vectors[:, null:]], axis=1)
    return signed(fixed[:, :count])


def top_eigenvectors(matrix: np.ndarray, count: int) -> np.ndarray:
    """Eigenvectors of largest eigenvalue, descending.

    Args:
        matrix: (d, d) float64, symmetric and positive semidefinite up to rounding.
        count: Number of eigenvectors, at most d.

    Returns:
        (d, count) float64, columns of length 1.
    """
    values, vectors = np.linalg.eigh(matrix)
    null = _null_count(values)
    fixed = np.concatenate([vectors[:, null:][:, ::-1], _null_basis(vectors[:, :null], null)], axis=1)
    return signed(fixed[:, :count])


def signed(columns: np.ndarray) -> np.ndarray:
    """Columns with a fixed sign: the entry of largest absolute value is positive in each.

    Args:
        columns: (d, k) float64.

    Returns:
        (d, k) float64.
    """
    size = np.abs(columns)
    first = (size >= (1 - _EQUAL) * size.max(axis=0, keepdims=True)).argmax(axis=0)
    result: np.ndarray = columns * np.where(columns[first, np.arange(columns.shape[1])] < 0, -1.0, 1.0)
    return result


def _null_count(ascending: np.ndarray) -> int:
    return int((ascending <= NULL_SHARE * ascending[-1]).sum())


def _null_basis(basis: np.ndarray, count: int) -> np.ndarray:
    """Orthonormal columns (d, count) inside the span of `basis`, the same for every basis of that span.

    Pivoted Cholesky of the projector onto the span: each column is the projection, onto the rest of the span, of the unit
    vector nearest to that rest.
    """
    chosen = np.zeros((len(basis), 0))
    left = basis.copy()
    for _ in range(count):
        inside = (left**2).sum(axis=1)
        pivot = int((inside >= (1 - _EQUAL) * inside.max()).argmax())
        coordinates = left[pivot] / np.sqrt(inside[pivot])
        column = left @ coordinates
        column -= chosen @ (chosen.T @ column)  # rounding adds up over many columns
        chosen = np.concatenate([chosen, (column / np.linalg.norm(column))[:, None]], axis=1)
        left = left - np.outer(left @ coordinates, coordinates)
    return chosen
