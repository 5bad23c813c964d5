"""An encoder in a process that was forked off its own, under load: what each call does there, and how the process ends.

    python -m tests.forked_encoder BUNDLE

Every child calls everything and ends as programs do, with the interpreter's own cleaning up. The parent serves on, and so
do a process that is forked without an encoder and opens one, one that is spawned, and threads.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from uwm_deploy.errors import InputError
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.service import Serving
from uwm_deploy.serve.embed import batch

FORKS = 3
SECONDS = 20.0
"""Longer is a hang."""

PICTURE = np.zeros((50, 50, 3), np.uint8)


def calls_of(encoder: SafeEncoder) -> dict[str, str]:
    """What each call gives: ``refused`` with our own error, else its result in words."""
    ways: dict[str, Callable[[], object]] = {
        "encode_text": lambda: encoder.encode_text(["a"]),
        "encode_image": lambda: encoder.encode_image(PICTURE),
        "aencode_text": lambda: asyncio.run(encoder.aencode_text("a")),
        "aencode_image": lambda: asyncio.run(encoder.aencode_image(PICTURE)),
        "zero_shot": lambda: encoder.zero_shot(["a", "b"]),
        "session": lambda: encoder.session(TowerName.IMAGE).run(np.zeros((1, 3, 48, 48), np.float32)),
        "metrics": encoder.metrics,
        "drift": encoder.drift,
        "registry": lambda: list(encoder.registry.collect()),
        "pickle": lambda: pickle.dumps(encoder),
        "selftest": lambda: encoder.selftest().ok,
        "close": encoder.close,
    }
    found = {}
    for name, call in ways.items():
        try:
            found[name] = str(call())[:200]
        except InputError as error:
            found[name] = "refused" if "process" in str(error) else str(error)
    return found


def ended(child: int) -> int | None:
    """How a child ended; None if it hangs, and then it is killed."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


def forked(encoder: SafeEncoder) -> tuple[dict[str, str], int | None]:
    """Forks; what the calls gave in the child, and how it ended."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, json.dumps(calls_of(encoder)).encode())
        sys.exit(0)
    os.close(write)
    status = ended(child)
    with os.fdopen(read, "rb") as stream:
        return json.loads(stream.read() or b"{}"), status


def opened_elsewhere(path: str, wanted: bytes) -> None:
    """In another process: the encoder of a job, opened there, gives the same row."""
    job = batch.EmbedBatch(path, kind="texts")
    found = job({"key": ["a"], "text": ["a star"]})["embedding"]
    np.testing.assert_allclose(found, np.frombuffer(wanted, np.float32)[None], atol=1e-5)
    job.encoder().close()


def started(how: str, path: str, wanted: bytes) -> int | None:
    """Exit code of a process of `multiprocessing` that opens an encoder of its own."""
    process = multiprocessing.get_context(how).Process(target=opened_elsewhere, args=(path, wanted))
    with batch._LOCK:  # as a thread that opens a bundle at that moment holds it
        process.start()
    process.join(3 * SECONDS)
    code = process.exitcode
    process.kill()
    return code


def main(path: Path) -> None:
    """Prints what was found as JSON."""
    with SafeEncoder.open(path, serving=Serving(threads=2)) as encoder:
        row = np.asarray(encoder.encode_text(["a star"]))[0]
        stop, wrong = threading.Event(), [0]

        def load() -> None:
            while not stop.is_set():
                found = encoder.encode_text(["a star", "a circle"] * 8)
                wrong[0] += not np.abs(found[0] - row).max() < 1e-5
                encoder.metrics()
                time.sleep(0.005)

        threads = [threading.Thread(target=load) for _ in range(3)]
        for thread in threads:
            thread.start()
        children = [forked(encoder) for _ in range(FORKS)]
        codes = {how: started(how, str(path), row.tobytes()) for how in ("fork", "spawn")}
        stop.set()
        for thread in threads:
            thread.join(SECONDS)
        alive = bool(encoder.encode_text("a star").ok.all()) and encoder.selftest().ok
    result = {
        "children": [calls for calls, _ in children],
        "statuses": [status for _, status in children],
        "codes": codes,
        "wrong": wrong[0],
        "threads": sum(thread.is_alive() for thread in threads),
        "alive": alive,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
