"""Another edit in graphs and engines that exist, with the proof that it is there and the old one is not."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from safetensors.numpy import save_file

from uwm_deploy.edits.patch import Patch, TensorPatch, replaced
from uwm_deploy.errors import ContractError, IntegrityError, PrerequisiteError
from uwm_deploy.graphs.child_process import made_by_child
from uwm_deploy.graphs.fingerprint import (
    digest_of_array,
    digest_of_onnx,
    fingerprint_by_source,
    fingerprint_by_value,
    fingerprint_of_graph,
    fingerprint_of_lowered,
    refuse_zeroed,
)
from uwm_deploy.graphs.layers import linear_layers
from uwm_deploy.graphs.stored_weights import (
    EIGHT_BITS,
    FLOAT,
    TYPES,
    Replacement,
    in_type,
    named_weights,
    read_tensor,
    refuse_other_scales,
    replace_tensors,
)
from uwm_deploy.graphs.tensor_layout import stored_tensors
from uwm_deploy.records.edit import MAP_NAMES, EditKind, EditRecord, EditStep, Method, TensorEdit
from uwm_deploy.records.files import digest_of_bytes, joined_digest
from uwm_deploy.records.graph import EngineArtifact, OnnxArtifact, Precision, Target
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.runtime.providers import provider_reason
from uwm_deploy.runtime.session import external_data_of, open_engine, open_graph, provider_of, usable
from uwm_deploy.runtime.tensorrt import MODULES
from uwm_deploy.safeground.embedded import parity

COSINE_MIN = 0.99
"""A refittable engine that is farther from its graph, before or after, is broken; the policy's limits come later."""

