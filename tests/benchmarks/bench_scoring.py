"""Cost of scoring: wall time and memory against the bare forward pass over the same data, from one run.

    python tests/benchmarks/bench_scoring.py --size vit-l14 --pairs 64

Both sides run in turn, batch by batch, so that a noisy machine disturbs both. Weights are random (jittered), inputs are
noise and captions of mixed length. Prints the ratio scored / bare, the memory that scoring adds beside the scores
themselves, and text scoring with length-sorted batches against padding everything to 77.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import CLIPConfig

from uwm_deploy.edits.saliency import STD_EPS, LayerScorer
from uwm_deploy.recipes.edit_spec import EditSpec
from uwm_deploy.records.edit import Rule
from uwm_deploy.records.model import TextSpec, TowerName
from uwm_deploy.stages.score.score import scoring
from uwm_deploy.towers.hf_clip import random_clip, towers_of
from uwm_deploy.towers.protocol import ModuleTower

EOS = 49407
SIZES = {
    "vit-l14": ((1024, 4096, 24, 16, 14), (768, 3072, 12, 12), 768),
    "vit-b32": ((768, 3072, 12, 12, 32), (512, 2048, 12, 8), 512),
}
EDITS = {
    TowerName.IMAGE: EditSpec(rule=Rule.RATIO, layers=("*.mlp.fc2",), keep_mass=0.98),
    TowerName.TEXT: EditSpec(rule=Rule.RATIO_TIMES_ABS_WEIGHT, layers=("*.self_attn.out_proj",), keep_mass=0.98),
}


def config_of(size: str) -> CLIPConfig:
    """Architecture of the published sizes."""
    (vw, vm, vl, vh, patch), (tw, tm, tl, th), dim = SIZES[size]
    vision = {
        "hidden_size": vw,
        "intermediate_size": vm,
        "num_hidden_layers": vl,
        "num_attention_heads": vh,
        "image_size": 224,
        "patch_size": patch,
    }
    text = {
        "hidden_size": tw,
        "intermediate_size": tm,
        "num_hidden_layers": tl,
        "num_attention_heads": th,
        "eos_token_id": EOS,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim)


def captions(pairs: int, rng: np.random.Generator) -> np.ndarray:
    """(pairs, 77) ids; lengths as of short web captions, 6 to 40 tokens."""
    rows = np.full((pairs, 77), EOS, dtype=np.int64)
    for row, length in zip(rows, rng.integers(6, 41, pairs), strict=True):
        row[: length - 1] = rng.integers(1, 49000, length - 1)
    return rows


def batches(name: TowerName, pairs: int, size: int, trim: bool) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Safe halves then unsafe halves; captions sorted by length and trimmed when asked."""
    rng = np.random.default_rng(0)
    if name is TowerName.TEXT:
        safe, unsafe = captions(pairs, rng), captions(pairs, rng)
        lengths = np.maximum((safe == EOS).argmax(1), (unsafe == EOS).argmax(1)) + 1
        order = np.argsort(lengths) if trim else np.arange(pairs)
    for start in range(0, pairs, size):
        count = min(size, pairs - start)
        ids = tuple(str(i) for i in range(start, start + count))
        if name is TowerName.IMAGE:
            yield ids, torch.from_numpy(rng.normal(size=(2 * count, 3, 224, 224)).astype(np.float32))
        else:
            rows = order[start : start + count]
            width = int(lengths[rows].max()) if trim else 77
            yield ids, torch.from_numpy(np.concatenate([safe[rows, :width], unsafe[rows, :width]]))


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@torch.inference_mode()
def compare(tower: ModuleTower, pairs: int, size: int, trim: bool) -> None:
    """Bare and scored forward in turn."""
    edit, process = EDITS[tower.name], psutil.Process()
    scorers = {
        layer: LayerScorer(module.weight, edit.rule, edit.pairing, STD_EPS[tower.name], lambda ids: None)
        for layer, module in tower.layers(edit.layers).items()
    }
    bare, scored, peak_bare, peak_scored = [], [], 0, 0
    for ids, inputs in batches(tower.name, pairs, size, trim):
        if not bare:
            tower.embed(inputs)  # warm up
        bare.append(timed(lambda x=inputs: tower.embed(x)))
        peak_bare = max(peak_bare, process.memory_info().rss)
        with scoring(tower, scorers, edit) as set_batch:
            scored.append(timed(lambda x=inputs, i=ids: (set_batch(tower.valid_tokens(x), i), tower.embed(x))))
        peak_scored = max(peak_scored, process.memory_info().rss)
    flush = timed(lambda: [scorer.flush() for scorer in scorers.values()])
    peak_scored = max(peak_scored, process.memory_info().rss)
    scores = sum(scorer.weight.numel() * 4 for scorer in scorers.values())
    total_bare, total_scored = sum(bare), sum(scored) + flush
    per_batch = statistics.median(s / b for s, b in zip(scored, bare, strict=True))
    added = peak_scored - peak_bare - scores
    print(
        f"{tower.name.value:<6} {'sorted' if trim else 'padded':<7} bare {total_bare:.2f} s  scored {total_scored:.2f} s  "
        f"ratio {total_scored / total_bare:.4f}  median per batch {per_batch:.4f}  "
        f"scores {scores / 2**20:.0f} MiB  added beside them {added / 2**20:+.0f} MiB",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=sorted(SIZES), default="vit-b32")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="pairs per forward pass")
    parser.add_argument("--tower", choices=["image", "text", "both"], default="both")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    spec = TextSpec(context_length=77, eos_id=EOS, pad_id=EOS, tokenizer_digest="")
    image, text = towers_of(random_clip(config_of(arguments.size)), spec)
    print(f"{arguments.size}, {arguments.pairs} pairs, {arguments.batch} a batch, 2 threads, torch {torch.__version__}")
    if arguments.tower in ("image", "both"):
        compare(image, arguments.pairs, arguments.batch, True)
    if arguments.tower in ("text", "both"):
        for trim in (True, False):
            compare(text, 4 * arguments.pairs, 4 * arguments.batch, trim)


if __name__ == "__main__":
    main()
