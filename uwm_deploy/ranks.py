"""The processes of one run: one, or several under ``torchrun``, each with its share of the items."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from uwm_deploy.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which process this is, and how to meet the others.

    With one process nothing is communicated, and torch is not imported.

    Attributes:
        rank: 0 writes files and speaks; the others only compute.
        world: Number of processes.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls, device: str = "auto") -> Ranks:
        """Joins the group that ``torchrun`` made; without its environment variables this process is alone.

        Args:
            device: `cpu` uses gloo; otherwise nccl when there is a GPU for every local process.

        Raises:
            InputError: If the environment names no valid group.
        """
        if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
            return cls()
        try:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        except ValueError as error:
            raise InputError("RANK and WORLD_SIZE are not numbers", fix="start with torchrun") from error
        if not 0 <= rank < world:
            raise InputError(f"RANK is {rank} of WORLD_SIZE {world}", fix="start with torchrun")
        if world > 1:
            import torch
            from torch import distributed

            local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
            gpus = device != "cpu" and torch.cuda.is_available() and torch.cuda.device_count() >= local
            if gpus:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
            if not distributed.is_initialized():
                distributed.init_process_group("nccl" if gpus else "gloo")
        return cls(rank, world)

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Every `world`-th item, starting at `rank`."""
        return list(items[self.rank :: self.world])

    def sum_(self, tensor: Tensor) -> None:
        """Adds up a tensor over all processes, in place."""
        if self.world > 1:
            from torch import distributed

            distributed.all_reduce(tensor)

    def gathered(self, value: T) -> list[T]:
        """One value of each process, in rank order, in every process."""
        if self.world == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def agreed(self, value: T) -> T:
        """The first process's value, in every process."""
        if self.world == 1:
            return value
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            from torch import distributed

            distributed.barrier()

    def leave(self) -> None:
        """Ends the group."""
        if self.world > 1:
            from torch import distributed

            distributed.destroy_process_group()
