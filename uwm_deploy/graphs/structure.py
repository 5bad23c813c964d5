"""Compares two graphs as computations: operators, edges, attributes, constants. Names and order do not count.

Every value gets a key that is made from its operator, its attributes and the keys of its inputs. Two values with one key
are computed in the same way from the same inputs and constants. What one graph has and the other does not is reported
where it begins; all that follows from it has other keys too, and is left out.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

RANDOM = frozenset(
    ["Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"]
)
"""Operators whose result is drawn anew at every call."""

CHOOSES = frozenset(["If", "Loop", "Scan", "Where"])
"""Operators with which a graph can give one result for some inputs and another for others."""

_ROUNDING = 1e-6
"""Largest difference, as a share of the largest entry, at which a constant that a compiler computed is the same: other
processors may add in another order."""

_FEW = 4
"""Entries of a constant that are shown, and inputs of an operator that are named."""

_AS_THEY_ARE = frozenset(["Cast", "DequantizeLinear", "Identity", "Transpose"])
"""Operators behind which a weight is still that weight."""

_DOMAINS = ("", "ai.onnx")


@dataclass(slots=True)
class Computation:
    """A graph by keys.

    Attributes:
        model: The graph; its nodes are sorted.
        keys: Key of every value.
        nodes: Every node, nested ones apart, with its key, in an order in which they can be computed.
        constants: Array of every constant by its key, any dtype, any shape; weights that are known by name apart.
        layers: Layer of each value, or the nearest one before it.
    """

    model: ir.Model
    keys: dict[ir.Value, str] = field(default_factory=dict)
    nodes: list[tuple[ir.Node, str]] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    layers: dict[ir.Value, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Departures:
    """What one graph has that another does not have, in words.

    Attributes:
        weights: Matrices that are not in the other graph.
        operators: Everything else.
    """

    weights: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many there are."""
        return len(self.weights) + len(self.operators)


def computation_of(
    model: ir.Model, weights: Collection[str] = (), like: Mapping[str, np.ndarray] | None = None
) -> Computation:
    """The keys of a graph.

    Args:
        model: The graph; its nodes are sorted in place.
        weights: Names of initialisers that are compared elsewhere: their keys are made from their names.
        like: Constants by key, any dtype, any shape, of the graph that it will be compared with: one that equals one of
            these up to rounding counts as that one. None where equal means bit for bit.
    """
    model.graph.sort()
    found = Computation(model)
    _Keys(found, frozenset(weights), like or {}).of_graph(model.graph, model.graph.inputs)
    return found


def departures(found: Computation, wanted: Computation, edited: Collection[str] = ()) -> Departures:
    """What a graph has that another one does not explain, and what it lacks.

    Args:
        found: The graph in question.
        wanted: What it must be.
        edited: Names of edited weights, where the graphs know weights by name.
    """
    words = [*_frames(found.model, wanted.model), *_outputs(found, wanted)]
    known = set(wanted.keys.values())
    extra = Counter(key for _, key in found.nodes) - Counter(key for _, key in wanted.nodes)
    missing = Counter(key for _, key in wanted.nodes) - Counter(key for _, key in found.nodes)
    words += _counts(found, wanted)
    if edited and extra:
        words += _paths_around(found, wanted, frozenset(edited))
    words += [_origin(node, found, wanted, known) for node in _origins(found, extra, known)]
    if missing and not words:
        words.append(f"{sum(missing.values())} operators of the model are missing")
    unused = [value.name for value in _initialisers(found.model) if not value.uses() and not value.is_graph_output()]
    spare = {value.name for value in _initialisers(wanted.model) if not value.uses()}
    words += [f"{name} is a constant that nothing reads" for name in unused if name not in spare]
    return Departures(tuple(_other_weights(found, wanted)), tuple(dict.fromkeys(words)))


# --- keys -----------------------------------------------------------------------------------------------------------


