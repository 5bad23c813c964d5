"""Worker processes of one bundle, with weights of their own and with shared ones: memory together, and time to open.

    python tests/benchmarks/bench_workers.py dist/l14 --workers 4

Memory is proportional (PSS, of /proc/PID/smaps_rollup): a page that several processes map counts for each of them in part.
Every worker opens the bundle as a service does, every digest checked and canaries run, and embeds a batch of images and one
of texts before it is measured. All rows are compared, bit for bit. The cache begins empty: the first shared worker fills it.
Without --own-together the workers with weights of their own are one, since several of a large bundle take all memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
AT_MOST_TOGETHER, AT_MOST_SECOND = 1.5, 1 / 3

WORKER = """
import hashlib, json, sys, time, warnings
warnings.simplefilter("ignore")  # a bundle of random weights is not proven
started = time.perf_counter()
import numpy as np
from uwm_deploy.runtime import SafeEncoder
from uwm_deploy.runtime.service import Serving
serving = Serving(weights=sys.argv[2], threads=int(sys.argv[5]))
variant = sys.argv[3] or None
encoder = SafeEncoder.open(sys.argv[1], device="cpu", variant=variant, allow_unsafe=True, serving=serving)
opened = time.perf_counter() - started
images = np.random.default_rng(0).integers(0, 256, (int(sys.argv[4]), 240, 320, 3), dtype=np.uint8)
rows = [encoder.encode_image(images), encoder.encode_text([f"{n} stars on a wall" for n in range(len(images))])]
digest = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in rows)).hexdigest()
finite = bool(all(np.isfinite(part).all() for part in rows))
print(json.dumps({"opened": opened, "rows": digest, "finite": finite}), flush=True)
sys.stdin.readline()
"""


@dataclass(frozen=True, slots=True)
class Worker:
    """A process that holds an open bundle.

    Attributes:
        seconds: From the start of the process until the bundle was open.
        rows: Digest of its embeddings.
    """

    process: subprocess.Popen[str]
    seconds: float
    rows: str

    @property
    def pss_mib(self) -> float:
        lines = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024

    def stop(self) -> None:
        self.process.communicate("\n")


def start(bundle: Path, weights: str, cache: str, options: argparse.Namespace) -> Worker:
    words = [str(bundle), weights, options.variant, str(options.batch), str(options.threads)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "UWM_DEPLOY_CACHE": cache}
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit(f"a worker with {weights} weights failed")
    told = json.loads(line)
    if not told["finite"]:
        sys.exit("an embedding is not finite")
    return Worker(process, told["opened"], told["rows"])


def together(
    bundle: Path, weights: str, cache: str, options: argparse.Namespace, count: int
) -> tuple[list[Worker], float]:
    """Workers that are all alive, and the memory of the first one while it was alone."""
    workers = [start(bundle, weights, cache, options)]
    alone = workers[0].pss_mib
    workers += [start(bundle, weights, cache, options) for _ in range(count - 1)]
    return workers, alone


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--variant", default="")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime, per worker")
    parser.add_argument("--own-together", action="store_true", help="as many workers with weights of their own")
    parser.add_argument("--cache", type=Path, help="where the temporary cache lies")
    options = parser.parse_args()
    size = sum(path.stat().st_size for path in (options.bundle / "engines").rglob("*") if path.is_file())
    print(f"{size / 2**20:.0f} MiB of engines, {options.workers} workers, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(dir=options.cache) as cache:
        count = options.workers if options.own_together else 1
        own, own_alone = together(options.bundle, "own", cache, options, count)
        own_all = sum(worker.pss_mib for worker in own)
        for worker in own:
            worker.stop()
        began = time.perf_counter()
        first = start(options.bundle, "shared", cache, options)
        first.stop()
        print(f"the cache was filled and used after {time.perf_counter() - began:.1f} s")
        shared, alone = together(options.bundle, "shared", cache, options, options.workers)
        all_together = sum(worker.pss_mib for worker in shared)
        for worker in shared:
            worker.stop()
        kept = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
    if len({worker.rows for worker in (*own, first, *shared)}) != 1:
        sys.exit("workers do not give the same embeddings")
    print(f"own:    one {own_alone:.0f} MiB, {len(own)} together {own_all:.0f} MiB, open after {own[0].seconds:.1f} s")
    print(f"shared: one {alone:.0f} MiB, {len(shared)} together {all_together:.0f} MiB, {kept / 2**20:.0f} MiB on disk")
    print(
        f"        open after {first.seconds:.1f} s (first), {', '.join(f'{w.seconds:.1f}' for w in shared)} s (later)"
    )
    print(f"{len(shared)} together / one: {all_together / alone:.2f} (aim at most {AT_MOST_TOGETHER})")
    ratio = shared[0].seconds / first.seconds
    print(f"second / first: {ratio:.2f} (aim at most {AT_MOST_SECOND:.2f})")
    print(f"second / own: {shared[0].seconds / own[0].seconds:.2f}")
    print(f"{len(shared)} shared together / one with its own: {all_together / own_alone:.2f}")


if __name__ == "__main__":
    main()
