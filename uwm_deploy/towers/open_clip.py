"""open_clip's CLIP and CoCa: the towers that open_clip builds itself, with the vocabulary that it ships."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg, CoCa, CustomTextCLIP, get_model_config
from open_clip.coca_model import MultimodalCfg
from open_clip.factory import load_checkpoint
from open_clip.transformer import text_global_pool
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTokenizer

from uwm_deploy.errors import InputError
from uwm_deploy.recipes.recipe import Architecture
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.model import ImageSpec, TextSpec, TowerName
from uwm_deploy.towers import checkpoint, preprocessing
from uwm_deploy.towers.attention import make_attention_explicit
from uwm_deploy.towers.clip_vocabulary import clip_vocabulary
from uwm_deploy.towers.entries import check_entries, entries_of
from uwm_deploy.towers.hf_clip import MEAN, STD
from uwm_deploy.towers.protocol import (
    LastMap,
    LoadedParts,
    ModuleTower,
    ValidTokens,
    caption_tokens,
    jitter,
)
from uwm_deploy.towers.refusal import refusals

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_WEIGHT_NAMES = (WEIGHTS, "open_clip_pytorch_model.safetensors", "model.safetensors")
_START, _END = "<start_of_text>", "<end_of_text>"
_WORDS = rf"{_START}|{_END}|'[s\u017f]|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}\u0345]+"
"""How captions in lower case are split. open_clip's own pattern does not mind case, which after lower-casing says something
of two characters only: the long s is an s, and the iota below a letter is in no word at all."""


def _first(result: Any) -> Tensor:
    """The embedding, from a tower that may give its tokens, too."""
    embeds: Tensor = result[0] if isinstance(result, tuple) else result
    return embeds


class _ImageGraph(nn.Module):
    """Pixels to embedding; the tokens that CoCa's tower gives, too, are dropped."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.visual: Any = model.visual

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, d)."""
        return _first(self.visual(pixel_values))

    def with_tokens(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) to (B, d), and to the tokens (B, T, width) that its tower gives when it is asked to."""
        if not hasattr(self.visual, "output_tokens"):
            raise InputError("this vision tower gives no tokens, which a safety head needs", fix="use a ViT")
        before = self.visual.output_tokens
        self.visual.output_tokens = True
        try:
            embeds, tokens = self.visual(pixel_values)
        finally:
            self.visual.output_tokens = before
        return embeds, tokens


class _CustomTextGraph(nn.Module):
    """Ids to embedding, through a text tower that is a module of its own. Rows have full length."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.text: Any = model.text

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) to (B, d)."""
        return _first(self.text(input_ids))


class _TextGraph(nn.Module):
    """Ids to embedding, through a text tower whose parts lie in the model itself.

    The computation is written out because the model's own method takes rows of full length only. With causal attention
    padding changes nothing, so short batches need not be padded.
    """

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.token_embedding, self.positional_embedding = model.token_embedding, model.positional_embedding
        self.transformer, self.ln_final, self.text_projection = (
            model.transformer, model.ln_final, model.text_projection,
        )  # fmt: skip
        self.attn_mask: Tensor | None
        self.register_buffer("attn_mask", model.attn_mask, persistent=False)  # None where captions see what follows
        self._pool, self._end = model.text_pool_type, getattr(model, "text_eos_id", None)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) to (B, d)."""
        length = input_ids.shape[1]
        rows = self.token_embedding(input_ids) + self.positional_embedding[:length]
        mask = None if self.attn_mask is None else self.attn_mask[:length, :length]
        rows = self.ln_final(self.transformer(rows, attn_mask=mask))
        pooled: Tensor = text_global_pool(rows, input_ids, self._pool, eos_token_id=self._end)
        if self.text_projection is None:
            return pooled
        linear = isinstance(self.text_projection, nn.Linear)
        embeds: Tensor = self.text_projection(pooled) if linear else pooled @ self.text_projection
        return embeds


def from_folder(folder: Path, *, random: bool) -> LoadedParts:
    """Loads a folder in the layout of open_clip's hub repositories, or only its architecture.

    Raises:
        InputError: See `towers.checkpoint`; and for towers that open_clip takes from another library.
    """
    config, preprocess = _config_of(folder)
    if not random:
        _check_amount(folder, config)
    with refusals(f"{folder.name}/{CONFIG}: open_clip cannot make its model_cfg"):
        model = _model(config)
    if random:
        jitter(model)
    else:
        _load_weights(model, folder)
    return _parts(model, config, preprocess, f"{folder.name}/{CONFIG}")


def _config_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two tables of the config file, with entries that open_clip knows, of the type that it expects.

    open_clip itself checks no type, and takes the text "false" for true.
    """
    where, body = f"{folder.name}/{CONFIG}", checkpoint.json_file(folder, CONFIG)
    config = checkpoint.table(body.get("model_cfg"), f"{where}: model_cfg")
    for key, kind in _TABLES.items():
        if key in config or key != "multimodal_cfg":
            part = checkpoint.table(config.get(key), f"{where}: model_cfg.{key}")
            check_entries(part, entries_of(kind), f"{where}: model_cfg.{key}")
    if "embed_dim" not in config:
        raise InputError(f"{where}: model_cfg has no embed_dim", fix="name the size of the shared embedding space")
    check_entries(config, _MODEL_ENTRIES, f"{where}: model_cfg")
    text, vision = config["text_cfg"], config["vision_cfg"]
    if text.get("hf_model_name") or text.get("hf_tokenizer_name") or vision.get("timm_model_name"):
        raise InputError(
            f"{where} has a tower or a tokenizer of another library",
            fix="use its Hugging Face version, if there is one",
        )
    if text.get("tokenizer_kwargs"):
        raise InputError(
            f"{where}: model_cfg.text_cfg.tokenizer_kwargs asks for captions that are cleaned in another way",
            fix="use a checkpoint with the usual tokenizer",
        )
    return config, checkpoint.table(body.get("preprocess_cfg") or {}, f"{where}: preprocess_cfg")


