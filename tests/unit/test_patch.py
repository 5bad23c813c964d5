"""The patch of an edit: every kind of change to a file and back, applied whole or not at all, refused elsewhere."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from uwm_deploy.edits.patch import Patch, TensorPatch, differing_bits, flip_bits, multiply_entries, replaced
from uwm_deploy.errors import ContractError, InputError, IntegrityError
from uwm_deploy.records.edit import EditKind
from uwm_deploy.towers.digests import digest_of_tensor

MATRIX, VECTOR, MAP, SCALE = "text_projection.weight", "ln.bias", "image_map.weight", "fc.weight"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def multiplied(before: Tensor, indices: list[int], factor: float = -1.0) -> tuple[TensorPatch, Tensor]:
    """A patch of some entries, and what it makes."""
    at, after = torch.tensor(indices, dtype=torch.int32), before.clone()
    multiply_entries(after, at, factor)
    digests = {"digest_before": digest_of_tensor(before), "digest_after": digest_of_tensor(after)}
    return TensorPatch(indices=at, factor=factor, **digests), after


def whole() -> tuple[Patch, dict[str, Tensor], dict[str, Tensor]]:
    """A patch with every kind that holds values; the tensors that it is for, and those that it makes."""
    before = {MATRIX: noise(4, 6), VECTOR: noise(6, seed=1), MAP: torch.zeros(3, 3), SCALE: noise(5, 7, seed=2)}
    after = {MATRIX: noise(4, 6, seed=3), VECTOR: noise(6, seed=4), MAP: noise(3, 3, seed=5)}
    parts = {name: replaced(None if name == MAP else before[name], after[name]) for name in after}
    parts[SCALE], after[SCALE] = multiplied(before[SCALE], [0, 3, 8, 34])
    return Patch(parts), before, after


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name].view(torch.int32), right[name].view(torch.int32)) for name in left
    )


def written(patch: Patch, folder: Path) -> Path:
    path = folder / "patch.safetensors"
    path.write_bytes(patch.to_bytes())
    return path


# --- the file -------------------------------------------------------------------------------------------------------


def test_every_kind_comes_back_from_its_bytes(tmp_path: Path) -> None:
    """Kind, digests, factor, indices and bits are what was written, and the patch read back makes the same weights."""
    patch, before, after = whole()
    trained = TensorPatch(kind=EditKind.TRAINED, digest_before="sha256:0", digest_after="sha256:1")
    again = Patch.from_file(written(Patch({**patch.tensors, "q.weight": trained}), tmp_path))
    assert again.tensors.keys() == {*patch.tensors, "q.weight"}
    for name, part in {**patch.tensors, "q.weight": trained}.items():
        found = again.tensors[name]
        for field in ("kind", "digest_before", "digest_after", "factor"):
            assert getattr(found, field) == getattr(part, field), (name, field)
        for field in ("indices", "bits"):
            assert torch.equal(getattr(found, field), getattr(part, field)), (name, field)
            assert getattr(found, field).dtype is getattr(part, field).dtype
    tensors = copies(before)
    Patch({name: again.tensors[name] for name in patch.tensors}).apply(tensors)
    assert same_bits(tensors, after)


def test_equal_patches_are_equal_bytes_in_any_order() -> None:
    """The order in which tensors were edited is not in the file; one other bit of a value is."""
    patch, before, after = whole()
    turned = Patch(dict(reversed(list(patch.tensors.items()))))
    assert {patch.to_bytes() for _ in range(5)} | {turned.to_bytes()} == {patch.to_bytes()}
    other = after[VECTOR].clone()
    other[2] = torch.nextafter(other[2], torch.tensor(math.inf))
    assert Patch({**patch.tensors, VECTOR: replaced(before[VECTOR], other)}).to_bytes() != patch.to_bytes()


def test_the_format_before_is_refused_by_its_name(tmp_path: Path) -> None:
    """A patch of an older release names layers, not tensors; the error says which format was found and what to pass."""
    path, indices = tmp_path / "patch.safetensors", torch.arange(3, dtype=torch.int32)
    layers = {"fc": {"factor": -1.0, "digest_before": "sha256:0", "digest_after": "sha256:1"}}
    save_file({"fc": indices}, path, {"format": "uwm-patch-1", "layers": json.dumps(layers)})
    with pytest.raises(InputError, match=r"no patch file of this release \(uwm-patch-1\)") as caught:
        Patch.from_file(path)
    assert "that this release built" in caught.value.fix
    save_file({"fc": indices}, path)
    with pytest.raises(InputError, match="no format"):
        Patch.from_file(path)


@pytest.mark.parametrize("damage", ["cut", "kind", "field", "tensor", "json"])
def test_a_file_that_is_not_whole_is_bad_input(damage: str, tmp_path: Path) -> None:
    """Cut, with an unknown kind, a missing field, a tensor that is not there, or a list that is no JSON."""
    patch, _, _ = whole()
    path = written(patch, tmp_path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        about = {name: {"kind": "replaced", "factor": 1.0, "digest_before": "a", "digest_after": "b"} for name in "xy"}
        if damage == "kind":
            about["x"]["kind"] = "guessed"
        if damage == "field":
            del about["x"]["digest_after"]
        if damage != "tensor":
            del about["y"]
        text = json.dumps(about)[: -1 if damage == "json" else None]
        save_file({"x": torch.zeros(2, dtype=torch.int32)}, path, {"format": "uwm-patch-2", "tensors": text})
    with pytest.raises(InputError, match="not a whole patch file"):
        Patch.from_file(path)


# --- there and back -------------------------------------------------------------------------------------------------


def test_the_inverse_takes_every_kind_back_bit_for_bit() -> None:
    """Negated entries and replaced values are the old bits again; a new tensor has no part in the inverse."""
    patch, before, _ = whole()
    assert patch.exact
    tensors = copies(before)
    patch.apply(tensors)
    back = patch.inverse()
    assert set(back.tensors) == {MATRIX, VECTOR, SCALE}
    back.apply(tensors)
    assert same_bits({name: tensors[name] for name in back.tensors}, {name: before[name] for name in back.tensors})
    assert back.inverse().to_bytes() == Patch({name: patch.tensors[name] for name in back.tensors}).to_bytes()


@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=2, max_size=12))
@settings(deadline=None)
def test_replaced_bits_hold_any_value(values: list[float]) -> None:
    """Minus zero, subnormal numbers, infinity and NaN come back as the bits that they were."""
    half = len(values) // 2
    before, after = torch.tensor(values[:half]), torch.tensor(values[half : 2 * half])
    tensor, bits = before.clone(), differing_bits(before, after)
    flip_bits(tensor, bits)
    assert same_bits({"": tensor}, {"": after})
    flip_bits(tensor, bits)
    assert same_bits({"": tensor}, {"": before})


@pytest.mark.parametrize(
    ("part", "what"),
    [
        (multiplied(noise(3, 3), [1, 2], 0.0)[0], "factor 0.0 of a.weight"),
        (multiplied(noise(3, 3), [1, 2], 0.3)[0], "factor 0.3 of a.weight"),
        (TensorPatch(kind=EditKind.TRAINED, digest_before="a", digest_after="b"), "trained weights of a.weight"),
    ],
    ids=["zero", "rounding", "trained"],
)
def test_what_forgets_the_old_value_has_no_inverse(part: TensorPatch, what: str) -> None:
    """Said with the tensor's name, whatever else is in the patch; with nothing selected any factor has one."""
    patch = Patch({**whole()[0].tensors, "a.weight": part})
    assert not patch.exact
    with pytest.raises(ContractError, match=f"{what} cannot be taken back exactly"):
        patch.inverse()
    assert TensorPatch(factor=0.0, digest_before="a", digest_after="a").exact


