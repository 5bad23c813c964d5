"""Rows of many callers in one call of the engine: bounded, in order of arrival, none later than its deadline."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np

from uwm_deploy.errors import BusyError, ContractError, InputError, UwmError, first_line
from uwm_deploy.records.machine import failure_of_machine

_LOG = logging.getLogger("uwm_deploy.runtime")

HOLD = float("inf")
"""Deadline of a row that waits until its batch is full or `Batcher.flush` is called."""

Run = Callable[[np.ndarray], np.ndarray]
"""From rows (n, ...) in the engine's input type to its results (n, d) float32, or wider."""


class Observer(Protocol):
    """Is told about each batch."""

    def batch(self, found: np.ndarray | None, waited_s: Sequence[float], seconds: float) -> None:
        """One call of the engine.

        Args:
            found: Its embeddings (n, d) float32; None if it failed.
            waited_s: Per row, from arrival to the call.
            seconds: The call itself.
        """


@dataclass(slots=True)
class AdmissionQueue:
    """A bounded number of items that are on their way; who comes when it is full waits in line, first come first served.

    Attributes:
        capacity: Items that may be on their way.
    """

    capacity: int
    _taken: int = 0
    _line: deque[tuple[int, Future[None]]] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def taken(self) -> int:
        """Items on their way."""
        return self._taken

    @property
    def waiting(self) -> int:
        """Items in line."""
        return sum(count for count, ticket in tuple(self._line) if not ticket.cancelled())

    def ask(self, count: int) -> Future[None]:
        """A future that is done when so many places are this caller's; who no longer wants it calls `leave`.

        They come all at once: callers with half of theirs would block each other.
        """
        ticket: Future[None] = Future()
        with self._lock:
            self._line.append((count, ticket))
        self._serve()
        return ticket

    def take(self, count: int, timeout_s: float | None) -> None:
        """Waits for places.

        Raises:
            BusyError: If there are none in time.
        """
        ticket = self.ask(count)
        try:
            ticket.result(timeout_s)
        except TimeoutError:
            self.leave(count, ticket)
            raise self.busy(timeout_s) from None

    def leave(self, count: int, ticket: Future[None]) -> None:
        """Gives up a ticket, and its places if it had come to them meanwhile."""
        if ticket.cancel():
            self._serve()  # those behind it may fit where it did not
        else:
            self.give_back(count)

    def give_back(self, count: int) -> None:
        """Places are free again; the first in line gets them."""
        with self._lock:
            self._taken -= count
        self._serve()

    def busy(self, timeout_s: float | None) -> BusyError:
        """The error of a caller who waited too long."""
        return BusyError(
            f"{self.capacity} items are on their way, and there was no place for more within {timeout_s} s",
            fix="send less at once, or raise queue_items or queue_timeout_s",
        )

    def _serve(self) -> None:
        """Lets in whoever is first in line and fits."""
        while (ticket := self._next_in_line()) is not None:
            ticket.set_result(None)  # not under the lock: it calls what waits for it

    def _next_in_line(self) -> Future[None] | None:
        with self._lock:
            while self._line:
                count, ticket = self._line[0]
                if not ticket.cancelled() and self._taken + count > self.capacity:
                    return None
                self._line.popleft()
                if ticket.set_running_or_notify_cancel():
                    self._taken += count
                    return ticket
            return None


@dataclass(slots=True)
class _Waiting:
    row: np.ndarray
    deadline: float
    arrived: float
    future: Future[np.ndarray]


