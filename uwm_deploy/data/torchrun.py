"""Several processes as one run: what `Ranks` promises, kept by torch.distributed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from uwm_deploy.data.ranks import Ranks, StoppedError
from uwm_deploy.errors import ExitCode, InputError, UwmError

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""Some stages run in the first process while the others wait; a process that dies is torchrun's to notice."""


def join(device: str = "auto") -> Ranks:
    """Joins the group that ``torchrun`` made, once; without its environment variables this process is alone.

    Args:
        device: `cpu` uses gloo; otherwise nccl when there is a GPU for every local process.

    Raises:
        InputError: If the environment names no valid group.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return Ranks()
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local, here = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    except ValueError as error:
        raise InputError("RANK and WORLD_SIZE are not numbers", fix="start with torchrun") from error
    if not 0 <= rank < world:
        raise InputError(f"RANK is {rank} of WORLD_SIZE {world}", fix="start with torchrun")
    if world == 1:
        return Ranks()
    if distributed.is_initialized():
        return ProcessGroup(rank, world)
    gpus = device != "cpu" and torch.cuda.is_available() and torch.cuda.device_count() >= here
    if gpus:
        torch.cuda.set_device(local)
    try:
        distributed.init_process_group("nccl" if gpus else "gloo", timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the processes cannot meet: {error}", fix="start with torchrun") from error
    return ProcessGroup(rank, world)


def leave(*, in_order: bool) -> None:
    """Ends the group, if there is one.

    Args:
        in_order: Wait for the others first, so that nobody is ended while the first still speaks. Not after an error
            that the others do not know of.
    """
    if distributed.is_initialized():
        if in_order:
            with contextlib.suppress(RuntimeError):  # one that was to come is gone already
                distributed.barrier()
        distributed.destroy_process_group()


@dataclass(frozen=True, slots=True)
class ProcessGroup(Ranks):
    """Several processes.

    Before anything is exchanged all of them meet and say whether they are well. A process that failed says so at its next
    meeting, whichever that is, so none waits for one that will not come.
    """

    def together(self, call: Callable[[], T]) -> T:
        """See `Ranks.together`."""
        try:
            result = call()
        except StoppedError:
            raise
        except Exception as error:
            self._meet(error)
            raise
        self._meet(None)
        return result

    def first_only(self, call: Callable[[], T]) -> T:
        """See `Ranks.first_only`."""
        values: list[Any] = [self.together(call) if self.first else self.together(lambda: None)]
        distributed.broadcast_object_list(values, src=0)
        result: T = values[0]
        return result

    def gathered(self, value: T) -> list[T]:
        """See `Ranks.gathered`."""
        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def _meet(self, error: Exception | None) -> None:
        mine = None if error is None else (type(error).__name__, _text(error), _code(error))
        for rank, failure in enumerate(self.gathered(mine)):
            if failure is not None:
                kind, text, code = failure
                raise StoppedError(text if rank == 0 else f"process {rank}: {text}", kind=kind, code=code) from error


def add_in_order(ranks: Ranks, total: Tensor, others: int) -> None:
    """Adds the tensors of the processes 1 to `others` to the first one's, one after the other, in place.

    Args:
        ranks: The group.
        total: Any dtype, any shape (the same in every process); changes in the first process.
        others: Number of processes besides the first that have something to add.
    """
    wire = _wire(total)
    if ranks.first:
        for source in range(1, others + 1):
            received = torch.empty_like(total, device=wire)
            distributed.recv(received, src=source)
            total.add_(received.to(total.device))
    elif ranks.rank <= others:
        distributed.send(total.to(wire), dst=0)


def with_averaged_gradients(module: nn.Module, ranks: Ranks) -> nn.Module:
    """A module whose backward pass ends with the mean of the gradients of all processes, in each of them.

    Args:
        module: The same in every process, where it is to stay; the first one's parameters are what all start from.
        ranks: The group; one process gets the module itself.
    """
    return module if ranks.world == 1 else nn.parallel.DistributedDataParallel(module)


def in_this_process(module: nn.Module) -> nn.Module:
    """The module inside `with_averaged_gradients`, which speaks to no other process."""
    inside: nn.Module = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
    return inside


def _wire(total: Tensor) -> torch.device:
    """Where a tensor has to be to be sent: gloo takes it from the CPU, nccl from a GPU."""
    backend = distributed.get_backend() if distributed.is_initialized() else ""
    if backend == "nccl" and not total.is_cuda:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if backend == "gloo" else total.device


def _text(error: Exception) -> str:
    line = " ".join(str(error).split())
    return line if isinstance(error, UwmError) else f"internal error: {type(error).__name__}: {line[:300]}"


def _code(error: Exception) -> int:
    return int(error.exit_code if isinstance(error, UwmError) else ExitCode.INTERNAL)
