"""SigLIP and SigLIP 2 of fixed resolution, from `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel

from uwm_deploy.errors import InputError
from uwm_deploy.recipes.recipe import Architecture
from uwm_deploy.records.model import ImageSpec, TowerName
from uwm_deploy.towers import checkpoint, preprocessing
from uwm_deploy.towers.attention import make_attention_explicit
from uwm_deploy.towers.protocol import LoadedParts, ModuleTower, caption_tokens, jitter
from uwm_deploy.towers.refusal import refusals

FAMILY = "siglip"
SIGLIP2_VOCABULARY = 256_000
"""Size of the Gemma vocabulary, which SigLIP 2 has and SigLIP has not."""


class _ImageGraph(nn.Module):
    """Pixels to embedding."""

    def __init__(self, model: SiglipModel) -> None:
        super().__init__()
        self.vision_model = model.vision_model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, d)."""
        return self.with_tokens(pixel_values)[0]

    def with_tokens(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) to (B, d), and to the tokens (B, T, width) of the last layer."""
        output = self.vision_model(pixel_values=pixel_values)
        return output.pooler_output, output.last_hidden_state


class _TextGraph(nn.Module):
    """Ids to embedding, without a mask and always at full length: the last position is pooled, padding or not."""

    def __init__(self, model: SiglipModel) -> None:
        super().__init__()
        self.text_model = model.text_model

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) to (B, d)."""
        result: Tensor = self.text_model(input_ids=input_ids).pooler_output
        return result


def from_folder(folder: Path, *, random: bool) -> LoadedParts:
    """Loads a checkpoint folder, or only its architecture.

    Raises:
        InputError: See `towers.checkpoint`.
    """
    checkpoint.config_of_type(folder, ("siglip",), FAMILY)
    config = checkpoint.config_from(SiglipConfig, folder, random=random)
    _check_head(folder, config)
    tokenizer = tokenizer_for(folder, config)
    image = preprocessing.image_spec(folder, "Siglip")
    preprocessing.check_side(
        image, config.vision_config.image_size, f"{folder.name}/config.json: vision_config.image_size"
    )
    model = random_siglip(config) if random else checkpoint.pretrained(SiglipModel, folder, config)

    def save(target: Path) -> None:
        model.save_pretrained(target)
        checkpoint.copy_side_files(folder, target)
        checkpoint.readable(target)

    return _parts(model, image, tokenizer, save, folder.name)


def from_architecture(architecture: Architecture) -> LoadedParts:
    """Random weights, and a tokenizer of bytes in place of the real one, which comes with the checkpoints only."""
    text = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1, **architecture.text}
    config = SiglipConfig(text_config=text, vision_config=dict(architecture.image))
    model, side = random_siglip(config), int(config.vision_config.image_size)
    tokenizer = byte_tokenizer(
        int(config.text_config.max_position_embeddings),
        separate_padding=config.text_config.vocab_size == SIGLIP2_VOCABULARY,
    )
    half = (0.5, 0.5, 0.5)
    processor = SiglipImageProcessor(size={"height": side, "width": side}, image_mean=half, image_std=half, resample=3)
    image = ImageSpec(resize=side, crop=side, resample="bicubic", rescale=1 / 255, mean=half, std=half, fit="squash")

    def save(target: Path) -> None:
        for part in (model, tokenizer, processor):
            part.save_pretrained(target)
        checkpoint.readable(target)

    return _parts(model, image, tokenizer, save, FAMILY)


def _check_head(folder: Path, config: Any) -> None:
    if not config.vision_config.vision_use_head:
        raise InputError(
            f"{folder.name}/config.json: vision_config.vision_use_head is false, and without the head there is no "
            "embedding of an image",
            fix="use a checkpoint with the head and set it to true",
        )


def _parts(
    model: SiglipModel, image: ImageSpec, tokenizer: Any, save: Callable[[Path], None], where: str
) -> LoadedParts:
    positions = int(model.config.text_config.max_position_embeddings)
    spec, content = checkpoint.text_spec(tokenizer, positions, where, fixed_length=True)
    make_attention_explicit(model)
    dim = int(model.config.vision_config.hidden_size)
    return LoadedParts(
        source=model,
        image_tower=ModuleTower(_ImageGraph(model), TowerName.IMAGE, dim),
        text_tower=ModuleTower(_TextGraph(model), TowerName.TEXT, dim, caption_tokens(spec)),
        image=image,
        text=spec,
        embed_dim=dim,
        tokenizer_json=content,
        save=save,
        architecture="siglip",
    )


def tokenizer_for(folder: Path, config: Any) -> Any:
    """The tokenizer of a checkpoint, with the lower-casing that SigLIP 2 needs."""
    tokenizer = _tokenizer_of(folder)
    if config.text_config.vocab_size == SIGLIP2_VOCABULARY:
        _lowercase(tokenizer)
    return tokenizer


def _tokenizer_of(folder: Path) -> Any:
    """The tokenizer from `tokenizer.json`: the class that some checkpoints name needs another library, for the same ids."""
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"checkpoint {folder.name} has no tokenizer.json", fix="convert its spiece.model to one")
    with refusals(f"checkpoint {folder.name} has no usable tokenizer", fix="fetch it again"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    checkpoint.check_vocabulary(tokenizer, folder)
    return tokenizer


def _lowercase(tokenizer: Any) -> None:
    """Adds lower-casing: SigLIP 2 was trained on lower-case captions, and its published tokenizers do not lower-case."""
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is None or "Lowercase" not in backend.to_str():
        steps = [normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer else [])]
        backend.normalizer = normalizers.Sequence(steps)


def byte_tokenizer(positions: int, *, separate_padding: bool) -> PreTrainedTokenizerFast:
    """Tokenizer with one token per byte and SigLIP's rules: lower case, an end token, padding to full length.

    Args:
        positions: Length of a row.
        separate_padding: Whether padding has a token of its own, as in SigLIP 2, or is the end token, as in SigLIP.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))  # noqa: S106 -- a token of text
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        pad_token="<pad>" if separate_padding else "</s>",
        model_max_length=positions,
        padding_side="right",
    )


def random_siglip(config: object, seed: int = 0) -> SiglipModel:
    """The architecture of a config with seeded, jittered random weights."""
    torch.manual_seed(seed)
    model = SiglipModel._from_config(config, attn_implementation="eager").eval()
    jitter(model)
    return model
