"""Converts an ONNX graph into a model of OpenVINO (its IR): a file of the topology and one of the constants.

The conversion changes no number: constants keep their type, and 8-bit weights stay in 8 bits. What is fused, and the layout
that kernels want, is chosen when the model is opened, for the processor there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from uwm_deploy.graphs.builder_log import BuildFailed
from uwm_deploy.runtime.openvino import multiplied_in, properties_of


def weights_file(model: str) -> str:
    """Name of the file of constants beside a model's file."""
    return f"{Path(model).stem}.bin"


def converted_to_ir(spec: dict[str, Any]) -> dict[str, Any]:
    """Writes the two files of a model.

    Args:
        spec: ``onnx`` and ``engine``, the paths of the graph and of the model, and ``precision``, what it is opened in.

    Returns:
        Versions, settings and seconds. Among the settings are the types that linear layers multiply here, activations
        first, such as ``f32*f32 4, i8*i8 69``.

    Raises:
        BuildFailed: If OpenVINO does not take the graph.
    """
    import openvino

    started = time.perf_counter()
    try:
        model = openvino.Core().read_model(spec["onnx"])
        openvino.save_model(model, spec["engine"], compress_to_fp16=False)
        kinds = _multiplied_in(openvino.Core(), spec)
    except RuntimeError as error:
        raise BuildFailed(f"OpenVINO: {error}") from error
    return {
        "versions": {"openvino": openvino.__version__.partition("-")[0]},
        "settings": {"optimisation": "at load", "multiplied_in": kinds},
        "seconds": time.perf_counter() - started,
    }


def _multiplied_in(core: Any, spec: dict[str, Any]) -> str:
    """What the linear layers multiply once the model is opened.

    A quantised graph that OpenVINO does not recognise as one is computed in float32 silently.
    """
    return multiplied_in(core.compile_model(spec["engine"], "CPU", properties_of(spec["precision"], 1, 1)))


def named_constants(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Constants of a model by name, read from its files.

    Args:
        path: File of the topology; the constants are beside it.

    Yields:
        Name and array, any shape, in the dtype that it is stored in; bfloat16 as that of ml_dtypes.
    """
    import openvino

    for node in openvino.Core().read_model(path).get_ordered_ops():
        if node.get_type_name() != "Constant":
            continue
        array = np.asarray(node.data)
        if node.get_element_type().get_type_name() == "bf16":
            array = array.view(ml_dtypes.bfloat16)
        yield node.get_friendly_name(), array
