"""Worker that embeds jobs from a stream: JSON lines in, JSON lines out, in the order in which they are done.

    producer | python asyncio_worker.py dist/demo > rows.jsonl

A job is {"id": ..., "text": ...} or {"id": ..., "image": PATH}; an answer is {"id": ..., "embedding": [...]} or
{"id": ..., "error": ...}. Many jobs are on their way at a time and share batches, never more than the limit, so that a fast
producer cannot fill the memory. A broken job is an answer with an error; it stops nobody else. SIGTERM and SIGINT end the
reading, and what was read is answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

from uwm_deploy.errors import DataError
from uwm_deploy.runtime.encoder import SafeEncoder

LINE_BYTES = 1 << 20


async def answer(encoder: SafeEncoder, line: bytes) -> dict[str, Any]:
    """The answer to one job, whatever it is."""
    job: Any = None
    try:
        job = json.loads(line)
        given = {key: job[key] for key in ("text", "image") if key in job}
        if len(given) != 1:
            raise ValueError("a job has either a text or an image")
        encode = encoder.aencode_text if "text" in given else encoder.aencode_image
        rows = await encode(*given.values())
        return {"id": job.get("id"), "embedding": rows[0].tolist()}
    except (DataError, ValueError, TypeError, OSError) as error:
        return {"id": job.get("id") if isinstance(job, dict) else None, "error": str(error)}


async def work(encoder: SafeEncoder, limit: int) -> None:
    """Until the stream ends or a signal asks to stop."""
    loop, stop, places = asyncio.get_running_loop(), asyncio.Event(), asyncio.Semaphore(limit)
    for one in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(one, stop.set)
    reader = asyncio.StreamReader(limit=LINE_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    stopped = asyncio.create_task(stop.wait())

    async def run(line: bytes) -> None:
        try:
            print(json.dumps(await answer(encoder, line)), flush=True)
        finally:
            places.release()

    async with asyncio.TaskGroup() as jobs:
        while not stop.is_set():
            await places.acquire()
            reading = asyncio.create_task(reader.readline())
            await asyncio.wait({reading, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done() or not (line := reading.result()):
                reading.cancel()
                break
            jobs.create_task(run(line))
    stopped.cancel()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--public-key", type=Path)
    parser.add_argument("--limit", type=int, default=256, help="jobs on their way at a time")
    given = parser.parse_args()
    with SafeEncoder.open(given.bundle, public_key=given.public_key) as encoder:
        asyncio.run(work(encoder, given.limit))


if __name__ == "__main__":
    main()
