"""TensorRT and TensorRT-RTX engines through `cuda.bindings`, without torch. Both flavours share this one code path."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from uwm_deploy.errors import PrerequisiteError
from uwm_deploy.records import Profile, Target, TensorSpec

MODULES = {Target.TENSORRT: "tensorrt", Target.TENSORRT_RTX: "tensorrt_rtx"}
"""Python module per flavour."""

LEAN_RUNTIME = "UWM_DEPLOY_LEAN_RUNTIME"
"""Library of the TensorRT release that version-compatible engines were built with (docs/compile.md)."""


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


class TensorRTSession:
    """A serialized engine, deserialized from verified bytes.

    Host code inside engines stays forbidden, and no plugin library is ever loaded.

    Raises:
        PrerequisiteError: If this machine cannot execute the engine.
    """

    where: Mapping[str, str]

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
        self._cuda = importlib.import_module("cuda.bindings.runtime")
        self.max_batch = profile.max
        self._input, self._outputs = inputs[0], outputs
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime = self._open_runtime(self._trt.Runtime(self._logger))
        self._runtime.engine_host_code_allowed = False
        self._engine = self._runtime.deserialize_cuda_engine(model)
        if self._engine is None:
            raise PrerequisiteError(
                f"{target.value} {self._trt.__version__} does not take this engine on this GPU",
                fix="build it with this version and for this GPU",
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise PrerequisiteError("no memory for an execution context", fix="free GPU memory")
        self._profiles, self._profile = profiles_of(self._engine, self._input.name), 0
        self._stream = self._call(self._cuda.cudaStreamCreate())
        self._buffers = self._allocate()
        self.where = self._describe(target)

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

    def _call(self, result: tuple[Any, ...]) -> Any:
        """Value of a CUDA runtime call, whose first item is its status."""
        status, *values = result
        if int(status) != 0:
            raise PrerequisiteError(f"CUDA call failed with {status}", fix="check the GPU with `uwm-deploy doctor`")
        return values[0] if values else None

    def _allocate(self) -> dict[str, int]:
        """Device memory for the largest batch of the profile."""
        sizes = {}
        for spec in (self._input, *self._outputs):
            items = int(np.prod([d for d in spec.shape[1:] if isinstance(d, int)], dtype=np.int64)) * self.max_batch
            sizes[spec.name] = items * np.dtype(spec.dtype).itemsize
        return {name: int(self._call(self._cuda.cudaMalloc(size))) for name, size in sizes.items()}

    def _describe(self, target: Target) -> dict[str, str]:
        properties = self._call(self._cuda.cudaGetDeviceProperties(0))
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        return {
            "provider": target.value,
            "device": name.strip("\x00"),
            "compute_capability": f"{properties.major}.{properties.minor}",
            MODULES[target]: str(self._trt.__version__),
        }

    def run(self, batch: np.ndarray) -> np.ndarray:
        """See `Session.run`."""
        return self._run(batch, self._outputs[:1])[self._outputs[0].name]

    def run_all(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """See `Session.run_all`."""
        return self._run(batch, self._outputs)

    def _run(self, batch: np.ndarray, wanted: tuple[TensorSpec, ...]) -> dict[str, np.ndarray]:
        data = np.ascontiguousarray(batch, dtype=self._input.dtype)
        parts = [self._run_once(data[i : i + self.max_batch], wanted) for i in range(0, len(data), self.max_batch)]
        columns = zip(wanted, zip(*parts, strict=True), strict=True)
        return {spec.name: np.concatenate(rows).astype(np.float32, copy=False) for spec, rows in columns}

    def _run_once(self, data: np.ndarray, wanted: tuple[TensorSpec, ...]) -> list[np.ndarray]:
        """One call; only what is wanted is copied back."""
        kinds = self._cuda.cudaMemcpyKind
        self._choose_profile(len(data))
        if not self._context.set_input_shape(self._input.name, data.shape):
            raise PrerequisiteError(f"the engine refuses the shape {data.shape}", fix="stay within its profile")
        for name, address in self._buffers.items():
            if not self._context.set_tensor_address(name, address):
                raise PrerequisiteError(f"the engine has no tensor {name}", fix="build it again")
        copy = self._cuda.cudaMemcpyAsync
        source = self._buffers[self._input.name]
        self._call(copy(source, data.ctypes.data, data.nbytes, kinds.cudaMemcpyHostToDevice, self._stream))
        if not self._context.execute_async_v3(int(self._stream)):
            raise PrerequisiteError("the engine did not run", fix="see the log of TensorRT")
        results = []
        for spec in wanted:
            width = [d for d in spec.shape[1:] if isinstance(d, int)]
            result = np.empty((len(data), *width), dtype=spec.dtype)
            drain = self._buffers[spec.name]
            self._call(copy(result.ctypes.data, drain, result.nbytes, kinds.cudaMemcpyDeviceToHost, self._stream))
            results.append(result)
        self._call(self._cuda.cudaStreamSynchronize(self._stream))
        return results

    def _choose_profile(self, rows: int) -> None:
        """The engine's kernels for a batch; switching costs time, so only when another profile is nearer."""
        wanted = profile_for(rows, self._profiles)
        if wanted == self._profile:
            return
        if not self._context.set_optimization_profile_async(wanted, int(self._stream)):
            raise PrerequisiteError(f"the engine does not switch to profile {wanted}", fix="build it again")
        self._call(self._cuda.cudaStreamSynchronize(self._stream))
        self._profile = wanted

    def close(self) -> None:
        """See `Session.close`."""
        for address in self._buffers.values():
            self._call(self._cuda.cudaFree(address))
        self._buffers = {}
        self._call(self._cuda.cudaStreamDestroy(self._stream))
