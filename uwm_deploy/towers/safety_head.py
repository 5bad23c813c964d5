"""A safety head on the tokens of a vision tower: SafeVLM's projector, safety tokens and cross-attention.

The learned safety tokens attend to the projected tokens of the image, and two linear layers read the result. A head that was
trained with a language model has a third layer, which brings the safety tokens to the width of that model's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from uwm_deploy.errors import InputError, IntegrityError
from uwm_deploy.records.head import HeadShape
from uwm_deploy.towers.embedding_map import mapped
from uwm_deploy.towers.protocol import ModuleTower, Tower

FLOAT32 = "safety_head.*"
"""Pattern of the head's layers: they stay in float32 at any precision, because thresholds are set on float32 levels."""


class SafetyHeadModule(nn.Module):
    """Tokens (B, T, features) to risk logits (B, categories) and risk level (B, 1), a probability."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        self.norm = nn.LayerNorm(shape.features)
        self.projector = nn.Sequential(
            nn.Linear(shape.features, shape.width), nn.GELU(), nn.Linear(shape.width, shape.width)
        )
        self.tokens = nn.Parameter(torch.randn(shape.tokens, shape.width))
        self.key, self.value = nn.Linear(shape.width, shape.width), nn.Linear(shape.width, shape.width)
        self.read = nn.LayerNorm(shape.width)
        self.category = nn.Linear(shape.tokens * shape.width, shape.categories)
        self.level = nn.Linear(shape.tokens * shape.width, 1)
        if shape.language:  # last, so that a head without it begins as it always did
            self.language = nn.Linear(shape.width, shape.language)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Classifies the tokens of images.

        Args:
            tokens: (B, T, features) float32.

        Returns:
            Safety tokens (B, tokens, language) float32 where the shape has them; risk logits (B, categories) float32;
            risk level (B, 1) float32, a probability.
        """
        read = self.read_tokens(tokens)
        logits, level = self._judged(read)
        told = (self.language(read),) if self.shape.language else ()
        return (*told, logits, torch.sigmoid(level))

    def logits(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Computes logits of the categories and of the level.

        Args:
            tokens: (B, T, features) float32.

        Returns:
            Logits of the categories (B, categories) float32, and of the level (B, 1) float32.
        """
        return self._judged(self.read_tokens(tokens))

    def taught(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All that a training with a language model looks at.

        Args:
            tokens: (B, T, features) float32.

        Returns:
            Safety tokens (B, tokens, language) float32, logits (B, categories) float32, and level logits (B, 1) float32.
        """
        read = self.read_tokens(tokens)
        return (self.language(read), *self._judged(read))

    def _judged(self, read: Tensor) -> tuple[Tensor, Tensor]:
        found = read.flatten(1)
        return self.category(found), self.level(found)

    def read_tokens(self, tokens: Tensor) -> Tensor:
        """The safety tokens with what they read from an image.

        Args:
            tokens: (B, T, features) float32.

        Returns:
            (B, m, width) float32, of the m safety tokens.
        """
        size = self.shape
        part = size.width // size.heads
        features = self.projector(self.norm(tokens))
        # (B, heads, T, part); written out, so that every exporter and builder takes it.
        split = (size.heads, part)
        keys, values = (
            layer(features).reshape(*features.shape[:2], *split).transpose(1, 2) for layer in (self.key, self.value)
        )
        asked = self.tokens.reshape(size.tokens, *split).transpose(0, 1).unsqueeze(0)
        weights = torch.softmax((keys @ asked.transpose(2, 3)) * part**-0.5, dim=2)  # (B, heads, T, tokens)
        brought = (weights.transpose(2, 3) @ values).transpose(1, 2).flatten(2)  # (B, tokens, width)
        read: Tensor = self.read(brought + self.tokens)
        return read

    @torch.no_grad()
    def cool(self, category: float, level: float) -> None:
        """Divides both logits by their temperatures, by changing the weights of their layers."""
        for layer, temperature in ((self.category, category), (self.level, level)):
            layer.weight.div_(temperature)
            layer.bias.div_(temperature)

    def to_bytes(self) -> bytes:
        """The head's weights as the content of a safetensors file."""
        content: bytes = save({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()})
        return content


def head_from_bytes(content: bytes, shape: HeadShape) -> SafetyHeadModule:
    """A head from its file.

    Raises:
        IntegrityError: If the file does not hold a head of this shape, or holds NaN or infinity.
    """
    module = SafetyHeadModule(shape)
    try:
        tensors: Mapping[str, Tensor] = load(content)
        module.load_state_dict(dict(tensors))
    except (SafetensorError, RuntimeError) as error:
        line = " ".join(str(error).split())[:200]
        raise IntegrityError(
            f"the safety head's weights do not fit its record: {line}", fix="train it again"
        ) from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise IntegrityError("the safety head's weights hold NaN or infinity", fix="train it again")
    return module.eval().requires_grad_(False)


class _WithTokens(Protocol):
    """An image graph that can also give the tokens that it pools."""

    def with_tokens(self, pixel_values: Tensor) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
        """(B, 3, H, W) to the outputs of its `forward`, and to the tokens (B, T, width)."""


def token_graph(tower: Tower) -> _WithTokens:
    """The image graph of a tower, if its family can give tokens.

    Raises:
        InputError: If it cannot.
    """
    graph = tower.graph_module()
    if not hasattr(graph, "with_tokens"):
        raise InputError(
            "this tower gives no tokens, which a safety head needs", fix="use hf-clip, siglip or open-clip"
        )
    return cast(_WithTokens, graph)


@torch.inference_mode()
def tokens_of(tower: Tower, pixels: np.ndarray) -> Tensor:
    """Tokens of images, from which a head classifies.

    Args:
        tower: Image tower.
        pixels: (B, 3, H, W) float32.

    Returns:
        (B, T, width) in the tower's dtype, on its device.
    """
    device = next(tower.graph_module().parameters()).device
    return token_graph(tower).with_tokens(torch.from_numpy(np.ascontiguousarray(pixels)).to(device))[1]


class _HeadedGraph(nn.Module):
    """An image graph and a head on its tokens; the graph's weights keep their names."""

    def __init__(self, graph: nn.Module, tokens: _WithTokens, head: SafetyHeadModule) -> None:
        super().__init__()
        for name, child in graph.named_children():
            self.add_module(name, child)
        self.safety_head = head
        self._call = tokens.with_tokens  # a method: the graph itself would become a child

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) to the graph's own outputs and those of the head, see `SafetyHeadModule.forward`."""
        given, tokens = self._call(pixel_values)
        given = mapped(self, given)  # the map is a forward hook, which this call does not trigger
        own = (given,) if isinstance(given, Tensor) else given
        return (*own, *self.safety_head(tokens))


def with_head(tower: Tower, head: SafetyHeadModule) -> Tower:
    """The image tower with the head's outputs after its own.

    Raises:
        InputError: If the tower gives no tokens.
    """
    assert isinstance(tower, ModuleTower)
    graph = tower.graph_module()
    head.to(next(graph.parameters()).device)
    return tower.extended(_HeadedGraph(graph, token_graph(tower), head).eval(), head.shape.outputs)
