"""Stage `compile`: real builds, the edit still inside, and errors that say what the compiler said."""

from __future__ import annotations

import importlib.util
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from uwm_deploy.errors import ContractError, IntegrityError, PrerequisiteError, UwmError
from uwm_deploy.graphs import engine_builder
from uwm_deploy.records.files import digest_of_file
from uwm_deploy.records.graph import EngineArtifact, Profile, Target
from uwm_deploy.runtime.tensorrt import device_name, gpu_reason
from uwm_deploy.stages import compile as stage
from uwm_deploy.stages.compile import engine_from_onnx

PROFILE = Profile(min=1, opt=2, max=4)
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="not run: package tensorrt_rtx is not installed"
)


def _compile(exported, target: Target, folder: Path, profile: Profile = PROFILE) -> EngineArtifact:
    folder.mkdir(parents=True, exist_ok=True)
    return engine_from_onnx(exported.artifact, exported.folder, target, profile, exported.case.edits, folder)


def _run(path: Path, inputs: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    return result


@pytest.mark.parametrize("rows", [1, 5])
def test_optimised_graph_computes_the_same(exported, tmp_path, rows):
    """ONNX Runtime's optimised file gives the exported graph's embeddings, and is not the exported file."""
    artifact = _compile(exported, Target.ONNXRUNTIME, tmp_path)
    source = exported.folder / exported.artifact.file
    assert artifact.variant == "onnxruntime-fp32"
    assert (tmp_path / artifact.file).read_bytes() != source.read_bytes()
    inputs = exported.case.inputs(rows).numpy()
    assert np.abs(_run(tmp_path / artifact.file, inputs) - _run(source, inputs)).max() < 1e-5


def test_optimised_graph_chains_digests_and_is_reproducible(exported, tmp_path):
    """The artifact names the graph and the weights it comes from; compiling again gives the same bytes."""
    one, two = (_compile(exported, Target.ONNXRUNTIME, tmp_path / name) for name in "ab")
    assert one.onnx_digest == exported.artifact.digest
    assert one.weights_digest == exported.artifact.weights_digest
    assert one.digest == two.digest
    assert one.runnable
    assert one.seconds > 0
    assert one.built_on == "cpu"
    assert one.versions["onnxruntime"] == ort.__version__


def test_edit_lost_by_the_optimiser_is_an_error(exported, tmp_path, unedited, monkeypatch):
    """When the optimised file does not hold the edited weights, the build fails and names the layer."""
    monkeypatch.setattr(stage, "_weights", lambda proto: (w.numpy() for w in unedited.weights().values()))
    with pytest.raises(ContractError, match="the edit was lost"):
        _compile(exported, Target.ONNXRUNTIME, tmp_path)


def test_changed_graph_is_not_compiled(exported, tmp_path):
    """A graph file that is not the one its record describes is refused before anything is built from it."""
    data = bytearray((exported.folder / exported.artifact.file).read_bytes())
    data[-40] ^= 1
    (tmp_path / exported.artifact.file).write_bytes(data)
    for target in (Target.ONNXRUNTIME, Target.TENSORRT_RTX):
        (tmp_path / target.value).mkdir()
        with pytest.raises(IntegrityError, match=r"onnx"):
            engine_from_onnx(exported.artifact, tmp_path, target, PROFILE, exported.case.edits, tmp_path / target.value)


def test_external_data_is_compiled(text_export, tmp_path):
    """A graph with its weights in a second file compiles to a graph that computes the same."""
    artifact = _compile(text_export, Target.ONNXRUNTIME, tmp_path)
    inputs = text_export.case.inputs(3).int().numpy()
    wanted = _run(text_export.folder / text_export.artifact.file, inputs)
    assert np.abs(_run(tmp_path / artifact.file, inputs) - wanted).max() < 1e-5


@needs_rtx
def test_engine_is_built_without_a_gpu(exported, tmp_path):
    """TensorRT-RTX builds a real engine here, float32 without TF32, and leaves all that is needed to repeat it."""
    artifact = _compile(exported, Target.TENSORRT_RTX, tmp_path)
    stem = exported.artifact.tower.value
    assert artifact.file == f"{stem}.engine"
    assert (tmp_path / artifact.file).read_bytes()[:4].lower() in (b"vtrt", b"ptrt", b"ftrt")
    assert artifact.settings["tf32"] == "false"
    assert artifact.precision == "fp32"
    assert artifact.built_on == ("ahead of time" if gpu_reason() else device_name())
    assert artifact.peak_rss_bytes > 1 << 20
    assert artifact.peak_rss_bytes < resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # its own, not ours
    assert "tensorrt_rtx" in artifact.versions
    weights = sum(e.shape[0] * e.shape[1] * 4 for e in exported.case.edits)
    assert (tmp_path / artifact.file).stat().st_size > weights
    digest, command = artifact.digest, [sys.executable, "-m", "uwm_deploy.graphs.engine_builder", f"{stem}.build.json"]
    (tmp_path / artifact.file).unlink()
    root = str(Path(stage.__file__).parents[2])
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env={"PYTHONPATH": root, "PATH": "/usr/bin"})
    assert digest_of_file(tmp_path / artifact.file) == digest


