"""Names the first layer where an artifact leaves the exported float32 graph, with the numbers.

The exported graph is the reference of the walk. Whether it is itself the edited model is told first: by the canaries that
the build stored, and by its weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from uwm_deploy.errors import InputError, UwmError
from uwm_deploy.graphs.fingerprint import digest_of_array
from uwm_deploy.graphs.smoothed import smoothed_as
from uwm_deploy.graphs.walk import Graph, differences, walk
from uwm_deploy.records.diagnosis import Diagnosis, Difference, StageWalk, WalkedStage
from uwm_deploy.records.evidence import Evidence
from uwm_deploy.records.graph import EXPORTED, EngineArtifact, Precision, Target
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.tensor_file import open_tensors
from uwm_deploy.report.tables.diagnoses import findings_of
from uwm_deploy.runtime.pixels import taken
from uwm_deploy.runtime.session import Session, external_data_of, open_engine, open_graph
from uwm_deploy.safeground.canaries import Canaries
from uwm_deploy.studies.build_files import BuildFiles, GraphFile, build_files

TOLERANCE = {
    Precision.FP32: 1e-5,
    Precision.FP16: 0.02,
    Precision.BF16: 0.1,
    Precision.INT8: 0.35,
    Precision.FP8: 0.35,
    Precision.W8A16: 0.1,
}
"""Largest relative error of one part, given the reference's values, that rounding in a precision explains."""


def diagnose(path: Path, variant: str | None = None) -> Diagnosis:
    """Walks the artifacts of a bundle or a run folder.

    Args:
        path: Folder of either kind.
        variant: Only this one; without it those that failed the gate, or all when none did.

    Raises:
        InputError: If the folder is neither, or has no such variant.
        IntegrityError: If a bundle's digests do not match.
    """
    files = build_files(path)
    known = [EXPORTED, *dict.fromkeys(engine.variant for engine in files.engines)]
    if variant is not None and variant not in known:
        raise InputError(f"{path} has no variant {variant!r}", fix=f"it has {', '.join(known)}")
    chosen = [variant] if variant else [v for v in known if v in files.failed] or known
    walks: list[StageWalk] = []
    with tempfile.TemporaryDirectory(prefix="uwm-diagnose-") as folder:
        for tower in TowerName:
            walks.append(_exported(files, tower))
            for engine in files.engines:
                if engine.tower is tower and engine.variant in chosen:
                    walks += _variant(files, engine, Path(folder))
    return Diagnosis(name=files.name, walks=tuple(walks), findings=tuple(findings_of(walks)))


def _exported(files: BuildFiles, tower: TowerName) -> StageWalk:
    """The exported graph against the edited model: its weights, and its canaries."""
    graph = files.exported[tower]
    canaries = files.canaries(tower)
    ratio = None
    if canaries is not None:
        ratio = _ratio(open_graph(graph.path, graph.record, max_batch=16), canaries)
    return StageWalk(
        variant=EXPORTED,
        tower=tower,
        stage="export",
        precision=Precision.FP32,
        evidence=Evidence.EXECUTED,
        inputs=len(canaries.inputs) if canaries is not None else 0,
        differences=tuple(_unlike_model(files, tower, Graph(graph.path))),
        canary_ratio=ratio,
        note=graph.note,
    )


def _unlike_model(files: BuildFiles, tower: TowerName, graph: Graph) -> Iterator[Difference]:
    """Weights of the exported graph that are not the edited model's; without the model, edited layers by digest."""
    if files.model is not None:
        for file in sorted(files.model.glob("*.safetensors")):
            yield from _unlike_file(file, graph)
        return
    for tensor in files.edit.of(tower):
        name = tensor.name
        if name in graph.initialisers and digest_of_array(graph.array(name)) != tensor.digest_after:
            yield Difference(layer=name.rpartition(".")[0], what=name, detail="is not the edited weight")


