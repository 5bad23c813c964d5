"""The edit: methods, scores, the tensors that changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from uwm_deploy.records.data import CalibrationRecord, LeftOut
from uwm_deploy.records.model import Digest, ModelRef, TowerName
from uwm_deploy.records.strength import AxisSetting, StrengthChoice

MAP_NAMES = {TowerName.IMAGE: "image_map", TowerName.TEXT: "text_map"}
"""Module of the map behind a tower's embedding, with placement `embedding`; in graphs, patches and saved models."""


class Method(StrEnum):
    """How entries are found, docs/background/methods.md. All end in a patch of one kind, verified and gated alike."""

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
"""Methods that replace the last linear map of both towers by a formula; docs/background/safety-axis.md."""


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