# --- applied whole or not at all ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MATRIX, VECTOR, SCALE])
def test_other_weights_are_refused_and_left_alone(name: str) -> None:
    """One bit of one tensor is enough: nothing is edited, not even the tensors that do fit."""
    patch, before, _ = whole()
    tensors = copies(before)
    flat = tensors[name].view(-1)
    flat[1] = torch.nextafter(flat[1], torch.tensor(math.inf))
    kept = copies(tensors)
    with pytest.raises(IntegrityError, match=f"{name}.*other weights"):
        patch.apply(tensors)
    assert same_bits(tensors, kept)


def test_a_patch_is_applied_once() -> None:
    """It is its own inverse bit by bit, but never by accident: a second time is refused."""
    patch, before, after = whole()
    tensors = copies(before)
    patch.apply(tensors)
    with pytest.raises(IntegrityError, match="apply it once"):
        patch.apply(tensors)
    assert same_bits(tensors, after)


@pytest.mark.parametrize("name", [MATRIX, VECTOR, MAP, SCALE])
def test_a_promise_that_is_not_kept_leaves_everything_as_it_was(name: str) -> None:
    """The result of each tensor is checked before the first one changes, wherever in the patch the wrong one is."""
    patch, before, _ = whole()
    wrong = dataclasses.replace(patch.tensors[name], digest_after="sha256:" + "0" * 64)
    tensors = copies(before)
    with pytest.raises(IntegrityError, match=f"{name} is not what the patch promises"):
        Patch({**patch.tensors, name: wrong}).apply(tensors)
    assert same_bits(tensors, before)


