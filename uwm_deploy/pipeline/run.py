"""The one place that knows the order of the stages, what each is made from, and when it can be reused.

The verdict is judged before packaging, so a bundle never exists without one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from uwm_deploy import __version__
from uwm_deploy.bundle.head import PLACE, TEXTS, WEIGHTS, HeadFiles, digest_of_pair, read_head
from uwm_deploy.bundle.open import engine_paths, open_bundle
from uwm_deploy.bundle.sign import Resigning, seal_for
from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.data.embedding import PreparedSet, content_digests, overlap, prepare
from uwm_deploy.data.open import open_source
from uwm_deploy.data.ranks import ALONE, Ranks
from uwm_deploy.data.source import QuadrupleSource, check_own_pairs
from uwm_deploy.data.zero_shot_suite import fingerprint_of
from uwm_deploy.edits.methods import needs_gradients, selects
from uwm_deploy.errors import InputError, IntegrityError, PrerequisiteError, UwmError
from uwm_deploy.pipeline.baseline import BASELINE, accepted, is_bundle, read_baseline, write_baseline
from uwm_deploy.pipeline.judge import _judge, judge_of_bundle, report_at
from uwm_deploy.pipeline.request import Request, _with_overrides
from uwm_deploy.pipeline.shipping import (
    _card,
    bundle_with_card,
    evaluation_source_of,
    lock_of_bundle,
    note_lost_signature,
    note_signature,
    refuse_foreign_folder,
)
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.edit_spec import ClosedForm
from uwm_deploy.recipes.recipe import ModelSource, Recipe
from uwm_deploy.recipes.resolve import calibration_set_of, policy_of, read_training, recipe_of
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import json_from_record, plain_from_record, read_record, write_record
from uwm_deploy.records.edit import (
    CLOSED_FORM,
    MAP_NAMES,
    EditRecord,
    FitRecord,
    Method,
    ScoreRecord,
    TensorEdit,
)
from uwm_deploy.records.evidence import Goldens, GraphAudit, VerifyReport
from uwm_deploy.records.files import (
    STAMP,
    digest_of_bytes,
    digest_of_file,
    digest_of_folder,
    digest_of_plain,
    is_current,
    locked,
    stamp,
    whole_folder,
    write_atomic,
)
from uwm_deploy.records.graph import (
    EXPORTED,
    EngineArtifact,
    OnnxArtifact,
    Precision,
    PrecisionPlan,
    Provider,
    Target,
    variant_name,
)
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.records.training import TrainingRecord
from uwm_deploy.records.verdict import Result, Verdict
from uwm_deploy.report.card import CARD, card_of
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.inspection import method_line
from uwm_deploy.runtime.memory import without_collection
from uwm_deploy.runtime.providers import COMPILING, provider_reason
from uwm_deploy.runtime.session import (
    Session,
    missing_package,
    open_engine,
    open_session,
    provider_of,
    reason_not_executable,
    usable,
)
from uwm_deploy.runtime.tensorrt import device_name
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.embedded import (
    flips_between,
    hard_safe_worst,
    safety_report,
    worst_items,
    yardstick_of,
)
from uwm_deploy.safeground.health import data_health
from uwm_deploy.safeground.risk import risk_report

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from uwm_deploy.edits.closed_form import Solve
    from uwm_deploy.edits.pair_stream import PairStream
    from uwm_deploy.edits.patch import Patch
    from uwm_deploy.edits.proof import Expected
    from uwm_deploy.graphs.quantise import Kind
    from uwm_deploy.stages.convert.search import Source
    from uwm_deploy.stages.verify.verify import Subject
    from uwm_deploy.towers.protocol import LoadedModel


PLAN = "plan.json"
"""Record of the search of precision `auto`, in its stage folder."""

_RANGE_PAIRS = 128
"""Pairs of the calibration set that the ranges of 8-bit activations are taken from."""

STAGES = ("load", "calibrate", "score", "fit", "edit", "export", "compile", "verify", "gate", "package")
"""Every stage, in order. `load` and `calibrate` live in memory; the others leave a folder or a file. `fit` has work only
where an edit has a closed-form step."""

SHARED_STAGES = ("score", "fit", "verify")
"""Stages that several processes work on; the others are the first one's."""

_NEAREST_PAIRS = 64
"""Caption pairs per forward pass while nearest safe captions are looked for."""

_DTYPES: Mapping[str, Literal["float32", "bfloat16"]] = {"fp32": "float32", "bf16": "bfloat16"}

_SCORING, _FITTING = ".scoring", ".fitting"
"""Folders for totals of a scoring pass, and of a fit, that is under way."""

