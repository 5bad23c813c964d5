"""Log of a TensorRT builder, and the error for its refusals. Both flavours report failure by None or False."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

_HARMLESS = ("Thread context has not been set",)
"""Messages that every build logs as internal errors, although nothing is wrong."""


class BuildFailed(Exception):  # noqa: N818 -- reads better where it is raised
    """The builder refused; the message is from its log."""


def logger_of(trt: Any, messages: list[str]) -> Any:
    """A logger for one of the flavours, which appends its messages to a list."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING and not any(h in message for h in _HARMLESS):
                messages.append(message)
                print(f"{severity}: {message}", file=sys.stderr, flush=True)  # noqa: T201 -- the captured log

    return Log()


def last_of(messages: Sequence[str]) -> str:
    """The last messages of a logger."""
    return "; ".join(messages[-3:]) or "no message"
