"""One stream of a TensorRT engine: pinned and device buffers, and a CUDA graph per shape of its input. Needs no torch."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from uwm_deploy.errors import PrerequisiteError
from uwm_deploy.records.graph import TensorSpec

_ALIGNMENT = 256
"""Bytes; TensorRT wants its working memory aligned, and no allocation may be empty."""

_Shape = tuple[int, ...]
"""Of an input, the batch first."""

_NO_GRAPH = 3
"""Times that capturing is tried for a shape; an engine that is still being finished cannot be captured yet."""


class Cuda:
    """The CUDA runtime with its status checked.

    Attributes:
        api: `cuda.bindings.runtime`.
    """

    def __init__(self, api: Any) -> None:
        self.api = api

    def __call__(self, result: tuple[Any, ...]) -> Any:
        """Value of a call, whose first item is its status.

        Raises:
            PrerequisiteError: If the call failed.
        """
        status, *values = result
        if int(status) != 0:
            raise PrerequisiteError(f"CUDA call failed with {status}", fix="check the GPU with `uwm-deploy doctor`")
        return values[0] if values else None


class EngineStream:
    """Runs one batch at a time.

    A captured graph is bound to the shape and the context it was captured with, so there is a context for each shape; they
    share working memory, since only one runs at a time.

    Args:
        cuda: Runtime.
        engine: A deserialized engine.
        strategy: The engine's name for memory that its user provides.
        source: Its input.
        outputs: Its outputs.
        buckets: Batch sizes, ascending; a batch is filled up to the next one.
        profile_of: Batch size to the optimisation profile of the engine that is for it.
    """

    def __init__(
        self,
        cuda: Cuda,
        engine: Any,
        strategy: Any,
        source: TensorSpec,
        outputs: tuple[TensorSpec, ...],
        buckets: tuple[int, ...],
        profile_of: Callable[[int], int],
    ) -> None:
        self._cuda, self._engine, self._strategy, self._buckets = cuda, engine, strategy, buckets
        self._profile_of = profile_of
        self._source, self._outputs = source, outputs
        api = cuda.api
        self._stream = cuda(api.cudaStreamCreateWithFlags(api.cudaStreamNonBlocking))
        self._pinned: list[int] = []
        self._host = {spec.name: self._host_array(spec) for spec in (source, *outputs)}
        self._device = {name: int(cuda(api.cudaMalloc(array.nbytes))) for name, array in self._host.items()}
        self._scratch_bytes = max(int(engine.device_memory_size_v2), _ALIGNMENT)
        self._scratch = int(cuda(api.cudaMalloc(self._scratch_bytes)))
        self._contexts: dict[_Shape, Any] = {}
        self._graphs: dict[tuple[_Shape, int], Any] = {}
        self._tries: dict[tuple[_Shape, int], int] = {}

    def run(self, batch: np.ndarray, wanted: tuple[TensorSpec, ...]) -> list[np.ndarray]:
        """Runs (n, ...) inputs, n at most the largest bucket.

        Args:
            batch: (n, ...), the engine's input dtype; rows that fill up the bucket are leftovers of the last call, and are
                not returned.
            wanted: The first of the outputs, in their order; only they are copied back.

        Returns:
            The wanted outputs, (n, ...) each, in the dtype that the engine gives.

        Raises:
            PrerequisiteError: If a call of CUDA or TensorRT fails.
        """
        shape = (next(size for size in self._buckets if size >= len(batch)), *batch.shape[1:])
        self._rows_in(shape)[: len(batch)] = batch
        key = (shape, len(wanted))
        if key not in self._graphs and self._tries.get(key, 0) in range(1, _NO_GRAPH + 1):
            self._capture(shape, wanted)
        if graph := self._graphs.get(key):
            self._cuda(self._cuda.api.cudaGraphLaunch(graph, self._stream))
        else:
            # Also the first call of every size: TensorRT finishes its setting up in it, which cannot be captured.
            self._enqueue(shape, wanted)
            self._tries[key] = self._tries.get(key, 0) + 1
        self._cuda(self._cuda.api.cudaStreamSynchronize(self._stream))
        return [self._host[spec.name][: len(batch)].copy() for spec in wanted]

    def close(self) -> None:
        """Releases everything."""
        api = self._cuda.api
        for graph in self._graphs.values():
            self._cuda(api.cudaGraphExecDestroy(graph))
        self._graphs, self._contexts = {}, {}
        for address in [*self._device.values(), self._scratch]:
            self._cuda(api.cudaFree(address))
        self._host = {}
        for address in self._pinned:
            self._cuda(api.cudaFreeHost(address))
        self._cuda(api.cudaStreamDestroy(self._stream))

    def _host_array(self, spec: TensorSpec) -> np.ndarray:
        """Pinned memory of the largest batch, which the GPU copies without a detour."""
        shape = (self._buckets[-1], *(size.max for size in spec.row_sizes))
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize
        api = self._cuda.api
        address = int(self._cuda(api.cudaHostAlloc(size, api.cudaHostAllocDefault)))
        self._pinned.append(address)
        raw: np.ndarray = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        array: np.ndarray = raw.view(spec.dtype).reshape(shape)
        array[:] = 0
        return array

    def _rows_in(self, shape: _Shape) -> np.ndarray:
        """The beginning of the input's memory as an array of a shape: shorter rows lie close together."""
        whole: np.ndarray = self._host[self._source.name].reshape(-1)
        return whole[: math.prod(shape)].reshape(shape)

    def _context(self, shape: _Shape) -> Any:
        if shape in self._contexts:
            return self._contexts[shape]
        context = self._engine.create_execution_context(self._strategy)
        if context is None:
            raise PrerequisiteError("no memory for an execution context", fix="free GPU memory")
        context.set_device_memory(self._scratch, self._scratch_bytes)
        profile = self._profile_of(shape[0])
        # A new context has the first profile; with several, each context keeps the one that its batch is for.
        if profile and not context.set_optimization_profile_async(profile, int(self._stream)):
            raise PrerequisiteError(f"the engine does not switch to profile {profile}", fix="build it again")
        if not context.set_input_shape(self._source.name, shape):
            raise PrerequisiteError(f"the engine refuses the shape {shape}", fix="stay within its profile")
        for name, address in self._device.items():
            if not context.set_tensor_address(name, address):
                raise PrerequisiteError(f"the engine has no tensor {name}", fix="build it again")
        self._contexts[shape] = context
        return context

    def _enqueue(self, shape: _Shape, wanted: tuple[TensorSpec, ...]) -> None:
        """Copies in, computes, copies out; all on the stream, from and to addresses that never change."""
        kinds, copy = self._cuda.api.cudaMemcpyKind, self._cuda.api.cudaMemcpyAsync
        name = self._source.name
        host = self._rows_in(shape)
        self._cuda(copy(self._device[name], host.ctypes.data, host.nbytes, kinds.cudaMemcpyHostToDevice, self._stream))
        if not self._context(shape).execute_async_v3(int(self._stream)):
            raise PrerequisiteError("the engine did not run", fix="see the log of TensorRT")
        for spec in wanted:
            host, source = self._host[spec.name][: shape[0]], self._device[spec.name]
            self._cuda(copy(host.ctypes.data, source, host.nbytes, kinds.cudaMemcpyDeviceToHost, self._stream))

    def _capture(self, shape: _Shape, wanted: tuple[TensorSpec, ...]) -> None:
        """Records one call as a graph; an engine that cannot be recorded runs without."""
        api, context = self._cuda.api, self._context(shape)
        capturable = getattr(context, "is_stream_capturable", None)
        if capturable is not None and not capturable(int(self._stream)):
            return
        # Thread-local: what other threads allocate meanwhile must not spoil the recording.
        self._cuda(api.cudaStreamBeginCapture(self._stream, api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        try:
            self._enqueue(shape, wanted)
        except PrerequisiteError:
            api.cudaStreamEndCapture(self._stream)  # leaves the mode; its status is that of the failed recording
            return
        status, graph = api.cudaStreamEndCapture(self._stream)
        if int(status) == 0:
            self._graphs[shape, len(wanted)] = self._cuda(api.cudaGraphInstantiate(graph, 0))
            self._cuda(api.cudaGraphDestroy(graph))
