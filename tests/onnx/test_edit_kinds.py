"""Replaced, new and trained tensors: found in every graph that holds them, and named in every graph that does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.families import FAMILIES, reduced
from tests.onnx.conftest import Exported, train
from tests.onnx.test_precision import PROFILE, convert
from uwm_deploy.edits.patch import Patch
from uwm_deploy.errors import ContractError
from uwm_deploy.graphs.constant_folding import computed_away
from uwm_deploy.graphs.cpu_integers import stored_forms
from uwm_deploy.graphs.fingerprint import (
    fingerprint_by_source,
    fingerprint_by_value,
    fingerprint_of_graph,
    fingerprint_of_lowered,
    refuse_zeroed,
)
from uwm_deploy.graphs.stored_weights import EIGHT_BITS, TYPES, in_type, named_weights
from uwm_deploy.records.edit import MAP_NAMES, EditKind, Placement, TensorEdit
from uwm_deploy.records.graph import OnnxArtifact, Precision, Target
from uwm_deploy.records.model import TowerName
from uwm_deploy.stages.compile import engine_from_onnx
from uwm_deploy.stages.export import onnx_from_tower
from uwm_deploy.stages.traced import sample_of
from uwm_deploy.stages.verify.audit import audit_of_engine, audit_of_graph
from uwm_deploy.towers.load import load_model

ON_CPU = (Precision.FP32, Precision.FP16, Precision.INT8)
LOW = (Precision.FP16, Precision.BF16, Precision.INT8, Precision.FP8, Precision.W8A16)


def placement_of(part: Exported) -> Placement:
    kinds = {edit.kind for edit in part.case.edits}
    return Placement.EMBEDDING if EditKind.ADDED in kinds else Placement.WEIGHTS


def second(part: Exported) -> list[TensorEdit]:
    """The tensors of the second step, a matrix and a vector."""
    found = [edit for edit in part.case.edits if edit.kind is not EditKind.MULTIPLIED]
    return sorted(found, key=lambda edit: -len(edit.shape))


def arrays_of(part: Exported) -> dict[str, np.ndarray]:
    return dict(named_weights(part.folder / part.artifact.file))


def unedited(part: Exported, edit: TensorEdit) -> np.ndarray:
    """The tensor without the step: the source model's, or a map that changes nothing."""
    if edit.name in part.case.before:
        return part.case.before[edit.name].numpy()
    return np.eye(edit.shape[0], dtype=np.float32) if len(edit.shape) == 2 else np.zeros(edit.shape, np.float32)


def lowered(part: Exported, folder: Path, precision: Precision) -> tuple[OnnxArtifact, Path]:
    """The graph in a precision, with a map behind the embedding in float32 as builds have it."""
    if precision is Precision.FP32:
        return part.artifact, part.folder
    kept = (MAP_NAMES[part.case.tower.name],) if placement_of(part) is Placement.EMBEDDING else ()
    return convert(part, folder, precision, patterns=kept), folder


def planted(path: Path, out: Path, wanted: np.ndarray, instead: np.ndarray) -> Path:
    """An ONNX file with one tensor's values exchanged, whatever its name, type and orientation there; exactly one."""
    model = onnx.load(path)
    exchanged = 0
    for tensor in model.graph.initializer:
        shape = [size for size in tensor.dims if size != 1]
        if tensor.data_type not in TYPES or sorted(shape) != sorted(wanted.shape):
            continue
        if tensor.data_type in EIGHT_BITS and wanted.ndim < 2:  # a zero point
            continue
        held = numpy_helper.to_array(tensor).reshape(shape)
        for form, other in zip(
            stored_forms(in_type(wanted, tensor.data_type)),
            stored_forms(in_type(instead, tensor.data_type)),
            strict=True,
        ):
            ways = [(found, new) for found, new in ((form, other), (form.T, other.T)) if np.array_equal(held, found)]
            if ways:
                content = np.ascontiguousarray(ways[0][1]).reshape(tensor.dims)
                tensor.CopyFrom(numpy_helper.from_array(content, tensor.name))
                exchanged += 1
                break
    assert exchanged == 1
    onnx.save(model, out)
    return out


