"""Stage `compile`: an ONNX graph to an engine for one target, with what was achieved read back."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uwm_deploy.bundle.layout import tower_record
from uwm_deploy.errors import ContractError, IntegrityError, PrerequisiteError
from uwm_deploy.graphs.attention import fused_file
from uwm_deploy.graphs.attention_choice import ROWS, Way, engine_by_measurement
from uwm_deploy.graphs.builder_log import BuildFailed
from uwm_deploy.graphs.child_process import made_by_child
from uwm_deploy.graphs.constant_folding import computed_away
from uwm_deploy.graphs.fingerprint import digest_of_onnx, fingerprint_by_source, fingerprint_by_value
from uwm_deploy.graphs.onnx_builder import provider_options
from uwm_deploy.graphs.openvino_builder import named_constants, weights_file
from uwm_deploy.graphs.stored_weights import named_weights
from uwm_deploy.recipes.compile_spec import CURRENT_GPU, BuilderSpec
from uwm_deploy.records.codec import plain_from_record, read_record, write_record
from uwm_deploy.records.edit import EditRecord, TensorEdit
from uwm_deploy.records.graph import (
    FUSED,
    STEPS,
    EngineArtifact,
    OnnxArtifact,
    Precision,
    Profile,
    Provider,
    Target,
    variant_name,
)
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.openvino import MODULE, PRECISIONS, reason_not_usable
from uwm_deploy.runtime.pixels import taken
from uwm_deploy.runtime.providers import COMPILING, provider_reason
from uwm_deploy.runtime.session import AT_LOAD, BASIC_AT_LOAD, missing_package, open_graph, usable
from uwm_deploy.runtime.tensorrt import MODULES, device_name
from uwm_deploy.stages.job import Job
from uwm_deploy.stages.models import Models

BUILDER = "uwm_deploy.graphs.engine_builder"
_NO_REFIT = "build it where the GPU is, or leave compile.refittable out"
_ON_A_GPU = "build where the GPU is, or for tensorrt-rtx ahead of time"
_OTHER_PROVIDER = "leave it out of compile.onnxruntime.providers, or build where it works"
_DEFAULTS = BuilderSpec()


def engine_from_onnx(
    graph: OnnxArtifact,
    onnx_folder: Path,
    target: Target,
    profile: Profile,
    edits: Sequence[TensorEdit],
    folder: Path,
    *,
    refittable: bool = False,
    profiles: Sequence[Profile] = (),
    builder: BuilderSpec = _DEFAULTS,
    provider: Provider = "any",
    attention: Way = "steps",
) -> EngineArtifact:
    """Compiles one tower in the precision of its graph.

    Args:
        graph: The exported graph, or one in lower precision that was made from it.
        onnx_folder: Where its files are.
        target: What for.
        profile: Batches it must accept.
        edits: Edited layers of this tower, looked up again in what can be read.
        folder: Where the engine goes.
        refittable: Whether another edit may be put into an engine of TensorRT later; ONNX graphs always are.
        profiles: Parts of the profile that an engine of TensorRT is optimised for on their own; the whole when empty.
        builder: How an engine of TensorRT is built.
        provider: Of ONNX Runtime.
        attention: In steps, or one node each.

    Raises:
        RecipeError: If the target does not have what is asked for.
        PrerequisiteError: If the target's package is missing, it does not know the precision, or it needs a GPU.
        IntegrityError: If the graph's files are not those its record describes.
        ContractError: If the build fails, loses the edit, or is not in the precision asked for.
    """
    if reason := missing_package(target):
        raise PrerequisiteError(f"{target.value}: {reason}", fix=f"pip install 'uwm-deploy[{target.value}]'")
    _check_source(graph, onnx_folder)
    source, (_, lowered) = onnx_folder / graph.file, precision_of(graph)
    parts = tuple(profiles) or (profile,)
    if target is Target.ONNXRUNTIME:
        if reason := provider_reason(provider):
            raise PrerequisiteError(f"{target.value} with {provider}: {reason}", fix=_OTHER_PROVIDER)
        built = _onnxruntime(graph, source, lowered, edits, folder, Wanted(provider, parts, builder, attention))
    elif target is Target.OPENVINO:
        built = _openvino(graph, source, lowered, edits, folder)
    else:
        _check_machine(target, refittable, builder)
        names = [edit.name for edit in edits] if refittable else []
        file, details = _tensorrt(
            graph, source, target, lowered, folder, names, Wanted(provider, parts, builder, attention)
        )
        built = (file, "", details)
    return _record(graph, target, provider, profile, folder, built)


def _record(
    graph: OnnxArtifact,
    target: Target,
    provider: Provider,
    profile: Profile,
    folder: Path,
    built: tuple[str, str, dict[str, Any]],
) -> EngineArtifact:
    """The record of an engine, from its file, its external data and what its builder said."""
    (file, external, details), (asked, lowered) = built, precision_of(graph)
    runnable = not usable(target)
    return EngineArtifact(
        variant=variant_name(target, asked, provider),
        tower=graph.tower,
        target=target,
        precision=lowered,
        file=file,
        external_data=external,
        digest=digest_of_onnx(folder / file, external),
        onnx_digest=graph.digest,
        weights_digest=graph.weights_digest,
        inputs=graph.inputs,
        outputs=graph.outputs,
        profile=profile,
        normalised=graph.normalised,
        settings=details["settings"],
        versions=details["versions"],
        built_on=_built_on(target, provider, runnable),
        runnable=runnable,
        seconds=details["seconds"],
        peak_rss_bytes=details["peak_rss_bytes"],
        head_digest=graph.head_digest,
    )


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an engine is made for, and how."""

    provider: Provider
    profiles: tuple[Profile, ...]
    builder: BuilderSpec
    attention: Way


