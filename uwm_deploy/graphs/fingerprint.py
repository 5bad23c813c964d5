"""Fingerprint of the edit in a graph: taken from the weights in the graph itself, never from names or topology alone."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from uwm_deploy.errors import ContractError
from uwm_deploy.graphs.cpu_integers import stored_forms
from uwm_deploy.records.edit import EditKind, TensorEdit
from uwm_deploy.records.files import digest_of_file, joined_digest
from uwm_deploy.records.graph import Fingerprint, Precision
from uwm_deploy.records.model import Digest

ZEROED_LIMIT = 0.5
"""Largest share of edited entries that may become zero: negating a zero changes nothing, so their edit is lost."""

_NOTHING = "no edited layer was named, so nothing can be proven"


class EditedEntries(Protocol):
    """The part of a layer's patch that a fingerprint needs: flat indices, and the digest of the edited weight."""

    @property
    def indices(self) -> Any:
        """Flat indices of the edited entries, (k,) integers, as an array or a tensor."""

    @property
    def digest_after(self) -> Digest:
        """Digest of the edited weight."""


def digest_of_array(array: np.ndarray) -> Digest:
    """Digest of a float32 weight, equal to `digest_of_tensor` of the same PyTorch tensor.

    Args:
        array: Any dtype that becomes float32, any shape.
    """
    plain = np.ascontiguousarray(array, dtype=np.float32)
    hasher = hashlib.sha256(f"\0torch.float32\0{tuple(plain.shape)}\0".encode())
    hasher.update(plain.reshape(-1).view(np.uint8).data)
    return "sha256:" + hasher.hexdigest()


def digest_of_onnx(path: Path, external: str) -> Digest:
    """Digest over the graph and, when there is one, its external data."""
    return joined_digest([digest_of_file(part) for part in (path, *([path.parent / external] if external else []))])


def fingerprint_of_graph(
    initialisers: Mapping[str, np.ndarray], edits: Iterable[TensorEdit], patches: Mapping[str, EditedEntries]
) -> Fingerprint:
    """Compares each edited layer's weight, by name, with the weights before and after the edit.

    Args:
        initialisers: Tensors of the graph by name, any dtype, any shape.
        edits: Edited layers of this tower.
        patches: Patch of each layer of the model, other towers included.

    Returns:
        The fingerprint. A layer that only one of record and patch names is a mismatch. So is an unedited copy of an edited
        weight anywhere in the graph, under any name, transposed or not.
    """
    wanted = list(edits)
    known = {edit.name for edit in wanted}
    mismatches = [] if wanted else [_NOTHING]
    mismatches += [
        f"{name}: is in the patch but not in the edit record"
        for name in sorted(patches)
        if name not in known and name in initialisers
    ]
    digests = _digests(initialisers, wanted)
    held = {digest for found in digests.values() for digest in found}
    layers, entries = 0, 0
    for edit in wanted:
        name = edit.name
        if name not in initialisers:
            mismatches.append(f"{edit.name}: the graph has no weight of this name")
            continue
        if edit.name not in patches or patches[edit.name].digest_after != edit.digest_after:
            mismatches.append(f"{edit.name}: the edit record and the patch disagree")
        elif problem := _problem(edit, patches[edit.name], initialisers[name], digests.get(name, set()), held):
            mismatches.append(f"{edit.name}: {problem}")
        else:
            layers, entries = layers + 1, entries + edit.selected
    return Fingerprint(layers=layers, entries=entries, mismatches=tuple(mismatches))


def fingerprint_by_value(
    arrays: Iterable[np.ndarray], edits: Iterable[TensorEdit], computed_away: Collection[str] = ()
) -> Fingerprint:
    """Finds each edited weight among the tensors of a graph whose names were changed, transposed or not.

    Args:
        arrays: Tensors of the graph, any dtype, any shape.
        edits: Edited tensors of this tower.
        computed_away: Names of trained tensors that the graph need not hold, see `graphs.constant_folding`; only the parity
            of embeddings proves these.
    """
    wanted = list(edits)
    digests = _digests({str(number): array for number, array in enumerate(arrays)}, wanted)
    held = {digest for found in digests.values() for digest in found}
    mismatches, layers, entries = [] if wanted else [_NOTHING], 0, 0
    for edit in wanted:
        if _holds_unedited(edit, held):
            mismatches.append(f"{edit.name}: holds the unedited weight")
        elif edit.digest_after in held:
            layers, entries = layers + 1, entries + edit.selected
        elif not _may_be_gone(edit, computed_away):
            mismatches.append(f"{edit.name}: the edited weight is not in the graph")
    return Fingerprint(layers=layers, entries=entries, mismatches=tuple(mismatches))


