"""Recipes (`export/`) and data sets (`calibration/`): TOML files to records, strictly."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from uwm_deploy.errors import RecipeError
from uwm_deploy.recipes.strict_toml import record_from_toml
from uwm_deploy.records.edit import CLOSED_FORM, Method, Pairing, Rule, Selection, methods_name
from uwm_deploy.records.graph import Precision, Profile, Provider, Target
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting

Family = Literal["hf-clip", "siglip", "open-clip", "llava"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Sizes of the towers, enough to make the model with random weights and without its checkpoint.

    Attributes:
        open_clip: Name of one of open_clip's own configurations; then the tables below only change it.
        text: Entries of the text tower's configuration in the family's own names.
        image: The same for the image tower.
        projection_dim: Size of the shared embedding space, where it is not part of the tables.
    """

    open_clip: str = ""
    text: Mapping[str, int | float | str] = field(default_factory=dict)
    image: Mapping[str, int | float | str] = field(default_factory=dict)
    projection_dim: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where the checkpoint comes from.

    Attributes:
        family: Tower adapter.
        repo: ``"shipped:<folder>"``, a Hugging Face id, or a local folder.
        revision: Hub commit; needed for a hub id so that a build can be repeated.
        licence: SPDX name or a short statement, shown by `uwm-deploy models`.
        parameters: Approximate number, shown by `uwm-deploy models`.
        architecture: What `--weights random` builds when the checkpoint is not at hand.
        companion: For a vision tower alone: CLIP checkpoint whose text tower it is measured with, like `repo`.
        companion_revision: Hub commit of the companion.
        base: For weights that were trained for safety: the checkpoint they were trained from, like `repo`; what the method
            `trained` compares them with.
        base_revision: Hub commit of the base.
    """

    family: Family
    repo: str
    revision: str = ""
    licence: str = "unknown"
    parameters: str = ""
    architecture: Architecture | None = None
    companion: str = ""
    companion_revision: str = ""
    base: str = ""
    base_revision: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EditSpec:
    """What is edited in one tower.

    Attributes:
        rule: How scores are formed (method.md section 2).
        layers: Glob patterns over module paths; one that matches nothing is an error.
        keep_mass: Share that is left as it is, between 0 and 1: of each layer's score mass, or of its entries when
            `selection` is hard.
        factor: Multiplier of the selected entries; -1 negates.
        pairing: Mean of ratios (the official code) or ratio of means (the paper's wording); for the method `uwm`.
        selection: By score mass (Eq. 11) or by number of entries.
        gradient_batch: Pairs per gradient, for the gradient baselines; 0 takes the published number.
    """

    rule: Rule
    layers: tuple[str, ...]
    keep_mass: float
    factor: float = -1.0
    pairing: Pairing = Pairing.MEAN_OF_RATIOS
    selection: Selection = Selection.ADAPTIVE
    gradient_batch: int = 0


BOTH_TOWERS = (TowerName.TEXT, TowerName.IMAGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class EditSpecs:
    """The step that selects entries, one EditSpec per tower; with the methods that select nothing it is empty-handed.

    Attributes:
        method: The method that the values below are for (docs/methods.md).
        per_concept: One score per concept of the set, selections united.
        towers: Those that are scored and edited; the other one goes through the chain as it is.
    """

    text: EditSpec
    image: EditSpec
    method: Method = Method.UWM
    per_concept: bool = False
    towers: tuple[TowerName, ...] = BOTH_TOWERS

    def of(self, tower: TowerName) -> EditSpec:
        """The one of a tower."""
        return self.image if tower is TowerName.IMAGE else self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisSpec:
    """How a closed-form step is placed, and how its strength is chosen (docs/safety-axis.md).

    Attributes:
        placement: Into the weights, or behind the embedding; `auto` takes the weights where the family can.
        max_retrieval_loss: Most points of safe retrieval (R@1, mean of both directions) that the choice may lose.
        max_hard_safe_loss: Most points of retrieval (R@10) among the safe items that look most unsafe.
        max_zero_shot_loss: Most points of the zero-shot mean.
        setting: Instead of a choice.
    """

    placement: Literal["auto", "weights", "embedding"] = "auto"
    max_retrieval_loss: float = 4.0
    max_hard_safe_loss: float = 8.0
    max_zero_shot_loss: float = 1.0
    setting: AxisSetting | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpec:
    """One ``[[edit]]`` of a recipe: a step of the edit.

    Attributes:
        method: What the values below are for (docs/methods.md).
        per_concept: See `EditSpecs`.
        towers: See `EditSpecs`.
        text: Of a method that selects entries.
        image: Of a method that selects entries.
        axis: Of a closed-form method.
    """

    method: Method = Method.UWM
    per_concept: bool = False
    towers: tuple[TowerName, ...] = BOTH_TOWERS
    text: EditSpec | None = None
    image: EditSpec | None = None
    axis: AxisSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedForm:
    """A closed-form step: method and settings."""

    method: Method
    axis: AxisSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Which sets are used, by the name of their file in `calibration/` (without `.toml`).

    Attributes:
        calibration: Scores come from it.
        evaluation: SafeGround is measured on it; it must not overlap the other.
    """

    calibration: str
    evaluation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSpec:
    """How the ONNX graphs are made.

    Attributes:
        opset: ONNX operator set.
        normalise: Whether the graph ends with L2 normalisation.
        ids_dtype: Element type of the text graph's `input_ids`.
        attention: Its steps one by one, or one `Attention` node each, which needs opset 23.
    """

    opset: int = 20
    normalise: bool = True
    ids_dtype: Literal["int64", "int32"] = "int64"
    attention: Literal["steps", "fused"] = "steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoSpec:
    """The search of precision `auto`.

    Attributes:
        lowest: What the search begins with in every linear layer.
        flips: Budget: largest share of decisions that may differ from the edited model's, in percent.
        items: Quadruples of the calibration set that the search measures on.
    """

    lowest: Precision = Precision.INT8
    flips: float = 0.5
    items: int = 512


Quantiser = Literal["built-in", "modelopt-entropy", "modelopt-max"]

CURRENT_GPU = "current"
"""Stands for the compute capability of the GPU that an engine is built on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuilderSpec:
    """How one flavour of TensorRT builds its engines (docs/compile.md).

    Attributes:
        workspace_mib: Most memory in MiB that a layer may take for itself while it runs; 0 sets no limit.
        optimisation_level: From 0, which builds fastest, to 5, which searches longest.
        tf32: Whether products of float32 may be computed with mantissas of 10 bits.
        timing_cache: Whether times of kernels are kept for the next build; TensorRT-RTX measures none.
        compute_capabilities: Of the GPUs that an engine is for, such as ``"8.9"``, or ``"current"`` alone; empty leaves
            it to the flavour. TensorRT-RTX only.
        hardware_compatibility: Which other GPUs than the one it is built on an engine also runs on. TensorRT only.
        version_compatible: Whether later releases can load an engine. TensorRT only.
    """

    workspace_mib: int = 0
    optimisation_level: int = 3
    tf32: bool = False
    timing_cache: bool = True
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatibility: Literal["none", "ampere-plus", "same-compute-capability"] = "none"
    version_compatible: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxRuntimeSpec:
    """What graphs for ONNX Runtime are made for (docs/compile.md).

    Attributes:
        providers: One, or several; each is a variant of its own.
    """

    providers: tuple[Provider, ...] = ("any",)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileSpec:
    """What is compiled, and for which batches.

    Attributes:
        targets: What for.
        precision: One, or several; each is a variant of each target.
        batch: Profile, or several, each optimised for on its own; together they leave no batch out.
        float32: Globs over layer names, node names and operator types that stay in float32 whatever the precision.
        auto: How `auto` searches.
        quantiser: What makes INT8 and FP8 graphs: this program, or nvidia-modelopt with one of its ways to find ranges.
        refittable: Whether engines of TensorRT are built so that `refit` can put another edit into them; needs a GPU.
        onnxruntime: Which providers graphs for ONNX Runtime are made for.
        tensorrt: How engines of TensorRT are built.
        tensorrt_rtx: How engines of TensorRT-RTX are built.
    """

    targets: tuple[Target, ...]
    precision: Precision | tuple[Precision, ...] = Precision.FP32
    batch: Profile | tuple[Profile, ...] = Profile(min=1, opt=8, max=32)
    float32: tuple[str, ...] = ()
    auto: AutoSpec = AutoSpec()
    quantiser: Quantiser = "built-in"
    refittable: bool = False
    onnxruntime: OnnxRuntimeSpec = OnnxRuntimeSpec()
    tensorrt: BuilderSpec = BuilderSpec()
    tensorrt_rtx: BuilderSpec = BuilderSpec()

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """All of them."""
        return (self.batch,) if isinstance(self.batch, Profile) else self.batch

    @property
    def profile(self) -> Profile:
        """Smallest and largest batch of all profiles, and the first one's most usual batch."""
        parts = self.profiles
        return Profile(min=min(p.min for p in parts), opt=parts[0].opt, max=max(p.max for p in parts))

    def builder(self, target: Target, provider: Provider = "any") -> BuilderSpec:
        """How engines of a target, or of a provider of ONNX Runtime, are built; the defaults where TensorRT has no part."""
        uses = provider if target is Target.ONNXRUNTIME else target.value
        return {"tensorrt": self.tensorrt, "tensorrt-rtx": self.tensorrt_rtx}.get(uses, BuilderSpec())

    def providers(self, target: Target) -> tuple[Provider, ...]:
        """Providers of a target's variants."""
        return self.onnxruntime.providers if target is Target.ONNXRUNTIME else ("any",)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """All of them."""
        return (self.precision,) if isinstance(self.precision, Precision) else self.precision


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """Settings of training that this model asks for; 0 takes the method's published number (docs/training.md).

    Attributes:
        rank: Of the adapters.
        alpha: Adapters count ``alpha / rank``.
        rate: Learning rate of Adam.
        epochs: At most so many.
        batch: Quadruples per step.
    """

    rank: int = 0
    alpha: float = 0.0
    rate: float = 0.0
    epochs: int = 0
    batch: int = 0


_NO_ENTRIES = EditSpec(rule=Rule.RATIO, layers=(), keep_mass=1.0, factor=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One file of `export/`: everything about a build that varies with the model.

    Attributes:
        edit: Steps, in the order in which they are made: at most one that selects entries, then at most one in closed form.
        bundle_version: Counts releases, so that an older bundle can be refused; 0 for none.
    """

    format: int
    name: str
    model: ModelSource
    edit: tuple[StepSpec, ...]
    data: DataSpec
    export: ExportSpec
    compile: CompileSpec
    train: TrainSpec = TrainSpec()
    bundle_version: int = 0

    @property
    def entries(self) -> EditSpecs:
        """The step that selects entries; of an edit without one, a step of its method that has nothing to select from."""
        step = self.edit[0]
        return EditSpecs(
            text=step.text or _NO_ENTRIES,
            image=step.image or _NO_ENTRIES,
            method=step.method,
            per_concept=step.per_concept,
            towers=step.towers,
        )

    @property
    def closed_form(self) -> ClosedForm | None:
        """The closed-form step, which is the last one."""
        step = self.edit[-1]
        return ClosedForm(method=step.method, axis=step.axis or AxisSpec()) if step.method in CLOSED_FORM else None

    @property
    def method(self) -> str:
        """Name of the steps."""
        return methods_name(step.method for step in self.edit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of a table hold what; a member without a column is a member the set does not have.

    Attributes:
        id: Column, or a pattern such as ``"{row:06d}"``; the column ``id`` when empty.
        concept: Column; every item is of the concept ``all`` when empty.
        split: Column that is compared with the set's `split`; every row is used when empty.
        safe_text: Column.
        unsafe_text: Column.
        safe_image: Column with a path or with image bytes, or a path pattern such as ``"coco/{coco_id:012d}.jpg"``, or
            several of them, of which the first file that exists is taken.
        unsafe_image: The same.
    """

    id: str = ""
    concept: str = ""
    split: str = ""
    safe_text: str = ""
    unsafe_text: str = ""
    safe_image: str | tuple[str, ...] = ""
    unsafe_image: str | tuple[str, ...] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSet:
    """One file of `calibration/`: which quadruples, never their content (docs/data.md).

    Attributes:
        source: ``"demo"`` (the drawn world), ``"manifest"`` (JSON Lines or Parquet with our own column names),
            ``"table"`` (JSON, JSON Lines, CSV or Parquet with any column names) or ``"webdataset"`` (tar shards).
        split: Split of the source.
        folder: Where the files are: below the TOML file's folder, for a shipped set below ``$UWM_DEPLOY_DATA``.
        manifest: File, for that source.
        table: File or glob, for that source; ``{split}`` stands for the split.
        shards: Files for the source ``"webdataset"``, as names, globs or brace ranges.
        columns: What the table's columns mean.
        concept_names: Concept as written (in lower case) to the name it gets.
        missing_images: Whether an item without its image file is broken, or left out of the set before it is sampled.
        sampling: Seeded sample of `limit` items; seeded sample of `per_concept` items of every concept; or the first
            `limit` items after Python's own shuffle (the official code).
        limit: Largest number of quadruples; 0 takes all.
        per_concept: Largest number of quadruples per concept, for that sampling.
        concepts: Only items of these concepts are used, of those that the sampling chose; all when empty.
        leave_out: Items of these concepts are not used, of those that the sampling chose.
        seed: Seed of the sample.
        pairing: Which safe members an item's unsafe ones are scored against: its own, or those of the item with the nearest
            safe caption by the model's text tower (SafeR-CLIP). Not for evaluation.
        max_broken_share: Share of items that may be unreadable before it is an error.
        zero_shot: Zero-shot sets of the source measured along with it.
        zero_shot_limit: Largest number of items of each of them, evenly spaced; 0 takes all.
    """

    format: int
    name: str
    source: Literal["demo", "manifest", "table", "webdataset"]
    split: str = ""
    folder: str = ""
    manifest: str = ""
    table: str = ""
    shards: str | tuple[str, ...] = ""
    columns: Columns = field(default_factory=Columns)
    concept_names: Mapping[str, str] = field(default_factory=dict)
    missing_images: Literal["error", "drop"] = "error"
    sampling: Literal["sample", "per-concept", "shuffle"] = "sample"
    limit: int = 0
    per_concept: int = 0
    concepts: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    seed: int = 0
    pairing: Literal["own", "nearest-safe"] = "own"
    max_broken_share: float = 0.01
    zero_shot: tuple[str, ...] = ()
    zero_shot_limit: int = 0


def recipe_from_toml(text: str, *, where: str) -> Recipe:
    """Parses and checks a recipe.

    Raises:
        RecipeError: With the file, the key and the nearest valid key.
    """
    _refuse_one_table(text, where)
    recipe = record_from_toml(Recipe, text, where)
    check_steps([step.method for step in recipe.edit], f"{where}: edit")
    for number, step in enumerate(recipe.edit):
        _check_step(step, f"{where}: edit[{number}]")
    check_reach(recipe, where)
    if recipe.export.attention == "fused" and recipe.export.opset < 23:
        raise RecipeError(f"{where}: export.attention is fused with opset {recipe.export.opset}", fix="use opset 23")
    _check_profiles(recipe.compile.profiles, where)
    providers = recipe.compile.onnxruntime.providers
    if not providers or len(set(providers)) < len(providers):
        raise RecipeError(f"{where}: compile.onnxruntime.providers is {list(providers)}", fix="name each once")
    _check_builder(recipe.compile.tensorrt, "tensorrt", where)
    _check_builder(recipe.compile.tensorrt_rtx, "tensorrt_rtx", where)
    if min(dataclasses.astuple(recipe.train)) < 0:
        raise RecipeError(f"{where}: train holds a negative number", fix="use 0 for the published one")
    if recipe.bundle_version < 0:
        raise RecipeError(f"{where}: bundle_version is {recipe.bundle_version}", fix="count from 1; 0 is none")
    return recipe


def _refuse_one_table(text: str, where: str) -> None:
    """Recipes of the release before had one step, in a table."""
    try:
        edit = tomllib.loads(text).get("edit")
    except tomllib.TOMLDecodeError:  # which is said with its line below
        return
    if isinstance(edit, dict):
        raise RecipeError(
            f"{where}: edit is one table, and is a list of steps now",
            fix="write [[edit]] in place of [edit], or put it before [edit.text]",
        )


def check_steps(methods: Sequence[Method], where: str) -> None:
    """Checks that steps can follow each other.

    Raises:
        RecipeError: If not.
    """
    closed = [method in CLOSED_FORM for method in methods]
    if not methods or len(methods) - sum(closed) > 1 or sum(closed) > 1 or closed[:-1].count(True):
        raise RecipeError(
            f"{where}: the steps {methods_name(methods) or 'are none'}",
            fix="name at most one method that selects weights, then at most one closed-form method, as in uwm+safety-axis",
        )
    if len(methods) > 1 and methods[0] is Method.NONE:
        raise RecipeError(f"{where}: none is no step of an edit with others", fix="leave it out")


def check_reach(recipe: Recipe, where: str) -> None:
    """Checks that what is used of the model is what a closed-form step changes.

    Args:
        recipe: With the steps that are to be made.
        where: Names it in the message.

    Raises:
        RecipeError: If the model is used by its inner features.
    """
    if recipe.closed_form is not None and recipe.model.family == "llava":
        raise RecipeError(
            f"{where}: {only_embeddings(recipe.closed_form.method)}, and family llava is used by its inner features",
            fix="use --method uwm, which changes the layers before them",
        )


def only_embeddings(method: Method) -> str:
    """What a closed-form method does not reach, as the first half of a sentence."""
    return f"method {method.value} changes embeddings only"


def _check_step(step: StepSpec, where: str) -> None:
    if step.method in (Method.NONE, Method.TRAINED):
        what = "edits nothing" if step.method is Method.NONE else "has no settings"
        raise RecipeError(
            f"{where}.method is {step.method}, which {what}", fix=f"leave it out; use --method {step.method}"
        )
    if not step.towers or len(set(step.towers)) < len(step.towers):
        raise RecipeError(f"{where}.towers is {list(step.towers)}", fix="name image, text or both, once")
    if step.method in CLOSED_FORM:
        _check_closed_form(step, where)
        return
    if step.axis is not None:
        raise RecipeError(f"{where}.axis belongs to a closed-form step", fix="give it an [[edit]] of its own")
    for tower in BOTH_TOWERS:
        edit = step.image if tower is TowerName.IMAGE else step.text
        if edit is None:
            raise RecipeError(f"{where}: missing key {tower.value!r}", fix="see docs/recipes.md")
        _check_entries(edit, f"{where}.{tower.value}")
    assert step.text is not None
    assert step.image is not None
    if step.text.pairing != step.image.pairing:
        raise RecipeError(f"{where}: text and image have different pairings", fix="use one for both")


def _check_closed_form(step: StepSpec, where: str) -> None:
    if step.text or step.image or step.per_concept or set(step.towers) != set(BOTH_TOWERS):
        raise RecipeError(
            f"{where}: method {step.method} selects no entries, and edits both towers",
            fix="leave text, image, per_concept and towers out",
        )
    axis = step.axis or AxisSpec()
    if min(axis.max_retrieval_loss, axis.max_hard_safe_loss, axis.max_zero_shot_loss) < 0:
        raise RecipeError(f"{where}.axis: a limit is negative", fix="use points, such as 4")
    limits = [getattr(axis, f.name) != f.default for f in dataclasses.fields(AxisSpec) if f.name.startswith("max_")]
    if step.method is Method.LEACE and (axis.setting is not None or any(limits)):
        raise RecipeError(f"{where}.axis: leace has no strength", fix="leave setting and the limits out")
    if axis.setting is not None and any(limits):
        raise RecipeError(f"{where}.axis has a setting and limits of a choice", fix="give one of them")


def _check_entries(edit: EditSpec, where: str) -> None:
    if not 0.0 < edit.keep_mass < 1.0:
        raise RecipeError(f"{where}.keep_mass is {edit.keep_mass}", fix="use a share between 0 and 1")
    if not edit.layers:
        raise RecipeError(f"{where}.layers is empty", fix="name at least one layer pattern")
    if edit.rule is Rule.MEAN_ABS_GRADIENT or edit.pairing in (Pairing.UNSAFE_ONLY, Pairing.DIFFERENCE):
        raise RecipeError(
            f"{where} asks for a formula that belongs to a method of its own",
            fix="set edit.method; docs/methods.md lists them",
        )
    if edit.gradient_batch < 0:
        raise RecipeError(f"{where}.gradient_batch is {edit.gradient_batch}", fix="use 0 for the published number")


def _check_profiles(profiles: tuple[Profile, ...], where: str) -> None:
    if not profiles:
        raise RecipeError(f"{where}: compile.batch is empty", fix="name one profile, or several")
    for part in profiles:
        if not 1 <= part.min <= part.opt <= part.max:
            raise RecipeError(f"{where}: compile.batch is {part}", fix="use 1 <= min <= opt <= max")
    reach = 0
    for part in sorted(profiles, key=lambda part: part.min):
        if reach and part.min > reach + 1:
            raise RecipeError(
                f"{where}: compile.batch takes no batch of {reach + 1}", fix="leave no gap between profiles"
            )
        reach = max(reach, part.max)


_LACKS = {
    "tensorrt": {"compute_capabilities": "TensorRT builds for the GPU it runs on; see hardware_compatibility"},
    "tensorrt_rtx": {
        "hardware_compatibility": "TensorRT-RTX names its GPUs; use compute_capabilities",
        "version_compatible": "an engine of TensorRT-RTX is for one release of it; build again for another",
    },
}
"""What a flavour does not have, and what to do instead."""


def _check_builder(spec: BuilderSpec, name: str, where: str) -> None:
    for key, instead in _LACKS[name].items():
        if getattr(spec, key) != getattr(BuilderSpec(), key):
            raise RecipeError(f"{where}: compile.{name} has no {key}", fix=instead)
    if not 0 <= spec.optimisation_level <= 5:
        raise RecipeError(f"{where}: compile.{name}.optimisation_level is {spec.optimisation_level}", fix="use 0 to 5")
    if spec.workspace_mib < 0:
        raise RecipeError(f"{where}: compile.{name}.workspace_mib is {spec.workspace_mib}", fix="use 0 for no limit")
    chosen = spec.compute_capabilities
    if len(set(chosen)) < len(chosen) or (CURRENT_GPU in chosen and len(chosen) > 1):
        raise RecipeError(
            f"{where}: compile.{name}.compute_capabilities is {list(chosen)}", fix="name each once, or current alone"
        )
    for text in chosen:
        if text != CURRENT_GPU and not re.fullmatch(r"\d+\.\d", text):
            raise RecipeError(
                f"{where}: compile.{name}.compute_capabilities holds {text!r}", fix='write it as "8.9", or "current"'
            )


def calibration_set_from_toml(text: str, *, where: str) -> CalibrationSet:
    """Parses a data set definition; see `recipe_from_toml`."""
    spec = record_from_toml(CalibrationSet, text, where)
    files = {"manifest": spec.manifest, "table": spec.table, "webdataset": spec.shards}
    keys = {"manifest": "manifest", "table": "table", "webdataset": "shards"}
    for source, value in files.items():
        if source == spec.source and not value:
            raise RecipeError(f"{where}: source is {source} but `{keys[source]}` is missing", fix="name the file")
        if source != spec.source and value:
            raise RecipeError(f"{where}: `{keys[source]}` with source {spec.source}", fix=f"use source = {source!r}")
    if spec.source != "table" and spec.columns != Columns():
        raise RecipeError(f"{where}: `columns` with source {spec.source}", fix="use source = 'table'")
    if spec.source == "demo" and (spec.folder or spec.concept_names or spec.missing_images != "error"):
        raise RecipeError(f"{where}: the demo has no files", fix="remove folder, concept_names and missing_images")
    _check_columns(spec, where)
    _check_sampling(spec, where)
    return spec


def _check_columns(spec: CalibrationSet, where: str) -> None:
    columns = spec.columns
    for kind, safe, unsafe in (
        ("text", columns.safe_text, columns.unsafe_text),
        ("image", columns.safe_image, columns.unsafe_image),
    ):
        if bool(safe) != bool(unsafe):
            raise RecipeError(
                f"{where}: columns name one {kind} of the pair", fix=f"give safe_{kind} and unsafe_{kind}"
            )
    if spec.source == "table" and not (columns.safe_text or columns.safe_image):
        raise RecipeError(f"{where}: columns name neither texts nor images", fix="see docs/data.md")


def _check_sampling(spec: CalibrationSet, where: str) -> None:
    if min(spec.limit, spec.per_concept, spec.seed, spec.zero_shot_limit) < 0:
        raise RecipeError(f"{where}: limits, per_concept and seed are not negative", fix="use 0 for no limit")
    if not 0.0 <= spec.max_broken_share <= 1.0:
        raise RecipeError(f"{where}: max_broken_share is {spec.max_broken_share}", fix="use a share between 0 and 1")
    if (spec.sampling == "per-concept") != bool(spec.per_concept):
        raise RecipeError(f"{where}: per_concept and sampling = 'per-concept' go together", fix="give both or neither")
    if spec.concepts and spec.leave_out:
        raise RecipeError(f"{where}: concepts and leave_out are both given", fix="give one of them")
    if spec.sampling == "per-concept" and spec.limit:
        raise RecipeError(f"{where}: limit with sampling = 'per-concept'", fix="use per_concept alone")
