"""Weights addressed in files and in engines: by name, shape and type, found once or refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from tests.onnx.conftest import Exported, make_case
from tests.onnx.test_edit_kinds import lowered, placement_of
from tests.onnx.test_precision import PROFILE, convert, ranges_for
from uwm_deploy.edits.patch import Patch
from uwm_deploy.edits.proof import promised_by
from uwm_deploy.errors import ContractError, InputError, IntegrityError, PrerequisiteError
from uwm_deploy.graphs.builder_log import BuildFailed, logger_of
from uwm_deploy.graphs.child_process import made_by_child
from uwm_deploy.graphs.engine_builder import mark_refittable
from uwm_deploy.graphs.engine_refitter import refit, refitted_plan
from uwm_deploy.graphs.layers import linear_layers
from uwm_deploy.graphs.stored_weights import (
    Replacement,
    in_type,
    named_weights,
    read_tensor,
    refuse_other_scales,
    replace_tensors,
)
from uwm_deploy.graphs.tensor_layout import mapped_weights, stored_tensors
from uwm_deploy.graphs.write import write_graph
from uwm_deploy.pipeline.refit_graphs import (
    Swap,
    _kind_of,
    held_tensors,
    identity_like,
    refit_engine,
    refit_graph,
    reverted,
    without_edit,
)
from uwm_deploy.records.edit import EditRecord, EditStep, Method, Placement
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.graph import Precision, Target
from uwm_deploy.records.model import ImageSpec, ModelRef, TextSpec
from uwm_deploy.runtime.session import open_engine
from uwm_deploy.runtime.tensorrt import gpu_reason
from uwm_deploy.stages.compile import engine_from_onnx
from uwm_deploy.stages.convert.convert import embed_with, lower

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="not run: package tensorrt_rtx is not installed"
)


def changes(exported: Exported, factor: float = -1.0) -> dict[str, Replacement]:
    """The edited weights with every fifth entry multiplied."""
    found = {}
    for name, weight in exported.case.weights().items():
        after = weight.numpy().copy()
        after.flat[::5] *= factor
        found[name] = Replacement(weight.numpy().copy(), after)
    return found


def test_every_initialiser_is_found_where_it_lies(exported: Exported) -> None:
    """Names, types, shapes and bytes are those that the ONNX library reads."""
    path = exported.folder / exported.artifact.file
    wanted = {i.name: i for i in onnx.load(path).graph.initializer if i.HasField("raw_data")}
    found = {tensor.name: tensor for tensor in stored_tensors(path)}
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        assert (tensor.kind, tensor.shape) == (wanted[name].data_type, tuple(wanted[name].dims))
        assert path.read_bytes()[tensor.offset : tensor.offset + tensor.size_bytes] == wanted[name].raw_data


def test_only_the_named_weights_change(exported: Exported, tmp_path: Path) -> None:
    """All other bytes of the file stay, the graph is valid, and putting the old weights back gives the old file."""
    path, wanted = exported.folder / exported.artifact.file, changes(exported)
    found = replace_tensors(path, "", tmp_path, wanted)
    onnx.checker.check_model(str(tmp_path / path.name), full_check=True)
    old, new = path.read_bytes(), (tmp_path / path.name).read_bytes()
    inside = set()
    for name, tensor in found.items():
        assert tensor.name == name
        assert np.array_equal(read_tensor(tmp_path, tensor), wanted[name].after)
        inside |= set(range(tensor.offset, tensor.offset + tensor.size_bytes))
    assert {place for place, (a, b) in enumerate(zip(old, new, strict=True)) if a != b} <= inside
    (tmp_path / "back").mkdir()
    back = {name: Replacement(change.after, change.before) for name, change in wanted.items()}
    replace_tensors(tmp_path / path.name, "", tmp_path / "back", back)
    assert (tmp_path / "back" / path.name).read_bytes() == old


def test_external_data_is_rewritten_beside_the_graph(text_export: Exported, tmp_path: Path) -> None:
    """The graph's own file stays as it is, and its second file gets the weights; another second file is refused."""
    artifact, folder = text_export.artifact, text_export.folder
    wanted = changes(text_export)
    replace_tensors(folder / artifact.file, artifact.external_data, tmp_path, wanted)
    assert (tmp_path / artifact.file).read_bytes() == (folder / artifact.file).read_bytes()
    found = dict(named_weights(tmp_path / artifact.file))
    for name, change in wanted.items():
        assert np.array_equal(found[name], change.after)
    ort.InferenceSession(str(tmp_path / artifact.file), providers=["CPUExecutionProvider"])
    with pytest.raises(IntegrityError, match="lies in another file"):
        stored_tensors(folder / artifact.file, "other.data")


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16, Precision.INT8, Precision.FP8])
def test_weights_are_found_in_every_type(exported: Exported, tmp_path: Path, precision: Precision) -> None:
    """A lowered graph that is rewritten is byte for byte the graph that is lowered after the rewriting."""
    graph = convert(exported, tmp_path / "low", precision)
    for name in ("new", "source"):
        (tmp_path / name).mkdir()
    replace_tensors(tmp_path / "low" / graph.file, "", tmp_path / "new", changes(exported))
    replace_tensors(exported.folder / graph.file, "", tmp_path / "source", changes(exported))
    ranges = ranges_for(exported, tmp_path) if precision in (Precision.INT8, Precision.FP8) else None
    model, _ = lower(tmp_path / "source" / graph.file, precision, (), (), ranges)
    write_graph(model, tmp_path / "wanted.onnx")
    assert (tmp_path / "new" / graph.file).read_bytes() == (tmp_path / "wanted.onnx").read_bytes()
    assert (tmp_path / "new" / graph.file).read_bytes() != (tmp_path / "low" / graph.file).read_bytes()


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
def test_moved_scales_are_refused(exported: Exported, tmp_path: Path, precision: Precision) -> None:
    """What was rounded with one scale cannot be read with another; nothing is written."""
    graph = convert(exported, tmp_path / "low", precision)
    (tmp_path / "new").mkdir()
    with pytest.raises(InputError, match="moves its scales"):
        replace_tensors(tmp_path / "low" / graph.file, "", tmp_path / "new", changes(exported, 9.0))
    assert not list((tmp_path / "new").iterdir())


