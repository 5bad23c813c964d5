"""Batch sizes that fit into memory: a first size from the free memory, halved whenever memory runs out."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from uwm_deploy.records.model import ModelRef, TowerName
from uwm_deploy.runtime.memory import Notice, halved
from uwm_deploy.towers.protocol import Tower

USUAL_PAIRS = {TowerName.IMAGE: 16, TowerName.TEXT: 64}
"""Pairs per forward pass by default: more are not faster on a CPU."""

MOST_PAIRS = {TowerName.IMAGE: 128, TowerName.TEXT: 512}
"""Largest number of pairs per forward pass on a GPU; more would only cost memory, that of the workers included."""

_SHARE_OF_FREE = 0.6
"""Share of the free memory that is used; the rest is for other programs and for allocations that a trial pass lacks."""

_LIVE_AT_ONCE = 4
"""Largest number of activations that a forward pass holds at a time, each as large as the largest layer's."""


class _Rows(Protocol):
    @property
    def ids(self) -> tuple[str, ...]: ...

    def rows(self, rows: slice) -> Self: ...


R = TypeVar("R", bound=_Rows)
T = TypeVar("T")


class BatchSplitter:
    """Runs batches, and splits them into smaller parts once one was too large for memory.

    Args:
        what: Name of a batch's rows in notices, such as "pairs".
        notice: Called with one line each time the size is halved.
    """

    def __init__(self, what: str, notice: Notice) -> None:
        self._what, self._notice = what, notice
        self._most: int | None = None

    def run(self, batch: R, call: Callable[[R], T], forget: Callable[[], None] = lambda: None) -> list[tuple[R, T]]:
        """Calls a function with a batch, or with its parts one after the other; each row is in one successful call.

        Args:
            batch: Rows with ids.
            call: The function. What it leaves behind when it fails, `forget` must remove.
            forget: Called after each failure.

        Returns:
            Each part and its result.

        Raises:
            PrerequisiteError: If a single row does not fit into memory.
        """
        done: list[tuple[R, T]] = []
        start, count = 0, len(batch.ids)
        while start < count:
            size = min(self._most or count, count - start)
            part = batch if size == count else batch.rows(slice(start, start + size))
            try:
                done.append((part, call(part)))
                start += size
            except Exception as error:
                forget()
                self._most = halved(size, error, self._what, self._notice)
        return done


def pairs_that_fit(tower: Tower, ref: ModelRef) -> int:
    """Pairs per forward pass, from the free memory and the peak of one trial pass.

    On a GPU it is the largest power of two that fits by that peak, on a CPU at most the usual number.
    """
    device = next(tower.graph_module().parameters()).device
    usual, most = USUAL_PAIRS[tower.name], MOST_PAIRS[tower.name]
    if device.type != "cuda":
        return _power_of_two(_free_host_bytes() / _host_bytes_per_pair(tower, ref), usual)
    for pairs in (usual, 1):
        try:
            peak = _peak_gpu_bytes(tower, ref, pairs, device)
            break
        except torch.OutOfMemoryError:
            continue
    else:
        return 1
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return _power_of_two(free * pairs / max(1, peak), most)


def _power_of_two(fits: float, most: int) -> int:
    """Largest power of two within a safe share of the number that fits, between 1 and `most`."""
    size = most
    while size > 1 and size > _SHARE_OF_FREE * fits:
        size //= 2
    return size


def _trial_inputs(tower: Tower, ref: ModelRef, pairs: int, device: torch.device) -> Tensor:
    """Both sides of some pairs, captions of full length."""
    if tower.name is TowerName.IMAGE:
        return torch.zeros(2 * pairs, 3, ref.image.crop, ref.image.crop, device=device)
    ids = torch.ones(2 * pairs, ref.text.context_length, dtype=torch.int64, device=device)
    ids[:, -1] = ref.text.eos_id
    return ids


@torch.inference_mode()
def _peak_gpu_bytes(tower: Tower, ref: ModelRef, pairs: int, device: torch.device) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    tower.embed(_trial_inputs(tower, ref, pairs, device))
    return torch.cuda.max_memory_allocated(device) - before


@torch.inference_mode()
def _host_bytes_per_pair(tower: Tower, ref: ModelRef) -> int:
    """Estimated memory of a pair on a CPU, from the layer with the largest inputs and outputs: torch measures none."""
    largest = 0

    def seen(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        nonlocal largest
        tensors = [value for value in (*inputs, output) if isinstance(value, Tensor)]
        largest = max(largest, sum(value.numel() * value.element_size() for value in tensors))

    leaves = [module for module in tower.graph_module().modules() if not list(module.children())]
    handles = [leaf.register_forward_hook(seen) for leaf in leaves]
    try:
        tower.embed(_trial_inputs(tower, ref, 1, torch.device("cpu")))
    finally:
        for handle in handles:
            handle.remove()
    return max(1, _LIVE_AT_ONCE * largest)


def _free_host_bytes() -> int:
    """Memory that is available without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2
