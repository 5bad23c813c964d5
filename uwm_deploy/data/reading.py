"""Reads every item of a set in worker processes, in order, with bounded memory."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from uwm_deploy.errors import UnreadableError

Progress = Callable[[str, int, int], None]
T = TypeVar("T")

_CHUNK = 16
"""Items per task."""

_read: Callable[[int], Any]
"""What a worker does with an index; inherited by forking, so that the set itself is never sent to it."""


def read_all(read: Callable[[int], T], n: int, workers: int, label: str, progress: Progress) -> Iterator[T]:
    """Results for 0 to n - 1, in order; few of them wait at a time.

    Args:
        read: Called in a worker process, or here when there are none.
        n: Number of items.
        workers: Processes; 0 for none.
        label: For the progress bar.
        progress: Called as it goes on.

    Raises:
        UnreadableError: If the machine ends a worker process, or starts none.
    """
    done = 0
    for rows in _chunks(read, n, workers):
        yield from rows
        done += len(rows)
        progress(label, done, n)


def _chunks(read: Callable[[int], T], n: int, workers: int) -> Iterator[list[T]]:
    ranges = [(start, min(start + _CHUNK, n)) for start in range(0, n, _CHUNK)]
    if workers == 0:
        for start, stop in ranges:
            yield [read(index) for index in range(start, stop)]
        return
    context = get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(read,)) as pool:
        waiting: deque[Future[list[T]]] = deque()
        for bounds in ranges:
            if len(waiting) >= 3 * workers:
                yield _result(waiting.popleft())
            try:
                waiting.append(pool.submit(_read_range, *bounds))
            except (OSError, BrokenProcessPool) as error:
                raise _ended(error) from error
        while waiting:
            yield _result(waiting.popleft())


def _result(future: Future[list[T]]) -> list[T]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise _ended(error) from error


def _ended(error: Exception) -> UnreadableError:
    return UnreadableError(
        f"a process that reads items was ended, or not started: {error}",
        fix="use fewer --workers; memory is the usual reason",
    )


def _begin(read: Callable[[int], Any]) -> None:
    global _read
    _read = read
    ignore_interrupts()


def _read_range(start: int, stop: int) -> list[Any]:
    return [_read(index) for index in range(start, stop)]


def ignore_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; only the parent acts on it, and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