def _unlike_file(file: Path, graph: Graph) -> Iterator[Difference]:
    """Weights of a graph that are not those of a safetensors file; a name that only one has is no difference."""
    with open_tensors(file, name=str(file), fix="run `edit` again") as tensors:
        for name in tensors.keys():  # noqa: SIM118 -- not a mapping
            if name not in graph.initialisers:
                continue
            # numpy has no bfloat16, so the file is read by torch
            detail = _unlike(tensors.get_tensor(name).float().numpy(), graph.array(name))
            if detail:
                yield Difference(layer=name.rpartition(".")[0], what=name, detail=detail)


def _unlike(wanted: np.ndarray, found: np.ndarray) -> str:
    """How a weight differs from the edited model's, of any shape; empty when it does not."""
    if wanted.shape != found.shape:
        return f"has shape {found.shape}, the edited model {wanted.shape}"
    if np.array_equal(wanted, found):
        return ""
    off = wanted != found
    worst = float(np.abs(wanted - found).max())
    return f"{int(off.sum())} of {off.size} entries are not the edited model's, the worst by {worst:.3g}"


def _variant(files: BuildFiles, engine: EngineArtifact, folder: Path) -> Iterator[StageWalk]:
    """The graph in lower precision that an engine was compiled from, where it was kept, and the engine itself.

    Args:
        files: Of the build.
        engine: Which one.
        folder: Scratch space.
    """
    converted = files.converted(engine)
    source = converted.path if converted is not None else None
    if converted is not None:
        yield _walked(files, engine, "convert", converted, folder, None)
    if engine.target is not Target.ONNXRUNTIME or engine.settings.get("optimisation") == "compiled":
        kept = converted is not None or Precision(engine.precision) is Precision.FP32
        why = f"an engine of {engine.target.value} cannot be opened up" + (
            "" if kept else ", and a bundle does not hold the graph it was compiled from"
        )
        yield replace(_walk_of(engine, "compile"), reason=why)
        return
    file, canaries = files.engine_file(engine), files.canaries(engine.tower)
    ratio = None
    if canaries is not None:
        data = external_data_of(file.path.parent, engine.external_data)
        ratio = _ratio(open_engine(engine, file.path.read_bytes(), data), canaries)
    found = _walked(files, engine, "compile", file, folder, source)
    yield found if found.evidence is Evidence.NOT_RUN else replace(found, canary_ratio=ratio)


def _walked(
    files: BuildFiles, engine: EngineArtifact, stage: WalkedStage, file: GraphFile, folder: Path, source: Path | None
) -> StageWalk:
    """Compares the values of one graph file with those of the exported graph, changed as the file changes its channels.

    Args:
        files: Of the build.
        engine: What the file belongs to.
        stage: That made the file.
        file: The graph.
        folder: Scratch space.
        source: Graph that the file was compiled from; None where it is that graph, or it was not kept.
    """
    canaries, tolerance = files.canaries(engine.tower), TOLERANCE[Precision(engine.precision)]
    artifact = Graph(file.path)
    smoothed = smoothed_as(Graph(files.exported[engine.tower].path), artifact, source)
    reference = smoothed.graph
    unlike = differences(reference, artifact, together=smoothed.together, about=smoothed.about)
    found = replace(_walk_of(engine, stage), differences=tuple(unlike), note=file.note)
    try:
        rows = canaries.inputs if canaries is not None else files.inputs(engine.tower)
        values = walk(reference, artifact, taken(rows, engine.inputs[0]), folder)
    except UwmError as error:
        return replace(found, reason=error.what)
    return replace(
        found,
        evidence=Evidence.EXECUTED,
        tolerance=tolerance,
        inputs=len(rows),
        first=next((v for v in values if v.own > tolerance or not v.finite), None),
        values=tuple(values),
    )


def _walk_of(engine: EngineArtifact, stage: WalkedStage) -> StageWalk:
    """A walk that was not run yet."""
    return StageWalk(
        variant=engine.variant,
        tower=engine.tower,
        stage=stage,
        precision=Precision(engine.precision),
        evidence=Evidence.NOT_RUN,
    )


def _ratio(session: Session, canaries: Canaries) -> float:
    """Largest ratio of the canaries (`Canaries.worst`); the session is closed afterwards."""
    try:
        return canaries.worst(session.run(canaries.inputs))
    finally:
        session.close()
