"""A million stored embeddings taken over to a bundle, beside embedding the million images again: CLIP ViT-B/32 at full size.

    python tests/benchmarks/bench_migrate.py --work .uwm/bench-migrate

The bundle has random weights and the map of a safety axis that was fitted on a few pictures of the demo world: the time of
neither side depends on the values. Rows are random ones of length 1, written a piece at a time. Each side runs in a process
of its own, so that its peak memory is its own. Embedding is measured on some hundred JPEGs of 640 x 480 and counted up;
migrating is measured as a whole, to the last byte on the disk. A copy of the file is what reading and writing take at least.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.pop("OMP_NUM_THREADS", None)  # every library its own number of threads

import numpy as np

ROOT = Path(__file__).parents[2]
DIM, PART = 512, 8192
VARIANT = "onnxruntime-fp32"
BEFORE = "space:sha256:before"


def built(work: Path) -> Path:
    """A bundle with a map behind the embeddings, from a few pictures of the demo world."""
    from uwm_deploy.pipeline.request import Request
    from uwm_deploy.pipeline.run import run
    from uwm_deploy.records.strength import AxisSetting
    from uwm_deploy.report.console import Reporter

    work.mkdir(parents=True, exist_ok=True)
    for name, split in (("cal", "calibration"), ("eval", "test")):
        (work / f"{name}.toml").write_text(
            f'format = 1\nname = "{name}"\nsource = "demo"\nsplit = "{split}"\nlimit = 16\n'
        )
    request = Request(
        model="clip-vit-b32", weights="random", targets=("onnxruntime",), precisions=("fp32",),
        method="safety-axis", placement="embedding", axis=AxisSetting(g=0.7, o=0.5, kappa=0.4, a=1.0, tau=0.0),
        calibration=str(work / "cal.toml"), evaluation=str(work / "eval.toml"), out=work / "bundle", work=work / "run",
    )  # fmt: skip
    run(request, until="package", reporter=Reporter())
    return work / "bundle"


def some_rows(count: int, seed: int) -> np.ndarray:
    """(n, 512) of length 1."""
    rows = np.random.default_rng(seed).standard_normal((count, DIM), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_npy(path: Path, count: int) -> Path:
    """One file."""
    with path.open("wb") as stream:
        head = {"descr": "<f4", "fortran_order": False, "shape": (count, DIM)}
        np.lib.format.write_array_header_1_0(stream, head)
        for start in range(0, count, PART):
            stream.write(some_rows(min(PART, count - start), start).data)
    return path


def write_parts(folder: Path, count: int) -> Path:
    """Parts as `embed` writes them."""
    from uwm_deploy.serve.embed.parts import PartWriter

    for start in range(0, count, PART):
        n = min(PART, count - start)
        same = {"error": [""] * n, "bundle": ["b"] * n, "variant": [VARIANT] * n, "space": [BEFORE] * n}
        keys = [f"{number:09d}" for number in range(start, start + n)]
        PartWriter(folder)({"key": keys, "embedding": some_rows(n, start), **same})
    return folder


def migrated(bundle: Path, stored: Path, out: Path) -> dict[str, float]:
    """Seconds, rows and peak memory of one run."""
    from safetensors.numpy import load_file

    from uwm_deploy.bundle.open import open_bundle
    from uwm_deploy.records.model import TowerName
    from uwm_deploy.runtime.embedding_map import maps_of_bundle
    from uwm_deploy.safeground.embedded import EmbeddedSet
    from uwm_deploy.serve.embed.known import evidence_of
    from uwm_deploy.serve.embed.migrate import Migration, migrate, open_stored
    from uwm_deploy.serve.embed.stored import Label

    opened = open_bundle(bundle, allow_failed=True)  # random weights pass no gate, so it is put together by hand
    edited = EmbeddedSet.from_tensors(load_file(bundle / "evidence" / "reference.safetensors"), "edited")
    label = Label(
        tower=TowerName.IMAGE, space=opened.manifest.spaces[VARIANT], migrated_from=BEFORE, bundle="b", variant=VARIANT
    )
    map, evidence = maps_of_bundle(opened)[TowerName.IMAGE], evidence_of(edited, None, TowerName.IMAGE)
    before = peak_mib()
    started = time.perf_counter()
    report = migrate(open_stored(stored), out, Migration(map=map, label=label, evidence=evidence))
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "rows": report.rows, "before_mib": before}


def embedded(bundle: Path, images: int) -> dict[str, float]:
    """Seconds of some images, decoding and preprocessing included, after a first batch."""
    from tests.benchmarks.bench_runtime import photographs
    from uwm_deploy.runtime.cores import cores
    from uwm_deploy.runtime.encoder import SafeEncoder
    from uwm_deploy.runtime.service import Serving

    warnings.simplefilter("ignore", UserWarning)  # random weights: nothing here is proven
    data = photographs(min(images, 64))
    data = [data[n % len(data)] for n in range(images)]
    with SafeEncoder.open(
        bundle, variant=VARIANT, device="cpu", allow_unsafe=True, serving=Serving(calls=cores())
    ) as encoder:
        encoder.encode_image(data[:32])
        started = time.perf_counter()
        encoder.encode_image(data)
        return {"seconds": time.perf_counter() - started, "rows": images}


def copied(stored: Path, out: Path) -> dict[str, float]:
    """The same bytes, unchanged, made durable like the others."""
    started = time.perf_counter()
    with stored.open("rb") as source, out.open("wb") as target:
        while data := source.read(16 << 20):
            target.write(data)
        target.flush()
        os.fsync(target.fileno())
    return {"seconds": time.perf_counter() - started, "rows": 0}


SIDES: dict[str, Callable[..., dict[str, float]]] = {"migrate": migrated, "embed": embedded, "copy": copied}


def peak_mib() -> float:
    """Of this process; the kernel's other figure for it begins with that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def alone(side: str, *words: object) -> dict[str, float]:
    """One side in a process of its own, with its peak memory."""
    command = [sys.executable, __file__, "--side", side, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def side_alone(side: str, words: list[str]) -> None:
    """What a process of `alone` does."""
    values = [int(word) if word.isdecimal() else Path(word) for word in words]
    found = SIDES[side](*values)
    print(json.dumps(found | {"peak_mib": peak_mib()}))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path(".uwm/bench-migrate"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        side_alone(given.side, given.words)
        return
    bundle = built(given.work)
    again = alone("embed", bundle, given.images)
    an_image = again["seconds"] / given.images
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, {given.rows} rows of {DIM} numbers")
    print(
        f"embedding again: {1000 * an_image:.2f} ms an image ({given.images} images), so "
        f"{an_image * given.rows / 3600:.1f} hours; peak memory {again['peak_mib']:.0f} MiB"
    )
    for kind, write, out in (("npy", write_npy, "new.npy"), ("parts", write_parts, "new")):
        stored = write(given.work / f"old{'.npy' if kind == 'npy' else ''}", given.rows)
        found = alone("migrate", bundle, stored, given.work / out)
        ratio = an_image * given.rows / found["seconds"]
        print(
            f"migrating {kind}: {found['seconds']:.1f} s, {found['rows'] / found['seconds']:.0f} rows a second, {ratio:.0f} "
            f"times as fast; peak memory {found['peak_mib']:.0f} MiB ({found['before_mib']:.0f} before the first row)"
        )
    least = alone("copy", given.work / "old.npy", given.work / "copy.npy")
    print(f"a copy of the .npy file: {least['seconds']:.1f} s")


if __name__ == "__main__":
    main()