def test_a_weight_that_leaves_half_precision_is_refused(exported: Exported, tmp_path: Path) -> None:
    """Infinity is no weight."""
    graph = convert(exported, tmp_path / "low", Precision.FP16)
    (tmp_path / "new").mkdir()
    with pytest.raises(ContractError, match="outside the range"):
        replace_tensors(tmp_path / "low" / graph.file, "", tmp_path / "new", changes(exported, 1e9))


def test_a_weight_that_is_missing_or_there_twice_is_refused(exported: Exported, tmp_path: Path) -> None:
    """Nothing is guessed: the old weight must be there, once."""
    path, wanted = exported.folder / exported.artifact.file, changes(exported)
    name = next(iter(wanted))
    foreign = {name: Replacement(wanted[name].after, wanted[name].before)}
    with pytest.raises(ContractError, match=f"{name} is not in the graph"):
        replace_tensors(path, "", tmp_path, foreign)
    model = onnx.load(path)
    twin = next(i for i in model.graph.initializer if i.name == name)
    model.graph.initializer.append(onnx.TensorProto.FromString(twin.SerializeToString()))
    model.graph.initializer[-1].name = "twin"
    onnx.save(model, tmp_path / "twice.onnx")
    with pytest.raises(ContractError, match="is 2 times in the graph"):
        replace_tensors(tmp_path / "twice.onnx", "", tmp_path / "out", wanted)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_broken_file_is_refused(exported: Exported, tmp_path: Path, cut: int) -> None:
    """Empty, cut off or no ONNX at all."""
    (tmp_path / "x.onnx").write_bytes((exported.folder / exported.artifact.file).read_bytes()[:cut])
    with pytest.raises(IntegrityError, match="not a whole ONNX file"):
        stored_tensors(tmp_path / "x.onnx")


