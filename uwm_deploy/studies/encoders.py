"""Both encoders of a subject, from a bundle or from a model that is edited first where that is asked for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout, RunFolder
from uwm_deploy.data.embedding import Encode
from uwm_deploy.data.ranks import ALONE, Ranks
from uwm_deploy.errors import InputError
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.resolve import recipe_of
from uwm_deploy.records.model import Digest, ImageSpec, TextSpec, TowerName
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.studies.subjects import NOTHING, Subject, open_subject_bundle


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoders:
    """Both encoders of a subject, opened.

    Attributes:
        name: For the report: recipe name, or the variant of a bundle.
        weights_digest: Of the model; of a bundle the edited one's.
        encode_image: From pixels (b, 3, H, W) float32 to embeddings (b, d) float32.
        encode_text: From token ids (b, L) int64 to embeddings (b, d) float32.
        batch: Rows per call.
    """

    name: str
    weights_digest: Digest
    image: ImageSpec
    text: TextSpec
    tokenizer: Tokenizer
    encode_image: Encode
    encode_text: Encode
    batch: int


def open_encoders(subject: Subject, reporter: Reporter, ranks: Ranks = ALONE) -> Encoders:
    """Opens a bundle without torch, or loads a model, editing it first when a method is asked for.

    Args:
        subject: What to open.
        reporter: Progress.
        ranks: The processes that share the edit; each opens the model itself.

    Raises:
        UwmError: If it cannot be opened, loaded or edited.
    """
    if subject.is_bundle:
        if subject.method != NOTHING:
            raise InputError(f"{subject.label} is a bundle, which is edited already", fix="leave the method out")
        return _bundle_encoders(subject)
    return _model_encoders(subject, reporter, ranks)


def _bundle_encoders(subject: Subject) -> Encoders:
    from uwm_deploy.runtime.encoder import SafeEncoder

    encoder = SafeEncoder.open(
        subject.model, public_key=subject.public_key, min_bundle_version=subject.min_bundle_version
    )
    bundle, ref = open_subject_bundle(subject), encoder.manifest.model
    images, texts = (encoder.session(tower) for tower in (TowerName.IMAGE, TowerName.TEXT))
    return Encoders(
        name=encoder.variant,
        weights_digest=bundle.manifest.edit.edited_weights_digest,
        image=ref.image,
        text=ref.text,
        tokenizer=Tokenizer(bundle.read(BundleLayout.TOKENIZER), ref.text),
        encode_image=images.run,
        encode_text=texts.run,
        batch=images.max_batch,
    )


def _model_encoders(subject: Subject, reporter: Reporter, ranks: Ranks) -> Encoders:
    from uwm_deploy.stages.verify.verify import EMBED_BATCH, encode_with
    from uwm_deploy.towers.load import load_model
    from uwm_deploy.towers.threads import fit_threads

    recipe, _ = recipe_of(subject.model)
    if subject.method == NOTHING:
        source = recipe.model
        folder = subject.request.checkpoint or resources.checkpoint_folder(
            source.repo, source.revision, family=source.family
        )
    else:
        outcome = run(_edit_request(subject, recipe.name), until="edit", reporter=reporter, ranks=ranks)
        folder = RunFolder(outcome.work).edited_model
    with reporter.stage("load", subject.label):
        model = load_model(recipe, folder=folder, device=subject.request.device)
    fit_threads(model.source)
    return Encoders(
        name=recipe.name if subject.method == NOTHING else f"{recipe.name}, {subject.method}",
        weights_digest=model.ref.weights_digest,
        image=model.ref.image,
        text=model.ref.text,
        tokenizer=Tokenizer(model.tokenizer_json, model.ref.text),
        encode_image=encode_with(model.image),
        encode_text=encode_with(model.text),
        batch=EMBED_BATCH,
    )


def _edit_request(subject: Subject, name: str) -> Request:
    """A run folder of its own, so that the user's own run of the same model stays as it is."""
    without = "".join(f"-without-{concept}" for concept in subject.request.leave_out)
    work = subject.request.work or Path(".uwm") / "methods" / f"{name}-{subject.method}{without}"
    return dataclasses.replace(subject.request, model=subject.model, method=subject.method, work=work)
