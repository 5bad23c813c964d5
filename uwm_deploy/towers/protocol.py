"""What the stages need from a model, whatever its family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from uwm_deploy.records import ModelRef, TowerName


class Tower(Protocol):
    """One encoder of a model.

    Attributes:
        name: Which one.
        embed_dim: Size of the shared embedding space.
        input_name: Name of the graph input, ``pixel_values`` or ``input_ids``.
        output_name: Name of the graph output, ``image_embeds`` or ``text_embeds``.
    """

    name: TowerName
    embed_dim: int
    input_name: str
    output_name: str

    def embed(self, inputs: Tensor) -> Tensor:
        """Embeds (B, 3, H, W) float32 pixels or (B, L) ids into (B, d), projection inside, not normalised."""

    def layers(self, patterns: Sequence[str]) -> dict[str, nn.Linear]:
        """Linear layers whose path in the source model matches a glob.

        Raises:
            InputError: If a pattern matches no linear layer.
        """

    def valid_tokens(self, inputs: Tensor) -> Tensor | None:
        """(B, T) bool, the tokens that count (method.md section 2); None when all do."""

    def graph_module(self) -> nn.Module:
        """Module from the one graph input to the embedding; its parameters have their names in the source model."""


@dataclass(slots=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        ref: What it is.
        source: Module that owns all parameters, under their names in the source model.
        image: Image tower.
        text: Text tower.
        tokenizer_json: Content of the tokenizer file that goes into bundles.
        folder: Checkpoint folder it came from.
    """

    ref: ModelRef
    source: nn.Module
    image: Tower
    text: Tower
    tokenizer_json: bytes
    folder: Path

    def tower(self, name: TowerName) -> Tower:
        """One tower by name."""
        return self.image if name is TowerName.IMAGE else self.text
