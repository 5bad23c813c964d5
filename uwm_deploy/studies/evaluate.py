"""Measures models, saved folders and bundles on one set: SafeGround, retrieval and zero-shot.

Quadruples are preprocessed once for all models with the same preprocessing; zero-shot images pass through in batches, so
that sets of any size can be measured.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout, RunFolder
from uwm_deploy.bundle.open import MANIFEST, Bundle, open_bundle
from uwm_deploy.data.embedding import Encode, PreparedSet, embed, prepare
from uwm_deploy.data.open import open_source
from uwm_deploy.data.ranks import ALONE, Ranks, StoppedError
from uwm_deploy.data.recognition import recognise
from uwm_deploy.data.source import QuadrupleSource, check_own_pairs
from uwm_deploy.data.zero_shot_readers import BrokenItemError
from uwm_deploy.data.zero_shot_suite import Suite, open_suite
from uwm_deploy.edits.methods import methods_from_name
from uwm_deploy.errors import InputError
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.data_set import CalibrationSet, calibration_set_from_toml
from uwm_deploy.recipes.resolve import TRAINING, calibration_set_of, recipe_of
from uwm_deploy.records.edit import Method, methods_name
from uwm_deploy.records.metrics import SafetyReport
from uwm_deploy.records.model import Digest, ImageSpec, TextSpec, TowerName
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.embedded import EmbeddedSet, Yardstick, safety_report, yardstick_of
from uwm_deploy.safeground.outcomes import bits_of
from uwm_deploy.safeground.top_one import TopOne

NOTHING = Method.NONE.value
"""Name of the method that edits nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One thing to measure.

    Attributes:
        label: Its row in a table.
        model: Recipe name, recipe file, checkpoint folder, saved edited folder or bundle.
        method: Edit that is made first; `none` measures what is there.
        bundle: It must be a bundle.
        request: How an edit is made: calibration set, checkpoint folder, run folder, device.
        public_key: Whose signature a bundle must have.
        min_bundle_version: Oldest version a bundle may have.
    """

    label: str
    model: str
    method: str = NOTHING
    bundle: bool = False
    request: Request = field(default_factory=Request)
    public_key: Path | None = None
    min_bundle_version: int = 0

    @property
    def is_bundle(self) -> bool:
        """Whether it is a bundle, which needs no torch."""
        return self.bundle or (Path(self.model) / MANIFEST).is_file()


def subject_from(text: str, request: Request | None = None) -> Subject:
    """Parses ``[LABEL=]MODEL[:METHOD]``.

    Args:
        text: As on the command line; a path that exists is taken whole.
        request: How an edit is made.

    Raises:
        InputError: If there is no such method, or nothing is named.
    """
    label, equals, rest = ("", "", text) if Path(text).exists() else text.partition("=")
    if not equals:
        label, rest = text, text
    model, method = rest, NOTHING
    if ":" in rest and not Path(rest).exists():
        model, _, method = rest.rpartition(":")
    if not label or not model:
        raise InputError(f"{text!r} names no model", fix="write MODEL, LABEL=MODEL or MODEL:METHOD")
    return Subject(
        label=label, model=model, method=methods_name(methods_from_name(method)), request=request or Request()
    )


def concepts_from(text: str) -> tuple[str, ...]:
    """Concepts of ``fire,smoke``.

    Raises:
        InputError: If none is named.
    """
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise InputError("--leave-out names no concept", fix="name some, apart by commas, or leave the option out")
    return found


def without_concepts(subjects: Sequence[Subject]) -> list[Subject]:
    """Checks that concepts can be left out of what is to be edited, where any are.

    Raises:
        InputError: If a subject was edited already, with whatever concepts, or nothing is edited.
    """
    if not any(subject.request.leave_out for subject in subjects):
        return list(subjects)
    for subject in subjects:
        made = (Path(subject.model).parent / "edit.json", Path(subject.model) / TRAINING)
        if subject.is_bundle or any(file.is_file() for file in made):
            raise InputError(
                f"{subject.label} is edited already, so no concept can be left out of its edit",
                fix="name a model with its method, such as demo:safety-axis",
            )
    if all(subject.method == NOTHING for subject in subjects):
        raise InputError("nothing is edited, so --leave-out has no effect", fix="name a method, as in demo:safety-axis")
    return list(subjects)


def trusted(subjects: Sequence[Subject], public_key: Path | None, min_bundle_version: int) -> list[Subject]:
    """The subjects, with what is asked of every bundle among them.

    Raises:
        InputError: If there is none that could have a signature.
    """
    if (public_key is not None or min_bundle_version) and not any(subject.is_bundle for subject in subjects):
        raise InputError("none of what is measured is a bundle, so none is signed", fix="leave the key out")
    return [
        dataclasses.replace(subject, public_key=public_key, min_bundle_version=min_bundle_version)
        for subject in subjects
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSets:
    """What every subject is measured on.

    Attributes:
        name: Of the set of quadruples; its source would read all of them to tell.
        source: Quadruples; None when only zero-shot is wanted.
        suite: Zero-shot sets.
    """

    name: str = "zero-shot sets"
    source: QuadrupleSource | None
    suite: Suite


def open_evaluation_sets(
    evaluation: str | None,
    zero_shot: Sequence[str] | None,
    *,
    data: Path | None,
    default: Subject,
    concepts: Sequence[str] = (),
) -> EvaluationSets:
    """Opens the evaluation set and its zero-shot sets.

    Args:
        evaluation: Name or TOML file; None takes the one of `default`.
        zero_shot: Names; None takes those the evaluation set names.
        data: Folder of the zero-shot sets; None takes `$UWM_DEPLOY_DATA/zero-shot`.
        default: The first subject.
        concepts: Only items of these are measured; all when empty.

    Raises:
        InputError: If there is no such set.
        DataError: If it is empty or malformed.
    """
    spec, base = _evaluation_of(default) if evaluation is None else calibration_set_of(evaluation)[::2]
    check_own_pairs(spec)
    names = spec.zero_shot if zero_shot is None else zero_shot
    demo_split = spec.split if spec.source == "demo" and zero_shot is None else "test"
    own = zero_shot is None
    suite = open_suite(
        names,
        data=data,
        base=base if own else None,
        demo_split=demo_split,
        limit=spec.zero_shot_limit if own else 0,
    )
    only = tuple(concepts) or spec.concepts
    source = open_source(dataclasses.replace(spec, zero_shot=(), concepts=only), base=base)
    return EvaluationSets(name=spec.name, source=source, suite=suite)


def _evaluation_of(subject: Subject) -> tuple[CalibrationSet, Path | None]:
    if subject.is_bundle:
        text = _opened(subject).read(BundleLayout.EVALUATION).decode()
        return calibration_set_from_toml(text, where=BundleLayout.EVALUATION), None
    return calibration_set_of(recipe_of(subject.model)[0].data.evaluation)[::2]


def _opened(subject: Subject) -> Bundle:
    return open_bundle(subject.model, public_key=subject.public_key, min_bundle_version=subject.min_bundle_version)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoders:
    """Both encoders of a subject, opened.

    Attributes:
        name: For the report: recipe name, or the variant of a bundle.
        batch: Rows per call.
        weights_digest: Of the model; of a bundle the edited one's.
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
    bundle, ref = _opened(subject), encoder.manifest.model
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

    recipe, _ = recipe_of(subject.model)
    if subject.method == NOTHING:
        source = recipe.model
        folder = subject.request.checkpoint or resources.checkpoint_folder(source.repo, source.revision)
    else:
        outcome = run(_edit_request(subject, recipe.name), until="edit", reporter=reporter, ranks=ranks)
        folder = RunFolder(outcome.work).edited_model
    with reporter.stage("load", subject.label):
        model = load_model(recipe, folder=folder, device=subject.request.device)
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


