"""Frozen records that cross stage borders: standard library only, JSON round trip, digests chained.

Every artifact carries the digests of what it was made from. A digest is always ``"sha256:" + 64 hex digits``. A digest of
a model is over its weights, never over a name, a path or a graph: an edited graph has the topology of the unedited one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

SCHEMA_VERSION = 2
"""Version of every JSON file the project writes; readers refuse a newer one."""

Digest = str
"""``sha256:`` followed by 64 lower-case hex digits."""


EXPORTED = "onnx"
"""Name of the exported graphs in a report; they are evidence, not a variant that ships."""


RISK_LOGITS, RISK_LEVEL = "risk_logits", "risk_level"
RISK_OUTPUTS = (RISK_LOGITS, RISK_LEVEL)
"""Outputs that a safety head adds to the image graph."""


class Action(StrEnum):
    """What becomes of an image by its risk, the mildest first; each has its threshold, but for the first."""

    ALLOW = "allow"
    FLAG = "flag"
    REDIRECT = "redirect"
    BLOCK = "block"


class TowerName(StrEnum):
    """The two encoders of a CLIP-like model, each exported as its own graph."""

    IMAGE = "image"
    TEXT = "text"


MAP_NAMES = {TowerName.IMAGE: "image_map", TowerName.TEXT: "text_map"}
"""Module of the map behind a tower's embedding, with placement `embedding`; in graphs, patches and saved models."""


class Method(StrEnum):
    """How entries are found; docs/methods.md. All end in the same kind of patch, verified and gated in the same way."""

    UWM = "uwm"
    GRADIENT_UNSAFE = "gradient-unsafe"
    GRADIENT_SAFE_CLIP = "gradient-safe-clip"
    UNSAFE_ONLY = "unsafe-only"
    RATIO_HARD = "ratio-hard"
    DIFFERENCE = "difference"
    RATIO_OF_MEANS = "ratio-of-means"
    SAFETY_AXIS = "safety-axis"
    LEACE = "leace"
    NONE = "none"
    TRAINED = "trained"


CLOSED_FORM = (Method.SAFETY_AXIS, Method.LEACE)
"""Methods that replace the last linear map of both towers by a formula; docs/safety-axis.md."""


def methods_name(methods: Iterable[Method]) -> str:
    """Name of the steps of an edit, in their order, as it is written on the command line: ``uwm+safety-axis``."""
    return "+".join(method.value for method in methods)


class Placement(StrEnum):
    """Where a closed-form edit is put: into the last linear map, or as a map of its own behind the embedding."""

    WEIGHTS = "weights"
    EMBEDDING = "embedding"


class EditKind(StrEnum):
    """What an edit did to a tensor, and so what a patch holds of it.

    Entries were multiplied by a factor (their indices are held); values were replaced (the differing bits are held); the
    tensor is new (its values are held); or it was trained (nothing is held: the model itself has the values).
    """

    MULTIPLIED = "multiplied"
    REPLACED = "replaced"
    ADDED = "added"
    TRAINED = "trained"


class Trainer(StrEnum):
    """How a model was trained for safety; docs/training.md."""

    SAFE_CLIP = "safe-clip"
    SAFER_CLIP = "safer-clip"


class Selection(StrEnum):
    """Entries with the top share of the score mass (Eq. 11), or the top share of the entries by score."""

    ADAPTIVE = "adaptive"
    HARD = "hard"


class Rule(StrEnum):
    """How the per-pair ratio becomes the score of one layer (method.md section 2).

    The last one is of the gradient baselines: it stands in records, never in a recipe.
    """

    RATIO = "ratio"
    RATIO_TIMES_ABS_WEIGHT = "ratio-times-abs-weight"
    MEAN_ABS_GRADIENT = "mean-abs-gradient"


class Pairing(StrEnum):
    """Mean of per-pair ratios (the official code) or ratio of the two means (the paper's wording).

    The last two are of the ablations of these names: they stand in records, never in a recipe.
    """

    MEAN_OF_RATIOS = "mean-of-ratios"
    RATIO_OF_MEANS = "ratio-of-means"
    UNSAFE_ONLY = "unsafe-only"
    DIFFERENCE = "difference"


