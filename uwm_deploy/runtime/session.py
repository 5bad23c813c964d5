"""One compiled tower, ready to run. `verify` measures this very session, so what is proven is what serves."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from uwm_deploy.errors import PrerequisiteError, first_line
from uwm_deploy.records.graph import EngineArtifact, OnnxArtifact, Precision, Profile, Provider, Target, TensorSpec
from uwm_deploy.runtime.cores import affinity, cores
from uwm_deploy.runtime.fork import never_destroyed_in_a_fork
from uwm_deploy.runtime.node_order import weights_before_use
from uwm_deploy.runtime.openvino import MODULE, OpenVinoSession, reason_not_usable
from uwm_deploy.runtime.parts import InParts
from uwm_deploy.runtime.providers import FLOAT32, NAMES, add_provider, provider_reason

Device = Literal["auto", "cpu", "cuda", "tensorrt", "tensorrt-rtx"]

Optimisation = Literal["done", "basic", "extended"]
"""Of an ONNX graph: applied when it was compiled, or applied by ONNX Runtime when it is opened."""

CPU_TARGETS = (Target.ONNXRUNTIME, Target.OPENVINO)
"""Those that run where there is no GPU."""

Contents = tuple[bytes, Mapping[str, bytes]]
"""Of an ONNX graph: its bytes, and those of external data files by their name in the graph."""


AT_LOAD, BASIC_AT_LOAD = "extended, at load", "basic, at load"
"""Optimisation of a graph that is not optimised ahead: for fp16 the CPU provider would turn it into float32; with fp8
anything but the basic ones makes an invalid graph."""


class Session(Protocol):
    """Runs one tower.

    Attributes:
        where: Provider, device and versions it really runs on.
        max_batch: Largest batch of one call; more rows are split.
        concurrency: Calls that it gains from having under way at once; any thread may call at any time.
    """

    where: Mapping[str, str]
    max_batch: int
    concurrency: int

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Embeds inputs.

        Args:
            batch: (n, ...), n >= 1: (n, 3, H, W) float32 pixels, (n, H, W, 3) uint8 crops, or (n, L) integer ids.

        Returns:
            (n, d) float32.

        Raises:
            ContractError: If there is no row, or the graph does not take such rows.
        """

    def run_all(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """Computes every output.

        Args:
            batch: (n, ...), n >= 1: (n, 3, H, W) float32 pixels, (n, H, W, 3) uint8 crops, or (n, L) integer ids.

        Returns:
            Outputs by name, (n, ...) float32; the embedding is the first.
        """

    def close(self) -> None:
        """Releases device memory."""


def open_session(
    target: Target,
    model: bytes,
    *,
    profile: Profile,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    external_data: Mapping[str, bytes] | None = None,
    device: Device = "auto",
    optimisation: Optimisation = "done",
    threads: int = 0,
    weights_only: bool = False,
    precision: str = Precision.FP32,
    calls: int = 1,
) -> Session:
    """Opens an engine from bytes that were already verified.

    Args:
        target: What it was compiled for.
        model: The engine's or graph's bytes.
        profile: Batches it accepts.
        inputs: Its inputs; exactly one.
        outputs: Its outputs; the embedding is the first.
        external_data: Content of external data files by their name in the graph.
        device: Where it must run; `auto` takes the best that works of CUDA and CPU.
        optimisation: Of an ONNX graph.
        threads: Of ONNX Runtime or OpenVINO on a CPU; 0 leaves the number to it.
        weights_only: Whether weights are in 8 bits, and activations are not.
        precision: Of a model for OpenVINO, which it must compute in.
        calls: Calls that may be under way at once in OpenVINO, which share its threads.

    Raises:
        PrerequisiteError: If this machine cannot run it; never falls back silently.
    """
    if target is Target.ONNXRUNTIME:
        options = _options(optimisation, threads, weights_only=weights_only)
        _add_in_memory(options, external_data or {})
        return OnnxRuntimeSession(model, profile, inputs, outputs, options, device)
    if target is Target.OPENVINO:
        weights = b"".join((external_data or {}).values())
        return OpenVinoSession(model, weights, profile, inputs, outputs, precision, threads=threads, calls=calls)
    from uwm_deploy.runtime.tensorrt import TensorRTSession

    return TensorRTSession(target, model, profile, inputs, outputs)


def open_engine(
    engine: EngineArtifact,
    model: bytes,
    external_data: Mapping[str, bytes],
    *,
    device: Device = "auto",
    threads: int = 0,
    calls: int = 1,
) -> Session:
    """Opens what a record describes, with the provider it was made for; see `open_session`."""
    made_for = provider_of(engine)
    if made_for != "any" and device not in ("auto", made_for):
        raise PrerequisiteError(f"{engine.variant} was made for {made_for}, not for {device}", fix="ask for its own")
    return open_session(
        engine.target,
        model,
        profile=engine.profile,
        inputs=engine.inputs,
        outputs=engine.outputs,
        external_data=external_data,
        device=device if made_for == "any" else made_for,
        optimisation=optimisation_of(engine),
        threads=threads,
        weights_only=_weights_only(engine),
        precision=engine.precision,
        calls=calls,
    )


def pack(engine: EngineArtifact, contents: Contents, graph: Path, weights: str) -> None:
    """Writes an engine for this processor's CPU provider: its graph, and its weights as they are and as kernels want them.

    Args:
        engine: A graph for ONNX Runtime that was optimised when it was compiled.
        contents: Its checked bytes.
        graph: File of the graph.
        weights: Name of the file of the weights beside it; not written where there are small weights only.

    Raises:
        PrerequisiteError: If this machine cannot run it.
    """
    options = _options("done", 1, weights_only=_weights_only(engine))
    _add_in_memory(options, contents[1])
    options.optimized_model_filepath = str(graph)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", weights)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    OnnxRuntimeSession(contents[0], engine.profile, engine.inputs, engine.outputs, options, "cpu").close()
    if _weights_only(engine):
        graph.write_bytes(weights_before_use(graph.read_bytes()))


def open_packed(engine: EngineArtifact, graph: bytes, folder: Path, *, threads: int = 0) -> OnnxRuntimeSession:
    """Opens what `pack` has written; weights are mapped.

    Args:
        engine: What was packed.
        graph: Content of the graph's file.
        folder: Where the file of its weights is.
        threads: Of ONNX Runtime; 0 leaves the number to it.

    Raises:
        PrerequisiteError: If this machine cannot run it.
    """
    options = _options("done", threads, weights_only=_weights_only(engine))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return OnnxRuntimeSession(graph, engine.profile, engine.inputs, engine.outputs, options, "cpu")


def _weights_only(engine: EngineArtifact) -> bool:
    return engine.precision == Precision.W8A16


def open_graph(
    model: Path | bytes,
    graph: OnnxArtifact | EngineArtifact,
    *,
    max_batch: int,
    external_data: Mapping[str, bytes] | None = None,
    device: Device = "cpu",
    optimisation: Optimisation = "extended",
) -> Session:
    """Opens an ONNX graph in ONNX Runtime, by default on the CPU, where a graph is compared with its model.

    Args:
        model: Its file, or its bytes.
        graph: Record with its inputs and outputs.
        max_batch: Largest batch of one call; more rows are split.
        external_data: Content of external data files by their name in the graph. By default the one that the record
            names, beside the file; bytes have none.
        device: Where it must run.
        optimisation: How far ONNX Runtime optimises it now.

    Raises:
        PrerequisiteError: If this machine cannot run it.
    """
    if external_data is None and isinstance(model, Path):
        external_data = external_data_of(model.parent, graph.external_data)
    return open_session(
        Target.ONNXRUNTIME,
        model.read_bytes() if isinstance(model, Path) else model,
        profile=Profile(min=1, opt=1, max=max_batch),
        inputs=graph.inputs,
        outputs=graph.outputs,
        external_data=external_data,
        device=device,
        optimisation=optimisation,
    )


def external_data_of(folder: Path, name: str) -> dict[str, bytes]:
    """Content of a graph's external data file by its name in the graph.

    Args:
        folder: Where the graph lies.
        name: The file's name as a record has it; empty where the graph holds its weights itself.

    Returns:
        Empty without a name, and where the file is not there: ONNX Runtime then says what it misses.
    """
    return {name: (folder / name).read_bytes()} if name and (folder / name).is_file() else {}


_WHEN: Mapping[str, Optimisation] = {
    "": "done",
    "extended": "done",
    "compiled": "done",
    AT_LOAD: "extended",
    BASIC_AT_LOAD: "basic",
    "at load": "extended",
}
"""What an engine's settings say to when its graph is optimised."""


def optimisation_of(engine: EngineArtifact) -> Optimisation:
    """When, and how far, an engine's graph is optimised."""
    return _WHEN[engine.settings.get("optimisation", "")]


def provider_of(engine: EngineArtifact) -> Provider:
    """The provider of ONNX Runtime that an engine was made for."""
    found = engine.settings.get("provider", "any")
    return next((name for name in NAMES if name == found), "any")


def reason_not_executable(engine: EngineArtifact) -> str:
    """Empty when this machine can execute an engine, as far as can be told without opening it."""
    if engine.target is Target.OPENVINO:
        return reason_not_usable(engine.precision)
    return usable(engine.target) or provider_reason(provider_of(engine))


def missing_package(target: Target) -> str:
    """Empty when the target's package is installed, else what is missing."""
    from uwm_deploy.runtime.tensorrt import MODULES

    module = MODULES.get(target, MODULE if target is Target.OPENVINO else "onnxruntime")
    return "" if importlib.util.find_spec(module) else f"package {module} is not installed"


def usable(target: Target) -> str:
    """Empty when this machine can execute the target, else the reason why not."""
    if target in CPU_TARGETS:
        return missing_package(target)
    from uwm_deploy.runtime.tensorrt import reason_not_usable

    return reason_not_usable(target)


class OnnxRuntimeSession(InParts):
    """An ONNX graph in ONNX Runtime, with the provider asserted."""

    where: Mapping[str, str]
    concurrency = 1

    def __init__(
        self,
        model: bytes,
        profile: Profile,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        options: Any,
        device: Device,
    ) -> None:
        import onnxruntime as ort

        super().__init__(profile, inputs, outputs)
        self._session = self._open(ort, model, options, device)
        never_destroyed_in_a_fork(self)
        provider = self._session.get_providers()[0]
        self.where = {"provider": provider, "onnxruntime": ort.__version__, "device": _device(provider)}

    @staticmethod
    def _open(ort: Any, model: bytes, options: Any, device: Device) -> Any:
        if device not in ("cpu", "auto") or not _no_cuda(ort):
            _preload(ort)
        provider = _add_best(ort, options) if device == "auto" else device
        if device != "auto":
            add_provider(ort, options, device, FLOAT32 if device == "cuda" else {})
        try:
            session = ort.InferenceSession(model, options, enable_fallback=0)  # which prints to standard output
        except Exception as error:  # its errors share no base class
            line = first_line(error)
            raise PrerequisiteError(
                f"ONNX Runtime cannot open the graph: {line}", fix="see `uwm-deploy doctor`"
            ) from error
        # It falls back to the CPU with a log line only.
        if (taken := session.get_providers()[0]) != NAMES[provider]:
            raise PrerequisiteError(f"ONNX Runtime took {taken}, not {NAMES[provider]}", fix="see `uwm-deploy doctor`")
        return session

    def _call(self, rows: np.ndarray, outputs: tuple[TensorSpec, ...]) -> list[np.ndarray]:
        found: list[np.ndarray] = self._session.run([spec.name for spec in outputs], {self._input.name: rows})
        return found

    def close(self) -> None:
        """See `Session.close`."""
        if not self._home.elsewhere:
            del self._session


def _options(optimisation: Optimisation, threads: int, *, weights_only: bool = False) -> Any:
    """Options of a session."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if cores() < affinity():  # it counts the cores of the host, and a thread that spins eats the container's time
        options.intra_op_num_threads = threads or cores()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # EXTENDED, not ALL: the layout optimisations of ALL are specific to the machine, and crash on some fp16 graphs.
    options.graph_optimization_level = {
        "done": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    }[optimisation]
    if weights_only:  # by default every weight is in float32 before the first one is used, and stays for the next call
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.enable_mem_pattern = False
    return options


def _add_in_memory(options: Any, external_data: Mapping[str, bytes]) -> None:
    if external_data:
        names, buffers = list(external_data), list(external_data.values())
        options.add_external_initializers_from_files_in_memory(names, buffers, [len(b) for b in buffers])


def _preload(ort: Any) -> None:
    """CUDA's libraries may be packages beside this one, where the loader does not look by itself."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()


def _add_best(ort: Any, options: Any) -> Provider:
    """Adds CUDA where it works, else the CPU; which one it was stands in the session's `where`."""
    if not _no_cuda(ort):
        with contextlib.suppress(PrerequisiteError):
            add_provider(ort, options, "cuda", FLOAT32)
            return "cuda"
    add_provider(ort, options, "cpu", {})
    return "cpu"


def _device(provider: str) -> str:
    """Where a provider runs; ONNX Runtime itself only says what it was compiled for."""
    from uwm_deploy.runtime.tensorrt import device_name

    return "cpu" if provider == "CPUExecutionProvider" else device_name()


def _no_cuda(ort: Any) -> bool:
    """Whether CUDA is out of the question; being compiled in does not mean that a GPU is there."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return True
    from uwm_deploy.runtime.tensorrt import gpu_reason

    return bool(gpu_reason())
