"""What verification measures of every artifact, and its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from uwm_deploy.errors import IntegrityError
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.metrics import (
    PREFERENCE,
    Flips,
    Geometry,
    Proportion,
    RankChange,
    RiskReport,
    SafetyReport,
    WorstItem,
)
from uwm_deploy.records.model import Digest, ModelRef, TowerName
from uwm_deploy.records.shape import LATER

CONVERTED = "the converted graph: "
"""How a line of an audit begins that is about the graph in lower precision that an engine was compiled from."""


class Evidence(StrEnum):
    """Whether the numbers of an artifact come from executing it."""

    EXECUTED = "executed"
    NOT_RUN = "not run"


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
class LengthCheck:
    """Captions of one length, as a text graph takes them that cuts rows, compared with whole rows in the edited model.

    Attributes:
        tokens: Ids of a row as it is cut.
        n: Captions compared.
        cosine_min: Smallest cosine.
        max_abs: Largest difference of an entry, of embeddings of length 1.
        error: What the artifact says when it does not take such rows; empty when it does.
    """

    tokens: int
    n: int
    cosine_min: float
    max_abs: float
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatCheck:
    """Whether an artifact gives the same rows the same embeddings twice.

    Attributes:
        n: Rows.
        calls: Largest difference between two equal calls, as a share of a row's length.
        batch: The same between equal rows of one batch; None where the artifact takes one row at a time.
    """

    tower: TowerName
    n: int
    calls: float
    batch: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowParity:
    """How far the embeddings of every item, of one member and one concept, are from the edited model's; of length 1.

    Attributes:
        n: Items.
        cosine_min: Smallest cosine of an item.
        max_abs: Largest difference of an entry.
        undone: Share of the way from the edited to the original model, over all these items; 0 is the edited model. None
            where the edit hardly moves them.
    """

    n: int
    cosine_min: float
    max_abs: float
    undone: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphAudit:
    """One tower's weights as they lie in an artifact, compared with the edited model; nothing is executed.

    Attributes:
        layers: Edited layers that hold exactly the edited weight.
        weights: Other weights that were compared, bit for bit.
        edit: Edited layers that do not, with the reason.
        differ: Other weights that are not the edited model's.
        lowered: What must be in float32 whatever the precision, such as a map behind the embedding, and is not.
        structure: What else differs from the model: operators, edges, attributes, constants.
        operators: Operators that were compared with a graph that was made anew; 0 where nothing could be made anew.
        anew: What was made anew: ``"export"``, ``"convert"``, ``"compile"``.
    """

    layers: int
    weights: int
    edit: tuple[str, ...] = ()
    differ: tuple[str, ...] = ()
    lowered: tuple[str, ...] = ()
    structure: tuple[str, ...] = ()
    operators: int = field(default=0, metadata=LATER)
    anew: tuple[str, ...] = field(default=(), metadata=LATER)


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
class Direction:
    """Whether unsafe members differ from safe ones as they do in the calibration set, by the source model.

    The way from safe to unsafe is the mean difference of the calibration items of the same concept.

    Attributes:
        agrees: Share of evaluation items whose own difference goes that way.
        own: The same of the calibration items, each against the others.
        shared: Evaluation items of concepts that the calibration set has; for the others the way is that of all its items.
    """

    agrees: Proportion
    own: Proportion
    shared: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DataHealth:
    """Whether an evaluation set can measure anything, by the source model.

    Attributes:
        paired: Members of an item that belong together, such as `safe_text safe_image`, to the share of items in which they
            are more alike than the same two members of different items.
        aligned: Share of items in which texts fit their own images better than crosswise.
        calibrated_concepts: Concepts of the calibration set, with their number of items.
        directions: Of images and of texts, by tower, as far as the calibration set has them; None in a report of an earlier
            release.
        copies: Share of items that repeat an earlier one: of quadruples, which share two of their four members, and of the
            images of each zero-shot set; None in a report of an earlier release.
    """

    paired: Mapping[str, Proportion]
    aligned: Proportion
    calibrated_concepts: Mapping[str, int]
    directions: Mapping[str, Direction] | None = field(default=None, metadata=LATER)
    copies: Mapping[str, Proportion] | None = field(default=None, metadata=LATER)


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
        rows: Member of a quadruple, or part of a zero-shot set, to concept to the differences of every item.
        repeats: Per tower, equal rows twice.
        geometry: Neighbourhoods and spread of its safe embeddings against the edited model's.
        lengths: Tower to the largest difference of an embedding's length from 1, over the evaluation set; empty where the
            graphs do not normalise.
        text_lengths: Every length that its text graph cuts rows to; empty where rows are whole.
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
    rows: Mapping[str, Mapping[str, RowParity]] = field(default_factory=dict, metadata=LATER)
    repeats: tuple[RepeatCheck, ...] = field(default=(), metadata=LATER)
    lengths: Mapping[str, float] = field(default_factory=dict, metadata=LATER)
    geometry: Geometry | None = field(default=None, metadata=LATER)
    text_lengths: tuple[LengthCheck, ...] = field(default=(), metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledDecoding:
    """What becomes of the edited model's decisions where large JPEGs are decoded at a reduced size.

    Attributes:
        images: Images of the evaluation set.
        reduced: JPEGs among them that are large enough to be reduced; only these, and their quadruples, are measured.
        cosine_min: Smallest cosine of an embedding to that of the same image decoded in full; 1 where none was reduced.
        cosine_mean: Mean of these cosines.
        flips: Of the quadruples with such an image, against full decoding, per preference metric.
    """

    images: int
    reduced: int
    cosine_min: float = 1.0
    cosine_mean: float = 1.0
    flips: Mapping[str, Flips] = field(default_factory=dict)


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
        scaled: Decoding at a reduced size; None where it was not asked, as of a set that has no files.
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
    scaled: ScaledDecoding | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        """Refuses a report that does not measure the two models, or does not compare them: the gate reads all of it."""
        for what, found in (("original", self.original.preference), ("edited", self.edited.preference)):
            self._refuse_without(what, found)
        self._refuse_without("edit_effect", self.edit_effect)

    @staticmethod
    def _refuse_without(what: str, found: Mapping[str, object]) -> None:
        if lost := sorted(PREFERENCE - set(found)):
            raise IntegrityError(f"{what} lacks {', '.join(lost)}", fix="restore the file or build again")
