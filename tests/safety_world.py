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

from tests.language_world import BAD, GOOD, PROMPT, REFUSAL, pictures_of, recipe_text, write_llava, write_set
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


POLICY = """format = 1
name = "lenient"
[[edit]]
metric = "GS.delta"
at_least = -99.0
[[artifact]]
metric = "flips.any"
at_most = 50.0
[[artifact]]
metric = "parity.max_abs"
at_most = 0.001
"""


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
    pixels = processor.image_processor(images=plain, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    seen, bad = states[model.config.vision_feature_layer][:, 1:], torch.tensor(unsafe)
    asked = [PROMPT, f"{Risk('fire', 0.9, 0.9, Action.BLOCK).safety_prompt} {PROMPT}"]
    lines = [(asked[0], GOOD), (asked[0], BAD), (asked[1], REFUSAL)]
    texts = [f"USER: <image>\n{question} ASSISTANT: {said} </s>" for question, said in lines]
    good, worse, refused = (processor(images=plain[0], text=text, return_tensors="pt").input_ids for text in texts)
    teach = [
        *model.model.multi_modal_projector.parameters(),
        *model.model.language_model.parameters(),
        *model.lm_head.parameters(),
    ]
    optimiser = torch.optim.Adam(teach, lr=3e-3)
    order = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        rows = torch.randint(0, len(seen), (48,), generator=order)
        told = torch.where(bad[rows][:, None], worse, good)
        ids = told if step % 4 or not declines else refused.expand(len(rows), -1)
        labels = ids.clone()
        labels[:, :-6] = -100
        embedded = model.get_input_embeddings()(ids)
        patches = model.model.multi_modal_projector(seen[rows])
        embedded = embedded.masked_scatter((ids == 4)[..., None], patches)
        loss = model(inputs_embeds=embedded, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(place)


STEPS = 240