@pytest.mark.parametrize("written", ["by us", "by onnx", "external"])
def test_the_parser_is_given_the_weights_of_the_file(exported: Exported, tmp_path: Path, written: str) -> None:
    """Every large one bit for bit, at an address for its type, and a message that says all the rest."""
    path = exported.folder / exported.artifact.file
    whole = onnx.load(path)
    if written != "by us":
        path = tmp_path / "graph.onnx"
        external = {"save_as_external_data": True, "location": "graph.onnx.data"} if written == "external" else {}
        onnx.save(onnx.load(exported.folder / exported.artifact.file), path, **external)
    message, weights = mapped_weights(path)
    assert weights
    assert not [name for name, data in weights.items() if data.tobytes() in message]
    said = onnx.load_from_string(message)
    wanted = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in whole.graph.initializer}
    for name, data in weights.items():
        assert data.tobytes() == wanted[name].tobytes(), name
        assert data.ctypes.data % wanted[name].itemsize == 0, name
    for tensor in said.graph.initializer:
        assert tuple(tensor.dims) == wanted[tensor.name].shape
        assert tensor.name in weights or np.array_equal(onnx.numpy_helper.to_array(tensor), wanted[tensor.name])
    assert {tensor.name for tensor in said.graph.initializer} == set(wanted)
    assert [node.output for node in said.graph.node] == [node.output for node in whole.graph.node]


def _parsed(trt, path: Path):
    """Network, and its constants by name; the builder and the parser have to outlive it."""
    builder = trt.Builder(logger := logger_of(trt, []))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path))
    constants = {}
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type == trt.LayerType.CONSTANT:
            layer.__class__ = trt.IConstantLayer
            constants[layer.name] = (str(layer.get_output(0).dtype).rsplit(".", 1)[-1], tuple(layer.shape))
    return network, constants, (builder, parser, logger)


@needs_rtx
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8])
def test_the_parser_knows_every_weight_by_its_name(exported: Exported, tmp_path: Path, precision: Precision) -> None:
    """Every weight of the source model can be marked for a refit; edited ones have our shape and type; others do not."""
    import tensorrt_rtx as trt

    if precision is Precision.FP32:
        path = exported.folder / exported.artifact.file
    else:
        path = tmp_path / convert(exported, tmp_path, precision).file
    network, constants, owners = _parsed(trt, path)
    names = [name for name, _ in exported.case.tower.graph_module().named_parameters()]
    assert len(names) > 20
    mark_refittable(network, names)
    assert all(network.are_weights_marked_refittable(name) for name in names)
    kind = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int8": "INT8"}[precision.value]
    turned = {f"{name}.weight" for name, layer in linear_layers(ir.load(exported.folder / exported.artifact.file)).items()
              if layer.transpose is not None}  # fmt: skip
    for edit in exported.case.edits:
        shape = edit.shape[::-1] if precision is Precision.INT8 and edit.name in turned else edit.shape
        assert constants[edit.name] == (kind, shape)
    for unknown in ("nothing.weight", "", names[0] + "x"):
        with pytest.raises(BuildFailed, match="no weights"):
            mark_refittable(network, [unknown])
    del network, owners


