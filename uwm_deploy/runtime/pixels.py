"""Rows in the type of a graph's input: normalised pixels go back to the 8 bits that they were made from."""

from __future__ import annotations

import numpy as np

from uwm_deploy.errors import ContractError
from uwm_deploy.records.graph import Normalisation, TensorSpec


def taken(rows: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Rows as a graph takes them.

    Verification compares one set of rows with PyTorch and with every graph, so its rows are normalised pixels. Of these a
    graph that normalises by itself gets the crops that they were made from, which is exact.

    Args:
        rows: (n, 3, H, W) float32 pixels, (n, H, W, 3) uint8 crops, or (n, L) int64 or int32 ids.
        spec: The graph's input.

    Returns:
        The same rows in the type of the input, contiguous: (n, 3, H, W) float32, (n, H, W, 3) uint8 or (n, L) integers.

    Raises:
        ContractError: If rows of this type cannot become rows of the other.
    """
    if spec.normalisation is not None and rows.dtype.kind == "f":
        return crops_from_pixels(rows, spec.normalisation)
    if not np.can_cast(rows.dtype, np.dtype(spec.dtype), "same_kind"):
        raise ContractError(f"the graph takes {spec.dtype}, not {rows.dtype}", fix="prepare the rows for this graph")
    return np.ascontiguousarray(rows, dtype=spec.dtype)


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
