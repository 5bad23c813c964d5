"""Makes graphs and engines anew from the edited model, and compares what ships with them, operator by operator."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir

from uwm_deploy.errors import UwmError, first_line
from uwm_deploy.graphs.attention import fuse_attention, is_fused
from uwm_deploy.graphs.builder_log import BuildFailed
from uwm_deploy.graphs.lowered import EIGHT_BITS, largest_in, lowered_graph
from uwm_deploy.graphs.onnx_builder import optimised
from uwm_deploy.graphs.quantise import NEAREST
from uwm_deploy.graphs.smoothing import chosen_in
from uwm_deploy.graphs.structure import Departures, computation_of, departures
from uwm_deploy.recipes.compile_spec import ExportSpec
from uwm_deploy.records.edit import TensorEdit
from uwm_deploy.records.evidence import CONVERTED, GraphAudit
from uwm_deploy.records.graph import BUILT_IN, CALIBRATED, FUSED, STEPS, EngineArtifact, OnnxArtifact, Precision
from uwm_deploy.records.model import ModelRef, TowerName
from uwm_deploy.runtime.providers import FLOAT32
from uwm_deploy.runtime.session import optimisation_of, provider_of
from uwm_deploy.stages.job import Notes, Plan
from uwm_deploy.stages.text_rows import text_rows
from uwm_deploy.stages.traced import normalisation_of, sample_for, traced
from uwm_deploy.towers.protocol import Tower

_NAMED = 10
"""Differences that are listed."""


Trace = Callable[[Tower, ModelRef, ExportSpec], ir.Model]
"""From a tower to its graph."""


def exported_anew(
    audit: GraphAudit,
    path: Path,
    tower: Tower,
    ref: ModelRef,
    spec: ExportSpec,
    edits: Sequence[TensorEdit],
    trace: Trace,
) -> GraphAudit:
    """An exported graph compared with another export of the same tower.

    Args:
        audit: What is known of the graph.
        path: The graph.
        tower: The edited tower; it is moved to the CPU for as long as it takes.
        ref: Its model.
        spec: How it was exported.
        edits: Edited layers of the tower.
        trace: Exports it again.
    """
    module = tower.graph_module()
    try:
        wanted = trace(tower, ref, spec)
    except Exception as error:  # exporters share no base class; a tower that cannot be exported explains no graph
        line = first_line(error)
        return _with(audit, Departures(operators=(f"the tower cannot be exported anew: {line}",)), 0, "export")
    names = {name for name, _ in module.named_parameters()}
    found, right = computation_of(ir.load(path), names), computation_of(wanted, names)
    apart = departures(found, right, [edit.name for edit in edits])
    # Its weights are compared by name; what else it holds are constants of its operators.
    return _with(audit, Departures(operators=apart.operators or apart.weights), len(found.nodes), "export")


def traced_on_the_cpu(tower: Tower, ref: ModelRef, spec: ExportSpec) -> ir.Model:
    """The graph of a tower, exported on the CPU wherever the tower is."""
    module = tower.graph_module()
    device = next(module.parameters()).device
    module.to("cpu")
    try:
        by, rows = normalisation_of(tower.name, ref.image, spec), text_rows(tower, ref, spec)
        return traced(tower, sample_for(tower, ref, spec), spec, by, rows.lengths)
    finally:
        module.to(device)


def kept_traces() -> Trace:
    """A way to export towers again that keeps its graphs, for who verifies many builds of the same weights."""
    graphs: dict[tuple[TowerName, ModelRef, ExportSpec], ir.Model] = {}

    def trace(tower: Tower, ref: ModelRef, spec: ExportSpec) -> ir.Model:
        key = (tower.name, ref, spec)
        if key not in graphs:
            graphs[key] = traced_on_the_cpu(tower, ref, spec)
        return graphs[key]

    return trace


def tracer(plan: Plan, notes: Notes) -> Trace:  # noqa: ARG001 -- the signature of what a run shares
    """How a run exports towers again; a build does it once, so it keeps nothing."""
    return traced_on_the_cpu


def converted_anew(audit: GraphAudit, path: Path, record: OnnxArtifact, exported: Path) -> GraphAudit:
    """A graph in lower precision compared with another conversion of the exported graph.

    What another quantiser made is not compared: it has a mind of its own.

    Args:
        audit: What is known of it.
        path: The graph.
        record: How it was made.
        exported: The graph that it was made from.
    """
    made = record.conversion
    if made is None or (made.lowered in EIGHT_BITS and made.quantiser not in (BUILT_IN, CALIBRATED)):
        return audit
    model = ir.load(path)
    largest = largest_in(model, exported, made.lowered) if made.lowered in EIGHT_BITS else {}
    try:
        chosen = chosen_in(model, ir.load(exported)) if made.lowered is Precision.INT8 else NEAREST
        chosen = dataclasses.replace(chosen, two_terms=frozenset(made.two_terms))
        wanted, _ = lowered_graph(exported, made.lowered, made.kept, largest, chosen)
    except UwmError as error:
        text = f"{CONVERTED}it cannot be made anew: {error.what}"
        return _with(audit, Departures(operators=(text,)), 0, "convert")
    found = computation_of(model)
    apart = departures(found, computation_of(wanted))
    words = tuple(f"{CONVERTED}{text}" for text in (*apart.weights, *apart.operators))
    return _with(audit, Departures(operators=words), len(found.nodes), "convert")


def compiled_anew(audit: GraphAudit, path: Path, engine: EngineArtifact, source: Path) -> GraphAudit:
    """A graph that ONNX Runtime optimised compared with another optimisation of the same graph.

    The graph itself, as it was, is right too: it computes the same.

    Args:
        audit: What is known of it.
        path: The optimised graph.
        engine: Its record.
        source: The graph that it was compiled from.
    """
    model = ir.load(path)
    if engine.digest == engine.onnx_digest:
        return _with(audit, Departures(), len(list(model.graph)), "compile")
    plain = ir.load(source)
    if is_fused(engine):
        fuse_attention(plain)
    apart, count = _apart(model, plain)
    if apart and optimisation_of(engine) == "done":
        with tempfile.TemporaryDirectory() as folder:
            try:
                again = ir.load(_optimised(engine, source, Path(folder)))
            except (UwmError, BuildFailed) as error:
                text = f"the graph cannot be compiled anew: {str(error)[:200]}"
                return _with(audit, Departures(operators=(text,)), 0, "compile")
            other, count = _apart(model, again)
        apart = min(apart, other, key=len)
    return _with(audit, apart, count, "compile")


def _apart(found: ir.Model, wanted: ir.Model) -> tuple[Departures, int]:
    right = computation_of(wanted)
    left = computation_of(found, like=right.constants)
    return departures(left, right), len(left.nodes)


def _optimised(engine: EngineArtifact, source: Path, folder: Path) -> Path:
    """What stage `compile` makes of a graph, in a folder."""
    provider, path = provider_of(engine), folder / engine.file
    optimised(
        {
            "onnx": str(source.resolve()),
            "engine": str(path),
            "external_data": engine.external_data,
            "provider": provider,
            "options": dict(FLOAT32) if provider == "cuda" else {},
            "fit_for_cpu": provider in ("any", "cpu") and Precision(engine.precision) is Precision.INT8,
            "weights_only": Precision(engine.precision) is Precision.W8A16,
            "attention": FUSED if is_fused(engine) else STEPS,
        }
    )
    return path


def _with(audit: GraphAudit, apart: Departures, operators: int, what: str) -> GraphAudit:
    """An audit with what another making of the graph showed."""
    return dataclasses.replace(
        audit,
        differ=(*audit.differ, *apart.weights)[:_NAMED],
        structure=(*audit.structure, *apart.operators)[:_NAMED],
        operators=audit.operators + operators,
        anew=(*audit.anew, what),
    )
