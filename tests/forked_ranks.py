"""Several processes of one run that meet as those of torchrun do, without starting Python and its libraries again.

The one test that starts torchrun itself is in `tests/unit/test_scale.py`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

SECONDS = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How one process of a group ended.

    Attributes:
        code: Its exit code; below 0 the signal that ended it.
        output: What it wrote to standard output.
        errors: What it wrote to standard error.
    """

    code: int
    output: str
    errors: str


def two_ranks(folder: Path, arguments: Sequence[str]) -> list[Ended]:
    """Runs the command line in two forks of this process, whose modules and patches they have.

    Not where this process has differentiated already: PyTorch does not do it again in a fork.

    Args:
        folder: Where they write.
        arguments: Of `uwm-deploy`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = {rank: _forked(rank, port, folder, arguments) for rank in range(2)}
    deadline = time.monotonic() + SECONDS
    codes = {rank: _waited(pid, deadline) for rank, pid in started.items()}
    return [
        Ended(code=code, output=(folder / f"rank-{rank}.out").read_text(), errors=(folder / f"rank-{rank}.err").read_text())
        for rank, code in codes.items()
    ]  # fmt: skip


def _forked(rank: int, port: int, folder: Path, arguments: Sequence[str]) -> int:
    pid = os.fork()
    if pid == 0:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        _run(folder / f"rank-{rank}", arguments)
    return pid


def _run(name: Path, arguments: Sequence[str]) -> NoReturn:
    """In a fork: nothing that the parent opened or registered is used or run."""
    code = 1
    try:
        for number, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(name.with_suffix(f".{end}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 -- to the end
        import torch

        from uwm_deploy.cli import main

        torch.set_num_threads(1)
        main(list(arguments))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _waited(pid: int, deadline: float) -> int:
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    # A process that has differentiated nothing yet, for tests whose own has: folder, then arguments.
    import uwm_deploy.training.trainer  # noqa: F401 -- once, not in every fork

    ended = two_ranks(Path(sys.argv[1]), sys.argv[2:])
    print(ended[0].output)
    print(*(part.errors for part in ended), file=sys.stderr)
    sys.exit(max(abs(part.code) for part in ended))
