"""Every shipped recipe at reduced size: the same family, activation and text rules, two layers, random weights."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.recipe import Architecture, Recipe, recipe_from_toml

if TYPE_CHECKING:
    from uwm_deploy.towers.protocol import LoadedModel

NAMES = tuple(name for name in resources.names("export") if name != "demo")
FAMILIES = (
    "clip-vit-l14",
    "siglip-base",
    "siglip2-base",
    "open-clip-vit-b32",
    "dfn-vit-h14",
    "coca-vit-l14",
    "llava-1.5-7b",
)
"""One recipe per way of being built."""
SIBLINGS = ("dfn-vit-h14", "siglip2-base")
"""Those of them that differ from another one in activation, tokenizer and sizes alone."""
QUICK_FAMILIES = tuple(pytest.param(name, marks=[pytest.mark.slow] * (name in SIBLINGS)) for name in FAMILIES)
"""All of them, for tests that are about how a tower is put together."""

_HF = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_OPEN_CLIP = {"layers": 2, "width": 64}


def recipe_of(name: str) -> Recipe:
    """A shipped recipe."""
    text, where = resources.read_toml("export", name)
    return recipe_from_toml(text, where=where)


def reduced(name: str) -> Recipe:
    """The recipe with towers of two narrow layers."""
    recipe = recipe_of(name)
    whole = recipe.model.architecture
    assert whole is not None
    if recipe.model.family == "open-clip":
        text, image = {"heads": 4, **_OPEN_CLIP}, {"head_width": 16, "image_size": 56, "patch_size": 14, **_OPEN_CLIP}
        small = Architecture(open_clip=_with_a_small_decoder(whole.open_clip), text=text, image=image)
    else:
        image = {**whole.image, **_HF, "image_size": 32, "patch_size": 8}
        small = dataclasses.replace(
            whole, text={**whole.text, **_HF}, image=image, projection_dim=16 if whole.projection_dim else 0
        )
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, architecture=small))


@cache
def _with_a_small_decoder(name: str) -> str:
    """A configuration whose captioning decoder, which nobody exports, is one narrow layer: 60 million weights fewer."""
    if not name.startswith("coca"):
        return name
    from open_clip import add_model_config

    small = Path(__file__).parent / "open_clip_configs" / f"small_decoder_{name}.json"
    add_model_config(small)
    return small.stem


@cache
def model_of(name: str) -> LoadedModel:
    """The reduced model; not to be changed."""
    from uwm_deploy.towers.load import load_model

    return load_model(reduced(name), folder=None, weights="random", device="cpu")
