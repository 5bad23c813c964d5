"""Trains the demo's CLIP from scratch on the drawn world and saves it as a Hugging Face folder.

    python -m uwm_deploy.data.demo.train --out uwm_deploy/data/demo/model

Two phases: attributes of the scene are first learnt by the image tower alone, then both towers are trained contrastively on
batches of which half are safe/unsafe pairs of the same scene. Seeded; about half an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from uwm_deploy.data.demo import drawing, world
from uwm_deploy.data.demo.tokenizer import CONTEXT_LENGTH, tokenizer_from_captions

SIDE = 48
PATCH = 6
WIDTH = 96
LAYERS = 4
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
_ATTRIBUTE_WEIGHTS = torch.tensor([2.0, 0.5, 0.5, 2.5])  # shape, colour, background, hazard: the hard ones count more


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training data in memory; row ``2 i`` is the safe member of scene i, row ``2 i + 1`` the unsafe one.

    Attributes:
        images: (2n, SIDE, SIDE, 3) uint8.
        texts: 2n captions.
        attributes: (2n, 4) int64, class per attribute.
    """

    images: np.ndarray
    texts: list[str]
    attributes: np.ndarray


def _scene(index: int) -> tuple[np.ndarray, list[str], list[list[int]]]:
    item = world.quadruple("train", index)
    images = [i.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for i in (item.safe_image, item.unsafe_image)]
    scene = [
        drawing.SHAPES.index(item.shape),
        list(drawing.COLOURS).index(item.colour),
        list(drawing.BACKGROUNDS).index(item.background),
    ]
    hazard = 1 + world.CONCEPTS.index(item.concept)
    return (
        np.stack([np.asarray(i) for i in images]),
        [item.safe_text, item.unsafe_text],
        [[*scene, 0], [*scene, hazard]],
    )


def corpus_of(scenes: int) -> Corpus:
    """Draws the first scenes of the training split, in parallel."""
    with get_context("fork").Pool() as pool:
        rows = pool.map(_scene, range(scenes), chunksize=200)
    return Corpus(
        np.concatenate([r[0] for r in rows]), [t for r in rows for t in r[1]], np.array([a for r in rows for a in r[2]])
    )


def config_of(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """A CLIP of about one million parameters."""
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "hidden_act": "quick_gelu",
    }
    text = shared | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = shared | {"image_size": SIDE, "patch_size": PATCH}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)


