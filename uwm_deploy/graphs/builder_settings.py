"""Settings of a builder of TensorRT or TensorRT-RTX, each read back after it was set: most of them fail silently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from uwm_deploy.errors import RecipeError
from uwm_deploy.graphs.builder_log import BuildFailed, last_of
from uwm_deploy.recipes.compile_spec import CURRENT_GPU, BuilderSpec
from uwm_deploy.records.graph import Profile

_MIB = 1 << 20
_SEE = "see docs/how-to/compile.md"
_HARDWARE = {"ampere-plus": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}


def apply_settings(trt: Any, config: Any, spec: BuilderSpec, *, refittable: bool, messages: Sequence[str]) -> None:
    """Puts the settings of a recipe into a builder's configuration.

    Args:
        trt: Module of the flavour.
        config: Its `IBuilderConfig`.
        spec: Settings of the recipe.
        refittable: Whether the weights that were marked in the network can be replaced in the engine.
        messages: Messages of its logger.

    Raises:
        RecipeError: If this flavour or release does not have a setting.
        BuildFailed: If the builder does not take a value.
    """
    _set_flag(trt, config, "TF32", spec.tf32)  # on by default; float32 must mean float32
    if spec.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_mib * _MIB)
        _check("workspace_mib", spec.workspace_mib * _MIB, _workspace_bytes(trt, config), messages)
    config.builder_optimization_level = spec.optimisation_level
    _check("optimisation_level", spec.optimisation_level, int(config.builder_optimization_level), messages)
    if spec.compute_capabilities:
        _set_compute_capabilities(trt, config, spec.compute_capabilities, messages)
    if spec.hardware_compatibility != "none":
        name = _HARDWARE[spec.hardware_compatibility]
        level = getattr(trt.HardwareCompatibilityLevel, name, None)
        if level is None:
            raise RecipeError(f"{trt.__name__} {trt.__version__} has no hardware compatibility {name}", fix=_SEE)
        config.hardware_compatibility_level = level
        _check("hardware_compatibility", level, config.hardware_compatibility_level, messages)
    if spec.version_compatible:
        # Without the lean runtime, which is code inside the engine: our runtime never runs such code.
        _set_flag(trt, config, "VERSION_COMPATIBLE", True)
        _set_flag(trt, config, "EXCLUDE_LEAN_RUNTIME", True)
    if refittable:  # other weights stay constants, which the builder may optimise away
        _set_flag(trt, config, "REFIT_INDIVIDUAL", True)
    if spec.null_weights:
        if not refittable:
            raise RecipeError("null_weights is for refittable engines only", fix="ask for refittable, too")
        _set_flag(trt, config, "STRIP_PLAN", True)


def add_profiles(
    builder: Any, config: Any, name: str, row: Sequence[Profile], profiles: Sequence[Profile], messages: Sequence[str]
) -> None:
    """Adds optimisation profiles, in their order.

    Args:
        builder: The flavour's builder.
        config: Its configuration.
        name: The network's input.
        row: Sizes of each dimension of one row of the input, without the batch.
        profiles: Batch sizes.
        messages: Messages of its logger.

    Raises:
        BuildFailed: If one is not accepted.
    """
    for number, part in enumerate(profiles):
        sizes = (part, *row)
        shapes = [tuple(getattr(size, which) for size in sizes) for which in ("min", "opt", "max")]
        profile = builder.create_optimization_profile()
        if profile is None:
            raise BuildFailed(f"no optimisation profile: {last_of(messages)}")
        try:
            refused = profile.set_shape(name, *shapes) is False or not profile
        except ValueError as error:
            raise BuildFailed(f"profile {shapes} of {name} is not accepted: {error}") from error
        if refused:
            raise BuildFailed(f"profile {shapes} of {name} is not accepted: {last_of(messages)}")
        if config.add_optimization_profile(profile) != number:
            raise BuildFailed(f"profile {shapes} is not accepted: {last_of(messages)}")


def settings_of(trt: Any, config: Any, spec: BuilderSpec, profiles: Sequence[Profile]) -> dict[str, str]:
    """Settings of a configuration, read back for the record of the engine."""
    found = {
        "tf32": _word(config.get_flag(trt.BuilderFlag.TF32)),
        "optimization_level": str(config.builder_optimization_level),
        "workspace_mib": str(_workspace_bytes(trt, config) // _MIB) if spec.workspace_mib else "all of the device's",
        "profiles": ", ".join(f"{p.min}-{p.opt}-{p.max}" for p in profiles),
    }
    if hasattr(config, "num_compute_capabilities"):
        count = config.num_compute_capabilities
        names = [_name(config.get_compute_capability(i)) for i in range(count)]
        found["compute_capabilities"] = ", ".join(names) or "the flavour's own"
    else:
        found["hardware_compatibility"] = _name(config.hardware_compatibility_level).lower()
        found["version_compatible"] = _word(config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE))
    return found


def _set_compute_capabilities(trt: Any, config: Any, wanted: Sequence[str], messages: Sequence[str]) -> None:
    known = getattr(trt, "ComputeCapability", None)
    if known is None or not hasattr(config, "num_compute_capabilities"):
        raise RecipeError(f"{trt.__name__} {trt.__version__} builds for the GPU it runs on, not for others", fix=_SEE)
    names = ["CURRENT" if text == CURRENT_GPU else f"SM{text.replace('.', '')}" for text in wanted]
    for text, name in zip(wanted, names, strict=True):
        if not hasattr(known, name):
            has = ", ".join(f"{one[2:-1]}.{one[-1]}" for one in sorted(known.__members__) if one.startswith("SM"))
            raise RecipeError(f"{trt.__name__} {trt.__version__} does not build for {text}; it knows {has}", fix=_SEE)
    config.num_compute_capabilities = len(names)
    _check("compute_capabilities", len(names), config.num_compute_capabilities, messages)
    for index, name in enumerate(names):
        if not config.set_compute_capability(getattr(known, name), index):
            raise BuildFailed(f"compute capability {wanted[index]} is not accepted: {last_of(messages)}")


def _set_flag(trt: Any, config: Any, name: str, wanted: bool) -> None:
    flag = getattr(trt.BuilderFlag, name, None)
    if flag is None:
        raise RecipeError(f"{trt.__name__} {trt.__version__} has no builder flag {name}", fix=_SEE)
    (config.set_flag if wanted else config.clear_flag)(flag)
    if bool(config.get_flag(flag)) is not wanted:
        raise BuildFailed(f"the builder does not take its flag {name} as {_word(wanted)}")


def _check(key: str, wanted: object, found: object, messages: Sequence[str]) -> None:
    if wanted != found:
        raise BuildFailed(f"{key} is {found} after it was set to {wanted}: {last_of(messages)}")


def _workspace_bytes(trt: Any, config: Any) -> int:
    return int(config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE))


def _name(member: Any) -> str:
    return str(member).rsplit(".", 1)[-1]


def _word(value: object) -> str:
    return str(bool(value)).lower()
