"""Layouts in which other libraries load an edited model, made from the folder that stage `edit` saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from open_clip import create_model_from_pretrained
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel

from uwm_deploy.errors import ContractError, InputError
from uwm_deploy.records.model import ImageSpec, TextSpec, TowerName
from uwm_deploy.towers import open_clip
from uwm_deploy.towers.clip_vocabulary import clip_vocabulary
from uwm_deploy.towers.protocol import LoadedModel

LibraryLayout = Literal["transformers", "open-clip", "sentence-transformers", "diffusers-text-encoder"]
LAYOUTS: tuple[LibraryLayout, ...] = get_args(LibraryLayout)

_OWN: dict[str, LibraryLayout] = {
    "hf-clip": "transformers", "siglip": "transformers", "llava": "transformers", "open-clip": "open-clip",
}  # fmt: skip
"""Layout of the folder that stage `edit` saves."""

_TOLERANCE = 1e-4
"""Tolerance between two float32 implementations of one model, in the entries of embeddings of length 1."""


def write_layout(model: LoadedModel, source: Path, layout: LibraryLayout, folder: Path) -> None:
    """Writes an edited model as another library's folder.

    Args:
        model: The edited model.
        source: Folder that it was loaded from.
        layout: The layout to write.
        folder: Existing and empty.

    Raises:
        InputError: If the model cannot be written in that layout.
        ContractError: If the written model embeds otherwise than the model.
    """
    family = model.ref.family
    if model.maps:
        _check_holds_maps(family, layout)
    if layout == _OWN[family]:
        _copy(source, folder)
    elif family != "hf-clip":
        raise InputError(
            f"a model of family {family} cannot be written as {layout}",
            fix=f"use --as {_OWN[family]}; the others are for Hugging Face CLIP models",
        )
    else:
        writers: dict[LibraryLayout, Callable[[LoadedModel, Path, Path], None]] = {
            "open-clip": _write_open_clip,
            "sentence-transformers": _write_sentence_transformers,
            "diffusers-text-encoder": _write_text_encoder,
        }
        writers[layout](model, source, folder)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        file.chmod(0o644)  # libraries save with the writer's private mode


def _check_holds_maps(family: str, layout: LibraryLayout) -> None:
    """Refuses layouts without a place for a map behind the embedding.

    Raises:
        InputError: If it is one of them.
    """
    if layout == _WITH_MAPS and family == "hf-clip":
        return
    what = f"the layout {layout} has no place for a map behind the embedding"
    if layout == _WITH_MAPS:
        what = f"a model of family {family} cannot be written as {layout}"
    others = {
        "hf-clip": f"use --as {_WITH_MAPS} or a bundle, or edit again with --placement weights",
        "open-clip": "use a bundle, or edit again with --placement weights",
    }
    raise InputError(what, fix=others.get(family, "use a bundle"))


_WITH_MAPS: LibraryLayout = "sentence-transformers"
"""The layout that has a place for a map behind the embedding."""


def _copy(source: Path, folder: Path, names: tuple[str, ...] = ()) -> None:
    """Copies the files of a folder; with names, only those of these files that are there."""
    folder.mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and (file.name in names or not names):
            shutil.copyfile(file, folder / file.name)


def _write_sentence_transformers(model: LoadedModel, source: Path, folder: Path) -> None:
    """The same folder with the list of modules that sentence-transformers reads; embeddings get length 1."""
    _copy(source, folder)
    kinds = [("", "CLIPModel"), ("1_Normalize", "Normalize")]
    if model.maps:
        kinds += [("2_Router", "Router"), ("3_Normalize", "Normalize")]
        _write_router(model, folder / "2_Router")
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"{_MODULES}.{kind}"} for n, (path, kind) in enumerate(kinds)
    ]
    for path, kind in kinds:
        if kind == "Normalize":
            (folder / path).mkdir()
            _write_json(folder / path / "config.json", {})
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})


_MODULES = "sentence_transformers.models"


def _write_router(model: LoadedModel, folder: Path) -> None:
    """The maps as linear layers, routed by modality; without a default route, since the other map would be wrong."""
    names = {tower: f"{tower.value}_0_Dense" for tower in TowerName}
    for tower, name in names.items():
        (folder / name).mkdir(parents=True)
        size = {"in_features": model.ref.embed_dim, "out_features": model.ref.embed_dim}
        config = {**size, "bias": True, "activation_function": "torch.nn.modules.linear.Identity"}
        _write_json(folder / name / "config.json", config)
        state = {f"linear.{key}": tensor.detach().cpu() for key, tensor in model.maps[tower].state_dict().items()}
        save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
    body = {
        "types": dict.fromkeys(names.values(), f"{_MODULES}.Dense"),
        "structure": {tower.value: [name] for tower, name in names.items()},
        "parameters": {
            "default_route": None,
            "allow_empty_key": False,
            "route_mappings": {f"(None, '{tower.value}')": tower.value for tower in TowerName},
        },
    }
    _write_json(folder / "router_config.json", body)


def _write_text_encoder(model: LoadedModel, source: Path, folder: Path) -> None:
    """Folders `text_encoder` and `tokenizer` of a Stable Diffusion pipeline of diffusers."""
    clip = _clip(model)
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(text_state(clip, encoder))
    encoder.save_pretrained(folder / "text_encoder")
    _copy(source, folder / "tokenizer", _TOKENIZER_FILES)


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


def text_state(source: CLIPModel, encoder: nn.Module) -> dict[str, Tensor]:
    """Weights of the text encoder, which the whole model names with or without the prefix `text_model.`.

    Args:
        source: The whole model.
        encoder: The text encoder that they are for.

    Returns:
        The encoder's name to a tensor of any shape, in the dtype of the model.
    """
    state = source.state_dict()
    found = {name: state.get(name, state.get(f"text_model.{name}")) for name in encoder.state_dict()}
    if missing := [name for name, tensor in found.items() if tensor is None]:
        raise ContractError(f"the text encoder's {missing[0]} is not in the model", fix="report this")
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _write_open_clip(model: LoadedModel, source: Path, folder: Path) -> None:
    """open_clip's own architecture with the same weights, checked on random inputs."""
    clip = _clip(model)
    own_tokenizer = _is_openai_vocabulary(model)
    config = {
        "model_cfg": _open_clip_config(clip, model.ref.text, own_tokenizer=own_tokenizer),
        "preprocess_cfg": _preprocess(model.ref.image),
    }
    _write_json(folder / open_clip.CONFIG, config)
    save_file(_open_clip_state(clip), folder / open_clip.WEIGHTS, metadata={"format": "pt"})
    if not own_tokenizer:
        _copy(source, folder, _TOKENIZER_FILES)
    _check_open_clip(model, folder)


