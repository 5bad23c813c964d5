"""Reads what this machine has, and what a build here would run or mark "not run"."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from uwm_deploy import __version__
from uwm_deploy.errors import visible
from uwm_deploy.records.graph import Precision, Provider, Target
from uwm_deploy.runtime.cores import affinity, cores, quota, threads_asked, threads_not_understood
from uwm_deploy.runtime.machine import gpus, processor
from uwm_deploy.runtime.openvino import PRECISIONS, reason_not_usable
from uwm_deploy.runtime.probe import PROBED, reason_not_executed
from uwm_deploy.runtime.providers import provider_reason
from uwm_deploy.runtime.session import missing_package, usable
from uwm_deploy.runtime.tensorrt import MODULES

_PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "open_clip_torch",
    "onnx",
    "onnxscript",
    "polygraphy",
    "onnxruntime-gpu",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "cuda-bindings",
)

_ON_CPU = {
    Precision.FP16: "run on the CPU, which may compute in float32",
    Precision.FP8: "run on the CPU, computed in float32",
    Precision.W8A16: "run on the CPU, multiplied in float32",
}
"""Precisions whose graphs run on a CPU that does not compute in them; docs/how-to/precision.md."""

_PROVIDERS: dict[Provider, str] = {"cuda": "CUDA", "tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """One thing that this machine may have or do.

    Attributes:
        what: Its name.
        ok: Whether it is there.
        detail: Its version or how it runs; otherwise why it does not.
    """

    what: str
    ok: bool
    detail: str


def capabilities() -> list[Capability]:
    """Versions and hardware, then every target, precision and provider; nothing is left out because it is absent."""
    return [
        Capability(what="uwm-deploy", ok=True, detail=__version__),
        Capability(what="python", ok=True, detail=platform.python_version()),
        Capability(what="cpu", ok=True, detail=f"{os.cpu_count()} cores, {processor()}"),
        threads_of(quota()),
        _gpu(),
        *map(_package, _PACKAGES),
        *map(_target, Target),
        *(_precision(target, precision, usable(target)) for target in Target for precision in PROBED),
        *_gpu_only(),
    ]


def threads_of(limit: float | None) -> Capability:
    """What commands use of the cores.

    Args:
        limit: Cores' time that a container is given; None where there is no limit.
    """
    asked, strange = threads_asked(), threads_not_understood()
    # OpenMP knows nothing of a quota, and a value that it cannot read keeps others from setting one.
    torch = min(asked or (cores() if strange is None else affinity()), affinity())
    detail = f"PyTorch {torch} of {affinity()} usable cores"
    detail += f" (OMP_NUM_THREADS={asked})" if asked else ", 1 for a small model"
    detail += f"; ONNX Runtime and OpenVINO {cores()}"
    if strange is not None:
        detail += f"; OMP_NUM_THREADS is {visible(strange, 40)!r}, which no library takes: set a whole number from 1"
    if limit is not None and limit < affinity():
        detail += (
            f"; a container's quota of {limit:g} cores: what waits for its next turn looks slow, so give it whole cores"
        )
    return Capability(what="threads", ok=strange is None and (limit is None or limit >= 1), detail=detail)


def _gpu() -> Capability:
    lines, reason = gpus("name,compute_cap,driver_version")
    return Capability(what="gpu", ok=bool(lines), detail="; ".join(lines) or reason)


def _package(name: str) -> Capability:
    try:
        return Capability(what=name, ok=True, detail=metadata.version(name))
    except metadata.PackageNotFoundError:
        return Capability(what=name, ok=False, detail="not installed")


def _target(target: Target) -> Capability:
    """Whether engines of a target can be compiled and run here."""
    if missing := missing_package(target):
        return Capability(what=f"target {target.value}", ok=False, detail=f"not compiled, not run: {missing}")
    reason = usable(target)
    detail = f"{_compiled(target)}, not run: {reason}" if reason else "compiled and run"
    return Capability(what=f"target {target.value}", ok=not reason, detail=detail)


def _compiled(target: Target) -> str:
    """What becomes of a target whose engines cannot be executed here; only one compiles without a GPU."""
    if target is Target.TENSORRT_RTX and find_spec("tensorrt_rtx") is not None:
        return "compiled ahead of time"
    return "not compiled"


def _precision(target: Target, precision: Precision, unusable: str) -> Capability:
    """Whether graphs in a precision run; on a CPU this is tried.

    Args:
        target: Of the engines.
        precision: Of the graphs.
        unusable: Why no engine of the target runs here; empty where some do.
    """
    if target is Target.ONNXRUNTIME:
        why = missing_package(target) or reason_not_executed(precision)
        detail = f"not run: {why}" if why else _ON_CPU.get(precision, "run on the CPU")
    elif target is Target.OPENVINO:
        why = _openvino_reason(precision)
        detail = f"not run: {why}" if why else "run on the CPU"
    else:
        why = unusable
        detail = f"{_compiled(target)}, not run: {why}" if why else "compiled and run"
    return Capability(what=f"{target.value} {precision.value}", ok=not why, detail=detail)


def _openvino_reason(precision: Precision) -> str:
    """Why a precision is not run in OpenVINO; empty where it is."""
    if precision not in PRECISIONS:
        return "no CPU computes in it there"
    return reason_not_usable(precision)


def _gpu_only() -> Iterator[Capability]:
    """What needs a GPU whatever the precision."""
    for target in MODULES:
        reason = usable(target)
        detail = f"not run: {reason}" if reason else "run"
        yield Capability(what=f"{target.value} refit", ok=not reason, detail=detail)
    for provider, name in _PROVIDERS.items():
        reason = missing_package(Target.ONNXRUNTIME) or provider_reason(provider)
        detail = f"not run: {reason}" if reason else "can be opened"
        yield Capability(what=f"onnxruntime {name} provider", ok=not reason, detail=detail)
