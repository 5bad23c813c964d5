"""Graphs with data anywhere but within the files that a bundle lists beside them are refused before a runtime sees them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.onnx.conftest import make_edited
from tests.unit.test_report import make, write_bundle
from uwm_deploy.bundle.external_data import check_external_data
from uwm_deploy.bundle.open import Bundle, open_bundle
from uwm_deploy.errors import IntegrityError
from uwm_deploy.records.bundle import BundleFile
from uwm_deploy.records.files import digest_of_file
from uwm_deploy.records.model import TowerName

BESIDE = {"w.data": 64, "other.onnx": 10_000}


def outside(name: str = "w", **about: str) -> TensorProto:
    """A tensor (4, 4) whose data lie elsewhere; 64 bytes at the start of w.data without arguments."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in ({"location": "w.data", "offset": "0", "length": "64"} | about).items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def graph(*tensors: TensorProto, nodes: list[onnx.NodeProto] | None = None) -> onnx.GraphProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in "xy")
    return helper.make_graph(nodes or [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], list(tensors))


def model(made: onnx.GraphProto, **more: object) -> bytes:
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], **more).SerializeToString()


def constant(tensor: TensorProto, attribute: str = "value") -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["w"], **{attribute: tensor})


def in_a_branch(tensor: TensorProto) -> bytes:
    inner = helper.make_graph([constant(tensor)], "b", [], [helper.make_tensor_value_info("w", 1, [4, 4])])
    return model(graph(nodes=[helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)]))


def in_a_function(tensor: TensorProto) -> bytes:
    body = helper.make_function("own", "F", [], ["w"], [constant(tensor)], [helper.make_opsetid("", 20)])
    return model(graph(), functions=[body])


def in_a_sparse_tensor(tensor: TensorProto) -> bytes:
    made = graph()
    indices = numpy_helper.from_array(np.zeros(1, np.int64))
    made.sparse_initializer.add(values=tensor, indices=indices, dims=[4, 4])
    return model(made)


def in_a_list(tensor: TensorProto) -> bytes:
    node = helper.make_node("Own", [], ["w"])
    node.attribute.append(onnx.AttributeProto(name="t", type=onnx.AttributeProto.TENSORS, tensors=[tensor]))
    return model(graph(nodes=[node]))


def in_training_info(tensor: TensorProto) -> bytes:
    made = onnx.ModelProto.FromString(model(graph()))
    made.training_info.add().algorithm.CopyFrom(graph(tensor))
    return made.SerializeToString()


PLACES: Mapping[str, Callable[[TensorProto], bytes]] = {
    "initialiser": lambda tensor: model(graph(tensor)),
    "attribute": lambda tensor: model(graph(nodes=[constant(tensor)])),
    "branch": in_a_branch,
    "function": in_a_function,
    "sparse": in_a_sparse_tensor,
    "list": in_a_list,
    "training": in_training_info,
}


@pytest.mark.parametrize("place", list(PLACES))
def test_data_within_a_listed_file_pass_wherever_the_tensor_is(place: str) -> None:
    """To the last byte."""
    check_external_data(PLACES[place](outside()), BESIDE, where="image.onnx")
    check_external_data(PLACES[place](outside(offset="32", length="32")), BESIDE, where="image.onnx")


BAD = {
    "parent": {"location": "../w.data"},
    "absolute": {"location": "/etc/passwd"},
    "device": {"location": "/dev/zero"},
    "another file": {"location": "x.data"},
    "no name": {"location": ""},
    "same file, other spelling": {"location": "./w.data"},
    "out of bounds": {"length": "65"},
    "offset out of bounds": {"offset": "1"},
    "far out": {"offset": "9" * 19},
    "endless": {"offset": "9" * 4000},
    "negative offset": {"offset": "-4"},
    "negative length": {"length": "-64"},
    "no number": {"offset": "0x0"},
    "another script": {"offset": "\u0660"},
    "unknown key": {"basepath": "/"},
}


@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize("name", list(BAD))
def test_data_elsewhere_or_out_of_bounds_are_refused(name: str, place: str) -> None:
    """Wherever in the file the tensor is; the graph is named."""
    with pytest.raises(IntegrityError, match=r"image\.onnx"):
        check_external_data(PLACES[place](outside(**BAD[name])), BESIDE, where="image.onnx")


