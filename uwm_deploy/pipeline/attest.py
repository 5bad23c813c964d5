"""Attesting: executes what a bundle has no evidence for yet, on a machine that can. Needs no torch.

The reference is the edited model's embeddings that the build stored in the bundle, so nothing but the bundle and the
evaluation set is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle, engine_path, open_bundle
from uwm_deploy.bundle.sign import Resigning, seal_for
from uwm_deploy.bundle.write import Part, rewriting
from uwm_deploy.data.embedding import Inputs, PreparedSet, prepare
from uwm_deploy.data.evaluation import check_measured_on
from uwm_deploy.data.reading import Progress
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.errors import PrerequisiteError
from uwm_deploy.pipeline.judge import judge_of_bundle, report_of_bundle
from uwm_deploy.pipeline.shipping import bundle_with_card, evaluation_source_of, note_signature
from uwm_deploy.pipeline.stored import SINGLE_ROWS, Running, Stored, known_of_files, measured_against, stored_in
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.evidence import ArtifactEvidence, Evidence, OutputParity, VerifyReport
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.graph import EXPORTED, OnnxArtifact, Precision, Profile
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.records.verdict import Verdict
from uwm_deploy.runtime.session import Session, open_engine, open_graph, reason_not_executable
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.embedded import parity
from uwm_deploy.stages.job import Notes
from uwm_deploy.stages.verify.captions import WholeRows

Judge = Callable[[VerifyReport, Digest], Verdict]
Write = Callable[[Manifest, Mapping[str, Part]], object]
"""What writes the bundle with the new evidence, whole or not at all."""

_WORDS = 200
"""Captions whose words are enough to make others of."""


def attest(
    bundle: Bundle,
    source: QuadrupleSource,
    judge: Judge,
    write: Write,
    *,
    workers: int,
    progress: Progress,
    prepared: PreparedSet | None = None,
) -> Verdict:
    """Adds evidence for every unproven variant that this machine can execute, and judges again.

    Args:
        bundle: An opened bundle.
        source: The evaluation set that the bundle was measured on.
        judge: The gate, with its policy.
        write: What writes the bundle with the evidence, whole or not at all.
        workers: Decoding processes.
        progress: Called as it goes on.
        prepared: The set, if it is preprocessed already.

    Raises:
        InputError: If the set is not the one the bundle was measured on.
        PrerequisiteError: If nothing unproven can be executed here.
    """
    manifest = bundle.manifest
    report = record_from_json(VerifyReport, bundle.read(BundleLayout.REPORT), where=BundleLayout.REPORT)
    check_measured_on(source, report.evaluation)
    waiting = [a.variant for a in report.artifacts if a.evidence is Evidence.NOT_RUN]
    reasons = {v: reason_not_here(bundle, v) for v in waiting}
    here = [variant for variant in waiting if not reasons[variant]]
    if not here:
        why = "; ".join(f"{v}: {r}" for v, r in reasons.items()) or "every variant has evidence"
        raise PrerequisiteError(
            f"nothing to attest here ({why})", fix="run it on a machine that can execute the variant"
        )
    tokenizer = Tokenizer(bundle.read(BundleLayout.TOKENIZER), manifest.model.text)
    if prepared is None:
        prepared = prepare(source, manifest.model.image, tokenizer, workers=workers, progress=progress)
    stored = stored_in(bundle)
    fresh = {variant: _evidence(bundle, variant, prepared, stored, progress) for variant in here}
    updated = dataclasses.replace(report, artifacts=tuple(fresh.get(a.variant, a) for a in report.artifacts))
    content = json_from_record(updated).encode()
    verdict = judge(updated, digest_of_bytes(content))
    _rewrite(bundle, content, verdict, write)
    return verdict


def open_variant(bundle: Bundle, variant: str) -> dict[TowerName, Session]:
    """Sessions of a variant, from bytes that were checked as they were read."""
    return {
        tower: open_engine(engine, bundle.read(engine_path(engine)), bundle.external_data(engine))
        for tower, engine in bundle.engines(variant).items()
    }


def _evidence(
    bundle: Bundle, variant: str, prepared: PreparedSet, stored: Stored, progress: Progress
) -> ArtifactEvidence:
    """Executes one variant here."""
    running = running_here(bundle, variant, prepared)
    evidence = measured_against(running, stored, prepared, progress)
    for session in running.sessions.values():
        session.close()
    return evidence


def running_here(bundle: Bundle, variant: str, prepared: PreparedSet) -> Running:
    """A variant of a bundle, or its exported graphs, at work on this machine; whoever asks closes the sessions.

    Args:
        bundle: The bundle.
        variant: Which.
        prepared: Inputs, of which some go through the outputs behind the embedding.
    """
    return _exported(bundle, prepared) if variant == EXPORTED else _engines(bundle, variant, prepared)


def reason_not_here(bundle: Bundle, variant: str) -> str:
    """Empty when this machine can execute a variant of a bundle, as far as can be told without opening it."""
    return "" if variant == EXPORTED else reason_not_executable(next(iter(bundle.engines(variant).values())))


def _exported(bundle: Bundle, prepared: PreparedSet) -> Running:
    profiles = [engine.profile for engine in bundle.manifest.engines]
    profile = Profile(min=1, opt=max(p.opt for p in profiles), max=max(p.max for p in profiles))
    graphs = {graph.tower: graph for graph in bundle.manifest.onnx}
    sessions = {tower: _open_exported(bundle, tower, profile.max) for tower in TowerName}
    return Running(
        variant=EXPORTED,
        precision=Precision.FP32,
        profile=profile,
        sessions=sessions,
        outputs={tower: graph.outputs[0].name for tower, graph in graphs.items()},
        digests={tower: graph.digest for tower, graph in graphs.items()},
        where=dict(sessions[TowerName.IMAGE].where),
        normalised=graphs[TowerName.IMAGE].normalised,
        audit=known_of_files(bundle, EXPORTED),
        whole=whole_rows(bundle, EXPORTED, prepared.unsafe_ids),
    )


def _engines(bundle: Bundle, variant: str, prepared: PreparedSet) -> Running:
    engines, sessions = bundle.engines(variant), open_variant(bundle, variant)
    built = engines[TowerName.IMAGE]
    inputs: dict[TowerName, Inputs] = {TowerName.IMAGE: prepared.safe_pixels, TowerName.TEXT: prepared.safe_ids}

    def further() -> list[OutputParity]:
        rows = {tower: inputs[tower][: 2 * SINGLE_ROWS] for tower in TowerName}
        return [part for tower in TowerName for part in _further_parity(bundle, tower, sessions[tower], rows[tower])]

    return Running(
        variant=variant,
        precision=Precision(built.precision),
        profile=built.profile,
        sessions=sessions,
        outputs={tower: engine.outputs[0].name for tower, engine in engines.items()},
        digests={tower: engine.digest for tower, engine in engines.items()},
        where=dict(sessions[TowerName.IMAGE].where),
        normalised=built.normalised,
        audit=known_of_files(bundle, variant),
        further=further,
        whole=whole_rows(bundle, variant, prepared.unsafe_ids),
    )


def _further_parity(bundle: Bundle, tower: TowerName, session: Session, rows: np.ndarray) -> list[OutputParity]:
    """Outputs after the embedding, of which no reference is stored, against the exported graph on the CPU."""
    graph = next(graph for graph in bundle.manifest.onnx if graph.tower is tower)
    if len(graph.outputs) == 1:
        return []
    exported = _open_exported(bundle, tower, len(rows))
    wanted, found = exported.run_all(rows), session.run_all(rows)
    exported.close()
    return [
        parity(
            tower,
            spec.name,
            len(rows),
            wanted[spec.name].reshape(len(rows), -1),
            found[spec.name].reshape(len(rows), -1),
        )
        for spec in graph.outputs[1:]
    ]


def whole_rows(bundle: Bundle, variant: str, texts: np.ndarray) -> WholeRows | None:
    """The exported text graph on whole rows, on the CPU; None where a variant, or that graph itself, takes no others.

    Args:
        bundle: The bundle.
        variant: Which.
        texts: Captions whose words are taken: (n, L) int64 ids, or (n,) object, in UTF-8.
    """
    graph = next(graph for graph in bundle.manifest.onnx if graph.tower is TowerName.TEXT)
    given = graph.inputs[0] if variant == EXPORTED else bundle.engines(variant)[TowerName.TEXT].inputs[0]
    if given.lengths is None:
        return None

    def encode(rows: np.ndarray) -> np.ndarray:
        uncut = dataclasses.replace(graph, inputs=(dataclasses.replace(graph.inputs[0], lengths=None),))
        session = _opened_graph(bundle, uncut, len(rows))
        try:
            return session.run(rows)
        finally:
            session.close()

    if texts.dtype == object:
        tokenizer = Tokenizer(bundle.read(BundleLayout.TOKENIZER), bundle.manifest.model.text)
        texts = tokenizer.encode([bytes(text).decode() for text in texts[:_WORDS]])
    return WholeRows(lengths=given.lengths, ids=texts, encode=encode)


def _open_exported(bundle: Bundle, tower: TowerName, max_batch: int) -> Session:
    """An exported graph on the CPU."""
    return _opened_graph(bundle, next(graph for graph in bundle.manifest.onnx if graph.tower is tower), max_batch)


def _opened_graph(bundle: Bundle, graph: OnnxArtifact, max_batch: int) -> Session:
    external = {graph.external_data: bundle.read(BundleLayout.onnx(graph.external_data))} if graph.external_data else {}
    return open_graph(bundle.read(BundleLayout.onnx(graph.file)), graph, max_batch=max_batch, external_data=external)


def _rewrite(bundle: Bundle, report: bytes, verdict: Verdict, write: Write) -> None:
    """The bundle with new evidence and verdict, in place of the old one, whole or not at all."""
    changed = {BundleLayout.REPORT: report, BundleLayout.VERDICT: json_from_record(verdict).encode()}
    write(dataclasses.replace(bundle.manifest, verdict=verdict), {**bundle.kept(), **changed})


def attest_bundle(
    path: Path,
    policy_name: str,
    evaluation: str | None,
    workers: int,
    reporter: Notes,
    signing: Resigning | None = None,
) -> Verdict:
    """Executes what is unproven and can be executed here; rewrites the bundle with the evidence.

    Args:
        path: Bundle.
        policy_name: Name or file.
        evaluation: Set; the one the bundle was measured on without it.
        workers: Decoding processes.
        reporter: Progress.
        signing: What is to become of the bundle's signature.

    Raises:
        InputError: If the bundle is signed and would lose that unasked; see `attest` for others.
        IntegrityError: If the bundle was changed, or is not signed by the right key.
    """
    with rewriting(path) as place:
        seal = seal_for(signing or Resigning(), path)
        bundle = open_bundle(place.path, allow_failed=True, public_key=seal.public_key)
        judge = judge_of_bundle(bundle, policy_name)
        if place.finished and not _waiting(bundle):
            reporter.line(f"{path} has the evidence already: an earlier run was killed after it had written it")
            return bundle.manifest.verdict
        with reporter.stage("attest", str(path)):
            verdict = attest(
                bundle,
                evaluation_source_of(bundle, evaluation),
                judge,
                partial(bundle_with_card, place, sign=seal.sign),
                workers=workers,
                progress=reporter.progress,
            )
        note_signature(path, seal, reporter)
    return verdict


def _waiting(bundle: Bundle) -> list[str]:
    """Variants without evidence that this machine could execute."""
    report, _ = report_of_bundle(bundle)
    waiting = [a.variant for a in report.artifacts if a.evidence is Evidence.NOT_RUN]
    return [v for v in waiting if v == EXPORTED or not reason_not_executable(next(iter(bundle.engines(v).values())))]
