"""Many callers, of whom some send the worst items there are: nobody else may see an error or a wrong row.

    python tests/benchmarks/bench_worst_items.py dist/demo --seconds 60

Half of the callers are asyncio tasks, half are threads; every other one asks for texts, the rest for images. One request
in a hundred is one of the worst: ids without an embedding, names of special tokens by the thousand, what is no text, broken
and misleading images. Each must get an error of its own, or a row where it has one; every answer to anybody else is compared
with that item alone. It is tried in this process, in processes that are forked and in ones that are spawned, each with an
encoder of its own; and with a bundle of an older release, where the engine itself has to find the ids and fails a shared
batch.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.strange_bundle import TOKEN, with_a_strange_token
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.service import Serving

ITEMS = 128
PROCESSES = 2
TOLERANCE = 1e-4
"""Rows of other batch sizes differ in the last digits only."""


def picture(seed: int, kind: str = "JPEG") -> bytes:
    """A small picture of its own for each seed."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(colours).resize((64 + seed % 9, 56), Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


WORST_TEXTS: list[Any] = [
    f"a red {TOKEN} circle",
    TOKEN * 50_000,
    f"<|endoftext|>{TOKEN}",
    "x" * 100_001,
    "\ud800",
    7,
    None,
]
"""Each is an error of its own."""

WORST_IMAGES: list[Any] = [
    b"",
    picture(0)[:200],
    picture(1, "PNG")[:-30],
    b"P6 999999 999999 255\n",
    np.zeros((4, 4, 7), np.uint8),
    np.zeros((40, 40, 3)),
    "missing.png",
    None,
]
"""Each is an error of its own."""

HEAVY: list[tuple[str, Any]] = [
    ("text", "<|endoftext|>" * 7_000),
    ("text", "\N{GREEK CAPITAL LETTER SIGMA}\u0301" * 40_000),
    ("image", Image.new("RGB", (200_000, 1))),
    ("image", Image.new("P", (1, 30_000))),
]
"""Each is strange, and has a row."""


class Tally:
    """What all callers saw; any thread may count."""

    def __init__(self, encoder: SafeEncoder) -> None:
        self.counts: Counter[str] = Counter()
        self.slowest, self._lock = 0.0, threading.Lock()
        self.texts = [f"a star and {n} circles, {n % 7} of them red" for n in range(ITEMS)]
        self.images = [picture(n) for n in range(ITEMS)]
        # One by one, so that no mix-up of rows within a batch can hide in them.
        self.rows = {
            "text": np.concatenate([encoder.encode_text(text) for text in self.texts]),
            "image": np.concatenate([encoder.encode_image(data) for data in self.images]),
        }

    def next(self, rng: np.random.Generator, kind: str) -> tuple[str, Any, int]:
        """What to ask for next: a kind, an item, and its number; -1 for an error, -2 for a strange one that has a row."""
        drawn = rng.random()
        if drawn < 0.008:
            worst = WORST_TEXTS if kind == "text" else WORST_IMAGES
            return kind, worst[rng.integers(len(worst))], -1
        if drawn < 0.01:
            return (*HEAVY[rng.integers(len(HEAVY))], -2)
        number = int(rng.integers(ITEMS))
        return kind, (self.texts if kind == "text" else self.images)[number], number

    def check(self, kind: str, number: int, found: np.ndarray, seconds: float) -> None:
        """Counts an answer of one row."""
        ok = bool(np.isfinite(found).all())
        with self._lock:
            if number == -1:
                self.counts["worst"] += 1
                self.counts["worst with a row"] += ok
                return
            if number == -2:
                self.counts["strange"] += 1
                self.counts["strange without a row"] += not ok
                return
            self.counts["others"] += 1
            self.slowest = max(self.slowest, seconds)
            if not ok:
                self.counts["others with an error"] += 1
            elif not np.abs(np.asarray(found)[0] - self.rows[kind][number]).max() < TOLERANCE:
                self.counts["others with a wrong row"] += 1


def served(path: Path, callers: int, seconds: float) -> dict[str, float]:
    """Opens an encoder in this process and lets the callers at it; what they saw."""
    with SafeEncoder.open(path, serving=Serving(queue_timeout_s=None)) as encoder:
        tally, until = Tally(encoder), time.monotonic() + seconds

        async def caller(seed: int) -> None:
            rng, usual = np.random.default_rng(seed), "text" if seed % 2 else "image"
            while (before := time.monotonic()) < until:
                kind, item, number = tally.next(rng, usual)
                encode = encoder.aencode_text if kind == "text" else encoder.aencode_image
                tally.check(kind, number, await encode([item]), time.monotonic() - before)

        def thread(seed: int) -> None:
            rng, usual = np.random.default_rng(seed), "text" if seed % 2 else "image"
            while (before := time.monotonic()) < until:
                kind, item, number = tally.next(rng, usual)
                encode = encoder.encode_text if kind == "text" else encoder.encode_image
                tally.check(kind, number, encode([item]), time.monotonic() - before)

        async def everybody() -> None:
            await asyncio.gather(*(caller(seed) for seed in range(callers // 2)))

        threads = [threading.Thread(target=thread, args=(1000 + n,)) for n in range(callers - callers // 2)]
        for one in threads:
            one.start()
        asyncio.run(everybody())
        for one in threads:
            one.join()
        well = encoder.selftest().ok
    return {**tally.counts, "slowest": tally.slowest, "selftests failed": float(not well)}


def in_processes(how: str, path: Path, callers: int, seconds: float) -> dict[str, float]:
    """The same in several processes, each of which opens an encoder."""
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context(how)) as pool:
        each = [pool.submit(served, path, callers // PROCESSES, seconds) for _ in range(PROCESSES)]
        found = [one.result(seconds + 120) for one in each]
    total = {key: sum(part.get(key, 0.0) for part in found) for key in {key for part in found for key in part}}
    return total | {"slowest": max(part["slowest"] for part in found)}


def told(name: str, found: dict[str, float]) -> bool:
    """Prints the counts; whether nobody was hurt."""
    number = {key: int(value) for key, value in found.items() if key != "slowest"}
    print(
        f"{name}: {number['others']} answers to others, {number.get('others with an error', 0)} errors, "
        f"{number.get('others with a wrong row', 0)} wrong rows, slowest {found['slowest']:.2f} s; "
        f"{number.get('worst', 0)} worst items, {number.get('worst with a row', 0)} without an error of their own; "
        f"{number.get('strange', 0)} strange items, {number.get('strange without a row', 0)} without a row",
        flush=True,
    )
    hurt = (
        "others with an error",
        "others with a wrong row",
        "worst with a row",
        "strange without a row",
        "selftests failed",
    )
    return number.get("worst", 0) > 0 and not any(number.get(key, 0) for key in hurt)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--start", choices=["thread", "fork", "spawn"], action="append", help="default all")
    arguments = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for older in (False, True):
            path = with_a_strange_token(arguments.bundle, Path(folder) / f"older-{older}", older=older)
            words = "the engine finds them" if older else "ids are bounded"
            for how in arguments.start or ["thread", "fork", "spawn"]:
                limits = (path, arguments.callers, arguments.seconds)
                found = served(*limits) if how == "thread" else in_processes(how, *limits)
                good &= told(f"{arguments.callers} callers, {how}, {words}", found)
    sys.exit(0 if good else "somebody was hurt: " + json.dumps(found))


if __name__ == "__main__":
    main()
