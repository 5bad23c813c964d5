"""TensorRT and TensorRT-RTX engines through `cuda.bindings`, without torch. Both flavours share this one code path."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from functools import cache, partial
from queue import SimpleQueue
from typing import Any

import numpy as np

from uwm_deploy.errors import PrerequisiteError
from uwm_deploy.records.graph import Profile, Target, TensorSpec
from uwm_deploy.runtime.engine_stream import Cuda, EngineStream
from uwm_deploy.runtime.fork import never_destroyed_in_a_fork
from uwm_deploy.runtime.parts import InParts

MODULES = {Target.TENSORRT: "tensorrt", Target.TENSORRT_RTX: "tensorrt_rtx"}
"""Python module per flavour."""

LEAN_RUNTIME = "UWM_DEPLOY_LEAN_RUNTIME"
"""Library of the TensorRT release that version-compatible engines were built with (docs/how-to/compile.md)."""


@cache
def gpu_reason() -> str:
    """Empty when a CUDA driver with a device is there, else the reason why not."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver finds no GPU"
    return ""


@cache
def device_name() -> str:
    """Name of the first GPU, as its driver gives it; "cpu" where there is none."""
    if gpu_reason():
        return "cpu"
    driver, name = ctypes.CDLL("libcuda.so.1"), ctypes.create_string_buffer(100)
    driver.cuDeviceGetName(name, len(name), 0)
    return name.value.decode(errors="replace")


@cache
def compute_capability() -> str:
    """Of the first GPU, e.g. ``"9.0"``; empty where there is none."""
    if gpu_reason():
        return ""
    driver, parts = ctypes.CDLL("libcuda.so.1"), []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        value = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        parts.append(str(value.value))
    return ".".join(parts)


def reason_not_usable(target: Target) -> str:
    """Empty when engines of this flavour can be executed here, else the reason why not."""
    module = MODULES[target]
    if importlib.util.find_spec(module) is None:
        return f"package {module} is not installed"
    if reason := gpu_reason():
        return reason
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "package cuda-bindings is not installed"
    return ""


def profiles_of(engine: Any, name: str) -> tuple[Profile, ...]:
    """Batches that each optimisation profile of an engine takes at one of its inputs."""
    shapes = (engine.get_tensor_profile_shape(name, index) for index in range(engine.num_optimization_profiles))
    return tuple(Profile(min=low[0], opt=usual[0], max=high[0]) for low, usual, high in shapes)


def profile_for(rows: int, profiles: Sequence[Profile]) -> int:
    """Index of the profile that takes a batch and was optimised for the nearest one.

    Raises:
        PrerequisiteError: If none takes it.
    """
    fitting = [index for index, part in enumerate(profiles) if part.min <= rows <= part.max]
    if not fitting:
        taken = ", ".join(f"{part.min} to {part.max}" for part in profiles)
        raise PrerequisiteError(f"the engine takes batches of {taken}, not of {rows}", fix="stay within its profiles")
    return min(fitting, key=lambda index: abs(profiles[index].opt - rows))


def buckets_of(profiles: Sequence[Profile]) -> tuple[int, ...]:
    """Batches that graphs are captured for: powers of two and the profiles' own three; others are filled up to the next."""
    low, high = min(part.min for part in profiles), max(part.max for part in profiles)
    own = {size for part in profiles for size in (part.min, part.opt, part.max)}
    powers = {1 << power for power in range(high.bit_length())}
    return tuple(sorted(n for n in powers | own if low <= n <= high))


class TensorRTSession(InParts):
    """A serialized engine, deserialized from verified bytes.

    Host code inside engines stays forbidden, and no plugin library is ever loaded. Two lanes, each a stream with its own
    pinned and device buffers, let one call copy while another computes; any thread may call.

    Raises:
        PrerequisiteError: If this machine cannot execute the engine.
    """

    where: Mapping[str, str]
    concurrency = 2

    def __init__(
        self,
        target: Target,
        model: bytes,
        profile: Profile,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
    ) -> None:
        if reason := reason_not_usable(target):
            raise PrerequisiteError(f"a {target.value} engine cannot run here: {reason}", fix="see `uwm-deploy doctor`")
        self._trt = importlib.import_module(MODULES[target])
        self._cuda = Cuda(importlib.import_module("cuda.bindings.runtime"))
        super().__init__(profile, inputs, outputs)
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime = self._open_runtime(self._trt.Runtime(self._logger))
        self._runtime.engine_host_code_allowed = False
        self._engine = self._runtime.deserialize_cuda_engine(model)
        if self._engine is None:
            raise PrerequisiteError(
                f"{target.value} {self._trt.__version__} does not take this engine on this GPU",
                fix="build it with this version and for this GPU",
            )
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        profiles = profiles_of(self._engine, inputs[0].name)
        self._lanes = [
            EngineStream(
                self._cuda,
                self._engine,
                strategy,
                inputs[0],
                outputs,
                buckets_of(profiles),
                partial(profile_for, profiles=profiles),
            )
            for _ in range(self.concurrency)
        ]
        self._free: SimpleQueue[EngineStream] = SimpleQueue()
        for lane in self._lanes:
            self._free.put(lane)
        self.where = self._describe(target)
        never_destroyed_in_a_fork(self)

    @staticmethod
    def _open_runtime(runtime: Any) -> Any:
        """The installed runtime, or through it the lean runtime of another release, for engines built with that."""
        path = os.environ.get(LEAN_RUNTIME)
        if not path:
            return runtime
        other = runtime.load_runtime(path) if hasattr(runtime, "load_runtime") else None
        if other is None:
            raise PrerequisiteError(f"${LEAN_RUNTIME} is {path}, which is no lean runtime", fix="unset it, or mend it")
        return other

    def _describe(self, target: Target) -> dict[str, str]:
        properties = self._cuda(self._cuda.api.cudaGetDeviceProperties(0))
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        return {
            "provider": target.value,
            "device": name.strip("\x00"),
            "compute_capability": f"{properties.major}.{properties.minor}",
            MODULES[target]: str(self._trt.__version__),
        }

    def _call(self, rows: np.ndarray, outputs: tuple[TensorSpec, ...]) -> list[np.ndarray]:
        lane = self._free.get()
        try:
            return lane.run(rows, outputs)
        finally:
            self._free.put(lane)

    def close(self) -> None:
        """See `Session.close`."""
        if self._home.elsewhere:
            return
        for lane in self._lanes:
            lane.close()
        self._lanes = []
