"""Checkpoint folders of each library with one narrow layer per tower, of which a test changes the JSON files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from uwm_deploy.recipes.shipped import checkpoint_folder

SIDE = 16
WIDTH = 16
_LAYER = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_IMAGE = {**_LAYER, "image_size": SIDE, "patch_size": 8}
OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": SIDE, "layers": 1, "width": WIDTH, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 1},
}


def hf_clip(folder: Path) -> Path:
    """CLIP of transformers with the demo's tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessor

    from uwm_deploy.towers.hf_clip import random_clip

    demo = checkpoint_folder("shipped:demo", "")
    known = json.loads((demo / "config.json").read_text())["text_config"]
    text = {
        key: known[key] for key in known if key.endswith("token_id") or key in ("vocab_size", "max_position_embeddings")
    }
    config = CLIPConfig(text_config={**text, **_LAYER}, vision_config=dict(_IMAGE), projection_dim=8)
    random_clip(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo / name, folder / name)
    return folder


def siglip(folder: Path) -> Path:
    """SigLIP with one token per byte."""
    from transformers import SiglipConfig, SiglipImageProcessor

    from uwm_deploy.towers.siglip import byte_tokenizer, random_siglip

    text = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": 512, "max_position_embeddings": 32}
    config = SiglipConfig(text_config={**text, **_LAYER}, vision_config=dict(_IMAGE))
    random_siglip(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    byte_tokenizer(32, separate_padding=False).save_pretrained(folder)
    return folder


def open_clip(folder: Path, **changes: Any) -> Path:
    """open_clip's own towers.

    Args:
        folder: New or empty.
        changes: Entries of `model_cfg`, in the place of the usual ones or beside them.
    """
    from open_clip import CLIP, CoCa, CustomTextCLIP
    from safetensors.torch import save_file

    from uwm_deploy.towers.open_clip import CONFIG, WEIGHTS
    from uwm_deploy.towers.protocol import jitter

    folder.mkdir(exist_ok=True)
    config = json.loads(json.dumps({**OPEN_CLIP, **changes}))
    body = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / CONFIG).write_text(json.dumps(body))
    custom = config.pop("custom_text", False)
    torch.manual_seed(0)
    model = (CoCa if "multimodal_cfg" in config else CustomTextCLIP if custom else CLIP)(**config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    jitter(model)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / WEIGHTS)
    return folder


MAKERS = {"hf-clip": hf_clip, "siglip": siglip, "open-clip": open_clip}


def changed(source: Path, to: Path, file: str, body: object) -> Path:
    """The folder with another content of one JSON file; the weights are linked, not copied.

    Args:
        source: The whole folder.
        to: Filled anew.
        file: Name of the file; it is left out where the body is None.
        body: Its content.
    """
    to.mkdir(exist_ok=True)
    for old in to.iterdir():
        old.unlink()
    for part in source.iterdir():
        if part.name != file:
            (to / part.name).symlink_to(part)
    if body is not None:
        (to / file).write_text(json.dumps(body))
    return to
