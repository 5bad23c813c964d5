"""From starting a process to the first embedding: the runtime beside torch + transformers, time and peak memory.

    python tests/benchmarks/bench_cold_start.py dist/demo --checkpoint .uwm/demo/edit/model

Both sides read a picture from a file and print the embedding; they take turns, and both embeddings are compared. The bundle
is opened as a service opens it: every digest checked, both towers, canaries run. The checkpoint is the edited model that the
build left in its run folder, opened as the documentation of transformers says.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
AT_LEAST_FASTER, AT_MOST_MEMORY = 10.0, 0.12

OURS = """
import sys
from uwm_deploy.runtime import SafeEncoder
row = SafeEncoder.open(sys.argv[1]).encode_image(sys.argv[2])[0]
"""
THEIRS = """
import sys
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor
model, processor = CLIPModel.from_pretrained(sys.argv[1]).eval(), CLIPProcessor.from_pretrained(sys.argv[1])
with torch.inference_mode():
    inputs = processor(images=Image.open(sys.argv[2]), return_tensors="pt")
    row = torch.nn.functional.normalize(model.get_image_features(**inputs).pooler_output, dim=-1)[0].numpy()
"""
TOLD = """
import json, resource
print(json.dumps({"row": [float(v) for v in row], "kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}), flush=True)
import os
os._exit(0)
"""


def start(code: str, folder: Path, picture: Path) -> tuple[float, float, list[float]]:
    """Seconds to the embedding, peak MiB, and the embedding."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + TOLD, str(folder), str(picture)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    seconds, told = time.perf_counter() - started, json.loads(done.stdout)
    return seconds, told["kb"] / 1024, told["row"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the edited model as transformers reads it")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "a.png"
        colours = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((64, 48), Image.Resampling.BICUBIC).save(picture)
        sides = {"torch + transformers": (THEIRS, arguments.checkpoint), "uwm-deploy runtime": (OURS, arguments.bundle)}
        for code, path in sides.values():  # the files are in the cache for both
            start(code, path, picture)
        found = {name: [] for name in sides}
        for _ in range(arguments.rounds):
            for name, (code, path) in sides.items():
                found[name].append(start(code, path, picture))
    theirs, ours = found.values()
    cosine = float(np.dot(theirs[0][2], ours[0][2]))
    print(f"{'':24}{'median s':>10}{'best s':>10}{'peak MiB':>10}")
    for name, rounds in found.items():
        seconds = [r[0] for r in rounds]
        print(f"{name:24}{statistics.median(seconds):10.2f}{min(seconds):10.2f}{max(r[1] for r in rounds):10.0f}")
    # Turn by turn, so that what else the machine does weighs on both sides alike.
    faster = statistics.median(a[0] / b[0] for a, b in zip(theirs, ours, strict=True))
    memory = max(r[1] for r in ours) / max(r[1] for r in theirs)
    print(f"faster: {faster:.1f} times (aim {AT_LEAST_FASTER:g}), memory: {memory:.2f} (aim {AT_MOST_MEMORY:g})")
    print(f"cosine of the two embeddings: {cosine:.6f}")
    if cosine < 0.999:
        sys.exit("the two sides do not compute the same")


if __name__ == "__main__":
    main()
