"""Walks two graphs side by side, value by value, and finds where the second one departs from the first.

Values keep their names from the exported graph through conversion and through ONNX Runtime's optimiser, except those that
it fuses away. Each part of the second graph is run twice: on inputs that the second graph computed, and on inputs that the
first graph computed. The second error is the part's own: errors of earlier parts do not enter it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from uwm_deploy.errors import ContractError, IntegrityError, first_line
from uwm_deploy.graphs.write import INLINE_BYTES
from uwm_deploy.records.diagnosis import Difference, WalkedValue

VALUES = 32
"""Number of values that are compared at a time."""

ROWS = 4
"""Number of input rows at a time; with `VALUES` it bounds the memory."""

_MOVES = frozenset(
    ["Cast", "Concat", "Constant", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Shape", "Slice", "Split",
     "Squeeze", "Transpose", "Unsqueeze", "QuantizeLinear", "DequantizeLinear", "Where"]
)  # fmt: skip
"""Operators that only move, cast or pick numbers: an error in one shows at the next operator that computes."""

_HALF_LARGEST = 65504.0
_MASK = 1e30
"""Larger numbers are masks. Half precision clips them to its largest number or infinity; a softmax gives the same."""

_DIGITS = 1e-5
"""Share of its largest entry to which a tensor is known that was worked out from rounded numbers."""

_ENDLESS = 1e9
"""Relative error of a value that is not finite, or that should be 0 and is not."""


@dataclass(frozen=True, slots=True)
class _Place:
    value: str
    op: str
    layer: str
    after: str


class Graph:
    """An ONNX graph by the names of its values."""

    def __init__(self, path: Path) -> None:
        try:
            self.proto = onnx.load(path)
        except (DecodeError, ValueError) as error:
            raise IntegrityError(f"{path.name} is not a whole ONNX file: {error}", fix="build again") from error
        self._index()

    @classmethod
    def of(cls, proto: onnx.ModelProto) -> Graph:
        """A graph that is in memory, with its data."""
        made = cls.__new__(cls)
        made.proto = proto
        made._index()
        return made

    def _index(self) -> None:
        graph = self.proto.graph
        self.nodes = list(graph.node)
        self.producer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.initialisers = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = {v.name: v for v in graph.input if v.name not in self.initialisers}
        self.kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output, *graph.input)}
        self.outputs = [v.name for v in graph.output]

    def array(self, name: str) -> np.ndarray:
        """Values of an initialiser, any dtype, any shape."""
        array: np.ndarray = numpy_helper.to_array(self.initialisers[name])
        return array

    def is_float(self, name: str) -> bool:
        """Whether a value holds floating point numbers; False where the file gives no type."""
        return self.kinds.get(name, 0) in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)

    def depends_on_input(self) -> set[str]:
        """Values that depend on the numbers of an input, and not only on its shape."""
        found = set(self.inputs)
        for node in self.nodes:
            if node.op_type != "Shape" and any(name in found for name in node.input):
                found.update(node.output)
        return found

    def weights_of(self, node: onnx.NodeProto) -> list[str]:
        """Named weights that a node reads, perhaps behind nodes that transpose, cast or dequantise them."""
        names = []
        for name in node.input:
            source = name
            while source in self.producer and self.nodes[self.producer[source]].op_type in (
                "Transpose", "Cast", "Identity", "DequantizeLinear",
            ):  # fmt: skip
                source = self.nodes[self.producer[source]].input[0]
            if source in self.initialisers and self.layer_of(source):
                names.append(source)
        return names

    def layer_of(self, name: str) -> str:
        """Module path of a weight; empty for a constant of the exporter, and for one that is named after a value."""
        path = name.rpartition(".")[0]
        return "" if path in self.producer else path


def places(reference: Graph, artifact: Graph) -> list[_Place]:
    """Float values that both graphs have and that depend on the input, with their layers, in the order of the reference."""
    alive, found = reference.depends_on_input(), []
    last: dict[str, str] = {}
    for node in reference.nodes:
        own = [reference.layer_of(name) for name in reference.weights_of(node)]
        before = next((last[name] for name in reversed(node.input) if last.get(name)), "")
        for name in node.output:
            last[name] = own[0] if own else before
            usable = reference.is_float(name) and name in artifact.producer and name in alive
            if usable and (node.op_type not in _MOVES or name in reference.outputs):
                found.append(_Place(name, node.op_type, own[0] if own else "", before))
    return found


def part_of(graph: Graph, wanted: Sequence[str], cuts: Set[str]) -> tuple[onnx.ModelProto, list[str]]:
    """The part of a graph that computes some values from others.

    Args:
        graph: The whole graph.
        wanted: Values to compute; they become outputs under the name ``<value>.found``.
        cuts: Values that become inputs wherever the part reads them.

    Returns:
        The part, and its inputs by name.
    """
    needed: set[int] = set()
    held: dict[str, None] = {}
    entering: dict[str, None] = {}
    waiting = [graph.producer[name] for name in wanted]
    while waiting:
        at = waiting.pop()
        if at in needed:
            continue
        needed.add(at)
        for name in filter(None, graph.nodes[at].input):
            if name in cuts or name in graph.inputs:
                entering[name] = None
            elif name in graph.initialisers:
                held[name] = None
            else:
                waiting.append(graph.producer[name])
    model = onnx.ModelProto(ir_version=graph.proto.ir_version)
    model.opset_import.extend(graph.proto.opset_import)
    inner = model.graph
    inner.name = "part"
    for at in sorted(needed):
        node = inner.node.add()
        node.CopyFrom(graph.nodes[at])
        for i, name in enumerate(node.output):
            if name in cuts or name in wanted:
                node.output[i] = f"{name}.found"
        if not cuts:  # then later nodes of the part read the wanted values, too
            for i, name in enumerate(node.input):
                if name in wanted:
                    node.input[i] = f"{name}.found"
    inner.initializer.extend(graph.initialisers[name] for name in held)
    for name in entering:
        kind = graph.kinds.get(name) or onnx.TensorProto.FLOAT
        inner.input.append(onnx.ValueInfoProto(name=name))
        inner.input[-1].type.tensor_type.elem_type = kind
    for name in wanted:
        inner.output.append(onnx.ValueInfoProto(name=f"{name}.found"))
        inner.output[-1].type.tensor_type.elem_type = graph.kinds.get(name) or onnx.TensorProto.FLOAT
    return model, list(entering)


class _Part:
    """A session that runs a part of a graph."""

    def __init__(self, graph: Graph, wanted: Sequence[str], cuts: Set[str], folder: Path) -> None:
        import onnxruntime as ort

        model, self.entering = part_of(graph, wanted, cuts)
        self.wanted, self.graph = list(wanted), graph
        options = ort.SessionOptions()
        options.log_severity_level = 4
        # The graph is compared as it stands in the file; fusing nodes would remove the compared values.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > INLINE_BYTES
        path = folder / ".tmp-part.onnx"
        try:
            if large:
                onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")
            source = str(path) if large else model.SerializeToString()
            self.session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no base class
            line = first_line(error)
            raise ContractError(f"ONNX Runtime cannot open a part of the graph: {line}", fix="report this") from error
        finally:
            for name in (path, folder / f"{path.name}.data"):
                name.unlink(missing_ok=True)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Values by name, float32."""
        kinds = {name: onnx.helper.tensor_dtype_to_np_dtype(self.graph.kinds[name]) for name in self.entering}
        with np.errstate(over="ignore"):
            given = {name: np.asarray(feeds[name]).astype(kinds[name], copy=False) for name in self.entering}
        found = self.session.run([f"{name}.found" for name in self.wanted], given)
        return {name: array.astype(np.float32, copy=False) for name, array in zip(self.wanted, found, strict=True)}