def _clip(model: LoadedModel) -> CLIPModel:
    assert isinstance(model.source, CLIPModel)
    return model.source


def _is_openai_vocabulary(model: LoadedModel) -> bool:
    """Whether the model has the vocabulary of open_clip's built-in tokenizer."""
    vocabulary, _ = clip_vocabulary("<|startoftext|>", "<|endoftext|>")
    return bool(json.loads(model.tokenizer_json)["model"]["vocab"] == vocabulary)


def _open_clip_config(source: CLIPModel, text: TextSpec, *, own_tokenizer: bool) -> dict[str, Any]:
    texts, images = source.config.text_config, source.config.vision_config
    if texts.hidden_act != images.hidden_act or texts.hidden_act not in ("quick_gelu", "gelu"):
        raise InputError(f"open_clip has no activation {texts.hidden_act}", fix="use --as transformers")
    norms = [{"eps": part.layer_norm_eps} for part in (images, texts)]
    config: dict[str, Any] = {
        "embed_dim": source.config.projection_dim,
        "quick_gelu": texts.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": images.image_size,
            "layers": images.num_hidden_layers,
            "width": images.hidden_size,
            "head_width": images.hidden_size // images.num_attention_heads,
            "mlp_ratio": images.intermediate_size / images.hidden_size,
            "patch_size": images.patch_size,
            "norm_kwargs": norms[0],
        },
        "text_cfg": {
            "context_length": texts.max_position_embeddings,
            "vocab_size": texts.vocab_size,
            "width": texts.hidden_size,
            "heads": texts.num_attention_heads,
            "layers": texts.num_hidden_layers,
            "mlp_ratio": texts.intermediate_size / texts.hidden_size,
            "norm_kwargs": norms[1],
        },
    }
    if text.eos_id != texts.vocab_size - 1:  # otherwise the largest id is the end token, as open_clip assumes
        config["text_cfg"] |= {"pool_type": "eos", "eos_id": text.eos_id}
    if not own_tokenizer:
        config["text_cfg"]["hf_tokenizer_name"] = "."  # open_clip takes the folder itself for a local one
    return config


