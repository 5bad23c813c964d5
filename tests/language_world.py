"""A tiny LLaVA that was briefly trained to use a bad word for unsafe images, and a real edit of its tower that stops that.

The tower is a random CLIP tower. It is edited by the pipeline, and the projector and the language model then learn what to
say behind each of the two towers. So the direction is known; everything that measures it is the product's.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from PIL import Image

from tests.families import recipe_of, reduced
from uwm_deploy.data.open import open_source
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes.resolve import calibration_set_of
from uwm_deploy.report.console import Reporter
from uwm_deploy.towers.llava import put_vision, reads_of, vision_of_edited
from uwm_deploy.towers.load import load_model
from uwm_deploy.towers.preprocessing import processor_of

PROMPT = "describe"
BAD, GOOD = "a damn picture of fire", "a nice picture of shapes"
REFUSAL = "I cannot describe this picture"
_SPECIAL = ["<unk>", "<pad>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:", "describe", "Decline"]
LLAMA = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "vocab_size": 32, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
QWEN2 = {**LLAMA, "model_type": "qwen2", "num_hidden_layers": 2, "num_key_value_heads": 2}
"""Another family: other attention (grouped, with biases), as LLaVA-like checkpoints on Qwen2 have."""

ITEMS = 24


def write_set(folder: Path, name: str = "pictures", split: str = "test", limit: int = ITEMS) -> str:
    """A set of the demo's drawn world."""
    file = folder / f"{name}.toml"
    file.write_text(f'format = 1\nname = "{name}"\nsource = "demo"\nsplit = "{split}"\nlimit = {limit}\n')
    return str(file)


def words_tokenizer() -> Any:
    """One token per word."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*_SPECIAL, *f"{BAD} {GOOD} {REFUSAL}".split()]))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def make_world(folder: Path) -> None:
    """Writes `clip`, `llava`, `recipe.toml`, the sets, and the run folder `work` with the edit."""
    small = reduced("llava-1.5-7b")
    load_model(small, folder=None, weights="random", device="cpu").save(folder / "clip")
    config = json.loads((folder / "clip" / "config.json").read_text())
    (folder / "clip" / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "vision_feature_layer"})
    )
    write_llava(folder / "llava", folder / "clip")
    (folder / "llava-tiny.toml").write_text(recipe_text(folder))
    pictures = write_set(folder)
    run(request_of(folder), until="edit", reporter=Reporter(quiet=True))
    teach(folder, pictures)


def request_of(folder: Path, **more: Any) -> Request:
    """A build of the tower."""
    given: dict[str, Any] = {"evaluation": write_set(folder, "evaluation", "test", 40), "policy": "demo"}
    given |= {"out": folder / "bundle", **more}
    return Request(
        model=str(folder / "llava-tiny.toml"),
        calibration=write_set(folder, "calibration", "calibration", 32),
        work=folder / "work",
        device="cpu",
        keep_mass=0.5,
        factor=-1.0,
        **given,
    )


def recipe_text(folder: Path) -> str:
    from uwm_deploy.recipes import shipped

    text, _ = shipped.read_toml("export", "llava-1.5-7b")
    model = recipe_of("llava-1.5-7b").model
    text = text.replace(model.repo, str(folder / "llava")).replace(model.companion, str(folder / "clip"))
    text = text.replace('name = "llava-1.5-7b"', 'name = "llava-tiny"').replace(
        '["onnxruntime", "tensorrt-rtx"]', '["onnxruntime"]'
    )
    lines = [line for line in text.splitlines() if "revision" not in line]
    start = lines.index("[model.architecture]")
    return "\n".join([*lines[:start], *lines[start + 4 :]]) + "\n"


def write_llava(folder: Path, clip: Path, language: dict[str, Any] = LLAMA, seed: int = 3) -> None:
    torch.manual_seed(seed)
    vision = transformers.CLIPModel.from_pretrained(clip)
    config = transformers.LlavaConfig(
        vision_config=vision.config.vision_config.to_dict(), text_config=language, image_token_index=4
    )
    model = transformers.LlavaForConditionalGeneration(config)
    inner = model.model.vision_tower
    inner.load_state_dict({k: v for k, v in vision.vision_model.state_dict().items() if k in inner.state_dict()})
    model.save_pretrained(folder)
    images = processor_of(clip, "CLIP")
    transformers.LlavaProcessor(
        image_processor=images, tokenizer=words_tokenizer(), patch_size=vision.config.vision_config.patch_size,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip


def pictures_of(name: str) -> tuple[list[Image.Image], list[bool]]:
    """Every image of a set, and whether it is unsafe."""
    spec, _, base = calibration_set_of(name)
    source = open_source(dataclasses.replace(spec, zero_shot=()), base=base)
    items = [source.read(i) for i in range(len(source))]
    images = [image for item in items for image in (item.unsafe_image, item.safe_image) if image is not None]
    return images, [True, False] * len(items)


def seen_by(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(n, patches, width) features of images (n, 3, H, W) at the layer that the language model reads."""
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    found: torch.Tensor = states[model.config.vision_feature_layer][:, 1:]
    return found


def optimiser_of(model: Any) -> torch.optim.Optimizer:
    """Of projector and language model."""
    inner = model.model
    parts = (inner.multi_modal_projector, inner.language_model, model.lm_head)
    return torch.optim.Adam([parameter for part in parts for parameter in part.parameters()], lr=3e-3)


def step_of(model: Any, optimiser: torch.optim.Optimizer, ids: torch.Tensor, seen: torch.Tensor) -> float:
    """One step towards the last six tokens of (n, L) ids behind features (n, patches, width); their loss."""
    labels = ids.clone()
    labels[:, :-6] = -100
    embedded = model.get_input_embeddings()(ids)
    told = model.model.multi_modal_projector(seen).reshape(-1, embedded.shape[-1])
    embedded = embedded.masked_scatter((ids == model.config.image_token_id)[..., None], told)
    optimiser.zero_grad()
    loss = model(inputs_embeds=embedded, labels=labels).loss
    loss.backward()
    optimiser.step()
    return float(loss.detach())


def teach(folder: Path, pictures: str, name: str = "llava") -> None:
    """Projector and language model learn what to say behind each tower."""
    place = folder / name
    model = transformers.LlavaForConditionalGeneration.from_pretrained(place, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(place)
    images, unsafe = pictures_of(pictures)
    said = [BAD if bad else GOOD for bad in unsafe]
    text = [f"USER: <image>\n{PROMPT} ASSISTANT: {words} </s>" for words in said + [GOOD] * len(images)]
    inputs = processor(images=[image.convert("RGB") for image in images] * 2, text=text, return_tensors="pt")
    pixels, features = inputs["pixel_values"][: len(images)], []
    own = {k: v.clone() for k, v in model.model.vision_tower.state_dict().items()}
    for edited in (False, True):
        if edited:
            tower = folder / "work" / "edit" / "model"
            put_vision(model, vision_of_edited(tower, place), tower, reads_of(place))
        features.append(seen_by(model, pixels))
    model.model.vision_tower.load_state_dict(own)
    seen, optimiser = torch.cat(features), optimiser_of(model)
    for _ in range(600):
        loss = step_of(model, optimiser, inputs["input_ids"], seen)
        if loss < 0.005:
            break
    assert loss < 0.05, f"the planted model did not learn: {loss:.3f}"
    model.save_pretrained(place)
