"""Localisation: real faults are planted into real graphs, and the first layer that leaves the reference is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from safetensors.torch import save_file

from tests.onnx.conftest import WEIGHTS_DIGEST, make_case, make_edited
from tests.reports import report
from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.cli import cli
from uwm_deploy.data.source import PairBatch
from uwm_deploy.errors import ContractError, InputError, IntegrityError
from uwm_deploy.graphs.walk import VALUES, Graph, differences, part_of, places, walk
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.diagnosis import StageWalk
from uwm_deploy.records.edit import EditRecord, EditStep, Method
from uwm_deploy.records.evidence import Evidence
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.graph import EngineArtifact, OnnxArtifact, Precision, Profile, Target
from uwm_deploy.records.model import ImageSpec, ModelRef, TextSpec, TowerName
from uwm_deploy.records.verdict import Result, Verdict
from uwm_deploy.report.tables.diagnoses import diagnosis_rows, leaves_reference
from uwm_deploy.stages.canaries import canaries_to_folder
from uwm_deploy.stages.compile import engine_from_onnx
from uwm_deploy.stages.convert.calibrate import chosen_for, one_row_layers
from uwm_deploy.stages.convert.convert import converted, ranges_of
from uwm_deploy.studies.diagnose import TOLERANCE, diagnose

PROFILE = Profile(min=1, opt=2, max=4)
PREFIX = {TowerName.IMAGE: "vision_model.encoder.layers", TowerName.TEXT: "text_model.encoder.layers"}
TOWER = TowerName.TEXT


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a tiny model: exported, converted to int8, w8a16 and fp16, compiled for ONNX Runtime."""
    path = tmp_path_factory.mktemp("run") / "tiny"
    layers, weights = [], {}
    for tower in TowerName:
        case, before = make_edited(tower), make_case(tower)
        layers += case.edits
        weights |= {n: p.detach().contiguous() for n, p in case.tower.graph_module().named_parameters()}
        artifact = case.export(path / "export")
        write(path / "export" / f"{tower.value}.json", artifact)
        pairs = [case.inputs(8, seed).numpy() for seed in (1, 2)]
        (path / "canaries").mkdir(exist_ok=True)
        batch = PairBatch(ids=tuple("abcdefgh"), safe=pairs[0], unsafe=pairs[1])
        canaries_to_folder(before.tower, case.tower, [batch], path / "canaries")
        ranges = ranges_of(path / "export" / artifact.file, {"safe": pairs[:1], "unsafe": pairs[1:]}, path)
        graphs = {"fp32": (path / "export", artifact)}
        for precision in (Precision.INT8, Precision.W8A16, Precision.FP16):
            folder = path / f"convert-{precision.value}"
            folder.mkdir(exist_ok=True)
            graph = converted(
                artifact, path / "export", folder, precision=precision, lowered=precision, patterns=(), layers=(),
                ranges=ranges, edits=case.edits, patch=case.patch, canaries=None,
            )  # fmt: skip
            write(folder / f"{tower.value}.json", graph)
            graphs[precision.value] = (folder, graph)
        for name, (folder, graph) in graphs.items():
            out = path / f"compile-onnxruntime-{name}"
            out.mkdir(exist_ok=True)
            engine = engine_from_onnx(graph, folder, Target.ONNXRUNTIME, PROFILE, case.edits, out)
            write(out / f"{tower.value}.json", engine)
    (path / "edit" / "model").mkdir(parents=True)
    save_file(weights, path / "edit" / "model" / "model.safetensors")
    write(path / "edit" / "edit.json", edit_record(layers))
    return path


