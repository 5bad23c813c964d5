"""Installed versions of the libraries that a result depends on."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

BUILD_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "polygraphy", "tensorrt_rtx", "tensorrt")
"""Distributions that a build uses and a server does not."""

RUN_PACKAGES = ("numpy", "pillow", "tokenizers", "onnxruntime-gpu", "onnxruntime")
"""Distributions that a build and a server use."""


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed version per distribution; those that are missing are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
