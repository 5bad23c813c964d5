"""Quantises one graph with nvidia-modelopt, in a process of its own: the library needs memory, logs, and patches others.

python -m uwm_deploy.graphs.modelopt_quantiser image.quantise.json
"""

from __future__ import annotations

import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from uwm_deploy.graphs.builder_log import BuildFailed
from uwm_deploy.graphs.engine_builder import main


def quantise(spec: dict[str, Any]) -> dict[str, Any]:
    """Writes a graph with Q/DQ pairs, with the types of all values.

    Args:
        spec: ``onnx`` and ``engine`` (paths), ``external`` (whether its weights lie beside it), ``mode`` (int8 or fp8),
            ``method`` of calibration, ``rows`` (.npz with the calibration inputs), ``input`` (name of the graph's
            input), ``exclude`` (patterns over names of multiplications that are not quantised).
    """
    from modelopt.onnx.quantization import quantize

    started = time.perf_counter()
    with np.load(spec["rows"]) as rows:
        inputs = {spec["input"]: rows["rows"]}
    temporary = Path(f".tmp-{spec['engine']}")
    try:
        quantize(
            spec["onnx"],
            quantize_mode=spec["mode"],
            calibration_data=inputs,
            calibration_method=spec["method"],
            calibration_eps=["cpu"],
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=spec["exclude"],
            high_precision_dtype="fp32",
            passes=[],
            use_external_data_format=spec["external"],
            output_path=str(temporary),
        )
    except Exception as error:  # its errors share no base class
        raise BuildFailed(f"{type(error).__name__}: {error}") from error
    onnx.shape_inference.infer_shapes_path(str(temporary), spec["engine"])
    return {"version": metadata.version("nvidia-modelopt"), "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], quantise))
