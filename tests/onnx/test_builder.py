"""Settings of TensorRT's builders: all of them arrive, all are recorded, and what is not there is said before a build."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import types
from pathlib import Path

import pytest

from tests.onnx.conftest import Exported
from uwm_deploy.errors import PrerequisiteError, RecipeError
from uwm_deploy.graphs.builder_log import BuildFailed, logger_of
from uwm_deploy.graphs.builder_settings import apply_settings
from uwm_deploy.graphs.engine_builder import _parsed, mark_refittable
from uwm_deploy.graphs.engine_weights import take_weights_out
from uwm_deploy.graphs.timing_cache import attach, cache_file, keep
from uwm_deploy.recipes.compile_spec import BuilderSpec
from uwm_deploy.records.graph import EngineArtifact, Profile, Target
from uwm_deploy.runtime.tensorrt import gpu_reason, profile_for
from uwm_deploy.stages.compile import engine_from_onnx

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="not run: package tensorrt_rtx is not installed"
)
without_gpu = pytest.mark.skipif(not gpu_reason(), reason="this machine has a GPU")
TWO = (Profile(min=1, opt=1, max=4), Profile(min=4, opt=16, max=16))


def compiled(exported: Exported, folder: Path, builder: BuilderSpec, profiles: tuple[Profile, ...]) -> EngineArtifact:
    whole = Profile(min=profiles[0].min, opt=profiles[0].opt, max=profiles[-1].max)
    folder.mkdir(exist_ok=True)
    return engine_from_onnx(
        exported.artifact, exported.folder, Target.TENSORRT_RTX, whole, exported.case.edits, folder,
        profiles=profiles, builder=builder,
    )  # fmt: skip


@pytest.fixture
def rtx() -> tuple[types.ModuleType, object, list[str]]:
    """The module, a configuration of its builder and what its logger hears."""
    trt = pytest.importorskip("tensorrt_rtx")
    messages: list[str] = []
    builder = trt.Builder(logger_of(trt, messages))
    return trt, builder.create_builder_config(), messages


@needs_rtx
def test_every_setting_is_read_back_and_recorded(text_export: Exported, tmp_path: Path) -> None:
    """They stand in the record and in the settings that repeat the build; the engine's header names the same GPUs."""
    asked = BuilderSpec(
        workspace_mib=256, optimisation_level=1, tf32=True, compute_capabilities=("8.9", "12.0"), timing_cache=False
    )
    engine = compiled(text_export, tmp_path, asked, TWO)
    wanted = {
        "workspace_mib": "256",
        "optimization_level": "1",
        "tf32": "true",
        "compute_capabilities": "SM89, SM120",
        "profiles": "1-1-4, 4-16-16",
        "timing_cache": "none",
        "header_magic": "vtrt",
        "header_compute_capabilities": "0x18",
    }
    assert wanted.items() <= engine.settings.items()
    script = json.loads((tmp_path / "text.build.json").read_text(encoding="utf-8"))
    assert script["builder"]["compute_capabilities"] == ["8.9", "12.0"]
    assert script["builder"]["workspace_mib"] == 256
    assert script["profiles"] == [[1, 1, 4], [4, 16, 16]]
    assert (engine.profile.min, engine.profile.max) == (1, 16)
    plain = compiled(text_export, tmp_path / "plain", BuilderSpec(), TWO[:1])
    assert plain.settings["tf32"] == "false"
    assert plain.settings["compute_capabilities"] == "the flavour's own"
    assert plain.digest != engine.digest


@needs_rtx
def test_gpus_that_a_release_does_not_build_for_are_an_error(text_export: Exported, tmp_path: Path) -> None:
    """The error is about the recipe, and names what the release knows; no engine is left."""
    with pytest.raises(RecipeError, match=r"does not build for 9\.0; it knows .*8\.9"):
        compiled(text_export, tmp_path, BuilderSpec(compute_capabilities=("9.0",)), TWO)
    assert not list(tmp_path.glob("*.engine"))


@needs_rtx
@without_gpu
def test_current_needs_a_gpu(text_export: Exported, tmp_path: Path) -> None:
    """Said before a build is started."""
    with pytest.raises(PrerequisiteError, match="compute_capabilities of tensorrt-rtx is current"):
        compiled(text_export, tmp_path, BuilderSpec(compute_capabilities=("current",)), TWO)
    assert not list(tmp_path.iterdir())


@needs_rtx
def test_a_setting_that_is_ignored_is_an_error(rtx: tuple[types.ModuleType, object, list[str]]) -> None:
    """TensorRT-RTX takes a hardware compatibility without a word and forgets it; that never passes for done."""
    trt, config, messages = rtx
    with pytest.raises(BuildFailed, match=r"hardware_compatibility.*NONE.*AMPERE_PLUS"):
        apply_settings(
            trt, config, BuilderSpec(hardware_compatibility="ampere-plus"), refittable=False, messages=messages
        )


@needs_rtx
def test_what_a_release_lacks_is_not_offered(rtx: tuple[types.ModuleType, object, list[str]]) -> None:
    """A module without the names, as TensorRT is without compute capabilities, is an error about the recipe."""
    trt, config, messages = rtx
    lacking = types.SimpleNamespace(
        __name__="tensorrt", __version__="11.1", BuilderFlag=trt.BuilderFlag, HardwareCompatibilityLevel=object()
    )
    for spec in (BuilderSpec(compute_capabilities=("8.9",)), BuilderSpec(hardware_compatibility="ampere-plus")):
        with pytest.raises(RecipeError, match=r"tensorrt 11\.1"):
            apply_settings(lacking, config, spec, refittable=False, messages=messages)