class Batcher:
    """Gathers rows and calls the engine from threads of its own.

    Args:
        run: The engine: rows (n, ...) in its input type to (n, d) float32, or wider.
        max_batch: Largest n.
        threads: Calls that may be under way at once.
        observer: Told about every call.
        name: Of its threads.
        width: d, where the engine gives more than the embedding; what comes after it stays as it is. 0 for all.
    """

    def __init__(
        self, run: Run, *, max_batch: int, threads: int, observer: Observer, name: str, width: int = 0
    ) -> None:
        self._run, self._max_batch, self._observer = run, max_batch, observer
        self._width = width or None
        self._rows: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closing = False
        # Daemons: a process that forgets to close must still be able to end.
        self._threads = [
            threading.Thread(target=self._serve, name=f"uwm-{name}-{number}", daemon=True) for number in range(threads)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:
            self.stop()  # those that were started
            raise failure_of_machine(error) or error from error

    @property
    def waiting(self) -> int:
        """Rows that are in no call yet."""
        return len(self._rows)

    def submit(self, row: np.ndarray, future: Future[np.ndarray], deadline: float) -> None:
        """Puts a row in line.

        Args:
            row: (3, H, W) float32 pixels or (L,) int64 ids.
            future: Receives the result (d,) float32, or the error; it must be running already.
            deadline: `time.monotonic` by which its call starts at the latest, or `HOLD`.
        """
        with self._changed:
            if not self._closing:
                self._rows.append(_Waiting(row, deadline, time.monotonic(), future))
                self._changed.notify()
                return
        future.set_exception(closed())

    def flush(self) -> None:
        """Rows that are here now wait for no more."""
        with self._changed:
            for waiting in self._rows:
                waiting.deadline = 0.0
            self._changed.notify_all()

    def stop(self) -> None:
        """Lets the threads end when they have finished what is in line; does not wait for them."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def close(self) -> None:
        """Finishes what is in line and ends the threads."""
        self.stop()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while batch := self._next():
            self._call(batch)
            # Or this thread would keep the last answers, and their inputs, until the next ones come.
            del batch

    def _next(self) -> list[_Waiting]:
        """The rows of the next call; none when there will be no more."""
        with self._changed:
            while True:
                if len(self._rows) >= self._max_batch or (self._rows and self._closing):
                    break
                if self._rows:
                    left = min(w.deadline for w in islice(self._rows, self._max_batch)) - time.monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(None if left == HOLD else left)
                elif self._closing:
                    return []
                else:
                    self._changed.wait()
            return [self._rows.popleft() for _ in range(min(self._max_batch, len(self._rows)))]

    def _call(self, batch: list[_Waiting]) -> None:
        started = time.monotonic()
        answers, error = self._tried(batch)
        if error is not None:
            self._count(batch, None, started)
            answers = _own(self._apart(batch, error))
        for waiting, answer in zip(batch, answers, strict=True):
            if isinstance(answer, Exception):
                waiting.future.set_exception(answer)
            else:
                waiting.future.set_result(answer)

    def _apart(self, batch: list[_Waiting], error: Exception) -> list[np.ndarray | Exception]:
        """Answers of rows whose call failed: halves of them again, down to single rows, until only the faulty fails."""
        if len(batch) == 1:
            return [error]
        found: list[np.ndarray | Exception] = []
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            answers, failed = self._tried(half)
            found += answers if failed is None else self._apart(half, failed)
        return found

    def _tried(self, batch: list[_Waiting]) -> tuple[list[np.ndarray | Exception], Exception | None]:
        """Answers of one call of the engine; or none, and why it failed."""
        started = time.monotonic()
        try:
            found = self._run(np.stack([waiting.row for waiting in batch]))
            answers = _checked(found, len(batch), self._width)
            spoilt = [answer for answer in answers if isinstance(answer, Exception)]
            if len(spoilt) == len(batch) > 1:  # one row may spoil all of them; alone the others are answered
                return [], spoilt[0]
        except BaseException as error:  # whatever it is, callers wait for an answer and this thread must live
            return [], as_exception(error)
        # First what is counted, then the answers: who has an answer finds it counted.
        self._count(batch, found, started)
        return answers, None

    def _count(self, batch: list[_Waiting], found: np.ndarray | None, started: float) -> None:
        try:
            self._observer.batch(found, [started - w.arrived for w in batch], time.monotonic() - started)
        except Exception:  # counting must never cost an answer
            _LOG.exception("a batch could not be counted")


def _own(answers: list[np.ndarray | Exception]) -> list[np.ndarray | Exception]:
    """Errors of the engine as errors of their rows, where the same engine answers other rows of the batch."""
    if all(isinstance(answer, Exception) for answer in answers):
        return answers
    return [_refused(answer) if isinstance(answer, Exception) else answer for answer in answers]


def _refused(error: Exception) -> Exception:
    if isinstance(error, UwmError | MemoryError) or failure_of_machine(error) is not None:
        return error  # which says nothing about the item
    what = f"the engine cannot embed this item: {first_line(error)}"
    refused = ContractError(what, fix="leave it out; other items are answered")
    refused.__cause__ = error
    return refused


def _checked(found: np.ndarray, rows: int, width: int | None) -> list[np.ndarray | Exception]:
    """Each row with its embedding at length 1, or that it is no embedding."""
    if len(found) != rows:
        raise ContractError(f"the engine gave {len(found)} rows for {rows}", fix="build the bundle again")
    embeds, further = found[:, :width], found[:, width or found.shape[1] :]
    lengths = np.linalg.norm(embeds, axis=1)
    usable = np.isfinite(lengths) & (lengths > 0) & np.isfinite(further).all(axis=1)
    unit = embeds / np.where(usable, lengths, 1)[:, None]
    unit = unit if width is None else np.concatenate([unit, further], axis=1)
    broken = ContractError("the engine's embedding is not finite, or zero", fix="see `uwm-deploy diagnose`")
    return [row if good else broken for row, good in zip(unit, usable, strict=True)]


def as_exception(error: BaseException) -> Exception:
    """What a caller is given of whatever was raised in a thread that works for many."""
    if isinstance(error, Exception):
        return error
    return ContractError(f"the thread at work was interrupted: {error!r}")


def closed() -> InputError:
    """The error of who comes too late."""
    return InputError("the encoder is closed", fix="open the bundle again")
