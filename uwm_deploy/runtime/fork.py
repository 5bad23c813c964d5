"""Threads, locks and engines belong to the process that made them; in one that was forked off it they only look alive."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn
from weakref import WeakSet

from uwm_deploy.errors import InputError


@dataclass(frozen=True, slots=True)
class Home:
    """The process that something was opened in."""

    pid: int = field(default_factory=os.getpid)

    @property
    def elsewhere(self) -> bool:
        """Whether this is another process, forked off that one."""
        return os.getpid() != self.pid

    def check(self) -> None:
        """Lets nobody wait for threads that are not here.

        Raises:
            InputError: In another process.
        """
        if self.elsewhere:
            raise InputError(
                f"the encoder was opened in process {self.pid} and is used in {os.getpid()}, forked off it: its threads and "
                "engines are not here",
                fix="open the bundle in each process, after the fork",
            )


def stays_here(_: object) -> NoReturn:
    """What `pickle` calls: an encoder is no message.

    Raises:
        InputError: Always.
    """
    raise InputError("an encoder cannot be sent to another process", fix="send the bundle's path, and open it there")


_ENGINES: WeakSet[object] = WeakSet()


def never_destroyed_in_a_fork(engine: object) -> None:
    """An engine waits for its threads when it is destroyed, and would wait for ever, or crash, where they are not."""
    _ENGINES.add(engine)


def after_fork(forget: Callable[[], None]) -> None:
    """Calls something in every process that is forked off this one, before anything else runs there."""
    os.register_at_fork(after_in_child=forget)


def _hold() -> None:
    for engine in list(_ENGINES):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))


after_fork(_hold)
