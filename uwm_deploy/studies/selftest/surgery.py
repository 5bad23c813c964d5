"""Changes to ONNX graphs that no exporter should make, and that some did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from torch import nn

from uwm_deploy.errors import ContractError
from uwm_deploy.records.edit import MAP_NAMES

Change = Callable[[onnx.ModelProto], None]


def changed_graph(source: Path, folder: Path, change: Change) -> Path:
    """A graph with a change, in a folder.

    Raises:
        ContractError: If the change changes nothing: a fault that was not planted must not count as detected.
    """
    model = onnx.load(source)
    before = model.SerializeToString(deterministic=True)
    change(model)
    if model.SerializeToString(deterministic=True) == before:
        raise ContractError(f"the fault was not planted in {source.name}", fix="report this")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / source.name
    onnx.save(model, path)
    return path


def with_weights(tower: nn.Module) -> Change:
    """Puts a module's parameters in the place of the graph's weights of the same names: what an export of it holds."""
    values = {name: parameter.detach().cpu().numpy() for name, parameter in tower.named_parameters()}

    def change(model: onnx.ModelProto) -> None:
        replace_weights(model, lambda name, array: values.get(name, array))

    return change


def replace_weights(model: onnx.ModelProto, new: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Replaces initialisers by the results of a function.

    Args:
        model: Changed in place.
        new: From name and value, any dtype and any shape, to a value of the same dtype; an initialiser for which it returns
            the very same array stays.
    """
    for tensor in model.graph.initializer:
        before = numpy_helper.to_array(tensor)
        after = new(tensor.name, before)
        if after is not before:
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(after, dtype=before.dtype, order="C"), tensor.name))


def weights_where(wanted: Callable[[str], bool], new: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Replaces the initialisers of some names.

    Args:
        wanted: Whether an initialiser is replaced, by name.
        new: From a value, any dtype and any shape, to a value of the same dtype.
    """

    def change(model: onnx.ModelProto) -> None:
        replace_weights(model, lambda name, array: new(array) if wanted(name) else array)

    return change


def epsilon(value: float) -> Change:
    """Another epsilon in every layer normalisation."""

    def change(model: onnx.ModelProto) -> None:
        for node in _of_type(model, "LayerNormalization"):
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = value

    return change


def gelu_for_quick_gelu(model: onnx.ModelProto) -> None:
    """X * sigmoid(1.702 x) becomes the exact GELU."""
    sigmoids = {node.output[0] for node in _of_type(model, "Sigmoid")}
    for node in _of_type(model, "Mul"):
        gate = [name for name in node.input if name in sigmoids]
        if gate:
            rest = [name for name in node.input if name not in sigmoids]
            del node.input[:], node.attribute[:]
            node.op_type = "Gelu"
            node.input.extend(rest)


def pool_at_start(model: onnx.ModelProto) -> None:
    """An end token that no caption holds: the position of the largest value of all zeros is the first."""
    wanted = {name for node in _of_type(model, "Equal") for name in node.input}
    replace_weights(model, lambda name, array: np.full_like(array, -7) if name in wanted else array)


def no_mask(model: onnx.ModelProto) -> None:
    """Words see what comes after them, padding too."""
    masks = {name for node in _of_type(model, "Where") for name in node.input[1:]}
    for node in _of_type(model, "Constant"):
        if node.output[0] in masks:
            tensor = node.attribute[0].t
            tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)), tensor.name))


def one_query_row(model: onnx.ModelProto) -> None:
    """The last attention has the pooled token as its one query row, and is normalised over queries: every weight is 1.

    An engine that fuses attention computes what TensorRT 10.13 to 11.1 has been seen to compute wrong: one query row.
    """
    softmax = _of_type(model, "Softmax")[-1]
    softmax.attribute[0].i = 2
    makers = {output: node for node in model.graph.node for output in node.output}
    logits = makers[makers[softmax.input[0]].input[0]]
    queries, logits.input[0] = logits.input[0], "pooled_query"
    _constants(model, {"pooled_token": [0], "one_row": [-1, 1, _width(model, queries, makers)]})
    joined = next(
        node for node in list(model.graph.node)[list(model.graph.node).index(softmax) :] if node.op_type == "Reshape"
    )
    joined.input[1] = "one_row"
    place = list(model.graph.node).index(logits)
    pooled = onnx.helper.make_node("Gather", [queries, "pooled_token"], ["pooled_query"], axis=2)
    model.graph.node.insert(place, pooled)
    del model.graph.value_info[:]


def _width(model: onnx.ModelProto, queries: str, makers: Mapping[str, onnx.NodeProto]) -> int:
    """Channels of the queries of all heads."""
    split = makers[makers[queries].input[0]]
    value = next(value for value in model.graph.value_info if value.name == split.input[0])
    width: int = value.type.tensor_type.shape.dim[2].dim_value
    return width


def no_projection(model: onnx.ModelProto) -> None:
    """The embedding before it is projected into the shared space."""
    (last,) = _of_type(model, "Gemm")
    first = last.input[0]
    del last.input[:], last.attribute[:]
    last.op_type = "Identity"
    last.input.append(first)
    _forget_shapes(model)


def no_normalisation(model: onnx.ModelProto) -> None:
    """Embeddings of any length."""
    last = _output_node(model)
    first = last.input[0]
    del last.input[:]
    last.op_type = "Identity"
    last.input.append(first)


def normalised_twice(model: onnx.ModelProto) -> None:
    """Divided by the length of the embedding before it was divided."""
    last = _output_node(model)
    output, length = last.output[0], last.input[1]
    last.output[0] = "divided_once"
    model.graph.node.append(onnx.helper.make_node("Div", ["divided_once", length], [output]))


def map_of_any_length(model: onnx.ModelProto) -> None:
    """The map behind the embedding gets it as long as it is."""
    linear = _map_node(model)
    divided = next(node for node in model.graph.node if linear.input[0] in node.output)
    linear.input[0] = divided.input[0]


def map_in_half_precision(model: onnx.ModelProto) -> None:
    """The map's weights are rounded, and what goes through it."""
    linear = _map_node(model)
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name in linear.input[1:]]:
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    first, last = linear.input[0], linear.output[0]
    linear.input[0], linear.output[0] = "embeds_half", "mapped_half"
    place = list(model.graph.node).index(linear)
    casts = (("embeds_half", first, onnx.TensorProto.FLOAT16), (last, "mapped_half", onnx.TensorProto.FLOAT))
    for after, (output, taken, kind) in enumerate(casts):
        model.graph.node.insert(place + 2 * after, onnx.helper.make_node("Cast", [taken], [output], to=kind))
    del model.graph.value_info[:]


