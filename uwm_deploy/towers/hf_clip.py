"""Hugging Face CLIP, and checkpoints of the same architecture (Safe-CLIP, SafeR-CLIP, MetaCLIP)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from uwm_deploy.errors import InputError
from uwm_deploy.recipes.recipe import Architecture
from uwm_deploy.records.model import ImageSpec, TextSpec, TowerName
from uwm_deploy.towers import checkpoint, preprocessing
from uwm_deploy.towers.clip_vocabulary import clip_vocabulary
from uwm_deploy.towers.protocol import LastMap, LoadedParts, ModuleTower, caption_tokens, jitter

FAMILY = "hf-clip"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class _ImageGraph(nn.Module):
    """Pixels to embedding; attribute names keep the parameters' names in the source model."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, d)."""
        return self.with_tokens(pixel_values)[0]

    def with_tokens(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) to (B, d), and to the tokens (B, T, width) of the last layer."""
        output = self.vision_model(pixel_values=pixel_values)
        return self.visual_projection(output.pooler_output), output.last_hidden_state


class _TextGraph(nn.Module):
    """Ids to embedding. There is no mask: with causal attention and padding to the right it would change nothing."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.text_model, self.text_projection = model.text_model, model.text_projection

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) to (B, d)."""
        result: Tensor = self.text_projection(self.text_model(input_ids=input_ids).pooler_output)
        return result


def towers_of(model: CLIPModel, text: TextSpec) -> tuple[ModuleTower, ModuleTower]:
    """Image and text tower of a model."""
    dim = int(model.config.projection_dim)
    image_map, text_map = (
        LastMap(weight=f"{projection}.weight", transposed=False, norm_gain=f"{norm}.weight", norm_bias=f"{norm}.bias")
        for projection, norm in (
            ("visual_projection", "vision_model.post_layernorm"),
            ("text_projection", "text_model.final_layer_norm"),
        )
    )
    return (
        ModuleTower(_ImageGraph(model), TowerName.IMAGE, dim, last_map=image_map),
        ModuleTower(_TextGraph(model), TowerName.TEXT, dim, caption_tokens(text), pools_at_end=True, last_map=text_map),
    )


def from_folder(folder: Path, *, random: bool) -> LoadedParts:
    """Loads a checkpoint folder, or only its architecture.

    Raises:
        InputError: See `towers.checkpoint`; and if the config pools the text at another token than the tokenizer's end.
    """
    checkpoint.config_of_type(folder, ("clip",), FAMILY)
    config = checkpoint.config_from(CLIPConfig, folder, random=random)
    tokenizer = checkpoint.tokenizer_of(folder)
    spec, content = checkpoint.text_spec(tokenizer, int(config.text_config.max_position_embeddings), folder.name)
    _check_end_token(config, spec)
    _check_padding(folder, spec)
    image = preprocessing.image_spec(folder, "CLIP")
    preprocessing.check_side(
        image, config.vision_config.image_size, f"{folder.name}/config.json: vision_config.image_size"
    )
    model = random_clip(config) if random else checkpoint.pretrained(CLIPModel, folder, config)

    def save(target: Path) -> None:
        model.save_pretrained(target)
        checkpoint.copy_side_files(folder, target)
        checkpoint.readable(target)

    return _parts(model, image, spec, content, save)


def from_architecture(architecture: Architecture) -> LoadedParts:
    """Random weights, with the vocabulary and preprocessing that all OpenAI-style checkpoints share."""
    tokenizer = CLIPTokenizer(*clip_vocabulary("<|startoftext|>", "<|endoftext|>"), model_max_length=77)
    end = int(tokenizer.eos_token_id)
    text = {"eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end, **architecture.text}
    config = CLIPConfig(
        text_config=text, vision_config=dict(architecture.image), projection_dim=architecture.projection_dim
    )
    model, side = random_clip(config), int(config.vision_config.image_size)
    spec, content = checkpoint.text_spec(tokenizer, int(config.text_config.max_position_embeddings), FAMILY)
    processor = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=list(MEAN),
        image_std=list(STD), resample=3,
    )  # fmt: skip
    image = ImageSpec(resize=side, crop=side, resample="bicubic", rescale=1 / 255, mean=MEAN, std=STD)

    def save(target: Path) -> None:
        for part in (model, tokenizer, processor):
            part.save_pretrained(target)
        checkpoint.readable(target)

    return _parts(model, image, spec, content, save)


def _parts(model: CLIPModel, image: ImageSpec, text: TextSpec, tokenizer_json: bytes, save: Any) -> LoadedParts:
    image_tower, text_tower = towers_of(model, text)
    return LoadedParts(
        source=model,
        image_tower=image_tower,
        text_tower=text_tower,
        image=image,
        text=text,
        embed_dim=int(model.config.projection_dim),
        tokenizer_json=tokenizer_json,
        save=save,
    )


def _check_end_token(config: CLIPConfig, text: TextSpec) -> None:
    """Both pooling rules in use for CLIP must find the tokenizer's end token.

    With eos_token_id 2 in the config the position of the *largest id* is pooled: right only if the end token has it.
    """
    pooled = config.text_config.eos_token_id
    if pooled == 2 and text.eos_id == int(config.text_config.vocab_size) - 1:
        return
    if pooled != text.eos_id:
        raise InputError(
            f"config.json pools the text at token {json.dumps(pooled)}, but the tokenizer ends texts with {text.eos_id}",
            fix="set text_config.eos_token_id to the tokenizer's end token",
        )


def _check_padding(folder: Path, text: TextSpec) -> None:
    """The tower has no mask: padding in front of a caption would be read as part of it.

    Raises:
        InputError: If rows are padded on the left.
    """
    if text.padding_side != "right":
        raise InputError(
            f"{folder.name}/tokenizer_config.json pads captions on the {text.padding_side}, and CLIP reads them without "
            "a mask, padded on the right",
            fix='set padding_side to "right" there',
        )


def random_clip(config: object, seed: int = 0) -> CLIPModel:
    """The architecture of a config with seeded, jittered random weights."""
    torch.manual_seed(seed)
    model = CLIPModel._from_config(config, attn_implementation="eager").eval()
    jitter(model)
    return model
