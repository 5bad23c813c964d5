"""Fingerprint of the edit: every way of not having it is found and named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from uwm_deploy.edits.patch import multiply_entries
from uwm_deploy.graphs.fingerprint import digest_of_array, fingerprint_by_value, fingerprint_of_graph
from uwm_deploy.towers.digests import digest_of_tensor


def _arrays(case):
    return {name: weight.numpy().copy() for name, weight in case.weights().items()}


def _check(case, arrays=None):
    return fingerprint_of_graph(_arrays(case) if arrays is None else arrays, case.edits, case.patch.tensors)


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 7)])
def test_digest_equals_the_one_of_the_model(shape):
    """A graph's array and the model's tensor with equal values have one digest, contiguous or not."""
    tensor = torch.randn(shape)
    assert digest_of_array(tensor.numpy()) == digest_of_tensor(tensor)
    assert digest_of_array(tensor.numpy().T) == digest_of_tensor(tensor.T)


def test_edited_weights_match(edited):
    """The edited graph has the edit, in every layer and entry."""
    found = _check(edited)
    assert found.mismatches == ()
    assert (found.layers, found.entries) == (2, sum(e.selected for e in edited.edits))


def test_unedited_graph_is_a_mismatch(unedited):
    """Without the edit, every layer is named."""
    found = _check(unedited)
    assert found.layers == found.entries == 0
    assert [line.split(":")[0] for line in found.mismatches] == [e.name for e in unedited.edits]


def test_one_missed_layer_is_named(edited, unedited):
    """Only the layer that lacks the edit is named; it does not count as checked."""
    missed = edited.edits[1].name
    arrays = _arrays(edited) | {missed: _arrays(unedited)[missed]}
    found = _check(edited, arrays)
    assert found.layers == 1
    assert len(found.mismatches) == 1
    assert found.mismatches[0].startswith(missed)


def test_patch_applied_twice_is_a_mismatch(edited):
    """A second application takes the edit back, which is found."""
    for name, weight in edited.weights().items():
        multiply_entries(weight, edited.patch.tensors[name].indices, -1.0)
    assert len(_check(edited).mismatches) == 2


def test_factor_zero_instead_of_minus_one_is_a_mismatch(zeroed):
    """Zeroed entries are neither edited nor unedited; the message says so."""
    found = _check(zeroed)
    assert len(found.mismatches) == 2
    assert "edited entries are zero" in found.mismatches[0]


def test_one_wrong_sign_is_a_mismatch(edited):
    """A single entry with the other sign is enough."""
    arrays = _arrays(edited)
    name = edited.edits[0].name
    arrays[name].reshape(-1)[7] *= -1
    found = _check(edited, arrays)
    assert [line.split(":")[0] for line in found.mismatches] == [name]


def test_missing_weight_is_a_mismatch(edited):
    """A weight that is not there by name is named."""
    arrays = _arrays(edited)
    del arrays[edited.edits[0].name]
    assert "no weight of this name" in _check(edited, arrays).mismatches[0]


def test_weights_of_another_shape_are_a_mismatch(edited):
    """A weight of another shape is reported, not indexed out of bounds."""
    arrays = _arrays(edited)
    arrays[edited.edits[0].name] = np.zeros((2, 2), dtype=np.float32)
    assert "shape" in _check(edited, arrays).mismatches[0]


def test_transposed_and_renamed_weights_are_found_by_value(edited):
    """An optimiser may rename and transpose; the values decide."""
    arrays = [np.ascontiguousarray(a.T) for a in _arrays(edited).values()]
    assert fingerprint_by_value([np.zeros(3, dtype=np.float32), *arrays], edited.edits).mismatches == ()


def test_unedited_weights_are_found_by_value(edited, unedited):
    """An optimised graph that kept one unedited weight is a mismatch that names the layer, transposed or not."""
    one, _ = _arrays(edited).values()
    _, other = _arrays(unedited).values()
    found = fingerprint_by_value([one, other.T], edited.edits)
    assert found.mismatches == (f"{edited.edits[1].name}: holds the unedited weight",)


def test_an_unedited_copy_beside_the_edited_weight_is_a_mismatch(edited, unedited):
    """A graph with both weights is refused: nobody knows which one is used."""
    both = [*_arrays(edited).values(), *_arrays(unedited).values()]
    assert len(fingerprint_by_value(both, edited.edits).mismatches) == 2
    beside = _arrays(edited) | {f"copy_{i}": a.T for i, a in enumerate(_arrays(unedited).values())}
    assert len(_check(edited, beside).mismatches) == 2


def test_no_edits_prove_nothing(edited):
    """Without a list of edited layers there is no fingerprint to find, which is a mismatch too."""
    assert fingerprint_of_graph(_arrays(edited), (), edited.patch.tensors).mismatches
    assert fingerprint_by_value(_arrays(edited).values(), ()).mismatches


def test_a_layer_the_record_forgot_is_a_mismatch(edited):
    """A layer of the patch that is in the graph but not in the edit record is named."""
    found = fingerprint_of_graph(_arrays(edited), edited.edits[:1], edited.patch.tensors)
    assert [line.split(":")[0] for line in found.mismatches] == [edited.edits[1].name]


def test_record_and_patch_must_agree(edited):
    """A record that promises another result than the patch is a mismatch."""
    other = dataclasses.replace(edited.edits[0], digest_after="sha256:" + "0" * 64)
    assert fingerprint_of_graph(_arrays(edited), (other, edited.edits[1]), edited.patch.tensors).mismatches
