"""What is measured: the exported graphs and every engine, opened as a server opens them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from uwm_deploy.edits.patch import Patch
from uwm_deploy.errors import PrerequisiteError
from uwm_deploy.recipes.compile_spec import ExportSpec
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.evidence import GraphAudit
from uwm_deploy.records.graph import EXPORTED, EngineArtifact, OnnxArtifact, Precision, Profile, RowLengths, Target
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.runtime.providers import COMPILING
from uwm_deploy.runtime.session import (
    Session,
    external_data_of,
    open_engine,
    open_graph,
    provider_of,
    reason_not_executable,
)
from uwm_deploy.stages.verify.anew import Trace, compiled_anew, converted_anew, exported_anew, traced_on_the_cpu
from uwm_deploy.stages.verify.audit import audit_of_engine, audit_of_graph
from uwm_deploy.stages.verify.verify import ArtifactSubject
from uwm_deploy.towers.protocol import LoadedModel

Engines = Mapping[TowerName, tuple[EngineArtifact, Path]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifacts:
    """Graphs and engines with the files that hold them.

    Attributes:
        exported: Record and file of each exported graph.
        engines: Record and file of each engine, by variant.
        compiled_from: File of every graph that an engine was compiled from, by the graph's digest.
        edit: What must lie in them.
        patch: The same, with positions.
        export: How the graphs were exported.
        profile: Batches that they take.
        converted: Record of each graph in lower precision, by its digest.
        trace: Exports a tower again; whoever verifies many builds of one model may keep its graphs.
    """

    exported: Mapping[TowerName, tuple[OnnxArtifact, Path]]
    engines: Mapping[str, Engines]
    compiled_from: Mapping[Digest, Path]
    edit: EditRecord
    patch: Patch
    export: ExportSpec
    profile: Profile
    converted: Mapping[Digest, OnnxArtifact] = field(default_factory=dict)
    trace: Trace = traced_on_the_cpu


def subjects_of(artifacts: Artifacts, edited: LoadedModel) -> Iterator[ArtifactSubject]:
    """The exported graphs, then every variant; the sessions of one are opened when it is its turn.

    Args:
        artifacts: Graphs and engines.
        edited: The model whose weights must lie in them.
    """
    outputs = {tower: graph.outputs for tower, (graph, _) in artifacts.exported.items()}
    batch = artifacts.profile

    def subject(
        variant: str,
        precision: Precision,
        digests: Mapping[TowerName, Digest],
        sessions: Mapping[TowerName, Session] | None,
        reason: str,
        audit: partial[dict[str, GraphAudit]],
        lengths: RowLengths | None,
    ) -> ArtifactSubject:
        return ArtifactSubject(
            variant=variant,
            precision=precision,
            digests={tower.value: digest for tower, digest in digests.items()},
            sessions=sessions,
            reason=reason,
            outputs=outputs,
            normalised=artifacts.export.normalise,
            max_batch=batch.max,
            opt_batch=batch.opt,
            audit=audit,
            lengths=lengths,
        )

    exported = artifacts.exported
    yield subject(
        EXPORTED,
        Precision.FP32,
        {tower: graph.digest for tower, (graph, _) in exported.items()},
        {tower: open_graph(file, graph, max_batch=batch.max) for tower, (graph, file) in exported.items()},
        "",
        partial(_audit_graphs, artifacts, edited),
        exported[TowerName.TEXT][0].inputs[0].lengths,
    )
    for variant, engines in artifacts.engines.items():
        first = next(iter(engines.values()))[0]
        sessions, reason = _opened(engines)
        digests = {tower: engine.digest for tower, (engine, _) in engines.items()}
        audit = partial(_audit_engines, artifacts, engines)
        lengths = engines[TowerName.TEXT][0].inputs[0].lengths
        yield subject(variant, Precision(first.precision), digests, sessions, reason, audit, lengths)


def _opened(engines: Engines) -> tuple[Mapping[TowerName, Session] | None, str]:
    """Sessions of a variant, or why this machine cannot execute it."""
    first = next(iter(engines.values()))[0]
    if reason := reason_not_executable(first):
        return None, reason
    try:
        return {tower: _open_engine(engine, file) for tower, (engine, file) in engines.items()}, ""
    except PrerequisiteError as error:  # the driver is there, the engine does not fit it
        return None, error.what


def _open_engine(engine: EngineArtifact, file: Path) -> Session:
    return open_engine(engine, file.read_bytes(), external_data_of(file.parent, engine.external_data))


def _audit_graphs(artifacts: Artifacts, edited: LoadedModel) -> dict[str, GraphAudit]:
    """The exported graphs: their weights, and what they compute."""
    found = {}
    for name, (_, file) in artifacts.exported.items():
        tower, edits = edited.tower(name), artifacts.edit.of(name)
        audit = audit_of_graph(file, tower.graph_module(), edits, artifacts.patch)
        found[name.value] = exported_anew(audit, file, tower, edited.ref, artifacts.export, edits, artifacts.trace)
    return found


def _audit_engines(artifacts: Artifacts, engines: Engines) -> dict[str, GraphAudit]:
    """The engines of a variant: their edited weights, and what they compute; one of TensorRT cannot be read."""
    return {
        tower.value: _audit_engine(artifacts, engine, file)
        for tower, (engine, file) in engines.items()
        if engine.target is Target.ONNXRUNTIME and provider_of(engine) not in COMPILING
    }


def _audit_engine(artifacts: Artifacts, engine: EngineArtifact, file: Path) -> GraphAudit:
    source, edits = artifacts.compiled_from[engine.onnx_digest], artifacts.edit.of(engine.tower)
    audit = audit_of_engine(file, source, Precision(engine.precision), edits, artifacts.patch)
    if (lowered := artifacts.converted.get(engine.onnx_digest)) is not None:
        audit = converted_anew(audit, source, lowered, artifacts.exported[engine.tower][1])
    return compiled_anew(audit, file, engine, source)
