"""Runs bundles without torch: the same session that verify measures is the one that serves."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uwm_deploy.runtime.encoder import SafeEncoder

__all__ = ["SafeEncoder"]

# Some releases of ONNX Runtime report their use from threads of their own, and a forked process waits for these as it ends.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    """Imports the encoder when it is first asked for, so that importing the package stays light."""
    if name == "SafeEncoder":
        from uwm_deploy.runtime.encoder import SafeEncoder

        return SafeEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