def _built_on(target: Target, provider: Provider, runnable: bool) -> str:
    if target is Target.OPENVINO or (target is Target.ONNXRUNTIME and provider in ("any", "cpu")):
        return "cpu"
    return device_name() if runnable else "ahead of time"


def _check_machine(target: Target, refittable: bool, builder: BuilderSpec) -> None:
    """What needs a GPU is refused before anything is started."""
    if not (reason := usable(target)):
        return
    if refittable:
        raise PrerequisiteError(f"a refittable {target.value} engine is built on a GPU: {reason}", fix=_NO_REFIT)
    if target is Target.TENSORRT:
        raise PrerequisiteError(f"{target.value} builds on a GPU only: {reason}", fix=_ON_A_GPU)
    if CURRENT_GPU in builder.compute_capabilities:
        raise PrerequisiteError(
            f"compute_capabilities of {target.value} is {CURRENT_GPU}: {reason}", fix="name the GPU's, such as 8.9"
        )


def _check_source(graph: OnnxArtifact, folder: Path) -> None:
    """Nothing is compiled from bytes that export did not promise."""
    path = folder / graph.file
    files = [path, *([folder / graph.external_data] if graph.external_data else [])]
    if any(not file.is_file() or file.is_symlink() for file in files):
        raise IntegrityError(f"{graph.file} is not complete in {folder.name}/", fix="export again")
    if digest_of_onnx(path, graph.external_data) != graph.digest:
        raise IntegrityError(f"{graph.file} is not the file its record describes", fix="export again")


def precision_of(graph: OnnxArtifact) -> tuple[Precision, Precision]:
    """What was asked for, and what the linear layers that are not kept have."""
    made = graph.conversion
    return (made.precision, made.lowered) if made else (Precision.FP32, Precision.FP32)


def _onnxruntime(
    graph: OnnxArtifact,
    source: Path,
    lowered: Precision,
    edits: Sequence[TensorEdit],
    folder: Path,
    wanted: Wanted,
) -> tuple[str, str, dict[str, Any]]:
    """The optimised or compiled graph; of an optimised one its precision and the edit are read back from it."""
    file = f"{graph.tower.value}.onnx"
    external = f"{file}.data" if graph.external_data else ""
    provider = wanted.provider
    closed, on_cpu = provider in COMPILING, provider in ("any", "cpu")
    if lowered is Precision.BF16 and on_cpu:
        raise PrerequisiteError("ONNX Runtime has no bfloat16 kernels on the CPU", fix="use tensorrt or tensorrt-rtx")
    if not closed and lowered in (_AT_LOAD if on_cpu else {Precision.FP8}):
        return file, external, _as_it_is(graph, source, lowered, folder, wanted)
    given, builder = graph.inputs[0], wanted.builder
    spec = {
        "module": "onnxruntime",
        "onnx": os.path.relpath(source, folder),
        "engine": file,
        "external_data": "" if closed else external,
        "provider": provider,
        "options": provider_options(provider, given, wanted.profiles, builder),
        "compile": closed,
        "fit_for_cpu": on_cpu and lowered is Precision.INT8,
        "weights_only": lowered is Precision.W8A16,
        "tf32": builder.tf32,
        "attention": wanted.attention,
    }
    if closed:
        return file, "", made_by_child(BUILDER, spec, Target.ONNXRUNTIME.value, graph.tower.value, folder)
    details = made_by_child(BUILDER, spec, Target.ONNXRUNTIME.value, graph.tower.value, folder)
    arrays = list(_weights(folder / file))
    kinds = {str(array.dtype) for array in arrays if array.ndim == 2 and not np.issubdtype(array.dtype, np.int64)}
    if _is_float32(graph) != (kinds == {"float32"}):
        raise ContractError(f"{file} holds weights of {sorted(kinds)}", fix="ask for the precision it has")
    layers = _edited_layers(arrays, source, lowered, edits, file)
    details["settings"] |= {"edited_layers": str(layers), "weights": ",".join(sorted(kinds))}
    return file, external, details


