"""Attention whose projections are called as modules.

`nn.MultiheadAttention` reads the weight of its output projection directly: a hook on that layer never fires, so its
inputs cannot be scored (method.md section 4), and its fused kernels export to a graph that is harder to read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class ExplicitAttention(nn.Module):
    """Computes the same as an `nn.MultiheadAttention` (batch first), with its own parameters, under the same names.

    Args:
        source: The module that it replaces.
    """

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        if source.bias_k is not None or source.add_zero_attn or not source.batch_first:
            raise ValueError("this kind of attention is not supported")
        self.num_heads, self.head_dim = source.num_heads, source.head_dim
        # Annotated as never None, but it is None where keys and values have a width of their own.
        self.in_proj_weight: nn.Parameter | None = source.in_proj_weight
        self.in_proj_bias = source.in_proj_bias
        self.q_proj_weight, self.k_proj_weight, self.v_proj_weight = (
            source.q_proj_weight, source.k_proj_weight, source.v_proj_weight,
        )  # fmt: skip
        self.out_proj = source.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,  # noqa: ARG002 -- callers pass it
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attends.

        Args:
            query: (B, L, E), any floating dtype.
            key: (B, S, kdim), the same dtype; the same object as `query` for self-attention.
            value: (B, S, vdim), the same dtype.
            need_weights: For the signature only; weights are never returned.
            attn_mask: (L, S) or (B * heads, L, S), the same dtype, added to the logits.

        Returns:
            (B, L, E), the same dtype, and None in the place of the weights.
        """
        q, k, v = (self._heads(part) for part in self._projected(query, key, value))
        mask = attn_mask
        if mask is not None and mask.ndim == 3:
            mask = mask.view(-1, self.num_heads, *mask.shape[1:])
        logits = (q / math.sqrt(self.head_dim)) @ k.transpose(-2, -1)
        mixed = torch.softmax(logits if mask is None else logits + mask, -1) @ v
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        weights: tuple[Tensor, ...]
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return functional.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        return tuple(functional.linear(*part) for part in zip((query, key, value), weights, biases, strict=True))

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.reshape(*rows.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)


def make_attention_explicit(model: nn.Module) -> None:
    """Replaces every `nn.MultiheadAttention` inside a model."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                setattr(module, name, ExplicitAttention(child))
