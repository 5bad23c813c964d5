"""Weights of a CLIP of transformers under the names that open_clip has for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

NAMES = {512: "ViT-B-32-quickgelu", 768: "ViT-L-14-quickgelu"}
"""Architecture of open_clip by the size of its embeddings."""

_PARTS = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def as_open_clip(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights, query, key and value as one, matrices the way open_clip keeps them."""
    found = {
        "visual.class_embedding": weights["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": weights["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": weights["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": weights["visual_projection.weight"].T,
        "positional_embedding": weights["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": weights["text_model.embeddings.token_embedding.weight"],
        "text_projection": weights["text_projection.weight"].T,
        "logit_scale": weights["logit_scale"],
    }
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    for theirs, ours in norms.items():
        found |= {f"{theirs}.{kind}": weights[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    for tower, place in (("vision_model", "visual.transformer"), ("text_model", "transformer")):
        count = len({name.split(".")[3] for name in weights if name.startswith(f"{tower}.encoder.layers.")})
        for number in range(count):
            at, to = f"{tower}.encoder.layers.{number}", f"{place}.resblocks.{number}"
            for kind in ("weight", "bias"):
                joined = [weights[f"{at}.self_attn.{one}_proj.{kind}"] for one in "qkv"]
                found[f"{to}.attn.in_proj_{kind}"] = torch.cat(joined)
                found[f"{to}.attn.out_proj.{kind}"] = weights[f"{at}.self_attn.out_proj.{kind}"]
                found |= {f"{to}.{theirs}.{kind}": weights[f"{at}.{ours}.{kind}"] for ours, theirs in _PARTS.items()}
    return found
