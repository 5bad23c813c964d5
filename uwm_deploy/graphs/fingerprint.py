"""Is the edit in the graph? Looked up in the weights that the graph itself holds, never in names or topology alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from uwm_deploy.records import Digest, Fingerprint, LayerEdit
from uwm_deploy.workspace import digest_of_bytes, digest_of_file

_NOTHING = "no edited layer was named, so nothing can be proven"


class EditedEntries(Protocol):
    """What is needed of a layer's patch: its flat indices and the digest of the weight that it makes."""

    @property
    def indices(self) -> Any:
        """Flat indices; anything that becomes an array."""

    @property
    def digest_after(self) -> Digest:
        """Of the edited weight."""


def digest_of_array(array: np.ndarray) -> Digest:
    """Digest of a float32 weight, equal to that of the same PyTorch tensor."""
    plain = np.ascontiguousarray(array, dtype=np.float32)
    hasher = hashlib.sha256(f"\0torch.float32\0{tuple(plain.shape)}\0".encode())
    hasher.update(plain.tobytes())
    return "sha256:" + hasher.hexdigest()


def digest_of_onnx(path: Path, external: str) -> Digest:
    """Digest over the graph and, when there is one, its external data."""
    if not external:
        return digest_of_file(path)
    return digest_of_bytes(f"{digest_of_file(path)} {digest_of_file(path.parent / external)}".encode())


def fingerprint_of_graph(
    initialisers: Mapping[str, np.ndarray], edits: Iterable[LayerEdit], patches: Mapping[str, EditedEntries]
) -> Fingerprint:
    """Compares each edited layer's weight, by name, with what the patch makes and with what it was before.

    Args:
        initialisers: Tensors of the graph by name.
        edits: Edited layers of this tower.
        patches: Patch of each layer of the model, other towers included.

    Returns:
        The fingerprint; a layer that only one of record and patch knows is a mismatch, as is a second, unedited copy of
        an edited weight under whatever name, transposed or not.
    """
    wanted = list(edits)
    known = {edit.name for edit in wanted}
    mismatches = [] if wanted else [_NOTHING]
    mismatches += [
        f"{name}: is in the patch but not in the edit record"
        for name in sorted(patches)
        if name not in known and f"{name}.weight" in initialisers
    ]
    held = _digests(initialisers.values(), wanted)
    layers, entries = 0, 0
    for edit in wanted:
        name = f"{edit.name}.weight"
        if name not in initialisers:
            mismatches.append(f"{edit.name}: the graph has no weight of this name")
            continue
        if edit.name not in patches or patches[edit.name].digest_after != edit.digest_after:
            mismatches.append(f"{edit.name}: the edit record and the patch disagree")
        elif problem := _problem(edit, patches[edit.name], initialisers[name], held):
            mismatches.append(f"{edit.name}: {problem}")
        else:
            layers, entries = layers + 1, entries + edit.selected
    return Fingerprint(layers=layers, entries=entries, mismatches=tuple(mismatches))


def fingerprint_by_value(arrays: Iterable[np.ndarray], edits: Iterable[LayerEdit]) -> Fingerprint:
    """Finds each edited weight among the tensors of a graph whose names were changed, transposed or not."""
    wanted = list(edits)
    held = _digests(arrays, wanted)
    mismatches, layers, entries = [] if wanted else [_NOTHING], 0, 0
    for edit in wanted:
        if _holds_unedited(edit, held):
            mismatches.append(f"{edit.name}: holds the unedited weight")
        elif edit.digest_after in held:
            layers, entries = layers + 1, entries + edit.selected
        else:
            mismatches.append(f"{edit.name}: the edited weight is not in the graph")
    return Fingerprint(layers=layers, entries=entries, mismatches=tuple(mismatches))


def _digests(arrays: Iterable[np.ndarray], edits: Iterable[LayerEdit]) -> set[Digest]:
    """Digests of every array that has the shape of an edited layer, and of its transpose."""
    shapes = {shape for edit in edits for shape in (edit.shape, edit.shape[::-1])}
    held: set[Digest] = set()
    for array in arrays:
        if array.shape in shapes and array.dtype == np.float32:
            held |= {digest_of_array(array), digest_of_array(array.T)}
    return held


def _holds_unedited(edit: LayerEdit, held: set[Digest]) -> bool:
    """A layer in which nothing was selected is its own unedited weight, rightly."""
    return edit.digest_before in held and edit.digest_before != edit.digest_after


def _problem(edit: LayerEdit, patch: EditedEntries, array: np.ndarray, held: set[Digest]) -> str:
    """What is wrong with one weight, or nothing."""
    digests = {digest_of_array(array), digest_of_array(array.T)}
    if _holds_unedited(edit, digests):
        return "holds the unedited weight"
    if _holds_unedited(edit, held):
        return "the graph holds the unedited weight as well, under another name"
    if edit.digest_after in digests:
        return ""
    if tuple(array.shape) != edit.shape:
        return f"has shape {tuple(array.shape)}, not {edit.shape}"
    zeros = int((array.reshape(-1)[np.asarray(patch.indices)] == 0).sum())
    return f"is neither the edited nor the unedited weight ({zeros} of {edit.selected} edited entries are zero)"
