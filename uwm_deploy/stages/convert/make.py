"""What stage `convert` does in a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from uwm_deploy.bundle.layout import tower_record
from uwm_deploy.data.embedding import prepare
from uwm_deploy.data.order import some_of
from uwm_deploy.edits.canary_files import read_canaries
from uwm_deploy.edits.patch import Patch
from uwm_deploy.graphs.lowered import EIGHT_BITS
from uwm_deploy.graphs.modelopt import quantised_by_modelopt
from uwm_deploy.graphs.quantise import EightBitType
from uwm_deploy.records.codec import read_record, write_record
from uwm_deploy.records.edit import MAP_NAMES, EditRecord, TensorEdit
from uwm_deploy.records.graph import OnnxArtifact, Precision, PrecisionPlan, TensorSpec
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.lengths import parts_of
from uwm_deploy.runtime.pixels import taken
from uwm_deploy.stages.convert.calibrate import chosen_for, one_row_layers
from uwm_deploy.stages.convert.convert import Ranges, converted, ranges_of
from uwm_deploy.stages.convert.search import Source, search
from uwm_deploy.stages.job import Job
from uwm_deploy.stages.models import Models
from uwm_deploy.towers.protocol import MAPS
from uwm_deploy.towers.safety_head import FLOAT32

RANGE_PAIRS = 128
"""Pairs of the calibration set that the ranges of 8-bit activations are taken from."""

FEWEST_QUADRUPLES = 256
"""Where the calibration set has fewer, INT8 is not measured on it, and no layer gets a second term: a few flips more or less
say nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Graph:
    """One exported graph, and what its conversion is made from.

    Attributes:
        record: Of the float32 graph.
        file: The float32 graph.
        float32: Patterns of what stays in float32 in every precision: its safety head, a map behind its embedding; and
            layers of one row, where INT8 is calibrated.
        ranges: Of its activations, for 8 bits.
        quantised: The graph and the name of the quantiser, where another one than our own is asked for.
    """

    record: OnnxArtifact
    file: Path
    float32: tuple[str, ...]
    ranges: Ranges | None
    quantised: tuple[ir.Model, str] | None


def make(job: Job, out: Path) -> None:
    """Converts both exported graphs to the precision of the variant."""
    precision, spec = job.variant.precision, job.plan.recipe.compile
    assert precision is not None
    lowered = spec.auto.lowest if precision is Precision.AUTO else precision
    edit, patch = read_record(EditRecord, job.folder.edit_record), Patch.from_file(job.folder.patch)
    graphs = [_graph(job, tower, lowered, out, edit.of(tower)) for tower in TowerName]
    plan = _plan(job, graphs, out)
    for graph in graphs:
        tower = graph.record.tower
        artifact = converted(
            graph.record,
            job.folder.export,
            out,
            precision=precision,
            lowered=lowered,
            patterns=(*spec.float32, *graph.float32),
            layers=plan.kept[tower.value] if plan else (),
            ranges=_with_terms(graph, plan),
            edits=edit.of(tower),
            patch=patch,
            canaries=read_canaries(job.folder.canaries, tower),
            quantised=graph.quantised,
        )
        write_record(tower_record(out, tower), artifact)


def _graph(job: Job, tower: TowerName, lowered: Precision, out: Path, edits: Sequence[TensorEdit]) -> _Graph:
    record = read_record(OnnxArtifact, tower_record(job.folder.export, tower))
    file, kept = job.folder.export / record.file, _float32_parts(job, record)
    ranges, quantised = None, None
    if lowered in EIGHT_BITS:
        job.notes.progress(f"ranges of the {tower.value} tower", 0, 1)
        batches = list(job.shared(Models).some_pairs(tower, RANGE_PAIRS))
        given = record.inputs[0]
        whole = {"safe": [taken(b.safe, given) for b in batches], "unsafe": [taken(b.unsafe, given) for b in batches]}
        rows = {side: [row for part in parts for row in _cut(part, given)] for side, parts in whole.items()}
        ranges, quantiser = ranges_of(file, rows, out), job.plan.recipe.compile.quantiser
        every = [*rows["safe"], *rows["unsafe"]]
        if quantiser == "built-in" and lowered is Precision.INT8:
            kept = (*kept, *one_row_layers(file))
            patterns = (*job.plan.recipe.compile.float32, *kept)
            chosen = chosen_for(file, patterns, _vectors(edits), every, out)
            ranges = dataclasses.replace(ranges, chosen=chosen)
        elif quantiser not in ("built-in", "nearest"):
            patterns = (*job.plan.recipe.compile.float32, *kept)
            parts = [*whole["safe"], *whole["unsafe"]]  # of one length: it takes one array
            quantised = _by_modelopt(job, file, EIGHT_BITS[lowered], patterns, parts, out)
    return _Graph(record=record, file=file, float32=kept, ranges=ranges, quantised=quantised)