def _is_float32(graph: OnnxArtifact) -> bool:
    """Whether no linear layer is in lower precision; precision `auto` may need all layers of a tower in float32."""
    return graph.conversion is None or set(graph.conversion.achieved.get("linear", {})) == {Precision.FP32.value}


def _edited_layers(
    arrays: Sequence[np.ndarray], source: Path, lowered: Precision, edits: Sequence[TensorEdit], file: str
) -> int:
    """Number of edited layers that are found among the constants of what was compiled; all of them must be."""
    folded = computed_away(source)
    if lowered is Precision.FP32:
        found = fingerprint_by_value(arrays, edits, folded)
    else:
        found = fingerprint_by_source(arrays, dict(named_weights(source)), edits, folded)
    if found.mismatches:
        raise ContractError(f"the edit was lost in {file}: {'; '.join(found.mismatches[:3])}", fix="report this")
    return found.layers


_AT_LOAD = {Precision.FP16: AT_LOAD, Precision.FP8: BASIC_AT_LOAD}


def _as_it_is(graph: OnnxArtifact, source: Path, lowered: Precision, folder: Path, wanted: Wanted) -> dict[str, Any]:
    """A graph that ONNX Runtime optimises when it is opened; opened once, so that one it cannot open is not shipped."""
    started, attention, provider = time.perf_counter(), STEPS, wanted.provider
    for name in filter(None, (graph.file, graph.external_data)):
        shutil.copyfile(source.parent / name, folder / name)
    if wanted.attention == FUSED:
        attention = _fused(source, folder / graph.file)
    session = open_graph(
        folder / graph.file,
        graph,
        max_batch=1,
        device="cpu" if provider == "any" else provider,
        optimisation="basic" if lowered is Precision.FP8 else "extended",
    )
    where = session.where
    session.close()
    return {
        "settings": {"optimisation": _AT_LOAD[lowered], "provider": provider, "attention": attention},
        "versions": {"onnxruntime": where["onnxruntime"]},
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": 0,
    }


def _fused(source: Path, file: Path) -> str:
    """Writes a graph with one node for each attention; what became of them, for the record."""
    try:
        model, found = fused_file(source)
    except BuildFailed as error:
        raise ContractError(str(error), fix="leave compile.attention out") from error
    file.write_bytes(model.SerializeToString(deterministic=True))
    return str(found)


def _openvino(
    graph: OnnxArtifact, source: Path, lowered: Precision, edits: Sequence[TensorEdit], folder: Path
) -> tuple[str, str, dict[str, Any]]:
    """A model of OpenVINO; the edit is read back from its constants, which are the graph's own."""
    if lowered not in PRECISIONS:
        raise PrerequisiteError(
            f"openvino does not compute in {lowered.value} on a CPU",
            fix=f"use {', '.join(precision.value for precision in PRECISIONS)}",
        )
    file = f"{graph.tower.value}.xml"
    if reason := reason_not_usable(lowered):
        raise PrerequisiteError(f"openvino in {lowered.value}: {reason}", fix="use another precision")
    spec = {"module": MODULE, "onnx": os.path.relpath(source, folder), "engine": file, "precision": lowered.value}
    details = made_by_child(BUILDER, spec, Target.OPENVINO.value, graph.tower.value, folder)
    arrays = [array for _, array in named_constants(folder / file)]
    layers = _edited_layers(arrays, source, lowered, edits, file)
    kinds = details["settings"]["multiplied_in"]
    if not any(part.startswith(_OPENVINO_NAMES[lowered]) for part in kinds.split(", ")):
        raise ContractError(f"openvino multiplies {file} in {kinds}, not in {lowered.value}", fix="report this")
    details["settings"] |= {"edited_layers": str(layers)}
    return file, weights_file(file), details


