"""Stage `convert`: an exported float32 graph to lower precision, refused when the edit is lost on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from uwm_deploy.edits.patch import Patch
from uwm_deploy.errors import ContractError, InputError
from uwm_deploy.graphs.achieved_precision import achieved_precision, low_share
from uwm_deploy.graphs.fingerprint import fingerprint_of_lowered, refuse_zeroed
from uwm_deploy.graphs.layers import linear_layers
from uwm_deploy.graphs.lowered import EIGHT_BITS, lowered_graph
from uwm_deploy.graphs.quantise import NEAREST, input_names
from uwm_deploy.graphs.ranges import activation_maxima
from uwm_deploy.graphs.smoothing import Chosen, spread_weight, stored_as_rows
from uwm_deploy.graphs.write import weightless, write_graph
from uwm_deploy.records.edit import TensorEdit
from uwm_deploy.records.graph import (
    BUILT_IN,
    CALIBRATED,
    ActivationCoverage,
    Conversion,
    Fingerprint,
    OnnxArtifact,
    Precision,
)
from uwm_deploy.records.model import Digest
from uwm_deploy.runtime.session import external_data_of, open_graph
from uwm_deploy.safeground.canaries import RATIO_LIMIT, Canaries

CUT_OFF_LIMIT = 2.0
"""A held-out unsafe activation this many times its range is not what the ranges were taken from."""

_HELD_OUT = 4
"""Every fourth input checks the ranges of the others."""

EXECUTABLE = (Precision.FP32, Precision.FP16, Precision.INT8, Precision.FP8, Precision.W8A16)
"""What ONNX Runtime executes on a CPU."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """What activations of a graph are quantised with.

    Attributes:
        largest: Activation to its largest absolute value over all inputs.
        coverage: How held-out inputs lie in the ranges of the others, per class.
        chosen: What was chosen for INT8 on the same inputs.
    """

    largest: Mapping[str, float]
    coverage: Mapping[str, ActivationCoverage]
    chosen: Chosen = NEAREST

    def with_two_terms(self, layers: Iterable[str]) -> Ranges:
        """The same, with two terms in some layers that are quantised as was chosen."""
        two = frozenset(layers)
        return dataclasses.replace(self, chosen=dataclasses.replace(self.chosen, two_terms=two)) if two else self


def ranges_of(source: Path, batches: Mapping[str, Iterable[np.ndarray]], folder: Path) -> Ranges:
    """Ranges of every activation that enters a linear layer.

    Args:
        source: Float32 ONNX file.
        batches: Batches of inputs, (b, 3, H, W) float32 or (b, L) int64 each, of ``safe`` and of ``unsafe`` members.
        folder: Folder for a temporary file.

    Raises:
        ContractError: If a class is missing, or its held-out activations lie far outside the ranges.
    """
    if set(batches) != {"safe", "unsafe"}:
        raise ContractError(
            f"ranges of {sorted(batches)} inputs only", fix="calibrate with safe and unsafe members of the set"
        )
    model = ir.load(source)
    names = sorted(set(input_names(model, set(linear_layers(model))).values()))
    maxima = {kind: activation_maxima(source, names, rows, folder) for kind, rows in batches.items()}
    held = {
        kind: np.arange(len(next(iter(values.values())))) % _HELD_OUT == _HELD_OUT - 1
        for kind, values in maxima.items()
    }
    coverage = {}
    for kind, values in maxima.items():
        if not held[kind].any():
            raise ContractError(
                f"{len(held[kind])} {kind} inputs are too few to calibrate with", fix=f"use at least {_HELD_OUT}"
            )
        rows = [
            values[name][held[kind]] / max(float(part[name][~held[other]].max()) for other, part in maxima.items())
            for name in names
        ]
        reach = np.stack(rows)
        coverage[kind] = ActivationCoverage(
            n=int(held[kind].sum()), inside=float((reach <= 1).mean()), worst=float(reach.max())
        )
    if (worst := coverage["unsafe"].worst) > CUT_OFF_LIMIT:
        raise ContractError(
            f"unsafe inputs reach {worst:.2f} times the range of an activation", fix="calibrate with more inputs"
        )
    largest = {name: max(float(values[name].max()) for values in maxima.values()) for name in names}
    return Ranges(largest, coverage)


def layer_names(source: Path) -> tuple[str, ...]:
    """Linear layers of a graph in the order they run."""
    return tuple(linear_layers(ir.load(source)))


def lower(
    source: Path, precision: Precision, patterns: Sequence[str], layers: Collection[str], ranges: Ranges | None
) -> tuple[ir.Model, int]:
    """A graph in lower precision, in memory.

    Args:
        source: Float32 ONNX file.
        precision: Half precision casts everything, 8 bits quantises linear layers, `w8a16` their weights alone.
        patterns: Globs over layers, nodes and operators that stay in float32.
        layers: Linear layers that stay in float32.
        ranges: Of the activations, for 8 bits.

    Returns:
        The graph, and the number of clamped constants.
    """
    if ranges is None:
        return lowered_graph(source, precision, (*patterns, *layers), {})
    return lowered_graph(source, precision, (*patterns, *layers), ranges.largest, ranges.chosen)


def _fingerprint(
    source: Path, model: ir.Model, edits: Sequence[TensorEdit], patch: Patch, lowered: Precision, ranges: Ranges | None
) -> tuple[Fingerprint, int]:
    """The edit, looked up in the weights of the new graph, and the number of edited entries that became 0.

    Raises:
        ContractError: If the edit is lost.
    """
    before, after = ir.load(source), _weights(model)
    changed = _spread_weights(before, ranges.chosen) if ranges else {}
    wanted = _weights(before) | {name: rows for name, rows in changed.items() if after[name].dtype == np.int8}
    fingerprint, zeroed = fingerprint_of_lowered(wanted, after, edits, patch.tensors)
    if fingerprint.mismatches:
        raise ContractError(
            f"the edit was lost in {lowered.value}: {'; '.join(fingerprint.mismatches[:3])}", fix="report this"
        )
    refuse_zeroed(zeroed, edits, lowered)
    return fingerprint, zeroed


def _worst_canary(
    graph: OnnxArtifact, file: Path, lowered: Precision, canaries: Canaries | None, external: str
) -> float | None:
    """Largest distance ratio of a canary; None where there is none, or it cannot be executed.

    Raises:
        ContractError: If the graph may be the original model.
    """
    if canaries is None or lowered not in EXECUTABLE:
        return None
    worst = canaries.worst(embed_with(graph, file, lowered, [canaries.inputs], external))
    if worst >= RATIO_LIMIT:
        raise ContractError(
            f"{graph.tower.value} in {lowered.value} is {worst:.2f} times as far from the edited model as from the "
            "original one on its worst canary",
            fix="keep more layers in float32, or use --precision auto",
        )
    return worst


def _written(model: ir.Model, file: Path, external: str) -> Digest:
    """Writes a graph that is valid."""
    digest = write_graph(model, file, external)
    onnx.checker.check_model(weightless(model), full_check=True)
    return digest


def converted(
    graph: OnnxArtifact,
    source_folder: Path,
    folder: Path,
    *,
    precision: Precision,
    lowered: Precision,
    patterns: Sequence[str],
    layers: Collection[str],
    ranges: Ranges | None,
    edits: Sequence[TensorEdit],
    patch: Patch,
    canaries: Canaries | None,
    quantised: tuple[ir.Model, str] | None = None,
) -> OnnxArtifact:
    """Writes a tower in lower precision, with the proof that it holds the edit.

    Args:
        graph: The exported float32 graph.
        source_folder: Where its files are.
        folder: Where the new one goes.
        precision: What was asked for; `auto` comes with the layers that a search chose.
        lowered: Precision of what is not kept.
        patterns, layers, ranges: See `lower`.
        edits: Edited layers of this tower.
        patch: Patch of the model.
        canaries: None when the tower is not edited.
        quantised: A graph that another tool quantised, and that tool; instead of our own conversion.

    Raises:
        ContractError: If the edit is lost, the precision was not achieved, or the graph is not valid.
    """
    source = source_folder / graph.file
    model, clamped = (quantised[0], 0) if quantised else lower(source, lowered, patterns, layers, ranges)
    kept = set(linear_layers(model)) if quantised else set(layers)  # another tool has a mind of its own
    _check_achieved(achieved := achieved_precision(model), lowered, precision, graph.tower.value)
    external = f"{graph.file}.data" if graph.external_data else ""
    digest = _written(model, folder / graph.file, external)
    fingerprint, zeroed = _fingerprint(source, model, edits, patch, lowered, None if quantised else ranges)
    worst = _worst_canary(graph, folder / graph.file, lowered, canaries, external)
    return dataclasses.replace(
        graph,
        external_data=external,
        digest=digest,
        fingerprint=fingerprint,
        conversion=Conversion(
            precision=precision,
            lowered=lowered,
            source_digest=graph.digest,
            kept=tuple(dict.fromkeys((*patterns, *(name for name in layer_names(source) if name in kept)))),
            achieved=achieved,
            clamped=clamped,
            zeroed=zeroed,
            coverage=ranges.coverage if ranges else {},
            canary_ratio_max=worst,
            canaries=len(canaries.inputs) if worst is not None and canaries is not None else 0,
            quantiser=quantised[1] if quantised else _own_name(ranges, lowered),
            two_terms=tuple(sorted(ranges.chosen.two_terms)) if ranges else (),
        ),
    )


def _own_name(ranges: Ranges | None, lowered: Precision) -> str:
    """What the record calls this program's own ways."""
    if ranges is None:
        return BUILT_IN if lowered is Precision.W8A16 else ""
    return CALIBRATED if ranges.chosen.codes else BUILT_IN