@needs_rtx
def test_weights_that_a_refit_replaces_can_stay_out_of_the_build(
    text_export: Exported, rtx: tuple[types.ModuleType, object, list[str]]
) -> None:
    """Their constants become places of the same type and size that the refit finds by name; all others keep their values."""
    trt, _, messages = rtx
    logger = logger_of(trt, messages)
    builder = trt.Builder(logger)
    path = text_export.folder / text_export.artifact.file
    network, _, _kept = _parsed(trt, builder, logger, path, messages, fused=False)
    names = [edit.name for edit in text_export.case.edits]
    assert take_weights_out(trt, network, names, messages) == len(names) > 0
    mark_refittable(network, names, messages)
    shapes = {}
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type == trt.LayerType.CONSTANT:
            shapes[layer.name] = tuple(layer.get_output(0).shape)
    assert {name: shapes[name] for name in names} == {edit.name: edit.shape for edit in text_export.case.edits}
    with pytest.raises(BuildFailed, match="no weights bias of nothing"):
        mark_refittable(network, ["bias of nothing"], messages)


@needs_rtx
def test_null_weights_need_a_refittable_engine_and_a_release_that_has_them(
    rtx: tuple[types.ModuleType, object, list[str]],
) -> None:
    """Both are errors about the recipe; with both there, the plan is asked to leave the weights out."""
    trt, config, messages = rtx
    asked = BuilderSpec(null_weights=True)
    with pytest.raises(RecipeError, match="refittable engines only"):
        apply_settings(trt, config, asked, refittable=False, messages=messages)
    apply_settings(trt, config, asked, refittable=True, messages=messages)
    assert config.get_flag(trt.BuilderFlag.STRIP_PLAN)  # type: ignore[attr-defined]
    older = types.SimpleNamespace(__name__="tensorrt_rtx", __version__="1.6.1", SerializationFlag=trt.SerializationFlag)
    with pytest.raises(RecipeError, match=r"tensorrt_rtx 1\.6\.1 does not build without weights"):
        take_weights_out(older, None, [], messages)


def test_the_nearest_profile_is_chosen() -> None:
    """A batch takes the profile that was optimised for the nearest one; a batch that none takes is an error."""
    assert [profile_for(rows, TWO) for rows in (1, 3, 4, 5, 16)] == [0, 0, 0, 1, 1]
    with pytest.raises(PrerequisiteError, match="1 to 4, 4 to 16, not of 17"):
        profile_for(17, TWO)


def test_times_are_kept_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One file per flavour, version and device, in the folder that the user names."""
    monkeypatch.setenv("UWM_DEPLOY_CACHE", str(tmp_path))
    files = {
        cache_file(*key)
        for key in (
            ("tensorrt", "11.1.0", "NVIDIA H200"),
            ("tensorrt", "11.1.0", "NVIDIA L4"),
            ("tensorrt", "11.4.1", "NVIDIA L4"),
            ("tensorrt_rtx", "11.4.1", "NVIDIA L4"),
        )
    }
    assert len(files) == 4
    assert tmp_path / "timing" / "tensorrt-11.1.0-NVIDIA-H200.cache" in files
    monkeypatch.delenv("UWM_DEPLOY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_file("tensorrt", "11", "x") == tmp_path / "xdg" / "uwm-deploy" / "timing" / "tensorrt-11-x.cache"


@needs_rtx
def test_state_of_the_times_is_told_and_a_file_that_does_not_fit_is_seen(
    rtx: tuple[types.ModuleType, object, list[str]], tmp_path: Path
) -> None:
    """A builder answers a file it cannot use with an empty cache and a message, never with an error."""
    _, config, messages = rtx
    file = tmp_path / "timing" / "x.cache"
    assert attach(config, file, messages) == {"timing_cache": "new", "timing_cache_before": "none"}
    after = keep(config, file, messages)["timing_cache_after"]
    assert after.startswith("sha256:")
    assert not list(file.parent.glob(".tmp*"))
    file.write_bytes(b"of another device")
    state = attach(config, file, messages)
    assert state["timing_cache"] == "refused, begun anew"
    assert state["timing_cache_before"].startswith("sha256:")
    (tmp_path / "a file").write_text("")
    assert keep(config, tmp_path / "a file" / "x.cache", messages)["timing_cache_after"].startswith("not kept: ")


class Times:
    """Times of a builder that measures, as lines; no flavour does where there is no GPU."""

    def __init__(self, content: bytes) -> None:
        self.lines = set(content.split())

    def combine(self, other: Times, _: bool) -> bool:
        self.lines |= other.lines
        return True

    def serialize(self) -> bytes:
        return b"\n".join(sorted(self.lines))


class Config:
    """The part of a builder's configuration that holds times."""

    def create_timing_cache(self, content: bytes) -> Times:
        return Times(content)

    def set_timing_cache(self, cache: Times, _: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> Times:
        return self.cache


def _build(file: Path, number: int) -> None:
    config = Config()
    for turn in range(20):
        attach(config, file, [])
        config.cache.lines.add(f"{number}.{turn}".encode())
        keep(config, file, [])


def test_builds_at_the_same_time_lose_no_times(tmp_path: Path) -> None:
    """Four processes add to one file, and each time of each of them is in it at the end."""
    file = tmp_path / "timing" / "x.cache"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_build, args=(file, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert set(file.read_bytes().split()) == {f"{n}.{t}".encode() for n in range(4) for t in range(20)}
    assert attach(Config(), file, [])["timing_cache"] == "reused"
