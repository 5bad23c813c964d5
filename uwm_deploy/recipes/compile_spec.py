"""What a recipe says of graphs and engines: how they are exported, and what they are compiled for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from uwm_deploy.errors import RecipeError
from uwm_deploy.records.graph import Precision, Profile, Provider, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSpec:
    """How the ONNX graphs are made.

    Attributes:
        opset: ONNX operator set.
        normalise: Whether the graph ends with L2 normalisation.
        ids_dtype: Element type of the text graph's `input_ids`.
        pixels: What the image graph takes: crops of 8 bits, which it normalises itself, or normalised pixels.
        rows: What the text graph takes: rows that are cut behind the end token, where nothing that follows it changes the
            embedding, or whole rows.
    """

    opset: int = 20
    normalise: bool = True
    ids_dtype: Literal["int64", "int32"] = "int64"
    pixels: Literal["uint8", "float32"] = "uint8"
    rows: Literal["cut", "whole"] = "cut"


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


Attention = Literal["steps", "fused", "measured"]
"""How attention is compiled; `measured` decides for each tower and target (`graphs.attention_choice`)."""


Quantiser = Literal["built-in", "nearest", "modelopt-entropy", "modelopt-max"]


CURRENT_GPU = "current"
"""Stands for the compute capability of the GPU that an engine is built on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuilderSpec:
    """How one flavour of TensorRT builds its engines (docs/how-to/compile.md).

    Attributes:
        workspace_mib: Most memory in MiB that a layer may take for itself while it runs; 0 sets no limit.
        optimisation_level: From 0, which builds fastest, to 5, which searches longest.
        tf32: Whether products of float32 may be computed with mantissas of 10 bits.
        timing_cache: Whether times of kernels are kept for the next build; TensorRT-RTX measures none.
        compute_capabilities: Of the GPUs that an engine is for, such as ``"8.9"``, or ``"current"`` alone; empty leaves
            it to the flavour. TensorRT-RTX only.
        hardware_compatibility: Which other GPUs than the one it is built on an engine also runs on. TensorRT only.
        version_compatible: Whether later releases can load an engine. TensorRT only.
        null_weights: Whether an engine is built without the weights that a refit can replace, which are put in afterwards:
            the build takes less memory. For refittable engines of TensorRT-RTX only.
    """

    workspace_mib: int = 0
    optimisation_level: int = 3
    tf32: bool = False
    timing_cache: bool = True
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatibility: Literal["none", "ampere-plus", "same-compute-capability"] = "none"
    version_compatible: bool = False
    null_weights: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxRuntimeSpec:
    """What graphs for ONNX Runtime are made for (docs/how-to/compile.md).

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
        quantiser: What makes INT8 and FP8 graphs: this program, which chooses on the calibration set how INT8 is rounded,
            or rounds to the nearest, which a refit can do again; or nvidia-modelopt with one of its ways to find ranges.
        attention: Its steps one by one, or one `Attention` node for each, or what is faster here and gives the same numbers.
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
    attention: Attention = "steps"
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


def check_compile(spec: CompileSpec, where: str) -> None:
    """Checks what is compiled, and how `auto` searches.

    Args:
        spec: To check.
        where: File for error messages.

    Raises:
        RecipeError: If nothing is named, something is named twice, or a value is out of range.
    """
    check_profiles(spec.profiles, where)
    named = {
        "targets": spec.targets,
        "precision": spec.precisions,
        "onnxruntime.providers": spec.onnxruntime.providers,
    }
    for key, found in named.items():
        if not found or len(set(found)) < len(found):
            raise RecipeError(
                f"{where}: compile.{key} is {[str(one) for one in found]}", fix="name each once, at least one"
            )
    auto = spec.auto
    if auto.lowest in (Precision.FP32, Precision.AUTO):
        raise RecipeError(f"{where}: compile.auto.lowest is {auto.lowest}", fix="name a lower precision, such as int8")
    if not 0 < auto.flips < 100:
        raise RecipeError(f"{where}: compile.auto.flips is {auto.flips:g}", fix="use a percentage between 0 and 100")
    if auto.items < 1:
        raise RecipeError(f"{where}: compile.auto.items is {auto.items}", fix="use 1 or more")
    check_builder(spec.tensorrt, "tensorrt", where)
    check_builder(spec.tensorrt_rtx, "tensorrt_rtx", where)


def check_profiles(profiles: tuple[Profile, ...], where: str) -> None:
    """Checks that profiles together take every batch from the smallest to the largest.

    Raises:
        RecipeError: If there is none, one is upside down, or they leave a gap.
    """
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
    "tensorrt": {
        "compute_capabilities": "TensorRT builds for the GPU it runs on; see hardware_compatibility",
        "null_weights": "TensorRT builds without the weights of convolutions only, and a tower has one",
    },
    "tensorrt_rtx": {
        "hardware_compatibility": "TensorRT-RTX names its GPUs; use compute_capabilities",
        "version_compatible": "an engine of TensorRT-RTX is for one release of it; build again for another",
    },
}
"""What a flavour does not have, and what to do instead."""


def check_builder(spec: BuilderSpec, name: str, where: str) -> None:
    """Checks how engines are built.

    Args:
        spec: To check.
        name: Its key in `CompileSpec`: ``"tensorrt"`` or ``"tensorrt_rtx"``.
        where: File for error messages.

    Raises:
        RecipeError: If a value is out of range, or something that this flavour does not have.
    """
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
