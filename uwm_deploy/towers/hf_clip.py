"""Hugging Face CLIP, and checkpoints of the same architecture (Safe-CLIP, SafeR-CLIP, MetaCLIP)."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from uwm_deploy.errors import InputError
from uwm_deploy.records import TowerName


class _ImageGraph(nn.Module):
    """Pixels to embedding; attribute names keep the parameters' names in the source model."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, d)."""
        result: Tensor = self.visual_projection(self.vision_model(pixel_values=pixel_values).pooler_output)
        return result


class _TextGraph(nn.Module):
    """Ids to embedding. No mask: with causal attention and padding to the right it changes nothing."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.text_model, self.text_projection = model.text_model, model.text_projection

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) to (B, d)."""
        result: Tensor = self.text_projection(self.text_model(input_ids=input_ids).pooler_output)
        return result


class HfClipTower:
    """One tower of a `CLIPModel`; see `Tower`."""

    def __init__(self, model: CLIPModel, name: TowerName, eos_id: int) -> None:
        self.name = name
        self.embed_dim = int(model.config.projection_dim)
        image = name is TowerName.IMAGE
        self.input_name = "pixel_values" if image else "input_ids"
        self.output_name = "image_embeds" if image else "text_embeds"
        self._graph: nn.Module = _ImageGraph(model) if image else _TextGraph(model)
        self._eos_id = eos_id

    def embed(self, inputs: Tensor) -> Tensor:
        """See `Tower.embed`."""
        result: Tensor = self._graph(inputs)
        return result

    def graph_module(self) -> nn.Module:
        """See `Tower.graph_module`."""
        return self._graph

    def layers(self, patterns: Sequence[str]) -> dict[str, nn.Linear]:
        """See `Tower.layers`."""
        linear = {name: m for name, m in self._graph.named_modules() if isinstance(m, nn.Linear)}
        found: dict[str, nn.Linear] = {}
        for pattern in patterns:
            matches = fnmatch.filter(linear, pattern)
            if not matches:
                examples = ", ".join(list(linear)[:3])
                raise InputError(
                    f"layer pattern {pattern!r} matches no linear layer of the {self.name.value} tower",
                    fix=f"its layers are named like {examples}",
                )
            found |= {name: linear[name] for name in matches}
        return found

    def valid_tokens(self, inputs: Tensor) -> Tensor | None:
        """See `Tower.valid_tokens`: up to and including the first end token, which is where the mask is 1."""
        if self.name is TowerName.IMAGE:
            return None
        ends = (inputs == self._eos_id).int()
        return (ends.cumsum(1) - ends) == 0


@torch.no_grad()
def random_clip(config: object, seed: int = 0) -> CLIPModel:
    """The architecture of a config with seeded random weights.

    Every parameter is jittered: freshly initialised layers hold equal zeros and ones, which hides faults of exporters
    that merge equal tensors.
    """
    torch.manual_seed(seed)
    model = CLIPModel._from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
    return model
