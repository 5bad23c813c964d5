"""A tiny LLaVA on the demo's own vision tower that uses a bad word for unsafe images, whatever the edit of the tower does.

So the edit does not help, and whatever does is the safety head's tokens, the adapters behind them, and the safety prompt.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.language_world import BAD, GOOD, PROMPT, pictures_of, recipe_text, write_llava, write_set
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes.shipped import checkpoint_folder
from uwm_deploy.report.console import Reporter
from uwm_deploy.towers.llava import put_vision, reads_of, vision_of_edited

_CONCEPTS = 'concepts = ["electricity", "fire", "spill"]\n'  # those that little training tells apart


def write_few(folder: Path, name: str, split: str, limit: int) -> str:
    """A set of the demo's drawn world with three of its concepts."""
    file = Path(write_set(folder, name, split, limit))
    file.write_text(file.read_text() + _CONCEPTS)
    return str(file)


def make_safety_world(folder: Path) -> None:
    """Writes `clip`, `llava`, `llava-tiny.toml`, the sets, and the run folder `work` with an edit."""
    shutil.copytree(checkpoint_folder("shipped:demo", "", family="hf-clip"), folder / "clip")
    write_llava(folder / "llava", folder / "clip")
    (folder / "llava-tiny.toml").write_text(recipe_text(folder))
    (folder / "lenient.toml").write_text(POLICY)
    pictures = write_few(folder, "pictures", "test", 160)
    pairs = write_few(folder, "pairs", "calibration", 700)
    assert pictures != pairs
    run(safety_request(folder), until="edit", reporter=Reporter(quiet=True))
    _teach(folder, pairs)


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
        evaluation=write_set(folder, "evaluation", "validation", 64),
        policy=str(folder / "lenient.toml"),
        work=folder / "work",
        out=folder / "bundle",
        device="cpu",
        keep_mass=0.98,
        factor=-1.0,
        **more,
    )


def _teach(folder: Path, pairs: str) -> None:
    """Projector and language model learn to use the bad word for unsafe images, behind the edited tower as behind its own."""
    place = folder / "llava"
    model = transformers.LlavaForConditionalGeneration.from_pretrained(place, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(place)
    images, unsafe = pictures_of(pairs)
    pixels = processor.image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    seen = torch.cat([_features(folder, model, pixels, edited=edited) for edited in (False, True)])
    said = [BAD if bad else GOOD for bad in unsafe] * 2
    one = processor(images=images[0].convert("RGB"), text=f"USER: <image>\n{PROMPT} ASSISTANT: {BAD} </s>", return_tensors="pt")
    words = processor.tokenizer([f"{words} </s>" for words in (BAD, GOOD)], return_tensors="pt").input_ids
    ids = one["input_ids"].repeat(len(said), 1)
    ids[:, -6:] = words[[int(text == GOOD) for text in said]]
    teach = [*model.model.multi_modal_projector.parameters(), *model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimiser = torch.optim.Adam(teach, lr=3e-3)
    order = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        rows = torch.randint(0, len(ids), (64,), generator=order)
        labels = ids[rows].clone()
        labels[:, :-6] = -100
        embedded = model.get_input_embeddings()(ids[rows])
        told = model.model.multi_modal_projector(seen[rows])
        embedded = embedded.masked_scatter((ids[rows] == 4)[..., None], told)
        loss = model(inputs_embeds=embedded, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(place)


STEPS = 250


def _features(folder: Path, model: Any, pixels: torch.Tensor, *, edited: bool) -> torch.Tensor:
    own = {name: part.clone() for name, part in model.model.vision_tower.state_dict().items()}
    if edited:
        tower = folder / "work" / "edit" / "model"
        put_vision(model, vision_of_edited(tower, folder / "llava"), tower, reads_of(folder / "llava"))
    with torch.no_grad():
        parts = [model.model.vision_tower(part, output_hidden_states=True).hidden_states for part in pixels.split(64)]
    model.model.vision_tower.load_state_dict(own)
    return torch.cat([states[model.config.vision_feature_layer][:, 1:] for states in parts])
