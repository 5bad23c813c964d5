"""The demo's graphs as text, compared with fixtures, so that a reviewer sees what a change does to a graph."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxscript
import pytest
import torch

from tests.small_build import build_small
from uwm_deploy.graphs.cast import FLOAT16, cast_graph
from uwm_deploy.graphs.graph_text import text_of_graph
from uwm_deploy.graphs.layers import linear_layers
from uwm_deploy.graphs.quantise import input_names, quantise_graph

FIXTURES = Path(__file__).parent / "graphs"
RENEW = "RENEW_GRAPHS"
COMMAND = f"{RENEW}=1 python -m pytest -n 0 tests/onnx/test_graph_fixtures.py"
VERSIONS = f"torch {torch.__version__.partition('+')[0]}, onnxscript {onnxscript.__version__}"


def as_exported(model: ir.Model) -> None:
    """Float32, as stage `export` left it."""


def in_fp16(model: ir.Model) -> None:
    cast_graph(model, FLOAT16, set())


def in_int8(model: ir.Model) -> None:
    """Every linear layer quantised. Ranges need no calibration: no scale is rendered."""
    layers = set(linear_layers(model))
    quantise_graph(model, layers, dict.fromkeys(input_names(model, layers).values(), 1.0), "int8")


GRAPHS: dict[str, tuple[str, Callable[[ir.Model], None]]] = {
    "demo-image": ("image", as_exported),
    "demo-text": ("text", as_exported),
    "demo-text-fp16": ("text", in_fp16),  # the tower with masks, which half precision clips
    "demo-image-int8": ("image", in_int8),
}
"""Tower and conversion by name of the fixture. Conversions of the other tower show nothing else."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the exported graphs of the small build."""
    request, _ = build_small(tmp_path_factory)
    assert request.work is not None
    return request.work / "export"


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_is_its_fixture(name: str, exported: Path) -> None:
    """Operators, attributes, names, types and shapes of the demo's graphs are those of the fixture."""
    tower, convert = GRAPHS[name]
    model = ir.load(exported / f"{tower}.onnx")
    convert(model)
    fixture, found = FIXTURES / f"{name}.txt", f"made with {VERSIONS}\n\n{text_of_graph(model)}"
    if os.environ.get(RENEW):
        fixture.write_text(found, encoding="utf-8")
        pytest.skip(f"{fixture.name} is renewed")
    difference = difference_of(fixture.read_text(encoding="utf-8"), found, fixture.name)
    assert not difference, difference


def difference_of(wanted: str, found: str, name: str) -> str:
    """A unified diff of the graphs with what to do about it; empty when they are equal, whatever versions made them."""
    (before, *old), (after, *new) = wanted.splitlines(), found.splitlines()
    if old == new:
        return ""
    lines = [
        f"{name}: the graph changed. If that is wanted, renew the fixtures and review their diff:",
        f"    {COMMAND}",
    ]
    if before != after:
        lines.append(
            f"The exporter may have changed it: the fixture was {before}, these are {after.removeprefix('made with ')}."
        )
    return "\n".join([*lines, *difflib.unified_diff(old, new, f"{name} (fixture)", f"{name} (now)", n=1, lineterm="")])


def test_a_difference_says_what_changed_and_how_to_renew() -> None:
    """The message is a diff with the command; other versions are named, and alone are no difference."""
    wanted = "made with torch 1, onnxscript 1\n\n1 node\n  a: Add(x, y) -> z\n"
    other = wanted.replace("torch 1", "torch 2")
    assert difference_of(wanted, wanted, "g.txt") == difference_of(wanted, other, "g.txt") == ""
    changed = difference_of(wanted, wanted.replace("Add", "Sub"), "g.txt")
    assert "-  a: Add(x, y) -> z\n+  a: Sub(x, y) -> z" in changed
    assert COMMAND in changed
    assert "exporter" not in changed
    moved = difference_of(wanted, other.replace("Add", "Sub"), "g.txt")
    assert "torch 1" in moved
    assert "torch 2" in moved


def model_of(weight: np.ndarray, *, name: str = "layer.weight", perm: tuple[int, ...] = (1, 0)) -> ir.Model:
    """One multiplication by a transposed weight."""
    value = ir.Value(
        name=name,
        shape=ir.Shape(weight.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(weight, name=name),
    )
    entering = ir.Value(name="x", shape=ir.Shape(["batch", 2]), type=ir.TensorType(ir.DataType.FLOAT))
    turned = ir.node("Transpose", [value], {"perm": perm}, name="turn")
    product = ir.node("MatMul", [entering, turned.outputs[0]], name="product")
    for node, label in ((turned, "turned"), (product, "y")):
        node.outputs[0].name, node.outputs[0].dtype = label, ir.DataType.FLOAT
    graph = ir.Graph(
        [entering],
        [product.outputs[0]],
        nodes=[turned, product],
        initializers=[value],
        opset_imports={"": 20},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


def test_a_text_shows_the_graph_and_no_weights() -> None:
    """Names, types, shapes, attributes and constants are shown; equal graphs with other weights are equal texts."""
    weight = np.array([[1.25, 2.5], [3.75, 4.5]], dtype=np.float32)
    text = text_of_graph(model_of(weight))
    assert text == text_of_graph(model_of(2 * weight))
    assert text.splitlines() == [
        "opset ai.onnx 20; IR version 10",
        "",
        "1 input",
        "  x float32 (batch, 2)",
        "",
        "1 output",
        "  y float32 (?)",
        "",
        "1 initialiser",
        "  layer.weight float32 (2, 2)",
        "",
        "2 nodes",
        "  turn: Transpose[perm=(1, 0)](layer.weight) -> turned float32 (?)",
        "  product: MatMul(x, turned) -> y float32 (?)",
    ]
    assert text != text_of_graph(model_of(weight, perm=(0, 1)))
    assert text != text_of_graph(model_of(weight[:1]))
    assert "val_1 float32 (2, 2) = 1.25 2.5 3.75 4.5" in text_of_graph(model_of(weight, name="val_1"))
