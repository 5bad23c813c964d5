"""A command on a busy machine: alone and beside programs that hold every core, with and without threads that spin.

    python tests/benchmarks/bench_neighbours.py --neighbours 2 -- build --model demo --target onnxruntime

The neighbours are started and ended here. The variants take turns, so that a machine that becomes slower is so for all of
them; printed are the medians and their ratios. `spinning` is PyTorch's own number of threads, which wait as OpenMP's do by
default. In `threads` they wait as commands make them. `now` is what the command does by itself, which is one thread for a
small model, and `passive` is that with `OMP_WAIT_POLICY=PASSIVE`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

SPIN = "while True: pass"
OURS = "from uwm_deploy.cli import main; import sys; main(sys.argv[1:])"
# The command's own choice is left out; nothing else is changed.
DEFAULT = "import uwm_deploy.cli as c, sys; c.fit_to_machine = lambda: None; c.main(sys.argv[1:])"
VARIANTS = {
    "spinning": (DEFAULT, {"OMP_NUM_THREADS": str(os.cpu_count())}),
    "threads": (OURS, {"OMP_NUM_THREADS": str(os.cpu_count())}),
    "now": (OURS, {}),
    "passive": (OURS, {"OMP_WAIT_POLICY": "PASSIVE"}),
}


def seconds(variant: str, words: list[str], neighbours: int) -> float:
    """Wall time of the command in an empty folder."""
    code, more = VARIANTS[variant]
    busy = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(neighbours)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-c", code, *words],
                cwd=folder,
                env=os.environ | more,
                check=False,
                capture_output=True,
            )
            if done.returncode not in (0, 3, 4):
                raise SystemExit(done.stderr.decode())
            return time.monotonic() - start
    finally:
        for process in busy:
            process.kill()


def main() -> None:
    """Prints one line per variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--neighbours", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("words", nargs="+", help="the command, after --")
    given = parser.parse_args()
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(given.rounds):
        for count in (0, given.neighbours):
            for variant in given.variants:
                found.setdefault((variant, count), []).append(seconds(variant, given.words, count))
                print(f"  {variant}, {count} neighbours: {found[variant, count][-1]:.1f} s", file=sys.stderr)
    base = statistics.median(found[given.variants[0], 0])
    for variant in given.variants:
        alone, beside = (statistics.median(found[variant, count]) for count in (0, given.neighbours))
        print(
            f"{variant}: alone {alone:.1f} s ({alone / base:.2f}), beside {beside:.1f} s ({beside / alone:.2f} of alone)"
        )


if __name__ == "__main__":
    main()