class _Keys:
    """Fills a computation."""

    def __init__(self, found: Computation, weights: frozenset[str], like: Mapping[str, np.ndarray]) -> None:
        self.found, self.weights = found, weights
        self.like: dict[tuple[str, tuple[int, ...]], list[tuple[str, np.ndarray]]] = {}
        for key, array in like.items():
            self.like.setdefault((str(array.dtype), array.shape), []).append((key, array))

    def of_graph(self, graph: ir.Graph, inputs: Sequence[ir.Value], depth: int = 0) -> list[str]:
        """Keys of the outputs of a graph."""
        keys, layers = self.found.keys, self.found.layers
        for place, value in enumerate(inputs):
            keys[value] = _digest("input", depth, place, value.name if depth == 0 else "", _typed(value))
        for value in graph.initializers.values():
            keys[value] = self._initialiser(value)
        for node in graph:
            key = self._of_node(node, depth)
            named = [_layer_of(value) for value in node.inputs if value is not None]
            before = [layers[value] for value in node.inputs if value is not None and layers.get(value)]
            own = next(filter(None, named), "") or (before[-1] if before else "")
            for place, value in enumerate(node.outputs):
                keys[value] = key if node.op_type == "Constant" else _digest(key, place)
                layers[value] = own
            if depth == 0 and node.op_type != "Constant":
                self.found.nodes.append((node, key))
        return [keys[value] for value in graph.outputs]

    def _initialiser(self, value: ir.Value) -> str:
        if value.name in self.weights:
            return _digest("weight", value.name, _typed(value))
        return self._constant(value.const_value)

    def _of_node(self, node: ir.Node, depth: int) -> str:
        if node.op_type == "Constant" and (tensor := _constant_of(node)) is not None:
            return self._constant(tensor)
        inputs = ["" if value is None else self.found.keys[value] for value in node.inputs]
        attributes = [(name, *self._attribute(attr, depth)) for name, attr in sorted(node.attributes.items())]
        domain = "" if node.domain in _DOMAINS else node.domain
        return _digest(node.op_type, domain, attributes, inputs, len(node.outputs))

    def _attribute(self, attribute: ir.Attr, depth: int) -> tuple[object, ...]:
        kind = attribute.type
        if attribute.is_ref():
            return ("ref", attribute.ref_attr_name)
        if kind == ir.AttributeType.TENSOR:
            return ("tensor", self._constant(attribute.as_tensor()))
        if kind == ir.AttributeType.GRAPH:
            graph = attribute.as_graph()
            return ("graph", self.of_graph(graph, graph.inputs, depth + 1))
        return (kind.name, _shown(attribute))

    def _constant(self, tensor: ir.TensorProtocol | None) -> str:
        if tensor is None:
            return _digest("constant without values")
        array = np.asarray(tensor.numpy())
        content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        key = _digest("constant", str(array.dtype), array.shape, content)
        key = self._nearly(key, array)
        self.found.constants.setdefault(key, array)
        return key

    def _nearly(self, key: str, array: np.ndarray) -> str:
        """The key of a constant of the other graph that this one is, but for rounding."""
        if array.dtype.kind != "f":
            return key
        alike = self.like.get((str(array.dtype), array.shape), [])
        if not alike or any(key == other for other, _ in alike):
            return key
        for other, wanted in alike:
            scale = float(np.abs(wanted).max(initial=0.0))
            with np.errstate(invalid="ignore"):
                near = bool((np.abs(array.astype(np.float64) - wanted) <= _ROUNDING * scale).all())
            if near:
                return other
        return key


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _constant_of(node: ir.Node) -> ir.TensorProtocol | None:
    """Value of a Constant node, however it is written."""
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        attribute = node.attributes.get(name)
        if attribute is None:
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            return attribute.as_tensor()
        dtype = np.float32 if "float" in name else np.int64
        return ir.tensor(np.asarray(attribute.value, dtype=dtype))
    return None


def _typed(value: ir.Value) -> str:
    return f"{value.dtype} {_shape(value)}"


def _shape(value: ir.Value) -> str:
    return "?" if value.shape is None else str([str(size) for size in value.shape])


def _layer_of(value: ir.Value) -> str:
    """Layer of a weight, or nothing for any other value."""
    while (before := value.producer()) is not None:
        if before.op_type not in _AS_THEY_ARE or not before.inputs or before.inputs[0] is None:
            return ""
        value = before.inputs[0]
    name = value.name or ""
    return name.rpartition(".")[0] if value.is_initializer() else ""