class Evaluator:
    """Measures one subject after the other on the same items; several processes share the work.

    The first one is taken for the original model: *hard safe* items come from it, and neighbours and spread are compared
    with its own.
    """

    def __init__(
        self, sets: EvaluationSets, *, workers: int, reporter: Reporter, ranks: Ranks = ALONE, with_items: bool = False
    ) -> None:
        self.sets, self.workers, self.reporter, self.ranks = sets, workers, reporter, ranks
        self.with_items = with_items  # what every single item came to, so that two reports can be paired
        self._yardstick: Yardstick | None = None
        self._prepared: tuple[tuple[ImageSpec, TextSpec, int], PreparedSet] | None = None

    def measure(self, encoders: Encoders) -> SafetyReport:
        """SafeGround, retrieval and every zero-shot set that is here; the others are listed as missing.

        Raises:
            DataError: If a quadruple cannot be read, or an embedding is not finite.
        """
        sets, progress = self.sets, self.reporter.progress
        with self.reporter.stage("evaluate", f"{encoders.name} on {sets.name}"):
            report = SafetyReport(subject=encoders.name, preference={}, per_concept={}, retrieval={}, zero_shot={})
            if sets.source is not None:
                embedded = embed(
                    self._inputs(sets.source, encoders),
                    encoders.encode_image,
                    encoders.encode_text,
                    label=encoders.name,
                    batch=encoders.batch,
                    progress=progress,
                    ranks=self.ranks,
                )
                report = self.ranks.first_only(lambda: self._report(encoders.name, embedded))
            zero_shot, missing = self._zero_shot(encoders)
        items = report.items
        if items is not None:
            items = dataclasses.replace(items, zero_shot={name: bits_of(part.hits) for name, part in zero_shot.items()})
        shares = {name: part.proportion() for name, part in zero_shot.items()}
        return dataclasses.replace(report, zero_shot=shares, zero_shot_missing=missing, items=items)

    def _report(self, name: str, embedded: EmbeddedSet) -> SafetyReport:
        if self._yardstick is None:
            self._yardstick = yardstick_of(embedded)
        return safety_report(name, embedded, with_items=self.with_items, yardstick=self._yardstick)

    def _inputs(self, source: QuadrupleSource, encoders: Encoders) -> PreparedSet:
        key = (encoders.image, encoders.text, encoders.batch if self.ranks.world > 1 else 0)  # a batch has one owner
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = None  # its memory, before the next one takes some
            prepared = prepare(
                source,
                encoders.image,
                encoders.tokenizer,
                workers=self.workers,
                progress=self.reporter.progress,
                batch=encoders.batch,
                ranks=self.ranks,
            )
            self._prepared = key, prepared
        return self._prepared[1]

    def _zero_shot(self, encoders: Encoders) -> tuple[dict[str, TopOne], dict[str, str]]:
        found, missing = {}, dict(self.sets.suite.missing)
        for name, part in self.sets.suite.sets.items():
            try:
                found[name] = recognise(
                    part,
                    encoders.image,
                    encoders.tokenizer,
                    encoders.encode_image,
                    encoders.encode_text,
                    batch=encoders.batch,
                    workers=self.workers,
                    progress=self.reporter.progress,
                    ranks=self.ranks,
                )
            except (BrokenItemError, StoppedError) as error:
                if isinstance(error, StoppedError) and error.kind != BrokenItemError.__name__:
                    raise
                missing[name] = error.what
        return found, missing


