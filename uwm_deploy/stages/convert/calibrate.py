"""Chooses how a graph goes to INT8, on calibration inputs: factors and shifts of channels, and how weights are rounded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from uwm_deploy.graphs.layers import LinearLayer, linear_layers, matching_nodes
from uwm_deploy.graphs.moments import ChannelStatistics, channel_statistics
from uwm_deploy.graphs.rounding import rounded_by_moments
from uwm_deploy.graphs.smoothing import Channels, Chosen, bias_of, spread_weight, stored_as_rows

EVENNESS = 0.6
"""Exponent of a channel's range in its factor. At 1 all channels reach equally far, which rounds the activation best, and
the weights worst, since what a channel is divided by its weights are multiplied by."""

_NARROWEST = 1e-4
"""Smallest range of a channel, as a share of the widest one's."""


def one_row_layers(source: Path) -> tuple[str, ...]:
    """Linear layers that multiply one row per input: pooled, behind the last attention.

    They cost next to nothing, and their rounding goes straight into the embedding. None where there is nothing else.
    """
    layers = linear_layers(ir.load(source))
    found = tuple(name for name, layer in layers.items() if _rows(layer) == 1)
    return found if len(found) < len(layers) else ()


def chosen_for(
    source: Path, keep: Sequence[str], fixed: Collection[str], batches: Sequence[np.ndarray], folder: Path
) -> Chosen:
    """Chooses channels and weights for every layer that goes to INT8; activations get a scale per token.

    Args:
        source: Float32 ONNX file.
        keep: Linear layers, and globs over layers, nodes and operators, that stay in float32.
        fixed: Names of tensors that must not change but by rounding: edited biases.
        batches: Batches of calibration inputs, (b, 3, H, W) float32 or (b, L) int64 each.
        folder: Folder for a temporary file.
    """
    model = ir.load(source)
    kept = matching_nodes(model, keep)
    readers: dict[str, dict[str, LinearLayer]] = {}
    for name, layer in linear_layers(model).items():
        entering = layer.node.inputs[0]
        if layer.node not in kept and entering is not None and entering.producer() is not None:
            readers.setdefault(entering.name or "", {})[name] = layer
    statistics = channel_statistics(source, list(readers), batches, folder)
    channels: dict[str, Channels] = {}
    codes: dict[str, np.ndarray] = {}
    for activation, layers in readers.items():
        channels[activation], largest = _channels(statistics[activation], movable=_movable(layers, fixed))
        moments = _moments(statistics[activation], channels[activation], largest)
        for name, layer in layers.items():
            weight = spread_weight(stored_as_rows(layer).astype(np.float32), channels[activation])
            codes[name] = rounded_by_moments(weight, moments)
    return Chosen(channels=channels, codes=codes, per_token=frozenset(channels))


def _rows(layer: LinearLayer) -> int:
    entering = layer.node.inputs[0]
    if entering is None or entering.shape is None:
        return 0
    between = list(entering.shape)[1:-1]
    return int(np.prod([size if isinstance(size, int) else 0 for size in between], dtype=np.int64))


def _movable(layers: Mapping[str, LinearLayer], fixed: Collection[str]) -> bool:
    """Whether every reader has a bias that can make up for a shift."""
    biases = [bias_of(layer) for layer in layers.values()]
    return all(bias is not None and bias.name not in fixed for bias in biases)


def _channels(seen: ChannelStatistics, *, movable: bool) -> tuple[Channels, float]:
    """Factors and shifts, and the largest absolute value with them."""
    # The middle of the range serves the activation, its mean the weights, whose errors it multiplies: halfway.
    middle = (seen.low / 2 + seen.high / 2 + seen.mean) / 2 if movable else np.zeros_like(seen.low)
    reach = np.maximum(seen.high - middle, middle - seen.low)
    reach = np.maximum(reach, max(float(reach.max()) * _NARROWEST, 1e-12))
    factor = (reach**-EVENNESS).astype(np.float32)
    shift = (-middle * factor).astype(np.float32) if movable else None
    return Channels(factor=factor, shift=shift), float((reach * factor).max())


def _moments(seen: ChannelStatistics, channels: Channels, largest: float) -> np.ndarray:
    """Second moments of the changed and rounded activation, (k, k) float64."""
    factor = channels.factor.astype(np.float64)
    shift = np.zeros_like(factor) if channels.shift is None else channels.shift.astype(np.float64)
    crossed = np.outer(seen.mean * factor, shift)
    found: np.ndarray = seen.moments * np.outer(factor, factor) + crossed + crossed.T + np.outer(shift, shift)
    step = largest / 127  # of the largest token: an upper bound
    return found + np.eye(len(found)) * step**2 / 12