def _initialisers(model: ir.Model) -> list[ir.Value]:
    return list(model.graph.initializers.values())


# --- words ----------------------------------------------------------------------------------------------------------


def _frames(found: ir.Model, wanted: ir.Model) -> Iterator[str]:
    """Inputs, outputs, opsets and functions."""
    for what, left, right in (
        ("inputs", found.graph.inputs, wanted.graph.inputs),
        ("outputs", found.graph.outputs, wanted.graph.outputs),
    ):
        shown = [[f"{value.name} {_typed(value)}" for value in values] for values in (left, right)]
        if shown[0] != shown[1]:
            yield f"{what} are {', '.join(shown[0])}, the model's {', '.join(shown[1])}"
    versions = [{k or "ai.onnx": v for k, v in sorted(model.opset_imports.items())} for model in (found, wanted)]
    if versions[0] != versions[1]:
        yield f"opsets are {versions[0]}, the model's {versions[1]}"
    if own := sorted(str(key) for key in set(found.functions) - set(wanted.functions)):
        yield f"the graph defines operators of its own: {', '.join(own[:_FEW])}"


def _outputs(found: Computation, wanted: Computation) -> Iterator[str]:
    """An output that is a value of the model, but not this one."""
    known = {key: value for value, key in wanted.keys.items()}
    for left, right in zip(found.model.graph.outputs, wanted.model.graph.outputs, strict=False):
        key = found.keys[left]
        if key != wanted.keys[right] and key in known:
            yield f"output {left.name} is taken where the model has {known[key].name}{_in(wanted, known[key])}"


def _counts(found: Computation, wanted: Computation) -> Iterator[str]:
    counts = [Counter(node.op_type for node, _ in part.nodes) for part in (found, wanted)]
    for more, text in ((counts[0] - counts[1], "operators that the model does not explain"),
                       (counts[1] - counts[0], "operators of the model that are missing")):  # fmt: skip
        if more:
            yield f"{text}: {', '.join(f'{count} {kind}' for kind, count in sorted(more.items()))}"


def _origins(found: Computation, extra: Counter[str], known: set[str]) -> Iterator[ir.Node]:
    """Nodes that the other graph does not have although it has all that they read, constants apart."""
    for node, key in found.nodes:
        if not extra.get(key):
            continue
        extra[key] -= 1
        keys = [found.keys[value] for value in node.inputs if value is not None]
        if all(k in known or k in found.constants for k in keys):
            yield node


def _origin(node: ir.Node, found: Computation, wanted: Computation, known: set[str]) -> str:
    """One node that should not be there: what it does, and what the model has in its place."""
    place = _in(found, node.outputs[0])
    like = _in_its_place(node, found, wanted, known)
    name = f"{node.op_type} of {_read(node)}"
    if like is None:
        why = ", which draws anew at every call" if node.op_type in RANDOM else ""
        why = why or (
            ", which gives one result for some inputs and another for others" if node.op_type in CHOOSES else ""
        )
        return f"{name}{place} is not in the model{why}"
    for key in sorted(node.attributes.keys() | like.attributes.keys()):
        left, right = (_attribute_shown(part, key) for part in (node, like))
        if left != right:
            return f"{node.op_type}{place} has {key} {left}, the model {right}"
    for left_value, right_value in zip(node.inputs, like.inputs, strict=True):
        if left_value is None or right_value is None or found.keys[left_value] == wanted.keys[right_value]:
            continue
        mine, theirs = found.constants.get(found.keys[left_value]), wanted.constants.get(wanted.keys[right_value])
        return f"{node.op_type}{place} reads {_array_shown(mine, theirs)}, the model {_array_shown(theirs, mine)}"
    return f"{name}{place} is there a second time"


def _in_its_place(node: ir.Node, found: Computation, wanted: Computation, known: set[str]) -> ir.Node | None:
    """The node of the other graph that reads the same, but for its constants, or has other attributes."""
    keys = [_varying(found, value, known) for value in node.inputs]
    for other, _ in wanted.nodes:
        if other.op_type != node.op_type or len(other.inputs) != len(node.inputs):
            continue
        theirs = [_varying(wanted, value, known) for value in other.inputs]
        if all(a == b or ("" in (a, b) and len(keys) > 1) for a, b in zip(keys, theirs, strict=True)) and any(keys):
            return other
    return None


