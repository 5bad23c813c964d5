"""Captions of a set's images by a language model, behind its own and behind an edited vision tower; judged and compared."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from uwm_deploy.bundle.head import digest_of_head
from uwm_deploy.data.open import open_source
from uwm_deploy.data.source import QuadrupleSource, check_own_pairs
from uwm_deploy.data.stored_rows import Row, StoredRows
from uwm_deploy.errors import DataError, InputError, IntegrityError
from uwm_deploy.pipeline.reach import check_reaches_language_model
from uwm_deploy.recipes.resolve import calibration_set_of
from uwm_deploy.records.adapter import LanguageAdapter
from uwm_deploy.records.codec import plain_from_record
from uwm_deploy.records.downstream import BENIGN, SIDES, UNSAFE, DownstreamReport, EditedTower, Seen, report_files
from uwm_deploy.records.files import digest_of_plain
from uwm_deploy.records.head import MIXED_FROM, SafetyHead
from uwm_deploy.records.places import check_place
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.versions import versions
from uwm_deploy.safeground.interval import wilson
from uwm_deploy.studies.downstream.edited import EditedAt, edited_tower_at
from uwm_deploy.studies.downstream.judges import JudgeSpec, OpenJudge, classifier_judge, refused_judge, words_judge
from uwm_deploy.studies.downstream.seen import seen_of, trained_on
from uwm_deploy.studies.downstream.shares import Inputs, flagged_shares, means, paired_means, work_list
from uwm_deploy.studies.downstream.text_scores import WITHOUT_WORDNET, corpus_bleu, score_versions, text_scores, wordnet
from uwm_deploy.towers.language_model import CaptionModel, Decoding, read_adapter
from uwm_deploy.towers.llava import reads_of
from uwm_deploy.towers.load import resolve_device

ORIGINAL, EDITED = "original", "edited"
_PACKAGES = ("torch", "transformers", "tokenizers", "pillow", "better-profanity")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionRequest:
    """What is asked for.

    Attributes:
        model: LLaVA checkpoint folder.
        tower: Bundle, run folder or checkpoint with the edited vision tower.
        adapter: Folder of adapters of the language model that were trained behind the bundle's safety head.
        on: Set whose images are captioned: name or TOML file.
        out: Folder of the captions and the report.
        judges: Classifiers beside the list of words.
        words: The user's own list of words; None takes that of `better-profanity`.
        public_key: Whose signature a bundle must have.
        min_bundle_version: Oldest version a bundle may have.
    """

    model: Path
    tower: Path
    on: str
    out: Path
    judges: tuple[JudgeSpec, ...] = ()
    words: Path | None = None
    adapter: Path | None = None
    public_key: Path | None = None
    min_bundle_version: int = 0
    decoding: Decoding = field(default_factory=Decoding)
    device: str = "auto"


def caption(request: CaptionRequest, reporter: Reporter) -> DownstreamReport:
    """Captions every image twice, judges the captions, and compares; goes on where a killed run was.

    Args:
        request: What is asked for.
        reporter: Progress, and what a reader should know before it runs.

    Raises:
        InputError: If the edit does not reach the language model, or one of the folders does not fit.
        DataError: If the set has no images.
        PrerequisiteError: If a package or the device is missing.
    """
    check_place(request.out, report_files("caption"))
    edited = edited_tower_at(
        request.tower, public_key=request.public_key, min_bundle_version=request.min_bundle_version
    )
    adapter = _adapter_of(request, edited)
    notes = (*_reach(edited, request.model), *_asked_otherwise(request, adapter))
    source = _images_of(request.on)
    seen, shared = _seen(request, edited, adapter, source, reporter)
    notes = (*notes, *shared)
    device = resolve_device(request.device)
    refusal = edited.head.language.refusal if edited.head and edited.head.language else ""
    judges = [
        refused_judge(refusal),
        words_judge(request.words),
        *(classifier_judge(j, "text-classification", device) for j in request.judges),
    ]
    text_scores(["a"], ["a"])  # a missing package is told now, and not after hours
    for note in notes:
        reporter.line(f"note: {note}")
    keys = work_list(source.ids, SIDES)
    rows, tower, model = _captioned(request, edited, source, keys, reporter)
    report = _report(request, tower, source, judges, rows, model, notes, edited.head)
    return dataclasses.replace(report, seen=seen)


def _reach(edited: EditedAt, llava: Path) -> tuple[str, ...]:
    if edited.record is None or (edited.head and edited.head.language):  # safety tokens are read, whatever the edit
        return ()
    return check_reaches_language_model(edited.record, reads_of(llava))


def _adapter_of(request: CaptionRequest, edited: EditedAt) -> LanguageAdapter | None:
    """The record of the adapters; they mean nothing but behind the very head that they were trained behind."""
    if request.adapter is None:
        return None
    record = read_adapter(request.adapter)
    if edited.head is None or digest_of_head(edited.head) != record.head_digest:
        raise InputError(
            f"the adapters in {request.adapter.name} are for a safety head that {request.tower.name} does not have",
            fix="pass the bundle that was built with that head",
        )
    return record


def _seen(
    request: CaptionRequest,
    edited: EditedAt,
    adapter: LanguageAdapter | None,
    source: QuadrupleSource,
    reporter: Reporter,
) -> tuple[dict[str, Seen], tuple[str, ...]]:
    """Images that the head or the adapters had in training: numbers on them say little of others."""
    if edited.bundle is None:
        return {}, ()
    trained = trained_on(edited.bundle, adapter, request.adapter)
    return seen_of(source, edited.bundle.manifest.model.image, trained, reporter.progress)


def _asked_otherwise(request: CaptionRequest, adapter: LanguageAdapter | None) -> tuple[str, ...]:
    asked = request.decoding.prompt
    if adapter is None or adapter.question == asked:
        return ()
    return (f"the adapters were trained on another question: {adapter.question}",)


def _images_of(name: str) -> QuadrupleSource:
    spec, _, base = calibration_set_of(name)
    check_own_pairs(spec)
    source = open_source(dataclasses.replace(spec, zero_shot=()), base=base)
    if not source.has_images:
        raise DataError(f"data set {name} has no images to caption", fix="use a set of image pairs")
    return source


def _captioned(
    request: CaptionRequest, edited: EditedAt, source: QuadrupleSource, keys: Sequence[Row], reporter: Reporter
) -> tuple[dict[str, list[Row]], EditedTower, CaptionModel]:
    """The captions of both; the model's own tower goes first, as an edited one takes its place."""
    model = CaptionModel.open(request.model, device=request.device, decoding=request.decoding)
    work = _Work(request, model, source, keys, reporter)
    if edited.model is None:
        with _opened(request, edited) as encoder:
            tower = _behind_bundle(request, edited, model, encoder, work)
    else:
        model.check_edited(edited.model, edited.record)  # told now, and not after the captions of the own tower
        work.rows(ORIGINAL, "")
        tower = edited.told(changed=model.put_edited(edited.model, edited.record))
        work.rows(EDITED, tower.weights_digest)
    work.check_same_images()
    return work.found, tower, model


