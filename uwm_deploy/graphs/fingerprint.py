"""Is the edit in the graph? Looked up in the weights that the graph itself holds, never in names or topology alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from uwm_deploy.records import Digest, Fingerprint, LayerEdit
from uwm_deploy.uwm.patch import LayerPatch


def digest_of_array(array: np.ndarray) -> Digest:
    """Digest of a float32 weight, equal to that of the same PyTorch tensor."""
    plain = np.ascontiguousarray(array, dtype=np.float32)
    hasher = hashlib.sha256(f"\0torch.float32\0{tuple(plain.shape)}\0".encode())
    hasher.update(plain.tobytes())
    return "sha256:" + hasher.hexdigest()


def fingerprint_of_graph(
    initialisers: Mapping[str, np.ndarray], edits: Iterable[LayerEdit], patches: Mapping[str, LayerPatch]
) -> Fingerprint:
    """Compares each edited layer's weight, by name, with what the patch makes and with what it was before.

    Args:
        initialisers: Tensors of the graph by name.
        edits: Edited layers of this tower.
        patches: Patch of each layer.
    """
    mismatches, layers, entries = [], 0, 0
    for edit in edits:
        name = f"{edit.name}.weight"
        if name not in initialisers:
            mismatches.append(f"{edit.name}: the graph has no weight of this name")
            continue
        if problem := _problem(edit, patches[edit.name], initialisers[name]):
            mismatches.append(f"{edit.name}: {problem}")
        else:
            layers, entries = layers + 1, entries + edit.selected
    return Fingerprint(layers=layers, entries=entries, mismatches=tuple(mismatches))


def fingerprint_by_value(arrays: Iterable[np.ndarray], edits: Iterable[LayerEdit]) -> Fingerprint:
    """Finds each edited weight among the tensors of a graph whose names were changed, transposed or not."""
    wanted = list(edits)
    shapes = {edit.shape for edit in wanted} | {edit.shape[::-1] for edit in wanted}
    held: set[Digest] = set()
    for array in arrays:
        if array.shape in shapes and array.dtype == np.float32:
            held |= {digest_of_array(array), digest_of_array(array.T)}
    mismatches, layers, entries = [], 0, 0
    for edit in wanted:
        if edit.digest_after in held:
            layers, entries = layers + 1, entries + edit.selected
        elif edit.digest_before in held:
            mismatches.append(f"{edit.name}: holds the unedited weight")
        else:
            mismatches.append(f"{edit.name}: the edited weight is not in the graph")
    return Fingerprint(layers=layers, entries=entries, mismatches=tuple(mismatches))


def _problem(edit: LayerEdit, patch: LayerPatch, array: np.ndarray) -> str:
    """What is wrong with one weight, or nothing."""
    digests = {digest_of_array(array), digest_of_array(array.T)}
    if edit.digest_after in digests:
        return ""
    if edit.digest_before in digests:
        return "holds the unedited weight"
    if tuple(array.shape) != edit.shape:
        return f"has shape {tuple(array.shape)}, not {edit.shape}"
    zeros = int((array.reshape(-1)[patch.indices.numpy()] == 0).sum())
    return f"is neither the edited nor the unedited weight ({zeros} of {edit.selected} edited entries are zero)"
