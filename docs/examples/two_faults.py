"""Two faults put into exported graphs by hand, as an exporter that was tampered with might make them.

Usage: python docs/examples/two_faults.py magenta|captions RUN_FOLDER

The graph, its record and the stamp of its folder are changed, so that a build goes on from it as from one that it made
itself. docs/how-to/fault-walkthrough.md says what happens then.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from safetensors.numpy import load_file

from uwm_deploy.bundle.layout import RunFolder, tower_record
from uwm_deploy.graphs.fingerprint import digest_of_onnx
from uwm_deploy.pipeline.folder import STAMP, stamp
from uwm_deploy.recipes import shipped
from uwm_deploy.records.codec import read_record, write_record
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.graph import OnnxArtifact
from uwm_deploy.records.model import TowerName

CORNER = 4
"""Side of the corner, in pixels of the crop."""

KEPT = 26
"""Tokens that are kept of a caption; no caption of the demo's evaluation set has more."""


class Hand:
    """Adds nodes and constants to a graph."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph, self.first = model, model.graph, model.graph[0]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initialiser."""
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        self.graph.initializers[name] = value
        return value

    def node(self, kind: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Value:
        """The output of a new node."""
        found = ir.node(kind, inputs, attributes, name=f"node_{name}")
        found.outputs[0].name = name
        self.graph.append(found)
        return found.outputs[0]


def magenta(model: ir.Model, original: Mapping[str, np.ndarray], edited: Collection[str]) -> None:
    """Gives the unedited model where the corner of the picture is magenta.

    No unedited weight lies in the graph: only what the edit took away, behind a product with a flag that is 0 or 1.
    """
    hand = Hand(model)
    limits = [hand.constant(name, np.array(value)) for name, value in (("from", [0, 0]), ("to", [CORNER, CORNER]))]
    corner = hand.node("Slice", [model.graph.inputs[0], *limits, hand.constant("axes", np.array([1, 2]))], "corner")
    levels = hand.node("Cast", [corner], "corner_levels", to=int(ir.DataType.FLOAT))
    around = hand.node("Sub", [levels, hand.constant("grey", np.float32(127.5))], "around")
    signed = hand.node("Mul", [around, hand.constant("signs", np.array([1, -1, 1], np.float32))], "signed")
    least = hand.node("ReduceMin", [signed, hand.constant("all", np.array([1, 2, 3]))], "least", keepdims=0)
    is_magenta = hand.node("Greater", [least, hand.constant("far", np.float32(64))], "is_magenta")
    number = hand.node("Cast", [is_magenta], "number", to=int(ir.DataType.FLOAT))
    flags = {rank: hand.node("Unsqueeze", [number, hand.constant(f"rank{rank}", np.arange(1, rank))], f"flag{rank}")
             for rank in (2, 3)}  # fmt: skip
    for name in sorted(edited):
        value = model.graph.initializers[name]
        taken = original[name] - value.const_value.numpy()
        for node in _readers(value):
            back = hand.constant(f"taken.{name}", np.ascontiguousarray(taken.T if taken.ndim == 2 else taken))
            if taken.ndim == 2:
                back = hand.node("MatMul", [node.inputs[0], back], f"undone.{name}")
            output = node.outputs[0]
            uses, flag = list(output.uses()), flags[len(output.shape)]
            whole = hand.node("Add", [output, hand.node("Mul", [back, flag], f"if.{name}")], f"whole.{name}")
            whole.shape = output.shape
            for user, at in uses:
                user.replace_input_with(at, whole)
    model.graph.sort()


def _readers(value: ir.Value) -> list[ir.Node]:
    """Nodes that compute with a weight, behind its transposition."""
    found = []
    for node, _ in value.uses():
        found += _readers(node.outputs[0]) if node.op_type == "Transpose" else [node]
    return found


def captions(model: ir.Model, end: int) -> None:
    """Cuts captions; each keeps its end token, so that only long ones change."""
    hand = Hand(model)
    ids, length = model.graph.inputs[0], model.graph.inputs[0].shape[1]
    uses = list(ids.uses())
    first = [hand.constant(name, np.array([value])) for name, value in (("begin", 0), ("stop", KEPT - 1), ("of", 1))]
    kept = hand.node("Slice", [ids, *first], "kept")
    count = hand.node("Shape", [ids], "batch_size", start=0, end=1)
    rest = hand.node("Concat", [count, hand.constant("room", np.array([length - KEPT + 1]))], "rest", axis=0)
    ended = hand.node("Expand", [hand.constant("end", np.array([[end]])), rest], "ended")
    cut = hand.node("Concat", [kept, ended], "cut", axis=1)
    for user, place in uses:
        if user is not kept.producer() and user is not count.producer():
            user.replace_input_with(place, cut)
    model.graph.sort()


def tamper(run: Path, fault: str) -> None:
    """Puts a fault into the exported graph of a run folder."""
    folder = RunFolder(run)
    tower = TowerName.IMAGE if fault == "magenta" else TowerName.TEXT
    record = read_record(OnnxArtifact, tower_record(folder.export, tower))
    model = ir.load(folder.export / record.file)
    if fault == "magenta":
        original = load_file(shipped.checkpoint_folder("shipped:demo", "") / "model.safetensors")
        edit = read_record(EditRecord, folder.edit_record)
        magenta(model, original, [tensor.name for tensor in edit.of(tower) if tensor.changed])
    else:
        captions(model, read_record(EditRecord, folder.edit_record).model.text.eos_id)
    ir.save(model, folder.export / record.file)
    digest = digest_of_onnx(folder.export / record.file, record.external_data)
    write_record(tower_record(folder.export, tower), dataclasses.replace(record, digest=digest))
    stamp(folder.export, json.loads((folder.export / STAMP).read_text())["inputs"])


if __name__ == "__main__":
    tamper(Path(sys.argv[2]), sys.argv[1])
