"""Execution providers of ONNX Runtime: which works here, and adding one to a session without a fallback."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

from uwm_deploy.errors import PrerequisiteError, first_line
from uwm_deploy.records.graph import Provider
from uwm_deploy.runtime.tensorrt import gpu_reason

NAMES: Mapping[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
"""ONNX Runtime's own names."""

COMPILING: tuple[Provider, ...] = ("tensorrt", "tensorrt-rtx")
"""Those that make engines of whole parts of a graph; they are compiled ahead, never when a graph is opened."""

_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
"""Package that carries the provider of TensorRT-RTX, which ONNX Runtime itself does not."""

FLOAT32 = {"use_tf32": "0"}
"""Of the CUDA provider, whose products of float32 have mantissas of 10 bits unless it is told otherwise."""


def provider_reason(provider: Provider) -> str:
    """Empty when a provider may work here, else the reason why it does not; only opening a graph with it proves it."""
    if provider in ("any", "cpu"):
        return ""
    if reason := gpu_reason():
        return reason
    if provider == "tensorrt-rtx":
        return "" if importlib.util.find_spec(_PLUGIN) else f"package {_PLUGIN} is not installed"
    import onnxruntime as ort

    there = NAMES[provider] in ort.get_available_providers()
    return "" if there else f"this ONNX Runtime was built without {NAMES[provider]}"


def add_provider(ort: Any, options: Any, provider: Provider, settings: Mapping[str, str]) -> None:
    """Adds one provider to the options of a session, which then has no other but those for what it does not take.

    Args:
        ort: The module.
        options: Its `SessionOptions`.
        provider: Not `any`.
        settings: In the provider's own words.

    Raises:
        PrerequisiteError: If it does not work here.
    """
    name = NAMES[provider]
    try:
        if provider == "tensorrt-rtx":
            options.add_provider_for_devices(_devices(ort, name), dict(settings))
        else:
            options.add_provider(name, dict(settings))
        if provider in COMPILING:
            options.add_provider(NAMES["cuda"], FLOAT32)
    except PrerequisiteError:
        raise
    except Exception as error:  # its errors share no base class
        line = first_line(error)
        raise PrerequisiteError(f"ONNX Runtime has no working {name}: {line}", fix="see `uwm-deploy doctor`") from error


def _devices(ort: Any, name: str) -> list[Any]:
    """Devices of the provider that comes as a plugin, one of them."""
    if importlib.util.find_spec(_PLUGIN) is None:
        raise PrerequisiteError(
            f"package {_PLUGIN} is not installed", fix="pip install onnxruntime-ep-nv-tensorrt-rtx-cu13"
        )
    if all(device.ep_name != name for device in ort.get_ep_devices()):
        plugin = importlib.import_module(_PLUGIN)
        ort.register_execution_provider_library(name, plugin.get_library_path())
    found = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not found:
        raise PrerequisiteError(f"{name} finds no device", fix="see `uwm-deploy doctor`")
    return found[:1]