# --- the exported graph ---------------------------------------------------------------------------------------------


def test_every_kind_is_found_in_the_exported_graph(solved: Exported) -> None:
    """By its name, with all that the step changed; every other weight of the tower is there, too."""
    edits = solved.case.edits
    assert {edit.kind for edit in second(solved)} == {
        EditKind.ADDED if placement_of(solved) is Placement.EMBEDDING else EditKind.REPLACED
    }
    assert [len(edit.shape) for edit in second(solved)] == [2, 1]
    found = solved.artifact.fingerprint
    assert (found.layers, found.entries, found.mismatches) == (len(edits), sum(e.selected for e in edits), ())
    path = solved.folder / solved.artifact.file
    audit = audit_of_graph(path, solved.case.tower.graph_module(), edits, solved.case.patch)
    assert (audit.layers, audit.edit, audit.differ, audit.structure) == (len(edits), (), (), ())


@pytest.mark.parametrize("number", [0, 1], ids=["matrix", "vector"])
def test_a_graph_without_the_step_is_named_by_tensor(solved: Exported, number: int) -> None:
    """The unedited tensor, one value that is off, a tensor of another shape, and none at all."""
    edit, arrays = second(solved)[number], arrays_of(solved)

    def problems(array: np.ndarray | None) -> tuple[str, ...]:
        others = {name: held for name, held in arrays.items() if name != edit.name}
        held = others if array is None else others | {edit.name: array}
        found = fingerprint_of_graph(held, solved.case.edits, solved.case.patch.tensors)
        assert found.layers == len(solved.case.edits) - len(found.mismatches)
        return found.mismatches

    assert problems(arrays[edit.name]) == ()
    old = (
        "holds the unedited weight"
        if edit.kind is EditKind.REPLACED
        else "is neither the edited nor the unedited tensor"
    )
    assert problems(unedited(solved, edit)) == (f"{edit.name}: {old}",)
    off = arrays[edit.name].copy()
    off.flat[0] = np.nextafter(off.flat[0], np.float32(np.inf))
    assert problems(off) == (f"{edit.name}: is neither the edited nor the unedited tensor",)
    assert problems(arrays[edit.name][:-1]) == (
        f"{edit.name}: has shape {arrays[edit.name][:-1].shape}, not {edit.shape}",
    )
    assert problems(None) == (f"{edit.name}: the graph has no weight of this name",)


@pytest.mark.parametrize("number", [0, 1], ids=["matrix", "vector"])
def test_record_and_patch_of_a_step_must_agree(solved: Exported, number: int) -> None:
    """A tensor that only one of them knows, or of which they promise different values, is a mismatch of the graph."""
    edit, arrays, patches = second(solved)[number], arrays_of(solved), solved.case.patch.tensors
    others = [e for e in solved.case.edits if e.name != edit.name]
    forgotten = fingerprint_of_graph(arrays, others, patches)
    assert forgotten.mismatches == (f"{edit.name}: is in the patch but not in the edit record",)
    without = {name: part for name, part in patches.items() if name != edit.name}
    disagree = (f"{edit.name}: the edit record and the patch disagree",)
    assert fingerprint_of_graph(arrays, solved.case.edits, without).mismatches == disagree
    lying = dataclasses.replace(edit, digest_after="sha256:" + "0" * 64)
    assert fingerprint_of_graph(arrays, [*others, lying], patches).mismatches == disagree


def test_an_unedited_matrix_beside_the_replaced_one_is_named(solved: Exported) -> None:
    """Under whatever name and turned: nobody knows which one is used. Two vectors may be equal by chance."""
    arrays = arrays_of(solved)
    for edit in second(solved):
        if edit.kind is not EditKind.REPLACED:
            continue
        beside = arrays | {"copy": unedited(solved, edit).T}
        found = fingerprint_of_graph(beside, solved.case.edits, solved.case.patch.tensors).mismatches
        if len(edit.shape) == 2:
            assert found == (f"{edit.name}: the graph holds the unedited weight as well, under another name",)
            by_value = fingerprint_by_value(beside.values(), solved.case.edits).mismatches
            assert by_value == (f"{edit.name}: holds the unedited weight",)
        else:
            assert found == ()