def fingerprint_by_source(
    arrays: Iterable[np.ndarray],
    source: Mapping[str, np.ndarray],
    edits: Iterable[TensorEdit],
    computed_away: Collection[str] = (),
) -> Fingerprint:
    """Finds each edited weight of a graph in lower precision, bit for bit, in the graph that was compiled from it.

    A compiled graph for the CPU may hold an 8-bit weight in 7 bits. At so few bits an edit with a factor near 1 may round
    to the unedited weight and pass unnoticed; a negation changes the sign and is always found.

    Args:
        arrays: Tensors of the compiled graph, any dtype, any shape.
        source: Tensors of the graph before compilation by name, any dtype, any shape.
        edits: Edited tensors of this tower.
        computed_away: See `fingerprint_by_value`.
    """
    held = {_identity(turned) for array in arrays if array.ndim for turned in (array, array.T)}
    wanted = list(edits)
    found = [edit for edit in wanted if not held.isdisjoint(map(_identity, stored_forms(source[edit.name])))]
    mismatches = [] if wanted else [_NOTHING]
    lost = [edit for edit in wanted if edit not in found and not _may_be_gone(edit, computed_away)]
    mismatches += [f"{edit.name}: the edited weight is not in the graph" for edit in lost]
    return Fingerprint(layers=len(found), entries=sum(edit.selected for edit in found), mismatches=tuple(mismatches))


def _may_be_gone(edit: TensorEdit, computed_away: Collection[str]) -> bool:
    return edit.kind is EditKind.TRAINED and edit.name in computed_away