@needs_rtx
def test_a_refittable_engine_is_not_built_without_a_gpu(exported: Exported, tmp_path: Path) -> None:
    """It is said before anything is started, and nothing is written."""
    if not gpu_reason():
        pytest.skip("not run: this machine has a GPU")
    with pytest.raises(PrerequisiteError, match="built on a GPU"):
        engine_from_onnx(
            exported.artifact, exported.folder, Target.TENSORRT_RTX, PROFILE, exported.case.edits, tmp_path,
            refittable=True,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def swap_back(exported: Exported) -> Swap:
    """The exact revert of the tower's edit."""
    image = ImageSpec(resize=24, crop=24, resample="bicubic", rescale=1 / 255, mean=(0, 0, 0), std=(1, 1, 1))
    text = TextSpec(context_length=16, eos_id=99, pad_id=0, tokenizer_digest="")
    model = ModelRef(
        name="x", family="hf-clip", repo="local", revision="", weights_digest="sha256:" + "cd" * 32, embed_dim=16,
        image=image, text=text,
    )  # fmt: skip
    patch = exported.case.patch
    old = EditRecord(
        model=model, edited_weights_digest=exported.artifact.weights_digest,
        patch_digest=digest_of_bytes(patch.to_bytes()), tensors=exported.case.edits, steps=(EditStep(method=Method.UWM),),
    )  # fmt: skip
    new, nothing = reverted(old, patch)
    held = held_tensors([exported.artifact], exported.folder, promised_by(old))
    after = without_edit(held, old, patch)
    found = {name: Replacement(held[name], after[name]) for name in held}
    return Swap(old=old, old_patch=patch, new=new, new_patch=nothing, content=nothing.to_bytes(), changes=found)


def test_equal_patches_are_equal_bytes(exported: Exported, tmp_path: Path) -> None:
    """However often it is written, a patch is one file with one digest, and reads back as it was."""
    patch = exported.case.patch
    contents = {patch.to_bytes() for _ in range(20)}
    assert len(contents) == 1
    (tmp_path / "patch.safetensors").write_bytes(contents.pop())
    again = Patch.from_file(tmp_path / "patch.safetensors")
    assert set(again.tensors) == set(patch.tensors)
    assert {again.to_bytes()} == {patch.to_bytes()}


def test_a_refitted_graph_has_the_edit_of_its_record(exported: Exported, tmp_path: Path) -> None:
    """Fingerprint before and after; a graph that holds another edit than its record says is refused."""
    swap = swap_back(exported)
    made = refit_graph(exported.artifact, exported.folder, tmp_path, swap)
    assert made.weights_digest == swap.new.model.weights_digest
    assert (made.fingerprint.layers, made.fingerprint.entries) == (len(exported.case.edits), 0)
    assert made.digest != exported.artifact.digest
    (tmp_path / "again").mkdir()
    with pytest.raises(ContractError, match="holds the unedited weight"):
        refit_graph(made, tmp_path, tmp_path / "again", swap)
    with pytest.raises(IntegrityError, match="not the file its record describes"):
        refit_graph(exported.artifact, tmp_path, tmp_path / "again", swap)
    with pytest.raises(IntegrityError, match="does not hold the tensor that is promised"):
        held_tensors([made], tmp_path, promised_by(swap.old))
    assert not list((tmp_path / "again").iterdir())


def unedited_embeddings(part: Exported, inputs: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        embeds = make_case(part.case.tower.name).tower.embed(torch.from_numpy(inputs))
    return torch.nn.functional.normalize(embeds).numpy()


def test_a_revert_takes_back_every_kind(solved: Exported, tmp_path: Path) -> None:
    """Negated entries, the last map and the bias before it have their old bits; a map behind is the identity."""
    swap, edits = swap_back(solved), solved.case.edits
    made = refit_graph(solved.artifact, solved.folder, tmp_path, swap)
    assert (made.fingerprint.layers, made.fingerprint.mismatches) == (len(edits), ())
    held = dict(named_weights(tmp_path / made.file))
    source = make_case(solved.case.tower.name).parameters()
    for edit in edits:
        wanted = source[edit.name].numpy() if edit.name in source else identity_like(edit).numpy()
        assert held[edit.name].tobytes() == wanted.tobytes(), edit.name
    rows = solved.case.inputs(5).numpy()
    found = embed_with(made, tmp_path / made.file, Precision.FP32, [rows])
    assert np.abs(found - unedited_embeddings(solved, rows)).max() < 1e-5


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.INT8])
def test_an_engine_of_onnx_runtime_takes_back_every_kind(
    solved: Exported, tmp_path: Path, precision: Precision
) -> None:
    """In what was compiled, too; but not where a replaced matrix has 8 bits, whose scales stay: that is bad input."""
    swap, rows = swap_back(solved), solved.case.inputs(5).numpy()
    graph, folder = lowered(solved, tmp_path / "low", precision)
    for name in ("built", "refitted"):
        (tmp_path / name).mkdir()
    engine = engine_from_onnx(graph, folder, Target.ONNXRUNTIME, PROFILE, solved.case.edits, tmp_path / "built")

    def refitted() -> np.ndarray:
        graphs = (solved.folder / graph.file, solved.folder / graph.file)
        made, kinds = refit_engine(engine, tmp_path / "built", tmp_path / "refitted", swap, graphs=graphs, sample=rows)
        assert set(kinds) == {edit.name for edit in solved.case.edits}
        return embed_with(graph, tmp_path / "refitted" / made.file, precision, [rows])

    if precision is Precision.INT8 and placement_of(solved) is Placement.WEIGHTS:
        with pytest.raises(InputError, match=r"quantised.*scales"):
            refitted()
        assert not list((tmp_path / "refitted").iterdir())
        return
    wanted = unedited_embeddings(solved, rows)
    assert (refitted() * wanted).sum(1).min() > (0.97 if precision is Precision.INT8 else 0.9999)
    assert (embed_with(graph, folder / graph.file, precision, [rows]) * wanted).sum(1).min() < 0.96


