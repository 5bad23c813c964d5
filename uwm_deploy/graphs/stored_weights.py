"""Replaces weights inside an ONNX file: every other byte stays as it is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from uwm_deploy.errors import ContractError, InputError
from uwm_deploy.graphs.cpu_integers import stored_forms
from uwm_deploy.graphs.quantise import EightBitType, rounded_weight, weight_scale
from uwm_deploy.graphs.tensor_layout import StoredTensor, stored_tensors

_HALF = {
    int(onnx.TensorProto.FLOAT16): np.dtype(np.float16),
    int(onnx.TensorProto.BFLOAT16): np.dtype(ml_dtypes.bfloat16),
}
_EIGHT_BITS: dict[int, EightBitType] = {int(onnx.TensorProto.INT8): "int8", int(onnx.TensorProto.FLOAT8E4M3FN): "fp8"}
FLOAT = int(onnx.TensorProto.FLOAT)
TYPES = (FLOAT, *_HALF, *_EIGHT_BITS)
"""Element types that an edited weight may have, float32 first, then float16, bfloat16, INT8 and FP8."""
EIGHT_BITS = frozenset(_EIGHT_BITS)
"""Element types that have scales."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """One weight before and after an edit.

    Attributes:
        before: (out, in) or (out,) float32.
        after: (out, in) or (out,) float32, the shape of `before`.
    """

    before: np.ndarray
    after: np.ndarray


def read_tensor(folder: Path, tensor: StoredTensor) -> np.ndarray:
    """Reads a float32 initialiser.

    Args:
        folder: Folder of the ONNX file.
        tensor: Position of the initialiser.

    Returns:
        float32, any shape (the initialiser's own).
    """
    return np.frombuffer(_bytes_of(folder, tensor), dtype="<f4").reshape(tensor.shape)


def named_weights(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every initialiser of an ONNX file by its name, any dtype, any shape."""
    for name, value in ir.load(path).graph.initializers.items():
        if value.const_value is not None:
            yield name, value.const_value.numpy()


def in_type(weight: np.ndarray, kind: int) -> np.ndarray:
    """A float32 tensor as a graph of some element type stores it.

    Args:
        weight: (out, in) or (out,) float32.
        kind: Element type, a number of TensorProto.DataType; one of `TYPES`.

    Returns:
        The same shape, (out, in) or (out,), in the dtype of `kind`; in 8 bits a matrix is divided by its scales, and a
        vector stays float32.

    Raises:
        ContractError: If a value is outside the range of the type.
    """
    if kind in _EIGHT_BITS and weight.ndim == 2:
        return rounded_weight(weight, _scale(weight, kind), 0, _EIGHT_BITS[kind])
    with np.errstate(over="ignore"):
        cast = weight.astype(_HALF.get(kind, np.float32))
    if not np.isfinite(cast.astype(np.float32)).all():
        raise ContractError(f"a weight is outside the range of {cast.dtype}", fix="keep its layer in float32")
    return cast


def refuse_other_scales(layer: str, where: str, change: Replacement, kind: int) -> None:
    """Checks that the scales of a weight, which stay as they are, fit the new weight.

    Raises:
        InputError: If they do not.
    """
    if kind not in _EIGHT_BITS or change.after.ndim != 2:
        return
    if not np.array_equal(_scale(change.before, kind), _scale(change.after, kind)):
        raise InputError(
            f"{layer} is quantised in {where}, and the new edit moves its scales",
            fix="use a factor that keeps absolute values, such as -1, or build again",
        )


def replace_tensors(
    source: Path, external: str, folder: Path, changes: Mapping[str, Replacement]
) -> dict[str, StoredTensor]:
    """Copies an ONNX file with some of its weights replaced; all other bytes stay the same.

    A weight is found by its bytes, in the type and orientation that the file has, so this also works on a graph in which an
    optimiser changed the names.

    Args:
        source: ONNX file.
        external: Name of its external data file beside it, or empty.
        folder: Folder for the copies.
        changes: Layer to its weight before and after; a layer whose weight stays the same is only looked up.

    Returns:
        Layer to the initialiser that holds it.

    Raises:
        ContractError: If a weight is not there exactly once.
        InputError: If its scales, which stay as they are, would not fit the new weight.
    """
    tensors = stored_tensors(source, external)
    found, data = {}, {}
    for layer, change in changes.items():
        found[layer], form, turned = _stored_weight(source.parent, tensors, layer, change.before)
        kind = found[layer].kind
        refuse_other_scales(layer, source.name, change, kind)
        after = stored_forms(in_type(change.after, kind))[form]
        data[layer] = np.ascontiguousarray(after.T if turned else after).tobytes()
    if len(set(found.values())) < len(found):
        raise ContractError(f"two layers share one weight in {source.name}", fix="build again")
    for name in filter(None, (source.name, external)):
        shutil.copyfile(source.parent / name, folder / name)
    for layer, tensor in found.items():
        with (folder / tensor.file).open("r+b") as stream:
            stream.seek(tensor.offset)
            stream.write(data[layer])
    return found


def _stored_weight(
    folder: Path, tensors: list[StoredTensor], layer: str, weight: np.ndarray
) -> tuple[StoredTensor, int, bool]:
    """The initialiser that holds a weight, the number of its stored form, and whether it is transposed."""
    matches = []
    wanted: dict[int, tuple[np.ndarray, ...]] = {}
    for tensor in tensors:
        kind = tensor.kind
        if kind not in TYPES or sorted(tensor.shape) != sorted(weight.shape):
            continue
        if kind in _EIGHT_BITS and weight.ndim != 2:  # zero points; only matrices are quantised
            continue
        if kind not in wanted:
            wanted[kind] = stored_forms(in_type(weight, kind))
        ways = [(part, form, turned) for form, array in enumerate(wanted[kind]) for part, turned in _turns(array)]
        for part, form, turned in ways:
            if part.shape == tensor.shape and _holds(folder, tensor, part):
                matches.append((tensor, form, turned))
                break
    if len(matches) != 1:
        count = "is not" if not matches else f"is {len(matches)} times"
        raise ContractError(f"the weight of {layer} {count} in the graph", fix="build again")
    return matches[0]


def _turns(array: np.ndarray) -> tuple[tuple[np.ndarray, bool], ...]:
    return (array, False), (array.T, True)


def _holds(folder: Path, tensor: StoredTensor, array: np.ndarray) -> bool:
    """Whether a tensor holds an array bit for bit, so -0 is not 0; the first row alone rejects most tensors."""
    first = np.ascontiguousarray(array[0]).tobytes()
    return _bytes_of(folder, tensor, len(first)) == first and _bytes_of(folder, tensor) == array.tobytes()


def _bytes_of(folder: Path, tensor: StoredTensor, size_bytes: int = -1) -> bytes:
    """The first bytes of a tensor, or all of them."""
    with (folder / tensor.file).open("rb") as stream:
        stream.seek(tensor.offset)
        return stream.read(tensor.size_bytes if size_bytes < 0 else size_bytes)


def _scale(weight: np.ndarray, kind: int) -> np.ndarray:
    return weight_scale(weight, 0, _EIGHT_BITS[kind])
