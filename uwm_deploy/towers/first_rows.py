"""Two rows through both towers at load: what would fail in the middle of a build fails before it."""

from __future__ import annotations

import torch
from torch import Tensor

from uwm_deploy.errors import InputError
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.towers.protocol import LoadedParts, Tower
from uwm_deploy.towers.refusal import refusals

CAPTIONS = ("a photo of a cat", "two dogs and 3 red birds")
"""Any two that a tokenizer must tell apart."""


@torch.inference_mode()
def check_first_rows(parts: LoadedParts, name: str, config: str) -> None:
    """Embeds two images and two captions, on the processor.

    Args:
        parts: The model as its adapter loaded it.
        name: Of the checkpoint or recipe, for messages.
        config: File with the sizes of the towers, for messages.

    Raises:
        InputError: If a tower takes no row of the size that goes with it, gives no embedding of the right size, or gives
            the same for everything.
    """
    side = parts.image.crop
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    ids = _ids(parts, name)
    for tower, rows in ((parts.image_tower, pixels), (parts.text_tower, ids)):
        with refusals(f"{name}: its {tower.name.value} tower takes no row, so an entry of {config} is wrong"):
            embeds = tower.embed(rows)
        _check(embeds, parts.embed_dim, tower, f"{name}: its {tower.name.value} tower", config)


def _ids(parts: LoadedParts, name: str) -> Tensor:
    fix = "copy the tokenizer files of the model that it was made from"
    with refusals(f"{name} has a tokenizer that cannot be used", fix=fix):
        ids = torch.from_numpy(Tokenizer(parts.tokenizer_json, parts.text).encode(CAPTIONS))
    if torch.equal(ids[0], ids[1]):
        raise InputError(f"{name} has a tokenizer without a vocabulary: it gives every caption the same ids", fix=fix)
    if not bool((ids == parts.text.eos_id).any(1).all()):
        raise InputError(
            f"{name}: the tokenizer ends no caption with its end token, id {parts.text.eos_id}",
            fix="correct eos_token in tokenizer_config.json, or the post-processor in tokenizer.json",
        )
    return ids


def _check(embeds: object, dim: int, tower: Tower, where: str, config: str) -> None:
    if not isinstance(embeds, Tensor) or embeds.shape != (2, dim):
        found = f"a tensor of shape {tuple(embeds.shape)}" if isinstance(embeds, Tensor) else type(embeds).__name__
        raise InputError(
            f"{where} gives {found} for two rows, not two embeddings of size {dim}",
            fix=f"correct the pooling and the sizes in {config}",
        )
    if not bool(embeds.isfinite().all()) or not bool(embeds.norm(dim=-1).all()):
        raise InputError(f"{where} gives NaN, infinity or zeros", fix=f"correct the numbers in {config}")
    if torch.equal(embeds[0], embeds[1]):
        kind = "image" if tower.input_name == "pixel_values" else "caption"
        raise InputError(
            f"{where} gives the same embedding for every {kind}",
            fix=f"correct the layers, the pooling and the end token in {config}",
        )
