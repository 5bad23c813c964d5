"""A scoring pass in shards: divided among processes, added up in the order of the set, saved so that a killed run resumes.

A shard's sums start at zero, and shards are added one after the other in their order, so the totals are the same numbers for
any number of processes. Sums are (out, in) per edited layer. To save memory a process holds its own shard and at most one
layer of the total: the total lies in a file, or on a GPU machine in the host's memory.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from uwm_deploy.data.ranks import Ranks
from uwm_deploy.data.torchrun import add_in_order
from uwm_deploy.edits.pairs import SHARD_PAIRS, PairCounts
from uwm_deploy.errors import ContractError, IntegrityError
from uwm_deploy.records.data import LeftOut
from uwm_deploy.records.machine import disk_errors
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.tensor_file import open_tensors
from uwm_deploy.runtime.memory import Notice, silent

SAVE_SECONDS = 60.0
"""Seconds between two saves of the totals on a GPU; on a CPU, where a shard takes longer, every round is saved."""

Dtype = Literal["float32", "bfloat16"]

_FORMAT = "uwm-deploy sums 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How a scoring pass is run. The scores do not depend on it, except that bfloat16 rounds.

    Attributes:
        ranks: The processes that share the pass.
        dtype: Type of the forward passes; scores are float32 always.
        part: Quadruples per forward pass with gradients; None takes the usual number.
        kept: Folder for totals, so that a killed run resumes; None saves none.
        key: Digest of the inputs of the totals; saved totals with another key are not used.
        notice: Called with lines for the user.
    """

    ranks: Ranks = field(default_factory=Ranks)
    dtype: Dtype = "float32"
    part: int | None = None
    kept: Path | None = None
    key: str = ""
    notice: Notice = silent


class Shard(NamedTuple):
    """Some pairs of one score.

    Attributes:
        concept: Concept of the score; empty when all pairs make one score.
        items: Places of the pairs in the stream.
    """

    concept: str
    items: range


@dataclass(slots=True, kw_only=True)
class PartialSum:
    """Sum of one or more shards of a score.

    Attributes:
        sums: Sums by layer, one or more (out, in) float32 each, or for a fit the arrays of `stages.fit`; only in the process
            that keeps the total.
        divisors: Divisor of the sums by layer.
        count: Number of pairs in the sums.
        counts: Counts of scored and left-out pairs.
    """

    sums: dict[str, list[Tensor]]
    divisors: dict[str, int]
    count: int
    counts: PairCounts


def shards_of(ids: Sequence[str], concepts: Mapping[str, str] | None, *, multiple: int = 1) -> list[list[Shard]]:
    """Cuts a stream into shards, the same for any number of processes.

    Args:
        ids: In scoring order.
        concepts: Item id to concept; None makes one score of all.
        multiple: The number of pairs in a shard is a multiple of this.

    Returns:
        Shards by score.

    Raises:
        ContractError: If a concept comes twice.
    """
    size, start = math.ceil(SHARD_PAIRS / multiple) * multiple, 0
    found: dict[str, list[Shard]] = {}
    for concept, members in itertools.groupby(ids, key=concepts.__getitem__ if concepts else lambda _: ""):
        if concept in found:
            raise ContractError(f"concept {concept!r} comes twice in the stream", fix="stream the set in scoring order")
        stop = start + len(list(members))
        found[concept] = [Shard(concept, range(at, min(at + size, stop))) for at in range(start, stop, size)]
        start = stop
    return list(found.values())


def totals(
    shards: Sequence[Sequence[Shard]],
    compute: Callable[[Shard], PartialSum],
    check: Callable[[PairCounts], None],
    tower: TowerName,
    scale: Scale,
) -> Iterator[tuple[str, PartialSum]]:
    """Total of each score, in order; only the first process has the sums.

    Args:
        shards: Shards by score.
        compute: Scores a shard.
        check: Raises when too many pairs were left out so far.
        tower: Tower that is scored.
        scale: The processes, and where totals are saved.

    Raises:
        UwmError: Whatever `compute` and `check` raise, in every process.
    """
    ranks, several = scale.ranks, sum(map(len, shards)) > 1
    before = PairCounts(tower)
    for number, group in enumerate(shards):
        path = scale.kept / f"{tower.value}-{number:04d}.safetensors" if scale.kept and several else None
        total = _Total(tower, path, scale.key)
        done = ranks.first_only(partial(total.restore, len(group)))
        if done:
            scale.notice(f"{tower.value}: resumed after {done} of {len(group)} shards")
        for start in range(done, len(group), ranks.world):
            total.add(group[start : start + ranks.world], compute, ranks)
            ranks.first_only(partial(check, _both(before, total.counts)))
            ranks.first_only(partial(total.save, last=total.done == len(group)))
        before = _both(before, total.counts)
        yield group[0].concept, total.part


