"""Replaces the edit of a bundle by another one, by none, or by another keep_mass, without building it anew.

Every refit ends in a new verdict: nothing of the old one is kept. What this machine cannot execute stays unproven.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.bundle.replace import refuse_foreign_folder
from uwm_deploy.bundle.sign import seal_for
from uwm_deploy.bundle.write import refuse_no_bundle
from uwm_deploy.data.embedding import PreparedSet, prepare
from uwm_deploy.data.evaluation import check_measured_on
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.edits.patch import Patch
from uwm_deploy.errors import InputError, IntegrityError, PrerequisiteError
from uwm_deploy.pipeline.attest import attest
from uwm_deploy.pipeline.judge import judge_of_bundle, report_of_bundle
from uwm_deploy.pipeline.refit_bundle import made_with, unproven_bundle
from uwm_deploy.pipeline.refit_edit import SameEditError, swap_of
from uwm_deploy.pipeline.refit_graphs import (
    reason_against,
)
from uwm_deploy.pipeline.refitting import RefitRequest, Refitting
from uwm_deploy.pipeline.shipping import (
    bundle_with_card,
    evaluation_source_of,
    note_signature,
)
from uwm_deploy.pipeline.stored import reference_of
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.graph import CALIBRATED
from uwm_deploy.records.model import LOCAL
from uwm_deploy.records.replacing import replacing
from uwm_deploy.records.verdict import Verdict
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.stages.edit.edit import PATCH
from uwm_deploy.stages.job import Notes
from uwm_deploy.stages.verify.verify import EMBED_BATCH, embed_model
from uwm_deploy.towers.load import load_model
from uwm_deploy.towers.protocol import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Refitted:
    """What came out.

    Attributes:
        out: The new bundle.
        edit: Its edit.
        layers: Layers whose weights are others now.
        left_out: Variants of the old bundle that the new one does not have, with the reason.
        verdict: The new one.
    """

    out: Path
    edit: EditRecord
    layers: int
    left_out: Mapping[str, str]
    verdict: Verdict


def refit(request: RefitRequest, reporter: Notes) -> Refitted:
    """Writes a bundle with another edit, whole or not at all, measured and judged anew.

    Args:
        request: What the user asked for.
        reporter: Progress.

    Raises:
        InputError: If the request is contradictory, the edit is there already or moves the scales of an 8-bit weight, the
            bundle has a safety head, or a signature would be lost unasked.
        IntegrityError: If the patch, the scores, the source weights or the set are not those the bundle was made from, or
            the bundle is not signed by the right key.
        PrerequisiteError: If nothing, or not what was asked for, can be refitted here.
        ContractError: If the new edit is not in what comes out, or the old one still is.
    """
    asked = (request.patch, request.revert or None, request.keep_mass, request.max_retrieval_loss, request.axis)
    if sum(part is not None for part in asked) != 1:
        raise InputError(
            "nothing or several things are asked for",
            fix="give one of --patch, --revert, --keep-mass, --max-retrieval-loss and --axis",
        )
    out = request.out or request.bundle
    refuse_foreign_folder(out)
    refuse_no_bundle(request.bundle)
    with replacing(out) as place:
        seal = seal_for(request.signing, request.bundle, out)
        bundle = open_bundle(request.bundle, allow_failed=True, public_key=seal.public_key)
        if bundle.manifest.head is not None:
            raise InputError(
                f"{request.bundle} has a safety head, which was trained on its edit and is of no use with another",
                fix="train a head on the new edit and build again",
            )
        content = bundle.read(PATCH)
        if digest_of_bytes(content) != bundle.manifest.edit.patch_digest:
            raise IntegrityError("patch.safetensors is not the bundle's edit", fix="restore the bundle")
        (folder := place.folder / "refit").mkdir()
        job = Refitting(
            request=request,
            reporter=reporter,
            bundle=bundle,
            out=out,
            place=place,
            seal=seal,
            folder=folder,
            patch=Patch.from_bytes(content, PATCH),
            report=report_of_bundle(bundle)[0],
        )
        try:
            made = _run(job)
        except SameEditError:
            if not place.finished:
                raise
            reporter.line(f"{out} has this edit: an earlier run was killed after it had written it")
            return Refitted(out=out, edit=job.edit, layers=0, left_out={}, verdict=bundle.manifest.verdict)
        note_signature(out, seal, reporter)
    return made


def _run(job: Refitting) -> Refitted:
    """Edits, refits, measures, judges, writes."""
    judge = judge_of_bundle(job.bundle, job.request.policy)
    variants, left_out = _variants(job)
    job.take_out(variants)
    source, model = _evaluation(job), _model(job)
    with job.reporter.stage("edit", _what(job)):
        swap = swap_of(job, model)
    original = reference_of(job.bundle, "original")
    with job.reporter.stage("reference", f"{source.record.name}, {len(source)} quadruples"):
        prepared = _prepared(job, source)
        reference = original
        if swap.new.edited_weights_digest != job.manifest.model.weights_digest:
            assert model is not None
            reference = embed_model(model, prepared, "evaluation, edited", job.reporter.progress)
        reference = dataclasses.replace(reference, zero_shot_missing=prepared.zero_shot_missing)
        del model
    with job.reporter.stage("refit", ", ".join(variants)):
        refitted = made_with(job, swap, variants, prepared)
    unproven = unproven_bundle(job, swap, refitted, original, reference, prepared, judge)
    with job.reporter.stage("attest", ", ".join(variants)):
        verdict = attest(
            unproven,
            source,
            judge,
            partial(bundle_with_card, job.place, sign=job.seal.sign),
            workers=job.request.workers,
            progress=job.reporter.progress,
            prepared=prepared,
        )
    changed = sum(not np.array_equal(c.before, c.after) for c in swap.changes.values())
    return Refitted(out=job.out, edit=swap.new, layers=changed, left_out=left_out, verdict=verdict)


def _prepared(job: Refitting, source: QuadrupleSource) -> PreparedSet:
    tokenizer = Tokenizer(job.bundle.read(BundleLayout.TOKENIZER), job.manifest.model.text)
    return prepare(
        source,
        job.manifest.model.image,
        tokenizer,
        workers=job.request.workers,
        progress=job.reporter.progress,
        batch=EMBED_BATCH,
    )


def _what(job: Refitting) -> str:
    if job.request.revert:
        return "back to the source model"
    if job.restrengthened:
        return "another strength of the closed-form step"
    return f"keep_mass {job.request.keep_mass:g}" if job.request.keep_mass is not None else "another patch"


_CHOSEN = 'its weights are rounded as the calibration set showed; build with quantiser = "nearest", or again'


def _variants(job: Refitting) -> tuple[list[str], dict[str, str]]:
    """Variants that are refitted, and why others are not."""
    asked = job.request.variants
    for variant in asked:
        job.bundle.engines(variant)
    made = {graph.digest: graph.conversion for graph in job.manifest.converted}
    reasons: dict[str, str] = {}
    for engine in job.manifest.engines:
        conversion = made.get(engine.onnx_digest)
        calibrated = conversion is not None and conversion.quantiser == CALIBRATED
        reasons[engine.variant] = reasons.get(engine.variant) or (_CHOSEN if calibrated else reason_against(engine))
    if asked:
        reasons = {v: reason if v in asked else "it was not asked for" for v, reason in reasons.items()}
    for variant in asked:
        if reasons[variant]:
            raise PrerequisiteError(
                f"{variant} cannot be refitted here: {reasons[variant]}", fix="leave it out, or build again"
            )
    chosen = [variant for variant, reason in reasons.items() if not reason]
    if not chosen:
        why = "; ".join(f"{variant}: {reason}" for variant, reason in reasons.items())
        raise PrerequisiteError(f"nothing can be refitted here ({why})", fix="build again")
    return chosen, {variant: reason for variant, reason in reasons.items() if reason}


def _evaluation(job: Refitting) -> QuadrupleSource:
    """The set the bundle was measured on: what is known of the original model holds for it alone."""
    source = evaluation_source_of(job.bundle, job.request.evaluation)
    check_measured_on(source, job.report.evaluation)
    return source


def _model(job: Refitting) -> LoadedModel | None:
    """The source model; a revert of negations needs none.

    Raises:
        IntegrityError: If the weights are another model's.
    """
    if job.request.revert and job.patch.exact:
        return None
    recipe = job.recipe
    source = recipe.model
    try:
        named = job.request.checkpoint
        folder = named or resources.checkpoint_folder(source.repo, source.revision, family=source.family)
        companion = None  # of one that was a folder, whose path is in no record, the loader says that it is missing
        if source.companion not in ("", LOCAL):
            companion = resources.checkpoint_folder(source.companion, source.companion_revision, family="hf-clip")
    except InputError as error:
        why = "a factor that forgets weights is taken back" if job.request.revert else "the new edit is measured"
        raise InputError(f"{error.what}; with the source weights {why}", fix="pass --checkpoint") from error
    with job.reporter.stage("load", recipe.name):
        model = load_model(recipe, folder=folder, companion=companion, device=job.request.device)
    if model.ref.weights_digest != job.manifest.model.weights_digest:
        raise IntegrityError(
            "the source weights are not those the bundle was made from", fix="pass --checkpoint with the right ones"
        )
    return model
