"""Many callers at once: every answer checked against its own input, latency, memory, and a process that is killed.

    python tests/benchmarks/bench_callers.py dist/demo --seconds 60
    python tests/benchmarks/bench_callers.py dist/demo --part killed --seconds 60 --kills 5

First, asyncio callers and threads in this process. Then as many callers against a process of their own behind a socket,
that is killed with SIGKILL under load and started again: what was in flight at that moment is asked again, nothing else is
lost, and nothing is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from uwm_deploy.runtime.encoder import SafeEncoder

PICTURES = 256
TOLERANCE = 1e-4
"""Rows of other batch sizes differ in the last digits only."""


@dataclass
class Tally:
    """What the callers saw."""

    answers: int = 0
    wrong: int = 0
    asked_again: int = 0
    seconds: list[float] = field(default_factory=list)

    def check(self, found: np.ndarray, wanted: np.ndarray, taken: float) -> None:
        self.answers += 1
        self.wrong += not np.abs(found - wanted).max() < TOLERANCE
        self.seconds.append(taken)

    def told(self, name: str, seconds: float) -> str:
        p50, p95, p99 = (1000 * np.percentile(self.seconds, q) for q in (50, 95, 99))
        return (
            f"{name}: {self.answers} answers in {seconds:.0f} s ({self.answers / seconds:.0f} per s), wrong {self.wrong}, "
            f"p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms"
        )


def pictures() -> list[bytes]:
    """Different small JPEGs."""
    found = []
    for seed in range(PICTURES):
        colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(colours).resize((64 + seed % 9, 56), Image.Resampling.BICUBIC).save(stream, "JPEG")
        found.append(stream.getvalue())
    return found


def references(encoder: SafeEncoder, data: list[bytes]) -> np.ndarray:
    """One by one, so that no mix-up of rows within a batch can hide in them; and no two are alike."""
    rows = np.concatenate([encoder.encode_image(item) for item in data])
    distances = np.abs(rows[:, None] - rows[None]).max(axis=2) + np.eye(len(rows))
    assert distances.min() > 10 * TOLERANCE, "two pictures could be mistaken for each other unseen"
    return rows


def own_process(path: Path, callers: int, seconds: float) -> bool:
    """Half of the callers in an event loop, half in threads; memory is looked at from a third of the time on."""
    data, tally, process = pictures(), Tally(), psutil.Process()
    lock, resident = threading.Lock(), []
    with SafeEncoder.open(path) as encoder:
        wanted = references(encoder, data)
        started = time.monotonic()
        until = started + seconds

        def count(found: np.ndarray, item: int, before: float) -> None:
            with lock:
                tally.check(found, wanted[item], time.monotonic() - before)

        async def caller(seed: int) -> None:
            rng = np.random.default_rng(seed)
            while (before := time.monotonic()) < until:
                item = int(rng.integers(PICTURES))
                count((await encoder.aencode_image(data[item]))[0], item, before)

        def thread(seed: int) -> None:
            rng = np.random.default_rng(seed)
            while (before := time.monotonic()) < until:
                item = int(rng.integers(PICTURES))
                count(encoder.encode_image(data[item])[0], item, before)

        async def everybody() -> None:
            tasks = [asyncio.create_task(caller(seed)) for seed in range(callers // 2)]
            while time.monotonic() < until:
                await asyncio.sleep(seconds / 60)
                if time.monotonic() > started + seconds / 3:
                    resident.append(process.memory_info().rss)
            await asyncio.gather(*tasks)

        threads = [threading.Thread(target=thread, args=(1000 + seed,)) for seed in range(callers - callers // 2)]
        for one in threads:
            one.start()
        asyncio.run(everybody())
        for one in threads:
            one.join()
        took = time.monotonic() - started
        sums = {line.rsplit(" ", 1)[0]: line.rsplit(" ", 1)[1] for line in encoder.metrics().splitlines()}
    print(tally.told(f"{callers} callers", took))
    rows = float(sums['uwm_batch_rows_sum{tower="image"}']) / float(sums['uwm_batch_rows_count{tower="image"}'])
    half = len(resident) // 2
    early, late = np.median(resident[:half]) / 2**20, np.median(resident[half:]) / 2**20
    print(f"rows per call {rows:.1f}; resident memory {early:.1f} MiB, later {late:.1f} MiB ({late - early:+.1f})")
    return not tally.wrong and late - early < 0.02 * early + 4


async def serve(path: Path, socket: Path) -> None:
    """The other process: one JSON line with the number of bytes, the bytes; one JSON line back."""
    encoder = SafeEncoder.open(path)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            data = await reader.readexactly(json.loads(line))
            row = (await encoder.aencode_image(data))[0]
            writer.write(json.dumps([float(v) for v in row]).encode() + b"\n")
            await writer.drain()

    server = await asyncio.start_unix_server(talk, socket)
    async with server:
        await server.serve_forever()


async def listening(socket: Path) -> None:
    """Until the other process serves."""
    while not socket.exists():
        await asyncio.sleep(0.01)


async def killed(path: Path, callers: int, seconds: float, kills: int) -> bool:
    """Kills and restarts the other process under load; each request that was asked is answered in the end."""
    data, tally = pictures(), Tally()
    asked, flying, lost = 0, set[int](), list[int]()
    with SafeEncoder.open(path) as encoder:
        wanted = references(encoder, data)
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "s"
        command = [sys.executable, __file__, str(path), "--serve", str(socket)]
        child = await asyncio.create_subprocess_exec(*command)
        over, down = False, list[float]()
        await listening(socket)
        started = time.monotonic()

        async def caller(seed: int) -> None:
            nonlocal asked
            rng, streams = np.random.default_rng(seed), None
            while not over:
                item, before, done = int(rng.integers(PICTURES)), time.monotonic(), False
                asked += 1
                while not done:  # until it is answered, however often the process dies
                    try:
                        if streams is None:
                            streams = await asyncio.open_unix_connection(socket)
                        flying.add(seed)
                        streams[1].write(json.dumps(len(data[item])).encode() + b"\n" + data[item])
                        line = await streams[0].readline()
                        done = line.endswith(b"\n")
                        if not done:
                            raise ConnectionError("the process died")
                    except (ConnectionError, FileNotFoundError):
                        tally.asked_again += streams is not None
                        streams = None
                        flying.discard(seed)
                        await asyncio.sleep(0.05)
                flying.discard(seed)
                tally.check(np.array(json.loads(line)), wanted[item], time.monotonic() - before)

        tasks = [asyncio.create_task(caller(seed)) for seed in range(callers)]
        for _ in range(kills):
            await asyncio.sleep(seconds / (kills + 1))
            lost.append(len(flying))
            child.send_signal(signal.SIGKILL)
            await child.wait()
            fell = time.monotonic()
            socket.unlink(missing_ok=True)
            child = await asyncio.create_subprocess_exec(*command)
            await listening(socket)
            down.append(time.monotonic() - fell)
        await asyncio.sleep(seconds / (kills + 1))
        over = True
        await asyncio.gather(*tasks)
        child.terminate()
        await child.wait()
    print(tally.told(f"{callers} callers, killed {kills} times", time.monotonic() - started))
    print(
        f"{asked} requests, {asked - tally.answers} without an answer; in flight when it was killed {sum(lost)}, "
        f"asked again {tally.asked_again}; serving again after {max(down):.2f} s at most"
    )
    return not tally.wrong and asked == tally.answers and 0 < tally.asked_again <= sum(lost)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--part", choices=["all", "callers", "killed"], default="all")
    parser.add_argument("--kills", type=int, default=3, help="times the process is killed and started again")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.bundle, arguments.serve))
        return
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[2]))
    good = True
    if arguments.part != "killed":
        good &= own_process(arguments.bundle, arguments.callers, arguments.seconds)
    if arguments.part != "callers":
        good &= asyncio.run(killed(arguments.bundle, arguments.callers, max(4.0, arguments.seconds), arguments.kills))
    sys.exit(0 if good else "wrong answers, growing memory, or more lost than was in flight")


if __name__ == "__main__":
    main()
