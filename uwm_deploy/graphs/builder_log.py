"""What a builder of TensorRT says, and how its refusals become errors. Both flavours report failure by None or False."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

_HARMLESS = ("Thread context has not been set",)
"""Logged on every build as an internal error, without meaning."""


class BuildFailed(Exception):  # noqa: N818 -- reads better where it is raised
    """The builder said no; its words are the message."""


def logger_of(trt: Any, messages: list[str]) -> Any:
    """A logger of one of the flavours that keeps its messages."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING and not any(h in message for h in _HARMLESS):
                messages.append(message)
                print(f"{severity}: {message}", file=sys.stderr, flush=True)  # noqa: T201 -- the captured log

    return Log()


def last_of(messages: Sequence[str]) -> str:
    """The last things a logger was told."""
    return "; ".join(messages[-3:]) or "no message"
