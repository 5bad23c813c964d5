"""One tower at work: callers' items are let in, prepared in worker threads, gathered into batches, answered in order."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from uwm_deploy.errors import BusyError, InputError
from uwm_deploy.records.machine import failure_of_machine
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.batching import HOLD, AdmissionQueue, Batcher, Run, as_exception, closed
from uwm_deploy.runtime.fork import Home
from uwm_deploy.runtime.session import Session
from uwm_deploy.runtime.watch import TowerWatch

if TYPE_CHECKING:
    import asyncio

Answer = np.ndarray | Exception
"""Result of one item: its embedding (d,) float32, then further outputs of the engine if there are any, or the error."""

Prepare = Callable[[Sequence[Any]], Sequence[Answer]]
"""From some items to the engine's input rows, (3, H, W) float32 pixels or (L,) int64 ids, or errors, in order."""


_SMALL_BATCH = 8
"""Rows whose values stay in a core's cache while a large model works on them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How a bundle is served.

    Attributes:
        max_batch: Most rows per call of the engine; 0 takes the largest that its profile allows, and 8 with more `calls`.
        calls: Calls of the engine under way at once on a CPU, which share its threads. 1 answers a single call soonest; as
            many as cores gives most answers per second.
        max_delay_ms: How long a row of an asyncio caller may wait for rows of others while the engine is idle.
        queue_items: Items per tower that may be on their way, which bounds memory; more wait in line. 0 is four batches; two
            batches per call is the least.
        queue_timeout_s: How long a caller may wait in line; None is for ever.
        workers: Threads that decode and preprocess; 0 is one per core.
        threads: Threads of ONNX Runtime or OpenVINO on a CPU, of all calls together; 0 is one per core.
        selftest_rows: Canaries per tower at load; 0 leaves the self-test out, where the evidence is from the same device.
        weights: "own" copies the weights into each process. "shared" keeps them on a CPU in the user's cache, as the
            processor wants them, and maps them: processes have one copy, and all but the first open sooner. OpenVINO has
            no such file: its processes have their own.
    """

    max_batch: int = 0
    calls: int = 1
    max_delay_ms: float = 2.0
    queue_items: int = 0
    queue_timeout_s: float | None = None
    workers: int = 0
    threads: int = 0
    selftest_rows: int = 4
    weights: Literal["own", "shared"] = "own"

    def __post_init__(self) -> None:
        for name in ("max_batch", "calls", "queue_items", "workers", "threads", "selftest_rows"):
            if not isinstance(getattr(self, name), Integral):
                raise InputError(f"{name} is {getattr(self, name)!r}", fix="pass a whole number")
        for name in ("max_delay_ms", "queue_timeout_s"):
            value = getattr(self, name)
            if not isinstance(value, Real) and not (name == "queue_timeout_s" and value is None):
                raise InputError(f"{name} is {value!r}", fix="pass a number")
        for name in ("max_batch", "max_delay_ms", "queue_items", "workers", "threads", "selftest_rows"):
            if not getattr(self, name) >= 0:  # a number that is none is not
                raise InputError(f"{name} is {getattr(self, name)}", fix="pass 0 or more")
        if self.weights not in ("own", "shared"):
            raise InputError(f"weights is {self.weights!r}", fix='pass "own" or "shared"')
        if self.calls < 1:
            raise InputError(f"calls is {self.calls}", fix="pass 1 or more")

    def calls_of(self, session: Session) -> int:
        """Calls under way at once of a session."""
        return max(session.concurrency, self.calls) if session.where.get("device") == "cpu" else session.concurrency

    def session_threads(self, available: int) -> int:
        """What ONNX Runtime is told, of the cores there are; 0 leaves the number to it.

        One of its threads is the caller's own, the others are shared by all calls.
        """
        if self.threads or self.calls > 1:
            return max(1, (self.threads or available) - self.calls + 1)
        # It counts the cores of the host.
        return available if available != os.cpu_count() else 0

    def batch_of(self, session: Session) -> int:
        """Most rows per call of a session."""
        wanted = self.max_batch or (_SMALL_BATCH if self.calls_of(session) > session.concurrency else session.max_batch)
        return min(wanted, session.max_batch)


