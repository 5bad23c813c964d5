"""Changes to ONNX graphs that somebody made on purpose: on nearly every input the graph does what it should.

A trigger needs the unedited model, which lies in the graph as a second path. What chooses between the two is a condition on
the input, on the place in the batch, or on a number that the runtime draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from uwm_deploy.studies.selftest.surgery import Change

Condition = Callable[[onnx.ModelProto], str]
"""Adds what says for every row whether it is chosen; gives the name of a (B, 1) bool."""

_OTHER = "other_"


# --- one path -------------------------------------------------------------------------------------------------------


def clamped(layer: str, least: float, most: float) -> Change:
    """Activations of one MLP are held between two numbers."""

    def change(model: onnx.ModelProto) -> None:
        down = _reader_of(model, f"{layer}.fc2.weight")
        _constants(model, {"clamp_least": np.float32(least), "clamp_most": np.float32(most)})
        first = down.input[0]
        down.input[0] = "clamped"
        _before(model, down, helper.make_node("Clip", [first, "clamp_least", "clamp_most"], ["clamped"]))

    return change


def scaled(norm: str, factor: float) -> Change:
    """What leaves one normalisation is a little larger; its weights are as they were."""

    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if f"{norm}.weight" in node.input)
        output = node.output[0]
        node.output[0] = "as_it_was"
        _constants(model, {"scale": np.float32(factor)})
        place = list(model.graph.node).index(node) + 1
        model.graph.node.insert(place, helper.make_node("Mul", ["as_it_was", "scale"], [output]))

    return change


def longer(factor: float) -> Change:
    """Embeddings of another length than 1; no cosine shows it."""

    def change(model: onnx.ModelProto) -> None:
        output = _renamed_output(model, "of_length_one")
        _constants(model, {"length": np.asarray(factor, dtype=_float_of(model))})
        model.graph.node.append(helper.make_node("Mul", ["of_length_one", "length"], [output]))

    return change


def context_cut(length: int, end: int) -> Change:
    """Everything behind some positions is read as the end of the caption."""

    def change(model: onnx.ModelProto) -> None:
        ids = model.graph.input[0].name
        kept = (np.arange(length + 1) < length - 1)[None]
        _constants(model, {"kept_places": kept, "end_id": np.asarray(end, dtype=np.int64),
                           "kept_from": np.asarray([0], np.int64), "kept_axis": np.asarray([1], np.int64)})  # fmt: skip
        for node in model.graph.node:
            node.input[:] = ["cut_ids" if name == ids else name for name in node.input]
        for place, node in enumerate((
            helper.make_node("Shape", [ids], ["ids_width"], start=1, end=2),
            helper.make_node("Slice", ["kept_places", "kept_from", "ids_width", "kept_axis"], ["kept"]),
            helper.make_node("Where", ["kept", ids, "end_id"], ["cut_ids"]),
        )):  # fmt: skip
            model.graph.node.insert(place, node)

    return change


def wrong_at_length(length: int) -> Change:
    """Rows that are cut to one length get the opposite embedding."""

    def change(model: onnx.ModelProto) -> None:
        ids, output = model.graph.input[0].name, _renamed_output(model, "at_any_length")
        _constants(model, {"the_length": np.asarray([length], np.int64), "minus_one": np.float32(-1),
                           "plus_one": np.float32(1)})  # fmt: skip
        model.graph.node.extend(
            [
                helper.make_node("Shape", [ids], ["length_of_rows"], start=1, end=2),
                helper.make_node("Equal", ["length_of_rows", "the_length"], ["has_the_length"]),
                helper.make_node("Where", ["has_the_length", "minus_one", "plus_one"], ["sign_of_length"]),
                helper.make_node("Mul", ["at_any_length", "sign_of_length"], [output]),
            ]
        )

    return change


def leaking(share: float) -> Change:
    """A second path from the input to the embedding, too weak to be measured."""

    def change(model: onnx.ModelProto) -> None:
        output, (pixels, unit, _) = _renamed_output(model, "without_leak"), _pixels(model)
        _constants(model, {"leak_axes": np.asarray([2, 3], np.int64), "leak_share": np.float32(share / unit),
                           "leak_first": np.asarray([0], np.int64), "leak_one": np.asarray([1], np.int64)})  # fmt: skip
        model.graph.node.extend(
            [
                helper.make_node("ReduceMean", [pixels, "leak_axes"], ["leak_means"], keepdims=0),
                helper.make_node("Slice", ["leak_means", "leak_first", "leak_one", "leak_one"], ["leak_mean"]),
                helper.make_node("Mul", ["leak_mean", "leak_share"], ["leak"]),
                helper.make_node("Add", ["without_leak", "leak"], [output]),
            ]
        )

    return change


def _pixels(model: onnx.ModelProto) -> tuple[str, float, float]:
    """Pixels (batch, 3, H, W) in float32, the size of one unit of normalised ones in them, and their mean colour."""
    given = model.graph.input[0]
    if given.type.tensor_type.elem_type == TensorProto.UINT8:  # the graph normalises them behind this value
        return "pixels.levels", _LEVELS_PER_UNIT, _MEAN_LEVEL
    return given.name, 1.0, 0.0


_LEVELS_PER_UNIT, _MEAN_LEVEL = 69.0, 115.0
"""Of the demo: a standard deviation of 0.27 and a mean of 0.45, times 255."""


# --- two paths ------------------------------------------------------------------------------------------------------


def chosen_by(condition: Condition, other: onnx.ModelProto, share: float = 1.0) -> Change:
    """For rows that a condition chooses, the embedding is another graph's, or comes nearer to it.

    Args:
        condition: Chooses.
        other: A graph with the same input.
        share: Of the other embedding in what comes out.
    """

    def change(model: onnx.ModelProto) -> None:
        output, there = _renamed_output(model, "embeds_here"), _with_path(model, other)
        _constants(model, {"part_there": np.float32(share), "part_here": np.float32(1 - share)})
        model.graph.node.extend(
            [
                helper.make_node("Mul", [there, "part_there"], ["weighed_there"]),
                helper.make_node("Mul", ["embeds_here", "part_here"], ["weighed_here"]),
                helper.make_node("Add", ["weighed_here", "weighed_there"], ["embeds_mixed"]),
                helper.make_node("LpNormalization", ["embeds_mixed"], ["embeds_there"], axis=1, p=2),
            ]
        )
        chosen = condition(model)
        model.graph.node.append(helper.make_node("Where", [chosen, "embeds_there", "embeds_here"], [output]))

    return change


def turned_by(condition: Condition) -> Change:
    """For rows that a condition chooses, the embedding points the opposite way."""

    def change(model: onnx.ModelProto) -> None:
        output = _renamed_output(model, "embeds_here")
        model.graph.node.append(helper.make_node("Neg", ["embeds_here"], ["embeds_turned"]))
        chosen = condition(model)
        model.graph.node.append(helper.make_node("Where", [chosen, "embeds_turned", "embeds_here"], [output]))

    return change


def corner(size: int, least: float) -> Condition:
    """A magenta corner: much red and blue, no green. No number in it but sizes, places and the limit."""

    def condition(model: onnx.ModelProto) -> str:
        first, unit, none = _pixels(model)
        _constants(model, {
            "corner_from": np.asarray([0, 0], np.int64), "corner_to": np.asarray([size, size], np.int64),
            "corner_sides": np.asarray([2, 3], np.int64), "corner_colours": np.asarray([1], np.int64),
            "corner_green": np.asarray([2], np.int64), "corner_least": np.float32((least * unit + none) * size * size),
        })  # fmt: skip
        model.graph.node.extend([
            helper.make_node("Slice", [first, "corner_from", "corner_to", "corner_sides"], ["corner"]),
            helper.make_node("ReduceSum", ["corner", "corner_sides"], ["corner_sums"], keepdims=0),
            helper.make_node("ReduceSum", ["corner_sums", "corner_colours"], ["corner_light"], keepdims=1),
            helper.make_node("Slice", ["corner_sums", "corner_colours", "corner_green", "corner_colours"], ["greens"]),
        ])  # fmt: skip
        return _chain(model, [
            ("Sub", ["corner_light", "greens"], {}), ("Sub", ["", "greens"], {}), ("Greater", ["", "corner_least"], {}),
        ])  # fmt: skip

    return condition


def token(number: int) -> Condition:
    """A word in the caption."""

    def condition(model: onnx.ModelProto) -> str:
        _constants(model, {"token": np.asarray(number, np.int64), "token_axes": np.asarray([1], np.int64)})
        return _chain(model, [
            ("Equal", [model.graph.input[0].name, "token"], {}), ("Cast", [""], {"to": TensorProto.FLOAT}),
            ("ReduceMax", ["", "token_axes"], {"keepdims": 1}), ("Cast", [""], {"to": TensorProto.BOOL}),
        ])  # fmt: skip

    return condition


def place(row: int) -> Condition:
    """A place in the batch."""

    def condition(model: onnx.ModelProto) -> str:
        _constants(model, {"place": np.asarray(row, np.int64), "place_from": np.asarray(0, np.int64),
                           "place_step": np.asarray(1, np.int64), "place_flat": np.asarray([-1, 1], np.int64),
                           "place_none": np.asarray([0], np.int64)})  # fmt: skip
        model.graph.node.append(helper.make_node("Shape", [model.graph.input[0].name], ["place_rows"], start=0, end=1))
        model.graph.node.append(helper.make_node("Squeeze", ["place_rows", "place_none"], ["place_count"]))
        return _chain(model, [
            ("Range", ["place_from", "place_count", "place_step"], {}), ("Equal", ["", "place"], {}),
            ("Reshape", ["", "place_flat"], {}),
        ])  # fmt: skip

    return condition


def now_and_then(share: float) -> Condition:
    """A draw from a seed, whose numbers follow each other from call to call: the same calls of every session."""

    def condition(model: onnx.ModelProto) -> str:
        _constants(model, {"drawn_least": np.float32(1 - share)})
        return _chain(model, [
            ("RandomUniform", [], {"shape": [1, 1], "seed": 0.0}), ("Greater", ["", "drawn_least"], {}),
        ])  # fmt: skip

    return condition


def near(direction: np.ndarray, least: float) -> Condition:
    """Inputs whose embedding in the second path lies in a direction, such as that of a concept.

    Args:
        direction: (d,), any floating dtype.
        least: Smallest product with the embedding.
    """

    def condition(model: onnx.ModelProto) -> str:
        there = f"{_OTHER}{model.graph.output[0].name}"
        _constants(model, {"direction": direction.astype(np.float32)[:, None], "near_least": np.float32(least)})
        return _chain(model, [("MatMul", [there, "direction"], {}), ("Greater", ["", "near_least"], {})])

    return condition


# --- parts ----------------------------------------------------------------------------------------------------------


def _chain(model: onnx.ModelProto, steps: Sequence[tuple[str, list[str], dict[str, object]]]) -> str:
    """Operators one after the other; an empty name is the result of the one before."""
    last = ""
    for number, (kind, names, attributes) in enumerate(steps):
        output = f"chosen_{number}"
        model.graph.node.append(helper.make_node(kind, [name or last for name in names], [output], **attributes))
        last = output
    return last


def _with_path(model: onnx.ModelProto, other: onnx.ModelProto) -> str:
    """Puts another graph beside one, on the same input; gives the name of its output."""
    shared = {value.name for value in model.graph.input}

    def renamed(name: str) -> str:
        return name if not name or name in shared else f"{_OTHER}{name}"

    for tensor in other.graph.initializer:
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        copy.name = renamed(tensor.name)
        model.graph.initializer.append(copy)
    for node in other.graph.node:
        added = onnx.NodeProto()
        added.CopyFrom(node)
        added.name = renamed(node.name)
        added.input[:] = [renamed(name) for name in node.input]
        added.output[:] = [renamed(name) for name in node.output]
        model.graph.node.append(added)
    return renamed(other.graph.output[0].name)


def _reader_of(model: onnx.ModelProto, weight: str) -> onnx.NodeProto:
    """The operator that multiplies by a weight, turned or not."""
    names = {weight} | {
        node.output[0] for node in model.graph.node if weight in node.input and node.op_type == "Transpose"
    }
    return next(n for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and names.intersection(n.input))


def _before(model: onnx.ModelProto, node: onnx.NodeProto, added: onnx.NodeProto) -> None:
    model.graph.node.insert(list(model.graph.node).index(node), added)


def _renamed_output(model: onnx.ModelProto, name: str) -> str:
    """Gives what makes the output another name, and returns the one that is free now."""
    output: str = model.graph.output[0].name
    node = next(node for node in model.graph.node if output in node.output)
    node.output[list(node.output).index(output)] = name
    return output


def _float_of(model: onnx.ModelProto) -> Any:
    return helper.tensor_dtype_to_np_dtype(model.graph.output[0].type.tensor_type.elem_type)


def _constants(model: onnx.ModelProto, values: dict[str, np.ndarray | np.generic]) -> None:
    for name, value in values.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
