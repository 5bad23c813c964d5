"""Peers in one table: everything that embeds with CLIP on a CPU, with the same weights and photographs, in one run.

    python tests/benchmarks/bench_peers.py --work .uwm/bench-peers                              # ViT-B/32
    python tests/benchmarks/bench_peers.py --work .uwm/bench-peers --model clip-vit-l14 --batch 1 --batch 8 --rounds 2

Weights are random, at full size. The first run makes what is measured (a bundle, the exports of others), `--prepare` makes
it and stops. Peers take turns; a time is the fastest of the rounds, a ratio the median of the ratios within a round. The
embeddings of every call are compared with those of transformers. Memory (PSS after a photograph and a text) and the time
to both embeddings are of a process of its own per peer, with both towers.

What is not installed is said to be not run. optimum-onnx wants an older transformers: give the Python of an environment
that has it with `--optimum`. With `--cpu-time` one thread is used, and time is what the processor spent on the call: on a
busy machine wall time tells nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if "--cpu-time" in sys.argv:  # read when libraries are loaded
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
else:
    os.environ.pop("OMP_NUM_THREADS", None)  # every library its own number of threads
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}

import numpy as np
from peers import EAGER, KEPT, LENGTH, PEERS, Files, NotRunError, Side, Tower, opened, prepared

TOWERS: tuple[Tower, ...] = ("image", "text")
WORDS = ["a", "photograph", "of", "some", "people", "who", "walk", "along", "the", "beach", "in", "the", "evening"]
VARIANTS = {"onnxruntime": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8")}


def texts(count: int) -> list[str]:
    """Captions of usual length, all different."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.permutation(WORDS)[: rng.integers(8, len(WORDS))]) + f" {n}" for n in range(count)]


def build(files: Files, model: str) -> None:
    """The bundle of all variants and the edited checkpoint; INT8 is rounded to the nearest at the larger size."""
    from bench_runtime import photographs

    from uwm_deploy.pipeline.request import Request
    from uwm_deploy.pipeline.run import run
    from uwm_deploy.recipes.shipped import read_toml
    from uwm_deploy.report.console import Reporter

    files.work.mkdir(parents=True, exist_ok=True)
    name = model
    if model != "clip-vit-b32":
        name = str(files.work / f"{model}.toml")  # a recipe goes by its own name
        Path(name).write_text(read_toml("export", model)[0] + 'quantiser = "nearest"\n')
    for data, split in (("cal", "calibration"), ("eval", "test")):
        (files.work / f"{data}.toml").write_text(
            f'format = 1\nname = "{data}"\nsource = "demo"\nsplit = "{split}"\nlimit = 16\n'
        )
    request = Request(
        model=name, weights="random", targets=tuple(VARIANTS), precisions=("fp32", "bf16", "int8"),
        calibration=str(files.work / "cal.toml"), evaluation=str(files.work / "eval.toml"), out=files.bundle,
        work=files.work / "run",
    )  # fmt: skip
    run(request, until="package", reporter=Reporter())
    for number, photograph in enumerate(photographs(32)):
        (files.work / f"{number:02}.jpg").write_bytes(photograph)


def items_of(files: Files, tower: Tower, count: int) -> list[Any]:
    """Encoded photographs, or texts."""
    if tower == "text":
        return list(texts(count))
    return [path.read_bytes() for path in sorted(files.work.glob("*.jpg"))[:count]]


def sides_of(files: Files, tower: Tower, names: Sequence[str]) -> dict[str, Side]:
    """Peers that can be run; the reason of each that cannot is printed."""
    sides = {}
    for name in names:
        try:
            sides[name] = opened(name, files, tower, items_of(files, tower, 1)[0])
        except NotRunError as error:
            print(f"{tower}: {name}: not run: {error}", flush=True)
    return sides


