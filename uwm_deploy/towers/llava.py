"""The vision tower of LLaVA-1.5: CLIP's, of which the language model reads the patch features of an earlier layer.

LLaVA has no text tower, so SafeGround cannot be measured on it alone. The recipe names a companion: the CLIP checkpoint
whose vision tower LLaVA began with. Its text tower and projections stand beside LLaVA's vision tower, unedited. The image
graph gives ``image_embeds``, for the evidence, and ``patch_features``, which LLaVA uses.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPModel

from uwm_deploy.errors import InputError
from uwm_deploy.recipes.recipe import Architecture
from uwm_deploy.records.files import whole_folder
from uwm_deploy.records.model import ImageSpec, TowerName
from uwm_deploy.records.tensor_file import all_tensors
from uwm_deploy.runtime.language import PATCH_FEATURES
from uwm_deploy.towers import checkpoint, hf_clip
from uwm_deploy.towers.preprocessing import image_spec
from uwm_deploy.towers.protocol import MAPS, LoadedModel, LoadedParts, ModuleTower

FAMILY = "llava"
FEATURES = PATCH_FEATURES
LAYER_KEY = "vision_feature_layer"
LLAVA_LAYER = -2
"""Select layer of LLaVA-1.5, for random weights, which come without a config."""


class _ImageGraph(nn.Module):
    """Pixels to embedding and patch features."""

    def __init__(self, model: CLIPModel, layer: int) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self.layer = layer

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) to (B, d), and to (B, patches, width) of the select layer without its class token."""
        return self.with_tokens(pixel_values)[0]

    def with_tokens(self, pixel_values: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """(B, 3, H, W) to the outputs of `forward`, and to the tokens (B, T, width) of the select layer."""
        output = self.vision_model(pixel_values=pixel_values, output_hidden_states=True)
        tokens = output.hidden_states[self.layer]
        return (self.visual_projection(output.pooler_output), tokens[:, 1:]), tokens


def from_folder(folder: Path, *, random: bool, companion: Path | None = None) -> LoadedParts:
    """Loads a LLaVA checkpoint's vision tower with its companion, or a folder that `LoadedParts.save` wrote.

    Args:
        folder: LLaVA checkpoint, or saved folder.
        random: Take only the architecture.
        companion: CLIP checkpoint with the text tower and both projections.

    Raises:
        InputError: See `towers.checkpoint`; if the vision towers differ in size, or the features are selected otherwise
            than by one layer without the class token.
    """
    body = checkpoint.config_of_type(folder, ("llava", "clip"), FAMILY)
    saved = body["model_type"] == "clip"
    base = folder if saved else companion
    if base is None:
        raise InputError(
            f"{folder.name} has no text tower to measure with", fix="name a CLIP checkpoint in model.companion"
        )
    if saved and LAYER_KEY not in body:
        raise InputError(f"{folder.name}/config.json has no {LAYER_KEY}", fix="use the LLaVA checkpoint")
    parts = hf_clip.from_folder(base, random=random)
    if not saved:
        _check_selection(folder, body)
        if not random:
            _replace_vision(parts.source, folder)
    return _with_features(parts, _hidden_state(parts.source, body[LAYER_KEY]))


def from_architecture(architecture: Architecture) -> LoadedParts:
    """Random weights; features as LLaVA-1.5 selects them."""
    parts = hf_clip.from_architecture(architecture)
    return _with_features(parts, _hidden_state(parts.source, LLAVA_LAYER))


def _hidden_state(model: nn.Module, layer: object) -> int:
    """Position of the select layer's output among the hidden states, counted from the front; 0 is the embedding."""
    return _state_of(layer, int(_clip(model).config.vision_config.num_hidden_layers))


def _state_of(layer: object, layers: int) -> int:
    states = layers + 1
    if not isinstance(layer, int) or not 1 <= (found := layer % states if layer < 0 else layer) < states:
        raise InputError(f"{LAYER_KEY} is {layer!r}", fix=f"use one layer of the {states - 1}")
    return found


def _clip(model: nn.Module) -> CLIPModel:
    assert isinstance(model, CLIPModel)
    return model


def _with_features(parts: LoadedParts, state: int) -> LoadedParts:
    """The CLIP model's parts with the second output; layers after the select layer cannot be edited."""
    model = _clip(parts.source)
    setattr(model.config, LAYER_KEY, state)
    reached = tuple(f"vision_model.encoder.layers.{i}." for i in range(state))
    parts.image_tower = ModuleTower(
        _ImageGraph(model, state),
        TowerName.IMAGE,
        parts.embed_dim,
        further=(FEATURES,),
        reaches=lambda name: name.startswith(reached),
    )
    return parts


def _check_selection(folder: Path, body: dict[str, Any]) -> None:
    strategy = body.get("vision_feature_select_strategy", "default")
    if strategy != "default" or LAYER_KEY not in body:
        raise InputError(
            f"{folder.name}/config.json selects features by {strategy!r}, layer {body.get(LAYER_KEY)}",
            fix="family llava knows one layer without its class token (`default`)",
        )


def _replace_vision(model: nn.Module, folder: Path) -> None:
    """Puts LLaVA's own vision weights in the place of the companion's."""
    target = _clip(model).vision_model
    wanted = dict(target.named_parameters())
    found: dict[str, Tensor] = {}
    for file in checkpoint.weight_files(folder):
        with checkpoint.opened_weights(file) as opened:
            found |= {n: opened.get_tensor(key) for key in opened.keys() if (n := vision_name(key))}  # noqa: SIM118
    if missing := sorted(set(wanted) - set(found)):
        raise InputError(f"checkpoint {folder.name} lacks {missing[0]} of its vision tower", fix="fetch it again")
    for name, parameter in wanted.items():
        if parameter.shape != found[name].shape:
            raise InputError(
                f"{name} has shape {tuple(found[name].shape)} in {folder.name}, {tuple(parameter.shape)} in the companion",
                fix="name the CLIP checkpoint it began with in model.companion",
            )
    checkpoint.check_finite(folder, found.items())
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])


