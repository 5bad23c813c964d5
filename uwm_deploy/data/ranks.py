"""The processes of one run: one, or several under ``torchrun``, each with its share of the items.

This module knows one process only and needs no torch; `uwm_deploy.data.torchrun` joins several.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from uwm_deploy.errors import ExitCode, UwmError

T = TypeVar("T")


class StoppedError(UwmError):
    """Raised in every process of a group when one of them failed, with that one's message and exit code.

    Attributes:
        kind: Name of the type of the error that was met.
    """

    def __init__(self, what: str, *, kind: str, code: int) -> None:
        super().__init__(what)
        self.kind, self.exit_code = kind, ExitCode(code)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which process this is, and how to meet the others. By itself it is a group of one.

    Attributes:
        rank: 0 writes files and speaks; the others only compute.
        world: Number of processes.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def together(self, call: Callable[[], T]) -> T:
        """Runs something that may fail in every process; all go on, or all stop. Calls may be nested.

        Raises:
            StoppedError: With several processes, in each of them, if it failed in one.
        """
        return call()

    def first_only(self, call: Callable[[], T]) -> T:
        """Runs something in the first process; its result, or its failure, is everyone's."""
        return call()

    def gathered(self, value: T) -> list[T]:
        """One value of each process, in rank order, in every process."""
        return [value]

    def dealt(self, n: int, size: int) -> list[range]:
        """This process's batches of n items: every `world`-th one, starting with number `rank`."""
        return [range(start, min(start + size, n)) for start in range(0, n, size)][self.rank :: self.world]

    def in_turn(self, results: list[T]) -> list[T]:
        """Results of dealt batches of all processes, in the order of the batches, in every process."""
        parts = self.gathered(results)
        return [parts[k % self.world][k // self.world] for k in range(sum(map(len, parts)))]


ALONE = Ranks()
"""One process."""


def speaks() -> bool:
    """Whether this process is the first of its group, by what ``torchrun`` put into the environment."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