def turns(
    calls: Mapping[str, Callable[[], np.ndarray]], rounds: int, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each call in each round, and the smallest cosine to the first call's rows over all rounds."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    cosines = dict.fromkeys(calls, 1.0)
    for number in range(rounds + 1):
        wanted = None
        for name, call in calls.items():
            time.sleep(0.02)  # threads of the side before spin for a while
            started = clock()
            rows = call()
            seconds = clock() - started
            if number:  # the first round warms up
                taken[name].append(seconds)
            wanted = rows if wanted is None else wanted
            cosines[name] = min(cosines[name], float((np.asarray(rows, np.float32) * wanted).sum(axis=1).min()))
    return taken, cosines


def measure(files: Files, tower: Tower, options: argparse.Namespace) -> None:
    """Prints the table of one tower."""
    from uwm_deploy.records.codec import record_from_json
    from uwm_deploy.records.graph import OnnxArtifact
    from uwm_deploy.runtime.pixels import crops_from_pixels

    sides = sides_of(files, tower, options.peers)
    items = items_of(files, tower, max(options.batch))
    inputs = prepared(files, tower)(items)
    graph = record_from_json(OnnxArtifact, (files.work / "run/export" / f"{tower}.json").read_bytes(), where=tower)
    by = graph.inputs[0].normalisation
    crops = crops_from_pixels(inputs, by) if by is not None else inputs
    clock = time.process_time if options.cpu_time else time.perf_counter
    columns: dict[str, dict[str, tuple[float, float]]] = {}
    smallest = dict.fromkeys(sides, 1.0)
    for batch in options.batch:
        ways: dict[str, dict[str, Callable[[], np.ndarray]]] = {"graph": {}, "whole": {}}
        for name, side in sides.items():
            if side.rows is not None:
                ways["graph"][name] = partial(side.rows, (crops if side.crops else inputs)[:batch])
            ways["whole"][name] = partial(side.whole, items[:batch])
        for way, calls in ways.items():
            taken, cosines = turns(calls, options.rounds, clock)
            columns[f"{way} {batch}"] = {
                name: (
                    1000 * min(seconds) / batch,
                    statistics.median(a / b for a, b in zip(taken[EAGER], seconds, strict=True)),
                )
                for name, seconds in taken.items()
            }
            smallest |= {name: min(smallest[name], value) for name, value in cosines.items()}
    show(files, tower, columns, smallest)


def show(
    files: Files, tower: Tower, columns: Mapping[str, Mapping[str, tuple[float, float]]], cosines: Mapping[str, float]
) -> None:
    """Milliseconds an item, and in brackets how many times as fast as transformers eager."""
    from uwm_deploy.report.markdown_table import markdown_table

    whole = "from JPEG bytes" if tower == "image" else "from texts"
    rows = []
    for name, cosine in cosines.items():
        cells = {}
        for column, found in columns.items():
            way, batch = column.split()
            label = f"{'graph' if way == 'graph' else whole}, {batch}"
            cells[label] = f"{found[name][0]:.1f} ({found[name][1]:.2f})" if name in found else "-"
        rows.append({f"{files.work.name}, {tower}": name, **cells, "cosine": f"{cosine:.4f}"})
    print("\n" + markdown_table(rows) + "\n", flush=True)


def one(files: Files, name: str) -> None:
    """In a process of its own: both towers, one photograph, one text, then memory; what was opened stays alive."""
    opening: tuple[Tower, ...] = TOWERS[:1] if name == "faster-clip" else TOWERS
    sides = {tower: opened(name, files, tower, items_of(files, tower, 1)[0]) for tower in opening}
    assert sides
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    pss = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    print(json.dumps({"mib": pss / 1024}), flush=True)
    os._exit(0)


def cold(files: Files, options: argparse.Namespace) -> None:
    """Prints time to the first embeddings and memory, of a process each, in turns."""
    from uwm_deploy.report.markdown_table import markdown_table

    found: dict[str, list[tuple[float, float]]] = {}
    command = [sys.executable, __file__, *sys.argv[1:], "--one"]
    for _ in range(options.cold_rounds):
        for name in options.peers:
            started = time.perf_counter()
            done = subprocess.run([*command, name], capture_output=True, text=True, check=False)
            if done.returncode:
                continue  # the tables above say why
            mib = json.loads(done.stdout.strip().splitlines()[-1])["mib"]
            found.setdefault(name, []).append((time.perf_counter() - started, mib))
    base = found[EAGER]
    rows = []
    for name, runs in found.items():
        seconds, mib = min(run[0] for run in runs), min(run[1] for run in runs)
        faster = statistics.median(a[0] / b[0] for a, b in zip(base, runs, strict=True))
        share = mib / min(run[1] for run in base)
        rows.append(
            {"one process": name, "s to both": f"{seconds:.1f} ({faster:.2f})", "MiB": f"{mib:.0f} ({share:.2f})"}
        )
    print("\n" + markdown_table(rows), flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="clip-vit-b32", choices=["clip-vit-b32", "clip-vit-l14"])
    parser.add_argument("--batch", type=int, action="append", help="default 1, 8 and 32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold-rounds", type=int, default=2, help="0 leaves out memory and cold start")
    parser.add_argument("--cold-only", action="store_true", help="memory and cold start alone")
    parser.add_argument("--peer", action="append", dest="peers", choices=list(PEERS), help="default all")
    parser.add_argument("--tower", action="append", dest="towers", choices=TOWERS, help="default both")
    parser.add_argument("--optimum", default=sys.executable, help="a Python that has optimum-onnx")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--prepare", action="store_true", help="make what is measured, and stop")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    files = Files(options.work / options.model, options.optimum)
    if options.one:
        one(files, options.one)
    if not files.bundle.is_dir() or not (files.work / "31.jpg").is_file():
        build(files, options.model)
    options.batch = options.batch or [1, 8, 32]
    options.peers = list(dict.fromkeys([EAGER, *(options.peers or PEERS)]))
    if options.prepare:
        for tower in TOWERS:
            sides_of(files, tower, [name for name in options.peers if not name.startswith("bundle")])
        return
    print(
        f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, texts padded to {LENGTH} for the graphs"
    )
    for tower in () if options.cold_only else options.towers or TOWERS:
        measure(files, tower, options)
        KEPT.clear()  # of a large model there is no room for all
    if options.cold_rounds:
        cold(files, options)


if __name__ == "__main__":
    main()