_OPENVINO_NAMES: dict[Precision, tuple[str, ...]] = {
    Precision.FP32: ("f32*f32",),
    Precision.BF16: ("bf16*bf16",),
    Precision.INT8: ("i8*i8", "u8*i8"),
    Precision.W8A16: ("f32*i8", "f32*u8"),
}
"""Activations and weights that its linear layers multiply, except those that stay in float32."""


def _weights(path: Path) -> Iterator[np.ndarray]:
    return (array for _, array in named_weights(path))


def _tensorrt(
    graph: OnnxArtifact,
    source: Path,
    target: Target,
    lowered: Precision,
    folder: Path,
    refittable: Sequence[str],
    given: Wanted,
) -> tuple[str, dict[str, Any]]:
    """An engine in the precision of its graph."""
    stem, file, builder = graph.tower.value, f"{graph.tower.value}.engine", given.builder
    spec = {
        "module": MODULES[target],
        "onnx": os.path.relpath(source, folder),
        "engine": file,
        "input": graph.inputs[0].name,
        "row": [[size.min, size.opt, size.max] for size in graph.inputs[0].row_sizes],
        "profiles": [[part.min, part.opt, part.max] for part in given.profiles],
        "builder": plain_from_record(builder),
        "refittable": refittable,
        "attention": given.attention,
    }
    body = made_by_child(BUILDER, spec, target.value, stem, folder)
    settings = body["settings"]
    kinds = set(settings["layer_types"].split(","))
    wanted = _TENSORRT_NAMES[lowered]
    tf32 = str(builder.tf32).lower()
    if set(settings["output_types"].split(",")) != {"FLOAT"} or settings["tf32"] != tf32 or wanted not in kinds:
        raise ContractError(f"{target.value} built {stem} as {settings}, not {lowered.value}", fix="report this")
    return file, body


_TENSORRT_NAMES = {
    Precision.FP32: "MATRIX_MULTIPLY:FLOAT",
    Precision.FP16: "MATRIX_MULTIPLY:HALF",
    Precision.BF16: "MATRIX_MULTIPLY:BF16",
    Precision.INT8: "QUANTIZE:INT8",
    Precision.FP8: "QUANTIZE:FP8",
    Precision.W8A16: "DEQUANTIZE:FLOAT",
}
"""Layer and type that a parsed network of a precision must have."""


def make(job: Job, out: Path) -> None:
    """Compiles both graphs of a precision for the variant's target.

    Raises:
        PrerequisiteError: If the target does not know the precision, or cannot be compiled for here.
    """
    target, precision, spec = job.variant.target, job.variant.precision, job.plan.recipe.compile
    assert target is not None
    assert precision is not None
    edit, source = read_record(EditRecord, job.folder.edit_record), job.folder.graphs(precision)
    for tower in TowerName:
        graph = read_record(OnnxArtifact, tower_record(source, tower))
        job.notes.progress(f"{target.value} {tower.value}", 0, 1)

        def build(attention: Way, folder: Path, graph: OnnxArtifact = graph) -> EngineArtifact:
            return engine_from_onnx(
                graph,
                source,
                target,
                spec.profile,
                edit.of(graph.tower),
                folder,
                refittable=spec.refittable,
                profiles=spec.profiles,
                builder=spec.builder(target, job.variant.provider),
                provider=job.variant.provider,
                attention=attention,
            )

        if spec.attention == "measured" and target is not Target.OPENVINO:  # which fuses by itself
            engine = engine_by_measurement(build, out, _rows(job, graph))
            chosen = engine.settings["attention"], engine.settings["attention_why"]
            job.notes.line(f"compile    {engine.variant}, {tower.value} tower: attention {'; '.join(chosen)}")
        else:
            engine = build("fused" if spec.attention == "fused" else "steps", out)
        write_record(tower_record(out, tower), engine)


def _rows(job: Job, graph: OnnxArtifact) -> np.ndarray:
    """Some inputs of the calibration set, safe ones and unsafe ones, as the graph takes them."""
    batches = job.shared(Models).some_pairs(graph.tower, ROWS)
    return np.concatenate([taken(part, graph.inputs[0]) for batch in batches for part in (batch.safe, batch.unsafe)])
