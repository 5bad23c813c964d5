"""Reads the weights that lie in an artifact, and compares them with the edited model: what it is, before what it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from uwm_deploy.graphs.fingerprint import (
    fingerprint_by_source,
    fingerprint_by_value,
    fingerprint_of_graph,
)
from uwm_deploy.graphs.folded import computed_away
from uwm_deploy.graphs.stored import named_weights
from uwm_deploy.records import Fingerprint, GraphAudit, Precision, TensorEdit
from uwm_deploy.uwm.patch import Patch

_NAMED = 10
"""Differences that are listed."""


def audit_of_graph(path: Path, tower: nn.Module, edits: Sequence[TensorEdit], patch: Patch) -> GraphAudit:
    """An exported graph: every weight by its name, bit for bit, and what a normalisation adds to its variance.

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
    return _audit(found, len(others), [text for text in differ if text], _epsilons(model, tower))


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
        return _audit(fingerprint_of_graph(kept, edits, patch.tensors), 0, [], [])
    arrays: Iterable[np.ndarray] = kept.values()
    folded = computed_away(source)
    if precision is Precision.FP32:
        return _audit(fingerprint_by_value(arrays, edits, folded), 0, [], [])
    return _audit(fingerprint_by_source(arrays, dict(_edited(source, edits)), edits, folded), 0, [], [])


def _edited(source: Path, edits: Sequence[TensorEdit]) -> Iterator[tuple[str, np.ndarray]]:
    wanted = {edit.name for edit in edits}
    return ((name, array) for name, array in named_weights(source) if name in wanted)


def _audit(found: Fingerprint | None, weights: int, differ: Sequence[str], structure: Sequence[str]) -> GraphAudit:
    return GraphAudit(
        layers=found.layers if found else 0,
        weights=weights,
        edit=found.mismatches[:_NAMED] if found else (),
        differ=tuple(differ[:_NAMED]),
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
