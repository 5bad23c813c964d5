"""The source library's own preprocessing, tokenisation and encoders: the reference for the runtime and the towers.

This module uses none of this package's preprocessing, tokenisation or towers; only the module with the weights is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from uwm_deploy.recipes.recipe import Family
from uwm_deploy.records.model import TextSpec
from uwm_deploy.towers import checkpoint


@dataclass(frozen=True, slots=True)
class Library:
    """Functions of a source library.

    Attributes:
        pixels: An image to (3, H, W) float32.
        ids: Captions to (n, L) int64, padded to full length.
        embed_image: Pixels (n, 3, H, W) float32 to embeddings (n, d) float32, not normalised.
        embed_text: Captions to embeddings (n, d) float32, not normalised, with the library's own tokenisation and masks.
    """

    pixels: Callable[[Image.Image], np.ndarray]
    ids: Callable[[Sequence[str]], np.ndarray]
    embed_image: Callable[[Tensor], Tensor]
    embed_text: Callable[[Sequence[str]], Tensor]


def library_of(family: Family, source: nn.Module, folder: Path, spec: TextSpec) -> Library:
    """The library of a family around a model.

    Args:
        family: Of the model.
        source: The library's own module, as the family's adapter gives it.
        folder: Saved model, with its tokenizer and preprocessing.
        spec: Length of the token rows.
    """
    if family == "open-clip":
        return _open_clip(source, folder, spec)
    return _transformers(source, folder, spec, siglip=family == "siglip")


def _transformers(source: Any, folder: Path, spec: TextSpec, *, siglip: bool) -> Library:
    from transformers import AutoImageProcessor

    from uwm_deploy.towers import siglip as adapter

    # What the library itself picks, so that a class that was picked wrongly by us is seen.
    processor = AutoImageProcessor.from_pretrained(
        folder, backend="pil", local_files_only=True, trust_remote_code=False
    )
    # SigLIP 2 wants lower-case captions, which its published tokenizer files do not make.
    tokenizer = adapter.tokenizer_for(folder, source.config) if siglip else checkpoint.tokenizer_of(folder)
    device = next(source.parameters()).device

    def pixels(image: Image.Image) -> np.ndarray:
        return np.asarray(processor(image, return_tensors="np").pixel_values[0], dtype=np.float32)

    def tokens(captions: Sequence[str]) -> Any:
        return tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=spec.context_length, return_tensors="pt"
        ).to(device)

    def embed_text(captions: Sequence[str]) -> Tensor:
        found = tokens(captions)
        # SigLIP was trained with its padding, and is used without a mask.
        mask = {} if siglip else {"attention_mask": found.attention_mask}
        return _pooled(source.get_text_features(input_ids=found.input_ids, **mask))

    return Library(
        pixels=pixels,
        ids=lambda captions: tokens(captions).input_ids.cpu().numpy(),
        embed_image=lambda rows: _pooled(source.get_image_features(pixel_values=rows.to(device))),
        embed_text=embed_text,
    )


def _pooled(result: Any) -> Tensor:
    """The embedding, which newer releases of the library wrap."""
    embeds: Tensor = result if isinstance(result, Tensor) else result.pooler_output
    return embeds


def _open_clip(source: Any, folder: Path, spec: TextSpec) -> Library:
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    from uwm_deploy.towers.open_clip import CONFIG

    body = checkpoint.json_file(folder, CONFIG)
    size = body["model_cfg"]["vision_cfg"].get("image_size", 224)
    config = merge_preprocess_dict(PreprocessCfg(size=size), body.get("preprocess_cfg", {}))
    transform = image_transform_v2(PreprocessCfg(**config), is_train=False)
    tokenizer = SimpleTokenizer(context_length=spec.context_length)
    device = next(source.parameters()).device

    return Library(
        pixels=lambda image: transform(image).numpy(),
        ids=lambda captions: tokenizer(list(captions)).numpy(),
        embed_image=lambda rows: source.encode_image(rows.to(device), normalize=False),
        embed_text=lambda captions: source.encode_text(tokenizer(list(captions)).to(device), normalize=False),
    )
