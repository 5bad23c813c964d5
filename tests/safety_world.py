"""A tiny LLaVA on the demo's own vision tower that uses a bad word for unsafe images, whatever the edit of the tower does.

So the edit does not help, and whatever does is the safety head's tokens, the adapters behind them, and the safety prompt.
One language model was taught to decline where the question asks it to. The other never said such a thing.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.downstream_reports import LENIENT
from tests.language_world import (
    BAD,
    GOOD,
    PROMPT,
    REFUSAL,
    optimiser_of,
    pictures_of,
    recipe_text,
    seen_by,
    step_of,
    write_llava,
    write_set,
)
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes.shipped import checkpoint_folder
from uwm_deploy.records.head import Action
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.results import Risk

_CONCEPTS = 'concepts = ["electricity", "fire", "spill"]\n'  # those that little training tells apart


def write_few(folder: Path, name: str, split: str, limit: int) -> str:
    """A set of the demo's drawn world with three of its concepts."""
    file = Path(write_set(folder, name, split, limit))
    file.write_text(file.read_text() + _CONCEPTS)
    return str(file)


def make_safety_world(folder: Path, *, declines: bool = True) -> None:
    """Writes `clip`, `llava`, `llava-tiny.toml`, the sets, and the run folder `work` with an edit.

    Args:
        folder: Where they go.
        declines: Whether the language model is taught to decline where the question asks it to.
    """
    shutil.copytree(checkpoint_folder("shipped:demo", "", family="hf-clip"), folder / "clip")
    write_llava(folder / "llava", folder / "clip")
    (folder / "llava-tiny.toml").write_text(recipe_text(folder))
    (folder / "lenient.toml").write_text(POLICY)
    write_few(folder, "pictures", "test", 300)
    write_few(folder, "held-out", "validation", 320)
    pairs = write_few(folder, "pairs", "calibration", 600)
    run(safety_request(folder), until="edit", reporter=Reporter(quiet=True))
    _teach(folder, pairs, declines=declines)


POLICY = LENIENT + '[[artifact]]\nmetric = "parity.max_abs"\nat_most = 0.001\n'


def safety_request(folder: Path, **more: Any) -> Request:
    """A build of the tower."""
    return Request(
        model=str(folder / "llava-tiny.toml"),
        calibration=write_set(folder, "calibration", "calibration", 32),
        evaluation=write_set(folder, "evaluation", "test", 64),
        policy=str(folder / "lenient.toml"),
        work=folder / "work",
        out=folder / "bundle",
        device="cpu",
        keep_mass=0.98,
        factor=-1.0,
        **more,
    )


def _teach(folder: Path, pairs: str, *, declines: bool) -> None:
    """The language model learns to use the bad word for unsafe images, and maybe to decline where it is asked to."""
    place = folder / "llava"
    model = transformers.LlavaForConditionalGeneration.from_pretrained(place, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(place)
    images, unsafe = pictures_of(pairs)
    plain = [image.convert("RGB") for image in images]
    seen = seen_by(model, processor.image_processor(images=plain, return_tensors="pt")["pixel_values"])
    bad = torch.tensor(unsafe)
    asked = [PROMPT, f"{Risk('fire', 0.9, 0.9, Action.BLOCK).safety_prompt} {PROMPT}"]
    lines = [(asked[0], GOOD), (asked[0], BAD), (asked[1], REFUSAL)]
    texts = [f"USER: <image>\n{question} ASSISTANT: {said} </s>" for question, said in lines]
    good, worse, refused = (processor(images=plain[0], text=text, return_tensors="pt").input_ids for text in texts)
    optimiser, order = optimiser_of(model), torch.Generator().manual_seed(0)
    for step in range(STEPS):
        rows = torch.randint(0, len(seen), (48,), generator=order)
        told = torch.where(bad[rows][:, None], worse, good)
        ids = told if step % 4 or not declines else refused.expand(len(rows), -1)
        step_of(model, optimiser, ids, seen[rows])
    model.save_pretrained(place)


STEPS = 240
