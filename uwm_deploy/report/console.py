"""Progress and log lines on standard error; standard output is for results only."""

from __future__ import annotations

import contextlib
import contextvars
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from uwm_deploy.report.lines import printed_lines, width_of

PLAIN_LINE_SECONDS = 5.0
"""Without a terminal, at most one progress line is written in this time."""

_LONG_SECONDS = 10.0
"""What takes longer says how much time is left."""

_WITHOUT_PROGRESS = contextvars.ContextVar("without_progress", default=False)


@contextlib.contextmanager
def without_progress() -> Iterator[None]:
    """Every reporter that is made meanwhile is quiet."""
    token = _WITHOUT_PROGRESS.set(True)
    try:
        yield
    finally:
        _WITHOUT_PROGRESS.reset(token)


class Reporter:
    """Says what runs: a progress bar on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        quiet = quiet or _WITHOUT_PROGRESS.get()
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last_line = 0.0
        self._began: dict[str, tuple[float, int]] = {}

    def line(self, text: str) -> None:
        """One log line, which goes on in the next one where it is too long."""
        for line in printed_lines(text, width_of(sys.stderr)):
            self.console.print(line, markup=False)

    @contextlib.contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        """Announces a stage, owns its progress bars, and says how long it took."""
        started = time.perf_counter()
        self._tasks, self._began = {}, {}
        self._last_line = started
        if self.console.is_terminal:
            columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.start()
        else:
            self.line(f"{name:<10} {text} ...")
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None
        self.line(f"{name:<10} {text}  {time.perf_counter() - started:.1f} s")

    def progress(self, label: str, done: int, total: int) -> None:
        """One step inside a stage; safe to call often. A total of 0 is not known."""
        if self._bar is not None:
            if label not in self._tasks:
                self._tasks[label] = self._bar.add_task(label, total=total or None)
            self._bar.update(self._tasks[label], completed=done, total=total or None)
            return
        now = time.perf_counter()
        began, first = self._began.setdefault(label, (now, done))
        if now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            left = time_left(now - began, done - first, total - done) if total else ""
            self.line(f"           {label}: {done}/{total}{left}" if total else f"           {label}: {done}")


def time_left(elapsed_s: float, done: int, missing: int) -> str:
    """How much longer something takes at its pace so far; empty where that is not known, or it takes no 10 s in all.

    Args:
        elapsed_s: Since the first item.
        done: Items since then.
        missing: Items to come.
    """
    if done <= 0 or missing <= 0:
        return ""
    left = elapsed_s * missing / done
    if elapsed_s + left < _LONG_SECONDS:
        return ""
    minutes, seconds = divmod(max(round(left), 1), 60)
    hours, minutes = divmod(minutes, 60)
    shown = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return f", about {shown} left"
