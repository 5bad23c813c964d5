"""Every operation of a command, in one run of it.

A kill leaves the files as they were, so a run that keeps the tree before each operation has met every kill. For a fault, a
copy of the process is forked before the operation. It fails there and ends, and the files are put back. Each distinct tree
is laid out once: it must be the old or the new one, and the same command must do its work in it. A run that stands at an
operation, with a tree and a call stack, at which another stood that ended well, is not followed to its end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tests.faults.crash_points import (
    FAULTS,
    JOINED,
    Done,
    Job,
    Stop,
    Wanted,
    begin,
    fault_of,
    go_on,
    heard,
    judged,
    left_by,
    row_of,
    run,
    tell,
    trees_of,
    unclear,
    undisturbed,
)
from tests.faults.trees import Entry, Tree, Trees, digest_of, open_files, point_back
from uwm_deploy.records import locks
from uwm_deploy.records.replacing import Workplace

_SECONDS = 60
"""Of a forked copy: a library's threads are not in it, and it may wait for them."""

_SAMPLE = 4
"""So many are really killed, or really fail in a run of their own, and must be as the run says that took all."""


def every_point(job: Job) -> dict[str, Any]:
    """Stops a job before each operation; see `crash_points.ran`."""
    wanted = undisturbed(job)
    row = row_of(job, wanted)
    trees = trees_of(job)
    begin(job)
    keep = Keep(trees, faults=job.faults)
    done = run(job, keep)
    # A disk lists files that were put back in another order.
    same = sorted(done.operations) == sorted(wanted.operations) and done.code == wanted.code
    same = same and left_by(job) == wanted.left
    assert same, f"{job.name}: the run that was looked at is not as an undisturbed one: {done.said}"
    keep.hear(done)
    judge = Judge(job, wanted, trees, keep)
    stops = keep.faulted(job) if job.faults else [("", number, tree, False) for number, tree in enumerate(keep.before)]
    for fault, number, tree, ended in stops:
        state, wrongs = judge(fault, number, tree, ended=ended)
        row["new" if state == wanted.after else "old"] += 1
        row["wrong"] += [[done.operations[number], f"{fault} {wrong}"] for wrong in wrongs]
    row["stopped"], row["trees"] = len(stops), len(judge.known)
    row["wrong"] += _sampled(job, keep, done.operations)
    told = (row["name"], len(wanted.operations), row["stopped"], row["old"], row["new"], len(row["wrong"]))
    print(*told, "trees", row["trees"], "run anew", judge.real, row["wrong"][:5], file=sys.stderr, flush=True)
    return row


class Judge:
    """What a tree is, and what the same command does in it; each tree once."""

    def __init__(self, job: Job, wanted: Wanted, trees: Trees, keep: Keep) -> None:
        self._job, self._wanted, self._trees, self._keep = job, wanted, trees, keep
        self._joins = Join(trees, set(keep.places))
        self.known: dict[tuple[str, bool], tuple[str, list[str]]] = {}
        self.real = 0

    def __call__(self, fault: str, number: int, tree: str, *, ended: bool) -> tuple[str, list[str]]:
        """State and what is wrong; of a fault that a forked copy cannot show, in a run of its own."""
        wrong = []
        if not tree:
            self.real += 1
            begin(self._job)
            done = run(self._job, Stop(self._trees, number, fault))
            if message := unclear(done.code, done.said, self._job.ends):
                wrong = [message]
            tree, ended = self._keep.hold(self._trees.now()), done.code == self._job.ends
        if (tree, ended) not in self.known:
            self._trees.lay_out(self._keep.trees[tree])
            found = judged(self._job, self._wanted, self._joins, ended=ended)
            self.known[tree, ended] = found
            print(self._job.name, number, fault, found[1], file=sys.stderr, flush=True)
        state, wrongs = self.known[tree, ended]
        return state, wrong + wrongs


