"""The vision tower of LLaVA: read from its checkpoint, edited, and put back; against `transformers`' own LLaVA."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers  # its classes are imported when they are asked for

from tests.families import reduced
from uwm_deploy.errors import InputError
from uwm_deploy.recipes.recipe import Recipe
from uwm_deploy.towers.load import load_model

VISION = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "projection_dim": 16,
}  # fmt: skip
LANGUAGE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "vocab_size": 64,
}  # fmt: skip


def llava(folder: Path, **changes: Any) -> Path:
    """A tiny LLaVA checkpoint in half precision, as the published ones are."""
    torch.manual_seed(1)
    config = transformers.LlavaConfig(vision_config=VISION, text_config=LANGUAGE, image_token_index=63, **changes)
    model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """A reduced recipe with three layers in the vision tower."""
    small = reduced("llava-1.5-7b")
    assert small.model.architecture is not None
    image = {**small.model.architecture.image, "num_hidden_layers": 3}
    architecture = dataclasses.replace(small.model.architecture, image=image)
    return dataclasses.replace(small, model=dataclasses.replace(small.model, architecture=architecture))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> tuple[Path, Path]:
    """A LLaVA checkpoint and the CLIP checkpoint beside it."""
    root = tmp_path_factory.mktemp("llava")
    load_model(recipe, folder=None, weights="random", device="cpu").save(root / "clip")
    config = json.loads((root / "clip" / "config.json").read_text())
    (root / "clip" / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "vision_feature_layer"})
    )
    return llava(root / "llava"), root / "clip"


def features_of(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """What LLaVA gives to its projector."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return states[model.config.vision_feature_layer][:, 1:]


def test_patch_features_are_those_of_llava(folders: tuple[Path, Path], recipe: Recipe) -> None:
    """Weights come from LLaVA, not from the companion; the second output is what its projector gets."""
    checkpoint, companion = folders
    model = load_model(recipe, folder=checkpoint, companion=companion, device="cpu")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = model.image.outputs(pixels)[1]
    torch.testing.assert_close(features, features_of(checkpoint, pixels), atol=1e-5, rtol=1e-5)
    alone = load_model(recipe, folder=None, weights="random", device="cpu")
    with torch.inference_mode():
        assert not torch.allclose(alone.image.outputs(pixels)[1], features, atol=1e-2)


def test_only_layers_up_to_the_select_layer_can_be_edited(folders: tuple[Path, Path], recipe: Recipe) -> None:
    """What comes after the select layer never reaches the language model."""
    model = load_model(recipe, folder=folders[0], companion=folders[1], device="cpu")
    assert list(model.image.layers(["*.mlp.fc2"])) == [f"vision_model.encoder.layers.{i}.mlp.fc2" for i in (0, 1)]
    with pytest.raises(InputError, match="matches no linear layer"):
        model.image.layers(["vision_model.encoder.layers.2.mlp.fc2"])


def test_edited_tower_goes_back_into_llava(folders: tuple[Path, Path], recipe: Recipe, tmp_path: Path) -> None:
    """The swapped checkpoint computes the edited features; every tensor that was not edited is bit-equal."""
    from uwm_deploy.towers.llava import swap_vision_tower, vision_name

    checkpoint, companion = folders
    model = load_model(recipe, folder=checkpoint, companion=companion, device="cpu")
    layer = "vision_model.encoder.layers.1.mlp.fc2"
    with torch.no_grad():
        model.source.get_parameter(f"{layer}.weight").view(-1)[::7] *= -1
    model.save(tmp_path / "edited")
    again = load_model(recipe, folder=tmp_path / "edited", device="cpu")
    assert swap_vision_tower(tmp_path / "edited", checkpoint, tmp_path / "safe", lambda *_: None) == 1
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(
            features_of(tmp_path / "safe", pixels), again.image.outputs(pixels)[1], atol=1e-5, rtol=1e-5
        )
        original = features_of(checkpoint, pixels)
        assert (features_of(tmp_path / "safe", pixels) - original).abs().max() > 1e-2
    before, after = (
        transformers.LlavaForConditionalGeneration.from_pretrained(f).state_dict()
        for f in (checkpoint, tmp_path / "safe")
    )
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert [vision_name(name) for name in changed] == ["encoder.layers.1.mlp.fc2.weight"]
    assert {t.dtype for t in after.values()} == {torch.float16}


@pytest.mark.parametrize("key", ["vision_tower.vision_model.a", "vision_tower.a", "model.vision_tower.a"])
def test_every_layout_of_names_is_known(key: str) -> None:
    """Published files, older and newer ones, differ in the prefix."""
    from uwm_deploy.towers.llava import vision_name

    assert vision_name(key) == "a"
    assert not vision_name("language_model.model.layers.0.mlp.fc2.weight")


def test_refusals(folders: tuple[Path, Path], recipe: Recipe, tmp_path: Path) -> None:
    """No companion, one of another size, another way of selecting features, a tower that is not LLaVA's."""
    from uwm_deploy.towers.llava import swap_vision_tower

    checkpoint, companion = folders
    with pytest.raises(InputError, match="no text tower"):
        load_model(recipe, folder=checkpoint, device="cpu")
    with pytest.raises(InputError, match="no vision_feature_layer"):
        load_model(recipe, folder=companion, device="cpu")
    wider = dataclasses.replace(recipe, model=reduced("clip-vit-l14").model)
    wider_image = {**VISION, "hidden_size": 48, "num_hidden_layers": 3}
    assert wider.model.architecture is not None
    architecture = dataclasses.replace(
        wider.model.architecture,
        image={k: v for k, v in wider_image.items() if k not in ("model_type", "projection_dim")},
    )
    wider = dataclasses.replace(wider, model=dataclasses.replace(wider.model, architecture=architecture))
    load_model(wider, folder=None, weights="random", device="cpu").save(tmp_path / "wider")
    with pytest.raises(InputError, match="has shape"):
        load_model(recipe, folder=checkpoint, companion=tmp_path / "wider", device="cpu")
    whole = llava(tmp_path / "whole", vision_feature_select_strategy="full")
    with pytest.raises(InputError, match="selects features by 'full'"):
        load_model(recipe, folder=whole, companion=companion, device="cpu")
    with pytest.raises(InputError, match="no vision tower of LLaVA"):
        swap_vision_tower(companion, checkpoint, tmp_path / "out", lambda *_: None)
    load_model(recipe, folder=checkpoint, companion=companion, device="cpu").save(tmp_path / "saved")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists"):
        swap_vision_tower(tmp_path / "saved", checkpoint, tmp_path / "there", lambda *_: None)
    assert not (tmp_path / "out").exists()