@dataclass(slots=True)
class _Sums:
    """Running sums of the error of one value."""

    difference: float = 0.0
    norm: float = 0.0
    largest: float = 0.0
    finite: bool = True
    comparable: bool = True

    def add(self, wanted: np.ndarray, found: np.ndarray) -> None:
        """Adds the errors of some rows."""
        if wanted.shape != found.shape:
            self.comparable = False
            return
        known = np.abs(wanted) < _MASK  # neither NaN nor infinite
        left, right = wanted[known].astype(np.float64), found[known].astype(np.float64)
        self.finite = self.finite and bool(np.isfinite(right).all())
        apart = left - np.nan_to_num(right)
        self.difference += float((apart * apart).sum())
        self.norm += float((left * left).sum())
        self.largest = max(self.largest, float(np.abs(apart).max(initial=0.0)))

    def relative(self) -> float:
        if not self.finite:
            return _ENDLESS
        if self.norm == 0.0:
            return 0.0 if self.difference == 0.0 else _ENDLESS
        return min(float(np.sqrt(self.difference / self.norm)), _ENDLESS)


def walk(reference: Graph, artifact: Graph, rows: np.ndarray, folder: Path) -> list[WalkedValue]:
    """Compares every value that both graphs have, in the order of the reference.

    Args:
        reference: Float32 graph.
        artifact: Graph of any precision.
        rows: (n, ...) inputs, float32 pixels or int64 ids.
        folder: Folder for temporary files.

    Raises:
        ContractError: If the graphs have no value in common.
    """
    found = places(reference, artifact)
    if not found:
        raise ContractError("the graphs have no value in common", fix="diagnose the graph it was made from")
    cuts = {place.value for place in found}
    walked: list[WalkedValue] = []
    for start in range(0, len(found), VALUES):
        chunk = found[start : start + VALUES]
        walked += _walk_some(reference, artifact, chunk, cuts, rows, folder)
    return walked


