"""The bundle with the new edit, before anything of it was executed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from uwm_deploy import __version__
from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle, engine_paths, open_bundle
from uwm_deploy.bundle.write import Part, bundle_from_parts
from uwm_deploy.data.embedding import PreparedSet
from uwm_deploy.data.evaluation import base_in, place_from
from uwm_deploy.pipeline.judge import Judge
from uwm_deploy.pipeline.refit_graphs import (
    Swap,
    refit_converted,
    refit_engine,
    refit_graph,
)
from uwm_deploy.pipeline.refitting import Refitting
from uwm_deploy.pipeline.stored import SINGLE_ROWS
from uwm_deploy.records.codec import json_from_record
from uwm_deploy.records.downstream import KINDS
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.evidence import ArtifactEvidence, Evidence, VerifyReport
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.graph import EXPORTED, EngineArtifact, OnnxArtifact, Precision, TensorSpec
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.pixels import taken
from uwm_deploy.safeground.canaries import choose
from uwm_deploy.safeground.embedded import (
    EmbeddedSet,
)
from uwm_deploy.stages.verify.report import known_of, report_of

Parts = dict[str, Part]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced:
    """Graphs and engines of the new bundle, and their files by path."""

    onnx: tuple[OnnxArtifact, ...]
    engines: tuple[EngineArtifact, ...]
    converted: tuple[OnnxArtifact, ...]
    parts: Parts


def made_with(job: Refitting, swap: Swap, variants: list[str], prepared: PreparedSet) -> Replaced:
    """Graphs and engines with the new edit."""
    old_onnx, onnx = job.old / "onnx", job.folder / "onnx"
    onnx.mkdir()
    parts: Parts = {}
    graphs = {graph.tower: refit_graph(graph, old_onnx, onnx, swap) for graph in job.manifest.onnx}
    for graph in graphs.values():
        parts |= {BundleLayout.onnx(name): onnx / name for name in filter(None, (graph.file, graph.external_data))}
    before = {graph.digest: graph for graph in job.manifest.converted}
    now = {old.digest: graphs[old.tower] for old in job.manifest.onnx}
    samples = {
        TowerName.IMAGE: prepared.unsafe_pixels[:SINGLE_ROWS],
        TowerName.TEXT: prepared.unsafe_ids[:SINGLE_ROWS],
    }
    engines = []
    # What a graph's own file is comes first: then its new digest is known.
    ordered = sorted(job.manifest.engines, key=lambda engine: engine.digest != engine.onnx_digest)
    for old in [engine for engine in ordered if engine.variant in variants]:
        folder = job.folder / "engines" / old.variant
        folder.mkdir(parents=True, exist_ok=True)
        graph = graphs[old.tower]
        made, kinds = refit_engine(
            old,
            job.old / "engines" / old.variant,
            folder,
            swap,
            graphs=(old_onnx / graph.file, onnx / graph.file),
            sample=samples[old.tower],
        )
        if old.onnx_digest not in now:
            same_file = old.digest == old.onnx_digest
            now[old.onnx_digest] = refit_converted(
                before[old.onnx_digest], graph, made, kinds, swap, same_file=same_file
            )
        engines.append(dataclasses.replace(made, onnx_digest=now[old.onnx_digest].digest))
        parts |= {path: folder / Path(path).name for path in engine_paths(made)}
    order = {(engine.variant, engine.tower): place for place, engine in enumerate(job.manifest.engines)}
    return Replaced(
        onnx=tuple(graphs.values()),
        engines=tuple(sorted(engines, key=lambda engine: order[engine.variant, engine.tower])),
        converted=tuple(now[digest] for digest in before if digest in now),
        parts=parts,
    )


def unproven_bundle(
    job: Refitting,
    swap: Swap,
    made: Replaced,
    original: EmbeddedSet,
    reference: EmbeddedSet,
    prepared: PreparedSet,
    judge: Judge,
) -> Bundle:
    """The new bundle as it is before anything of it was executed, opened with all checks."""
    edit, proof = swap.new, job.report.edit_proof
    if proof is not None:
        # The weights that were put in have the digests that the patch promises; every other one is as it was proven.
        proof = dataclasses.replace(proof, layers=len(edit.tensors))
    known = dataclasses.replace(
        known_of(job.report), edit_proof=proof, edited_weights_digest=edit.edited_weights_digest
    )
    report = report_of(known, original, reference, tuple(_not_run(job.report, made)))
    content = json_from_record(report).encode()
    verdict = judge(report, digest_of_bytes(content))
    # What came out behind the old edit is no evidence of the new one: its limits are "not run" until it is measured again.
    outputs = tuple(BundleLayout.downstream(kind) for kind in KINDS)
    replaced = ("onnx/", "engines/", "evidence/canaries-", "evidence/raw-canaries-", *outputs)
    parts: Parts = {name: kept for name, kept in job.bundle.kept().items() if not name.startswith(replaced)}
    if (base := base_in(job.bundle)) is not None and parts.pop(BundleLayout.EVALUATION_PLACE):
        parts |= place_from(base, job.out)  # which may be another folder
    tensors = original.to_tensors("original") | reference.to_tensors("edited")
    parts |= made.parts | {
        BundleLayout.PATCH: swap.content,
        BundleLayout.EDIT: json_from_record(edit).encode(),
        BundleLayout.REPORT: content,
        BundleLayout.VERDICT: json_from_record(verdict).encode(),
        BundleLayout.REFERENCE: save(tensors),
    }
    given = {graph.tower: graph.inputs[0] for graph in job.manifest.onnx}
    parts |= _canaries(edit, original, reference, prepared, given)
    manifest = dataclasses.replace(
        job.manifest,
        tool_version=__version__,
        created=(now := datetime.now(UTC).isoformat(timespec="seconds")),
        measured=now,
        edit=edit,
        onnx=made.onnx,
        engines=made.engines,
        converted=made.converted,
        verdict=verdict,
        refitted_from=job.bundle.digest,
        bundle_version=job.manifest.bundle_version
        if job.request.bundle_version is None
        else job.request.bundle_version,
    )
    bundle_from_parts(job.folder / "bundle", manifest, parts)
    return open_bundle(job.folder / "bundle", allow_failed=True)


def _not_run(before: VerifyReport, made: Replaced) -> list[ArtifactEvidence]:
    """What is known of a refitted artifact before it was executed: what its files compute, apart from the new weights.

    Every other byte of a graph is as it was, and that the new weights are in it was checked when they were put there.
    """
    known = {artifact.variant: artifact.audit for artifact in before.artifacts}
    exported = [(EXPORTED, Precision.FP32, {graph.tower.value: graph.digest for graph in made.onnx})]
    built = [
        (variant, Precision(parts[0].precision), {part.tower.value: part.digest for part in parts})
        for variant in dict.fromkeys(engine.variant for engine in made.engines)
        if (parts := [engine for engine in made.engines if engine.variant == variant])
    ]
    return [
        ArtifactEvidence(
            variant=variant,
            precision=precision,
            evidence=Evidence.NOT_RUN,
            reason="refitted, and not executed since",
            where={},
            artifact_digests=digests,
            audit=dict(known.get(variant, {})),
        )
        for variant, precision, digests in [*exported, *built]
    ]


def _canaries(
    edit: EditRecord,
    original: EmbeddedSet,
    edited: EmbeddedSet,
    prepared: PreparedSet,
    given: Mapping[TowerName, TensorSpec],
) -> Parts:
    """Canaries of the new edit, chosen from the evaluation set: the calibration set is not at hand."""
    inputs = {
        TowerName.IMAGE: (prepared.safe_pixels, prepared.unsafe_pixels),
        TowerName.TEXT: (prepared.safe_ids, prepared.unsafe_ids),
    }
    parts: Parts = {}
    for tower in [name for name in TowerName if any(tensor.changed for tensor in edit.of(name))]:
        before, after = (
            np.concatenate([getattr(model, f"{side}_{tower.value}") for side in ("safe", "unsafe")])
            for model in (original, edited)
        )
        rows, n = choose(before, after), len(prepared.ids)
        if not len(rows):  # a map that was taken back: the models are the same
            continue
        chosen = np.concatenate([inputs[tower][row // n][row % n : row % n + 1] for row in rows])
        tensors = {"inputs": taken(chosen, given[tower]), "original": before[rows], "edited": after[rows]}
        parts[BundleLayout.canaries(tower)] = save(tensors)
    return parts
