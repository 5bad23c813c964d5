"""Importance by gradients, the two published baselines: the mean over batches of ``|dL/dW|`` (docs/background/methods.md).

The absolute value is taken of a batch's gradient, so the result depends on the batch size. The loss needs all of a batch's
embeddings at once, the gradient of the weights does not: embeddings are computed without a graph, the loss is differentiated
with respect to the embeddings of the safe queries, and a second forward pass in small parts carries that gradient to the
weights. The gradient is exactly that of the whole batch; memory is that of one small part, whatever the batch size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from uwm_deploy.errors import ContractError
from uwm_deploy.runtime.memory import Notice, halved, out_of_memory, silent

LOGIT_SCALE = math.exp(4.6052)
"""Fixed scale of the InfoNCE logits in the official code, 100 to five digits."""


class Embedded(NamedTuple):
    """Embeddings that a loss reads: of the safe queries and of the members they are compared with.

    Attributes:
        query: (B, d) float32, safe member of the scored tower.
        own_unsafe: (B, d) float32, its unsafe counterpart in the same tower.
        other_safe: (B, d) float32, safe member of the other tower.
        other_unsafe: (B, d) float32, unsafe member of the other tower.
    """

    query: Tensor
    own_unsafe: Tensor
    other_safe: Tensor
    other_unsafe: Tensor


Loss = Callable[[Embedded], Tensor]


def gradient_unsafe(unit: Embedded) -> Tensor:
    """Mean of ``cos(query, other_safe) - cos(query, other_unsafe)``: towards unsafe, away from safe.

    Args:
        unit: Rows of length 1.

    Returns:
        () float32.
    """
    return (unit.query * (unit.other_safe - unit.other_unsafe)).sum(1).mean()


def gradient_safe_clip(unit: Embedded) -> Tensor:
    """Symmetric InfoNCE of safe queries with their unsafe counterparts of the other tower, plus ``1 - cos(query, own)``.

    Args:
        unit: Rows of length 1.

    Returns:
        () float32.
    """
    logits = LOGIT_SCALE * unit.query @ unit.other_unsafe.T
    labels = torch.arange(len(logits), device=logits.device)
    both = functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)
    return 0.5 * both + (1 - (unit.query * unit.own_unsafe).sum(1)).mean()


LOSSES: Mapping[str, Loss] = {"gradient-unsafe": gradient_unsafe, "gradient-safe-clip": gradient_safe_clip}
"""Loss by its name in a preset."""


@dataclass(slots=True)
class GradientScorer:
    """Running importance of the edited layers of one tower.

    Attributes:
        embed: Inputs of the scored tower (b, ...), float32 pixels or int64 ids, to embeddings (b, d) float32.
        weights: Layer name to its weight (out, in) float32; gradients are accumulated in their `grad`.
        loss: Embeddings with rows of length 1 to the loss, () float32.
        batch: Pairs per gradient.
        part: Pairs per forward pass with a graph.
        left_out: Called with the ids of pairs that are not finite.
        notice: Called with a line when `part` had to be halved.
    """

    embed: Callable[[Tensor], Tensor]
    weights: Mapping[str, Tensor]
    loss: Loss
    batch: int
    part: int
    left_out: Callable[[list[str]], None]
    notice: Notice = silent
    count: int = 0
    batches: int = 0
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _inputs: list[Tensor] = field(default_factory=list)
    _embedded: list[Embedded] = field(default_factory=list)

    def add(self, ids: Sequence[str], inputs: Tensor, embedded: Embedded) -> None:
        """Takes some quadruples; a gradient is taken whenever a batch is full.

        Args:
            ids: b ids.
            inputs: (b, ...) inputs of the safe queries, float32 pixels or int64 ids.
            embedded: Embeddings, not normalised, computed without a graph.
        """
        finite = torch.stack([part.isfinite().all(1) & part.any(1) for part in embedded]).all(0)
        if not bool(finite.all()):
            self.left_out([ids[i] for i in (~finite).nonzero().flatten().tolist()])
            inputs, embedded = inputs[finite], Embedded(*(part[finite] for part in embedded))
        self._inputs.append(inputs)
        self._embedded.append(embedded)
        while sum(map(len, self._inputs)) >= self.batch:
            self._take(self.batch)

    def finish(self) -> None:
        """Takes the gradient of what is left, a smaller batch that counts as one."""
        if left := sum(map(len, self._inputs)):
            self._take(left)

    def take_sum(self, layer: str) -> Tensor:
        """Takes out the sum (out, in) float32, over the batches, of a layer's absolute gradient.

        Raises:
            ContractError: If the weight of the layer never got a gradient.
        """
        if layer not in self._sums and self.count:
            raise ContractError(
                f"layer {layer} was never reached by the forward pass, so it has no gradient",
                fix="name a layer whose forward is called",
            )
        return self._sums.pop(layer) if self.count else torch.zeros_like(self.weights[layer])

    def score(self, layer: str) -> Tensor:
        """Takes out the importance (out, in) float32 of a layer, the mean over the batches.

        Raises:
            ContractError: If the weight of the layer never got a gradient.
        """
        return self.take_sum(layer).div_(max(1, self.batches))

    def _take(self, count: int) -> None:
        """Adds the absolute gradient of the first `count` waiting quadruples."""
        inputs = torch.cat(self._inputs)
        embedded = Embedded(*(torch.cat(parts) for parts in zip(*self._embedded, strict=True)))
        wanted = self._by_query(Embedded(*(part[:count] for part in embedded)))
        while (error := self._carried_to_weights(inputs[:count], wanted)) is not None:
            self.part = halved(self.part, error, "quadruples with gradients", self.notice)
        self._inputs = [inputs[count:]] if len(inputs) > count else []
        self._embedded = [Embedded(*(part[count:] for part in embedded))] if self._inputs else []
        for name, weight in self.weights.items():
            if weight.grad is not None:
                importance = weight.grad.detach().abs_()
                self._sums[name] = self._sums[name].add_(importance) if name in self._sums else importance
                weight.grad = None
        self.count += count
        self.batches += 1

    def _carried_to_weights(self, inputs: Tensor, wanted: Tensor) -> Exception | None:
        """Fills the gradients of the weights; when memory runs out there are none, and the error is returned."""
        weights = list(self.weights.values())
        try:
            for rows, by_embedding in zip(torch.split(inputs, self.part), torch.split(wanted, self.part), strict=True):
                with torch.enable_grad():
                    result = self.embed(rows)
                if result.requires_grad:  # else no edited layer was reached
                    torch.autograd.backward(result, by_embedding, inputs=weights)
        except Exception as error:
            if not out_of_memory(error):
                raise
            for weight in weights:
                weight.grad = None
            return error.with_traceback(None)  # its frames hold the activations
        return None

    def _by_query(self, embedded: Embedded) -> Tensor:
        """Gradient (B, d) of the loss by the embeddings of the safe queries."""
        query = embedded.query.detach().clone().requires_grad_()
        with torch.enable_grad():
            unit = Embedded(*(functional.normalize(part, dim=1) for part in embedded._replace(query=query)))
            (gradient,) = torch.autograd.grad(self.loss(unit), query)
        return gradient


@contextlib.contextmanager
def only_requiring_grad(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Asks for gradients of some weights only, for as long as the block lasts; restores every parameter's `grad` after it.

    Args:
        model: All parameters.
        weights: Layer name to its weight (out, in) float32, a parameter of the model.
    """
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for weight in weights.values():
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