def _cut(rows: np.ndarray, given: TensorSpec) -> list[np.ndarray]:
    """Rows as a session runs them: ranges are taken of what is computed."""
    return [part for _, part in parts_of(rows, given, len(rows))]


def _vectors(edits: Sequence[TensorEdit]) -> set[str]:
    """Edited tensors that are no matrices: a graph in lower precision must hold them as they are."""
    return {edit.name for edit in edits if len(edit.shape) < 2}


def _float32_parts(job: Job, graph: OnnxArtifact) -> tuple[str, ...]:
    has_map = (job.folder.edited_model / MAPS).is_file()  # also one that the source model came with
    return (*((FLOAT32,) if graph.head_digest else ()), *((MAP_NAMES[graph.tower],) if has_map else ()))


def _by_modelopt(
    job: Job, source: Path, kind: EightBitType, patterns: Sequence[str], rows: Sequence[np.ndarray], out: Path
) -> tuple[ir.Model, str]:
    """A graph that nvidia-modelopt quantised, calibrated on the same inputs, and what to call it in the record."""
    method: Literal["entropy", "max"] = "max" if job.plan.recipe.compile.quantiser == "modelopt-max" else "entropy"
    job.notes.progress(f"modelopt, {source.stem} tower", 0, 1)
    model, version = quantised_by_modelopt(source, kind, method, patterns, rows, out)
    return model, f"nvidia-modelopt {version}, {method}"


def _plan(job: Job, graphs: Sequence[_Graph], out: Path) -> PrecisionPlan | None:
    """The plan of precision `auto`, and of INT8 where it is calibrated and the set is large enough to measure on."""
    spec, source = job.plan.recipe.compile, job.plan.calibration_source
    if job.variant.precision is Precision.AUTO:
        return _searched(job, graphs, out, to_float32=True)
    chosen = all(graph.ranges is not None and graph.ranges.chosen.codes for graph in graphs)
    enough = source.has_images and source.has_texts and min(len(source), spec.auto.items) >= FEWEST_QUADRUPLES
    if not (chosen and enough):
        return None
    plan = _searched(job, graphs, out, to_float32=False)
    layers = sum(len(plan.two_terms(tower)) for tower in TowerName)
    job.notes.line(
        f"convert    int8: {layers} of {len(plan.layers)} layers multiply two 8-bit terms, {100 * plan.twice:.0f}% of the "
        f"multiplications; expected flips {plan.expected:.2f}%, allowed {plan.limit:g}%"
    )
    return plan


def _with_terms(graph: _Graph, plan: PrecisionPlan | None) -> Ranges | None:
    """Its ranges, with the layers to which a plan gives two terms."""
    if graph.ranges is None or plan is None:
        return graph.ranges
    return graph.ranges.with_two_terms(plan.two_terms(graph.record.tower))


def _searched(job: Job, graphs: Sequence[_Graph], out: Path, *, to_float32: bool) -> PrecisionPlan:
    """A plan, searched on the calibration set, and its record."""
    spec, models = job.plan.recipe.compile, job.shared(Models)
    auto = spec.auto if to_float32 else dataclasses.replace(spec.auto, lowest=Precision.INT8)
    sources: Mapping[TowerName, Source] = {
        graph.record.tower: Source(graph.record, graph.file, graph.ranges, float32=graph.float32) for graph in graphs
    }
    prepared = prepare(
        some_of(job.plan.calibration_source, auto.items),
        models.original.ref.image,
        models.tokenizer,
        workers=job.plan.workers,
        progress=job.notes.progress,
    )
    plan = search(sources, prepared, auto, spec.float32, out, job.notes.progress, to_float32=to_float32)
    write_record(out / job.folder.precision_plan.name, plan)
    return plan