@needs_rtx
def test_external_data_is_built(text_export, tmp_path):
    """An engine is built from a graph with its weights in a second file, int32 ids included."""
    artifact = _compile(text_export, Target.TENSORRT_RTX, tmp_path)
    assert (tmp_path / artifact.file).stat().st_size > 0


@needs_rtx
def test_bad_profile_is_an_error_with_the_compilers_words(exported, tmp_path):
    """A profile with min above opt fails the build with a reason, and leaves no engine."""
    with pytest.raises(ContractError, match="profile"):
        _compile(exported, Target.TENSORRT_RTX, tmp_path, Profile(min=4, opt=2, max=8))
    assert not list(tmp_path.glob("*.engine"))


@needs_rtx
def test_unknown_input_is_an_error(exported, tmp_path):
    """A profile for an input the graph does not have fails the build; None is never an engine."""
    spec = {
        "module": "tensorrt_rtx",
        "onnx": str(exported.folder / exported.artifact.file),
        "engine": "x.engine",
        "input": "nothing",
        "row": [[size] * 3 for size in exported.artifact.inputs[0].shape[1:]],
        "profiles": [[1, 2, 4]],
    }
    (tmp_path / "x.build.json").write_text(json.dumps(spec), encoding="utf-8")
    assert engine_builder.main(str(tmp_path / "x.build.json")) == engine_builder.FAILED
    reason = json.loads((tmp_path / "x.build.result.json").read_text(encoding="utf-8"))["error"]
    assert reason
    assert "Thread context" not in reason
    assert not (tmp_path / "x.engine").exists()


@needs_rtx
def test_graph_that_cannot_be_parsed_is_an_error(tmp_path):
    """An unknown operator fails with the parser's message; what is no graph at all does not reach the parser."""
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 3]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "broken", ends[:1], ends[1:])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "broken.onnx")
    spec = {"module": "tensorrt_rtx", "onnx": str(tmp_path / "broken.onnx"), "engine": str(tmp_path / "x.engine")}
    spec |= {"input": "x", "row": [[3, 3, 3]], "profiles": [[1, 2, 4]]}
    with pytest.raises(engine_builder.BuildFailed, match="NoSuchOperator"):
        engine_builder.build(spec)
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(IntegrityError, match=r"broken\.onnx is not a whole ONNX file"):
        engine_builder.build(spec)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed here")
def test_missing_package_is_a_prerequisite(exported, tmp_path):
    """Without the package the error names it and how to get it; nothing is written."""
    with pytest.raises(PrerequisiteError, match=r"tensorrt is not installed.*pip install"):
        _compile(exported, Target.TENSORRT, tmp_path)
    assert not list(tmp_path.iterdir())


@needs_rtx
@pytest.mark.parametrize("death", ["os.kill(os.getpid(), 9)", "raise RuntimeError('no luck')"])
def test_death_of_the_child_leaves_no_engine(exported, tmp_path, monkeypatch, death):
    """A child that is killed or raises before its engine is whole is an error, and nothing of an engine is left."""
    fake = tmp_path / "site"
    fake.mkdir()
    body = f"import os, pathlib\ndef late(self, target):\n    {death}\npathlib.Path.replace = late\n"
    (fake / "sitecustomize.py").write_text(body, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(fake))
    out = tmp_path / "out"
    with pytest.raises(UwmError, match=r"was killed|no luck"):
        _compile(exported, Target.TENSORRT_RTX, out)
    assert not list(out.glob("*.engine"))
    assert not list(out.glob(".tmp-*"))