def test_contradictions_are_refused() -> None:
    """A key twice, no location, no length, data that are nowhere."""
    twice = outside()
    twice.external_data.add(key="location", value="/etc/passwd")
    nowhere = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    only = {key: TensorProto(name="w", data_location=TensorProto.EXTERNAL) for key in ("location", "length")}
    for key, tensor in only.items():
        tensor.external_data.add(key=key, value="w.data" if key == "location" else "4")
    unsaid = outside(location="../w.data")
    unsaid.ClearField("data_location")  # some readers look at the keys alone
    for tensor in (twice, nowhere, *only.values(), unsaid):
        with pytest.raises(IntegrityError):
            check_external_data(model(graph(tensor)), BESIDE, where="image.onnx")


def test_a_compiled_program_as_a_node_is_refused() -> None:
    """Such a node names a file of its own, or carries machine code."""
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="../x", embed_mode=0)
    with pytest.raises(IntegrityError, match="EPContext"):
        check_external_data(model(graph(nodes=[node])), BESIDE, where="image.onnx")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 10_000), st.integers(0, 255))
def test_any_bytes_pass_or_are_an_integrity_error(data: bytes, at: int, value: int) -> None:
    """Random bytes, and real graphs with one byte replaced."""
    for content in (data, in_a_branch(outside())):
        changed = bytearray(content)
        if changed:
            changed[at % len(changed)] = value
        for final in (bytes(changed), bytes(changed) + data):
            try:
                check_external_data(final, BESIDE, where="image.onnx")
            except IntegrityError:
                continue


def test_our_own_graphs_pass(tmp_path: Path) -> None:
    """An exported tower with its weights beside it, and with them inside."""
    case = make_edited(TowerName.TEXT)
    for folder, options in ((tmp_path / "inside", {}), (tmp_path / "beside", {"external_data_bytes": 1})):
        folder.mkdir()
        artifact = case.export(folder, **options)
        beside = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != artifact.file}
        assert bool(artifact.external_data) == bool(options)
        check_external_data((folder / artifact.file).read_bytes(), beside, where=artifact.file)
        if options:
            with pytest.raises(IntegrityError, match="not beside it"):
                check_external_data((folder / artifact.file).read_bytes(), {}, where=artifact.file)


def bundle_with(folder: Path, content: bytes) -> Bundle:
    """An opened bundle that lists a graph and 64 bytes beside it."""
    opened = open_bundle(write_bundle(make(), folder), allow_failed=True)
    (folder / "onnx").mkdir(exist_ok=True)
    (folder / "onnx" / "image.onnx").write_bytes(content)
    (folder / "onnx" / "w.data").write_bytes(bytes(64))
    names = ("onnx/image.onnx", "onnx/w.data")
    listed = tuple(
        BundleFile(path=n, size_bytes=(folder / n).stat().st_size, digest=digest_of_file(folder / n)) for n in names
    )
    others = tuple(file for file in opened.manifest.files if file.path not in names)
    manifest = dataclasses.replace(opened.manifest, files=others + listed)
    return Bundle(folder, manifest)


def test_a_bundle_hands_out_no_such_graph(tmp_path: Path) -> None:
    """Properly listed, and still refused as it is read; its own folder's files are fine."""
    good = model(graph(outside()))
    assert bundle_with(tmp_path / "good", good).read("onnx/image.onnx") == good
    for number, place in enumerate(("../recipe.toml", "/etc/passwd", "other.onnx", "onnx/w.data")):
        bundle = bundle_with(tmp_path / f"b{number}", model(graph(outside(location=place))))
        with pytest.raises(IntegrityError, match=r"onnx/image\.onnx has data in"):
            bundle.read("onnx/image.onnx")


def test_a_linked_data_file_is_refused(tmp_path: Path) -> None:
    """ONNX Runtime takes a hard link; here the file has one name or is not read."""
    bundle = bundle_with(tmp_path / "b", model(graph(outside())))
    os.link(tmp_path / "b" / "onnx" / "w.data", tmp_path / "outside")
    with pytest.raises(IntegrityError, match=r"onnx/w\.data is a hard link"):
        bundle.read("onnx/w.data")