def _walk_some(
    reference: Graph, artifact: Graph, chunk: Sequence[_Place], cuts: Set[str], rows: np.ndarray, folder: Path
) -> list[WalkedValue]:
    names = [place.value for place in chunk]
    alone, whole = _Part(artifact, names, cuts, folder), _Part(artifact, names, frozenset(), folder)
    further = [name for name in alone.entering if name in cuts and name not in names]
    wanted = _Part(reference, [*names, *further], frozenset(), folder)
    own, total = {name: _Sums() for name in names}, {name: _Sums() for name in names}
    for piece in _pieces(rows):
        inputs = dict.fromkeys(reference.inputs, piece)
        right = wanted.run(inputs)
        for sums, values in ((own, alone.run(inputs | right)), (total, whole.run(inputs))):
            for name in names:
                sums[name].add(right[name], values[name])
    return [
        WalkedValue(
            value=place.value,
            op=place.op,
            layer=place.layer,
            after=place.after,
            own=own[place.value].relative(),
            whole=total[place.value].relative(),
            max_abs=total[place.value].largest,
            finite=total[place.value].finite and own[place.value].finite,
        )
        for place in chunk
        if own[place.value].comparable and total[place.value].comparable
    ]


def _pieces(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + ROWS] for start in range(0, len(rows), ROWS))


def differences(
    reference: Graph, artifact: Graph, *, together: Set[str] = frozenset(), about: Set[str] = frozenset()
) -> list[Difference]:
    """Weights, constants and attributes that differ from the reference's by more than the artifact's precision explains.

    Tensors and nodes that were renamed or fused away are not compared.

    Args:
        reference: Float32 graph.
        artifact: Graph of any precision.
        together: Weights of which every entry may be rounded up or down (`graphs.rounding`).
        about: Tensors that the reference knows only to some digits.
    """
    where = _layers(reference)
    found = []
    kept = _tensors(artifact)
    for name, tensor in _tensors(reference).items():
        if name not in kept:
            continue
        steps, share = 2.0 if name in together else 1.0, _DIGITS if name in about else 0.0
        if detail := _apart(tensor, kept[name], name, artifact, steps=steps, share=share):
            layer = reference.layer_of(name) or where.get(name, "")
            found.append(Difference(layer=layer, what=name, detail=detail))
    for node in reference.nodes:
        for output in node.output:
            at = artifact.producer.get(output)
            if at is None or artifact.nodes[at].op_type != node.op_type:
                continue
            wanted, got = _attributes(node), _attributes(artifact.nodes[at])
            found += [
                Difference(
                    layer=where.get(output, ""),
                    what=f"{node.op_type} {key} of {output}",
                    detail=f"{_shown(got.get(key))}, reference {_shown(wanted.get(key))}",
                )
                for key in sorted(wanted.keys() | got.keys())
                if wanted.get(key) != got.get(key)
            ]
    return found


def _shown(value: float | int | tuple[int, ...] | None) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "missing" if value is None else str(value)


