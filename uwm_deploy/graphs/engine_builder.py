"""Builds one engine in a process of its own, so that a crash or a lot of memory does not harm the caller.

    python -m uwm_deploy.graphs.engine_builder image.build.json

The JSON beside the engine holds all settings, so that a build can be repeated by hand. TensorRT and TensorRT-RTX
report failure by returning None or False; the error messages come from their logger.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from uwm_deploy.errors import UwmError
from uwm_deploy.graphs.builder_log import BuildFailed, last_of, logger_of
from uwm_deploy.graphs.builder_settings import add_profiles, apply_settings, settings_of
from uwm_deploy.graphs.onnx_builder import compiled, optimised
from uwm_deploy.graphs.openvino_builder import converted_to_ir
from uwm_deploy.graphs.tensor_layout import mapped_weights
from uwm_deploy.graphs.timing_cache import attach, cache_file, keep
from uwm_deploy.recipes.compile_spec import BuilderSpec
from uwm_deploy.records.codec import record_from_plain
from uwm_deploy.records.graph import FUSED, STEPS, Profile, Target
from uwm_deploy.records.machine import failure_of_machine
from uwm_deploy.runtime.openvino import MODULE as OPENVINO
from uwm_deploy.runtime.tensorrt import MODULES, device_name

FAILED = 3
"""Exit status of a build that the target's builder refused."""

REFUSED = 4
"""Exit status of a build that cannot begin: the result names the kind of the error."""


def build(spec: dict[str, Any]) -> dict[str, Any]:
    """Builds an engine.

    Args:
        spec: ``module``, ``onnx``, ``engine`` (paths). For ONNX Runtime also the settings of `onnx_builder`, and
            ``compile``, whether the provider compiles the graph into engines. For TensorRT also ``input``, ``row``, the
            sizes of its dimensions without the batch, and ``profiles`` (min, opt and max of each), ``builder``, a
            `recipe.BuilderSpec` that may be left out, and ``refittable``, names of the weights that a refit may replace
            later; none when it is left out. For all, ``attention``, ``"fused"`` where each attention is to be one node.

    Returns:
        Versions, settings, seconds and peak memory of the build.
    """
    make = _plan
    if spec["module"] == "onnxruntime":
        make = compiled if spec["compile"] else optimised
    elif spec["module"] == OPENVINO:
        make = converted_to_ir
    return make(spec) | {"peak_rss_bytes": _peak_rss_bytes()}


def _plan(spec: dict[str, Any]) -> dict[str, Any]:
    """A TensorRT or TensorRT-RTX engine."""
    trt = importlib.import_module(spec["module"])
    asked = record_from_plain(BuilderSpec, spec.get("builder", {}), where="builder")
    profiles, row = _sizes(spec["profiles"]), _sizes(spec["row"])
    messages: list[str] = []
    logger = logger_of(trt, messages)
    builder = _made(lambda: trt.Builder(logger), "builder", messages)
    network, attention, _weights = _parsed(  # they stay until the engine is made
        trt, builder, logger, Path(spec["onnx"]), messages, fused=spec.get("attention") == FUSED
    )
    config = _made(builder.create_builder_config, "configuration", messages)
    names, out = spec.get("refittable", []), 0
    if names and asked.null_weights:
        from uwm_deploy.graphs.engine_weights import take_weights_out

        out = take_weights_out(trt, network, names, messages)
    if names:
        mark_refittable(network, names, messages)
    apply_settings(trt, config, asked, refittable=bool(names), messages=messages)
    add_profiles(builder, config, spec["input"], row, profiles, messages)
    times = _times_file(trt, asked)
    timing = attach(config, times, messages) if times else {"timing_cache": "none"}
    started = time.perf_counter()
    with _written(Path(spec["engine"])) as stream:
        if asked.null_weights:
            plan = _made(lambda: builder.build_serialized_network(network, config), "engine", messages)
            stream.write(_with_weights(trt, bytes(plan), names, Path(spec["onnx"])))
        elif not builder.build_serialized_network_to_stream(network, config, _writer(trt, stream)):
            raise BuildFailed(last_of(messages))
    seconds = time.perf_counter() - started
    if times:
        timing |= keep(config, times, messages)
    kinds = sorted({str(network.get_output(i).dtype).rsplit(".", 1)[-1] for i in range(network.num_outputs)})
    return {
        "versions": {spec["module"]: str(trt.__version__)},
        "settings": settings_of(trt, config, asked, profiles)
        | timing
        | header_facts(Path(spec["engine"]))
        | {
            "refittable": str(bool(names)).lower(),
            "attention": attention,
            "null_weights": str(out),
            "layers": str(network.num_layers),
            "layer_types": ",".join(_layer_types(network)),
            "output_types": ",".join(kinds),
        },
        "seconds": seconds,
    }


def _with_weights(trt: Any, plan: bytes, names: Sequence[str], graph: Path) -> bytes:
    """An engine that was built without some weights, with those of the graph."""
    from uwm_deploy.graphs.engine_weights import plan_with_weights
    from uwm_deploy.graphs.stored_weights import named_weights

    real = {name: array for name, array in named_weights(graph) if name in names}
    return plan_with_weights(trt, plan, names, partial(_as_stored, real))


def _as_stored(weights: Mapping[str, np.ndarray], name: str, kind: str) -> np.ndarray:
    """A weight as the graph's file has it, if the engine has it in the same type."""
    if weights[name].dtype.itemsize != _SIZES.get(kind):
        raise BuildFailed(f"the engine holds {name} as {kind}, and the graph as {weights[name].dtype}")
    return np.ascontiguousarray(weights[name])


_SIZES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT8": 1, "FP8": 1}
"""Bytes of an element."""


