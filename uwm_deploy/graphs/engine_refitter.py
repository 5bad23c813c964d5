"""Puts other weights into one refittable engine, in a process of its own like the builder. Needs a GPU.

    python -m uwm_deploy.graphs.engine_refitter image.refit.json

The refitted engine has to be measured anew (`pipeline.refit`, `attest`): TensorRT has been seen to lose the bias of a matrix
multiplication in a refit.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import load_file

from uwm_deploy.errors import ContractError
from uwm_deploy.graphs.builder_log import BuildFailed, last_of, logger_of
from uwm_deploy.graphs.engine_builder import main
from uwm_deploy.graphs.stored_weights import EIGHT_BITS, in_type
from uwm_deploy.records.files import write_atomic

_KINDS = {
    "FLOAT": onnx.TensorProto.FLOAT,
    "HALF": onnx.TensorProto.FLOAT16,
    "BF16": onnx.TensorProto.BFLOAT16,
    "INT8": onnx.TensorProto.INT8,
    "FP8": onnx.TensorProto.FLOAT8E4M3FN,
}
"""Element type in ONNX for the name of one in TensorRT."""


def refit(spec: dict[str, Any]) -> dict[str, Any]:
    """Writes a refitted engine.

    Args:
        spec: ``module``; ``source`` and ``engine`` (paths); ``weights``, a safetensors file with float32 (out, in) by
            name; ``turned``, the names of weights that 8-bit graphs hold as (in, out).

    Returns:
        Number of weights that were replaced, and seconds.
    """
    started = time.perf_counter()
    trt = importlib.import_module(spec["module"])
    weights = load_file(spec["weights"])
    plan = refitted_plan(trt, Path(spec["source"]).read_bytes(), weights, frozenset(spec["turned"]))
    write_atomic(Path(spec["engine"]), plan)
    return {"weights": len(weights), "seconds": time.perf_counter() - started}


def refitted_plan(trt: Any, plan: bytes, weights: Mapping[str, np.ndarray], turned: frozenset[str]) -> bytes:
    """The engine with other weights, still refittable.

    Args:
        trt: Module of the flavour.
        plan: The engine.
        weights: (out, in) or (out,) float32, by their names in the graph.
        turned: See `refit`.

    Raises:
        BuildFailed: If it is not refittable here, does not know a weight, or needs more of them.
    """
    messages: list[str] = []
    logger = logger_of(trt, messages)
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildFailed(f"the engine cannot be opened here: {last_of(messages)}")
    if not engine.refittable:
        raise BuildFailed("the engine was not built refittable")
    refitter = trt.Refitter(engine, logger)
    known = set(refitter.get_all_weights())
    if unknown := sorted(set(weights) - known):
        raise BuildFailed(f"the engine has no refittable weights {unknown[0]}")
    held = []  # the refitter keeps addresses only
    for name, weight in weights.items():
        kind = refitter.get_weights_prototype(name).dtype
        held.append(_laid_out(weight, str(kind).rsplit(".", 1)[-1], name, name in turned))
        if not refitter.set_named_weights(name, trt.Weights(kind, held[-1].ctypes.data, held[-1].size)):
            raise BuildFailed(f"the engine refuses the weights {name}: {last_of(messages)}")
    if missing := refitter.get_missing_weights():
        raise BuildFailed(f"the engine merged weights, and needs {len(missing)} more, first {missing[0]}")
    if not refitter.refit_cuda_engine():
        raise BuildFailed(f"the refit failed: {last_of(messages)}")
    config = engine.create_serialization_config()
    config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    serialised = engine.serialize_with_config(config)
    if serialised is None:
        raise BuildFailed(f"the refitted engine cannot be written: {last_of(messages)}")
    return bytes(serialised)


def _laid_out(weight: np.ndarray, kind: str, name: str, turned: bool) -> np.ndarray:
    """A weight as the engine's graph holds it."""
    if kind not in _KINDS:
        raise BuildFailed(f"the engine holds {name} as {kind}")
    number = int(_KINDS[kind])
    try:
        part = in_type(weight, number)
    except ContractError as error:
        raise BuildFailed(f"{name}: {error}") from error
    return np.ascontiguousarray(part.T if turned and number in EIGHT_BITS else part)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], refit))