def evaluate(
    subjects: Sequence[Subject],
    *,
    evaluation: str | None,
    zero_shot: Sequence[str] | None,
    data: Path | None,
    workers: int,
    reporter: Reporter,
    ranks: Ranks = ALONE,
) -> list[SafetyReport]:
    """Reports in the order of the subjects, all on the same items.

    Args:
        subjects: At least one.
        evaluation: See `open_evaluation_sets`.
        zero_shot: See `open_evaluation_sets`.
        data: See `open_evaluation_sets`.
        workers: Decoding processes.
        reporter: Progress.
        ranks: The processes that share the work, all with the same arguments.

    Raises:
        InputError: If two subjects have one label.
        UwmError: Of the kind that went wrong.
    """

    def measured() -> list[SafetyReport]:
        twice = [label for label, count in Counter(subject.label for subject in subjects).items() if count > 1]
        if twice:
            raise InputError(
                f"two rows are called {twice[0]!r}", fix="write LABEL=MODEL:METHOD with a label of its own"
            )
        sets = open_evaluation_sets(
            evaluation, zero_shot, data=data, default=subjects[0], concepts=subjects[0].request.leave_out
        )
        evaluator = Evaluator(sets, workers=workers, reporter=reporter, ranks=ranks)
        return [evaluator.measure(open_encoders(subject, reporter, ranks)) for subject in subjects]

    return ranks.together(measured)