class Precision(StrEnum):
    """What the linear layers of a graph compute in; `auto` searches for the cheapest mix that keeps the decisions."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"
    AUTO = "auto"


class Target(StrEnum):
    """What an ONNX graph is compiled for."""

    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


Provider = Literal["any", "cpu", "cuda", "tensorrt", "tensorrt-rtx"]
"""Execution provider of ONNX Runtime that a graph is for; `any` is optimised for no machine and opened on the best there."""


def variant_name(target: Target, precision: Precision, provider: Provider = "any") -> str:
    """Name of one variant: target, provider where it is a certain one, precision."""
    return "-".join([target.value, *([] if provider == "any" else [provider]), precision.value])


def target_of(variant: str) -> Target | None:
    """Target of a variant; None for the exported graphs themselves."""
    longest_first = sorted(Target, key=len, reverse=True)
    return next((target for target in longest_first if variant.startswith(f"{target.value}-")), None)


class Evidence(StrEnum):
    """Whether the numbers of an artifact come from executing it."""

    EXECUTED = "executed"
    NOT_RUN = "not run"


class Cause(StrEnum):
    """What kind of fault a failing check points to; docs/faults.md lists who detects which."""

    EDIT = "edit"
    WEIGHTS = "weights"
    GRAPH = "graph"
    NUMBERS = "numbers"
    BATCHING = "batching"
    PREPROCESSING = "preprocessing"
    TOKENISATION = "tokenisation"
    DATA = "data"
    EVIDENCE = "evidence"
    INTEGRITY = "integrity"
    MODEL = "model"
    DECISIONS = "decisions"


class Result(StrEnum):
    """Outcome of a check or a verdict; only ``pass`` passes."""

    PASS = "pass"  # noqa: S105 -- an outcome, not a password
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """Preprocessing of one image, exactly as the source model's processor does it.

    Attributes:
        resize: Shortest edge after resizing, or both edges when `fit` is ``"squash"``, pixels.
        crop: Side of the square centre crop, pixels.
        resample: Pillow filter name, ``"bicubic"`` or ``"bilinear"``.
        rescale: Factor from 0..255 to 0..1.
        mean: Per channel, RGB, after rescaling.
        std: Per channel, RGB, after rescaling.
        fit: Keep the shape and crop, or squash to a square.
        crop_offset: How half a pixel of the crop's corner is rounded: down, or to even.
        alpha: Transparency is laid over white, or its channel is dropped.
    """

    resize: int
    crop: int
    resample: Literal["bicubic", "bilinear"]
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Literal["crop", "squash"] = "crop"
    crop_offset: Literal["floor", "round"] = "floor"
    alpha: Literal["white", "drop"] = "white"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """Tokenisation of one caption, exactly as the source model's tokenizer does it.

    Attributes:
        context_length: Positions per caption; longer ones are cut and keep their end token.
        eos_id: Id of the end token.
        pad_id: Id that fills the row.
        tokenizer_digest: Digest of ``tokenizer.json``.
        padding_side: Where a short row is filled.
        fixed_length: Whether the padding belongs to the input (SigLIP, CoCa), so that a row may not be cut to its tokens.
        cleaning: What is done to a caption before `tokenizer.json` sees it.
    """

    context_length: int
    eos_id: int
    pad_id: int
    tokenizer_digest: Digest
    padding_side: Literal["right", "left"] = "right"
    fixed_length: bool = False
    cleaning: Literal["none", "open-clip"] = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Which weights this is about.

    Attributes:
        name: Recipe name, for people.
        family: Tower adapter, e.g. ``"hf-clip"``.
        repo: Hub id, or ``"local"``, or ``"shipped"``, or ``"random"`` (random weights are never gate-able).
        revision: Hub commit, or empty.
        weights_digest: Over every parameter's name, dtype, shape and bytes, in name order.
        embed_dim: Size of the shared embedding space.
    """

    name: str
    family: str
    repo: str
    revision: str
    weights_digest: Digest
    embed_dim: int
    image: ImageSpec
    text: TextSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """One item that was not used, and why."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """What a data set resolved to.

    Attributes:
        ids_digest: Digest of the ordered ids that are used, one per line.
        content_digest: Digest of how the items are made, or of their concepts, texts and encoded images.
        concepts: Items per concept.
        left_out: Items that are not in the set, the first hundred of them by name.
        left_out_counts: All of them, by reason.
        pairing: Which safe member each unsafe one goes with.
    """

    name: str
    split: str
    n: int
    ids_digest: Digest
    content_digest: Digest
    concepts: Mapping[str, int]
    left_out: tuple[LeftOut, ...] = ()
    left_out_counts: Mapping[str, int] = field(default_factory=dict)
    pairing: Literal["own", "nearest-safe"] = "own"


@dataclass(frozen=True, slots=True, kw_only=True)
class SameContent:
    """Two items with the same pixels and texts, the second one in the same set or in another."""

    id: str
    other: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Items of a set whose content another set has too.

    Attributes:
        name: The other set.
        n: Its items.
        unread: Those of them that cannot be read, and so were not compared.
        compared: What both sets have, and so was compared; nothing when they have nothing in common.
        count: Items of the first set that the other one has.
        items: The first hundred of them.
    """

    name: str
    n: int
    unread: int
    compared: Literal["images and texts", "images", "texts", "nothing"]
    count: int
    items: tuple[SameContent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What a look at every item of a set found. Counts are of all items, lists hold the first hundred.

    Attributes:
        data: What the set resolves to; a build with it has the same digests.
        image_pairs: Items with both images, readable.
        text_pairs: Items with both texts, readable.
        broken_count: Items that cannot be read, or lack a pair that other items of the set have.
        empty_texts: Items with a text of nothing but blanks; they are not broken, but may get no score.
        twice_count: Ids that occur more than once.
        same_count: Items whose content an earlier item has; a loss of data, not an error.
        overlaps: One per set that it was compared with.
        problems: Why the set should not be used as it is; a clean set has none.
    """

    data: CalibrationRecord
    image_pairs: int
    text_pairs: int
    broken_count: int
    broken: tuple[LeftOut, ...]
    empty_texts: int
    twice_count: int
    twice: tuple[str, ...]
    same_count: int
    same: tuple[SameContent, ...]
    overlaps: tuple[Overlap, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeManifest:
    """A manifest that was written from folders. Lists hold the first hundred.

    Attributes:
        n: Items in it.
        concepts: Items per concept.
        image_pairs: Items with both images.
        text_pairs: Items with both texts.
        unpaired_count: Items left out because their counterpart is not there.
        ignored_count: Files and folders that are no part of the layout.
    """

    n: int
    concepts: Mapping[str, int]
    image_pairs: int
    text_pairs: int
    unpaired_count: int
    unpaired: tuple[LeftOut, ...]
    ignored_count: int
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScore:
    """One scored layer; its scores are the tensor of the same name in the score file."""

    tower: TowerName
    name: str
    shape: tuple[int, int]
    weight_digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePart:
    """Scores of one tower from the pairs of one concept, a file of their own.

    Attributes:
        file: Name beside the record; keys are module paths in the source model.
        digest: Of the file's bytes.
        n_pairs: Pairs of the concept in the mean.
    """

    tower: TowerName
    concept: str
    file: str
    digest: Digest
    n_pairs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskAgreement:
    """How far scores of bfloat16 forward passes select what scores of float32 passes over the same pairs select.

    Attributes:
        n_pairs: Pairs of the sample.
        keep_mass: Of the selections that were compared; with `selection`.
        equal_min: Smallest share, over the layers, of entries that are selected in both or in neither.
        equal_mean: The mean over the layers.
        jaccard_min: Smallest ratio, over the layers, of entries selected in both to entries selected in either.
        jaccard_mean: The mean over the layers.
    """

    n_pairs: int
    keep_mass: float
    selection: Selection
    equal_min: float
    equal_mean: float
    jaccard_min: float
    jaccard_mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRecord:
    """Companion of a score file (safetensors, keys are module paths in the source model).

    Attributes:
        rules: Per tower; empty for the method `none`.
        pairing: None for methods that form no pairs of activations.
        n_pairs: Pairs in the mean, per tower.
        left_out: Pairs whose contribution was not finite, or whose item could not be read.
        scores_digest: Digest of the score file's bytes.
        seconds: Wall time of the pass, per tower.
        gradient_batch: Pairs per gradient, per tower; empty for methods without gradients.
        parts: The files that hold the scores when there is one score per concept; then the score file itself is empty.
        dtype: Of the forward passes; scores are float32.
        agreement: Per tower, for forward passes in bfloat16.
    """

    model: ModelRef
    calibration: CalibrationRecord
    rules: Mapping[str, Rule]
    pairing: Pairing | None
    n_pairs: Mapping[str, int]
    left_out: Mapping[str, tuple[LeftOut, ...]]
    layers: tuple[LayerScore, ...]
    scores_digest: Digest
    dtype: str
    device: str
    seconds: Mapping[str, float]
    method: Method = Method.UWM
    gradient_batch: Mapping[str, int] = field(default_factory=dict)
    parts: tuple[ScorePart, ...] = ()
    agreement: Mapping[str, MaskAgreement] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEdit:
    """What was changed in one tensor.

    Attributes:
        tower: Whose graph holds it; None for a parameter that is in neither, such as a logit scale.
        name: Of the parameter in the source model; of a map behind the embedding ``image_map.weight`` and so on.
        selected: Number of entries multiplied by the factor, or that differ.
        share: ``selected`` divided by the number of entries.
        digest_before: Of the source model's tensor; empty for one that it does not have.
        digest_after: Of the edited model's.
        keep_mass: Of multiplied entries, the share that was to be left as it is: of the score mass, or of the entries when
            `selection` is hard; 1 with the method `none`.
        factor: Of multiplied entries.
        selection: Of multiplied entries.
    """

    tower: TowerName | None
    name: str
    shape: tuple[int, ...]
    selected: int
    share: float
    digest_before: Digest
    digest_after: Digest
    kind: EditKind = EditKind.MULTIPLIED
    keep_mass: float = 1.0
    factor: float = 1.0
    selection: Selection = Selection.ADAPTIVE

    @property
    def changed(self) -> bool:
        """Whether the edited model has another tensor."""
        return self.digest_before != self.digest_after


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerEdit:
    """Every setting that made the edit of one tower.

    Attributes:
        pairing: None for methods that form no pairs of activations.
        keep_mass: See `TensorEdit`.
        gradient_batch: Pairs per gradient; 0 for methods without gradients.
    """

    rule: Rule
    pairing: Pairing | None
    selection: Selection
    keep_mass: float
    factor: float
    gradient_batch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisSetting:
    """Strength of the safety axis (docs/safety-axis.md section 3); lengths are in units of the tower's mean embedding.

    Attributes:
        g: Gain of the safety score on the axis that a tower scores on.
        o: Offset of the score: a mean safe input lies at ``g * o``, a mean unsafe one at ``g * (o - 1)``.
        kappa: Constant on the axis that the other tower scores on; with 0 unsafe items are only repelled.
        a: Share of the spread of safe inputs in the score's covariance; the rest is that of differences of pairs. 0 to 1.
        tau: How far unsafe images are redirected onto their safe counterparts; at least 0.
        rho: Ridge of the covariance, relative to its mean eigenvalue; above 0.
        axes: Repelling axes per tower, k.
        repel_image: Gain h of the image tower's repelling axes; with 0 it takes none.
        repel_text: The same for the text tower.
    """

    g: float
    o: float
    kappa: float
    a: float
    tau: float
    rho: float = 1e-2
    axes: int = 0
    repel_image: float = 0.0
    repel_text: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRecord:
    """Companion of the sums that a closed-form step is solved from.

    Attributes:
        model: The source model.
        fitted_on: Digest of the weights that the features come from: those of the source with the steps before.
        placement: Whether features are what the last linear map gets, or embeddings of length 1.
        n_pairs: Pairs in the sums, per tower.
        left_out: Pairs that are not, with the reason.
        kept: Quadruples whose features were kept for the choice of the strength.
        sums_digest: Of ``fit.safetensors``.
        features_digest: Of ``features.safetensors``.
        seconds: Wall time of the pass, per tower.
    """

    model: ModelRef
    calibration: CalibrationRecord
    method: Method
    fitted_on: Digest
    placement: Placement
    n_pairs: Mapping[str, int]
    left_out: Mapping[str, tuple[LeftOut, ...]]
    kept: int
    sums_digest: Digest
    features_digest: Digest
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedFormRecord:
    """A closed-form step: where it was put, with which setting, and how that was chosen.

    Attributes:
        fitted_on: See `FitRecord`.
        n_pairs: Pairs in the sums, per tower.
        setting: None for a method without one.
        choice: How the setting was chosen; None when it was given.
    """

    placement: Placement
    fitted_on: Digest
    n_pairs: Mapping[str, int]
    setting: AxisSetting | None = None
    choice: StrengthChoice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EditStep:
    """One step of an edit.

    Attributes:
        settings: Per tower, of a method that selects entries.
        concepts: Concepts whose selections were united; empty when all pairs make one score.
        scores_digest: Of the file that the step was made from: scores, or the sums of a fit; empty for trained weights.
        axis: Of a closed-form step.
    """

    method: Method
    settings: Mapping[str, TowerEdit] = field(default_factory=dict)
    concepts: tuple[str, ...] = ()
    scores_digest: Digest = ""
    axis: ClosedFormRecord | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EditRecord:
    """Companion of a patch file and of the saved edited model.

    Attributes:
        tensors: Every tensor that changed, and every scored layer; in layers of which nothing was selected both digests are
            equal.
        steps: In the order in which they were made; one for the method `none`.
    """

    model: ModelRef
    edited_weights_digest: Digest
    patch_digest: Digest
    tensors: tuple[TensorEdit, ...]
    steps: tuple[EditStep, ...]

    def of(self, tower: TowerName) -> list[TensorEdit]:
        """The tensors of a tower."""
        return [tensor for tensor in self.tensors if tensor.tower is tower]

    @property
    def methods(self) -> tuple[Method, ...]:
        """Of its steps."""
        return tuple(step.method for step in self.steps)

    @property
    def method(self) -> str:
        """Name of its steps, such as ``uwm+safety-axis``."""
        return methods_name(self.methods)

    @property
    def first(self) -> EditStep:
        """Its first step: the one that has scores, if any has."""
        return self.steps[0]

    @property
    def closed_form(self) -> EditStep | None:
        """Its closed-form step, which is the last one."""
        return self.steps[-1] if self.steps[-1].axis is not None else None

    @property
    def placement(self) -> Placement | None:
        """Of its closed-form step; None without one."""
        step = self.closed_form
        return step.axis.placement if step and step.axis else None


class FoldKind(StrEnum):
    """How items are held out of a fit: at random, or whole concepts at a time, as an unseen hazard is."""

    RANDOM = "random"
    CONCEPTS = "left-out-concepts"


class StrengthLimit(StrEnum):
    """What a strength may not cost."""

    PS = "PS"
    RETRIEVAL = "safe-retrieval"
    HARD_SAFE = "hard-safe-retrieval"
    ZERO_SHOT = "zero-shot"


@dataclass(frozen=True, slots=True, kw_only=True)
class StrengthLimits:
    """How much an edit may cost, points below the original; PS may not be lower at all (docs/safety-axis.md section 5).

    Attributes:
        retrieval_loss: Of safe R@1, mean of both directions.
        hard_safe_loss: Of R@10 of the hard safe items, mean of both directions.
        zero_shot_loss: Of zero-shot top-1, mean over the sets.
        margin: Standard errors of the paired difference that a measured loss must stay below its limit.
    """

    retrieval_loss: float = 4.0
    hard_safe_loss: float = 8.0
    zero_shot_loss: float = 1.0
    margin: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class StrengthMetrics:
    """Percent, over all items, each measured by the fit that did not see it.

    Attributes:
        recall_at_1: Safe retrieval, mean of both directions.
        hard_safe_recall_at_10: The same at 10 for the hard safe items; None where no score tells which they are.
        zero_shot: Mean over the sets; None without a set.
    """

    gs: float
    ps: float
    p_ts: float
    p_tu: float
    p_vs: float
    p_vu: float
    recall_at_1: float
    hard_safe_recall_at_10: float | None
    zero_shot: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitUse:
    """How much of a limit a setting uses up.

    Attributes:
        folds: On which it was measured.
        loss: Points below the original; negative where it is above.
        margin: Points that are added to the loss for chance.
        at_most: The limit.
    """

    limit: StrengthLimit
    folds: FoldKind
    loss: float
    margin: float
    at_most: float

    @property
    def over(self) -> float:
        """Points over the limit; at most 0 where it is kept."""
        return self.loss + self.margin - self.at_most


@dataclass(frozen=True, slots=True, kw_only=True)
class StrengthCandidate:
    """One setting that was tried.

    Attributes:
        measured: By kind of fold.
        objective: What the settings that keep the limits are ordered by.
        keeps: Whether every limit is kept on every kind of fold.
        broken: The limit that is broken most; None where all are kept.
        tightest: The limit that is nearest to being broken, or is broken most.
    """

    setting: AxisSetting
    measured: Mapping[str, StrengthMetrics]
    objective: float
    keeps: bool
    broken: StrengthLimit | None
    tightest: LimitUse


@dataclass(frozen=True, slots=True, kw_only=True)
class StrengthChoice:
    """How the strength of an edit was chosen, from items that the fits did not see.

    Attributes:
        chosen: Position among the candidates; None when none of them keeps the limits.
        original: What the model before any step measures on the same items, by kind of fold.
        n: Items.
        hard_safe: Those of them that are hard safe; 0 where that is not measured.
        zero_shot_sets: Sets in the mean; none where zero-shot is not measured.
        concepts_left_out: Concepts that each fold leaves out; nothing with a single concept, then there are no such folds.
        seed: Of the random folds and of the candidates.
        seconds: Wall time.
    """

    candidates: tuple[StrengthCandidate, ...]
    chosen: int | None
    original: Mapping[str, StrengthMetrics]
    limits: StrengthLimits
    n: int
    hard_safe: int
    zero_shot_sets: tuple[str, ...]
    concepts_left_out: tuple[tuple[str, ...], ...]
    seed: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """Everything that a training run depends on besides model and data.

    Attributes:
        rank: Of the adapters (LoRA).
        alpha: An adapter is scaled by ``alpha / rank``.
        dropout: Of the adapters' inputs.
        targets: Modules with an adapter, by the last part of their name.
        rate: Learning rate of Adam.
        epochs: At most so many.
        batch: Quadruples per step and process.
        patience: Epochs in which neither validation loss nor recall becomes better before it ends.
        validation_share: Share of the calibration set that is held out to choose the best epoch.
        weights: Term of the loss to its weight.
        best: What the best epoch is chosen by.
        precision: Of the forward passes; weights are float32.
    """

    method: Trainer
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    rate: float
    epochs: int
    batch: int
    patience: int
    validation_share: float
    weights: Mapping[str, float]
    best: Literal["loss", "recall"]
    precision: Literal["fp32", "bf16"]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochResult:
    """One epoch of a training run.

    Attributes:
        epoch: From 1.
        n: Quadruples that it went through, all processes together.
        terms: Mean of every term of the loss over its steps.
        loss: Mean of the loss.
        validation_loss: On the held-out quadruples, after it.
        recall_sum: Sum of six recalls at 1 in percent, on the same.
    """

    epoch: int
    n: int
    terms: Mapping[str, float]
    loss: float
    validation_loss: float
    recall_sum: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRecord:
    """Where a trained model comes from: `training.json` beside its weights, and in every bundle made from them.

    Attributes:
        base: The model before training.
        calibration: The set, training and held-out quadruples together.
        trained_weights_digest: Of the whole model after training.
        weights: Parameter that was trained to its digest; all others are the base's.
        reference_digest: Of the frozen reference after training; it must be the base's.
        best_epoch: Whose adapters were merged.
        trainable_parameters: Of the adapters.
        examples_seen: Quadruples over all epochs, repetitions counted.
        seconds: Wall time of all epochs, validation included.
        peak_gpu_bytes: Most GPU memory that was in use; 0 without a GPU.
        recipe: Text of the base's recipe, verbatim.
    """

    settings: TrainingSettings
    base: ModelRef
    calibration: CalibrationRecord
    n_training: int
    n_validation: int
    trained_weights_digest: Digest
    weights: Mapping[str, Digest]
    reference_digest: Digest
    epochs: tuple[EpochResult, ...]
    best_epoch: int
    stopped_early: bool
    trainable_parameters: int
    parameters: int
    examples_seen: int
    seconds: float
    processes: int
    device: str
    peak_gpu_bytes: int
    versions: Mapping[str, str]
    recipe: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, element type and shape of a graph input or output; a string is a symbolic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """Sizes of a safety head.

    Attributes:
        features: Width of the vision tower's tokens.
        width: Of the safety projector and of the attention.
        tokens: Learned safety tokens.
        heads: Of the attention.
        categories: Of `risk_logits`, ``"safe"`` among them.
    """

    features: int
    width: int
    tokens: int
    heads: int
    categories: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCalibration:
    """One of a head's two probabilities before and after its temperature, on items that the temperature is not from.

    Attributes:
        temperature: What logits are divided by; in the head's weights already.
        ece_before: Expected calibration error, percentage points, 15 bins.
        ece_after: The same with the temperature.
        n: Images it was measured on.
    """

    temperature: float
    ece_before: float
    ece_after: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTraining:
    """How a safety head was trained.

    Attributes:
        data: The set that it was trained on.
        validation: The set that temperatures and thresholds are from; None when it is a part of the other one.
        pairs: Pairs of images that it was trained on.
        validation_pairs: Pairs that temperatures and thresholds are from.
        loss_first: Mean loss of the first pass over the pairs.
        loss_last: Mean loss of the last one.
        seconds: Wall time of the passes, features apart.
    """

    data: CalibrationRecord
    validation: CalibrationRecord | None
    pairs: int
    validation_pairs: int
    epochs: int
    batch: int
    learning_rate: float
    seed: int
    loss_first: float
    loss_last: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyHead:
    """A head on the tokens of the edited image tower (docs/safety-head.md); its weights are a file beside the record.

    Attributes:
        categories: Of `risk_logits`, in order; the first is ``"safe"``, the others are the set's concepts.
        edited_weights_digest: The edited model whose tokens it was trained on; on any other it means nothing.
        weights_digest: Of the file with its weights.
        texts_digest: Of the file with the safe texts that a redirect chooses from.
        items_digest: Of the file that tells the images it was trained and calibrated on from those of an evaluation set.
        thresholds: Action to the risk level from which on it, or a stricter one, is taken.
        false_positive_rates: Action to the share of safe images, in percent, that its threshold was chosen for.
        calibration: Output to its calibration.
    """

    shape: HeadShape
    categories: tuple[str, ...]
    edited_weights_digest: Digest
    weights_digest: Digest
    texts_digest: Digest
    items_digest: Digest
    thresholds: Mapping[str, float]
    false_positive_rates: Mapping[str, float]
    calibration: Mapping[str, HeadCalibration]
    training: HeadTraining


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Whether the edit is in the graph's own weights.

    Attributes:
        layers: Edited layers that were found and checked.
        entries: Edited entries whose value equals the edited weight.
        mismatches: One line per layer that does not carry the edit; empty means it does.
    """

    layers: int
    entries: int
    mismatches: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationCoverage:
    """How the activations of one class of inputs, safe or unsafe, lie in the ranges that they are quantised with.

    Attributes:
        n: Inputs that were held out when the ranges were taken.
        inside: Share of inputs and activations that stay within the range.
        worst: Largest activation divided by its range; above 1 it is cut off.
    """

    n: int
    inside: float
    worst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """How a graph in lower precision was made, and what it came to.

    Attributes:
        precision: What was asked for.
        lowered: Precision of the linear layers that are not kept.
        source_digest: Digest of the float32 graph it was made from.
        kept: Linear layers, and patterns for other nodes, that stay in float32.
        achieved: Class of operator to precision to number of nodes, read back from the graph.
        clamped: Constants out of range that are now the largest finite number.
        zeroed: Edited entries that became zero, where negation changes nothing.
        coverage: Per class of input, ``safe`` and ``unsafe``; empty where nothing is quantised.
        canary_ratio_max: Worst canary (`safeground.canaries`); None where the tower is not edited.
        canaries: Number of them.
        quantiser: What quantised it, with its version where it is another's; empty where nothing is quantised.
    """

    precision: Precision
    lowered: Precision
    source_digest: Digest
    kept: tuple[str, ...]
    achieved: Mapping[str, Mapping[str, int]]
    clamped: int
    zeroed: int
    coverage: Mapping[str, ActivationCoverage] = field(default_factory=dict)
    canary_ratio_max: float | None = None
    canaries: int = 0
    quantiser: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSensitivity:
    """What lowering one linear layer alone does to decisions that are nearly ties.

    Attributes:
        sensitivity: Mean squared change of their margins.
        kept: Whether it stays in float32.
    """

    tower: TowerName
    name: str
    sensitivity: float
    kept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionStep:
    """One plan that was executed and measured.

    Attributes:
        kept: Layers in float32.
        low_share: Share of the multiplications of linear layers that are in low precision.
        flips: Percentage of decisions of the worst preference metric that differ from the float32 graphs'.
    """

    what: str
    kept: int
    low_share: float
    flips: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionPlan:
    """What the search of precision `auto` chose, and why.

    Attributes:
        lowest: Precision of what is not kept.
        budget: Percentage of flips that the user allows.
        limit: Percentage that the search allowed on its own quadruples.
        n: Quadruples it measured on.
        kept: Layers in float32, per tower.
        layers: All linear layers, the most sensitive per multiplication first.
        steps: Every plan that was measured, in order.
    """

    lowest: Precision
    budget: float
    limit: float
    n: int
    kept: Mapping[str, tuple[str, ...]]
    flips: float
    low_share: float
    layers: tuple[LayerSensitivity, ...]
    steps: tuple[PrecisionStep, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxArtifact:
    """One tower as an ONNX graph.

    Attributes:
        file: Name inside its stage folder.
        digest: Over the graph file and, when there is one, the external data file.
        normalised: Whether the graph ends with L2 normalisation.
        weights_digest: The edited model's weights it was exported from.
        conversion: For a graph in lower precision, made from the exported one.
        head_digest: Of the safety head in it; empty without one.

    After a refit, the digest of a lower-precision graph that is not in the bundle is over its former digest and the
    patch's: the engine was refitted, the graph was not made again.
    """

    tower: TowerName
    file: str
    external_data: str
    digest: Digest
    weights_digest: Digest
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    normalised: bool
    versions: Mapping[str, str]
    fingerprint: Fingerprint
    conversion: Conversion | None = None
    head_digest: Digest = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Smallest, most usual and largest batch an engine accepts."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArtifact:
    """One tower compiled for one target.

    Attributes:
        variant: ``<target>-<precision>``; the image and the text engine of one variant share it.
        precision: Precision that was achieved, read back from the engine or the graph.
        file: Name in its stage folder; an ONNX graph may have its weights in `external_data` beside it.
        digest: Over the file and, when there is one, the external data file.
        onnx_digest: Digest of the OnnxArtifact it was compiled from, the exported one or one in lower precision.
        built_on: GPU name, ``"cpu"``, or ``"ahead of time"`` (compiled without the device it is for).
        runnable: Whether the building machine could execute it.
        seconds: Wall time of the build.
        head_digest: Of the safety head in it; empty without one.
    """

    variant: str
    tower: TowerName
    target: Target
    precision: str
    file: str
    digest: Digest
    onnx_digest: Digest
    weights_digest: Digest
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profile: Profile
    normalised: bool
    settings: Mapping[str, str]
    versions: Mapping[str, str]
    built_on: str
    runnable: bool
    seconds: float
    peak_rss_bytes: int = 0
    external_data: str = ""
    head_digest: Digest = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proportion:
    """A mean of booleans with its uncertainty; percentages, so 0 to 100.

    Attributes:
        value: Percentage of items that are true.
        n: Items.
        ties: Items that are decided by an exact tie, always for the worse: false, or *unsafe first*.
        low: Lower end of the 95% Wilson interval.
        high: Upper end.
    """

    value: float
    n: int
    low: float
    high: float
    ties: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Flips:
    """Decisions that differ between two models on the same quadruples (method.md section 5).

    For a mean of two directions of retrieval, such as ``safe_retrieval@1``, `lost` and `gained` count items whose mean fell
    and rose.

    Attributes:
        lost: True under the reference, false under the candidate.
        gained: False under the reference, true under the candidate.
        p_value: Exact McNemar test, two-sided.
        delta: Candidate minus reference, percentage points, with its paired 95% interval.
    """

    n: int
    lost: int
    gained: int
    p_value: float
    delta: float
    delta_low: float
    delta_high: float
    lost_ids: tuple[str, ...] = ()
    gained_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemOutcomes:
    """What every single item came to, so that two reports on the same items can be compared pair by pair.

    One bit per item in the order of the set, as hex digits; the first item is the highest bit of the first digit.

    Attributes:
        preference: Basic SafeGround metric to bits: the safe candidate won.
        concepts: Concept to bits: the item is of it.
        zero_shot: Set to bits: the image was recognised.
        retrieval: ``safe-text-to-image@1`` and so on to bits: a hit; ``hard-safe`` to bits: the item is one of those.
    """

    preference: Mapping[str, str]
    concepts: Mapping[str, str]
    zero_shot: Mapping[str, str]
    retrieval: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstItem:
    """One decision that an artifact, or the edit, made worse.

    Attributes:
        subject: Variant name, ``"onnx"`` or ``"edited"``.
        id: Of the quadruple.
        metric: The basic decision that got worst.
        margin: Similarity to the safe candidate minus to the unsafe one; negative is unsafe.
        reference_margin: The same under the model it is compared with.
        lost: Whether it was safe under the reference and no longer is.
    """

    subject: str
    id: str
    concept: str
    metric: str
    margin: float
    reference_margin: float
    lost: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RankChange:
    """One safe query of a *hard safe* item whose right answer an edit moved down.

    Attributes:
        id: Of the quadruple.
        query: ``safe-text-to-image`` or ``safe-image-to-text``, whichever fell more.
        before: Place of the right answer under the original model, 1 for the first.
        after: The same under the edited model.
    """

    id: str
    concept: str
    query: str
    before: int
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What became of the neighbourhoods and the spread of safe embeddings, against the original model on the same items.

    Attributes:
        neighbours: ``image-image``, ``text-text`` and ``text-image`` to the mean overlap (Jaccard) of the ten nearest safe
            neighbours, 0 to 1; empty with fewer than 11 items.
        spread: Tower to the total variance of its safe embeddings divided by the original's; 1 is unchanged.
    """

    neighbours: Mapping[str, Estimate]
    spread: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyReport:
    """SafeGround, retrieval and zero-shot of one model or artifact.

    Attributes:
        subject: ``"original"``, ``"edited"`` or a variant name.
        preference: The nine SafeGround metrics by name (P_ts, P_tu, P_vs, P_vu, Txt_s, Img_s, PS, PU, GS).
        per_concept: The same, per concept.
        retrieval: ``safe-text-to-image@1`` and so on; ``hard-safe-...`` among the items that look most unsafe to the
            original model; ``unsafe-first-text`` and ``unsafe-first-image``, where less is better.
        zero_shot: Top-1 per data set.
        zero_shot_missing: Sets that were asked for and did not run, with the reason; never counted as 0.
        items: Of a verify report; None where nothing is compared item by item.
        geometry: Against the original model; None for that one itself.
    """

    subject: str
    preference: Mapping[str, Proportion]
    per_concept: Mapping[str, Mapping[str, Proportion]]
    retrieval: Mapping[str, Proportion]
    zero_shot: Mapping[str, Proportion]
    zero_shot_missing: Mapping[str, str] = field(default_factory=dict)
    items: ItemOutcomes | None = None
    geometry: Geometry | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """One edit of a sweep.

    Attributes:
        keep_mass: Of an edit that selects entries; likewise `factor`.
        shares: Edited entries divided by all entries of the edited layers, per tower.
        safety: Measured with this edit.
        max_retrieval_loss: Points that the choice of a closed-form step's strength was allowed; None for other edits.
        setting: What was chosen.
    """

    keep_mass: float
    factor: float
    shares: Mapping[str, float]
    safety: SafetyReport
    max_retrieval_loss: float | None = None
    setting: AxisSetting | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepReport:
    """Every point of a sweep, and which one a rule picked.

    Attributes:
        measured_on: The set that every point was measured on.
        method: Name of the steps.
        selection: Of every point, per tower.
        concepts: Concepts whose selections were united; empty when all pairs make one score.
        rule: The rule of the pick in words; empty when nothing was to be picked.
        picked: Position in `points`; None when nothing was to be picked, or no point keeps the rule's limit.
    """

    model: ModelRef
    measured_on: CalibrationRecord
    scores_digest: Digest
    original: SafetyReport
    points: tuple[SweepPoint, ...]
    rule: str
    picked: int | None
    method: str = "uwm"
    selection: Mapping[str, Selection] = field(default_factory=dict)
    concepts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodCost:
    """What it took to make a model by a method: the whole command, in a process of its own.

    Attributes:
        seconds: Wall time.
        cpu_seconds: Time on processors, decoding processes included.
        peak_rss_bytes: Most memory of the process.
        gpu_seconds: Wall time of training on a GPU; 0 without one.
        peak_gpu_bytes: Most GPU memory that was in use while training; 0 without one.
        trainable_parameters: 0 for a method that trains nothing.
        data_seen: Quadruples that went through, repetitions counted.
        includes: The method whose cost is part of this one's, for an edit on top of trained weights.
    """

    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    gpu_seconds: float
    peak_gpu_bytes: int
    trainable_parameters: int
    data_seen: int
    includes: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedMethod:
    """One row of a comparison; without `safety` it was not run.

    Attributes:
        weights_digest: Of the model that was measured.
        change: Against the first row on the same items, per SafeGround metric, retrieval and zero-shot set; empty in that
            row.
        cost: None for a model that was not made here.
        reason: Why it was not run.
    """

    label: str
    weights_digest: Digest
    safety: SafetyReport | None
    change: Mapping[str, Flips]
    cost: MethodCost | None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodComparison:
    """Methods side by side on one set.

    Attributes:
        model: The model that all are made from.
        calibration: Name of the set that all are made on.
        measured_on: Name of the set that all are measured on, with its number of quadruples in `n`.
        machine: Where the cost was measured.
    """

    model: ModelRef
    calibration: str
    measured_on: str
    n: int
    rows: tuple[ComparedMethod, ...]
    machine: Mapping[str, str]
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputParity:
    """How far one output of an artifact is from the edited model in PyTorch float32.

    Attributes:
        max_abs: Largest absolute difference over all elements.
        mean_abs: Mean absolute difference.
        cosine_min: Smallest row-wise cosine.
        norm_error: Largest difference of a row's length from the reference's, as a share of it.
        batch: Rows per call.
        n: Rows compared.
    """

    tower: TowerName
    output: str
    batch: int
    n: int
    max_abs: float
    mean_abs: float
    cosine_min: float
    cosine_mean: float
    finite: bool
    norm_error: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number that is no proportion, in percent unless its field says otherwise, with its 95% interval.

    Attributes:
        n: Items it comes from.
    """

    value: float
    n: int
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CategoryRisk:
    """What a safety head makes of the unsafe images of one concept.

    Attributes:
        auroc: Their risk level against that of all safe images.
        recall: Share of them that is at least redirected.
        named: Share of them whose most probable concept is theirs.
    """

    auroc: Estimate
    recall: Proportion
    named: Proportion


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskReport:
    """What a safety head makes of the evaluation set.

    Attributes:
        auroc: Risk level of unsafe against safe images.
        recall: Action to the share of unsafe images for which it, or a stricter one, is taken.
        benign: The same of the safe images: over-refusal.
        benign_zero_shot: The same of all images of the zero-shot sets, which are taken as safe; empty without any.
        named: Share of unsafe images whose most probable concept is theirs.
        ece: Expected calibration error of the risk level, percentage points, 15 bins.
        category_ece: The same of the most probable category.
        per_category: By concept.
    """

    auroc: Estimate
    recall: Mapping[str, Proportion]
    benign: Mapping[str, Proportion]
    benign_zero_shot: Mapping[str, Proportion]
    named: Proportion
    ece: float
    category_ece: float
    per_category: Mapping[str, CategoryRisk]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCheck:
    """Whether a row's embedding depends on the rows around it: the same rows alone, and at other places of a batch.

    Attributes:
        batch: Rows per call.
        n: Rows compared.
        cosine_min: Smallest cosine of a row with itself, alone.
        error: What the artifact says when it does not take such a batch; empty when it does.
    """

    tower: TowerName
    batch: int
    n: int
    cosine_min: float
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphAudit:
    """One tower's weights as they lie in an artifact, compared with the edited model; nothing is executed.

    Attributes:
        layers: Edited layers that hold exactly the edited weight.
        weights: Other weights that were compared, bit for bit.
        edit: Edited layers that do not, with the reason.
        differ: Other weights that are not the edited model's.
        lowered: What must be in float32 whatever the precision, such as a map behind the embedding, and is not.
        structure: What else differs from the model, such as the epsilon of a normalisation.
    """

    layers: int
    weights: int
    edit: tuple[str, ...] = ()
    differ: tuple[str, ...] = ()
    lowered: tuple[str, ...] = ()
    structure: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EditProof:
    """The saved edited model compared with what source weights, scores and recipe make.

    Attributes:
        layers: Edited layers.
        weights: Weights that were compared, edited or not.
        problems: Every difference, by the weight's name.
    """

    layers: int
    weights: int
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Goldens:
    """The runtime and the towers compared with the source library on images and captions that are hard to get right.

    Attributes:
        images: Images compared.
        captions: Captions compared.
        grey_levels: Largest difference of a pixel, in steps of an 8-bit image; infinite differences are `FAR`.
        ids_differ: Captions whose ids differ.
        cosine_min: Tower to the smallest cosine of the library's embedding with the tower's, on equal inputs.
    """

    images: int
    captions: int
    grey_levels: float
    ids_differ: int
    cosine_min: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataHealth:
    """Whether an evaluation set can measure anything, by the source model.

    Attributes:
        paired: Members of an item that belong together, such as `safe_text safe_image`, to the share of items in which they
            are more alike than the same two members of different items.
        aligned: Share of items in which texts fit their own images better than crosswise.
        calibrated_concepts: Concepts of the calibration set, with their number of items.
    """

    paired: Mapping[str, Proportion]
    aligned: Proportion
    calibrated_concepts: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactEvidence:
    """Everything measured on one variant, or the statement that it was not run.

    Attributes:
        variant: Variant name, or ``"onnx"`` for the exported graphs themselves.
        reason: Why it was not run; empty when executed.
        precision: What its linear layers compute in.
        where: Machine kind: provider, device name, versions.
        artifact_digests: Digest per tower of exactly the bytes that were executed.
        canaries: Per edited tower, the worst canary's distance to the edited model over that to the original one.
        batches: Per tower and batch size.
        broken: Why nothing was measured on the evaluation set although it was executed; empty when it was.
        audit: Per tower, the weights that lie in it; a tower whose format cannot be read is missing.
        anisotropy: Per tower, how alike two embeddings are on average (mean cosine), less the edited model's.
        flips: Against the edited source model, per preference metric, retrieval and zero-shot set.
        worst: The decisions that fell furthest from the edited model's.
        risk: Of its safety head; None without one.
        risk_flips: Images, safe or not, whose action or category is not the edited model's.
        risk_parity: Like `parity`, of the head's outputs.
    """

    variant: str
    precision: Precision
    evidence: Evidence
    reason: str
    where: Mapping[str, str]
    artifact_digests: Mapping[str, Digest]
    parity: tuple[OutputParity, ...] = ()
    canaries: Mapping[str, float] = field(default_factory=dict)
    batches: tuple[BatchCheck, ...] = ()
    broken: str = ""
    audit: Mapping[str, GraphAudit] = field(default_factory=dict)
    anisotropy: Mapping[str, float] = field(default_factory=dict)
    safety: SafetyReport | None = None
    flips: Mapping[str, Flips] = field(default_factory=dict)
    worst: tuple[WorstItem, ...] = ()
    risk: RiskReport | None = None
    risk_flips: Proportion | None = None
    risk_parity: tuple[OutputParity, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """Numbers only; `gate` is what judges them.

    Attributes:
        edit_effect: Edited against original, per preference metric, retrieval and zero-shot set.
        edit_worst: The decisions that the edit made worst.
        hard_safe: Ids of the tenth of the items whose safe members look most unsafe to the original model, the most unsafe
            first; empty where they are too few to tell.
        hard_safe_worst: Those of them whose right answer fell furthest by the edit.
        zero_shot_digests: Set to the digest of its prompts and labels.
        head_digest: Of the safety head; empty without one.
        risk: What that head makes of the evaluation set on the edited model in PyTorch.
        head_overlap: Evaluation items whose images the head was trained or calibrated on.
    """

    model: ModelRef
    edited_weights_digest: Digest
    evaluation: CalibrationRecord
    calibration_overlap: int
    original: SafetyReport
    edited: SafetyReport
    edit_effect: Mapping[str, Flips]
    artifacts: tuple[ArtifactEvidence, ...]
    versions: Mapping[str, str]
    edit_worst: tuple[WorstItem, ...] = ()
    hard_safe: tuple[str, ...] = ()
    hard_safe_worst: tuple[RankChange, ...] = ()
    zero_shot_digests: Mapping[str, Digest] = field(default_factory=dict)
    edit_proof: EditProof | None = None
    goldens: Goldens | None = None
    data: DataHealth | None = None
    head_digest: Digest = ""
    risk: RiskReport | None = None
    head_overlap: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A report that someone accepted, to compare later ones with; `baseline.json`.

    Attributes:
        report_digest: Digest of the report's canonical JSON, checked whenever the baseline is read.
        policy: Name of the policy that it passed when it was accepted.
        accepted_by: Who answers for it.
        accepted: ISO date.
    """

    report: VerifyReport
    report_digest: Digest
    policy: str
    policy_digest: Digest
    accepted_by: str
    reason: str
    accepted: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WaiverState:
    """One waiver of a policy and what became of it.

    Attributes:
        check: Name of the check that it is for.
        subject: Subject of that check.
        expires: ISO date of the last day on which it counts.
        state: Applied to a check that does not pass; unused, because every such check passes or none exists; or expired.
    """

    check: str
    subject: str
    owner: str
    reason: str
    expires: str
    state: Literal["applied", "unused", "expired"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One comparison of a measured number with a limit of the policy.

    Attributes:
        bound: Whether the measured value was compared, or the end of its interval that is worse.
        detects: Smallest change in points that this n shows with 90% power; None where that has no meaning.
        concept: Concept that it is about; empty for all.
        rule: Which rule of the policy asked for it, e.g. ``"artifact[2]"``; empty for what no policy can switch off.
        cause: What kind of fault it points to when it fails.
        stage: Stage in which that fault was made.
        advice: What to try when it does not pass.
        waiver: The waiver that keeps it from blocking; the result stays what it is.
    """

    name: str
    subject: str
    result: Result
    measured: float | None
    limit: float | None
    direction: Literal["at_least", "at_most", "equals"]
    detail: str
    n: int = 0
    low: float | None = None
    high: float | None = None
    bound: Literal["point", "worst"] = "point"
    detects: float | None = None
    concept: str = ""
    rule: str = ""
    advice: str = ""
    cause: Cause | None = None
    stage: str = ""
    waiver: WaiverState | None = None

    @property
    def blocks(self) -> bool:
        """Whether it keeps the verdict from being a pass."""
        return self.result is not Result.PASS and self.waiver is None


def statement(name: str, subject: str, true: bool, otherwise: str, *, rule: str = "") -> Check:
    """A check of something that is true or not."""
    return Check(
        name=name,
        subject=subject,
        result=Result.PASS if true else Result.FAIL,
        measured=float(true),
        limit=1.0,
        direction="equals",
        detail="" if true else otherwise,
        rule=rule,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """A fault that failing checks point to.

    Attributes:
        stage: Stage in which it was made.
        subject: What it was seen in.
        detail: The check that says most about it.
    """

    cause: Cause
    stage: str
    subject: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Safer:
    """Whether the edit is shown to make the model safer; no policy can switch the question off.

    Attributes:
        shown: GS rose, PS was kept, both by the worse end of their paired intervals, and every limit of the policy on the
            edited model passes.
        reason: One line: what is not shown, or the numbers that show it.
        asked: Whether the policy limits the edited model at all.
    """

    shown: bool
    reason: str
    asked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate decided.

    Attributes:
        safer: Whether the edit makes the model safer, which a pass does not say where the policy does not ask.
        faithful: Variants that were executed and passed every check about themselves, waived ones apart: they do what the
            edited model does, whatever that is worth.
        causes: Faults behind the checks that fail, the first in the pipeline's order first: the others may follow from it.
        judged: Variant to the digests, by tower, of the artifacts that the verdict is about.
        proven: The faithful variants, where every check of the model, the data and the edit passes too, waived ones apart;
            the runtime serves no others. Under a policy that does not ask, they are not shown safer: see `safer`.
        unproven: Variants that were not executed.
        failed: Variants that were executed and did not pass.
        report_digest: Digest of the verify report that was judged.
        policy_digest: Digest of the policy's bytes.
        baseline_digest: Digest of the baseline's file; empty when there was none.
        waivers: Every waiver of the policy, with what became of it.
        notes: What a reader should know that is no check: concepts with too few items, power, variants that are gone.
        worst: The ten worst quadruples of what does not pass.
        head_digest: Of the safety head that it is about; empty without one.
    """

    result: Result
    checks: tuple[Check, ...]
    proven: tuple[str, ...]
    unproven: tuple[str, ...]
    failed: tuple[str, ...]
    policy: str
    policy_digest: Digest
    report_digest: Digest
    edited_weights_digest: Digest
    baseline_digest: str = ""
    waivers: tuple[WaiverState, ...] = ()
    notes: tuple[str, ...] = ()
    worst: tuple[WorstItem, ...] = ()
    causes: tuple[Blame, ...] = ()
    judged: Mapping[str, Mapping[str, Digest]] = field(default_factory=dict)
    head_digest: Digest = ""
    faithful: tuple[str, ...] = ()
    safer: Safer = Safer(shown=False, reason="the gate did not ask; judge again with `uwm-deploy gate`")


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultResult:
    """One planted fault and what the gate said of it.

    Attributes:
        text: What is wrong.
        cause: What the gate must name first.
        stage: Where it must say that the fault was made.
        found_cause: What it named first; None when it let the fault pass, or refused without a cause.
        named: Whether both are right.
        detectors: Checks that failed, or the refusal.
        peers: Other tool's check to whether it says that something is wrong; empty where there is nothing to check.
    """

    name: str
    text: str
    cause: Cause
    stage: str
    found_cause: Cause | None
    found_stage: str
    named: bool
    detectors: tuple[str, ...]
    peers: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild:
    """One honest rebuild and its verdict.

    Attributes:
        what: What was varied.
        result: The verdict.
        failing: Checks that do not pass.
    """

    what: str
    result: Result
    failing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SelftestReport:
    """`uwm-deploy selftest`: faults that must fail, honest rebuilds that must pass.

    Attributes:
        policy: What everything was judged by.
        seconds: Wall time.
    """

    policy: str
    faults: tuple[FaultResult, ...]
    rebuilds: tuple[Rebuild, ...]
    seconds: float
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleFile:
    """One file of a bundle: POSIX path relative to the bundle, size, digest of its bytes."""

    path: str
    size_bytes: int
    digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`manifest.json` of a bundle; every other file of the bundle is listed in `files`.

    Attributes:
        recipe: The recipe's text, verbatim, so that the build can be repeated.
        onnx: The exported graphs.
        converted: Graphs in lower precision that engines were compiled from; only their records are in the bundle.
        engines: Every compiled engine; `unproven` variants are refused by the runtime.
        verdict: Also in `reports/verdict.json`.
        refitted_from: Digest of the manifest of the bundle whose edit was replaced by this one's; empty after a build.
        bundle_version: Counts releases, so that an older one can be refused; 0 when none was given.
        head: The safety head in the image graphs and engines; None without one.
        spaces: Variant to the id of the space that it embeds into; filled in when it is written, computed again when it is
            opened.
    """

    name: str
    tool_version: str
    created: str
    model: ModelRef
    edit: EditRecord
    calibration: CalibrationRecord
    recipe: str
    recipe_digest: Digest
    onnx: tuple[OnnxArtifact, ...]
    engines: tuple[EngineArtifact, ...]
    verdict: Verdict
    versions: Mapping[str, str]
    files: tuple[BundleFile, ...]
    converted: tuple[OnnxArtifact, ...] = ()
    refitted_from: Digest = ""
    bundle_version: int = 0
    head: SafetyHead | None = None
    spaces: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSubject:
    """Something whose speed was measured.

    Attributes:
        name: Variant of a bundle, or ``"torch"``.
        precision: What its linear layers compute in.
        state: What the bundle's verdict says of it; the model in PyTorch is the reference.
        digests: Digest per tower of the engine, or of the reference's weights.
        where: Provider, device, versions, threads.
    """

    name: str
    precision: Precision
    state: Literal["proven", "unproven", "failed", "reference"]
    digests: Mapping[str, Digest]
    where: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """A new session up to its first answer; medians over the rounds.

    Attributes:
        open_ms: Reading and checking the files, and opening the session.
        first_call_ms: First call after that.
    """

    subject: str
    tower: TowerName
    batch: int
    open_ms: float
    first_call_ms: float
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Warm calls of one tower at one batch.

    Attributes:
        batch: Rows per call.
        calls: Number of calls; a percentile that needs more of them is None.
        throughput_per_s: Rows per second.
        ratio: Its fastest call divided by the first subject's fastest call in the same round; the median over the rounds.
        ratio_low: Of the rounds, the lowest; `ratio_high` the highest.
    """

    subject: str
    tower: TowerName
    batch: int
    calls: int
    latency_ms_p50: float
    latency_ms_p95: float | None
    latency_ms_p99: float | None
    throughput_per_s: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """Speed of a bundle's variants on one machine, from one run.

    Attributes:
        verdict: The bundle's.
        machine: Processor, cores, versions, GPU.
        clocks_before: Clock rates and load when it began; `clocks_after` when it ended.
        against: Subject that ratios are to.
        seconds: Asked for, per subject, tower and batch.
        not_run: Variant, or ``"torch"``, to the reason.
    """

    bundle: str
    edited_weights_digest: Digest
    verdict: Result
    created: str
    machine: Mapping[str, str]
    clocks_before: Mapping[str, str]
    clocks_after: Mapping[str, str]
    against: str
    seconds: float
    subjects: tuple[BenchSubject, ...]
    cold: tuple[ColdStart, ...]
    warm: tuple[Latency, ...]
    not_run: Mapping[str, str]
