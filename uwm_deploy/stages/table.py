"""The stages as data: their order, what each reads, what it depends on, and how it is made. Nothing else knows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from uwm_deploy.data.zero_shot_suite import zero_shot_digests
from uwm_deploy.edits.methods import needs_gradients, selects
from uwm_deploy.errors import PrerequisiteError, UwmError
from uwm_deploy.recipes.recipe import is_folder
from uwm_deploy.records.codec import plain_from_record
from uwm_deploy.records.edit import Method
from uwm_deploy.records.files import digest_of_folder, digest_of_plain
from uwm_deploy.records.graph import Precision, variant_name
from uwm_deploy.records.model import LOCAL, TowerName
from uwm_deploy.runtime.providers import provider_reason
from uwm_deploy.runtime.session import missing_package, usable
from uwm_deploy.runtime.tensorrt import device_name
from uwm_deploy.runtime.versions import versions
from uwm_deploy.stages.job import ONLY, Plan, Variant


def _once(_: Plan) -> Iterable[Variant]:
    """One folder."""
    return (ONLY,)


def _nothing(_: Plan, __: Variant) -> object:
    """No settings of its own."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage.

    Attributes:
        name: Its folder, its row in the docs, and its command.
        command: Whether it has one; what has none runs on the way to the others.
        does: What it does, for the docs.
        make: ``module:function`` that fills a folder from a `Job`; imported only when it runs.
        reads: Stages whose folders it reads. A folder of theirs of another precision is not read.
        sources: Keys of `SOURCES` that it reads.
        settings: Every option that changes what it leaves, as plain data.
        says: What the log says of it.
        each: Its folders; none where it has no work.
        leaves_out: Folders that it cannot make here, with the reason, known beforehand.
        libraries: Distributions whose versions change the result.
        shared: Whether several processes work on it.
        skips: Errors that leave a folder out, with their reason.
        needs_one: Whether it is an error when every folder is left out.
        still_there: ``module:function`` that says whether what it left outside its folder is still there.
        scratch: Folder where its work waits while it is under way; it is removed when the stage is done.
        warns: What a user might not expect of it, said whether it was made or reused.
    """

    name: str
    command: bool = True
    does: str
    make: str
    reads: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    settings: Callable[[Plan, Variant], object] = _nothing
    says: Callable[[Plan, Variant], str]
    each: Callable[[Plan], Iterable[Variant]] = _once
    leaves_out: Callable[[Plan], Mapping[str, str]] = lambda _: {}
    libraries: tuple[str, ...] = ()
    shared: bool = False
    skips: tuple[type[UwmError], ...] = ()
    needs_one: bool = False
    still_there: str = ""
    scratch: Callable[[Plan], Path | None] = lambda _: None
    warns: Callable[[Plan], str] = lambda _: ""

    @property
    def module(self) -> str:
        """Module of `make`."""
        return self.make.partition(":")[0]


# --- what lies outside the run folder ------------------------------------------------------------------------------


def _checkpoint(plan: Plan) -> object:
    """The source weights, those they are measured with, and what records call them.

    A folder's path is in no record, so a checkpoint that was moved is the same one.
    """
    source = plan.recipe.model
    return [
        plan.recipe.name,
        source.family,
        LOCAL if is_folder(source.repo) else [source.repo, source.revision],
        digest_of_folder(plan.checkpoint) if plan.checkpoint else digest_of_plain(plan.recipe_text),
        digest_of_folder(plan.companion) if plan.companion else "",
        plan.weights,
    ]


def _trained(plan: Plan) -> object:
    training = plain_from_record(plan.training) if plan.training else None
    return [digest_of_folder(plan.trained_folder) if plan.trained_folder else "", training]


def _evaluation(plan: Plan) -> object:
    source = plan.evaluation_source
    return [plain_from_record(source.record), zero_shot_digests(source), sorted(source.zero_shot_missing)]


SOURCES: Mapping[str, Callable[[Plan], object]] = {
    "checkpoint": _checkpoint,
    "trained": _trained,
    "calibration": lambda plan: plain_from_record(plan.calibration_source.record),
    "calibration zero-shot": lambda plan: zero_shot_digests(plan.calibration_source),
    "evaluation": _evaluation,
    "safety head": lambda plan: plan.head_digest,
    "policy": lambda plan: plan.policy_digest,
    "baseline": lambda plan: plan.baseline[1] if plan.baseline else "",
    "downstream": lambda plan: [plain_from_record(report) for report in plan.downstream],
}
"""What a run reads beside the folders of its stages, each as plain data that changes when it does."""


# --- settings ------------------------------------------------------------------------------------------------------


def _score_settings(plan: Plan, _: Variant) -> object:
    edits = plan.recipe.entries
    formulas = {
        tower.value: [spec.rule.value, list(spec.layers), spec.pairing.value, spec.gradient_batch]
        for tower in TowerName
        for spec in (edits.of(tower),)
    }
    seed = plan.calibration.seed if needs_gradients(edits.method) else None
    # Masks of the two dtypes are compared as the recipe selects them.
    compared = plain_from_record(edits) if plan.score_dtype == "bfloat16" else None
    broken = plan.calibration.max_broken_share
    return [
        edits.method.value,
        edits.per_concept,
        list(edits.towers),
        seed,
        formulas,
        plan.score_dtype,
        compared,
        broken,
    ]


def _fit_settings(plan: Plan, _: Variant) -> object:
    spec = plan.recipe.closed_form
    step = [spec.method.value, spec.axis.placement] if spec else None
    return [plain_from_record(plan.recipe.entries), step, plan.calibration.max_broken_share]


def _edit_settings(plan: Plan, _: Variant) -> object:
    recipe = plan.recipe
    return [plain_from_record(recipe.edit), recipe.name, recipe.model.licence]


def _convert_settings(plan: Plan, variant: Variant) -> object:
    spec = plan.recipe.compile
    auto = plain_from_record(spec.auto) if variant.precision is Precision.AUTO else None
    return [list(spec.float32), spec.quantiser, versions(("nvidia-modelopt",)), auto]


def _compile_settings(plan: Plan, variant: Variant) -> object:
    spec, target = plan.recipe.compile, variant.target
    assert target is not None
    return {
        "batch": plain_from_record(spec.batch),
        "builder": plain_from_record(spec.builder(target, variant.provider)),
        "machine": usable(target) or provider_reason(variant.provider) or device_name(),
        "refittable": spec.refittable,
        "attention": spec.attention,
    }


def _verify_settings(plan: Plan, _: Variant) -> object:
    # The edit is made again from what was asked for, and compared with its record.
    return [plain_from_record(part) for part in (plan.recipe.edit, plan.recipe.export, plan.recipe.compile.batch)]


def _gate_settings(plan: Plan, _: Variant) -> object:
    today = datetime.now(UTC).date()
    return [waiver.expires < today for waiver in plan.policy.waiver]


def _package_settings(plan: Plan, _: Variant) -> object:
    recipe = plan.recipe
    return [
        recipe.name,
        recipe.model.licence,
        recipe.bundle_version,
        plan.recipe_text,
        plan.evaluation_text,
        str(plan.evaluation_base),
        str(plan.out.resolve()),
    ]


# --- folders -------------------------------------------------------------------------------------------------------


def _if_closed_form(plan: Plan) -> Iterable[Variant]:
    return (ONLY,) if plan.recipe.closed_form else ()


def _precisions(plan: Plan) -> Iterator[Variant]:
    for precision in plan.recipe.compile.precisions:
        if precision is not Precision.FP32:
            yield Variant(name=precision.value, precision=precision)


def _variants(plan: Plan) -> Iterator[Variant]:
    spec = plan.recipe.compile
    for precision in spec.precisions:
        for target in spec.targets:
            for provider in () if missing_package(target) else spec.providers(target):
                name = variant_name(target, precision, provider)
                yield Variant(name=name, precision=precision, target=target, provider=provider)


def _without_package(plan: Plan) -> Mapping[str, str]:
    targets = plan.recipe.compile.targets
    return {target.value: reason for target in targets if (reason := missing_package(target))}


# --- words ---------------------------------------------------------------------------------------------------------


def _named_method(plan: Plan, text: str) -> str:
    """A line about a stage; the default method is not worth a word."""
    edits = plan.recipe.entries
    words = [] if plan.recipe.method == Method.UWM else [plan.recipe.method]
    return ", ".join([*words, *(["per concept"] if edits.per_concept else []), text])


def _says_set(plan: Plan, _: Variant) -> str:
    return _named_method(plan, plan.calibration.name)


def _says_edit(plan: Plan, _: Variant) -> str:
    selecting = ["select, multiply"] if selects(plan.recipe.entries.method) else []
    return _named_method(plan, ", ".join([*selecting, *(["solve"] if plan.recipe.closed_form else []), "save"]))


def _warns_of_no_edit(plan: Plan) -> str:
    if plan.recipe.entries.method is not Method.NONE:
        return ""
    return "edit       method none: nothing is edited, so the gate cannot pass"


def _says_compile(_: Plan, variant: Variant) -> str:
    assert variant.target is not None
    assert variant.precision is not None
    with_provider = "" if variant.provider == "any" else f" with {variant.provider}"
    return f"{variant.precision.value} for {variant.target.value}{with_provider}"


_TORCH = ("torch", "transformers", "open_clip_torch", "timm", "numpy", "pillow", "tokenizers")
_ORT = ("onnxruntime-gpu", "onnxruntime")

STAGES: tuple[Stage, ...] = (
    Stage(
        name="score",
        does="Scores every edited layer on the calibration set.",
        make="uwm_deploy.stages.score.make:make",
        sources=("checkpoint", "calibration"),
        settings=_score_settings,
        says=_says_set,
        libraries=_TORCH,
        shared=True,
        scratch=lambda plan: plan.folder.scoring,
    ),
    Stage(
        name="fit",
        does="Sums the features that a closed-form step is solved from; only for a method that has one.",
        make="uwm_deploy.stages.fit:make",
        reads=("score",),
        sources=("checkpoint", "trained", "calibration", "calibration zero-shot"),
        settings=_fit_settings,
        says=_says_set,
        each=_if_closed_form,
        libraries=_TORCH,
        shared=True,
        scratch=lambda plan: plan.folder.fitting,
    ),
    Stage(
        name="edit",
        does="Makes the patch and the edited model, and checks that nothing else changed.",
        make="uwm_deploy.stages.edit.make:make",
        reads=("score", "fit"),
        sources=("checkpoint", "trained"),
        settings=_edit_settings,
        says=_says_edit,
        libraries=_TORCH,
        warns=_warns_of_no_edit,
    ),
    Stage(
        name="canaries",
        command=False,
        does="Chooses the inputs on which original and edited differ most.",
        make="uwm_deploy.stages.canaries:make",
        reads=("edit",),
        sources=("checkpoint", "calibration", "safety head"),
        settings=lambda plan, _: plan.recipe.export.pixels,
        says=lambda *_: "where edited and original differ most",
        libraries=_TORCH,
    ),
    Stage(
        name="export",
        does="Exports both towers to ONNX, and checks that the edit is in the graphs.",
        make="uwm_deploy.stages.export:make",
        reads=("edit",),
        sources=("safety head",),
        settings=lambda plan, _: plain_from_record(plan.recipe.export),
        says=lambda plan, _: f"ONNX, opset {plan.recipe.export.opset}",
        libraries=(*_TORCH, "onnx", "onnxscript", "onnx-ir"),
    ),
    Stage(
        name="convert",
        command=False,
        does="Converts the graphs to each lower precision, and checks that the edit is still there.",
        make="uwm_deploy.stages.convert.make:make",
        reads=("edit", "export", "canaries"),
        sources=("checkpoint", "calibration"),
        settings=_convert_settings,
        says=lambda _, variant: f"graphs in {variant.name}",
        each=_precisions,
        libraries=(*_TORCH, *_ORT, "onnx", "onnx-ir"),
    ),
    Stage(
        name="compile",
        does="Compiles an engine for every target and precision.",
        make="uwm_deploy.stages.compile:make",
        reads=("edit", "export", "convert"),
        sources=("checkpoint", "calibration"),
        settings=_compile_settings,
        says=_says_compile,
        each=_variants,
        leaves_out=_without_package,
        libraries=(*_ORT, "numpy", "onnx", "onnx-ir", "tensorrt_rtx", "tensorrt"),
        skips=(PrerequisiteError,),
        needs_one=True,
    ),
    Stage(
        name="verify",
        does="Measures the original, the edited model and every artifact that can be executed here.",
        make="uwm_deploy.stages.verify.make:make",
        reads=("score", "fit", "edit", "export", "convert", "compile", "canaries"),
        sources=("checkpoint", "trained", "calibration", "evaluation", "safety head"),
        settings=_verify_settings,
        says=lambda plan, _: f"{plan.evaluation.name}, {len(plan.evaluation_source)} quadruples",
        libraries=(*_TORCH, *_ORT, "onnx", "onnx-ir", "onnxscript", "polygraphy", "tensorrt_rtx", "tensorrt"),
        shared=True,
    ),
    Stage(
        name="gate",
        does="Judges the report by the policy.",
        make="uwm_deploy.stages.gate.make:make",
        reads=("edit", "export", "compile", "verify"),
        sources=("evaluation", "policy", "baseline", "downstream"),
        settings=_gate_settings,
        says=lambda plan, _: f"policy {plan.policy.name}",
    ),
    Stage(
        name="package",
        does="Writes the bundle with everything that ships.",
        make="uwm_deploy.stages.package:make",
        reads=("score", "edit", "export", "convert", "compile", "canaries", "verify", "gate"),
        sources=("trained", "baseline", "safety head", "downstream"),
        settings=_package_settings,
        says=lambda plan, _: str(plan.out),
        still_there="uwm_deploy.stages.package:is_there",
    ),
)
"""Every stage, in order."""

NAMES = tuple(stage.name for stage in STAGES)
"""Their names, in order."""