def _layers(graph: Graph) -> dict[str, str]:
    """Layer of each value and constant, or the nearest layer before it."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        own = [graph.layer_of(name) for name in graph.weights_of(node)]
        before = next((found[name] for name in reversed(node.input) if found.get(name)), "")
        for name in node.output:
            found[name] = own[0] if own else before
        for name in node.input:
            if name in graph.initialisers or name not in found:
                found.setdefault(name, own[0] if own else before)
    return found


def _attributes(node: onnx.NodeProto) -> dict[str, float | int | tuple[int, ...]]:
    """Numeric attributes of a node; without operators whose attributes a conversion changes on purpose."""
    if node.op_type in ("Cast", "Constant", "DequantizeLinear", "QuantizeLinear"):
        return {}
    kinds = onnx.AttributeProto
    result: dict[str, float | int | tuple[int, ...]] = {}
    # ONNX Runtime writes out values that the standard gives to an attribute that is not there.
    for attribute in (*_standard(node.op_type, node.domain), *node.attribute):
        if attribute.type == kinds.FLOAT:
            result[attribute.name] = float(np.float32(attribute.f))
        elif attribute.type == kinds.INT:
            result[attribute.name] = attribute.i
        elif attribute.type == kinds.INTS:
            result[attribute.name] = tuple(attribute.ints)
    return result


@cache
def _standard(operator: str, domain: str) -> tuple[onnx.AttributeProto, ...]:
    """Attributes that an operator has when a node does not name them; none for an operator outside the standard."""
    if not onnx.defs.has(operator, domain):
        return ()
    schema = onnx.defs.get_schema(operator, domain)
    return tuple(one.default_value for one in schema.attributes.values() if one.default_value.name)


def _tensors(graph: Graph) -> dict[str, onnx.TensorProto]:
    """Initialisers and constants by name."""
    constants = {
        node.output[0]: attribute.t
        for node in graph.nodes
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    return constants | graph.initialisers


def _apart(
    reference: onnx.TensorProto, tensor: onnx.TensorProto, name: str, artifact: Graph, *, steps: float, share: float
) -> str:
    """Difference of a tensor from the reference's beyond rounding, in words; empty when there is none.

    Args:
        reference, tensor: What is compared.
        name: Of both.
        artifact: Graph that the tensor is in.
        steps: Largest rounding error in 8 bits, in halves of a step.
        share: Of the largest entry, by which the reference itself may be wrong.
    """
    wanted, got = numpy_helper.to_array(reference), numpy_helper.to_array(tensor)
    if not np.issubdtype(wanted.dtype, np.floating):
        return ""
    if got.dtype == wanted.dtype:
        values, bound = got.astype(np.float64), np.zeros(got.shape)
    elif got.dtype.itemsize == 2:
        # Rounded as in the conversion, which clips constants to the largest finite number.
        limit = _HALF_LARGEST if got.dtype == np.float16 else 3.3895313892515355e38
        wanted = np.clip(wanted, -limit, limit).astype(got.dtype)
        values, bound = got.astype(np.float64), np.zeros(got.shape)
    elif (known := _from_8_bits(got, name, artifact)) is not None:
        values, bound = known[0], known[1] * steps
    else:
        return ""
    plain = wanted.astype(np.float64)
    bound = bound + share * np.abs(plain).max(initial=0.0)
    pairs = [
        (v, b) for v, b in ((values, bound), (values.T, bound.T)) if v.shape == plain.shape
    ]  # as it lies or turned
    if not pairs:
        return f"has shape {got.shape}, reference {wanted.shape}"
    best = min((np.abs(v - plain) - b * 1.01 for v, b in pairs), key=lambda over: int((over > 0).sum()))
    off = int((best > 0).sum())
    if not off:
        return ""
    return f"{off} of {plain.size} entries differ beyond rounding, the worst by {float(best.max()):.3g}"


def _from_8_bits(got: np.ndarray, name: str, artifact: Graph) -> tuple[np.ndarray, np.ndarray] | None:
    """Values of a quantised weight, and the largest rounding error of each; None when the graph has no scale for it."""
    for node in artifact.nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] == name and node.input[1] in artifact.initialisers:
            scale = numpy_helper.to_array(artifact.initialisers[node.input[1]]).astype(np.float64)
            of = {attribute.name: attribute.i for attribute in node.attribute}
            axis, block = of.get("axis", 1), of.get("block_size", 0)
            if block:
                scale = np.repeat(scale, block, axis)[tuple(map(slice, got.shape))]
            elif scale.ndim:
                scale = np.expand_dims(scale, tuple(i for i in range(got.ndim) if i != axis % got.ndim))
            values = got.astype(np.float64) * scale
            steps = 0.5 if got.dtype == np.int8 else np.maximum(np.abs(got.astype(np.float64)) / 16, 2.0**-10)
            return values, np.broadcast_to(steps * scale, values.shape)
    return None