def no_map(model: onnx.ModelProto) -> None:
    """The graph ends at the embedding before the map, as that of a model without one does."""
    linear, last = _map_node(model), _output_node(model)
    for name in linear.input[1:]:
        model.graph.initializer.remove(next(tensor for tensor in model.graph.initializer if tensor.name == name))
    last.CopyFrom(onnx.helper.make_node("Identity", [linear.input[0]], list(last.output)))
    _remove_unused(model)


def fixed_batch(model: onnx.ModelProto) -> None:
    """A batch of one, as exporters write it whose example had one row."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1


def rows_moved(model: onnx.ModelProto) -> None:
    """Every row of a batch gets the embedding of the next one."""
    output = _renamed_output(model, "rows_in_order")
    _constants(model, {"one": [1], "zero": [0], "end": [np.iinfo(np.int64).max]})
    model.graph.node.extend(
        [
            onnx.helper.make_node("Slice", ["rows_in_order", "one", "end", "zero"], ["later_rows"]),
            onnx.helper.make_node("Slice", ["rows_in_order", "zero", "one", "zero"], ["first_row"]),
            onnx.helper.make_node("Concat", ["later_rows", "first_row"], [output], axis=0),
        ]
    )


def rows_mixed(share: float) -> Change:
    """Every row takes something of its neighbours; alone it only gets longer."""

    def change(model: onnx.ModelProto) -> None:
        output = _renamed_output(model, "rows_apart")
        _constants(model, {"zero": [0]})
        value = numpy_helper.from_array(np.asarray(share, dtype=np.float32), "share")
        model.graph.initializer.append(value)
        model.graph.node.extend(
            [
                onnx.helper.make_node("ReduceMean", ["rows_apart", "zero"], ["mean_row"], keepdims=1),
                onnx.helper.make_node("Mul", ["mean_row", "share"], ["some_of_it"]),
                onnx.helper.make_node("Add", ["rows_apart", "some_of_it"], ["mixed"]),
                onnx.helper.make_node("LpNormalization", ["mixed"], [output], axis=1, p=2),
            ]
        )

    return change


def noisy(scale: float) -> Change:
    """Noise on the embedding, drawn anew at every call."""

    def change(model: onnx.ModelProto) -> None:
        output = _renamed_output(model, "without_noise")
        model.graph.node.extend(
            [
                onnx.helper.make_node("RandomNormalLike", ["without_noise"], ["noise"], scale=scale),
                onnx.helper.make_node("Add", ["without_noise", "noise"], [output]),
            ]
        )

    return change


def overflowing(final_norm: str, projection: str, factor: float) -> Change:
    """The same function in float32; in half precision what lies between is infinite."""

    def change(model: onnx.ModelProto) -> None:
        scales: Mapping[str, float] = {f"{final_norm}.weight": factor, f"{final_norm}.bias": factor}

        def new(name: str, array: np.ndarray) -> np.ndarray:
            if name in scales:
                return array.astype(np.float32) * scales[name]
            return array.astype(np.float32) / factor if name == projection else array

        replace_weights(model, new)

    return change


def _of_type(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


def _output_node(model: onnx.ModelProto) -> onnx.NodeProto:
    name = model.graph.output[0].name
    return next(node for node in model.graph.node if name in node.output)


def _map_node(model: onnx.ModelProto) -> onnx.NodeProto:
    weights = {f"{name}.weight" for name in MAP_NAMES.values()}
    return next(node for node in _of_type(model, "Gemm") if node.input[1] in weights)


def _remove_unused(model: onnx.ModelProto) -> None:
    """Nodes whose results nothing takes."""
    wanted = {value.name for value in model.graph.output}
    for node in reversed(list(model.graph.node)):
        if wanted.isdisjoint(node.output):
            model.graph.node.remove(node)
        else:
            wanted.update(node.input)


def _renamed_output(model: onnx.ModelProto, name: str) -> str:
    """Gives what makes the output another name, and returns the one that is free now."""
    node = _output_node(model)
    output: str = node.output[0]
    node.output[0] = name
    return output


def _constants(model: onnx.ModelProto, values: Mapping[str, Iterable[int]]) -> None:
    for name, value in values.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(list(value), dtype=np.int64), name))


def _forget_shapes(model: onnx.ModelProto) -> None:
    """A graph whose last operator is gone has another width than it said."""
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.shape.dim[1].dim_param = "width"
