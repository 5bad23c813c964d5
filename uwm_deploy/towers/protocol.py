"""The interface between the stages and a model of any family."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from uwm_deploy.errors import InputError
from uwm_deploy.records.edit import MAP_NAMES
from uwm_deploy.records.model import Architecture, ImageSpec, ModelRef, TextSpec, TowerName

INPUTS = {TowerName.IMAGE: "pixel_values", TowerName.TEXT: "input_ids"}
OUTPUTS = {TowerName.IMAGE: "image_embeds", TowerName.TEXT: "text_embeds"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LastMap:
    """The linear map that ends a tower, directly behind a LayerNorm: names of its parameters in the source model.

    Attributes:
        weight: Name of the weight (d, m), or (m, d) where it is `transposed`.
        transposed: Whether the weight is stored as (m, d).
        norm_gain: Name of the LayerNorm's weight (m,).
        norm_bias: Name of the LayerNorm's bias (m,).
        bias: Name of the map's bias (d,); empty where it has none.
    """

    weight: str
    transposed: bool
    norm_gain: str
    norm_bias: str
    bias: str = ""


class Tower(Protocol):
    """One encoder of a model.

    Attributes:
        name: Image or text.
        embed_dim: Size of the shared embedding space.
        input_name: Name of the graph input, ``pixel_values`` or ``input_ids``.
        output_names: Names of the graph outputs; the first is ``image_embeds`` or ``text_embeds``.
        pools_at_end: Whether a caption's embedding is read at its end token, so that later tokens change nothing.
        last_map: The linear map that ends the tower; None where the family ends otherwise.
    """

    name: TowerName
    embed_dim: int
    input_name: str
    output_names: tuple[str, ...]
    pools_at_end: bool
    last_map: LastMap | None

    def embed(self, inputs: Tensor) -> Tensor:
        """Embeds inputs, projection included.

        Args:
            inputs: (B, 3, H, W) float32 pixels, or (B, L) int64 ids.

        Returns:
            (B, d) in the tower's dtype, not normalised.
        """

    def outputs(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Computes all outputs of the graph.

        Args:
            inputs: (B, 3, H, W) float32 pixels, or (B, L) int64 ids.

        Returns:
            The embedding (B, d) in the tower's dtype, and after it any further outputs (B, ...).
        """

    def layers(self, patterns: Sequence[str]) -> dict[str, nn.Linear]:
        """Linear layers whose path in the source model matches a glob.

        Raises:
            InputError: If a pattern matches no linear layer.
        """

    def valid_tokens(self, inputs: Tensor, counts: Tensor | None = None) -> Tensor | None:
        """Tokens that count in scores (method.md section 2).

        Args:
            inputs: (B, 3, H, W) float32 pixels, or (B, L) int64 ids.
            counts: (B,) int64, tokens that the tokenizer's attention mask counts; None takes all up to the first end.

        Returns:
            (B, T) bool; None when all tokens count.
        """

    def graph_module(self) -> nn.Module:
        """Module from the graph's one input to its outputs; its parameters have their names in the source model."""


MAPS = "embedding_maps.safetensors"
"""File of the maps behind the embeddings, in the folder of a saved edited model; its own library has no place for them."""

ValidTokens = Callable[[Tensor, Tensor | None], Tensor]
"""From ids (B, L) int64, and the tokens (B,) int64 of each that a mask counts, to the tokens that count, (B, T) bool."""