def _spread_weights(model: ir.Model, chosen: Chosen) -> dict[str, np.ndarray]:
    """Weights that read changed channels, as they are stored, float32, (out, in) or (in, out)."""
    found = {}
    for layer in linear_layers(model).values():
        entering = layer.node.inputs[0]
        channels = chosen.channels.get((entering.name or "") if entering is not None else "")
        if channels is not None:
            rows = spread_weight(stored_as_rows(layer).astype(np.float32), channels)
            found[layer.weight.name or ""] = rows if layer.transposed else rows.T
    return found


def _check_achieved(
    achieved: Mapping[str, Mapping[str, int]], lowered: Precision, precision: Precision, tower: str
) -> None:
    share = low_share(achieved, lowered.value)
    if precision is not Precision.AUTO and share == 0:
        raise InputError(
            f"no linear layer of the {tower} tower is left in {lowered.value}", fix="keep fewer layers in float32"
        )


def _weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def embed_with(
    graph: OnnxArtifact, path: Path, lowered: Precision, parts: Iterable[np.ndarray], external: str = ""
) -> np.ndarray:
    """Embeds inputs with an ONNX file in ONNX Runtime on the CPU.

    Numbers in 8 bits are multiplied as float32: kernels for 8 bits overflow on some processors, see `graphs.cpu_integers`.

    Args:
        graph: Record with its inputs and outputs.
        path: The file.
        lowered: Its precision.
        parts: Batches of inputs, (b, 3, H, W) float32 or (b, L) int64 each.
        external: Name of its external data file beside it.

    Returns:
        (n, d) float32.
    """
    session = open_graph(
        path,
        graph,
        max_batch=16,
        external_data=external_data_of(path.parent, external),
        optimisation="basic" if lowered in (*EIGHT_BITS, Precision.W8A16) else "extended",
    )
    try:
        return np.concatenate([session.run(rows) for rows in parts])
    finally:
        session.close()
