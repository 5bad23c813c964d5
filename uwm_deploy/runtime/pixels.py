"""Rows in the type of a graph's input: normalised pixels go back to the 8 bits that they were made from.

Rows that a graph does not take are refused here, in the same words for every runtime. Some of these would compute with them.
"""

from __future__ import annotations

import numpy as np

from uwm_deploy.errors import ContractError
from uwm_deploy.records.graph import Normalisation, TensorSpec

_FIX = "prepare the rows for this graph"

_KINDS = {"f": "f", "i": "iu"}
"""Kinds of type that rows may have by the kind of a graph's input; crops are of 8 bits and nothing else."""


def taken(rows: np.ndarray, spec: TensorSpec, vocabulary: int = 0) -> np.ndarray:
    """Rows as a graph takes them.

    Verification compares one set of rows with PyTorch and with every graph, so its rows are normalised pixels. Of these a
    graph that normalises by itself gets the crops that they were made from, which is exact.

    Args:
        rows: (n, 3, H, W) float32 pixels, (n, H, W, 3) uint8 crops, or (n, L) int64 or int32 ids.
        spec: The graph's input.
        vocabulary: Rows of the model's table of embeddings, so ids are smaller; 0 where that is not known.

    Returns:
        The same rows in the type of the input, contiguous: (n, 3, H, W) float32, (n, H, W, 3) uint8 or (n, L) integers.

    Raises:
        ContractError: If the graph takes rows of another type or shape, a pixel is not finite, or an id is not in the table.
    """
    if not isinstance(rows, np.ndarray):
        raise ContractError(f"the graph takes an array of {_wanted(spec)}, not a {type(rows).__name__}", fix=_FIX)
    wanted, kind = np.dtype(spec.dtype), rows.dtype.kind
    pixels = spec.normalisation is not None and kind == "f"
    row = _row_of_pixels(spec) if pixels else spec.shape[1:]
    of_type = pixels or rows.dtype == wanted or kind in _KINDS.get(wanted.kind, "")
    if not of_type or rows.ndim != len(row) + 1 or not _fits(rows.shape[1:], row):
        raise ContractError(f"the graph takes {_wanted(spec)}, not {rows.shape} {rows.dtype}", fix=_FIX)
    if wanted.kind == "i" and rows.size:
        _check_ids(int(rows.min()), int(rows.max()), vocabulary)
    with np.errstate(over="ignore"):  # what is too large is found below
        found = np.ascontiguousarray(rows, dtype=np.float32 if pixels else wanted)
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise ContractError("a pixel is not finite", fix="pass pixels as the model's processor gives them")
    return crops_from_pixels(found, spec.normalisation) if pixels and spec.normalisation is not None else found


def _fits(sizes: tuple[int, ...], row: tuple[int | str, ...]) -> bool:
    return all(size == one for size, one in zip(sizes, row, strict=True) if isinstance(one, int))


def _row_of_pixels(spec: TensorSpec) -> tuple[int | str, ...]:
    """Shape of a row of pixels, for a graph that takes crops."""
    height, width, channels = spec.shape[1:]
    return channels, height, width


def _wanted(spec: TensorSpec) -> str:
    """What a graph takes, in words: its shape and its type."""

    def shown(row: tuple[int | str, ...], dtype: str) -> str:
        longest = f"1 to {spec.lengths.longest}" if spec.lengths is not None else ""
        return f"(n, {', '.join(str(one) if isinstance(one, int) else longest or one for one in row)}) {dtype}"

    found = shown(spec.shape[1:], spec.dtype)
    return found if spec.normalisation is None else f"{found} or {shown(_row_of_pixels(spec), 'float32')}"


def _check_ids(smallest: int, largest: int, vocabulary: int) -> None:
    """Refuses ids outside the table of embeddings: some runtimes take another row of it, or what lies in memory beyond."""
    last = (vocabulary or 2**31) - 1
    if smallest < 0 or largest > last:
        wrong = smallest if smallest < 0 else largest
        raise ContractError(f"the model has embeddings of the ids 0 to {last}, not of {wrong}", fix=_FIX)


def crops_from_pixels(pixels: np.ndarray, by: Normalisation) -> np.ndarray:
    """The inverse of `runtime.image.pixels_from_crops`: exact for what that function makes, else the nearest level.

    Args:
        pixels: (n, 3, H, W) float32.
        by: How they were normalised.

    Returns:
        (n, H, W, 3) uint8.
    """
    scale = (np.asarray(by.std, np.float32) / np.float32(by.rescale)).reshape(3, 1, 1)
    shift = (np.asarray(by.mean, np.float32) / np.float32(by.rescale)).reshape(3, 1, 1)
    levels = np.rint(pixels * scale + shift).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1))