class ModuleTower:
    """A tower around a module from the graph's one input to the embedding, or to a tuple that begins with it.

    Args:
        graph: The module; its parameters have their names in the source model.
        name: Image or text.
        embed_dim: Size of the embedding.
        valid_tokens: From ids (B, L) int64, and counts (B,) int64 or None, to the tokens that count, (B, T) bool; None
            when all count.
        pools_at_end: See `Tower`.
        further: Names of the outputs after the embedding.
        reaches: Whether a layer, by name, has an effect on the output that the tower is used for; others cannot be edited.
        last_map: See `Tower`.
    """

    def __init__(
        self,
        graph: nn.Module,
        name: TowerName,
        embed_dim: int,
        valid_tokens: ValidTokens | None = None,
        *,
        pools_at_end: bool = False,
        further: tuple[str, ...] = (),
        reaches: Callable[[str], bool] = lambda _: True,
        last_map: LastMap | None = None,
    ) -> None:
        self.name, self.embed_dim, self.pools_at_end, self.last_map = name, embed_dim, pools_at_end, last_map
        self.input_name, self.output_names = INPUTS[name], (OUTPUTS[name], *further)
        self._graph, self._valid_tokens, self._reaches = graph, valid_tokens, reaches

    def embed(self, inputs: Tensor) -> Tensor:
        """Embeds inputs; see `Tower.embed`.

        Args:
            inputs: (B, 3, H, W) float32 pixels, or (B, L) int64 ids.

        Returns:
            (B, d) in the tower's dtype, not normalised.
        """
        return self.outputs(inputs)[0]

    def outputs(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Computes all outputs of the graph; see `Tower.outputs`.

        Args:
            inputs: (B, 3, H, W) float32 pixels, or (B, L) int64 ids.

        Returns:
            The embedding (B, d) in the tower's dtype, and after it any further outputs (B, ...).
        """
        result: Tensor | tuple[Tensor, ...] = self._graph(inputs)
        return (result,) if isinstance(result, Tensor) else result

    def graph_module(self) -> nn.Module:
        """See `Tower.graph_module`."""
        return self._graph

    def extended(self, graph: nn.Module, further: tuple[str, ...] = ()) -> ModuleTower:
        """The same tower with another graph, which may have more outputs.

        Args:
            graph: Gives the outputs of this tower's graph and after them the further ones.
            further: Names of the further outputs.
        """
        other = copy.copy(self)
        other._graph, other.output_names = graph, (*self.output_names, *further)
        return other

    def layers(self, patterns: Sequence[str]) -> dict[str, nn.Linear]:
        """See `Tower.layers`."""
        modules = self._graph.named_modules()
        linear = {name: m for name, m in modules if isinstance(m, nn.Linear) and self._reaches(name)}
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

    def valid_tokens(self, inputs: Tensor, counts: Tensor | None = None) -> Tensor | None:
        """Tokens that count in scores; see `Tower.valid_tokens`.

        Args:
            inputs: (B, 3, H, W) float32 pixels, or (B, L) int64 ids.
            counts: (B,) int64, tokens that the tokenizer's attention mask counts, or None.

        Returns:
            (B, T) bool; None when all tokens count.
        """
        return self._valid_tokens(inputs, counts) if self._valid_tokens else None


def caption_tokens(spec: TextSpec) -> ValidTokens:
    """Function that finds the tokens of a caption: its end token counts, its padding does not, as in an attention mask.

    Args:
        spec: End token, padding token and padding side.

    Returns:
        From ids (B, L) int64, and the tokens (B,) int64 of each that a mask counts or None, to (B, L) bool.
    """

    def valid(ids: Tensor, counts: Tensor | None) -> Tensor:
        if counts is not None:
            places = torch.arange(ids.shape[1], device=ids.device)
            places = places.flip(0) if spec.padding_side == "left" else places
            return places[None] < counts[:, None]
        ends = (ids == spec.eos_id).int()
        if spec.padding_side == "left":
            found = (ids != spec.pad_id).int().cumsum(1) > 0
            found[:, -1] = True  # the end token, also where it is the padding
            return found
        # The padding may be the end token itself, so every token after the first end token is padding.
        return (ends.cumsum(1) - ends) == 0

    return valid


@dataclass(slots=True, kw_only=True)
class LoadedParts:
    """A checkpoint as a family's adapter loads it.

    Attributes:
        source: Module that owns all parameters, under their names in the source model.
        image_tower: Image tower.
        text_tower: Text tower.
        image: Preprocessing of images.
        text: Tokenisation.
        embed_dim: Size of the shared embedding space.
        tokenizer_json: Content of the tokenizer file that goes into bundles.
        save: Writes the model in its current state as a folder that its own library loads.
        architecture: How it is built.
    """

    source: nn.Module
    image_tower: Tower
    text_tower: Tower
    image: ImageSpec
    text: TextSpec
    embed_dim: int
    tokenizer_json: bytes
    save: Callable[[Path], None]
    architecture: Architecture = "clip"


@dataclass(slots=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        ref: Record of the model.
        source: Module that owns all parameters, under their names in the source model.
        image: Image tower.
        text: Text tower.
        tokenizer_json: Content of the tokenizer file that goes into bundles.
        save: Writes the model in its current state as a folder that its own library loads; maps behind the embeddings are
            no part of it.
        maps: Maps behind the embeddings, by tower; empty for most models.
        architecture: How it is built.
    """

    ref: ModelRef
    source: nn.Module
    image: Tower
    text: Tower
    tokenizer_json: bytes
    save: Callable[[Path], None]
    maps: dict[TowerName, nn.Linear] = field(default_factory=dict)
    architecture: Architecture = "clip"

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by name: those of the source, and those of maps behind the embeddings."""
        own = dict(self.source.named_parameters())
        for tower, linear in self.maps.items():
            own |= {f"{MAP_NAMES[tower]}.{name}": parameter for name, parameter in linear.named_parameters()}
        return own

    def tower(self, name: TowerName) -> Tower:
        """One tower by name."""
        return self.image if name is TowerName.IMAGE else self.text

    def keep_only(self, name: TowerName) -> None:
        """Frees the parameters of the other tower, which cannot be used afterwards."""
        kept = {id(parameter) for parameter in self.tower(name).graph_module().parameters()}
        for parameter in self.named_parameters().values():
            if id(parameter) not in kept:
                parameter.data = torch.empty(0, dtype=parameter.dtype)

    def to(self, device: str) -> None:
        """Moves the model to a device. The towers share the source's parameters, but hold buffers of their own."""
        for module in (self.source, self.image.graph_module(), self.text.graph_module(), *self.maps.values()):
            module.to(device)


@torch.no_grad()
def jitter(model: nn.Module) -> None:
    """Adds a little noise to every parameter: freshly initialised layers hold equal zeros and ones, which hide faults.

    Exporters merge equal tensors, and a lost or changed layer of zeros does not show in any result.
    """
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