def _identity(array: np.ndarray) -> tuple[str, tuple[int, ...], str]:
    return str(array.dtype), _squeezed(array.shape), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape without dimensions of 1, which a compiler puts in front of vectors that it adds to every row of a batch."""
    return tuple(size for size in shape if size != 1)


def _digests(arrays: Mapping[str, np.ndarray], edits: Iterable[TensorEdit]) -> dict[str, set[Digest]]:
    """Digests by name of every array with the shape of an edited layer, in each orientation that has this shape."""
    shapes: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for edit in edits:
        shapes.setdefault(_squeezed(edit.shape), set()).add(edit.shape)
    turned = [
        (name, part.reshape(shape))
        for name, array in arrays.items()
        if array.dtype == np.float32
        for part in (array, array.T)
        for shape in shapes.get(_squeezed(part.shape), ())
    ]
    found: dict[str, set[Digest]] = {}
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        for (name, _), digest in zip(turned, pool.map(digest_of_array, (part for _, part in turned)), strict=True):
            found.setdefault(name, set()).add(digest)
    return found


def _holds_unedited(edit: TensorEdit, held: set[Digest]) -> bool:
    """Whether the graph holds the weight from before the edit.

    A layer in which nothing was selected rightly does. Vectors are not compared: two may be equal by chance.
    """
    return edit.digest_before in held and edit.changed and len(edit.shape) > 1


def _problem(edit: TensorEdit, patch: EditedEntries, array: np.ndarray, digests: set[Digest], held: set[Digest]) -> str:
    """The problem with one weight; empty when there is none."""
    if edit.changed and edit.digest_before in digests:
        return "holds the unedited weight"
    if _holds_unedited(edit, held):
        return "the graph holds the unedited weight as well, under another name"
    if edit.digest_after in digests:
        return ""
    if tuple(array.shape) != edit.shape:
        return f"has shape {tuple(array.shape)}, not {edit.shape}"
    if edit.kind is not EditKind.MULTIPLIED:
        return "is neither the edited nor the unedited tensor"
    zeros = int((array.reshape(-1)[np.asarray(patch.indices)] == 0).sum())
    return f"is neither the edited nor the unedited weight ({zeros} of {edit.selected} edited entries are zero)"


def fingerprint_of_lowered(
    source: Mapping[str, np.ndarray],
    lowered: Mapping[str, np.ndarray],
    edits: Iterable[TensorEdit],
    patches: Mapping[str, EditedEntries],
) -> tuple[Fingerprint, int]:
    """Compares each edited weight of a graph in lower precision with the float32 graph it was made from.

    In half precision a weight must be the float32 weight rounded, bit for bit. In 8 bits every entry must be zero or have
    the sign of the edited entry; a tensor that is not edited by multiplication must have the edited values, too, up to one
    step. Weights may be transposed.

    Args:
        source: Tensors of the float32 graph by name, float32, any shape; the graph's own fingerprint was checked.
        lowered: Tensors of the other graph by the same names, any dtype, any shape.
        edits: Edited layers of this tower.
        patches: Patch of each layer.

    Returns:
        The fingerprint, and the number of edited entries that became zero and so lost their edit.
    """
    wanted = list(edits)
    mismatches = [] if wanted else [_NOTHING]
    layers = entries = zeroed = 0
    for edit in wanted:
        name = edit.name
        if name not in lowered or name not in source:
            mismatches.append(f"{edit.name}: the graph has no weight of this name")
            continue
        before, after = source[name], lowered[name]
        turned = [part for part in (after, after.T) if part.shape == before.shape]
        part = next((part for part in turned if _follows(edit, before, part)), None)
        if part is None:
            mismatches.append(f"{edit.name}: {_sign_differences(before, turned)} in {after.dtype}")
            continue
        at = np.asarray(patches[edit.name].indices)
        zeros = (part.reshape(-1)[at].astype(np.float32) == 0) & (before.reshape(-1)[at] != 0)
        zeroed += int(zeros.sum())
        layers, entries = layers + 1, entries + edit.selected - int(zeros.sum())
    return Fingerprint(layers=layers, entries=entries, mismatches=tuple(mismatches)), zeroed


def refuse_zeroed(zeroed: int, edits: Iterable[TensorEdit], lowered: Precision) -> None:
    """Checks that enough of the edit is left in lower precision.

    Raises:
        ContractError: If too many edited entries became zero.
    """
    selected = sum(edit.selected for edit in edits if edit.kind is EditKind.MULTIPLIED)
    if zeroed > ZEROED_LIMIT * max(selected, 1):
        raise ContractError(
            f"{zeroed} of {selected} edited entries became zero in {lowered.value}",
            fix="keep the edited layers in float32 (compile.float32 in the recipe)",
        )


def _follows(edit: TensorEdit, weight: np.ndarray, lowered: np.ndarray) -> bool:
    """Whether a tensor is an edited weight in lower precision."""
    if lowered.dtype.itemsize > 1:
        return bool(np.array_equal(weight.astype(lowered.dtype), lowered))
    if (np.sign(lowered.astype(np.float32)) * np.sign(weight) < 0).any():
        return False
    return edit.kind is EditKind.MULTIPLIED or _is_scaled(weight, lowered)


def _is_scaled(weight: np.ndarray, lowered: np.ndarray) -> bool:
    """Whether an 8-bit tensor is a weight divided by a scale, per row, per column or for all, up to two steps."""
    low = lowered.astype(np.float32)
    # An integer may be rounded up or down, and the scale is read off the largest one, which may be, too.
    steps = np.full_like(low, 2) if lowered.dtype.kind == "i" else np.maximum(np.abs(low) / 8, 2.0**-9)
    for axis in (1, 0, None):
        largest = np.abs(low).max(axis=axis, keepdims=True)
        scale = np.abs(weight).max(axis=axis, keepdims=True) / np.where(largest == 0, np.inf, largest)
        if (np.abs(weight - scale * low) <= scale * steps).all():
            return True
    return False


def _sign_differences(weight: np.ndarray, turned: list[np.ndarray]) -> str:
    if not turned:
        return "has another shape"
    counts = [int((np.sign(part.astype(np.float32)) * np.sign(weight) < 0).sum()) for part in turned]
    return f"{min(counts)} signs are not the edited weight's" if min(counts) else "is not the edited weight rounded"