def test_a_new_tensor_starts_from_zeros() -> None:
    """Where the place of a new tensor holds something already, nothing is written."""
    patch, before, _ = whole()
    tensors = copies(before) | {MAP: torch.eye(3)}
    kept = copies(tensors)
    with pytest.raises(IntegrityError, match=f"{MAP} is not what the patch promises"):
        patch.apply(tensors)
    assert same_bits(tensors, kept)


def test_a_tensor_that_is_missing_is_named() -> None:
    """A model of another family, or without the map that the patch brings, is not edited in part."""
    patch, before, _ = whole()
    tensors = copies({name: tensor for name, tensor in before.items() if name != MAP})
    kept = copies(tensors)
    with pytest.raises(IntegrityError, match=f"no tensor {MAP}"):
        patch.apply(tensors)
    assert same_bits(tensors, kept)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (MATRIX, {"bits": torch.zeros(3, dtype=torch.int32)}),
        (MAP, {"bits": torch.zeros(2, 2, dtype=torch.int32)}),
        (SCALE, {"indices": torch.tensor([0, 35], dtype=torch.int32)}),
        (SCALE, {"indices": torch.tensor([-1], dtype=torch.int32)}),
    ],
    ids=["bits", "map", "index", "negative"],
)
def test_content_of_another_size_is_refused(name: str, changes: dict[str, Tensor]) -> None:
    """Bits of another shape, an entry outside of the tensor: an integrity error with the name, and nothing is edited."""
    patch, before, _ = whole()
    other = Patch({**patch.tensors, name: dataclasses.replace(patch.tensors[name], **changes)})
    tensors = copies(before)
    with pytest.raises(IntegrityError, match=f"{name} "):
        other.apply(tensors)
    assert same_bits(tensors, before)


def test_the_patch_of_trained_weights_makes_nothing() -> None:
    """It names a weight before and after; applied to the one before, the promise is not kept."""
    before, after = noise(2, 3), noise(2, 3, seed=1)
    digests = {"digest_before": digest_of_tensor(before), "digest_after": digest_of_tensor(after)}
    tensors = {"q.weight": before.clone()}
    with pytest.raises(IntegrityError, match=r"q\.weight is not what the patch promises"):
        Patch({"q.weight": TensorPatch(kind=EditKind.TRAINED, **digests)}).apply(tensors)
    assert torch.equal(tensors["q.weight"], before)


def test_a_transposed_tensor_is_edited_in_its_own_order() -> None:
    """A view that does not lie in one piece takes the bits where its shape says."""
    lying = noise(6, 4)
    before, after = lying.T.clone(), noise(4, 6, seed=1)
    Patch({MATRIX: replaced(before, after)}).apply({MATRIX: lying.T})
    assert torch.equal(lying, after.T)
