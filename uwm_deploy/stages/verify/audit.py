"""Reads the weights that lie in an artifact, and compares them with the edited model: what it is, before what it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from uwm_deploy.edits.patch import Patch
from uwm_deploy.graphs.constant_folding import computed_away
from uwm_deploy.graphs.fingerprint import (
    fingerprint_by_source,
    fingerprint_by_value,
    fingerprint_of_graph,
)
from uwm_deploy.graphs.layers import linear_layers
from uwm_deploy.graphs.stored_weights import named_weights
from uwm_deploy.records.edit import MAP_NAMES, EditKind, TensorEdit
from uwm_deploy.records.evidence import GraphAudit
from uwm_deploy.records.graph import Fingerprint, Precision

_NAMED = 10
"""Differences that are listed."""


def audit_of_graph(path: Path, tower: nn.Module, edits: Sequence[TensorEdit], patch: Patch) -> GraphAudit:
    """An exported graph: every weight by its name, bit for bit, and what weights do not show of its normalisations.

    Args:
        path: ONNX file.
        tower: The edited tower, whose parameters have their names in the graph.
        edits: Edited layers of this tower.
        patch: Patch of the model.
    """
    model = ir.load(path)
    arrays = {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    found = fingerprint_of_graph(arrays, edits, patch.tensors) if edits else None
    edited = {edit.name for edit in edits}
    others = {name: p for name, p in tower.named_parameters() if name not in edited}
    differ = [_difference(name, arrays, parameter) for name, parameter in others.items()]
    structure = [*_epsilons(model, tower), *_maps(model, tower)]
    return _audit(found, len(others), differ=[text for text in differ if text], structure=structure)


def audit_of_engine(
    path: Path, source: Path, precision: Precision, edits: Sequence[TensorEdit], patch: Patch
) -> GraphAudit:
    """A graph that ONNX Runtime optimised: names are gone, so the edited weights are looked up by their values.

    Args:
        path: The optimised graph.
        source: The graph that it was compiled from.
        precision: What its linear layers compute in.
        edits: Edited layers of this tower.
        patch: Patch of the model.
    """
    if not edits:
        return GraphAudit(layers=0, weights=0)
    kept = dict(named_weights(path))
    if all(edit.name in kept for edit in edits) and precision is Precision.FP32:
        return _audit(fingerprint_of_graph(kept, edits, patch.tensors), 0)
    arrays, folded = list(kept.values()), computed_away(source)
    if precision is Precision.FP32:
        return _audit(fingerprint_by_value(arrays, edits, folded), 0)
    found = fingerprint_by_source(arrays, dict(_edited(source, edits)), edits, folded)
    return _audit(found, 0, lowered=_lowered(arrays, edits))


def _lowered(arrays: Iterable[np.ndarray], edits: Iterable[TensorEdit]) -> list[str]:
    """Tensors of a map behind the embedding that are not there as they are: it stays in float32 whatever the precision."""
    added = [edit for edit in edits if edit.kind is EditKind.ADDED]
    whole = {edit.name for edit in added if not fingerprint_by_value(arrays, [edit]).mismatches}
    return [f"{edit.name}: is not there in float32" for edit in added if edit.name not in whole]


def _edited(source: Path, edits: Sequence[TensorEdit]) -> Iterator[tuple[str, np.ndarray]]:
    wanted = {edit.name for edit in edits}
    return ((name, array) for name, array in named_weights(source) if name in wanted)


def _audit(
    found: Fingerprint | None,
    weights: int,
    *,
    differ: Sequence[str] = (),
    lowered: Sequence[str] = (),
    structure: Sequence[str] = (),
) -> GraphAudit:
    return GraphAudit(
        layers=found.layers if found else 0,
        weights=weights,
        edit=found.mismatches[:_NAMED] if found else (),
        differ=tuple(differ[:_NAMED]),
        lowered=tuple(lowered[:_NAMED]),
        structure=tuple(structure[:_NAMED]),
    )


def _difference(name: str, arrays: Mapping[str, np.ndarray], parameter: torch.Tensor) -> str:
    """What is wrong with one weight, or nothing."""
    if name not in arrays:
        return f"{name}: is not in the graph"
    wanted, found = parameter.detach().cpu().numpy(), arrays[name]
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{name}: is {found.dtype} {found.shape}, not {wanted.dtype} {wanted.shape}"
    if np.array_equal(found, wanted):
        return ""
    share = float((found != wanted).mean())
    return f"{name}: {100 * share:.3g}% of its entries are not the edited model's"


def _epsilons(model: ir.Model, tower: nn.Module) -> list[str]:
    """An epsilon of another framework changes the last digits only: nothing measured would tell."""
    nodes = [node for node in model.graph.all_nodes() if node.op_type == "LayerNormalization"]
    if not nodes:  # written out in plain operators
        return []
    found = Counter(np.float32(node.attributes.get_float("epsilon", 1e-5)).item() for node in nodes)
    wanted = Counter(np.float32(m.eps).item() for m in tower.modules() if isinstance(m, nn.LayerNorm))
    if set(found) <= set(wanted):  # a module that the graph does not reach has no node
        return []
    words = [", ".join(f"{value:g}" for value in sorted(counts)) for counts in (found, wanted)]
    return [f"LayerNormalization has epsilon {words[0]}, the model {words[1]}"]


_STEPS_TO_LENGTH = 4
"""Operators between a length and the division by it: exporters keep it from zero, or spread it over the row."""


def _maps(model: ir.Model, tower: nn.Module) -> list[str]:
    """A map behind the embedding gets it at length 1, which its weights do not show."""
    layers = linear_layers(model)
    maps = [name for name, _ in tower.named_children() if name in MAP_NAMES.values()]
    return [
        f"{name}: gets the embedding as long as it is"
        for name in maps
        if name in layers and not _is_normalised(layers[name].node.inputs[0])
    ]


def _is_normalised(value: ir.Value | None) -> bool:
    """Whether a tensor was divided by something that was made of the same tensor."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in ("Div", "LpNormalization"):
        return False
    if node.op_type == "LpNormalization":
        return True
    whole, length = node.inputs[0], node.inputs[1]
    for _ in range(_STEPS_TO_LENGTH):
        before = length.producer() if length is not None else None
        if before is None or not before.inputs:
            return False
        length = before.inputs[0]
        if length is whole:
            return True
    return False
