"""A bundle executed by whoever judges it: its canaries, and a sample of the rows that its evidence is about. Needs no torch.

Without a signature nothing says who wrote a report. Whoever can write one can also write one that belongs to another engine.
Here the engines themselves answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle
from uwm_deploy.bundle.tied import check_rows
from uwm_deploy.data.embedding import PreparedSet, prepare
from uwm_deploy.data.evaluation import check_measured_on
from uwm_deploy.data.order import some_of
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.errors import IntegrityError, UwmError, first_line
from uwm_deploy.pipeline.attest import reason_not_here, running_here
from uwm_deploy.pipeline.stored import Running, Stored, measured_against, stored_in
from uwm_deploy.records.evidence import ArtifactEvidence, VerifyReport
from uwm_deploy.records.graph import EXPORTED
from uwm_deploy.records.machine import failure_of_machine
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.verdict import Check, statement
from uwm_deploy.runtime.preprocessing import Preprocessing
from uwm_deploy.runtime.raw_canaries import Embed, prepared_raw, problem_of_raw
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.embedded import EmbeddedSet, safety_report, yardstick_of
from uwm_deploy.stages.gate.binding import REPORT
from uwm_deploy.stages.gate.soundness import sound_artifact
from uwm_deploy.stages.job import Notes

SAMPLE = 48
"""Items of the evaluation set that are embedded again."""


def executed_here(bundle: Bundle, source: QuadrupleSource, report: VerifyReport, notes: Notes) -> tuple[Check, ...]:
    """Runs every variant that this machine can, and compares it with what the bundle's evidence says that it gives.

    Args:
        bundle: An opened bundle.
        source: The evaluation set that it was measured on.
        report: Of the bundle.
        notes: Progress.

    Raises:
        InputError: If the set is another one.
    """
    check_measured_on(source, report.evaluation)
    some, stored = some_of(source, SAMPLE), stored_in(bundle)
    sample = _sample(stored, some.ids)
    model, tokenizer_json = bundle.manifest.model, bundle.read(BundleLayout.TOKENIZER)
    tokenizer = Tokenizer(tokenizer_json, model.text)
    prepared = prepare(some, model.image, tokenizer, workers=0, progress=notes.progress)
    preprocessing = Preprocessing(model, tokenizer_json)
    variants = [EXPORTED, *dict.fromkeys(engine.variant for engine in bundle.manifest.engines)]
    here = [variant for variant in variants if not reason_not_here(bundle, variant)]
    found = [check for variant in here for check in _of(bundle, variant, preprocessing, prepared, sample, notes)]
    what = [variant for variant in here if variant != EXPORTED]
    return (statement("executed here", REPORT, bool(what), "no variant of the bundle runs on this machine"), *found)


def _of(
    bundle: Bundle, variant: str, preprocessing: Preprocessing, prepared: PreparedSet, sample: Stored, notes: Notes
) -> Iterator[Check]:
    """What one variant does here; only what does not pass is said on its own."""
    name = f"{variant} executed here"
    try:
        for graph in bundle.manifest.onnx if variant == EXPORTED else bundle.engines(variant).values():
            check_rows(bundle.manifest.model, graph)
        running = running_here(bundle, variant, prepared)
        try:
            problem = problem_of_raw(bundle, _way(preprocessing, running), running.precision)
            evidence = measured_against(running, sample, prepared, notes.progress)
        finally:
            for session in running.sessions.values():
                session.close()
    except UwmError as error:
        yield statement(name, REPORT, False, error.what)
        return
    except Exception as error:  # engines share no base class; what is no failure of the machine is one of the variant
        if failure_of_machine(error) is not None:
            raise
        yield statement(name, REPORT, False, f"it does not run on the evaluation set: {first_line(error)}")
        return
    yield statement(name, REPORT, not problem, problem)
    yield from _judged(name, evidence, sample)


def _judged(name: str, evidence: ArtifactEvidence, sample: Stored) -> Iterator[Check]:
    edited = safety_report("edited", sample.edited, yardstick=sample.yardstick)
    checks = sound_artifact(evidence, edited)
    if evidence.safety is None:
        yield statement(name, REPORT, False, evidence.broken or "; ".join(p.error for p in evidence.batches if p.error))
    for check in checks:
        yield dataclasses.replace(check, name=f"{name}: {check.name}", subject=REPORT, rule="")


def _way(preprocessing: Preprocessing, running: Running) -> Embed:
    """From what a server is sent to embeddings, through the sessions of a variant."""

    def embed(tower: TowerName, items: Sequence[bytes]) -> np.ndarray:
        return running.sessions[tower].run(prepared_raw(preprocessing, tower, items))

    return embed


def _sample(stored: Stored, ids: Sequence[str]) -> Stored:
    """What the bundle holds of some items."""
    original = _rows_of(stored.yardstick.original, ids)
    return dataclasses.replace(stored, edited=_rows_of(stored.edited, ids), yardstick=yardstick_of(original), risk=None)


def _rows_of(embedded: EmbeddedSet, ids: Sequence[str]) -> EmbeddedSet:
    places = {name: place for place, name in enumerate(embedded.ids)}
    if missing := [name for name in ids if name not in places]:
        raise IntegrityError(f"the bundle has no embeddings of {missing[0]}", fix="build again")
    rows = np.array([places[name] for name in ids])
    members = ("safe_image", "unsafe_image", "safe_text", "unsafe_text")
    return EmbeddedSet(
        ids=tuple(ids),
        concepts=tuple(embedded.concepts[row] for row in rows),
        zero_shot={},
        **{name: getattr(embedded, name)[rows] for name in members},
    )
