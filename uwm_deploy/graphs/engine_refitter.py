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

from uwm_deploy.errors import ContractError, IntegrityError
from uwm_deploy.graphs.builder_log import BuildFailed
from uwm_deploy.graphs.engine_builder import main
from uwm_deploy.graphs.engine_weights import plan_with_weights
from uwm_deploy.graphs.stored_weights import EIGHT_BITS, in_type
from uwm_deploy.records.files import write_atomic
from uwm_deploy.records.tensor_file import all_tensors, open_tensors

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

    Raises:
        IntegrityError: If the file of the weights is missing or broken.
    """
    started = time.perf_counter()
    path, fix = Path(spec["weights"]), "refit again"
    with open_tensors(path, framework="numpy", name=path.name, fix=fix, kind=IntegrityError) as file:
        weights: dict[str, np.ndarray] = all_tensors(file)
    trt = importlib.import_module(spec["module"])
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
    return plan_with_weights(
        trt, plan, list(weights), lambda name, kind: _laid_out(weights[name], kind, name, name in turned)
    )


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
