"""Log lines of the runtime: the logger ``uwm_deploy.runtime``, one event per line, its fields under ``record.uwm``.

A library configures no logging. A service that wants one JSON object per line adds `JsonFormatter` to its handler.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from uwm_deploy.errors import visible

NAME = "uwm_deploy.runtime"

_LOG = logging.getLogger(NAME)


def event(level: int, name: str, **fields: object) -> None:
    """Logs one event.

    Args:
        level: Of `logging`.
        name: What happened, e.g. ``"opened"``; stable, for alerts.
        fields: Plain values.
    """
    if _LOG.isEnabledFor(level):
        text = " ".join(f"{key}={visible(str(value))}" for key, value in fields.items())
        _LOG.log(level, "%s %s", name, text, extra={"uwm": {"event": name, **fields}})


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, and the event's fields or the message."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        body: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
        }
        fields = getattr(record, "uwm", None)
        body |= fields if isinstance(fields, dict) else {"message": record.getMessage()}
        if record.exc_info:
            body["traceback"] = self.formatException(record.exc_info)
        return json.dumps(body, ensure_ascii=False, default=str)