@pytest.mark.gpu
@pytest.mark.parametrize("target", [Target.TENSORRT, Target.TENSORRT_RTX])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_an_engine_takes_a_revert(exported: Exported, tmp_path: Path, target: Target, precision: Precision) -> None:
    """A refittable engine is its graph before and after, and after the revert it is the graph of the unedited model."""
    pytest.importorskip(target.value.replace("-", "_"))
    graph, source = exported.artifact, exported.folder
    for name in ("low", "built", "new", "refitted"):
        (tmp_path / name).mkdir()
    if precision is not Precision.FP32:
        graph, source = convert(exported, tmp_path / "low", precision), tmp_path / "low"
    engine = engine_from_onnx(
        graph, source, target, PROFILE, exported.case.edits, tmp_path / "built", refittable=True
    )  # fmt: skip
    swap, rows = swap_back(exported), exported.case.inputs(4).numpy()
    made = refit_graph(exported.artifact, exported.folder, tmp_path / "new", swap)
    graphs = (exported.folder / graph.file, tmp_path / "new" / graph.file)
    refitted, _ = refit_engine(
        engine, tmp_path / "built", tmp_path / "refitted", swap, graphs=graphs, sample=rows
    )  # fmt: skip
    session = open_engine(refitted, (tmp_path / "refitted" / refitted.file).read_bytes(), {})
    wanted = embed_with(made, graphs[1], Precision.FP32, [rows])
    other = embed_with(exported.artifact, graphs[0], Precision.FP32, [rows])
    found = session.run(rows)
    session.close()
    assert np.abs(found - wanted).max() < 0.2 * np.abs(found - other).max()


class Library:
    """Stands in for TensorRT's classes, which need a GPU: says what ours asked of it, and refuses what it is told to."""

    class ILogger:
        WARNING = 2

    class Weights:
        def __init__(self, dtype, address, count):
            self.dtype, self.address, self.count = dtype, address, count

    SerializationFlag = SimpleNamespace(INCLUDE_REFIT="refit", EXCLUDE_WEIGHTS="weights")

    def __init__(self, weights: dict[str, str], *, refuses: str = "") -> None:
        self.kinds, self.refuses, self.given, self.flags = weights, refuses, {}, []
        self.refittable = refuses != "refittable"

    def Runtime(self, logger):  # noqa: N802 -- their name
        return self

    def Refitter(self, engine, logger):  # noqa: N802 -- their name
        return self

    def deserialize_cuda_engine(self, plan):
        return None if self.refuses == "open" else self

    def get_all_weights(self):
        return list(self.kinds)

    def get_weights_prototype(self, name):
        return SimpleNamespace(dtype=f"DataType.{self.kinds[name]}")

    def set_named_weights(self, name, weights):
        self.given[name] = weights
        return self.refuses != "set"

    def get_missing_weights(self):
        return ["fc.bias"] if self.refuses == "missing" else []

    def refit_cuda_engine(self):
        import ctypes

        size = {"FLOAT": 4, "HALF": 2, "INT8": 1}
        self.held = {
            name: ctypes.string_at(w.address, w.count * size[self.kinds[name]]) for name, w in self.given.items()
        }
        return self.refuses != "refit"

    def create_serialization_config(self):
        return SimpleNamespace(
            set_flag=lambda flag: self.flags.append(("set", flag)),
            clear_flag=lambda flag: self.flags.append(("clear", flag)),
        )

    def serialize_with_config(self, config):
        return None if self.refuses == "write" else b"plan"


WEIGHT = np.array([[1.0, -2.0, 127.0], [-4.0, 0.5, 4.0]], np.float32)


