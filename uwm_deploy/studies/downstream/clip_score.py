"""CLIP score of pictures by the original model, before any edit: cosine to the prompt, percent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from uwm_deploy.errors import InputError, PrerequisiteError
from uwm_deploy.recipes import shipped
from uwm_deploy.recipes.resolve import recipe_of
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.runtime.image import pixels_from_image
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.towers.load import load_model
from uwm_deploy.towers.protocol import LoadedModel


def original_model(record: EditRecord | None, given: Path | None, device: str) -> LoadedModel | None:
    """The model before the edit, which scores.

    Args:
        record: Of the edit, which names the model; None takes what is given.
        given: Its folder; None looks for it where the recipe's weights are on this machine.
        device: Where it computes.

    Returns:
        None where it is not on this machine.

    Raises:
        InputError: If what is given is not the model that was edited.
    """
    if given is None:
        if record is None:
            return None
        try:
            given = shipped.checkpoint_folder(record.model.repo, record.model.revision, local_only=True)
        except (InputError, PrerequisiteError):
            return None
    model = load_model(recipe_of(str(given))[0], folder=given, device=device)
    if record is not None and model.ref.weights_digest != record.model.weights_digest:
        raise InputError(f"{given.name} is not the model that was edited", fix="pass its folder with --clip")
    return model


def clip_scores(model: LoadedModel, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
    """Scores by a model's own preprocessing and towers; below 0 counts as 0, as the metric is defined.

    Args:
        model: The model before the edit.
        images: n pictures.
        texts: n prompts.

    Returns:
        (n,) float64, 0 to 100.
    """
    pixels = np.stack([pixels_from_image(image, model.ref.image) for image in images])
    ids = Tokenizer(model.tokenizer_json, model.ref.text).encode(list(texts))
    device = next(model.source.parameters()).device
    with torch.inference_mode():
        left = model.image.embed(torch.from_numpy(pixels).to(device))
        right = model.text.embed(torch.from_numpy(ids).to(device))
    cosines = np.asarray(torch.nn.functional.cosine_similarity(left.double(), right.double()).cpu())
    return np.asarray(100 * np.maximum(cosines, 0.0))
