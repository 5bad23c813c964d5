"""How many threads PyTorch computes with: as many as it chooses, and one for a model whose operations are small."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import nn

from uwm_deploy.runtime.cores import threads_asked

_SMALL = 4_000_000
"""Parameters of both towers up to which one thread computes. A second one saves a fifth of a forward pass of such towers
where both cores are free, and nothing of a whole build. Where other programs hold the cores, it costs a fifth."""

_HELD: ContextVar[bool] = ContextVar("held", default=False)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """As many threads for a while, whatever is loaded meanwhile."""
    before, held = torch.get_num_threads(), _HELD.set(True)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _HELD.reset(held)


def fit_threads(model: nn.Module) -> None:
    """Takes one thread for a small model, and PyTorch's own number for any other.

    Threads wait for each other after every operation. Where an operation is short, and another program holds a core, they
    mostly wait. The user's own `OMP_NUM_THREADS` wins, and so does `threads`.
    """
    if _HELD.get() or threads_asked() is not None:
        return
    usual = _usual()
    torch.set_num_threads(1 if sum(part.numel() for part in model.parameters()) <= _SMALL else usual)


@functools.cache
def _usual() -> int:
    return torch.get_num_threads()