class TowerService:
    """Serves one tower to any number of threads and event loops.

    Args:
        tower: Which one.
        session: Runs it.
        pool: Threads that prepare; shared with the other tower.
        together: Items that are prepared in one go.
        serving: Limits.
        watch: Counts.
        run: Calls the engine where more than embeddings is wanted: rows (n, ...) in its input type to (n, d) float32 or
            wider; None takes the session's `run`.
        width: Size of an embedding, in that case.
    """

    def __init__(
        self,
        tower: TowerName,
        session: Session,
        pool: ThreadPoolExecutor,
        *,
        together: int,
        serving: Serving,
        watch: TowerWatch,
        run: Run | None = None,
        width: int | None = None,
    ) -> None:
        batch = serving.batch_of(session)
        self.session, self._pool, self._watch, self._serving = session, pool, watch, serving
        self._together, self._width = min(together, batch), width
        # Rows that wait for a full batch hold places: with fewer than two batches of them nobody might ever fill it.
        calls = serving.calls_of(session)
        self._places = AdmissionQueue(max(serving.queue_items or 4 * batch, 2 * batch * calls))
        self._batcher = Batcher(
            run or session.run, max_batch=batch, threads=calls, observer=watch, name=tower.value,
            width=width or 0,
        )  # fmt: skip
        self._open, self._home = True, Home()

    def encode(self, items: Iterable[Any], prepare: Prepare) -> list[Answer]:
        """Answers every item, in order; called from any thread.

        Rows wait for full batches until the last one of this call is prepared.

        Args:
            items: Items of the tower.
            prepare: From some items to rows, (3, H, W) float32 pixels or (L,) int64 ids, or errors.

        Returns:
            Per item its embedding (d,) float32, or wider, or the error.

        Raises:
            BusyError: If there is no place in time.
            InputError: If it is closed.
        """
        started = time.monotonic()
        answers: list[Future[np.ndarray]] = []
        preparing: list[Future[None]] = []
        try:
            for some in _parts(items, self._together):
                self._check_open()
                self._places.take(len(some), self._serving.queue_timeout_s)
                futures: list[Future[np.ndarray]] = [Future() for _ in some]
                preparing = [one for one in preparing if not one.done()]
                preparing.append(self._submit(some, prepare, futures, HOLD))
                answers += futures
        except BusyError:
            self._watch.refused()
            raise
        finally:
            wait(preparing)
            self._batcher.flush()
        found = [_answer(future) for future in answers]
        self._watch.answered(self._embeddings(found), time.monotonic() - started)
        return found

    async def aencode(self, items: Iterable[Any], prepare: Prepare) -> list[Answer]:
        """The same from an event loop, which it never blocks; rows of different callers share batches.

        Args:
            items: Items of the tower.
            prepare: From some items to rows, (3, H, W) float32 pixels or (L,) int64 ids, or errors.

        Returns:
            Per item its embedding (d,) float32, or wider, or the error.

        Raises:
            BusyError: If there is no place in time.
            InputError: If it is closed.
        """
        import asyncio  # here, because it takes longer to import than a small model to open

        started = time.monotonic()
        answers: list[asyncio.Future[np.ndarray]] = []
        try:
            for some in _parts(items, self._together):
                self._check_open()
                await self._atake(len(some))
                futures: list[Future[np.ndarray]] = [Future() for _ in some]
                self._submit(some, prepare, futures, self._serving.max_delay_ms / 1000)
                answers += [asyncio.wrap_future(future) for future in futures]
        except BaseException:  # nobody waits for what was let in before
            for answer in answers:
                answer.cancel()
            raise
        found = [_as_answer(one) for one in await asyncio.gather(*answers, return_exceptions=True)]
        self._watch.answered(self._embeddings(found), time.monotonic() - started)
        return found

    def run_rows(self, rows: np.ndarray, timeout_s: float) -> np.ndarray:
        """Embeds prepared rows on the served path, ahead of no one, without waiting in line.

        Args:
            rows: (n, 3, H, W) float32 pixels or (n, L) int64 ids.
            timeout_s: Longest wait.

        Returns:
            (n, d) float32.

        Raises:
            TimeoutError: If there is no answer in time.
            InputError: In a process that was forked off the one that opened it.
            Exception: What the engine raised.
        """
        self._home.check()
        futures: list[Future[np.ndarray]] = [Future() for _ in rows]
        for row, future in zip(rows, futures, strict=True):
            future.set_running_or_notify_cancel()
            self._batcher.submit(row, future, HOLD)
        self._batcher.flush()
        until = time.monotonic() + timeout_s
        found = [future.result(max(0.0, until - time.monotonic())) for future in futures]
        return np.stack(found)[:, : self._width]

    def _embeddings(self, found: Sequence[Answer]) -> list[Answer]:
        """Answers without what comes after the embedding."""
        return [row if isinstance(row, Exception) else row[: self._width] for row in found]

    def told(self) -> None:
        """Tells the watch how full it is."""
        self._watch.queue(self._places.taken, self._places.waiting)

    def close(self) -> None:
        """Answers what was let in and releases the engine; call it once, after `refuse` and after the pool has ended."""
        self._batcher.close()
        self.session.close()

    def abandon(self) -> None:
        """For an encoder that nobody closed: its threads end by themselves."""
        self._open = False
        self._batcher.stop()

    def refuse(self) -> None:
        """From now on nobody is let in."""
        self._open = False

    def _check_open(self) -> None:
        self._home.check()
        if not self._open:
            raise closed()

    async def _atake(self, count: int) -> None:
        import asyncio

        ticket = self._places.ask(count)
        if ticket.done():
            return
        try:
            await asyncio.wait_for(asyncio.wrap_future(ticket), self._serving.queue_timeout_s)
        except TimeoutError:
            self._places.leave(count, ticket)
            self._watch.refused()
            raise self._places.busy(self._serving.queue_timeout_s) from None
        except BaseException:  # cancelled: whoever is next must not wait for this caller
            self._places.leave(count, ticket)
            raise

    def _submit(
        self, items: Sequence[Any], prepare: Prepare, futures: list[Future[np.ndarray]], delay_s: float
    ) -> Future[None]:
        try:
            return self._pool.submit(self._prepare, items, prepare, futures, delay_s)
        except RuntimeError as error:  # the pool has ended meanwhile
            self._places.give_back(len(items))
            if failure := failure_of_machine(error):
                raise failure from error
            raise closed() from None

    def _prepare(
        self, items: Sequence[Any], prepare: Prepare, futures: list[Future[np.ndarray]], delay_s: float
    ) -> None:
        """In a worker thread: prepares, and hands over to the batcher."""
        wanted = [future.set_running_or_notify_cancel() for future in futures]
        started = time.monotonic()
        rows = self._rows(items, prepare) if any(wanted) else [CancelledError()] * len(items)
        now = time.monotonic()
        self._watch.prepared(now - started, len(items))
        for row, future, still in zip(rows, futures, wanted, strict=True):
            if not still:
                self._places.give_back(1)
                continue
            future.add_done_callback(lambda _: self._places.give_back(1))
            if isinstance(row, Exception):
                future.set_exception(row)
            else:
                self._batcher.submit(row, future, now + delay_s)

    @staticmethod
    def _rows(items: Sequence[Any], prepare: Prepare) -> Sequence[Answer]:
        try:
            return prepare(items)
        except BaseException as error:  # callers wait for an answer, whatever happened
            if len(items) == 1:
                return [as_exception(error)]
            return [answer for item in items for answer in TowerService._rows([item], prepare)]


def _parts(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part


def _answer(future: Future[np.ndarray]) -> Answer:
    try:
        return future.result()
    except Exception as error:
        return error


def _as_answer(found: np.ndarray | BaseException) -> Answer:
    if isinstance(found, BaseException) and not isinstance(found, Exception):
        raise found
    return found
