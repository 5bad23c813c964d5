"""Stage `export`: the graph is the edited tower, and nothing but the tower."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from uwm_deploy.errors import ContractError
from uwm_deploy.recipes.compile_spec import ExportSpec

STANDARD = {"", "ai.onnx"}


def _run(path: Path, inputs: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    return result


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_graph_equals_the_tower_at_every_batch(exported, rows):
    """ONNX Runtime's embeddings are the tower's, normalised, within float32 rounding, at any batch."""
    inputs = exported.case.inputs(rows, seed=rows)
    with torch.no_grad():
        embeds = exported.case.tower.embed(inputs)
    wanted = torch.nn.functional.normalize(embeds, dim=-1).numpy()
    assert np.abs(_run(exported.folder / exported.artifact.file, inputs.numpy()) - wanted).max() < 1e-5


def test_only_the_batch_is_dynamic(exported):
    """The first dimension of input and output is named `batch`, every other one is a number."""
    for spec in (*exported.artifact.inputs, *exported.artifact.outputs):
        assert spec.shape[0] == "batch"
        assert all(isinstance(d, int) and d > 0 for d in spec.shape[1:])
    proto = onnx.load(exported.folder / exported.artifact.file)
    assert [v.name for v in proto.graph.input] == [exported.case.tower.input_name]
    assert [v.name for v in proto.graph.output] == [exported.case.tower.output_names[0]]


def test_every_weight_keeps_its_name_and_value(exported):
    """Each parameter of the tower is an initialiser of the same name and the same bytes, equal ones not merged."""
    proto = onnx.load(exported.folder / exported.artifact.file)
    held = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    assert max(collections.Counter(i.name for i in proto.graph.initializer).values()) == 1
    for name, parameter in exported.case.tower.graph_module().named_parameters():
        assert np.array_equal(held[name], parameter.detach().numpy()), name


def test_only_standard_operators(exported):
    """No node, function or import outside the standard domain, and the opset that was asked for."""
    proto = onnx.load(exported.folder / exported.artifact.file)
    assert {n.domain for n in proto.graph.node} <= STANDARD
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", exported.artifact.opset)]
    assert not proto.functions


def test_no_source_path_in_the_file(exported):
    """The file holds no path of this machine, no stack trace and no node metadata."""
    data = (exported.folder / exported.artifact.file).read_bytes()
    for needle in (
        b"site-packages",
        b"stack_trace",
        b".py",
        str(Path.cwd()).encode(),
        str(Path.home()).encode() + b"/",
    ):
        assert needle not in data
    proto = onnx.load(exported.folder / exported.artifact.file)
    assert not any(n.metadata_props or n.doc_string for n in proto.graph.node)
    assert not proto.metadata_props
    assert not proto.graph.doc_string


def test_exporting_again_gives_the_same_bytes(exported, tmp_path):
    """Two exports of equal weights are byte-identical."""
    again = exported.case.export(tmp_path)
    assert (tmp_path / again.file).read_bytes() == (exported.folder / exported.artifact.file).read_bytes()
    assert again == exported.artifact


def test_the_edit_is_found_in_the_graph(exported):
    """The fingerprint counts every edited layer and entry of the tower."""
    found = exported.artifact.fingerprint
    assert found.mismatches == ()
    assert found.layers == len(exported.case.edits) == 2
    assert found.entries == sum(edit.selected for edit in exported.case.edits)


def test_exporting_an_unedited_tower_is_refused(unedited, tmp_path):
    """A tower without its edit never becomes an artifact; the error names the layer."""
    with pytest.raises(ContractError, match=r"layers\.0\.self_attn\.out_proj\.weight: holds the unedited weight"):
        unedited.export(tmp_path)


def test_options_of_the_text_graph(text_export):
    """int32 ids, no normalisation, external data: the same embeddings, from two files."""
    artifact, case = text_export.artifact, text_export.case
    assert artifact.inputs[0].dtype == "int32"
    assert not artifact.normalised
    assert artifact.external_data == "text.onnx.data"
    weights = sum(p.numel() * 4 for p in case.tower.graph_module().parameters())
    assert (text_export.folder / artifact.external_data).stat().st_size > 0.9 * weights
    inputs = case.inputs(3)
    with torch.no_grad():
        wanted = case.tower.embed(inputs).numpy()
    assert np.abs(_run(text_export.folder / artifact.file, inputs.int().numpy()) - wanted).max() < 1e-5


def test_external_data_counts_in_the_digest(text_export, tmp_path):
    """Exporting again over old files gives the same digest and does not append to the old weights."""
    spec = ExportSpec(normalise=False, ids_dtype="int32")
    sizes = set()
    for _ in range(2):
        again = text_export.case.export(tmp_path, spec, external_data_bytes=1)
        sizes.add((tmp_path / again.external_data).stat().st_size)
        assert again.digest == text_export.artifact.digest
    assert len(sizes) == 1


def test_text_is_pooled_at_its_first_end_token(text_export):
    """What follows the end token changes nothing; the word before it does."""
    inputs = text_export.case.inputs(1)
    inputs[0, 1:4] = torch.tensor([5, 6, 99])
    after, before = inputs.clone(), inputs.clone()
    after[0, 4:8] = torch.tensor([98, 99, 97, 3])
    before[0, 2] = 7
    base, same, other = (_run(text_export.folder / "text.onnx", ids.int().numpy()) for ids in (inputs, after, before))
    assert np.abs(base - same).max() < 1e-6
    assert np.abs(base - other).max() > 1e-4


def test_wrong_end_token_is_refused(edited, tmp_path):
    """A tower that pools somewhere else than at the end token is not exported."""
    module = edited.tower.graph_module()
    module.text_model.eos_token_id = 55
    with pytest.raises(ContractError, match="end token"):
        edited.export(tmp_path)


def test_frozen_weights_are_checked_too(edited, tmp_path, monkeypatch):
    """A weight that lost its name is found whether or not its gradient is switched on."""
    import uwm_deploy.stages.traced as stage

    for parameter in edited.tower.graph_module().parameters():
        parameter.requires_grad_(False)
    original = stage._restore_names

    def rename(model):
        original(model)
        value = model.graph.initializers.pop("text_projection.weight")
        value.name = "val_1"
        model.graph.initializers["val_1"] = value

    monkeypatch.setattr(stage, "_restore_names", rename)
    with pytest.raises(ContractError, match=r"text_projection\.weight"):
        edited.export(tmp_path)