def vision_name(key: str) -> str:
    """Name of a tensor inside the vision model, from one of the names in use; empty for tensors of other parts."""
    before, found, after = key.partition("vision_tower.")
    if not found or before not in ("", "model."):
        return ""
    return after.removeprefix("vision_model.")


def check_same_features(model: LoadedModel, llava: Path) -> None:
    """Checks that a LLaVA checkpoint's language model reads what the image tower of a model gives.

    Raises:
        InputError: If the model is of another family, or the features are of another layer or size.
    """
    if model.ref.family != FAMILY:
        raise InputError(
            f"a model of family {model.ref.family} gives no features for a language model",
            fix="use a recipe of family llava",
        )
    body = checkpoint.config_of_type(llava, ("llava",), FAMILY)
    _check_selection(llava, body)
    own = _clip(model.source).config
    vision = checkpoint.table(body.get("vision_config"), "vision_config")
    asked = _state_of(body[LAYER_KEY], int(vision.get("num_hidden_layers", 24)))
    for what, given, read in (
        ("layer", getattr(own, LAYER_KEY), asked),
        ("width", own.vision_config.hidden_size, vision.get("hidden_size", 1024)),
        ("image size", own.vision_config.image_size, vision.get("image_size", 336)),
        ("patch size", own.vision_config.patch_size, vision.get("patch_size", 14)),
    ):
        if given != read:
            raise InputError(
                f"{llava.name} reads features of {what} {read}, and the image tower gives {given}",
                fix="use the LLaVA checkpoint of the recipe",
            )
    check_same_images(model.ref.image, llava)


def check_same_images(spec: ImageSpec, llava: Path) -> None:
    """Checks that a LLaVA checkpoint prepares images as an image tower is given them.

    Args:
        spec: How the tower's images are prepared.
        llava: LLaVA checkpoint folder.

    Raises:
        InputError: If it prepares them otherwise: its language model would read features of other pixels.
    """
    own = image_spec(llava, "CLIP")
    for what in ("resize", "crop", "resample", "rescale", "mean", "std", "fit"):
        if (asked := getattr(own, what)) != (given := getattr(spec, what)):
            raise InputError(
                f"{llava.name} prepares images with {what} {asked}, and the image tower takes {given}",
                fix="name a companion whose images are prepared as the LLaVA checkpoint's are",
            )


def reads_of(llava: Path) -> Callable[[str], bool]:
    """Whether a LLaVA checkpoint's language model reads what a tensor makes, by its name inside the vision model.

    Raises:
        InputError: If its features are selected otherwise than by one layer without the class token.
    """
    body = checkpoint.config_of_type(llava, ("llava",), FAMILY)
    _check_selection(llava, body)
    layers = int(checkpoint.table(body.get("vision_config"), "vision_config").get("num_hidden_layers", 24))
    state = _state_of(body[LAYER_KEY], layers)
    parts = ("embeddings.", "pre_layrnorm.", *(f"encoder.layers.{i}." for i in range(state)))
    return lambda name: name.removeprefix("vision_model.").startswith(parts)