def _varying(part: Computation, value: ir.Value | None, known: set[str]) -> str:
    """Key of a value that is no constant."""
    if value is None:
        return "none"
    key = part.keys[value]
    return "" if key in part.constants or key not in known else key


def _read(node: ir.Node) -> str:
    names = [value.name or "?" for value in node.inputs if value is not None]
    return ", ".join(names[:_FEW]) or "nothing"


def _in(part: Computation, value: ir.Value) -> str:
    layer = part.layers.get(value, "")
    return f" (after {layer})" if layer else ""


def _attribute_shown(node: ir.Node, name: str) -> str:
    attribute = node.attributes.get(name)
    return "none" if attribute is None else _shown(attribute)


def _shown(attribute: ir.Attr) -> str:
    value = attribute.value
    if attribute.type == ir.AttributeType.FLOAT:
        return f"{float(np.float32(value)):.9g}"
    if attribute.type == ir.AttributeType.FLOATS:
        return str([f"{float(np.float32(one)):.9g}" for one in value])
    if attribute.type == ir.AttributeType.INTS:
        return str([int(one) for one in value])
    return str(value) if attribute.type in (ir.AttributeType.INT, ir.AttributeType.STRING) else attribute.type.name


def _array_shown(array: np.ndarray | None, other: np.ndarray | None) -> str:
    """A small constant; of a large one the first entry that is another than the other's."""
    if array is None:
        return "a computed value"
    flat = array.reshape(-1)
    if flat.size <= _FEW:
        return f"{array.dtype} {flat.tolist()}"
    if other is None or other.shape != array.shape:
        return f"{array.dtype} {array.shape}"
    at = int(np.flatnonzero(flat != other.reshape(-1))[:1].sum())
    return f"{array.dtype} {array.shape} with {flat[at]!s} at {at}"


def _other_weights(found: Computation, wanted: Computation) -> Iterator[str]:
    """Matrices of numbers that the other graph does not hold."""
    names: dict[str, str] = {}
    for value in _initialisers(found.model):
        names.setdefault(found.keys[value], value.name or "")
    for key, array in found.constants.items():
        if key not in wanted.constants and array.ndim >= 1 and array.dtype.kind in "fV" and array.size > 1:
            layers = {found.layers.get(v, "") for node, _ in found.nodes for v in node.outputs
                      if any(value is not None and found.keys[value] == key for value in node.inputs)}  # fmt: skip
            place = next(filter(None, sorted(layers)), "")
            yield f"{names.get(key) or 'a constant'}{f' (at {place})' if place else ''}: its entries are not the graph's"


def _paths_around(found: Computation, wanted: Computation, edited: frozenset[str]) -> Iterator[str]:
    """Whether the result depends on the input in a way that no edited layer is on, which the model does not have."""
    kinds = {value.name: node.op_type for node, _ in wanted.nodes for value in node.outputs}
    new = {node for node, _ in found.nodes if any(kinds.get(v.name) != node.op_type for v in node.outputs)}
    weights = {value for value in _initialisers(found.model) if value.name in edited}
    behind, varying = _reached(found, weights), _reached(found, set(found.model.graph.inputs))
    before: set[ir.Node] = set()  # nodes with an edited weight at or after them
    for node, _ in reversed(found.nodes):
        if weights & set(node.inputs) or any(user in before for value in node.outputs for user, _ in value.uses()):
            before.add(node)
    for node, _ in found.nodes:
        if node not in new or node in before:
            continue
        early = [v for v in node.inputs if v is not None and v in varying and v not in behind]
        if early and any(v in behind for v in node.inputs):
            yield f"{node.op_type} of {_read(node)} brings a path to the result that no edited layer is on"
            return
    for node in new:
        changed = sorted(v.name or "" for v in node.inputs if v is not None and v in weights)
        if changed and node.op_type not in _AS_THEY_ARE:
            yield f"the edited weight {changed[0]} goes through {node.op_type} before it is used"
            return


def _reached(part: Computation, starts: set[ir.Value]) -> set[ir.Value]:
    """Values that depend on some others, and these."""
    found = set(starts)
    for node, _ in part.nodes:
        if any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found
