"""A whole model at full size with random weights: score, edit, export, compile, and parity in ONNX Runtime.

    python tests/benchmarks/bench_families.py clip-vit-l14 siglip-so400m coca-vit-l14

Each stage runs in a process of its own and prints its wall time and the peak of its resident memory; the last column
compares the peak with the weights of the whole model. Pairs are scenes of the drawn world.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DATA = """format = 1
name = "bench-{split}"
source = "demo"
split = "{split}"
limit = {limit}
"""
CHILD = """
import sys
from pathlib import Path
from uwm_deploy.report.console import Reporter
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
until, model, work = sys.argv[1:4]
request = Request(model=model, weights="random", work=Path(work), device="cpu", workers=1, targets=("onnxruntime",),
                  calibration=work + "/calibration.toml", evaluation=work + "/validation.toml")
outcome = run(request, until=until, reporter=Reporter(quiet=True))
if outcome.report:
    for artifact in outcome.report.artifacts:
        print(artifact.variant, "largest difference", max(p.max_abs for p in artifact.parity), "smallest cosine",
              min(p.cosine_min for p in artifact.parity),
              "flips", sum(f.lost + f.gained for name, f in artifact.flips.items() if name.startswith("P_")))
"""
STAGES = ("score", "edit", "export", "compile", "verify")


def timed(arguments: list[str]) -> tuple[float, int, str]:
    """Seconds, peak resident bytes and output of a child process.

    Raises:
        RuntimeError: If it fails; with its last lines.
    """
    started = time.perf_counter()
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"ended with {child.returncode}: {output.strip()[-600:]}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024, output.strip()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", help="recipes")
    parser.add_argument("--pairs", type=int, default=4)
    arguments = parser.parse_args()
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as work:
            for split in ("calibration", "validation"):
                (Path(work) / f"{split}.toml").write_text(DATA.format(split=split, limit=arguments.pairs))
            print(f"{model}, random weights, {arguments.pairs} pairs", flush=True)
            for stage in STAGES:
                seconds, peak, output = timed([sys.executable, "-c", CHILD, stage, model, work])
                weights = sum(f.stat().st_size for f in Path(work).glob("edit/model/*.safetensors"))
                ratio = f"{peak / weights:.2f} x weights" if weights else ""
                print(f"  {stage:<8} {seconds:7.1f} s  peak {peak / 2**20:7.0f} MiB  {ratio}", flush=True)
            print("  " + output.replace("\n", "\n  "), flush=True)


if __name__ == "__main__":
    main()
