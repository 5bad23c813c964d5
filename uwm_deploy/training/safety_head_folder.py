"""`train safety-head`: from a recipe and its set to a folder that `build --safety-head` takes.

Tokens are computed once and kept in the run folder, so that another run with other settings takes seconds. A run that was
interrupted begins again after them; its folder appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from uwm_deploy.bundle.head import ITEMS, RECORD, TEXTS, WEIGHTS, check_head, digest_of_image, digest_of_pair
from uwm_deploy.data.open import open_source
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.edits.pair_stream import PairStream
from uwm_deploy.errors import ContractError, DataError, InputError, unreadable
from uwm_deploy.pipeline.folder import current, stamp
from uwm_deploy.pipeline.request import Request, resolved_recipe
from uwm_deploy.pipeline.run import load_edited
from uwm_deploy.recipes.data_set import CalibrationSet
from uwm_deploy.recipes.resolve import calibration_set_of
from uwm_deploy.records.codec import plain_from_record, write_record
from uwm_deploy.records.files import digest_of_bytes, digest_of_plain, whole_folder
from uwm_deploy.records.head import HeadTraining, LanguageTraining, SafetyHead
from uwm_deploy.records.metrics import RiskReport
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.records.places import refuse_foreign
from uwm_deploy.records.tensor_file import all_tensors, open_tensors
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.runtime.versions import versions
from uwm_deploy.safeground.risk import RiskSet, risk_report, thresholds_for
from uwm_deploy.towers.batch_size import USUAL_PAIRS
from uwm_deploy.towers.language_model import CaptionModel
from uwm_deploy.towers.load import resolve_device
from uwm_deploy.towers.protocol import LoadedModel
from uwm_deploy.towers.safety_head import token_graph, tokens_of
from uwm_deploy.training.language import (
    FrozenTeacher,
    LanguageSettings,
    Lessons,
    lessons_from,
    opened_for,
    own_answers,
    prompts_from,
)
from uwm_deploy.training.passes import Kept
from uwm_deploy.training.safety_head import (
    LANGUAGE_LOSS,
    Features,
    HeadSettings,
    Trained,
    calibrate,
    held_out,
    rows_of,
    trained_head,
)

FEATURES = "head-features"
"""Folders of the run folder that keep tokens, one per set."""

STANDING = "head-training"
"""Folder of the run folder that keeps where a training with a language model stands."""

TEXTS_LIMIT = 256
"""Safe texts that are taken from the set when none are given."""

_FILE = "tokens.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRequest:
    """What the user asked for.

    Attributes:
        build: The edited model that the head is for: the request of the build that will have it.
        out: Folder of the head.
        train_on: Set that the head is trained on; the calibration set when None.
        validation: Set that temperatures and thresholds are from; every fifth pair of the other one when None.
        rates: Action to the share of safe images, 0 to 1, that its threshold is for.
        texts: File with safe texts, one a line, that a redirect chooses from; captions of the set when None.
        language: The language model that the head gets safety tokens for; None makes a head without them.
        prompts: File with what a language model is told about a category before the question; the usual words when None.
    """

    build: Request
    out: Path
    settings: HeadSettings
    rates: Mapping[str, float]
    train_on: str | None = None
    validation: str | None = None
    texts: Path | None = None
    language: LanguageSettings | None = None
    prompts: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadResult:
    """What was trained.

    Attributes:
        validation: What the head makes of the validation pairs; thresholds and temperatures are from them, so what counts
            is what `verify` measures on the evaluation set.
    """

    out: Path
    head: SafetyHead
    validation: RiskReport
    texts: int


def train_safety_head(request: HeadRequest, reporter: Reporter) -> HeadResult:
    """Trains, calibrates and writes a head.

    Args:
        request: What the user asked for.
        reporter: Progress.

    Raises:
        InputError: If the set has no image pairs, or too few for a false-positive rate, or the tower gives no tokens.
        UwmError: Of the kind that went wrong while the edited model was made.
    """
    refuse_foreign(request.out, RECORD, "is not a safety head")
    recipe, model = resolved_recipe(request.build), load_edited(request.build, reporter)
    token_graph(model.image)
    device, asked = resolve_device(request.build.device), request.language
    language = opened_for(model, asked, device) if asked else None
    source, spec = set_of(request.train_on or recipe.data.calibration)
    work = request.build.work or Path(".uwm") / recipe.name
    texts = _texts(request.texts, source)
    prompts = _prompts(request, source, language)
    everything = features_of(model, source, spec, request.build, work, reporter)
    other = None
    if request.validation:
        other, other_spec = set_of(request.validation)
        training, validation = everything, features_of(model, other, other_spec, request.build, work, reporter)
        _refuse_shared(training, validation)
    else:
        training, validation = _apart(everything)
    teacher, kept = None, None
    if asked is not None and language is not None:
        own = own_answers(language, source, everything.ids, work, reporter)
        teacher, kept = _taught(request, asked, model, language, own, training, work)
    with reporter.stage("train", f"safety head, {len(training)} pairs, {request.settings.epochs} passes"):
        trained = trained_head(training, request.settings, reporter.progress, device, teacher=teacher, kept=kept)
    calibration = calibrate(trained, validation)
    safe, unsafe = (rows_of(trained.module, part) for part in (validation.safe, validation.unsafe))
    files = {
        WEIGHTS: trained.module.to_bytes(),
        TEXTS: json.dumps(texts, indent=0, ensure_ascii=False).encode(),
        ITEMS: json.dumps(sorted(training.digests | validation.digests), indent=0).encode(),
    }
    head = SafetyHead(
        shape=trained.module.shape,
        categories=trained.categories,
        edited_weights_digest=model.ref.weights_digest,
        weights_digest=digest_of_bytes(files[WEIGHTS]),
        texts_digest=digest_of_bytes(files[TEXTS]),
        items_digest=digest_of_bytes(files[ITEMS]),
        thresholds=thresholds_for(safe.level, request.rates),
        false_positive_rates={action: 100 * rate for action, rate in request.rates.items()},
        calibration=calibration,
        training=_training_record(source, other, (training, validation), request.settings, trained),
        language=_language_record(asked, language, trained) if asked and language else None,
        prompts=prompts,
    )
    _write(request.out, files, head)
    if kept is not None:
        kept.file.unlink(missing_ok=True)
    found = RiskSet(concepts=validation.concepts, safe=safe, unsafe=unsafe)
    return HeadResult(out=request.out, head=head, validation=risk_report(head, found), texts=len(texts))


def _prompts(request: HeadRequest, source: QuadrupleSource, language: CaptionModel | None) -> dict[str, str]:
    """What a language model is told about a category; none stands for an image of its own."""
    prompts = prompts_from(request.prompts, set(source.concepts)) if request.prompts else {}
    if language:
        language.check_texts(prompts.values())
    return prompts


def _apart(everything: Features) -> tuple[Features, Features]:
    """What is trained on, and what is held out, of one set."""
    apart = held_out(everything.concepts)
    trained_on = {pair for pair, out in zip(everything.pairs, apart, strict=True) if not out}
    # A pair that is in the set twice would be validated on what was learned by heart; it only trains.
    twice = np.array([pair in trained_on for pair in everything.pairs])
    return everything.rows(np.flatnonzero(~apart)), everything.rows(np.flatnonzero(apart & ~twice))


def _training_record(
    source: QuadrupleSource,
    other: QuadrupleSource | None,
    sets: tuple[Features, Features],
    settings: HeadSettings,
    trained: Trained,
) -> HeadTraining:
    """How a head was trained.

    Args:
        source: What it was trained on.
        other: What it was validated on, where that is a set of its own.
        sets: Training and validation pairs.
        settings: Of the training.
        trained: What came of it.
    """
    training, validation = sets
    return HeadTraining(
        data=source.record,
        validation=other.record if other else None,
        pairs=len(training),
        validation_pairs=len(validation),
        **{name: getattr(settings, name) for name in ("epochs", "batch", "learning_rate", "seed")},
        loss_first=trained.losses[0],
        loss_last=trained.losses[-1],
        seconds=round(trained.passed.seconds, 3),
    )


def _write(out: Path, files: Mapping[str, bytes], head: SafetyHead) -> None:
    check_head(head)
    with whole_folder(out) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        write_record(folder / RECORD, head)


def _taught(
    request: HeadRequest,
    asked: LanguageSettings,
    model: LoadedModel,
    language: CaptionModel,
    own: Mapping[str, str],
    training: Features,
    work: Path,
) -> tuple[FrozenTeacher, Kept]:
    """The language model as a teacher, and where the training stands on disk."""
    lessons = lessons_from(training, own, asked.question, asked.refusal)
    kept = Kept(folder=work / STANDING, key=_key(request, model, language, lessons, training))
    return FrozenTeacher(language, lessons, asked.weight), kept


def _key(
    request: HeadRequest, model: LoadedModel, language: CaptionModel, lessons: Lessons, training: Features
) -> Digest:
    """Of all that the training depends on."""
    return digest_of_plain(
        {
            "weights": model.ref.weights_digest,
            "language model": language.digest,
            "weight": request.language.weight if request.language else 0.0,
            "pairs": list(training.pairs),
            "concepts": list(training.concepts),
            "questions": list(lessons.questions),
            "answers": list(lessons.answers),
            "settings": plain_from_record(request.settings),
            "device": language.device,
            **versions(("torch", "transformers")),
        }
    )


def _language_record(asked: LanguageSettings, language: CaptionModel, trained: Trained) -> LanguageTraining:
    losses = trained.passed.losses
    return LanguageTraining(
        model=language.folder.resolve().name,
        model_digest=language.digest,
        question=asked.question,
        refusal=asked.refusal,
        weight=asked.weight,
        loss_first=losses[0][LANGUAGE_LOSS],
        loss_last=losses[-1][LANGUAGE_LOSS],
    )


def set_of(name: str) -> tuple[QuadrupleSource, CalibrationSet]:
    """A set of image pairs, and its definition.

    Raises:
        DataError: If it has no images.
    """
    spec, _, base = calibration_set_of(name)
    source = open_source(spec, base=base)
    if not source.has_images:
        raise DataError(
            f"data set {source.record.name} has no image pairs", fix="train the head on a set that has them"
        )
    return source, spec


def _refuse_shared(training: Features, validation: Features) -> None:
    seen = set(training.pairs)
    shared = [item for item, pair in zip(validation.ids, validation.pairs, strict=True) if pair in seen]
    if shared:
        raise DataError(
            f"{len(shared)} validation items are trained on, first {shared[0]}", fix="use sets that share nothing"
        )


def _texts(given: Path | None, source: QuadrupleSource) -> list[str]:
    """Safe texts without repetition: those of a file, or safe captions of the set, evenly spaced."""
    if given is not None:
        try:
            lines = given.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            fix = "give one text a line, in UTF-8"
            raise unreadable(str(given), error, fix=fix, kind=InputError) from error
        found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    else:
        if not source.has_texts:
            raise InputError(f"data set {source.record.name} has no texts", fix="give safe ones with --safe-texts")
        rows = np.unique(np.linspace(0, len(source) - 1, min(len(source), TEXTS_LIMIT)).astype(int))
        pairs = [_text_pair(source, int(row)) for row in rows]
        found = list(dict.fromkeys(text.strip() for text in pairs if text.strip()))
    if not found:
        raise InputError("there is no safe text to redirect to", fix="give some with --safe-texts")
    return found


def _text_pair(source: QuadrupleSource, row: int) -> str:
    """The safe caption of an item; empty where it cannot be read, as `_features` leaves such items out."""
    try:
        pair = source.read_texts(row)
    except DataError:
        return ""
    return pair[0] if pair else ""


def features_of(
    model: LoadedModel, source: QuadrupleSource, spec: CalibrationSet, build: Request, work: Path, reporter: Reporter
) -> Features:
    """Tokens of a set, computed once per edited model and set; they are in memory as a whole."""
    inputs = {
        "digests": "pairs and images",
        "weights": model.ref.weights_digest,
        "image": digest_of_plain(plain_from_record(model.ref.image)),
        "data": digest_of_plain(plain_from_record(source.record)),
    }
    folder = work / f"{FEATURES}-{digest_of_plain(inputs)[7:19]}"
    if current(folder, inputs) is not None:
        reporter.line(f"{'features':<10} unchanged, reused ({source.record.name})")
        return _read(folder / _FILE)
    with reporter.stage("features", f"{source.record.name}, {len(source)} pairs"), whole_folder(folder) as temporary:
        found = _computed(model, source, spec, build, reporter)
        names = np.frombuffer(
            json.dumps([found.ids, found.concepts, found.pairs, found.images]).encode(), dtype=np.uint8
        )
        save_file({"names": names, "safe": found.safe, "unsafe": found.unsafe}, temporary / _FILE)
        stamp(temporary, inputs)
    return found


def _read(path: Path) -> Features:
    with open_tensors(path, framework="numpy", name=str(path), fix="remove its folder", kind=ContractError) as file:
        tensors = all_tensors(file)
    ids, concepts, pairs, images = map(tuple, json.loads(tensors["names"].tobytes()))
    return Features(
        ids=ids,
        concepts=concepts,
        safe=tensors["safe"],
        unsafe=tensors["unsafe"],
        pairs=pairs,
        images=tuple((safe, unsafe) for safe, unsafe in images),
    )


def _computed(
    model: LoadedModel, source: QuadrupleSource, spec: CalibrationSet, build: Request, reporter: Reporter
) -> Features:
    stream = PairStream(
        source,
        TowerName.IMAGE,
        model.ref.image,
        Tokenizer(model.tokenizer_json, model.ref.text),
        batch_pairs=build.batch_pairs or USUAL_PAIRS[TowerName.IMAGE],
        workers=build.workers,
        max_broken_share=spec.max_broken_share,
        progress=reporter.progress,
    )
    concept_of = dict(zip(source.ids, source.concepts, strict=True))
    ids: list[str] = []
    safe: list[np.ndarray] = []
    unsafe: list[np.ndarray] = []
    digests: list[str] = []
    images: list[tuple[str, str]] = []
    for pairs in stream:
        ids += pairs.ids
        digests += map(digest_of_pair, pairs.safe, pairs.unsafe)
        images += zip(map(digest_of_image, pairs.safe), map(digest_of_image, pairs.unsafe), strict=True)
        for rows, parts in ((pairs.safe, safe), (pairs.unsafe, unsafe)):
            part = tokens_of(model.image, rows).to("cpu").numpy().astype(np.float16)
            if not np.isfinite(part).all():
                raise ContractError(f"tokens of {pairs.ids[0]} and others are not finite in half precision")
            parts.append(part)
    return Features(
        ids=tuple(ids),
        concepts=tuple(concept_of[item] for item in ids),
        safe=np.concatenate(safe),
        unsafe=np.concatenate(unsafe),
        pairs=tuple(digests),
        images=tuple(images),
    )