def test_renamed_and_turned_tensors_are_found_by_value(solved: Exported) -> None:
    """A matrix in either orientation, a vector as it is; one that is missing is named."""
    arrays = {name: np.ascontiguousarray(array.T) for name, array in arrays_of(solved).items()}
    assert fingerprint_by_value(arrays.values(), solved.case.edits).mismatches == ()
    for edit in second(solved):
        rest = [array for name, array in arrays.items() if name != edit.name]
        assert fingerprint_by_value(rest, solved.case.edits).mismatches == (
            f"{edit.name}: the edited weight is not in the graph",
        )


# --- lower precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", LOW)
def test_every_kind_survives_lower_precision(solved: Exported, tmp_path: Path, precision: Precision) -> None:
    """The graph holds every tensor of both steps under its name; a map behind the embedding stays in float32."""
    graph, folder = lowered(solved, tmp_path / "low", precision)
    assert graph.fingerprint.layers == len(solved.case.edits)
    assert graph.fingerprint.mismatches == ()
    held = dict(named_weights(folder / graph.file))
    for edit in second(solved):
        kept = held[edit.name].dtype == np.float32
        low_matrix = len(edit.shape) == 2 or precision in (Precision.FP16, Precision.BF16)
        assert kept is (edit.kind is EditKind.ADDED or not low_matrix), (edit.name, held[edit.name].dtype)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("number", [0, 1], ids=["matrix", "vector"])
def test_a_step_that_is_lost_in_lower_precision_is_named(
    solved: Exported, tmp_path: Path, precision: Precision, number: int
) -> None:
    """The unedited tensor, lowered as the graph lowers it; a step half as far; nothing but zeros."""
    edit, source = second(solved)[number], arrays_of(solved)
    graph, folder = lowered(solved, tmp_path / "low", precision)
    held = dict(named_weights(folder / graph.file))
    kind = next(t.data_type for t in onnx.load(folder / graph.file).graph.initializer if t.name == edit.name)
    turned = held[edit.name].shape != edit.shape
    old, new = unedited(solved, edit), source[edit.name]

    def problems(weight: np.ndarray) -> tuple[str, ...]:
        low = in_type(weight, kind)
        other = held | {edit.name: low.T if turned else low}
        return fingerprint_of_lowered(source, other, solved.case.edits, solved.case.patch.tensors)[0].mismatches

    assert problems(new) == ()
    for weight in (old, (old + new) / 2, np.zeros_like(new)):
        assert [line.partition(":")[0] for line in problems(weight)] == [edit.name]