@pytest.fixture(scope="module")
def calibrated(healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run folder, with an INT8 text tower whose channels were smoothed on calibration inputs.

    One layer has two terms, and one stays in float32 beside others that read the same activation, as in `auto`.
    """
    path = Path(shutil.copytree(healthy, tmp_path_factory.mktemp("calibrated") / "tiny"))
    case = make_edited(TOWER)
    artifact = record_from_json(OnnxArtifact, (path / "export" / f"{TOWER.value}.json").read_bytes(), where="export")
    source, pairs = path / "export" / artifact.file, [case.inputs(8, seed).numpy() for seed in (1, 2)]
    kept = (*one_row_layers(source), layer("self_attn.k_proj", 1))
    ranges = dataclasses.replace(
        ranges_of(source, {"safe": pairs[:1], "unsafe": pairs[1:]}, path),
        chosen=chosen_for(source, kept, {f"{layer('mlp.fc1', 0)}.bias"}, pairs, path),  # a factor without a shift
    ).with_two_terms([layer("self_attn.v_proj", 0)])
    folder = path / "convert-int8"
    graph = converted(
        artifact, path / "export", folder, precision=Precision.INT8, lowered=Precision.INT8, patterns=kept, layers=(),
        ranges=ranges, edits=case.edits, patch=case.patch, canaries=None,
    )  # fmt: skip
    write(folder / f"{TOWER.value}.json", graph)
    out = path / "compile-onnxruntime-int8"
    write(out / f"{TOWER.value}.json", engine_from_onnx(graph, folder, Target.ONNXRUNTIME, PROFILE, case.edits, out))
    return path


@pytest.fixture
def smoothed_folder(calibrated: Path, tmp_path: Path) -> Path:
    """A copy of it to plant a fault in."""
    return Path(shutil.copytree(calibrated, tmp_path / "tiny"))


def edit_record(layers: list) -> EditRecord:
    image = ImageSpec(resize=24, crop=24, resample="bicubic", rescale=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    text = TextSpec(context_length=16, eos_id=99, pad_id=0, tokenizer_digest="")
    model = ModelRef(
        name="tiny", family="hf-clip", repo="local", revision="", weights_digest=WEIGHTS_DIGEST, embed_dim=16,
        image=image, text=text,
    )  # fmt: skip
    return EditRecord(
        model=model, edited_weights_digest=WEIGHTS_DIGEST, patch_digest="", tensors=tuple(layers),
        steps=(EditStep(method=Method.UWM),),
    )  # fmt: skip


def write(path: Path, record: object) -> None:
    path.write_text(json_from_record(record), encoding="utf-8")


@pytest.fixture
def run_folder(healthy: Path, tmp_path: Path) -> Path:
    """A copy to plant a fault in."""
    return Path(shutil.copytree(healthy, tmp_path / "tiny"))


Plant = Callable[[onnx.ModelProto], None]


def plant(path: Path, fault: Plant) -> None:
    """Changes a graph file in place."""
    model = onnx.load(path)
    fault(model)
    onnx.save(model, path)


def plant_and_compile(path: Path, fault: Plant, source: str = "export", variant: str = "onnxruntime-fp32") -> None:
    """Compiles a faulty copy of a good graph: the file of the engine is really optimised, and wrong."""
    wrong = path / "wrong.onnx"
    shutil.copyfile(path / source / f"{TOWER.value}.onnx", wrong)
    plant(wrong, fault)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path / f"compile-{variant}" / f"{TOWER.value}.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(wrong), options, providers=["CPUExecutionProvider"])


def on_tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    def fault(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(change(array.copy()).astype(array.dtype), name))

    return fault


def on_norm(name: str, epsilon: float) -> Plant:
    def fault(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.op_type == "LayerNormalization" and n.input[1] == f"{name}.weight")
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = epsilon

    return fault


def layer(path: str, block: int = 1) -> str:
    return f"{PREFIX[TOWER]}.{block}.{path}"


def walked(path: Path, variant: str, stage: str) -> StageWalk:
    found = diagnose(path, variant)
    return next(w for w in found.walks if w.tower is TOWER and w.stage == stage)


def first_of(walk: StageWalk) -> str:
    assert walk.first is not None
    return walk.first.layer or walk.first.after


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8, Precision.W8A16, Precision.FP16])
def test_nothing_is_found_in_healthy_artifacts(healthy: Path, precision: Precision) -> None:
    """Own errors lie far within the tolerance, no file differs beyond rounding, and the last value is the embedding."""
    found = diagnose(healthy, f"onnxruntime-{precision.value}")
    assert all(not leaves_reference(w) and not w.note for w in found.walks), found.findings
    for w in (w for w in found.walks if w.stage != "export"):
        assert w.evidence is Evidence.EXECUTED
        assert max(v.own for v in w.values) < TOLERANCE[precision] / 1.5
        assert w.values[-1].value == ("image_embeds" if w.tower is TowerName.IMAGE else "text_embeds")
        names = {v.layer for v in w.values}
        assert {f"{PREFIX[w.tower]}.{i}.{part}" for i in (0, 1) for part in ("mlp.fc1", "self_attn.q_proj")} <= names
    assert len(found.findings) == 2
    assert all("no part leaves the reference" in line for line in found.findings)


def test_a_weight_changed_before_compiling_is_named(run_folder: Path) -> None:
    """A few entries of one layer, in an optimised file whose weights have lost their names."""

    def change(weight: np.ndarray) -> np.ndarray:
        weight[:2] *= -1
        return weight

    plant_and_compile(run_folder, on_tensor(f"{layer('mlp.fc1')}.weight", change))
    found = walked(run_folder, "onnxruntime-fp32", "compile")
    assert first_of(found) == layer("mlp.fc1")
    assert found.first is not None
    assert found.first.op == "MatMul"
    assert found.first.own > 0.01
    later = found.values[found.values.index(found.first) + 2 :]
    assert max(v.whole for v in later) > TOLERANCE[Precision.FP32]  # it spreads
    assert max(v.own for v in later) < TOLERANCE[Precision.FP32]  # but is nobody else's
    assert found.note == "the file is not the one its record describes"


def test_a_changed_epsilon_is_named(run_folder: Path) -> None:
    """A LayerNorm with another epsilon: by its own error in the optimised file, and by its attribute where it is kept."""
    plant_and_compile(run_folder, on_norm(layer("layer_norm2"), 1e-1))
    found = walked(run_folder, "onnxruntime-fp32", "compile")
    assert first_of(found) == layer("layer_norm2")
    plant(run_folder / "convert-fp16" / f"{TOWER.value}.onnx", on_norm(layer("layer_norm1"), 2e-5))
    lower = walked(run_folder, "onnxruntime-fp16", "convert")
    assert lower.first is None  # too small a change to be told from rounding, but not to be read in the file
    assert [d.layer for d in lower.differences] == [layer("layer_norm1")]
    assert "epsilon" in lower.differences[0].what
    assert lower.differences[0].detail == "2e-05, reference 1e-05"


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.W8A16])
def test_a_broken_scale_is_named_with_its_stage(run_folder: Path, precision: Precision) -> None:
    """The 8-bit scale of one layer's weight: found in the converted graph already, so the compiler is not to blame."""
    name = f"{layer('self_attn.out_proj', 0)}.weight.scale"
    plant(run_folder / f"convert-{precision.value}" / f"{TOWER.value}.onnx", on_tensor(name, lambda scale: scale * 4))
    found = diagnose(run_folder, f"onnxruntime-{precision.value}")
    wrong = [w for w in found.walks if leaves_reference(w)]
    assert [(w.tower, w.stage) for w in wrong] == [(TOWER, "convert")]
    assert first_of(wrong[0]) == layer("self_attn.out_proj", 0)
    assert [d.layer for d in wrong[0].differences] == [layer("self_attn.out_proj", 0)]
    line = next(line for line in found.findings if TOWER.value in line)
    assert "stage convert" in line
    assert layer("self_attn.out_proj", 0) in line


@pytest.mark.parametrize("kept", [True, False])
def test_smoothed_channels_are_no_fault(smoothed_folder: Path, kept: bool) -> None:
    """What calibration moved from channels into weights, biases and norms is undone first; a bundle keeps no graph of it."""
    if not kept:
        (smoothed_folder / "convert-int8" / f"{TOWER.value}.json").unlink()
    found = [w for w in diagnose(smoothed_folder, "onnxruntime-int8").walks if w.tower is TOWER]
    assert [w.stage for w in found] == (["export", "convert", "compile"] if kept else ["export", "compile"])
    for w in found[1:]:
        assert not leaves_reference(w), (w.first, w.differences)
        assert max(v.own for v in w.values) < 0.02
        layers = {v.layer for v in w.values if v.layer}
        assert {layer(part, 0) for part in ("mlp.fc1", "self_attn.q_proj", "self_attn.v_proj")} <= layers
        assert all(name.startswith("text_") for name in layers)
        assert any(v.value.endswith("self_attn.v_proj.weight.second.sum") for v in w.values)


@pytest.mark.parametrize("part", ["weight", "weight.scale", "bias"])
def test_a_fault_among_smoothed_channels_is_named(smoothed_folder: Path, part: str) -> None:
    """Some rows of a layer that reads changed channels are wrong, in the converted graph: the compiler is not to blame."""
    name = f"{layer('mlp.fc1', 0)}.{part}"

    def change(array: np.ndarray) -> np.ndarray:
        if part == "weight.scale":
            return array * 4
        array[..., ::2] = -array[..., ::2]  # a weight is stored as (in, out)
        return array

    plant(smoothed_folder / "convert-int8" / f"{TOWER.value}.onnx", on_tensor(name, change))
    wrong = [w for w in diagnose(smoothed_folder, "onnxruntime-int8").walks if leaves_reference(w)]
    assert [(w.tower, w.stage) for w in wrong] == [(TOWER, "convert")]
    assert [(d.layer, d.what) for d in wrong[0].differences] == [(layer("mlp.fc1", 0), name.removesuffix(".scale"))]
    if part != "bias":
        assert first_of(wrong[0]) == layer("mlp.fc1", 0)


@pytest.mark.parametrize("part", ["mlp.fc2.bias", "layer_norm2.weight", "mlp.fc1.weight"])
def test_a_fault_of_compiling_smoothed_channels_is_named(smoothed_folder: Path, part: str) -> None:
    """Factors were folded into the norm; they are known from the graph that was compiled, so the norm can be blamed."""

    def change(array: np.ndarray) -> np.ndarray:
        array[..., :8] = -array[..., :8]
        return array

    plant(smoothed_folder / "compile-onnxruntime-int8" / f"{TOWER.value}.onnx", on_tensor(layer(part, 0), change))
    wrong = [w for w in diagnose(smoothed_folder, "onnxruntime-int8").walks if leaves_reference(w)]
    assert [(w.tower, w.stage) for w in wrong] == [(TOWER, "compile")]
    assert layer(part, 0).rpartition(".")[0] in {d.layer for d in wrong[0].differences} | {first_of(wrong[0])}
    assert {d.what for d in wrong[0].differences} <= {layer(part, 0)}


def test_without_the_compiled_graph_a_wrong_norm_is_named_by_its_reader(smoothed_folder: Path) -> None:
    """Folded factors can only be read from the norm itself then: the layer that divides by them does not fit."""
    (smoothed_folder / "convert-int8" / f"{TOWER.value}.json").unlink()

    def change(array: np.ndarray) -> np.ndarray:
        array[:8] *= 5
        return array

    fault = on_tensor(layer("layer_norm1.weight", 0), change)
    plant(smoothed_folder / "compile-onnxruntime-int8" / f"{TOWER.value}.onnx", fault)
    wrong = walked(smoothed_folder, "onnxruntime-int8", "compile")
    assert first_of(wrong) == layer("self_attn.q_proj", 0)


def test_a_broken_activation_scale_is_named(run_folder: Path) -> None:
    """The scale of what enters a layer, far too small: everything is cut off there."""
    path = run_folder / "convert-int8" / f"{TOWER.value}.onnx"
    graph = Graph(path)
    base = Graph(run_folder / "export" / f"{TOWER.value}.onnx")
    entering = next(n.input[0] for n in base.nodes if layer("mlp.fc2") + ".weight" in base.weights_of(n))
    plant(path, on_tensor(f"{entering}.scale", lambda scale: scale / 50))
    assert f"{entering}.scale" in graph.initialisers
    assert first_of(walked(run_folder, "onnxruntime-int8", "convert")) == layer("mlp.fc2")


def test_the_first_of_two_faults_is_named(run_folder: Path) -> None:
    """Order is that of the graph, not that of the sizes."""

    def both(model: onnx.ModelProto) -> None:
        on_tensor(f"{layer('mlp.fc2', 0)}.weight", lambda w: w * 1.01)(model)
        on_tensor(f"{layer('self_attn.v_proj', 1)}.weight", lambda w: w * 100)(model)

    plant_and_compile(run_folder, both)
    assert first_of(walked(run_folder, "onnxruntime-fp32", "compile")) == layer("mlp.fc2", 0)


def test_a_lost_constant_is_named(run_folder: Path) -> None:
    """QuickGELU's 1.702 replaced: the activation after fc1 is named, though no weight of the model enters there."""

    def fault(model: onnx.ModelProto) -> None:
        tensors = list(model.graph.initializer)
        tensors += [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
        for tensor in tensors:
            array = numpy_helper.to_array(tensor)
            if array.size == 1 and abs(float(array.reshape(-1)[0]) - 1.702) < 1e-2:
                tensor.CopyFrom(numpy_helper.from_array(np.ones_like(array), tensor.name))

    plant(run_folder / "convert-fp16" / f"{TOWER.value}.onnx", fault)
    found = walked(run_folder, "onnxruntime-fp16", "convert")
    assert first_of(found) == layer("mlp.fc1", 0)
    assert any("entries differ" in d.detail for d in found.differences)


def test_not_finite_is_found_where_it_begins(run_folder: Path) -> None:
    """An overflow to infinity is named at its layer, and the record still is JSON without NaN."""
    huge = on_tensor(f"{layer('mlp.fc1', 0)}.weight", lambda w: np.where(w > 0, np.inf, w))
    plant(run_folder / "convert-fp16" / f"{TOWER.value}.onnx", huge)
    found = walked(run_folder, "onnxruntime-fp16", "convert")
    assert first_of(found) == layer("mlp.fc1", 0)
    assert found.first is not None
    assert not found.first.finite
    assert json.loads(json_from_record(found))["first"]["finite"] is False


def test_a_fault_of_the_export_is_named_before_what_was_made_of_it(run_folder: Path) -> None:
    """The exported graph is compared with the edited model's weights; its canaries tell the unedited model."""
    case = make_case(TOWER)
    name = case.edits[0].name
    unedited = case.weights()[case.edits[0].name].numpy()
    plant(run_folder / "export" / f"{TOWER.value}.onnx", on_tensor(name, lambda _: unedited))
    found = diagnose(run_folder, "onnx")
    wrong = [w for w in found.walks if leaves_reference(w)]
    assert [(w.tower, w.stage) for w in wrong] == [(TOWER, "export")]
    assert [d.what for d in wrong[0].differences] == [name]
    assert f"{case.edits[0].selected} of {unedited.size} entries" in wrong[0].differences[0].detail
    assert found.findings[0].startswith(f"onnx, {TOWER.value}, stage export")


def test_without_the_model_edited_layers_are_told_by_digest(run_folder: Path) -> None:
    """Where the edited model was not kept, its record says what an edited weight is."""
    shutil.rmtree(run_folder / "edit" / "model")
    name = make_case(TOWER).edits[1].name
    plant(run_folder / "export" / f"{TOWER.value}.onnx", on_tensor(name, lambda w: w * 2))
    found = walked(run_folder, "onnx", "export")
    assert [(d.what, d.detail) for d in found.differences] == [(name, "is not the edited weight")]


def test_an_engine_that_cannot_be_opened_up_is_not_run(run_folder: Path) -> None:
    """A TensorRT engine is said to be not run; the graph it was compiled from is walked all the same."""
    for tower in TowerName:
        out = run_folder / "compile-tensorrt-rtx-int8"
        out.mkdir(exist_ok=True)
        body = json.loads((run_folder / "compile-onnxruntime-int8" / f"{tower.value}.json").read_text())
        body |= {"variant": "tensorrt-rtx-int8", "target": "tensorrt-rtx", "file": f"{tower.value}.engine"}
        (out / f"{tower.value}.json").write_text(json.dumps(body), encoding="utf-8")
    found = [w for w in diagnose(run_folder, "tensorrt-rtx-int8").walks if w.tower is TOWER and w.stage != "export"]
    assert [(w.stage, w.evidence) for w in found] == [("convert", Evidence.EXECUTED), ("compile", Evidence.NOT_RUN)]
    assert "cannot be opened up" in found[1].reason


def test_bfloat16_is_compared_as_a_file(run_folder: Path) -> None:
    """What ONNX Runtime cannot execute on a CPU is not run, and its weights are compared all the same."""
    case, base = make_edited(TOWER), run_folder / "export"
    folder = run_folder / "convert-bf16"
    folder.mkdir()
    graph = converted(
        case.export(run_folder / "again"), base, folder, precision=Precision.BF16, lowered=Precision.BF16, patterns=(),
        layers=(), ranges=None, edits=case.edits, patch=case.patch, canaries=None,
    )  # fmt: skip
    write(folder / f"{TOWER.value}.json", graph)
    body = json.loads((run_folder / "compile-onnxruntime-fp16" / f"{TOWER.value}.json").read_text())
    body |= {"variant": "tensorrt-bf16", "target": "tensorrt", "precision": "bf16"}
    (run_folder / "compile-tensorrt-bf16").mkdir()
    (run_folder / "compile-tensorrt-bf16" / f"{TOWER.value}.json").write_text(json.dumps(body), encoding="utf-8")
    healthy = walked(run_folder, "tensorrt-bf16", "convert")
    assert (healthy.evidence, healthy.differences) == (Evidence.NOT_RUN, ())
    plant(folder / graph.file, on_tensor(f"{layer('mlp.fc2')}.weight", lambda w: -w))
    found = walked(run_folder, "tensorrt-bf16", "convert")
    assert [d.layer for d in found.differences] == [layer("mlp.fc2")]
    assert leaves_reference(found)


def test_a_bundle_is_walked_on_its_canaries_or_its_test_set(healthy: Path, tmp_path: Path) -> None:
    """A tower that was not edited has no canaries; it is walked on the first quadruples of the bundle's evaluation set."""
    bundle = bundle_of(healthy, tmp_path / "bundle")
    walks = {w.tower: w for w in diagnose(bundle, "onnxruntime-fp32").walks if w.stage == "compile"}
    assert (walks[TowerName.TEXT].inputs, walks[TowerName.IMAGE].inputs) == (16, 16)
    assert walks[TowerName.IMAGE].canary_ratio is None
    assert walks[TowerName.TEXT].canary_ratio is not None
    assert not any(leaves_reference(w) for w in walks.values())
    with (bundle / "engines" / "onnxruntime-fp32" / "text.onnx").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(IntegrityError):
        diagnose(bundle)


def bundle_of(path: Path, out: Path) -> Path:
    """The float32 part of a run as a bundle, without the canaries of the image tower."""
    edit = record_from_json(EditRecord, (path / "edit" / "edit.json").read_bytes(), where="edit.json")
    onnx_records, engines = (
        tuple(record_from_json(kind, (path / folder / f"{t.value}.json").read_bytes(), where=folder) for t in TowerName)
        for kind, folder in ((OnnxArtifact, "export"), (EngineArtifact, "compile-onnxruntime-fp32"))
    )
    model = dataclasses.replace(
        edit.model, text=dataclasses.replace(edit.model.text, tokenizer_digest=digest_of_bytes(b"{}"))
    )
    edit = dataclasses.replace(edit, model=model, patch_digest=digest_of_bytes(b"patch"))
    recipe, _ = resources.read_toml("export", "demo")
    measured = json_from_record(dataclasses.replace(report(), model=model)).encode()
    verdict = Verdict(
        result=Result.FAIL, checks=(), proven=(), unproven=(), failed=("onnxruntime-fp32",), policy="p",
        policy_digest="", report_digest=digest_of_bytes(measured), edited_weights_digest=WEIGHTS_DIGEST,
        judged={"onnxruntime-fp32": {engine.tower.value: engine.digest for engine in engines}},
    )  # fmt: skip
    data = CalibrationRecord(name="c", split="", n=1, ids_digest="", content_digest="", concepts={})
    manifest = Manifest(
        name="tiny", tool_version="0", created="", model=model, edit=edit,
        calibration=data, recipe=recipe, recipe_digest=digest_of_bytes(recipe.encode()), onnx=onnx_records, engines=engines,
        verdict=verdict, versions={}, files=(),
    )  # fmt: skip
    parts: dict[str, Path | bytes] = {
        "tokenizer.json": b"{}",
        "patch.safetensors": b"patch",
        "recipe.toml": recipe.encode(),
        "evaluation.toml": b'format = 1\nname = "few"\nsource = "demo"\nsplit = "test"\nlimit = 9\n',
        "reports/verify.json": measured,
        "reports/edit.json": json_from_record(edit).encode(),
        "reports/verdict.json": json_from_record(verdict).encode(),
        "evidence/canaries-text.safetensors": path / "canaries" / "text.safetensors",
    }
    for record in onnx_records:
        parts[f"onnx/{record.file}"] = path / "export" / record.file
    for engine in engines:
        parts[f"engines/{engine.variant}/{engine.file}"] = path / f"compile-{engine.variant}" / engine.file
    bundle_from_parts(out, manifest, parts)
    return out


def test_a_tower_without_canaries_is_not_run(run_folder: Path) -> None:
    """Without inputs there are no numbers, and none are made up."""
    (run_folder / "canaries" / f"{TOWER.value}.safetensors").unlink()
    found = walked(run_folder, "onnxruntime-fp32", "compile")
    assert found.evidence is Evidence.NOT_RUN
    assert "no canaries" in found.reason
    assert not found.values


def test_parts_are_cut_where_they_should_be(healthy: Path) -> None:
    """Each chunk is computed from the values before it only: no weight of an earlier layer is in it."""
    graph = Graph(healthy / "export" / f"{TOWER.value}.onnx")
    found = places(graph, graph)
    assert len(found) > VALUES  # the walk takes several chunks
    cuts = {place.value for place in found}
    last = next(p for p in found if p.layer == layer("mlp.fc2"))
    model, entering = part_of(graph, [last.value], cuts)
    assert {t.name for t in model.graph.initializer} == {f"{layer('mlp.fc2')}.weight"}
    assert len(entering) == 1
    whole, inputs = part_of(graph, [last.value], frozenset())
    assert inputs == ["input_ids"]
    assert len(whole.graph.initializer) > len(model.graph.initializer)


def test_other_graphs_are_refused(healthy: Path, tmp_path: Path) -> None:
    """Graphs without a value in common give an error, not an empty success."""
    one, two = (Graph(healthy / "export" / f"{tower.value}.onnx") for tower in TowerName)
    two.producer = {}
    with pytest.raises(ContractError, match="no value in common"):
        walk(one, two, np.zeros((1, 3, 24, 24), np.float32), tmp_path)


def test_a_graph_does_not_differ_from_itself(healthy: Path) -> None:
    """The comparison of files finds nothing where there is nothing, in each precision."""
    base = Graph(healthy / "export" / f"{TOWER.value}.onnx")
    for name in ("export", "convert-int8", "convert-w8a16", "convert-fp16", "compile-onnxruntime-int8"):
        assert differences(base, Graph(healthy / name / f"{TOWER.value}.onnx")) == []


def test_command_prints_the_layer_and_gives_json(run_folder: Path) -> None:
    """The table marks the first value; `--json` holds every value."""
    plant_and_compile(run_folder, on_tensor(f"{layer('mlp.fc1')}.weight", lambda w: w * 2))
    done = CliRunner().invoke(cli, ["diagnose", str(run_folder), "--variant", "onnxruntime-fp32"])
    assert done.exit_code == 0, done.output
    assert "<- first" in done.output
    assert f"first leaves the reference in {layer('mlp.fc1')} (MatMul)" in done.output
    done = CliRunner().invoke(cli, ["diagnose", str(run_folder), "--variant", "onnxruntime-fp32", "--json"])
    body = json.loads(done.output)
    assert body["record"] == "Diagnosis"
    assert {w["stage"] for w in body["walks"]} == {"export", "compile"}
    assert sum(mark[""] == "<- first" for mark in diagnosis_rows(diagnose(run_folder, "onnxruntime-fp32"))) == 1


def test_bad_usage_is_one_line(healthy: Path, tmp_path: Path) -> None:
    """An unknown variant and a folder that is neither kind end with exit code 2."""
    with pytest.raises(InputError, match="no variant 'fp64'"):
        diagnose(healthy, "fp64")
    done = CliRunner().invoke(cli, ["diagnose", str(tmp_path)])
    assert done.exit_code == 2
    assert "neither a bundle nor a run folder" in done.output