class Keep:
    """Keeps the tree before every operation, and where the process stood; lets a copy of it fail there.

    Args:
        trees: States of the folder.
        faults: Whether copies fail.
    """

    def __init__(self, trees: Trees, *, faults: bool) -> None:
        self._trees, self._faults = trees, faults
        self.trees: dict[str, Tree] = {}
        self.before: list[str] = []
        self.places: list[str] = []
        self.failed: list[tuple[int, str, str, Done | None]] = []
        self._ended: dict[str, tuple[str, Done]] = {}

    def __call__(self, number: int, operation: str, name: str) -> None:
        tree = self.hold(self._trees.now())
        self.before.append(tree)
        self.places.append(place_of(tree, operation))
        if not self._faults:
            return
        for fault in FAULTS:
            if threading.current_thread() is not threading.main_thread():
                self.failed.append((number, fault, "", None))  # a copy has this thread only
            else:
                self._fail(number, fault, name, tree)

    def _fail(self, number: int, fault: str, name: str, tree: str) -> None:
        files = open_files(self._trees.root)
        held, numbers = set(locks._HELD), self._trees.numbers()
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            signal.alarm(_SECONDS)
            go_on(Join(self._trees, set(self._ended)), writing)
            raise fault_of(fault, name)
        os.close(writing)
        done = heard(pid, reading)
        left = self._trees.now()
        if digest_of(left) != tree:
            self._trees.put_back(self.trees[tree])
            self._trees.stand_for(numbers)
        point_back(files, held)
        self._note(number, fault, self.hold(left), done)

    def _note(self, number: int, fault: str, left: str, done: Done) -> None:
        """What a copy did, or the one that it joined."""
        if done.code == JOINED:
            left, done = self._ended[done.found[-1]]
        elif done.found:
            self._ended |= dict.fromkeys(done.found, (left, done))
        self.failed.append((number, fault, left, done))

    def hold(self, tree: Tree) -> str:
        """Keeps a tree, by its digest."""
        self.trees.setdefault(digest := digest_of(tree), tree)
        return digest

    def told(self) -> Any:
        """Everything, for the process that started the run."""
        trees = {d: {n: dataclasses.astuple(e) for n, e in tree.items()} for d, tree in self.trees.items()}
        failed = [(*where, dataclasses.astuple(done) if done else None) for *where, done in self.failed]
        return [trees, self.before, self.places, failed]

    def hear(self, done: Done) -> None:
        """Takes over what it told."""
        trees, self.before, self.places, failed = done.found
        self.trees = {digest: {n: Entry(*entry) for n, entry in tree.items()} for digest, tree in trees.items()}
        self.failed = [(*where, Done(*one) if one else None) for *where, one in failed]

    def faulted(self, job: Job) -> list[tuple[str, int, str, bool]]:
        """Fault, operation, the tree that it left, and whether it went unnoticed.

        There is no tree where a run of its own must show it.
        """
        found = []
        for number, fault, tree, done in self.failed:
            clear = done is not None and not unclear(done.code, done.said, job.ends)
            found.append((fault, number, tree if clear else "", done is not None and done.code == job.ends))
        return found

    def ended_well(self, found: Any) -> None:
        """Nothing to remember: this is the first run."""


class Join:
    """Ends a run where another stood that ended well.

    Args:
        trees: States of the folder.
        places: Where runs stood that ended well.
    """

    def __init__(self, trees: Trees, places: set[str]) -> None:
        self._trees, self._good = trees, places
        self._met: list[str] = []

    def __call__(self, number: int, operation: str, name: str) -> None:
        if operation.startswith("read ") or sys.exc_info()[1] is not None:  # what is told of an error depends on it
            return
        place = place_of(digest_of(self._trees.now()), operation)
        self._met.append(place)
        if place in self._good:
            tell([[], "", self._met])
            os._exit(JOINED)

    def told(self) -> list[str]:
        """Where it stood."""
        return self._met

    def ended_well(self, found: list[str]) -> None:
        """Others may join it there."""
        self._good |= set(found)


def place_of(tree: str, operation: str) -> str:
    """Digest of a tree, the next operation, and how the process came there."""
    stack = []
    frame = sys._getframe(2)
    while frame is not None:
        if "/uwm_deploy/" in frame.f_code.co_filename:
            said = {n: repr(v) for n, v in frame.f_locals.items() if isinstance(v, (bool, Workplace, type(None)))}
            stack.append((frame.f_code.co_filename, frame.f_lineno, sorted(said.items())))
        frame = frame.f_back  # type: ignore[assignment] # ends with None
    return hashlib.sha256(repr((tree, operation, stack)).encode()).hexdigest()


def _sampled(job: Job, keep: Keep, operations: list[str]) -> Iterable[list[str]]:
    """Where the short way and a run that is really stopped disagree.

    Args:
        job: The command.
        keep: What the short way found.
        operations: In its order. A run that met the files of a folder in another order came to another place.
    """
    wrong = []
    step = max(1, len(keep.before) // _SAMPLE)
    for number in range(step // 2, len(keep.before), step):
        fault = FAULTS[number % len(FAULTS)] if job.faults else ""
        begin(job)
        done = run(job, stop := Stop(trees_of(job), number, fault))
        names = _outline(trees_of(job).now())
        if not fault:
            short = _outline(keep.trees[keep.before[number]])
            same = done.code == -signal.SIGKILL and done.found == digest_of(stop.trees.now()) and short == names
        else:
            ((tree, copy),) = [(t, d) for n, f, t, d in keep.failed if (n, f) == (number, fault)]
            same = copy is None or (copy.code == done.code and _outline(keep.trees[tree]) == names)
            same = same or done.operations[: number + 1] != operations[: number + 1]
            same = same or (copy is not None and bool(unclear(copy.code, copy.said, job.ends)))  # was run anew
        if not same:
            wrong.append([done.operations[-1:] or "", f"{fault} a run that is really stopped gives another tree"])
    return wrong


def _outline(tree: Tree) -> Counter[tuple[str, str, int]]:
    """Names, kinds and permissions: bytes hold times, which differ from run to run."""
    return Counter((name, entry.kind, entry.mode) for name, entry in tree.items())