def test_replaced_entries_do_not_hide_that_negated_ones_became_zero(solved: Exported) -> None:
    """More than half of the entries that a step multiplied: refused, however many others another step replaced."""
    edits = solved.case.edits
    multiplied = sum(edit.selected for edit in edits if edit.kind is EditKind.MULTIPLIED)
    refuse_zeroed(multiplied // 2, edits, Precision.INT8)
    with pytest.raises(
        ContractError, match=f"{multiplied // 2 + 1} of {multiplied} edited entries became zero in int8"
    ):
        refuse_zeroed(multiplied // 2 + 1, edits, Precision.INT8)


# --- what ONNX Runtime made of it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ON_CPU)
def test_every_kind_is_found_in_the_optimised_graph(solved: Exported, tmp_path: Path, precision: Precision) -> None:
    """Compiled with the proof, and audited again: each tensor of both steps by its values."""
    graph, folder = lowered(solved, tmp_path / "low", precision)
    engine = _compiled(solved, graph, folder, tmp_path / "engine")
    audit = _audit(solved, tmp_path / "engine" / engine, folder / graph.file, precision)
    assert audit == (len(solved.case.edits), ())


@pytest.mark.parametrize("precision", ON_CPU)
@pytest.mark.parametrize("number", [0, 1], ids=["matrix", "vector"])
def test_an_optimised_graph_without_the_step_is_named(
    solved: Exported, tmp_path: Path, precision: Precision, number: int
) -> None:
    """One tensor of the step exchanged for the unedited one in what was compiled: the audit names it, and only it."""
    edit = second(solved)[number]
    graph, folder = lowered(solved, tmp_path / "low", precision)
    engine = _compiled(solved, graph, folder, tmp_path / "engine")
    path = planted(
        tmp_path / "engine" / engine, tmp_path / "stale.onnx", arrays_of(solved)[edit.name], unedited(solved, edit)
    )
    layers, problems = _audit(solved, path, folder / graph.file, precision)
    assert layers == len(solved.case.edits) - 1
    assert [line.partition(":")[0] for line in problems] == [edit.name]


def test_a_compiler_that_loses_the_step_fails(
    solved: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build ends with the name of the tensor that is not in what was compiled."""
    from uwm_deploy.stages import compile as stage

    read = stage._weights
    for edit in second(solved):
        wanted = arrays_of(solved)[edit.name]

        def without(path: Path, wanted: np.ndarray = wanted):
            return (a for a in read(path) if not (np.array_equal(a, wanted) or np.array_equal(a, wanted.T)))

        monkeypatch.setattr(stage, "_weights", without)
        (tmp_path / edit.name).mkdir()
        with pytest.raises(ContractError, match=f"the edit was lost in .*{edit.name}: the edited weight is not in the"):
            engine_from_onnx(
                solved.artifact, solved.folder, Target.ONNXRUNTIME, PROFILE, solved.case.edits, tmp_path / edit.name
            )


def _compiled(part: Exported, graph: OnnxArtifact, source: Path, folder: Path) -> str:
    folder.mkdir()
    return engine_from_onnx(graph, source, Target.ONNXRUNTIME, PROFILE, part.case.edits, folder).file


def _audit(part: Exported, path: Path, source: Path, precision: Precision) -> tuple[int, tuple[str, ...]]:
    found = audit_of_engine(path, source, precision, part.case.edits, part.case.patch)
    return found.layers, found.edit


# --- trained --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ON_CPU)
def test_every_trained_tensor_is_found_in_every_graph(trained: Exported, tmp_path: Path, precision: Precision) -> None:
    """Weights, biases, normalisations and embeddings of a model that was trained as a whole."""
    edits = trained.case.edits
    assert trained.artifact.fingerprint.layers == len(edits)
    assert {len(edit.shape) for edit in edits} >= {1, 2}
    graph, folder = lowered(trained, tmp_path / "low", precision)
    assert graph.fingerprint.layers == len(edits)
    engine = _compiled(trained, graph, folder, tmp_path / "engine")
    assert _audit(trained, tmp_path / "engine" / engine, folder / graph.file, precision) == (len(edits), ())


def test_a_trained_tensor_that_a_graph_does_not_have_is_named(trained: Exported) -> None:
    """Any of them: the base's in its place, in the exported graph and by value."""
    arrays = arrays_of(trained)
    by_name, by_value = {}, {}
    for edit in trained.case.edits:
        other = arrays | {edit.name: trained.case.before[edit.name].numpy()}
        by_name[edit.name] = fingerprint_of_graph(other, trained.case.edits, trained.case.patch.tensors).mismatches
        by_value[edit.name] = fingerprint_by_value(other.values(), trained.case.edits).mismatches
    assert by_name == {name: (f"{name}: holds the unedited weight",) for name in by_name}
    for name, lines in by_value.items():
        assert [line.partition(":")[0] for line in lines] == [name]


def test_a_stale_tensor_in_an_optimised_graph_is_named(trained: Exported, tmp_path: Path) -> None:
    """Each tensor of the base in its place, positions that were gathered beforehand and turned weights included."""
    engine = _compiled(trained, trained.artifact, trained.folder, tmp_path / "engine")
    source, named = trained.folder / trained.artifact.file, {}
    for edit in trained.case.edits:
        old, new = trained.case.before[edit.name].numpy(), arrays_of(trained)[edit.name]
        if new.ndim > 2:  # it lies as the convolution wants it
            continue
        path = planted(tmp_path / "engine" / engine, tmp_path / "stale.onnx", new, old)
        layers, problems = _audit(trained, path, source, Precision.FP32)
        named[edit.name] = [line.partition(":")[0] for line in problems]
        assert layers == len(trained.case.edits) - 1
    assert named == {name: [name] for name in named}


def test_only_what_is_computed_without_an_input_may_be_gone(trained: Exported, tmp_path: Path) -> None:
    """Positions, which are gathered for ids that never change; no weight that is multiplied by an activation."""
    (positions,) = [edit.name for edit in trained.case.edits if "position_embedding" in edit.name]
    for precision in ON_CPU:
        graph, folder = lowered(trained, tmp_path / precision.value, precision)
        names = {edit.name for edit in trained.case.edits}
        assert computed_away(folder / graph.file) & names == {positions}
    arrays = [array for name, array in arrays_of(trained).items() if name != positions]
    edits = trained.case.edits
    assert fingerprint_by_value(arrays, edits, {positions}).mismatches == ()
    assert fingerprint_by_value(arrays, edits).mismatches == (f"{positions}: the edited weight is not in the graph",)
    negated = [dataclasses.replace(edit, kind=EditKind.MULTIPLIED) for edit in edits]
    assert len(fingerprint_by_value(arrays, negated, {positions}).mismatches) == 1
    source = {edit.name: arrays_of(trained)[edit.name] for edit in edits}
    assert fingerprint_by_source(arrays, source, edits, {positions}).mismatches == ()
    assert len(fingerprint_by_source(arrays, source, negated, {positions}).mismatches) == 1


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=[pytest.mark.slow] * (f not in ("clip-vit-l14", "siglip-base", "coca-vit-l14")))
        for f in FAMILIES
    ],
)
def test_a_model_of_every_family_may_be_trained_as_a_whole(family: str, tmp_path: Path) -> None:
    """Every parameter in the exported graph, and in the compiled one but for a learned query that is computed away."""
    model, recipe = load_model(reduced(family), folder=None, weights="random", device="cpu"), reduced(family)
    side = model.ref.image.crop
    shapes = {TowerName.IMAGE: (3, side, side), TowerName.TEXT: (model.ref.text.context_length,)}
    for tower in (model.image, model.text):
        folder = tmp_path / tower.name.value
        (folder / "engine").mkdir(parents=True)
        edits, patch = train(tower.graph_module(), tower.name)
        graph = onnx_from_tower(
            tower, sample_of(tower, shapes[tower.name], model.ref.text.eos_id), recipe.export,
            weights_digest=model.ref.weights_digest, edits=edits, patch=patch, folder=folder,
        )  # fmt: skip
        assert graph.fingerprint.layers == len(edits)
        engine = engine_from_onnx(graph, folder, Target.ONNXRUNTIME, PROFILE, edits, folder / "engine")
        gone = len(edits) - int(engine.settings["edited_layers"])
        assert gone == COMPUTED.get((family, tower.name), 0)
        audit = audit_of_engine(folder / "engine" / engine.file, folder / graph.file, Precision.FP32, edits, patch)
        assert (audit.layers, audit.edit) == (len(edits) - gone, ())


COMPUTED = {
    ("siglip-base", TowerName.IMAGE): 2,  # in_proj of the probe's attention
    ("siglip2-base", TowerName.IMAGE): 2,
    ("coca-vit-l14", TowerName.IMAGE): 4,  # the queries, their normalisation, the bias of in_proj
}
"""Parameters of the reduced towers that ONNX Runtime computes with before it sees an image."""


def test_a_patch_of_digests_alone_is_enough_for_a_graph(trained: Exported) -> None:
    """It holds no values, so it is a few bytes per tensor, and what a graph holds is compared with it all the same."""
    patch = trained.case.patch
    assert len(patch.to_bytes()) < 1000 * len(patch.tensors)
    arrays = arrays_of(trained)
    assert fingerprint_of_graph(arrays, trained.case.edits, Patch(patch.tensors).tensors).mismatches == ()
    source = {edit.name: arrays[edit.name] for edit in trained.case.edits}
    assert fingerprint_by_source(arrays.values(), source, trained.case.edits).mismatches == ()
