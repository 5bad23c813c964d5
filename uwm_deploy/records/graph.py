"""Graphs and engines: precisions, targets, conversions, profiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.records.shape import LATER

EXPORTED = "onnx"
"""Name of the exported graphs in a report; they are evidence, not a variant that ships."""


BUILT_IN, CALIBRATED = "built-in", "built-in, calibrated"
"""What the record of a conversion calls this program's own ways: to the nearest, or as chosen on the calibration set."""


TOKENS = "tokens"
"""Name of the number of ids of a row, where it varies."""


STEPS, FUSED = "steps", "fused"
"""How the record of an engine says that attention is computed: step by step, or as one node each."""


class Precision(StrEnum):
    """What the linear layers of a graph compute in; `auto` searches for the cheapest mix that keeps the decisions.

    `w8a16` stores weights in 8 bits and leaves activations as they are.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"
    W8A16 = "w8a16"
    AUTO = "auto"


class Target(StrEnum):
    """What an ONNX graph is compiled for."""

    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
    OPENVINO = "openvino"


Provider = Literal["any", "cpu", "cuda", "tensorrt", "tensorrt-rtx"]
"""Execution provider of ONNX Runtime that a graph is for; `any` is optimised for no machine and opened on the best there."""


def variant_name(target: Target, precision: Precision, provider: Provider = "any") -> str:
    """Name of one variant: target, provider where it is a certain one, precision."""
    return "-".join([target.value, *([] if provider == "any" else [provider]), precision.value])


def target_of(variant: str) -> Target | None:
    """Target of a variant; None for the exported graphs themselves."""
    longest_first = sorted(Target, key=len, reverse=True)
    return next((target for target in longest_first if variant.startswith(f"{target.value}-")), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalisation:
    """What a graph itself does with pixels of 0 to 255: multiply by `rescale`, subtract the mean, divide by the deviation.

    Attributes:
        rescale: Factor from 0..255 to 0..1.
        mean: Per channel, RGB, after rescaling.
        std: Per channel, RGB, after rescaling.
    """

    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Smallest, most usual and largest size that an engine accepts of one dimension, above all of the batch."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLengths:
    """Which lengths the rows of a text graph have, where what stands behind a caption's end token changes nothing.

    Attributes:
        longest: Ids of a whole row.
        end_id: The end token.
        step: Rows are cut to a multiple of this many ids, or are whole.
    """

    longest: int
    end_id: int
    step: int

    @property
    def all(self) -> tuple[int, ...]:
        """Every length, ascending."""
        return (*range(self.step, self.longest, self.step), self.longest)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A graph's input or output.

    Attributes:
        name: Its name in the graph.
        dtype: Type of its elements, as numpy names it.
        shape: Its shape; a string is a dimension that varies.
        normalisation: Of an input that takes crops, (batch, H, W, 3) uint8; None where pixels come normalised.
        lengths: Of ids whose number varies, (batch, tokens); None where every row is whole.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    normalisation: Normalisation | None = field(default=None, metadata=LATER)
    lengths: RowLengths | None = field(default=None, metadata=LATER)

    @property
    def row_sizes(self) -> tuple[Profile, ...]:
        """Smallest, most usual and largest size of each dimension of a row of an input."""
        found = []
        for size in self.shape[1:]:
            if isinstance(size, int):
                found.append(Profile(min=size, opt=size, max=size))
            elif self.lengths is not None:
                usual = min(2 * self.lengths.step, self.lengths.longest)  # most captions have 8 to 15 ids
                found.append(Profile(min=1, opt=usual, max=self.lengths.longest))
        return tuple(found)


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
        two_terms: Linear layers that multiply two 8-bit terms of their activation.
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
    two_terms: tuple[str, ...] = field(default=(), metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSensitivity:
    """What lowering one linear layer alone does to decisions that are nearly ties.

    Attributes:
        sensitivity: Mean squared change of their margins.
        kept: Whether it stays in float32.
        terms: Number of 8-bit terms of its activation (`graphs.two_terms`).
    """

    tower: TowerName
    name: str
    sensitivity: float
    kept: bool
    terms: int = field(default=1, metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionStep:
    """One plan that was executed and measured.

    Attributes:
        kept: Layers in float32.
        low_share: Share of the multiplications of linear layers that are in low precision.
        flips: Percentage of decisions of the worst preference metric that differ from the float32 graphs'.
        expected: The same, estimated from the changes of all margins (`safeground.expected_flips`); what is searched by.
        twice: Share of the multiplications that are done twice, for two terms of an activation; part of `low_share`.
    """

    what: str
    kept: int
    low_share: float
    flips: float
    expected: float = field(default=0.0, metadata=LATER)
    twice: float = field(default=0.0, metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionPlan:
    """What the search of precision `auto`, or of `int8`, chose, and why.

    Attributes:
        lowest: Precision of what is not kept.
        budget: Percentage of flips that the user allows.
        limit: Percentage that the search allowed on its own quadruples.
        n: Quadruples it measured on.
        kept: Layers in float32, per tower.
        flips: Percentage of decisions of the worst metric that differ on these quadruples.
        expected: The same, estimated; it keeps the limit, unless INT8 misses it with two terms in all layers.
        layers: All linear layers, the most sensitive per multiplication first.
        steps: Every plan that was measured, in order.
        twice: Share of the multiplications that are done twice, for two terms of an activation; part of `low_share`.
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
    expected: float = field(default=0.0, metadata=LATER)
    twice: float = field(default=0.0, metadata=LATER)

    def two_terms(self, tower: TowerName) -> tuple[str, ...]:
        """Layers of a tower that multiply two 8-bit terms of their activation."""
        return tuple(layer.name for layer in self.layers if layer.tower is tower and layer.terms > 1)


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
        whole_rows: Why a text graph takes whole rows only; empty where it takes shorter ones, and for images.

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
    whole_rows: str = field(default="", metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArtifact:
    """One tower compiled for one target.

    Attributes:
        variant: ``<target>-<precision>``; the image and the text engine of one variant share it.
        precision: Precision that was achieved, read back from the engine or the graph.
        file: Name in its stage folder; an ONNX graph may have its weights in `external_data` beside it, a model of
            OpenVINO always has.
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