_REFITTER = "uwm_deploy.graphs.engine_refitter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """One edit for another.

    Attributes:
        old: Record of the edit that is there.
        old_patch: Its patch.
        new: Record of the edit that replaces it.
        new_patch: Its patch.
        content: The file of the new patch.
        changes: Tensor to its values before and after, of every tensor that either edit names.
    """

    old: EditRecord
    old_patch: Patch
    new: EditRecord
    new_patch: Patch
    content: bytes
    changes: Mapping[str, Replacement]

    def of(self, tower: TowerName) -> dict[str, Replacement]:
        """The changes of a tower."""
        names = {tensor.name for edit in (self.old, self.new) for tensor in edit.of(tower)}
        return {name: change for name, change in self.changes.items() if name in names}

    def tensors(self, tower: TowerName) -> list[TensorEdit]:
        """What each tensor of a tower is to be now, those that only the old edit names included."""
        new = {tensor.name: tensor for tensor in self.new.of(tower)}
        return [*new.values(), *(_back(tensor) for tensor in self.old.of(tower) if tensor.name not in new)]


def _back(tensor: TensorEdit) -> TensorEdit:
    """A tensor that no edit changes any more."""
    return dataclasses.replace(
        tensor, keep_mass=1.0, factor=1.0, selected=0, share=0.0, digest_after=tensor.digest_before
    )


def reverted(edit: EditRecord, patch: Patch) -> tuple[EditRecord, Patch]:
    """The edit of nothing, in the same tensors: what takes another edit back.

    A map behind the embedding stays as a node of the graphs; the identity takes the place of its values.

    Returns:
        Record and patch, as the method `none` has them.
    """
    tensors, parts = [], {}
    for tensor in edit.tensors:
        if tensor.kind is EditKind.ADDED:
            same = replaced(None, identity_like(tensor))
            parts[tensor.name] = same
            tensors.append(dataclasses.replace(tensor, digest_after=same.digest_after))
            continue
        kind = patch.tensors[tensor.name].indices.dtype
        parts[tensor.name] = TensorPatch(
            indices=torch.empty(0, dtype=kind),
            factor=1.0,
            digest_before=tensor.digest_before,
            digest_after=tensor.digest_before,
        )
        tensors.append(dataclasses.replace(_back(tensor), kind=EditKind.MULTIPLIED))
    nothing = Patch(parts)
    record = dataclasses.replace(
        edit,
        edited_weights_digest=edit.model.weights_digest,
        patch_digest=digest_of_bytes(nothing.to_bytes()),
        tensors=tuple(tensors),
        steps=(EditStep(method=Method.NONE, scores_digest=edit.first.scores_digest),),
    )
    return record, nothing


def identity_like(tensor: TensorEdit) -> torch.Tensor:
    """Weight or bias of the map that changes nothing.

    Args:
        tensor: Edit of a map's weight or bias.

    Returns:
        The identity (d, d) float32 for a weight, zeros (d,) float32 for a bias.
    """
    return torch.eye(tensor.shape[0]) if len(tensor.shape) == 2 else torch.zeros(tensor.shape)


def held_tensors(graphs: Sequence[OnnxArtifact], folder: Path, digests: Mapping[str, Digest]) -> dict[str, np.ndarray]:
    """Tensors of the exported graphs by name.

    Args:
        graphs: Records of the graphs.
        folder: Where their files are.
        digests: Tensor to the digest that it must have.

    Returns:
        Tensors by name, float32, any shape (the tensor's own).

    Raises:
        IntegrityError: If a graph does not hold the tensor that is promised.
    """
    found = {}
    for graph in graphs:
        for tensor in stored_tensors(folder / graph.file, graph.external_data):
            if tensor.name in digests and tensor.kind == FLOAT:
                found[tensor.name] = read_tensor(folder, tensor)
    for name, digest in digests.items():
        if name not in found or digest_of_array(found[name]) != digest:
            raise IntegrityError(f"{name}: the graph does not hold the tensor that is promised", fix="build again")
    return found


def without_edit(held: Mapping[str, np.ndarray], edit: EditRecord, patch: Patch) -> dict[str, np.ndarray]:
    """Tensors of the source model, by taking a patch back; for a new map, the map that changes nothing.

    Args:
        held: Tensors of the edited model by name, float32, any shape.
        edit: Record of the edit.
        patch: Patch of the edit.

    Returns:
        Tensors by name, float32, any shape (the tensor's own).

    Raises:
        ContractError: If a part has no exact inverse.
        IntegrityError: If the result is not the tensor that the patch was made from.
    """
    back = patch.inverse()
    tensors = {name: torch.from_numpy(held[name].copy()) for name in back.tensors}
    back.apply(tensors)
    same = {t.name: identity_like(t).numpy() for t in edit.tensors if t.kind is EditKind.ADDED}
    return {name: tensor.numpy() for name, tensor in tensors.items()} | same


def refit_graph(graph: OnnxArtifact, source_folder: Path, folder: Path, swap: Swap) -> OnnxArtifact:
    """Replaces the edited initialisers of an exported graph; every other byte stays.

    Args:
        graph: The exported graph.
        source_folder: Where its files are; only read.
        folder: Where the new files go.
        swap: The edits.

    Raises:
        IntegrityError: If the graph's files are not those its record describes.
        ContractError: If the old edit is not in it, or the new one is not in what comes out.
    """
    source = source_folder / graph.file
    _check_digest(source, graph.external_data, graph.digest)
    old, new = swap.old.of(graph.tower), swap.tensors(graph.tower)
    before = fingerprint_of_graph(dict(named_weights(source)), old, swap.old_patch.tensors)
    if before.mismatches:
        raise ContractError(f"the edit is not in {graph.file}: {before.mismatches[0]}", fix="build again")
    replace_tensors(source, graph.external_data, folder, swap.of(graph.tower))
    arrays = dict(named_weights(folder / graph.file))
    after = fingerprint_of_graph(arrays, swap.new.of(graph.tower), swap.new_patch.tensors)
    left = fingerprint_by_value(arrays.values(), _changed(old, new))
    if after.mismatches or left.layers:
        why = after.mismatches[0] if after.mismatches else f"{left.layers} layers hold the old edit"
        raise ContractError(f"the new edit is not in {graph.file}: {why}", fix="report this")
    return dataclasses.replace(
        graph,
        digest=digest_of_onnx(folder / graph.file, graph.external_data),
        weights_digest=swap.new.edited_weights_digest,
        fingerprint=after,
    )


def reason_against(engine: EngineArtifact) -> str:
    """Why an engine cannot be refitted here; empty when it can."""
    if engine.target is Target.ONNXRUNTIME:
        closed = engine.settings.get("optimisation") == "compiled"
        return (
            f"its weights are inside engines of {provider_of(engine)}"
            if closed
            else provider_reason(provider_of(engine))
        )
    if engine.target is Target.OPENVINO:
        return "a model of OpenVINO is converted from its graph (build)"
    if engine.settings.get("refittable") != "true":
        return "it was not built refittable (build --refittable, on a GPU)"
    return usable(engine.target)


def refit_engine(
    engine: EngineArtifact,
    source_folder: Path,
    folder: Path,
    swap: Swap,
    *,
    graphs: tuple[Path, Path],
    sample: np.ndarray,
) -> tuple[EngineArtifact, dict[str, int]]:
    """Puts another edit into an engine. What comes out is unproven until it is measured.

    Args:
        engine: Its record.
        source_folder: Where its files are; only read.
        folder: Where the new files go.
        swap: The edits.
        graphs: The tower's exported graph with the old and with the new edit, in the order of the words.
        sample: (n, 3, H, W) float32 or (n, L) int64, inputs on which an engine of TensorRT is compared with the graphs.

    Returns:
        The new record, without the graph it belongs to now; and tensor to its element type.

    Raises:
        PrerequisiteError: If it cannot be refitted here.
        InputError: If the new edit moves the scales of a quantised weight.
        ContractError: If the old edit is not in it, or the new one is not in what comes out.
    """
    if reason := reason_against(engine):
        raise PrerequisiteError(f"{engine.variant} cannot be refitted: {reason}", fix="leave the variant out")
    _check_digest(source_folder / engine.file, engine.external_data, engine.digest)
    started = time.perf_counter()
    if engine.target is Target.ONNXRUNTIME:
        kinds = _rewritten(engine, source_folder, folder, swap)
    else:
        kinds = _refitted(engine, source_folder, folder, swap, graphs, sample)
    made = dataclasses.replace(
        engine,
        digest=digest_of_onnx(folder / engine.file, engine.external_data),
        weights_digest=swap.new.edited_weights_digest,
        settings=dict(engine.settings) | {"refitted": "true"},
        runnable=not usable(engine.target),
        seconds=time.perf_counter() - started,
    )
    return made, kinds


def refit_converted(
    graph: OnnxArtifact, exported: OnnxArtifact, engine: EngineArtifact, kinds: Mapping[str, int], swap: Swap, *,
    same_file: bool,
) -> OnnxArtifact:  # fmt: skip
    """Record of a graph in lower precision from which a refitted engine was compiled; the graph is not made again.

    Args:
        graph: Its record before.
        exported: The tower's exported graph with the new edit.
        engine: A refitted engine that was compiled from it.
        kinds: Tensor to its element type.
        swap: The edits.
        same_file: Whether the engine's file is the graph's.

    Raises:
        ContractError: If too many edited entries become zero.
    """
    assert graph.conversion is not None
    edits = swap.new.of(graph.tower)
    source = {name: swap.changes[name].after for name in kinds}
    lowered = {name: in_type(swap.changes[name].after, kind) for name, kind in kinds.items()}
    fingerprint, zeroed = fingerprint_of_lowered(source, lowered, edits, swap.new_patch.tensors)
    refuse_zeroed(zeroed, edits, graph.conversion.lowered)
    return dataclasses.replace(
        graph,
        digest=engine.digest if same_file else joined_digest([graph.digest, swap.new.patch_digest]),
        weights_digest=swap.new.edited_weights_digest,
        fingerprint=fingerprint,
        # Canaries and the coverage of ranges were measured with the old edit.
        conversion=dataclasses.replace(
            graph.conversion,
            source_digest=exported.digest,
            zeroed=zeroed,
            coverage={},
            canary_ratio_max=None,
            canaries=0,
        ),
    )


def _check_digest(path: Path, external: str, digest: Digest) -> None:
    if digest_of_onnx(path, external) != digest:
        raise IntegrityError(f"{path.name} is not the file its record describes", fix="restore the bundle")


def _changed(old: Sequence[TensorEdit], new: Sequence[TensorEdit]) -> list[TensorEdit]:
    """Matrices that are others now; two vectors may be equal by chance."""
    after = {tensor.name: tensor.digest_after for tensor in new}
    return [t for t in old if len(t.shape) > 1 and after[t.name] != t.digest_after]


def _rewritten(engine: EngineArtifact, source_folder: Path, folder: Path, swap: Swap) -> dict[str, int]:
    """An ONNX graph with its initialisers rewritten, and the proof."""
    edits, changes = swap.tensors(engine.tower), swap.of(engine.tower)
    stored = replace_tensors(source_folder / engine.file, engine.external_data, folder, changes)
    kinds = {name: tensor.kind for name, tensor in stored.items()}
    arrays = [array for _, array in named_weights(folder / engine.file)]
    new, old = (
        {name: in_type(getattr(changes[name], side), kind) for name, kind in kinds.items()}
        for side in ("after", "before")
    )
    found = fingerprint_by_source(arrays, new, edits)
    moved = [e for e in edits if len(e.shape) > 1 and not np.array_equal(new[e.name], old[e.name])]
    left = fingerprint_by_source(arrays, old, moved)
    if found.mismatches or left.layers:
        why = found.mismatches[0] if found.mismatches else f"{left.layers} layers hold the old edit"
        raise ContractError(f"the new edit is not in {engine.variant}/{engine.file}: {why}", fix="report this")
    return kinds


def _refitted(
    engine: EngineArtifact,
    source_folder: Path,
    folder: Path,
    swap: Swap,
    graphs: tuple[Path, Path],
    sample: np.ndarray,
) -> dict[str, int]:
    """An engine of TensorRT with other weights, compared with its graph before and after; needs a GPU."""
    whole = swap.of(engine.tower)
    changes = {name: c for name, c in whole.items() if not np.array_equal(c.before, c.after)}
    kinds = {name: _kind_of(name, change, Precision(engine.precision)) for name, change in whole.items()}
    for name, change in changes.items():
        refuse_other_scales(name, engine.variant, change, kinds[name])
    _check_against_graph(engine, source_folder / engine.file, graphs[0], sample, "before the refit")
    if not changes:
        shutil.copyfile(source_folder / engine.file, folder / engine.file)
        return kinds
    turned = [
        layer.weight.name
        for layer in linear_layers(ir.load(graphs[1])).values()
        if layer.weight.name in changes and layer.transpose is not None
    ]
    save_file(
        {name: np.ascontiguousarray(change.after) for name, change in changes.items()},
        folder / f"{engine.tower.value}.weights.safetensors",
    )
    spec = {
        "module": MODULES[engine.target],
        "source": str((source_folder / engine.file).resolve()),
        "engine": engine.file,
        "weights": f"{engine.tower.value}.weights.safetensors",
        "turned": turned,
    }
    made_by_child(_REFITTER, spec, engine.target.value, engine.tower.value, folder, "refit")
    _check_against_graph(engine, folder / engine.file, graphs[1], sample, "after the refit")
    return kinds


def _kind_of(name: str, change: Replacement, precision: Precision) -> int:
    """Element type of a tensor in an engine: a map behind the embedding stays in float32, vectors beside 8 bits do too."""
    is_map, kind = name.partition(".")[0] in MAP_NAMES.values(), _KINDS[precision]
    return FLOAT if is_map or (kind in EIGHT_BITS and change.after.ndim != 2) else kind


_KINDS = dict(zip((Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8, Precision.FP8), TYPES, strict=True))
_KINDS[Precision.W8A16] = _KINDS[Precision.INT8]
"""Element type of the weights of a precision."""


def _check_against_graph(engine: EngineArtifact, plan: Path, graph: Path, rows: np.ndarray, when: str) -> None:
    """TensorRT has been seen to lose the bias of a matrix multiplication in refittable engines."""
    session = open_engine(engine, plan.read_bytes(), {})
    try:
        found = session.run(rows)
    finally:
        session.close()
    external = external_data_of(graph.parent, f"{graph.name}.data")
    exported = open_graph(graph, engine, max_batch=len(rows), external_data=external)
    try:
        wanted = exported.run(rows)
    finally:
        exported.close()
    measured = parity(engine.tower, engine.outputs[0].name, len(rows), wanted, found)
    if not measured.finite or measured.cosine_min < COSINE_MIN:
        raise ContractError(
            f"{engine.variant} is not its graph {when}: smallest cosine {measured.cosine_min:.4f}",
            fix="build it again; TensorRT may lose a bias in a refittable engine",
        )