def _preprocess(image: ImageSpec) -> dict[str, Any]:
    if image.resize != image.crop or image.fit != "crop":
        raise InputError("open_clip cannot resize to one size and crop to another", fix="use --as transformers")
    return {
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": image.resample,
        "resize_mode": "shortest",
    }


_BLOCK = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
_OUTSIDE = {
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "logit_scale": "logit_scale",
}
_TURNED = ("visual_projection.weight", "text_projection.weight")
"""Weights that open_clip stores as (in, out), transformers as (out, in)."""


def _open_clip_state(source: CLIPModel) -> dict[str, Tensor]:
    """The weights under open_clip's names."""
    state = {name: p.detach().cpu() for name, p in source.named_parameters()}
    found = {
        new + end: (state[old + end].T if old in _TURNED else state[old + end])
        for old, new in _OUTSIDE.items()
        for end in ("", ".weight", ".bias")
        if old + end in state
    }
    for side, prefix in (("vision_model", "visual.transformer"), ("text_model", "transformer")):
        part = getattr(source.config, "vision_config" if side == "vision_model" else "text_config")
        for layer in range(part.num_hidden_layers):
            here, there = f"{side}.encoder.layers.{layer}", f"{prefix}.resblocks.{layer}"
            for end in ("weight", "bias"):
                found |= {f"{there}.{new}.{end}": state[f"{here}.{old}.{end}"] for old, new in _BLOCK.items()}
                parts = [state[f"{here}.self_attn.{one}_proj.{end}"] for one in ("q", "k", "v")]
                found[f"{there}.attn.in_proj_{end}"] = torch.cat(parts)
    return {name: tensor.contiguous() for name, tensor in found.items()}


@torch.no_grad()
def _check_open_clip(model: LoadedModel, folder: Path) -> None:
    """Loads the written folder with open_clip itself, and compares embeddings of random inputs."""
    loaded: Any = create_model_from_pretrained(f"local-dir:{folder}", return_transform=False).float().eval()
    rng, text, side = torch.Generator().manual_seed(0), model.ref.text, model.ref.image.crop
    pixels = torch.randn(2, 3, side, side, generator=rng)
    ids = torch.randint(0, text.eos_id, (2, text.context_length), generator=rng)
    ids[:, text.context_length // 2 :] = text.eos_id
    pairs = (
        (loaded.encode_image(pixels), model.image.embed(pixels)),
        (loaded.encode_text(ids), model.text.embed(ids)),
    )
    for theirs, ours in pairs:
        apart = float((nn.functional.normalize(theirs) - nn.functional.normalize(ours)).abs().max())
        if not apart < _TOLERANCE:
            raise ContractError(f"open_clip embeds otherwise by up to {apart:.2g}", fix="report this")


def _write_json(path: Path, body: object) -> None:
    path.write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", encoding="utf-8")