def _behind_bundle(
    request: CaptionRequest, edited: EditedAt, model: CaptionModel, encoder: SafeEncoder, work: _Work
) -> EditedTower:
    with model.behind(encoder):  # what does not fit is told now
        if request.adapter:
            model.check_adapter(request.adapter)
    work.rows(ORIGINAL, "")
    with model.behind(encoder) as variant:
        adapter = digest_of_plain(plain_from_record(model.put_adapter(request.adapter))) if request.adapter else ""
        tower = edited.told(variant=variant, adapter_digest=adapter)
        mixed = f"mixed from {MIXED_FROM.value} on" if edited.head else ""
        parts = (tower.weights_digest, variant, encoder.digest, adapter, mixed)
        work.rows(EDITED, " ".join(filter(None, parts)))
    return tower


def _opened(request: CaptionRequest, edited: EditedAt) -> SafeEncoder:
    key, oldest = request.public_key, request.min_bundle_version
    return SafeEncoder.open(edited.path, to_measure=True, public_key=key, min_bundle_version=oldest)


class _Work:
    """Captions of one set by one model, kept on disk.

    Attributes:
        found: Subject to the captions that were asked for.
        files: Subject to the file that keeps them.
    """

    def __init__(
        self,
        request: CaptionRequest,
        model: CaptionModel,
        source: QuadrupleSource,
        keys: Sequence[Row],
        reporter: Reporter,
    ) -> None:
        self.request, self.model, self.source, self.keys, self.reporter = request, model, source, keys, reporter
        self.found: dict[str, list[Row]] = {}
        self.files: dict[str, Path] = {}

    def check_same_images(self) -> None:
        """Checks that both towers were given the same images.

        Raises:
            IntegrityError: If not.
        """
        for before, after in zip(self.found[ORIGINAL], self.found[EDITED], strict=True):
            if before["input"] != after["input"]:
                raise IntegrityError(
                    f"{self.files[ORIGINAL]} and {self.files[EDITED]} are of other images, first {before['side']} "
                    f"{before['id']}: the set changed in between",
                    fix="remove both files, and run again",
                )

    def rows(self, subject: str, tower: str) -> None:
        """Every caption behind one tower; those that are on disk are not made again."""
        batch, keys = self.request.decoding.batch, self.keys
        depends = depends_on(self.request, self.model, self.source) | {"tower": tower}
        stored = StoredRows(self.request.out, subject, depends, ("output", "safety", "input"))
        rows = stored.read(keys, batch)
        stored.keep(rows)
        with self.reporter.stage("caption", f"{subject}, {len(keys)} images"):
            for start in range(len(rows), len(keys), batch):
                made = self._made(start, keys[start : start + batch])
                stored.append(made)
                rows += made
                self.reporter.progress(subject, len(rows), len(keys))
        self.found[subject], self.files[subject] = rows, stored.file

    def _made(self, start: int, keys: Sequence[Row]) -> list[Row]:
        images = [self._image((start + i) // len(SIDES), key["side"]) for i, key in enumerate(keys)]
        captions = self.model.captions(images)
        return [
            {**key, "output": said.text, "safety": said.safety, "input": _digest_of(image)}
            for key, said, image in zip(keys, captions, images, strict=True)
        ]

    def _image(self, item: int, side: str) -> Image.Image:
        read = self.source.read(item)
        image = read.unsafe_image if side == UNSAFE else read.safe_image
        if image is None:
            raise DataError(f"item {read.id} has no {side} image", fix="use a set of image pairs")
        return image


def depends_on(request: CaptionRequest, model: CaptionModel, source: QuadrupleSource) -> dict[str, str]:
    """All that a caption depends on, the tower apart."""
    record = source.record
    return {
        "model": model.digest,
        "items": record.ids_digest,
        "content": record.content_digest,
        **settings_of(request, model),
        **versions(("torch", "transformers")),
    }


def settings_of(request: CaptionRequest, model: CaptionModel) -> dict[str, str]:
    """What a reader of the report wants to know of how captions were made."""
    decoding = request.decoding
    return {
        "prompt": decoding.prompt,
        "decoding": "greedy (temperature 0)",
        "max_new_tokens": str(decoding.max_new_tokens),
        "seed": str(decoding.seed),
        "batch": str(decoding.batch),
        "dtype": model.dtype,
        "images": model.images,
        "device": model.device.partition(":")[0],
    }


def _digest_of(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def _report(
    request: CaptionRequest,
    tower: EditedTower,
    source: QuadrupleSource,
    judges: Sequence[OpenJudge],
    rows: Mapping[str, Sequence[Row]],
    model: CaptionModel,
    notes: tuple[str, ...],
    head: SafetyHead | None,
) -> DownstreamReport:
    original, edited = rows[ORIGINAL], rows[EDITED]
    inputs = Inputs(*(tuple(row[key] for row in original) for key in ("id", "side", "input")))
    texts = {name: [row["output"] for row in found] for name, found in rows.items()}
    flags = {name: {judge.record.name: judge.flags(found) for judge in judges} for name, found in texts.items()}
    wanted = _own_captions(source)
    scores = {name: text_scores(found, wanted) for name, found in texts.items()} if wanted else None
    return DownstreamReport(
        kind="caption",
        model=request.model.resolve().name,
        model_digest=model.digest,
        tower=tower,
        measured_on=source.record,
        n={side: len(inputs.rows(side)) for side in inputs.present},
        alone={side: inputs.alone(side) for side in inputs.present},
        judges=tuple(judge.record for judge in judges),
        flagged=flagged_shares(inputs, flags[ORIGINAL], flags[EDITED]),
        kept=means(inputs, text_scores(texts[EDITED], texts[ORIGINAL])),
        reference=paired_means(inputs, scores[ORIGINAL], scores[EDITED]) if scores else {},
        corpus_bleu=_corpus_bleu(inputs, texts, wanted),
        settings=settings_of(request, model),
        versions={**versions(_PACKAGES), **score_versions()},
        notes=(*notes, *_mixed_in(inputs, edited, head), *(() if wordnet() else (WITHOUT_WORDNET,))),
    )


def _mixed_in(inputs: Inputs, rows: Sequence[Row], head: SafetyHead | None) -> Iterator[str]:
    """How many images had the head's safety prompt and tokens mixed in, beside the share that its threshold is for."""
    if head is None:
        return
    given = np.array([bool(row["safety"]) for row in rows])
    rows_of = {side: inputs.rows(side) for side in inputs.present}
    shares = {side: wilson(int(given[at].sum()), len(at), clusters=inputs.alone(side)) for side, at in rows_of.items()}
    told = ", ".join(
        f"{side} {share.value:.1f}% ({share.low:.1f} to {share.high:.1f}, n = {share.n})"
        for side, share in shares.items()
    )
    wanted, level = head.false_positive_rates[MIXED_FROM], head.thresholds[MIXED_FROM]
    what = "safety prompt and tokens" if head.language else "safety prompt"
    yield f"{what} mixed in from risk level {level:.4f} on, which was chosen for {wanted:g}% of safe images: {told}"
    if shares[BENIGN].low > wanted:
        yield "more benign images than it was chosen for: choose it on images like these (train safety-head --validation)"


def _own_captions(source: QuadrupleSource) -> list[str]:
    """The set's own text of every image, in the order of the work; empty when it has none."""
    found = []
    for item in range(len(source)) if source.has_texts else ():
        texts = source.read_texts(item)
        assert texts is not None
        safe, unsafe = texts
        found += [unsafe if side == UNSAFE else safe for side in SIDES]
    return found


def _corpus_bleu(
    inputs: Inputs, texts: Mapping[str, Sequence[str]], wanted: Sequence[str]
) -> dict[str, dict[str, float]]:
    pairs = {"kept": (texts[EDITED], texts[ORIGINAL])}
    if wanted:
        pairs |= {name: (texts[name], wanted) for name in (ORIGINAL, EDITED)}

    def of(side: str, found: Sequence[str]) -> list[str]:
        return [found[row] for row in np.asarray(inputs.rows(side))]

    return {
        name: {side: corpus_bleu(of(side, a), of(side, b)) for side in inputs.present} for name, (a, b) in pairs.items()
    }
