"""Rows of ids no longer than a text graph needs: what stands behind the end token changes no embedding.

The length of a row follows from that row alone, so its embedding does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from uwm_deploy.errors import ContractError
from uwm_deploy.records.graph import RowLengths, TensorSpec


def lengths_of(rows: np.ndarray, by: RowLengths) -> np.ndarray:
    """How many ids of each row a graph needs.

    CLIP reads the embedding at the first end token, or at the first of the largest ids. A row keeps both. One without an
    end token is no caption, and stays whole.

    Args:
        rows: (n, L) int64 or int32 ids, L at most the longest length.
        by: Lengths of the graph.

    Returns:
        (n,) int64: multiples of the step, or L.

    Raises:
        ContractError: If rows are longer than the graph takes.
    """
    width = rows.shape[1] if rows.ndim == 2 else 0
    if not 0 < width <= by.longest:
        raise ContractError(
            f"the text graph takes rows of at most {by.longest} ids, not arrays of shape {rows.shape}",
            fix="pass (n, ids) as the tokenizer gives them",
        )
    ends = rows == by.end_id
    last = np.where(ends.any(axis=1), np.maximum(ends.argmax(axis=1), rows.argmax(axis=1)), width - 1)
    found: np.ndarray = np.minimum((last // by.step + 1) * by.step, width)
    return found


def parts_of(rows: np.ndarray, spec: TensorSpec, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows as calls of one length each.

    Args:
        rows: (n, ...) float32, uint8, int64 or int32, as the graph's input has it.
        spec: The input.
        most: Largest number of rows of one call.

    Yields:
        Places (k,) int64 among the rows, and the rows (k, ...) of one call in their dtype: contiguous, and cut where the
        graph takes that.
    """
    if spec.lengths is None:
        for start in range(0, len(rows), most):
            part = rows[start : start + most]
            yield np.arange(start, start + len(part)), part
        return
    wanted = lengths_of(rows, spec.lengths)
    for length in np.unique(wanted):
        places = np.flatnonzero(wanted == length)
        for start in range(0, len(places), most):
            chosen = places[start : start + most]
            yield chosen, np.ascontiguousarray(rows[chosen, :length])


def cut_together(rows: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Rows of one request as one array: all as long as the one that needs most.

    Args:
        rows: (n, ...) float32, uint8, int64 or int32, as the graph's input has it.
        spec: The input.

    Returns:
        (n, ...) in their dtype, the same or shorter rows.
    """
    if spec.lengths is None or not len(rows):
        return rows
    return np.ascontiguousarray(rows[:, : int(lengths_of(rows, spec.lengths).max())])