def _both(left: PairCounts, right: PairCounts) -> PairCounts:
    result = PairCounts(left.tower)
    result.add(left)
    result.add(right)
    return result


class _Total:
    """Running total of one score. Between rounds its sums lie in a file, or in host memory."""

    def __init__(self, tower: TowerName, path: Path | None, key: str) -> None:
        self.part = PartialSum(sums={}, divisors={}, count=0, counts=PairCounts(tower))
        self.done = 0
        self._path, self._saved = path, time.monotonic()
        self._about = {"format": _FORMAT, "key": key, "shard_pairs": str(SHARD_PAIRS)}

    @property
    def counts(self) -> PairCounts:
        """Counts of scored and left-out pairs so far."""
        return self.part.counts

    def add(self, shards: Sequence[Shard], compute: Callable[[Shard], PartialSum], ranks: Ranks) -> None:
        """Scores one shard in each process, and adds them to the total in order."""

        def begun() -> PartialSum | None:
            if ranks.rank >= len(shards):
                return None
            part = compute(shards[ranks.rank])
            if ranks.first:
                self._add_total_to(part.sums)
            return part

        part = ranks.together(begun)
        with torch.inference_mode():
            for sums in part.sums.values() if part else ():
                for total in sums:
                    add_in_order(ranks, total, len(shards) - 1)
        if ranks.first and part:
            self.part.sums = part.sums
        for found in ranks.gathered(part and (part.divisors, part.count, part.counts)):
            if found:
                divisors, count, counts = found
                self.part.divisors = {name: self.part.divisors.get(name, 0) + n for name, n in divisors.items()}
                self.part.count += count
                self.counts.add(counts)
        self.done += len(shards)

    def restore(self, shards: int) -> int:
        """Reads the total that a killed run with the same key saved.

        Args:
            shards: Number of shards of the whole score; the sums themselves are read only when all are in the total.

        Returns:
            Number of shards that are in the total.
        """
        if self._path is None:
            return 0
        try:
            with open_tensors(self._path, fix="", kind=IntegrityError) as file:
                about = file.metadata() or {}
                if any(about.get(name) != value for name, value in self._about.items()):
                    return 0
                state = json.loads(about["state"])
                for name in sorted(file.keys()) if state["done"] == shards else ():
                    self.part.sums.setdefault(name.rpartition("#")[0], []).append(file.get_tensor(name))
        except IntegrityError:  # there is none, or it is not whole; one that this machine cannot read is not begun anew
            return 0
        self.done, self.part.count, self.part.divisors = state["done"], state["count"], state["divisors"]
        self.counts.total = state["total"]
        self.counts.leave_out(state["not_finite"])
        self.counts.not_read(LeftOut(id=item, reason=reason) for item, reason in state["unread"])
        return self.done

    def save(self, *, last: bool) -> None:
        """Saves the sums for the next round, in host memory or in a file, which appears whole or not at all."""
        on_gpu = any(total.is_cuda for sums in self.part.sums.values() for total in sums)
        if not last:
            self.part.sums = {name: [total.cpu() for total in sums] for name, sums in self.part.sums.items()}
        if self._path is None or (on_gpu and not last and time.monotonic() - self._saved < SAVE_SECONDS):
            return
        self._write(self._path)
        self._saved = time.monotonic()
        if not (last or on_gpu):
            self.part.sums = {}

    @torch.inference_mode()
    def _add_total_to(self, shard: Mapping[str, list[Tensor]]) -> None:
        """Adds the total to the sums of the next shard, layer by layer, so that it is never in memory twice."""
        if not self.done:
            return
        if self.part.sums:
            for name, sums in shard.items():
                for total, waiting in zip(sums, self.part.sums.pop(name), strict=True):
                    total.add_(waiting.to(total.device))
            return
        with open_tensors(Path(str(self._path)), fix="score again", kind=IntegrityError) as file:
            for name, sums in shard.items():
                for number, total in enumerate(sums):
                    total.add_(file.get_tensor(f"{name}#{number}").to(total.device))

    def _write(self, path: Path) -> None:
        counts = self.counts
        state = {
            "done": self.done,
            "count": self.part.count,
            "divisors": self.part.divisors,
            "total": counts.total,
            "not_finite": list(counts.not_finite),
            "unread": [[item.id, item.reason] for item in counts.unread.values()],
        }
        tensors = {f"{name}#{i}": total.cpu() for name, sums in self.part.sums.items() for i, total in enumerate(sums)}
        temporary = path.with_name(f".tmp-{path.name}")
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata=self._about | {"state": json.dumps(state)})
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