def test_weights_are_handed_over_in_the_engines_type_and_layout() -> None:
    """Rounded as the graph rounds them, transposed where an 8-bit graph has them so, alive until they are copied."""
    kinds = {"a": "FLOAT", "b": "HALF", "c": "INT8", "d": "INT8"}
    library = Library(kinds)
    plan = refitted_plan(library, b"old", dict.fromkeys(kinds, WEIGHT), frozenset({"a", "d"}))
    assert plan == b"plan"
    rounded = np.array([[1, -2, 127], [-127, 16, 127]], np.int8)
    assert library.held["a"] == WEIGHT.tobytes()
    assert library.held["b"] == WEIGHT.astype(np.float16).tobytes()
    assert library.held["c"] == rounded.tobytes()
    assert library.held["d"] == np.ascontiguousarray(rounded.T).tobytes()
    assert library.flags == [("set", "refit"), ("clear", "weights")]
    assert library.engine_host_code_allowed is False


def test_weights_that_cannot_be_read_are_no_refit(tmp_path: Path) -> None:
    """A file that is missing, empty, cut or something else is a breach of integrity; no engine is written."""
    weights, engine = tmp_path / "text.weights.safetensors", tmp_path / "text.engine"
    (tmp_path / "old.engine").write_bytes(b"old")
    spec = {
        "module": "no_such_module", "source": str(tmp_path / "old.engine"), "engine": str(engine),
        "weights": str(weights), "turned": [],
    }  # fmt: skip
    for content in (None, b"", b"no tensors", (9).to_bytes(8, "little") + b"{}", 8 * b"\xff"):
        if content is not None:
            weights.write_bytes(content)
        with pytest.raises(IntegrityError, match=r"text\.weights\.safetensors"):
            refit(spec)
    with pytest.raises(IntegrityError, match=r"refit of text: text\.weights\.safetensors"):  # through its process, too
        made_by_child("uwm_deploy.graphs.engine_refitter", spec, "tensorrt", "text", tmp_path, "refit")
    assert not engine.exists()


def test_only_matrices_have_scales() -> None:
    """A bias beside weights of 8 bits is in float32, and any other value of it fits; so does a map behind the embedding."""
    change = Replacement(WEIGHT[0], 9 * WEIGHT[1])
    for kind in (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN):
        assert in_type(WEIGHT[0], kind).dtype == np.float32
        refuse_other_scales("norm.bias", "int8", change, kind)
        with pytest.raises(InputError, match="moves its scales"):
            refuse_other_scales("fc.weight", "int8", Replacement(WEIGHT, 9 * WEIGHT), kind)
    whole = Replacement(WEIGHT, WEIGHT)
    kinds = onnx.TensorProto
    for name, part, precision, wanted in (
        ("fc.weight", whole, Precision.INT8, kinds.INT8), ("norm.bias", change, Precision.INT8, kinds.FLOAT),
        ("norm.bias", change, Precision.FP16, kinds.FLOAT16), ("image_map.weight", whole, Precision.INT8, kinds.FLOAT),
        ("text_map.weight", whole, Precision.FP16, kinds.FLOAT), ("fc.weight", whole, Precision.FP32, kinds.FLOAT),
    ):  # fmt: skip
        assert _kind_of(name, part, precision) == wanted, (name, precision)


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        ("open", "cannot be opened"),
        ("refittable", "not built refittable"),
        ("set", "refuses the weights"),
        ("missing", r"needs 1 more, first fc\.bias"),
        ("refit", "the refit failed"),
        ("write", "cannot be written"),
    ],
)
def test_every_refusal_of_the_library_is_an_error(refuses: str, message: str) -> None:
    """None and False are its ways to say no; none of them passes for a refit."""
    with pytest.raises(BuildFailed, match=message):
        refitted_plan(Library({"a": "FLOAT"}, refuses=refuses), b"old", {"a": WEIGHT}, frozenset())


def test_unknown_names_and_types_are_errors() -> None:
    """A weight that the engine does not know, or holds in a type that is not ours."""
    with pytest.raises(BuildFailed, match="no refittable weights b"):
        refitted_plan(Library({"a": "FLOAT"}), b"old", {"b": WEIGHT}, frozenset())
    with pytest.raises(BuildFailed, match="holds a as INT4"):
        refitted_plan(Library({"a": "INT4"}), b"old", {"a": WEIGHT}, frozenset())
    with pytest.raises(BuildFailed, match="outside the range"):
        refitted_plan(Library({"a": "HALF"}), b"old", {"a": WEIGHT * 1e9}, frozenset())