_TABLES: dict[str, type] = {"text_cfg": CLIPTextCfg, "vision_cfg": CLIPVisionCfg, "multimodal_cfg": MultimodalCfg}
_MODEL_ENTRIES: dict[str, Any] = {
    "embed_dim": int, "quick_gelu": bool, "custom_text": bool, "init_logit_scale": float,
    "init_logit_bias": float | None, "nonscalar_logit_scale": bool, "pad_id": int, "output_dict": bool,
    "text_cfg": dict, "vision_cfg": dict, "multimodal_cfg": dict,
}  # fmt: skip


def _check_amount(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses a config of another size than the weights: open_clip makes the model before it compares."""
    for part in _TABLES:
        layers = config.get(part, {}).get("layers", 0)
        for count in layers if isinstance(layers, list) else [layers]:
            checkpoint.check_layers(folder, count, f"{folder.name}/{CONFIG}: model_cfg.{part}.layers")
    checkpoint.check_amount(folder, CONFIG, lambda: _model(config))


def from_architecture(architecture: Architecture) -> LoadedParts:
    """Random weights for one of open_clip's own configurations."""
    config = get_model_config(architecture.open_clip)
    if config is None:
        raise InputError(
            f"open_clip has no configuration {architecture.open_clip!r}", fix="see open_clip.list_models()"
        )
    config["text_cfg"] |= architecture.text
    config["vision_cfg"] |= architecture.image
    model = _model(config)
    jitter(model)
    return _parts(model, config, {}, f"open_clip's {architecture.open_clip}")


def _model(config: Mapping[str, Any]) -> nn.Module:
    kinds = {"coca": CoCa, "custom": CustomTextCLIP, "plain": CLIP}
    kind = "coca" if "multimodal_cfg" in config else "custom" if config.get("custom_text") else "plain"
    arguments = {key: value for key, value in copy.deepcopy(dict(config)).items() if key != "custom_text"}
    torch.manual_seed(0)
    model: nn.Module = kinds[kind](**arguments).float().eval()
    if isinstance(model, CoCa):  # open_clip leaves this one uninitialised, and it may hold NaN
        projection = model.text_decoder.text_projection
        nn.init.normal_(projection, std=projection.shape[0] ** -0.5, generator=torch.Generator().manual_seed(0))
    return model


def _load_weights(model: nn.Module, folder: Path) -> None:
    names = {file.name: file for file in checkpoint.weight_files(folder)}
    file = next((names[name] for name in _WEIGHT_NAMES if name in names), None)
    if file is None:
        raise InputError(f"checkpoint {folder.name} has none of {', '.join(_WEIGHT_NAMES)}", fix="use a complete one")
    with checkpoint.fits(folder, CONFIG):
        load_checkpoint(model, str(file))
    checkpoint.check_finite(folder, model.named_parameters())


def _parts(model: nn.Module, config: dict[str, Any], preprocess: dict[str, Any], where: str) -> LoadedParts:
    with refusals(f"{where}: its attention is not supported", fix="use a model with open_clip's usual attention"):
        make_attention_explicit(model)
    positions = int(config["text_cfg"].get("context_length", 77))
    plain = isinstance(model, CLIP)
    spec, content = _text_spec(positions, fixed_length=not plain or not _pools_at_end(model))
    dim = int(config["embed_dim"])
    text_graph = _TextGraph(model) if plain else _CustomTextGraph(model)
    image = _image_spec(config, preprocess, where)
    visual: Any = model.visual
    preprocessing.check_side(image, visual.image_size, f"{where}: model_cfg.vision_cfg.image_size")

    def save(target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        body = {"model_cfg": config, "preprocess_cfg": _preprocess_config(image)}
        (target / CONFIG).write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        checkpoint.readable(target)

    return LoadedParts(
        source=model,
        image_tower=ModuleTower(_ImageGraph(model), TowerName.IMAGE, dim, last_map=_last_map_of_images(model)),
        text_tower=ModuleTower(
            text_graph,
            TowerName.TEXT,
            dim,
            _valid_tokens(model, spec),
            pools_at_end=_pools_at_end(model),
            last_map=_last_map(model, "" if plain else "text.", "text_projection", "ln_final"),
        ),
        image=image,
        text=spec,
        embed_dim=dim,
        tokenizer_json=content,
        save=save,
        architecture="coca" if isinstance(model, CoCa) else "clip",
    )


def _pools_at_end(model: Any) -> bool:
    """Whether what follows the end token changes nothing, so that a row may be cut there."""
    if isinstance(model, CoCa):
        return False
    text = model if isinstance(model, CLIP) else model.text
    pool = model.text_pool_type if isinstance(model, CLIP) else text.pool_type
    return text.attn_mask is not None and pool in ("argmax", "eos")


def _last_map_of_images(model: nn.Module) -> LastMap | None:
    """None where another module than a LayerNorm is right before the projection."""
    if getattr(model.visual, "attn_pool_contrastive", None) is not None:
        return None
    return _last_map(model, "visual.", "proj", "ln_post")


def _last_map(model: nn.Module, prefix: str, projection: str, norm: str) -> LastMap | None:
    """The projection behind a LayerNorm, a plain matrix or a linear layer; None where there is none."""
    names = {name for name, _ in model.named_parameters()}
    linear = f"{prefix}{projection}.weight" in names
    found = LastMap(
        weight=f"{prefix}{projection}.weight" if linear else f"{prefix}{projection}",
        transposed=not linear,
        norm_gain=f"{prefix}{norm}.weight",
        norm_bias=f"{prefix}{norm}.bias",
        bias=f"{prefix}{projection}.bias" if f"{prefix}{projection}.bias" in names else "",
    )
    return found if {found.weight, found.norm_gain, found.norm_bias} <= names else None


def _valid_tokens(model: nn.Module, spec: TextSpec) -> ValidTokens:
    """Tokens that count. CoCa appends a class token to every caption, which counts as well."""
    inner = caption_tokens(spec)
    if not isinstance(model, CoCa):
        return inner

    def valid(ids: Tensor, counts: Tensor | None) -> Tensor:
        caption = inner(ids, counts)
        return torch.cat([caption, caption.new_ones(len(ids), 1)], 1)

    return valid


@cache
def _text_spec(positions: int, *, fixed_length: bool) -> tuple[TextSpec, bytes]:
    # Without a name for it, the library adds a token for padding, whose id has no row in the table of embeddings.
    tokenizer = CLIPTokenizer(
        *clip_vocabulary(_START, _END), bos_token=_START, eos_token=_END, unk_token=_END, pad_token=_END
    )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # Captions are cleaned before they come here (`TextSpec.cleaning`), and by other rules than this library's.
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    encoded = backend.to_str().encode()
    spec = TextSpec(
        context_length=positions,
        eos_id=int(tokenizer.eos_token_id),
        pad_id=0,
        fixed_length=fixed_length,
        cleaning="open-clip",
        tokenizer_digest=digest_of_bytes(encoded),
    )
    return spec, encoded


def _image_spec(config: Mapping[str, Any], preprocess: Mapping[str, Any], where: str) -> ImageSpec:
    """Preprocessing as open_clip does it: a missing entry, or null, means the default, and the size is the model's."""
    usual = {
        "size": config["vision_cfg"].get("image_size", 224),
        "mode": "RGB",
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    found = usual | {key: value for key, value in preprocess.items() if value is not None and key != "size"}
    size, mode, resample = found["size"], found["resize_mode"], found["interpolation"]
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if (
        len(sides) != 2 or sides[0] != sides[1] or not preprocessing.is_side(sides[0]) or found["mode"] != "RGB"
        or mode not in ("shortest", "squash") or resample not in ("bicubic", "bilinear")
    ):  # fmt: skip
        asked = {key: found[key] for key in ("size", "mode", "resize_mode", "interpolation")}
        raise InputError(
            f"{where} asks for preprocessing that is not supported: {json.dumps(asked)}",
            fix="use RGB, a square size, resize_mode shortest or squash, interpolation bicubic or bilinear",
        )
    mean, std = (preprocessing.three(found[key], f"{where}: preprocess_cfg.{key}") for key in ("mean", "std"))
    if min(std) <= 0:
        raise InputError(f"{where}: preprocess_cfg.std is not positive", fix="give three positive values")
    return ImageSpec(
        resize=sides[0],
        crop=sides[0],
        resample=resample,
        rescale=1 / 255,
        mean=mean,
        std=std,
        fit="squash" if mode == "squash" else "crop",
        crop_offset="round",
        alpha="drop",
    )


def _preprocess_config(spec: ImageSpec) -> dict[str, Any]:
    """The preprocessing config that `_image_spec` reads."""
    mode = "squash" if spec.fit == "squash" else "shortest"
    return {
        "mean": list(spec.mean), "std": list(spec.std), "interpolation": spec.resample, "resize_mode": mode,
    }  # fmt: skip