def _made(make: Callable[[], Any], what: str, messages: Sequence[str]) -> Any:
    """Result of a call of TensorRT; on failure both flavours return None or raise a TypeError about a null pointer."""
    try:
        made = make()
    except TypeError as error:
        raise BuildFailed(f"no {what}: {last_of(messages)} ({error})") from error
    if made is None:
        raise BuildFailed(f"no {what}: {last_of(messages)}")
    return made


def _parsed(
    trt: Any, builder: Any, logger: Any, onnx: Path, messages: Sequence[str], *, fused: bool
) -> tuple[Any, str, Any]:
    """The network of a graph, what became of its attention, and the objects that must outlive it.

    The network reads its weights from the mapped file.
    """
    # Strongly typed. A flavour that knows no other networks ignores the flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = _made(lambda: builder.create_network(0 if flag is None else 1 << int(flag)), "network", messages)
    parser = _made(lambda: trt.OnnxParser(network, logger), "parser", messages)
    weights: dict[str, Any] = {}
    attention = STEPS
    if hasattr(parser, "load_initializer"):
        graph, weights = mapped_weights(onnx)
        if fused:
            from uwm_deploy.graphs.attention import fused_frame  # its libraries take memory that other builds need not

            frame, found = fused_frame(graph, onnx.name)
            graph, attention = frame.SerializeToString(), str(found)
        parsed = parser.load_model_proto(graph) and all(
            parser.load_initializer(name, data.ctypes.data, data.size) for name, data in weights.items()
        )
        parsed = parsed and parser.parse_model_proto()
    elif fused:
        raise BuildFailed(f"the parser of {trt.__name__} {trt.__version__} takes no weights apart from their graph")
    else:
        parsed = parser.parse_from_file(str(onnx))
    if not parsed:
        raise BuildFailed("; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)) or last_of(messages))
    _decompose_attention(trt, network)
    return network, attention, (parser, weights)


def _sizes(parts: Sequence[Sequence[int]]) -> list[Profile]:
    """From smallest, most usual and largest of each."""
    return [Profile(min=low, opt=usual, max=high) for low, usual, high in parts]


def _times_file(trt: Any, asked: BuilderSpec) -> Path | None:
    """File of the timing cache; None for TensorRT-RTX, and for TensorRT at level 0, which measure no times."""
    if not asked.timing_cache or asked.optimisation_level == 0 or trt.__name__ != MODULES[Target.TENSORRT]:
        return None
    return cache_file(trt.__name__, str(trt.__version__), device_name())


def header_facts(path: Path) -> dict[str, str]:
    """Facts from the first bytes of an engine, for people to read; their layout is undocumented, so no code uses them."""
    with path.open("rb") as stream:
        head = stream.read(_HEADER_BYTES)
    facts = {"header_magic": head[:4].decode("ascii", errors="replace")}
    if head[:4] == b"vtrt" and int.from_bytes(head[16:24], "little") == path.stat().st_size:
        facts["header_version"] = ".".join(str(byte) for byte in head[24:28])
        facts["header_compute_capabilities"] = hex(int.from_bytes(head[32:40], "little"))
    return facts


_HEADER_BYTES = 64


def mark_refittable(network: Any, names: Sequence[str], messages: Sequence[str] = ()) -> None:
    """Marks weights of a parsed network, by their names in the graph, as replaceable.

    Raises:
        BuildFailed: If the network has no weight of a name.
    """
    for name in names:
        if not network.mark_weights_refittable(name) or not network.are_weights_marked_refittable(name):
            raise BuildFailed(f"the network has no weights {name} to refit: {last_of(messages)}")


def _decompose_attention(trt: Any, network: Any) -> None:
    """Lets the builder decompose an Attention operator where it has no kernel for it, as in float32."""
    kind = getattr(trt.LayerType, "ATTENTION_OUTPUT", None)
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if kind is not None and layer.type == kind:
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True


_TYPED = ("MATRIX_MULTIPLY", "CONVOLUTION", "SOFTMAX", "NORMALIZATION", "QUANTIZE", "DEQUANTIZE", "ATTENTION")


def _layer_types(network: Any) -> list[str]:
    """Kinds of layer whose precision matters, with the type of their output."""
    kinds = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        name = str(layer.type).rsplit(".", 1)[-1]
        if name in _TYPED:
            kinds.add(f"{name}:{str(layer.get_output(0).dtype).rsplit('.', 1)[-1]}")
    return sorted(kinds)


def _peak_rss_bytes() -> int:
    """Peak memory of this process; 0 where the system does not tell. `getrusage` would include the parent's peak."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file that appears whole when the block succeeds, and not at all when it fails."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _writer(trt: Any, stream: BinaryIO) -> Any:
    """A stream to which a builder writes an engine piece by piece, so that the engine is never in memory as a whole."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: Any) -> int:
            return stream.write(data)

    return Writer()


def main(path: str, work: Callable[[dict[str, Any]], dict[str, Any]] = build) -> int:
    """Does the work that a JSON file describes, writes ``<file>.result.json`` beside it, and returns the exit status."""
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    result = Path(path).with_suffix(".result.json")
    try:
        body = work(spec)
    except Exception as error:
        known = failure_of_machine(error) or error
        if isinstance(known, BuildFailed):
            result.write_text(json.dumps({"error": str(known)}), encoding="utf-8")
            return FAILED
        if not isinstance(known, UwmError):
            raise
        kind = type(known).__name__
        result.write_text(json.dumps({"kind": kind, "error": known.what, "fix": known.fix}), encoding="utf-8")
        return REFUSED
    result.write_text(json.dumps(body, indent=1, sort_keys=True), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