def _pixels(images: np.ndarray) -> Tensor:
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
    return (scaled - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def _rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over a tenth of the steps, then half a cosine."""
    warm = max(1, steps // 10)
    return (
        peak * (step + 1) / warm
        if step < warm
        else peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
    )


def _optimiser(parameters: list[nn.Parameter], decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=decay)


def _say(phase: str, step: int, steps: int, loss: float, started: float) -> None:
    if step % 50 == 0 or step == steps - 1:
        print(f"{phase} {step:>5}/{steps}  loss {loss:.3f}  {time.perf_counter() - started:.0f} s", flush=True)


def learn_attributes(model: CLIPModel, corpus: Corpus, *, steps: int, batch: int, rng: np.random.Generator) -> None:
    """Phase one: linear heads on the pooled image features name shape, colour, background and hazard."""
    sizes = (len(drawing.SHAPES), len(drawing.COLOURS), len(drawing.BACKGROUNDS), 1 + len(world.CONCEPTS))
    heads = nn.ModuleList([nn.Linear(WIDTH, size) for size in sizes])
    optimiser = _optimiser([*model.vision_model.parameters(), *heads.parameters()], 0.05)
    started = time.perf_counter()
    for step in range(steps):
        rows = rng.integers(0, len(corpus.texts), batch)
        features = model.vision_model(pixel_values=_pixels(corpus.images[rows])).pooler_output
        labels = torch.from_numpy(corpus.attributes[rows])
        loss = torch.stack([functional.cross_entropy(head(features), labels[:, k]) for k, head in enumerate(heads)])
        loss = (loss * _ATTRIBUTE_WEIGHTS).sum()
        _step(optimiser, loss, _rate(step, steps, 1.5e-3))
        _say("attributes", step, steps, loss.item(), started)


def _step(optimiser: torch.optim.AdamW, loss: Tensor, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()


def _batch_rows(scenes: int, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Half of the batch are whole pairs, half are single members of other scenes."""
    chosen = rng.choice(scenes, size=batch // 4 + batch // 2, replace=False)
    pairs, singles = chosen[: batch // 4], chosen[batch // 4 :]
    return np.concatenate([2 * pairs, 2 * pairs + 1, 2 * singles + rng.integers(0, 2, len(singles))])


def contrast(
    model: CLIPModel,
    corpus: Corpus,
    tokenizer: CLIPTokenizer,
    *,
    steps: int,
    batch: int,
    rate: float,
    rng: np.random.Generator,
) -> None:
    """Phase two: symmetric InfoNCE; equal captions inside a batch are no negatives of each other."""
    encoded = tokenizer(corpus.texts, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH)
    ids = torch.tensor(encoded["input_ids"])
    lengths = torch.tensor(encoded["attention_mask"]).sum(1)
    optimiser = _optimiser(list(model.parameters()), 0.1)
    started = time.perf_counter()
    for step in range(steps):
        rows = torch.from_numpy(_batch_rows(len(corpus.texts) // 2, batch, rng))
        longest = int(lengths[rows].max())
        output = model(input_ids=ids[rows, :longest], pixel_values=_pixels(corpus.images[rows.numpy()]))
        same = (ids[rows][:, None] == ids[rows][None]).all(-1) & ~torch.eye(batch, dtype=torch.bool)
        logits = output.logits_per_text.masked_fill(same, -1e4)
        target = torch.arange(batch)
        loss = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
        _step(optimiser, loss, _rate(step, steps, rate))
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        _say("contrast", step, steps, loss.item(), started)


def train(
    out: Path,
    *,
    start: Path | None,
    seed: int,
    scenes: int,
    attribute_steps: int,
    steps: int,
    batch: int,
    rate: float,
) -> None:
    """Draws, trains from scratch or goes on from a folder that an earlier run wrote, and saves."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    corpus = corpus_of(scenes)
    print(f"drew {scenes} scenes", flush=True)
    if start is not None:
        tokenizer = CLIPTokenizer.from_pretrained(start)
        model = CLIPModel.from_pretrained(start, attn_implementation="eager")
    else:
        tokenizer = tokenizer_from_captions(corpus.texts)
        # The public constructor cannot choose the attention, and eager is the faster one here.
        model = CLIPModel._from_config(config_of(tokenizer), attn_implementation="eager")
    model.train()
    learn_attributes(model, corpus, steps=attribute_steps, batch=batch, rng=rng)
    contrast(model, corpus, tokenizer, steps=steps, batch=batch, rate=rate, rng=rng)
    model.train(mode=False)
    save(model, tokenizer, out)


def save(model: CLIPModel, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Writes config, safetensors, tokenizer and preprocessor files."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(MEAN),
        image_std=list(STD),
        resample=Image.Resampling.BICUBIC,
    ).save_pretrained(out)
    # Written readable by the owner alone, which an installed package must not be.
    (out / "model.safetensors").chmod(0o644)


def main() -> None:
    """Command line of the training script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--start", type=Path, help="folder of an earlier run to go on from; from scratch without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=32_000, help="training scenes, two images each")
    parser.add_argument("--attribute-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=2200, help="contrastive steps")
    parser.add_argument("--batch", type=int, default=160)
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate of the contrastive phase")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    train(
        arguments.out,
        start=arguments.start,
        seed=arguments.seed,
        scenes=arguments.scenes,
        attribute_steps=arguments.attribute_steps,
        steps=arguments.steps,
        batch=arguments.batch,
        rate=arguments.rate,
    )


if __name__ == "__main__":
    main()
