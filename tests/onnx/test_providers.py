"""Graphs for ONNX Runtime per provider: the one that is asked for or an error, and nothing that was not compiled."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.onnx.conftest import Exported
from uwm_deploy.errors import ContractError, PrerequisiteError
from uwm_deploy.graphs.child_process import made_by_child
from uwm_deploy.graphs.onnx_builder import provider_options
from uwm_deploy.pipeline.refit_graphs import reason_against
from uwm_deploy.recipes.compile_spec import BuilderSpec
from uwm_deploy.recipes.policy import EvidenceRule
from uwm_deploy.records.evidence import ArtifactEvidence, Evidence
from uwm_deploy.records.graph import (
    EXPORTED,
    EngineArtifact,
    Precision,
    Profile,
    Provider,
    Target,
    TensorSpec,
    target_of,
    variant_name,
)
from uwm_deploy.runtime.session import open_engine, reason_not_executable
from uwm_deploy.runtime.tensorrt import gpu_reason
from uwm_deploy.stages.compile import BUILDER, engine_from_onnx
from uwm_deploy.stages.gate.evidence import is_for

PROFILE = Profile(min=1, opt=2, max=4)


def _input(*row: int) -> TensorSpec:
    return TensorSpec(name="x", dtype="float32", shape=("batch", *row))


WITH_GPU: tuple[Provider, ...] = ("cuda", "tensorrt", "tensorrt-rtx")
without_gpu = pytest.mark.skipif(not gpu_reason(), reason="this machine has a GPU")


def compiled(exported: Exported, folder: Path, provider: Provider) -> EngineArtifact:
    folder.mkdir(exist_ok=True)
    return engine_from_onnx(
        exported.artifact, exported.folder, Target.ONNXRUNTIME, PROFILE, exported.case.edits, folder, provider=provider
    )


def test_a_variant_of_a_provider_runs_on_it(exported: Exported, tmp_path: Path) -> None:
    """It has a name of its own, computes the same, and is not opened anywhere else."""
    engine, usual = (compiled(exported, tmp_path / name, name) for name in ("cpu", "any"))  # type: ignore[arg-type]
    assert (engine.variant, usual.variant) == ("onnxruntime-cpu-fp32", "onnxruntime-fp32")
    assert (engine.settings["provider"], usual.settings["provider"]) == ("cpu", "any")
    rows = exported.case.inputs(3).numpy()
    found = []
    for one, folder in ((engine, "cpu"), (usual, "any")):
        session = open_engine(one, (tmp_path / folder / one.file).read_bytes(), {})
        assert session.where["provider"] == "CPUExecutionProvider" or not gpu_reason()
        found.append(session.run(rows))
    assert np.abs(found[0] - found[1]).max() < 1e-5
    with pytest.raises(PrerequisiteError, match="made for cpu, not for cuda"):
        open_engine(engine, (tmp_path / "cpu" / engine.file).read_bytes(), {}, device="cuda")


@without_gpu
@pytest.mark.parametrize("provider", WITH_GPU)
def test_a_provider_that_does_not_work_here_is_said_before_a_build(
    text_export: Exported, tmp_path: Path, provider: Provider
) -> None:
    """No fallback to the CPU, and nothing written; an engine made elsewhere is not executable here either."""
    with pytest.raises(PrerequisiteError, match=f"onnxruntime with {provider}: this machine has no NVIDIA driver"):
        compiled(text_export, tmp_path / "out", provider)
    assert not list((tmp_path / "out").iterdir())
    made = compiled(text_export, tmp_path / "cpu", "cpu")
    elsewhere = dataclasses.replace(made, settings=dict(made.settings) | {"provider": provider})
    assert "driver" in reason_not_executable(elsewhere)
    assert not reason_not_executable(made)
    with pytest.raises(PrerequisiteError):
        open_engine(elsewhere, (tmp_path / "cpu" / made.file).read_bytes(), {})


@without_gpu
@pytest.mark.parametrize(("provider", "compiling"), [("cuda", False), ("tensorrt", True), ("tensorrt-rtx", True)])
def test_the_builder_itself_never_falls_back(
    exported: Exported, tmp_path: Path, provider: Provider, compiling: bool
) -> None:
    """Where a driver is there but a library is not, ONNX Runtime would take the CPU with a line in the log."""
    spec = build_spec(exported, provider, compiling)
    with pytest.raises(PrerequisiteError, match=r"no working|is not installed|no device"):
        made_by_child(BUILDER, spec, Target.ONNXRUNTIME.value, exported.artifact.tower.value, tmp_path)
    assert not list(tmp_path.glob("*.onnx"))


def test_a_provider_that_compiles_nothing_is_an_error(exported: Exported, tmp_path: Path) -> None:
    """The CPU provider makes no engines; without the flag ONNX Runtime writes the graph as it is and calls it compiled."""
    spec = build_spec(exported, "cpu", True)
    with pytest.raises(ContractError, match=r"CPUExecutionProvider.*Unable to compile any nodes"):
        made_by_child(BUILDER, spec, Target.ONNXRUNTIME.value, exported.artifact.tower.value, tmp_path)
    assert not list(tmp_path.glob("*.onnx"))
    ort.ModelCompiler(ort.SessionOptions(), spec["onnx"]).compile_to_file(str(tmp_path / "plain.onnx"))
    assert all(node.op_type != "EPContext" for node in onnx.load(tmp_path / "plain.onnx").graph.node)


def build_spec(exported: Exported, provider: Provider, compiling: bool) -> dict[str, object]:
    return {
        "module": "onnxruntime",
        "onnx": str(exported.folder / exported.artifact.file),
        "engine": "out.onnx",
        "external_data": "",
        "provider": provider,
        "options": provider_options(provider, _input(3), [PROFILE], BuilderSpec()),
        "compile": compiling,
        "tf32": False,
        "fit_for_cpu": False,
    }


def test_settings_reach_a_provider_in_its_own_words() -> None:
    """Profiles as shapes, workspace in bytes; the CUDA provider multiplies float32 as float32."""
    builder = BuilderSpec(workspace_mib=64, optimisation_level=4)
    two = (Profile(min=1, opt=1, max=2), Profile(min=2, opt=8, max=8))
    assert provider_options("cpu", _input(3), two, builder) == {}
    assert provider_options("cuda", _input(3), two, builder) == {"use_tf32": "0"}
    assert provider_options("tensorrt", _input(3, 4), two, builder) == {
        "trt_profile_min_shapes": "x:1x3x4,x:2x3x4",
        "trt_profile_opt_shapes": "x:1x3x4,x:8x3x4",
        "trt_profile_max_shapes": "x:2x3x4,x:8x3x4",
        "trt_max_workspace_size": str(64 << 20),
        "trt_builder_optimization_level": "4",
    }
    rtx = provider_options("tensorrt-rtx", _input(3), two[:1], BuilderSpec())
    assert rtx == {f"nv_profile_{size}_shapes": f"x:{n}x3" for size, n in (("min", 1), ("opt", 1), ("max", 2))}


@pytest.mark.parametrize("provider", ["any", "cpu", *WITH_GPU])
def test_names_of_variants_say_their_target(provider: Provider) -> None:
    """A provider named like another target does not make a variant one of that target."""
    for precision in (Precision.FP32, Precision.AUTO):
        name = variant_name(Target.ONNXRUNTIME, precision, provider)
        assert target_of(name) is Target.ONNXRUNTIME
        evidence = ArtifactEvidence(
            variant=name, precision=precision, evidence=Evidence.NOT_RUN, reason="", where={}, artifact_digests={}
        )
        for target in Target:
            rule = EvidenceRule(target=target, device="gpu", reason="")
            assert is_for(rule, evidence) == (target is Target.ONNXRUNTIME)
    assert [target_of(name) for name in ("tensorrt-rtx-fp16", "tensorrt-fp16", EXPORTED)] == [
        Target.TENSORRT_RTX,
        Target.TENSORRT,
        None,
    ]


def test_weights_inside_an_engine_are_not_refitted(text_export: Exported, tmp_path: Path) -> None:
    """A compiled graph has no initialisers to rewrite."""
    made = compiled(text_export, tmp_path / "cpu", "cpu")
    assert reason_against(made) == ""
    closed = dataclasses.replace(
        made, settings=dict(made.settings) | {"optimisation": "compiled", "provider": "tensorrt-rtx"}
    )
    assert reason_against(closed) == "its weights are inside engines of tensorrt-rtx"