_BUILD_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "polygraphy", "tensorrt_rtx", "tensorrt")
_RUN_PACKAGES = ("numpy", "pillow", "tokenizers", "onnxruntime-gpu", "onnxruntime")


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a run produced so far, and where.

    Attributes:
        reused: Stages that were skipped because nothing they depend on changed.
        skipped: Target to the reason why it could not be compiled here.
    """

    name: str
    work: Path
    out: Path | None = None
    reused: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    score: ScoreRecord | None = None
    fit: FitRecord | None = None
    edit: EditRecord | None = None
    onnx: tuple[OnnxArtifact, ...] = ()
    engines: tuple[EngineArtifact, ...] = ()
    converted: tuple[OnnxArtifact, ...] = ()
    plan: PrecisionPlan | None = None
    report: VerifyReport | None = None
    verdict: Verdict | None = None
    manifest: Manifest | None = None


def run(request: Request, *, until: str, reporter: Reporter, ranks: Ranks = ALONE) -> Outcome:
    """Runs the pipeline through stage `until`, reusing every stage whose inputs did not change.

    Args:
        request: What the user asked for.
        until: Last stage.
        reporter: Progress.
        ranks: The processes that share the work, all with the same request and run folder. Only the first writes, and
            only its outcome is whole.

    Raises:
        UwmError: Of the kind that went wrong; finished stages are kept.
    """
    build = ranks.together(lambda: _Build(request, reporter, ranks))
    with contextlib.ExitStack() as lock:
        ranks.first_only(lambda: lock.enter_context(locked(build.work)))
        for stage in STAGES[STAGES.index("score") : STAGES.index(until) + 1]:
            step: Callable[[], None] = getattr(build, stage)
            ranks.together(step) if stage in SHARED_STAGES else ranks.first_only(step)
    return build.outcome


def load_source(request: Request, reporter: Reporter) -> LoadedModel:
    """The unedited model that a request names."""
    return _Build(request, reporter).original


def load_fitted(request: Request, reporter: Reporter) -> LoadedModel:
    """The model that the closed-form step of a request is fitted on: the source model with the step before."""
    return _Build(request, reporter)._before_closed_form()[0]


def load_edited(request: Request, reporter: Reporter) -> LoadedModel:
    """The edited model that a request makes, with what was not made before made first.

    Raises:
        UwmError: Of the kind that went wrong.
    """
    run(request, until="edit", reporter=reporter)
    return _Build(request, reporter).edited


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed version per distribution; those that are missing are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


class _Build:
    """One run: resolved inputs, lazily loaded models, one method per stage."""

    def __init__(self, request: Request, reporter: Reporter, ranks: Ranks = ALONE) -> None:
        self.request, self.reporter, self.ranks = request, reporter, ranks
        recipe, self.recipe_text = recipe_of(request.model)
        self.recipe = _with_overrides(recipe, request)
        self.calibration, _, self.calibration_base = calibration_set_of(self.recipe.data.calibration)
        if request.leave_out:
            self.calibration = dataclasses.replace(self.calibration, leave_out=request.leave_out)
        self.evaluation, self.evaluation_text, self.evaluation_base = calibration_set_of(self.recipe.data.evaluation)
        check_own_pairs(self.evaluation)
        self.trained: ModelSource | None = None
        if self.recipe.entries.method is Method.TRAINED:
            self.trained, self.recipe = self.recipe.model, _recipe_of_base(self.recipe, request)
        self.training = _training_at((self.trained or self.recipe.model).repo)
        self.policy, self.policy_digest = policy_of(request.policy)
        self.baseline = read_baseline(request.baseline) if request.baseline else None
        self.work = request.work or Path(".uwm") / self.recipe.name
        self.out = request.out or Path("dist") / self.recipe.name
        self.outcome = Outcome(name=self.recipe.name, work=self.work)

    # --- what the stages are made from ------------------------------------------------------------------------------

    @cached_property
    def checkpoint(self) -> Path | None:
        """Folder with the source checkpoint's files; None for random weights of the recipe's own architecture."""
        source = self.recipe.model
        if self.request.weights == "random" and source.architecture and not Path(source.repo).is_dir():
            return None
        return resources.checkpoint_folder(source.repo, source.revision)

    @cached_property
    def companion(self) -> Path | None:
        """Folder of the checkpoint that the model is measured with, for a vision tower alone."""
        source = self.recipe.model
        if not source.companion or self.checkpoint is None:
            return None
        return resources.checkpoint_folder(source.companion, source.companion_revision)

    @cached_property
    def base_inputs(self) -> dict[str, str]:
        """What every stage depends on: the source weights' bytes, this code, the libraries."""
        code = Path(__file__).parent.parent
        sources = {p.relative_to(code).as_posix(): digest_of_file(p) for p in sorted(code.rglob("*.py"))}
        return {
            "checkpoint": digest_of_folder(self.checkpoint) if self.checkpoint else digest_of_plain(self.recipe_text),
            "companion": digest_of_folder(self.companion) if self.companion else "",
            "weights": self.request.weights,
            "trained": digest_of_folder(self._trained_folder()) if self.trained else "",
            "code": digest_of_plain(sources),
            "versions": digest_of_plain(versions(_BUILD_PACKAGES + _RUN_PACKAGES)),
        }

    @cached_property
    def calibration_source(self) -> QuadrupleSource:
        """The set that scores come from."""
        return open_source(self.calibration, base=self.calibration_base)

    @cached_property
    def evaluation_source(self) -> QuadrupleSource:
        """The set that SafeGround is measured on."""
        return open_source(self.evaluation, base=self.evaluation_base)

    @cached_property
    def head(self) -> HeadFiles | None:
        """The safety head that goes into the image graph."""
        return read_head(self.request.safety_head) if self.request.safety_head else None

    @property
    def head_digest(self) -> Digest:
        """Empty without a head."""
        return self.head.digest if self.head else ""

    @cached_property
    def original(self) -> LoadedModel:
        """Stage `load`: the source model."""
        return self._load(None)

    @cached_property
    def edited(self) -> LoadedModel:
        """The edited model, read back from the saved folder, so that what was saved is what is exported."""
        return self._load(self.work / "edit" / "model")

    def _trained_folder(self) -> Path:
        assert self.trained is not None
        return resources.checkpoint_folder(self.trained.repo, self.trained.revision)

    def _load_trained(self) -> LoadedModel:
        """The trained weights, of the method `trained`."""
        from uwm_deploy.towers.load import load_model

        assert self.trained is not None
        recipe = dataclasses.replace(self.recipe, model=self.trained)
        with self.reporter.stage("load", f"{self.recipe.name} (trained)"):
            return load_model(recipe, folder=self._trained_folder(), device=self.request.device)

    def _load(self, folder: Path | None) -> LoadedModel:
        with without_collection():
            import torch

            from uwm_deploy.towers.load import load_model

        weights: Literal["checkpoint", "random"] = "random" if self.request.weights == "random" else "checkpoint"
        with self.reporter.stage("load", f"{self.recipe.name}{' (edited)' if folder else ''}"):
            model = load_model(
                self.recipe,
                folder=folder or self.checkpoint,
                companion=None if folder else self.companion,
                weights="checkpoint" if folder else weights,
                device=self.request.device,
            )
        on_cpu = next(model.source.parameters()).device.type == "cpu"
        if on_cpu and self.request.device == "auto" and torch.cuda.is_available():
            self.reporter.line("load       no GPU has room for the model; it runs on the CPU")
        if (
            folder
            and model.ref.weights_digest
            != read_record(EditRecord, self.work / "edit" / "edit.json").edited_weights_digest
        ):
            raise IntegrityError(
                "the saved edited model is not the one its record describes", fix="remove the run folder"
            )
        if folder and self.head is not None:
            self._add_head(model, self.head)
        return model

    def _add_head(self, model: LoadedModel, head: HeadFiles) -> None:
        from uwm_deploy.towers.safety_head import head_from_bytes, with_head

        if head.record.edited_weights_digest != model.ref.weights_digest:
            raise IntegrityError(
                f"the safety head in {self.request.safety_head} was trained on other weights than this edit makes",
                fix="run `uwm-deploy train safety-head` with the options of this build",
            )
        model.image = with_head(model.image, head_from_bytes(head.weights, head.record.shape))

    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self.original.tokenizer_json, self.original.ref.text)

    def _stage(self, name: str, text: str, inputs: Mapping[str, str], make: Callable[[Path], None]) -> Path:
        """Reuses the folder of a stage, or makes it, whole or not at all; processes but the first only help."""
        folder = self.work / name
        shared = self.ranks if name in SHARED_STAGES else ALONE
        current = shared.first_only(lambda: is_current(folder, inputs))
        if not current and not self.ranks.first:
            make(folder)
        elif current:
            self.outcome.reused.append(name)
            self.reporter.line(f"{name:<10} unchanged, reused")
        else:
            with self.reporter.stage(name, text), whole_folder(folder) as temporary:
                make(temporary)
                stamp(temporary, inputs)
        return folder

    # --- stages ----------------------------------------------------------------------------------------------------

    def score(self) -> None:
        """Scores of every edited layer on the calibration set."""
        edits = self.recipe.entries
        formulas = {
            tower.value: [spec.rule.value, list(spec.layers), spec.pairing.value, spec.gradient_batch]
            for tower in TowerName
            for spec in (edits.of(tower),)
        }
        seed = self.calibration.seed if needs_gradients(edits.method) else None
        inputs = self.base_inputs | {
            "calibration": digest_of_plain(plain_from_record(self.calibration_source.record)),
            "edits": digest_of_plain([edits.method.value, edits.per_concept, list(edits.towers), seed, formulas]),
            "dtype": _DTYPES[self.request.score_dtype],
        }
        make = partial(self._score, digest_of_plain(inputs))
        folder = self._stage("score", self._named_method(self.calibration.name), inputs, make)
        if self.ranks.first:
            shutil.rmtree(self.work / _SCORING, ignore_errors=True)
            self.outcome.score = read_record(ScoreRecord, folder / "score.json")

    def _score(self, key: str, folder: Path) -> None:
        from uwm_deploy.edits.pair_stream import PairStream
        from uwm_deploy.edits.pairs import scoring_order
        from uwm_deploy.edits.sharded_sums import Scale
        from uwm_deploy.stages.score.score import score_to_folder

        edits, whole = self.recipe.entries, self._paired()
        source = scoring_order(whole, edits, self.calibration.seed)
        fits = self.ranks.gathered(self.ranks.together(self._batch_pairs))
        batch_pairs = {tower: min(part[tower] for part in fits) for tower in TowerName}  # equal, so that sums are

        def pairs(tower: TowerName) -> PairStream:
            return PairStream(
                source,
                tower,
                self.original.ref.image,
                self._tokenizer(),
                batch_pairs=batch_pairs[tower],
                workers=self.request.workers if tower is TowerName.IMAGE else 0,
                max_broken_share=self.calibration.max_broken_share,
                progress=self.reporter.progress,
                sort_by_length=not (edits.per_concept or needs_gradients(edits.method)),
            )

        if selects(edits.method):
            for tower in edits.towers:
                pairs(tower)  # a set without pairs for one of them is refused before anything is scored
        concepts = dict(zip(whole.ids, whole.concepts, strict=True)) if edits.per_concept else None
        scale = Scale(
            ranks=self.ranks,
            dtype=_DTYPES[self.request.score_dtype],
            part=self.request.batch_pairs,
            kept=self.work / _SCORING,
            key=key,
            notice=self.reporter.line,
        )
        score_to_folder(self.original, whole.record, pairs, edits, folder, concepts, scale)

    def _paired(self) -> QuadrupleSource:
        """The calibration set with the pairs that its definition asks for."""
        source = self.calibration_source
        if self.calibration.pairing == "own" or not selects(self.recipe.entries.method):
            return source
        from uwm_deploy.edits.pair_stream import PairStream
        from uwm_deploy.edits.pairs import repaired
        from uwm_deploy.stages.score.nearest import nearest_partners

        pairs = PairStream(
            source,
            TowerName.TEXT,
            self.original.ref.image,
            self._tokenizer(),
            batch_pairs=_NEAREST_PAIRS,
            workers=0,
            max_broken_share=self.calibration.max_broken_share,
            progress=self.reporter.progress,
        )
        return repaired(source, nearest_partners(self.original.text, pairs))

    def _batch_pairs(self) -> dict[TowerName, int]:
        """Pairs per forward pass while scoring: what was asked for, else what memory holds."""
        from uwm_deploy.towers.batch_size import pairs_that_fit

        asked, model = self.request.batch_pairs, self.original
        return {tower: asked or pairs_that_fit(model.tower(tower), model.ref) for tower in TowerName}

    def _named_method(self, text: str) -> str:
        """A line about a stage; the default method is not worth a word."""
        edits = self.recipe.entries
        words = [] if self.recipe.method == Method.UWM else [self.recipe.method]
        return ", ".join([*words, *(["per concept"] if edits.per_concept else []), text])

    def fit(self) -> None:
        """Sums that the closed-form step is solved from; nothing without one."""
        spec = self.recipe.closed_form
        if spec is None:
            return
        entries = self.recipe.entries
        inputs = {
            "score": digest_of_file(self.work / "score" / STAMP) if self.ranks.first else "",
            "calibration": digest_of_plain(plain_from_record(self.calibration_source.record)),
            "zero_shot": digest_of_plain(self._zero_shot_digests(self.calibration_source)),
            "entries": digest_of_plain(plain_from_record(entries)),
            "closed_form": digest_of_plain([spec.method.value, spec.axis.placement]),
        }
        folder = self._stage("fit", self._named_method(self.calibration.name), inputs, partial(self._fit, spec, inputs))
        if self.ranks.first:
            shutil.rmtree(self.work / _FITTING, ignore_errors=True)
            self.outcome.fit = read_record(FitRecord, folder / "fit.json")

    def _before_closed_form(self) -> tuple[LoadedModel, LoadedModel | None]:
        """The model that the closed-form step is made on, and the source model where another step comes before."""
        method = self.recipe.entries.method
        if method in CLOSED_FORM:
            return self.original, None
        if self.trained:
            return self._load_trained(), self.original
        from uwm_deploy.stages.edit.edit import select_and_apply

        model = self._load(None)
        score = self.ranks.first_only(lambda: read_record(ScoreRecord, self.work / "score" / "score.json"))
        scores = self.work / "score" / "scores.safetensors"
        self.ranks.together(lambda: select_and_apply(model, score, scores, self.recipe.entries))
        return model, self.original

    def _fit(self, spec: ClosedForm, inputs: Mapping[str, str], folder: Path) -> None:
        from uwm_deploy.data.embedding import prepare_zero_shot
        from uwm_deploy.edits.closed_form import placement_of
        from uwm_deploy.edits.pair_stream import PairStream
        from uwm_deploy.edits.sharded_sums import Scale
        from uwm_deploy.stages.fit import fit_to_folder

        model, original = self._before_closed_form()
        placement, why = placement_of(model, spec)
        if why and self.ranks.first:
            self.reporter.line(f"fit        {why}")
        source, ref = self.calibration_source, self.original.ref
        sizes = self.ranks.gathered(self.ranks.together(self._batch_pairs))
        batch_pairs = {tower: min(part[tower] for part in sizes) for tower in TowerName}

        def pairs(tower: TowerName) -> PairStream:
            return PairStream(
                source,
                tower,
                ref.image,
                self._tokenizer(),
                batch_pairs=batch_pairs[tower],
                workers=self.request.workers if tower is TowerName.IMAGE else 0,
                max_broken_share=self.calibration.max_broken_share,
                progress=self.reporter.progress,
            )

        for tower in TowerName:
            pairs(tower)  # a set without pairs for one of them is refused before anything is summed
        zero_shot = {}
        if self.ranks.first:
            zero_shot = prepare_zero_shot(
                source, ref.image, self._tokenizer(), workers=self.request.workers, progress=self.reporter.progress
            )
        scale = Scale(
            ranks=self.ranks, kept=self.work / _FITTING, key=digest_of_plain(inputs), notice=self.reporter.line
        )
        concepts = dict(zip(source.ids, source.concepts, strict=True))
        fit_to_folder(model, original, source.record, pairs, concepts, zero_shot, spec.method, placement, folder, scale)

    def edit(self) -> None:
        """Patch and edited model."""
        edits, closed = self.recipe.entries, self.recipe.closed_form
        inputs = {
            "score": digest_of_file(self.work / "score" / STAMP),
            "fit": digest_of_file(self.work / "fit" / STAMP) if closed else "",
            "edits": digest_of_plain(plain_from_record(self.recipe.edit)),
        }
        nothing = edits.method is Method.NONE
        verbs = [*(["select, multiply"] if selects(edits.method) else []), *(["solve"] if closed else []), "save"]
        text = self._named_method(", ".join(verbs))
        folder = self._stage("edit", text, inputs, self._edit)
        self.outcome.edit = read_record(EditRecord, folder / "edit.json")
        if not (card := folder / "model" / CARD).is_file() and self.outcome.score:
            text = card_of(
                self.outcome.edit,
                self.outcome.score.calibration,
                name=self.recipe.name,
                licence=self.recipe.model.licence,
                method=method_line(self.outcome.edit),
            )
            write_atomic(card, text)
        if nothing:
            self.reporter.line("edit       method none: nothing is edited, so the gate cannot pass")

    def _edit(self, folder: Path) -> None:
        from uwm_deploy.stages.edit.edit import edit_to_folder

        score = read_record(ScoreRecord, self.work / "score" / "score.json")
        model, solve = self.original, self._solve()
        if self.trained:
            from uwm_deploy.stages.edit.trained import trained_to_folder

            trained_to_folder(model, self._load_trained(), score, self.recipe.entries, self.training, folder, solve)
            return
        scores = self.work / "score" / "scores.safetensors"
        edit_to_folder(model, score, scores, self.recipe.entries, folder, solve)
        del self.original  # it was edited in place; whoever needs the original loads it again

    def _solve(self) -> Solve | None:
        """Solves the closed-form step, if there is one."""
        if self.recipe.closed_form is None:
            return None
        from uwm_deploy.edits.solving import solver

        assert self.outcome.fit is not None
        return solver(self.recipe.closed_form, self.outcome.fit, self.work / "fit", self.reporter.line)

    def export(self) -> None:
        """Both graphs."""
        inputs = {
            "edit": digest_of_file(self.work / "edit" / STAMP),
            "export": digest_of_plain(plain_from_record(self.recipe.export)),
            "head": self.head_digest,
        }
        folder = self._stage("export", f"ONNX, opset {self.recipe.export.opset}", inputs, self._export)
        self.outcome.onnx = tuple(read_record(OnnxArtifact, folder / f"{t.value}.json") for t in TowerName)

    def _export(self, folder: Path) -> None:
        from uwm_deploy.edits.patch import Patch
        from uwm_deploy.stages.export import onnx_from_tower, sample_of

        edit = read_record(EditRecord, self.work / "edit" / "edit.json")
        patch = Patch.from_file(self.work / "edit" / "patch.safetensors")
        for name in TowerName:
            model = self._load(
                self.work / "edit" / "model"
            )  # anew, so that only one tower is in memory as it is exported
            ref = model.ref
            shapes = {TowerName.IMAGE: (3, ref.image.crop, ref.image.crop), TowerName.TEXT: (ref.text.context_length,)}
            model.to("cpu")
            model.keep_only(name)
            tower = model.tower(name)
            artifact = onnx_from_tower(
                tower,
                sample_of(tower, shapes[name], ref.text.eos_id),
                self.recipe.export,
                weights_digest=edit.edited_weights_digest,
                edits=edit.of(name),
                patch=patch,
                folder=folder,
                head_digest=self.head_digest if name is TowerName.IMAGE else "",
            )
            write_record(folder / f"{name.value}.json", artifact)

    def _canaries(self) -> Path:
        """Folder with the inputs where edited and original differ most; made of the calibration set."""
        inputs = {
            "edit": digest_of_file(self.work / "edit" / STAMP),
            "calibration": digest_of_plain(plain_from_record(self.calibration_source.record)),
        }
        return self._stage("canaries", "where edited and original differ most", inputs, self._choose_canaries)

    def _choose_canaries(self, folder: Path) -> None:
        from uwm_deploy.stages.canaries import PAIRS, canaries_to_folder

        edit = read_record(EditRecord, self.work / "edit" / "edit.json")
        for name in [tower for tower in TowerName if any(tensor.changed for tensor in edit.of(tower))]:
            pairs = self._pairs(name, PAIRS)
            canaries_to_folder(self.original.tower(name), self.edited.tower(name), pairs, folder)

    def _pairs(self, tower: TowerName, count: int) -> PairStream:
        """Some pairs of the calibration set, evenly spaced, at full length."""
        from uwm_deploy.edits.pair_stream import PairStream
        from uwm_deploy.edits.pairs import some_of
        from uwm_deploy.towers.batch_size import USUAL_PAIRS

        return PairStream(
            some_of(self.calibration_source, count),
            tower,
            self.original.ref.image,
            self._tokenizer(),
            batch_pairs=USUAL_PAIRS[TowerName.IMAGE],
            workers=0,
            max_broken_share=self.calibration.max_broken_share,
            progress=lambda *_: None,
            sort_by_length=False,
        )

    def compile(self) -> None:
        """Engines for every target and precision that can be compiled here."""
        engines: list[EngineArtifact] = []
        converted: list[OnnxArtifact] = []
        targets = [target for target in self.recipe.compile.targets if self._has_package(target)]
        for precision in self.recipe.compile.precisions:
            source, graphs = self._graphs(precision)
            converted += [graph for graph in graphs if graph.conversion]
            for target in targets:
                for provider in self.recipe.compile.providers(target):
                    engines += self._engines(target, provider, precision, source, graphs)
        if not engines:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.outcome.skipped.items())
            raise PrerequisiteError(f"nothing can be compiled here ({reasons})", fix="see `uwm-deploy doctor`")
        self.outcome.engines, self.outcome.converted = tuple(engines), tuple(converted)

    def _has_package(self, target: Target) -> bool:
        """Whether the target's package is here; without it the target is skipped, unless it was asked for by name."""
        if not (reason := missing_package(target)):
            return True
        if self.request.targets:
            raise PrerequisiteError(f"target {target.value}: {reason}", fix=f"install the extra [{target.value}]")
        self._skip(target.value, reason)
        return False

    def _skip(self, name: str, reason: str) -> None:
        self.outcome.skipped[name] = reason
        self.reporter.line(f"compile    {name} skipped: {reason}")

    def _graphs(self, precision: Precision) -> tuple[Path, tuple[OnnxArtifact, ...]]:
        """Folder and records of the graphs in a precision."""
        if precision is Precision.FP32:
            return self.work / "export", self.outcome.onnx
        spec = self.recipe.compile
        inputs = {
            "export": digest_of_file(self.work / "export" / STAMP),
            "canaries": digest_of_file(self._canaries() / STAMP),
            "float32": digest_of_plain(list(spec.float32)),
            "quantiser": f"{spec.quantiser} {versions(('nvidia-modelopt',))}",
            "auto": digest_of_plain(plain_from_record(spec.auto)) if precision is Precision.AUTO else "",
        }
        make = partial(self._convert, precision)
        folder = self._stage(f"convert-{precision.value}", f"graphs in {precision.value}", inputs, make)
        if precision is Precision.AUTO:
            self.outcome.plan = read_record(PrecisionPlan, folder / PLAN)
        return folder, tuple(read_record(OnnxArtifact, folder / f"{t.value}.json") for t in TowerName)

    def _convert(self, precision: Precision, folder: Path) -> None:
        from uwm_deploy.edits.patch import Patch
        from uwm_deploy.stages.canaries import read_canaries
        from uwm_deploy.stages.convert.convert import EIGHT_BITS, converted, ranges_of
        from uwm_deploy.stages.convert.search import Source

        spec, export = self.recipe.compile, self.work / "export"
        edit = read_record(EditRecord, self.work / "edit" / "edit.json")
        patch = Patch.from_file(self.work / "edit" / "patch.safetensors")
        lowered = spec.auto.lowest if precision is Precision.AUTO else precision
        sources: dict[TowerName, Source] = {}
        quantised: dict[TowerName, tuple[ir.Model, str]] = {}
        for graph in self.outcome.onnx:
            ranges = None
            if lowered in EIGHT_BITS:
                self.reporter.progress(f"ranges of the {graph.tower.value} tower", 0, 1)
                batches = list(self._pairs(graph.tower, _RANGE_PAIRS))
                rows = {"safe": [b.safe for b in batches], "unsafe": [b.unsafe for b in batches]}
                ranges = ranges_of(export / graph.file, rows, folder)
                if spec.quantiser != "built-in":
                    every = [*rows["safe"], *rows["unsafe"]]
                    quantised[graph.tower] = self._by_modelopt(
                        export / graph.file, EIGHT_BITS[lowered], self._float32(graph), every, folder
                    )
            sources[graph.tower] = Source(graph, export / graph.file, ranges, float32=self._float32_parts(graph))
        plan = self._searched(sources, folder) if precision is Precision.AUTO else None
        for graph in self.outcome.onnx:
            artifact = converted(
                graph,
                export,
                folder,
                precision=precision,
                lowered=lowered,
                patterns=self._float32(graph),
                layers=plan.kept[graph.tower.value] if plan else (),
                ranges=sources[graph.tower].ranges,
                edits=edit.of(graph.tower),
                patch=patch,
                canaries=read_canaries(self.work / "canaries", graph.tower),
                quantised=quantised.get(graph.tower),
            )
            write_record(folder / f"{graph.tower.value}.json", artifact)

    def _float32(self, graph: OnnxArtifact) -> tuple[str, ...]:
        """Patterns of what stays in float32 in a graph."""
        return (*self.recipe.compile.float32, *self._float32_parts(graph))

    def _float32_parts(self, graph: OnnxArtifact) -> tuple[str, ...]:
        """Patterns of its safety head and of a map behind its embedding, where it has them."""
        from uwm_deploy.towers.protocol import MAPS
        from uwm_deploy.towers.safety_head import FLOAT32

        has_map = (self.work / "edit" / "model" / MAPS).is_file()  # also one that the source model came with
        return (*((FLOAT32,) if graph.head_digest else ()), *((MAP_NAMES[graph.tower],) if has_map else ()))

    def _by_modelopt(
        self, source: Path, kind: Kind, patterns: Sequence[str], rows: Sequence[np.ndarray], folder: Path
    ) -> tuple[ir.Model, str]:
        """A graph that nvidia-modelopt quantised, calibrated on the same inputs, and what to call it in the record."""
        from uwm_deploy.graphs.modelopt import quantised_by_modelopt

        spec = self.recipe.compile
        method: Literal["entropy", "max"] = "max" if spec.quantiser == "modelopt-max" else "entropy"
        self.reporter.progress(f"modelopt, {source.stem} tower", 0, 1)
        model, version = quantised_by_modelopt(source, kind, method, patterns, rows, folder)
        return model, f"nvidia-modelopt {version}, {method}"

    def _searched(self, sources: Mapping[TowerName, Source], folder: Path) -> PrecisionPlan:
        """The plan of precision `auto`, searched on the calibration set, and its record."""
        from uwm_deploy.edits.pairs import some_of
        from uwm_deploy.stages.convert.search import search

        spec, progress = self.recipe.compile, self.reporter.progress
        items = some_of(self.calibration_source, spec.auto.items)
        prepared = prepare(
            items, self.original.ref.image, self._tokenizer(), workers=self.request.workers, progress=progress
        )
        plan = search(sources, prepared, spec.auto, spec.float32, folder, progress)
        write_record(folder / PLAN, plan)
        return plan

    def _engines(
        self, target: Target, provider: Provider, precision: Precision, source: Path, graphs: tuple[OnnxArtifact, ...]
    ) -> list[EngineArtifact]:
        """Both engines of one variant; none where the target does not know the precision."""
        variant = variant_name(target, precision, provider)
        inputs = {
            "graphs": digest_of_file(source / STAMP),
            "batch": digest_of_plain(plain_from_record(self.recipe.compile.batch)),
            "builder": digest_of_plain(plain_from_record(self.recipe.compile.builder(target, provider))),
            "machine": usable(target) or provider_reason(provider) or device_name(),
            "refittable": str(self.recipe.compile.refittable),
        }
        make = partial(self._compile, target, provider, source, graphs)
        try:
            folder = self._stage(
                f"compile-{variant}", f"{precision.value} for {_named(target, provider)}", inputs, make
            )
        except PrerequisiteError as error:
            self._skip(variant, error.what)
            return []
        return [read_record(EngineArtifact, folder / f"{t.value}.json") for t in TowerName]

    def _compile(
        self, target: Target, provider: Provider, source: Path, graphs: tuple[OnnxArtifact, ...], folder: Path
    ) -> None:
        from uwm_deploy.stages.compile import engine_from_onnx

        edit = read_record(EditRecord, self.work / "edit" / "edit.json")
        for graph in graphs:
            edits = edit.of(graph.tower)
            self.reporter.progress(f"{target.value} {graph.tower.value}", 0, 1)
            spec = self.recipe.compile
            engine = engine_from_onnx(
                graph,
                source,
                target,
                spec.profile,
                edits,
                folder,
                refittable=spec.refittable,
                profiles=spec.profiles,
                builder=spec.builder(target, provider),
                provider=provider,
            )
            write_record(folder / f"{graph.tower.value}.json", engine)

    def verify(self) -> None:
        """Numbers and decisions of original, edited and every artifact."""
        inputs = self._verify_inputs() if self.ranks.first else {}
        text = f"{self.evaluation.name}, {len(self.evaluation_source)} quadruples"
        folder = self._stage("verify", text, inputs, self._verify)
        if self.ranks.first:
            self.outcome.report = read_record(VerifyReport, folder / "verify.json")

    def _verify_inputs(self) -> dict[str, str]:
        """What the report is made from; canaries are chosen first where none are."""
        source = self.evaluation_source
        self._canaries()
        folders = ["edit", "export", "canaries", *sorted({f"compile-{e.variant}" for e in self.outcome.engines})]
        inputs = {name: digest_of_file(self.work / name / STAMP) for name in folders}
        inputs["calibration"] = digest_of_plain(plain_from_record(self.calibration_source.record))
        inputs["evaluation"] = digest_of_plain(plain_from_record(self.evaluation_source.record))
        inputs["zero_shot"] = digest_of_plain([self._zero_shot_digests(source), sorted(source.zero_shot_missing)])
        return inputs

    def _zero_shot_digests(self, source: QuadrupleSource) -> dict[str, Digest]:
        return {name: digest_of_plain(fingerprint_of(source.zero_shot(name))) for name in source.zero_shot_names}

    def _verify(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        from uwm_deploy.edits.proof import proof_of
        from uwm_deploy.stages.canaries import read_canaries
        from uwm_deploy.stages.verify.executed import RiskReference
        from uwm_deploy.stages.verify.verify import EMBED_BATCH, embed_model, evidence_of, risks_of_model

        progress, workers, ranks = self.reporter.progress, self.request.workers, self.ranks
        ref = self.original.ref
        prepared = prepare(
            self.evaluation_source,
            ref.image,
            self._tokenizer(),
            workers=workers,
            progress=progress,
            batch=EMBED_BATCH,
            ranks=ALONE if ranks.first else ranks,  # the first runs every artifact on all of it
        )
        original = embed_model(self.original, prepared, "evaluation, original", progress, ranks)
        expected = self._expected()
        del self.original  # one model in memory at a time
        edited = embed_model(self.edited, prepared, "evaluation, edited", progress, ranks)
        if not ranks.first:
            return
        found = {name: read_canaries(self.work / "canaries", name) for name in TowerName}
        canaries = {name: part for name, part in found.items() if part is not None}
        risk = None
        if self.head is not None:
            risk = RiskReference(self.head.record, risks_of_model(self.edited, prepared, progress))
            save_file(risk.found.to_tensors(), folder / "risks.safetensors")
        evidence, yardstick = [], yardstick_of(original)
        for subject in self._subjects():
            evidence.append(evidence_of(subject, self.edited, edited, prepared, canaries, progress, risk, yardstick))
            for session in (subject.sessions or {}).values():
                session.close()
        report = VerifyReport(
            model=ref,
            edited_weights_digest=self.edited.ref.weights_digest,
            evaluation=self.evaluation_source.record,
            calibration_overlap=self._overlap(),
            original=safety_report("original", original, with_items=True, yardstick=yardstick),
            edited=safety_report("edited", edited, with_items=True, yardstick=yardstick),
            edit_effect=flips_between(original, edited, yardstick),
            edit_worst=worst_items("edited", original, edited),
            hard_safe=yardstick.hard_ids(),
            hard_safe_worst=hard_safe_worst(yardstick, edited),
            zero_shot_digests=self._zero_shot_digests(self.evaluation_source),
            edit_proof=proof_of(expected, self.edited.named_parameters()),
            goldens=self._goldens(),
            data=data_health(original, self.calibration_source.record.concepts),
            artifacts=tuple(evidence),
            versions=versions(_BUILD_PACKAGES + _RUN_PACKAGES),
            head_digest=self.head_digest,
            risk=risk_report(risk.head, risk.found) if risk else None,
            head_overlap=self._head_overlap(prepared),
        )
        write_record(folder / "verify.json", report)
        save_file(original.to_tensors("original") | edited.to_tensors("edited"), folder / "reference.safetensors")

    def _expected(self) -> Expected:
        """What the edited model must be, made again from what its steps were made from."""
        from uwm_deploy.edits.expected import MadeFrom, expected_edit

        made_from = MadeFrom(
            original=self.original,
            score=read_record(ScoreRecord, self.work / "score" / "score.json"),
            scores=self.work / "score" / "scores.safetensors",
            fit=self.work / "fit",
            before=lambda: self._before_closed_form()[0],
            trained=self._load_trained if self.trained else None,
            training=self.training,
        )
        edit = read_record(EditRecord, self.work / "edit" / "edit.json")
        return expected_edit(self.recipe, made_from, edit, self._patch())

    def _goldens(self) -> Goldens:
        """The runtime and the towers against the source library."""
        from uwm_deploy.stages.verify.goldens import goldens_of
        from uwm_deploy.towers.library import library_of

        model = self.edited
        library = library_of(self.recipe.model.family, model.source, self.work / "edit" / "model", model.ref.text)
        return goldens_of(model, library)

    def _head_overlap(self, prepared: PreparedSet) -> int:
        """Evaluation items whose images the safety head was trained or calibrated on."""
        if self.head is None:
            return 0
        rows = range(len(prepared.ids))
        pairs = ((prepared.safe_pixels[i : i + 1][0], prepared.unsafe_pixels[i : i + 1][0]) for i in rows)
        return sum(digest_of_pair(*pair) in self.head.items for pair in pairs)

    def _overlap(self) -> int:
        """Evaluation items whose content is also in the calibration set."""
        sets = [
            content_digests(source, workers=self.request.workers, progress=self.reporter.progress)
            for source in (self.calibration_source, self.evaluation_source)
        ]
        return overlap(*sets)

    def _subjects(self) -> Iterator[Subject]:
        """The exported graphs, then every variant; sessions are opened one subject at a time."""
        from uwm_deploy.stages.verify.verify import Subject

        graphs, batch = {g.tower: g for g in self.outcome.onnx}, self.recipe.compile.profile
        outputs = {tower: graph.outputs for tower, graph in graphs.items()}
        shared: dict[str, Any] = {
            "outputs": outputs,
            "normalised": self.recipe.export.normalise,
            "max_batch": batch.max,
            "opt_batch": batch.opt,
        }
        sessions = {
            tower: open_session(
                Target.ONNXRUNTIME,
                (self.work / "export" / graph.file).read_bytes(),
                profile=batch,
                inputs=graph.inputs,
                outputs=graph.outputs,
                external_data=_external(self.work / "export", graph.external_data),
                device="cpu",
                optimisation="extended",
            )
            for tower, graph in graphs.items()
        }
        digests = {tower.value: graph.digest for tower, graph in graphs.items()}
        yield Subject(
            variant=EXPORTED,
            precision=Precision.FP32,
            digests=digests,
            sessions=sessions,
            reason="",
            audit=self._audit_graphs,
            **shared,
        )
        for variant in dict.fromkeys(e.variant for e in self.outcome.engines):
            parts = {e.tower: e for e in self.outcome.engines if e.variant == variant}
            first = next(iter(parts.values()))
            precision = Precision(first.precision)
            reason, opened = reason_not_executable(first), None
            if not reason:
                try:
                    opened = {tower: self._open(engine) for tower, engine in parts.items()}
                except PrerequisiteError as error:  # the driver is there, the engine does not fit it
                    reason = error.what
            digests = {tower.value: engine.digest for tower, engine in parts.items()}
            yield Subject(
                variant=variant,
                precision=precision,
                digests=digests,
                sessions=opened,
                reason=reason,
                audit=partial(self._audit_engines, parts),
                **shared,
            )

    def _audit_graphs(self) -> dict[str, GraphAudit]:
        """Weights in the exported graphs."""
        from uwm_deploy.stages.verify.audit import audit_of_graph

        return {
            graph.tower.value: audit_of_graph(
                self.work / "export" / graph.file,
                self.edited.tower(graph.tower).graph_module(),
                self._edits_of(graph.tower),
                self._patch(),
            )
            for graph in self.outcome.onnx
        }

    def _audit_engines(self, parts: Mapping[TowerName, EngineArtifact]) -> dict[str, GraphAudit]:
        """Edited weights in the engines of a variant; one of TensorRT cannot be read."""
        from uwm_deploy.stages.verify.audit import audit_of_engine

        sources = {graph.digest: self.work / "export" / graph.file for graph in self.outcome.onnx}
        for graph in self.outcome.converted:
            assert graph.conversion is not None
            sources[graph.digest] = self.work / f"convert-{graph.conversion.precision.value}" / graph.file
        return {
            tower.value: audit_of_engine(
                self.work / f"compile-{engine.variant}" / engine.file,
                sources[engine.onnx_digest],
                Precision(engine.precision),
                self._edits_of(tower),
                self._patch(),
            )
            for tower, engine in parts.items()
            if engine.target is Target.ONNXRUNTIME and provider_of(engine) not in COMPILING
        }

    def _edits_of(self, tower: TowerName) -> list[TensorEdit]:
        assert self.outcome.edit is not None
        return self.outcome.edit.of(tower)

    def _patch(self) -> Patch:
        from uwm_deploy.edits.patch import Patch

        return Patch.from_file(self.work / "edit" / "patch.safetensors")

    def _open(self, engine: EngineArtifact) -> Session:
        folder = self.work / f"compile-{engine.variant}"
        return open_engine(engine, (folder / engine.file).read_bytes(), _external(folder, engine.external_data))

    def gate(self) -> None:
        """The verdict."""
        report = self.work / "verify" / "verify.json"
        today = datetime.now(UTC).date()
        inputs = {
            "verify": digest_of_file(report),
            "policy": self.policy_digest,
            "baseline": self.baseline[1] if self.baseline else "",
            "expired": digest_of_plain([waiver.expires < today for waiver in self.policy.waiver]),
            "code": self.base_inputs["code"],
        }
        folder = self._stage("gate", f"policy {self.policy.name}", inputs, self._gate)
        self.outcome.verdict = read_record(Verdict, folder / "verdict.json")

    def _gate(self, folder: Path) -> None:
        file = self.work / "verify" / "verify.json"
        judge = _judge(self.policy, self.policy_digest, self.baseline)
        verdict = judge(read_record(VerifyReport, file), digest_of_file(file))
        write_record(folder / "verdict.json", verdict)

    def package(self) -> None:
        """The bundle."""
        outcome = self.outcome
        assert outcome.edit is not None
        assert outcome.score is not None
        assert outcome.verdict is not None
        self.outcome.out = self.out
        manifest = Manifest(
            name=self.recipe.name,
            tool_version=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=outcome.edit.model,
            edit=outcome.edit,
            calibration=outcome.score.calibration,
            recipe=self.recipe_text,
            recipe_digest=digest_of_bytes(self.recipe_text.encode()),
            onnx=outcome.onnx,
            engines=outcome.engines,
            converted=outcome.converted,
            verdict=outcome.verdict,
            versions=versions(_BUILD_PACKAGES + _RUN_PACKAGES),
            files=(),
            bundle_version=self.recipe.bundle_version,
            head=self.head.record if self.head else None,
        )
        assert outcome.report is not None
        self._write_card(manifest, outcome.report)
        if self._is_packaged(manifest):
            outcome.reused.append("package")
            self.reporter.line("package    unchanged, reused")
            return
        refuse_foreign_folder(self.out)
        note_lost_signature(self.out, self.reporter)
        with self.reporter.stage("package", str(self.out)):
            parts = self._parts() | {CARD: _card(manifest, outcome.report, bundle=True).encode()}
            outcome.manifest = bundle_from_parts(self.out, manifest, parts)

    def _write_card(self, manifest: Manifest, report: VerifyReport) -> None:
        """The numbers come after the edited model was saved; its card is no part of what the stage made."""
        write_atomic(self.work / "edit" / "model" / CARD, _card(manifest, report, bundle=False))

    def _is_packaged(self, manifest: Manifest) -> bool:
        """Whether the bundle there is this one, time of creation apart."""
        try:
            there = open_bundle(self.out, allow_failed=True).manifest
        except UwmError:
            return False
        self.outcome.manifest = there
        # What is filled in as it is written follows from the rest.
        return dataclasses.replace(there, created="", files=(), spaces={}) == dataclasses.replace(manifest, created="")

    def _parts(self) -> dict[str, Path | bytes]:
        """Path inside the bundle to its source."""
        parts: dict[str, Path | bytes] = {
            "recipe.toml": self.recipe_text.encode(),
            "evaluation.toml": self.evaluation_text.encode(),
            "tokenizer.json": self.edited.tokenizer_json,
            "patch.safetensors": self.work / "edit" / "patch.safetensors",
            "reports/score.json": self.work / "score" / "score.json",
            "reports/edit.json": self.work / "edit" / "edit.json",
            "reports/verify.json": self.work / "verify" / "verify.json",
            "reports/verdict.json": self.work / "gate" / "verdict.json",
            "evidence/reference.safetensors": self.work / "verify" / "reference.safetensors",
        }
        for graph in self.outcome.onnx:
            for name in filter(None, (graph.file, graph.external_data)):
                parts[f"onnx/{name}"] = self.work / "export" / name
        for engine in self.outcome.engines:
            folder = self.work / f"compile-{engine.variant}"
            parts |= {path: folder / Path(path).name for path in engine_paths(engine)}
        if (plan := self.work / "convert-auto" / PLAN).is_file() and self.outcome.plan:
            parts["reports/plan.json"] = plan
        if self.head is not None:
            parts |= {f"{PLACE}/{WEIGHTS}": self.head.weights, f"{PLACE}/{TEXTS}": self.head.texts}
            parts["evidence/risks.safetensors"] = self.work / "verify" / "risks.safetensors"
        if self.training is not None:
            parts["reports/training.json"] = json_from_record(self.training).encode()
        if self.baseline is not None:
            parts[BASELINE] = json_from_record(self.baseline[0]).encode()
        for tower in TowerName:
            if (file := self.work / "canaries" / f"{tower.value}.safetensors").is_file():
                parts[f"evidence/canaries-{tower.value}.safetensors"] = file
        return parts


def _named(target: Target, provider: Provider) -> str:
    return target.value if provider == "any" else f"{target.value} with {provider}"


def _external(folder: Path, name: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes()} if name and (folder / name).is_file() else {}


def _recipe_of_base(recipe: Recipe, request: Request) -> Recipe:
    """The recipe with the base as its source model.

    Raises:
        InputError: If nobody says what that is.
    """
    source = recipe.model
    if request.weights == "random":
        raise InputError("method trained needs weights that were trained", fix="leave --weights random out")
    if not (request.original or source.base):
        raise InputError(
            f"method trained compares {recipe.name} with the model it was trained from, which its recipe does not name",
            fix="pass --original FOLDER with that model's weights, or put an edit on top with --method uwm",
        )
    base = str(request.original.resolve()) if request.original else source.base
    revision = "" if request.original else source.base_revision
    return dataclasses.replace(recipe, model=dataclasses.replace(source, repo=base, revision=revision))


def _training_at(repo: str) -> TrainingRecord | None:
    return read_training(Path(repo)) if Path(repo).is_dir() else None


def accept_baseline(
    path: Path,
    policy_name: str,
    at: Path,
    *,
    by: str,
    reason: str,
    reporter: Reporter,
    signing: Resigning | None = None,
) -> tuple[Verdict, Digest | None]:
    """Stores a report as the baseline, if it passes the policy, limits since the baseline apart.

    Args:
        path: Bundle or `verify.json`.
        policy_name: Name or file.
        at: Folder or bundle that the baseline is stored in.
        by: Who accepts it.
        reason: Why.
        reporter: Progress.
        signing: What is to become of the signature of the bundle `at`.

    Returns:
        The verdict, and the digest of the baseline's file; None when the report does not pass and nothing was stored.

    Raises:
        InputError: If there is no report; if `at` is signed and would lose that unasked, or is no bundle and has a key.
        IntegrityError: If the bundle or the report was changed, or is not signed by the right key.
    """
    seal = seal_for(signing or Resigning(), at)
    if not is_bundle(at) and (seal.sign or seal.public_key):
        raise InputError(f"{at} is no bundle, so it has no signature", fix="leave the keys out")
    policy, policy_digest = policy_of(policy_name)
    report, digest = report_at(path)
    verdict = _judge(dataclasses.replace(policy, baseline=()), policy_digest, None)(report, digest)
    if verdict.result is not Result.PASS:
        return verdict, None
    baseline = accepted(report, verdict, by=by, reason=reason)
    digest = write_baseline(at, baseline, partial(bundle_from_parts, sign=seal.sign), public_key=seal.public_key)
    note_signature(at, seal, reporter)
    return verdict, digest


def attest_bundle(
    path: Path,
    policy_name: str,
    evaluation: str | None,
    workers: int,
    reporter: Reporter,
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
    from uwm_deploy.pipeline.attest import attest

    seal = seal_for(signing or Resigning(), path)
    with locked(lock_of_bundle(path)):
        bundle = open_bundle(path, allow_failed=True, public_key=seal.public_key)
        judge = judge_of_bundle(path, policy_name)
        with reporter.stage("attest", str(path)):
            verdict = attest(
                bundle,
                evaluation_source_of(bundle, evaluation),
                judge,
                partial(bundle_with_card, sign=seal.sign),
                workers=workers,
                progress=reporter.progress,
            )
        note_signature(path, seal, reporter)
    return verdict
