"""OpenVINO models on the CPU: opened from checked bytes, with the threads of this process, and read back precision."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from queue import SimpleQueue
from typing import Any

import numpy as np

from uwm_deploy.errors import PrerequisiteError
from uwm_deploy.records.graph import Precision, Profile, TensorSpec
from uwm_deploy.runtime.cores import cores
from uwm_deploy.runtime.fork import never_destroyed_in_a_fork
from uwm_deploy.runtime.parts import InParts

MODULE = "openvino"

PRECISIONS = (Precision.FP32, Precision.BF16, Precision.INT8, Precision.W8A16)
"""What is converted for it. A CPU computes fp16 in float32, and OpenVINO has no FP8 there."""

_DEVICE = "CPU"
_FIX = "see `uwm-deploy doctor`"


def reason_not_usable(precision: str = "") -> str:
    """Empty when a model in a precision can be executed here, else the reason why not.

    Args:
        precision: As an engine's record has it; empty asks for the package alone.
    """
    if importlib.util.find_spec(MODULE) is None:
        return f"package {MODULE} is not installed"
    if precision == Precision.BF16 and "BF16" not in _capabilities():
        return "this processor does not multiply in bfloat16"
    return ""


@cache
def _capabilities() -> tuple[str, ...]:
    """What OpenVINO says that this processor computes in."""
    import openvino

    return tuple(openvino.Core().get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES"))


class _SignalStack(ctypes.Structure):
    """The C library's `stack_t`."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size_bytes", ctypes.c_size_t))


@contextlib.contextmanager
def signal_stack_kept() -> Iterator[None]:
    """While a model is opened: the thread's stack for signal handlers is afterwards what it was.

    OpenVINO sets one of its own for every model and, when models are closed in the order they were opened, leaves one that
    is freed. The next signal that Python handles would end the process.
    """
    if sys.platform != "linux":
        yield
        return
    before, library = _SignalStack(), ctypes.CDLL(None)
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)


def properties_of(precision: str, threads: int, calls: int) -> dict[str, Any]:
    """Settings of a compiled model: nothing is chosen by the machine that changes what is computed.

    Without a hint OpenVINO computes float32 in bfloat16 on processors that have it, and where weights alone are in 8 bits it
    rounds activations, too: no measurement would be about what another machine runs. Threads are pinned to no core, since
    the processes of one server would be pinned to the same ones.

    Args:
        precision: As the engine's record has it.
        threads: Of all calls together.
        calls: Calls that may be under way at once.
    """
    return {
        "PERFORMANCE_HINT": "LATENCY" if calls == 1 else "THROUGHPUT",
        "NUM_STREAMS": calls,
        "INFERENCE_NUM_THREADS": max(threads, calls),
        "INFERENCE_PRECISION_HINT": "bf16" if precision == Precision.BF16 else "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "ENABLE_CPU_PINNING": False,
    }


def multiplied_in(compiled: Any) -> str:
    """Types that the linear layers of a compiled model multiply, activations first, and how many layers have them.

    Args:
        compiled: OpenVINO's `CompiledModel`.
    """
    counts: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        if node.get_rt_info()["layerType"].astype(str) in ("FullyConnected", "MatMul"):
            counts["*".join(node.get_input_element_type(place).get_type_name() for place in (0, 1))] += 1
    return ", ".join(f"{kinds} {count}" for kinds, count in sorted(counts.items()))


class OpenVinoSession(InParts):
    """A model in OpenVINO's CPU plugin, with its precision asserted; any thread may call.

    Args:
        model: Its topology (the .xml file).
        weights: Its constants (the .bin file).
        profile: Batches it accepts.
        inputs: Its inputs; exactly one.
        outputs: Its outputs; the embedding is the first.
        precision: As the engine's record has it.
        threads: As ONNX Runtime counts them, one of which every call takes part in: each call beyond the first adds
            one. 0 is one per core of this process.
        calls: Calls that may be under way at once; each has its part of the threads.

    Raises:
        PrerequisiteError: If this machine cannot execute it in its precision.
    """

    where: Mapping[str, str]
    concurrency = 1

    def __init__(
        self,
        model: bytes,
        weights: bytes,
        profile: Profile,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        precision: str,
        *,
        threads: int = 0,
        calls: int = 1,
    ) -> None:
        if reason := reason_not_usable(precision):
            raise PrerequisiteError(f"a model for OpenVINO cannot run here: {reason}", fix=_FIX)
        import openvino

        super().__init__(profile, inputs, outputs)
        wanted = properties_of(precision, threads + calls - 1 if threads else cores(), calls)
        self._compiled = self._open(openvino, model, weights, wanted)
        self._free: SimpleQueue[Any] = SimpleQueue()
        for _ in range(calls):
            self._free.put(self._compiled.create_infer_request())
        never_destroyed_in_a_fork(self)
        self.where = {
            "provider": "openvino",
            "openvino": openvino.__version__.partition("-")[0],
            "device": "cpu",
            "computes_in": wanted["INFERENCE_PRECISION_HINT"],
        }

    @staticmethod
    def _open(openvino: Any, model: bytes, weights: bytes, wanted: Mapping[str, Any]) -> Any:
        core = openvino.Core()
        constants = openvino.Tensor(np.frombuffer(weights, dtype=np.uint8))
        try:
            with signal_stack_kept():
                compiled = core.compile_model(core.read_model(model=model, weights=constants), _DEVICE, dict(wanted))
        except RuntimeError as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or ["no reason was given"]
            raise PrerequisiteError(f"OpenVINO cannot open the model: {lines[-1].strip()[:200]}", fix=_FIX) from error
        found = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if found != wanted["INFERENCE_PRECISION_HINT"]:
            raise PrerequisiteError(
                f"OpenVINO computes in {found}, not in {wanted['INFERENCE_PRECISION_HINT']}", fix=_FIX
            )
        return compiled

    def _call(self, rows: np.ndarray, outputs: tuple[TensorSpec, ...]) -> list[np.ndarray]:
        request = self._free.get()
        try:
            request.infer({self._input.name: rows}, share_inputs=True)
            # A copy: the next call of this request writes into the same memory.
            return [np.array(request.get_tensor(spec.name).data) for spec in outputs]
        finally:
            self._free.put(request)

    def conditions(self) -> dict[str, str]:
        """What OpenVINO itself says of this model: its threads, and what its linear layers multiply.

        These depend on the machine, so they are no part of `where`, which goes into the evidence.
        """
        threads = self._compiled.get_property("INFERENCE_NUM_THREADS")
        return {"threads": str(threads), "multiplied_in": multiplied_in(self._compiled)}

    def close(self) -> None:
        """See `Session.close`."""
        if self._home.elsewhere:
            return
        while not self._free.empty():
            self._free.get()
        self._compiled = None