def vision_of_edited(edited: Path, llava: Path, *, family_only: bool = False) -> dict[str, Tensor]:
    """The vision weights of an edited model, for a LLaVA checkpoint.

    Args:
        edited: Saved edited model (`edit/model` of a run folder), or a checkpoint of CLIP such as Safe-CLIP's.
        llava: LLaVA checkpoint folder.
        family_only: Take only what a recipe of family llava made.

    Returns:
        Name inside the vision model to a tensor of any shape, in the dtype of its file.

    Raises:
        InputError: If one of the folders is of another kind, or the edit is behind the embeddings alone.
    """
    body = checkpoint.config_of_type(edited, ("clip",), FAMILY)
    if (edited / MAPS).is_file():
        raise InputError(
            f"{edited.name} has maps behind its embeddings, and LLaVA uses the inner features before them",
            fix="edit with --method uwm, which changes the layers that LLaVA uses",
        )
    _check_selection(llava, checkpoint.config_of_type(llava, ("llava",), FAMILY))
    if family_only and LAYER_KEY not in body:
        raise InputError(f"{edited.name} is no vision tower of LLaVA", fix="edit with a recipe of family llava")
    found: dict[str, Tensor] = {}
    for file in checkpoint.weight_files(edited):
        with checkpoint.opened_weights(file) as opened:
            ours = [key for key in opened.keys() if key.startswith("vision_model.")]  # noqa: SIM118 -- not a mapping
            found |= {key.removeprefix("vision_model."): opened.get_tensor(key) for key in ours}
    return found


def own_vision(llava: Path) -> dict[str, Tensor]:
    """The vision weights of a LLaVA checkpoint, any shape, in the dtype of its files, by the names that CLIP has."""
    found: dict[str, Tensor] = {}
    for file in checkpoint.weight_files(llava):
        with checkpoint.opened_weights(file) as opened:
            for key in opened.keys():  # noqa: SIM118 -- not a mapping
                if name := vision_name(key):
                    found[f"vision_model.{name}"] = opened.get_tensor(key)
    return found


def put_vision(model: nn.Module, new: dict[str, Tensor], edited: Path, reads: Callable[[str], bool]) -> int:
    """Puts vision weights into a loaded LLaVA model.

    Args:
        model: LLaVA of `transformers`; changed.
        new: See `vision_of_edited`: tensors of any shape and any dtype.
        edited: Where they are from, for messages.
        reads: See `reads_of`.

    Returns:
        Number of tensors whose values changed and that its language model reads.

    Raises:
        InputError: If they do not fit, or nothing that is read changed.
    """
    reached = 0
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not (name := vision_name(key)):
                continue
            if name not in new or new[name].shape != parameter.shape:
                raise InputError(f"{key} does not fit {edited.name}", fix="edit this very checkpoint")
            value = new[name].to(parameter.dtype).to(parameter.device)
            reached += reads(name) and not torch.equal(value, parameter)
            parameter.copy_(value)
    if not reached:
        raise nothing_reaches(edited)
    return reached


def nothing_reaches(edited: Path) -> InputError:
    """The error for an edit that the language model would not notice."""
    return InputError(
        f"{edited.name} has the same weights as the checkpoint in every layer that its language model reads",
        fix="edit with --method uwm and a recipe of family llava, which changes those layers",
    )


def swap_vision_tower(edited: Path, llava: Path, out: Path, progress: Callable[[str, int, int], None]) -> int:
    """Writes a LLaVA checkpoint with an edited vision tower; every other tensor and file stays as it is.

    Args:
        edited: Saved edited model (`edit/model` of a run folder).
        llava: LLaVA checkpoint folder.
        out: New folder, whole or not at all.
        progress: Called with what is counted, the number done and the total, after each file.

    Returns:
        Number of tensors whose values changed.

    Raises:
        InputError: If one of the folders is of another kind, they do not fit each other, or the edit does not reach the
            layers that LLaVA uses.
    """
    new = vision_of_edited(edited, llava, family_only=True)
    reads = reads_of(llava)
    if out.exists():
        raise InputError(f"{out} exists", fix="choose another --out")
    files, changed, reached, placed = checkpoint.weight_files(llava), 0, 0, set()
    with whole_folder(out) as folder:
        for position, file in enumerate(files):
            with checkpoint.opened_weights(file) as opened:
                tensors = all_tensors(opened)
            ours = {key: name for key in tensors if (name := vision_name(key))}
            for key, name in ours.items():
                if name not in new or new[name].shape != tensors[key].shape:
                    raise InputError(f"{key} does not fit {edited.name}", fix="edit this very checkpoint")
                value = new[name].to(tensors[key].dtype)
                differs = not torch.equal(value, tensors[key])
                changed, reached = changed + differs, reached + (differs and reads(name))
                tensors[key] = value
            placed |= set(ours.values())
            if ours:
                save_file(tensors, folder / file.name, metadata={"format": "pt"})
            else:
                shutil.copyfile(file, folder / file.name)
            progress("checkpoint files", position + 1, len(files))
        if missing := sorted(set(new) - placed):
            raise InputError(f"{llava.name} has no {missing[0]} in its vision tower", fix="edit this very checkpoint")
        if not reached:
            raise nothing_reaches(edited)
        for side in sorted(llava.iterdir()):
            if side.is_file() and side.suffix in (".json", ".txt", ".model", ".jinja"):
                shutil.copyfile(side, folder / side.name)
    return changed
