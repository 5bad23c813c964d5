"""The proof of an edit: whatever was left out, added, changed or told wrongly has its name in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from tests.reports import digest, report
from uwm_deploy.edits.applied import tensor_edit
from uwm_deploy.edits.patch import Patch, TensorPatch, multiply_entries, replaced
from uwm_deploy.edits.proof import (
    SOLVED_AGAIN,
    ExpectedModel,
    expected_trained,
    expected_weights,
    proof_of,
    with_closed_form,
)
from uwm_deploy.recipes.edit_spec import EditSpec, EditSpecs
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.edit import (
    EditKind,
    EditRecord,
    EditStep,
    LayerScore,
    Method,
    Pairing,
    Rule,
    ScoreRecord,
    TensorEdit,
)
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.training import TrainingRecord
from uwm_deploy.towers.digests import digest_of_tensor, digest_of_weights

SCORED, OTHER = "layers.0.fc.weight", "layers.1.fc.weight"
PROJECTION, NORM_BIAS = "projection.weight", "norm.bias"
UNTOUCHED = ("layers.0.fc.bias", "norm.weight", "embedding.weight")
MAP = "image_map.weight"
SHAPES = {
    SCORED: (6, 4), OTHER: (6, 4), PROJECTION: (3, 6), NORM_BIAS: (6,),
    "layers.0.fc.bias": (6,), "norm.weight": (6,), "embedding.weight": (5, 4),
}  # fmt: skip
SELECTED = {SCORED: [0, 5, 23], OTHER: [2, 7]}
SPEC = EditSpec(rule=Rule.RATIO, layers=("*.fc",), keep_mass=0.9, factor=-1.0)
EDITS = EditSpecs(text=SPEC, image=SPEC, towers=(TowerName.IMAGE,))


def noise(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(name) + sum(map(ord, name))))


@dataclasses.dataclass
class Edited:
    """A model of a few tensors with an edit of two steps; what a test does to it must be seen."""

    original: dict[str, Tensor]
    saved: dict[str, Tensor]
    solved: dict[str, Tensor]
    edit: EditRecord
    patch: Patch
    score: ScoreRecord

    def expected(self) -> ExpectedModel:
        chosen = {layer.name: SELECTED[f"{layer.name}.weight"] for layer in self.score.layers}
        found = expected_weights(
            self.original, self.score, self.edit, self.patch, EDITS, lambda layer: torch.tensor(chosen[layer.name])
        )
        return with_closed_form(found, self.solved, self.edit)

    def problems(self) -> tuple[str, ...]:
        return proof_of(self.expected(), self.saved).problems

    def without(self, name: str) -> EditRecord:
        return dataclasses.replace(self.edit, tensors=tuple(t for t in self.edit.tensors if t.name != name))


def data() -> CalibrationRecord:
    return CalibrationRecord(
        name="set", split="", n=2, ids_digest=digest("1"), content_digest=digest("2"), concepts={"fire": 2}
    )


def record_of(tensors: list[TensorEdit], patch: Patch, weights: Mapping[str, Tensor]) -> EditRecord:
    return EditRecord(
        model=report().model,
        edited_weights_digest=digest_of_weights(weights),
        patch_digest=digest("3"),
        tensors=tuple(tensors),
        steps=(EditStep(method=Method.UWM),),
    )


@pytest.fixture
def made() -> Edited:
    """Two layers with negated entries, then the last map and the bias before it replaced, and a new map."""
    original = {name: noise(name, shape) for name, shape in SHAPES.items()}
    saved, tensors, parts = {n: t.clone() for n, t in original.items()}, [], {}
    for name, entries in SELECTED.items():
        at = torch.tensor(entries, dtype=torch.int32)
        multiply_entries(saved[name], at, -1.0)
        edit = tensor_edit(name, TowerName.IMAGE, original[name], saved[name])
        tensors.append(dataclasses.replace(edit, kind=EditKind.MULTIPLIED, keep_mass=0.9, factor=-1.0))
        parts[name] = TensorPatch(
            indices=at, factor=-1.0, digest_before=edit.digest_before, digest_after=edit.digest_after
        )
    solved = {PROJECTION: noise("p", (3, 6)), NORM_BIAS: noise("b", (6,)), MAP: noise("m", (3, 3))}
    for name, after in solved.items():
        saved[name] = after.clone()
        tensors.append(tensor_edit(name, TowerName.IMAGE, original.get(name), after))
        parts[name] = replaced(original.get(name), after)
    layers = tuple(
        LayerScore(tower=TowerName.IMAGE, name=n.removesuffix(".weight"), shape=(6, 4), weight_digest=digest("4"))
        for n in SELECTED
    )
    score = ScoreRecord(
        model=report().model, calibration=data(), rules={"image": Rule.RATIO}, pairing=Pairing.MEAN_OF_RATIOS,
        n_pairs={"image": 2}, left_out={"image": ()}, layers=layers, scores_digest=digest("5"), dtype="float32",
        device="cpu", seconds={"image": 1.0},
    )  # fmt: skip
    patch = Patch(parts)
    return Edited(original, saved, solved, record_of(tensors, patch, saved), patch, score)


def test_an_honest_edit_has_no_problem(made: Edited) -> None:
    """Every tensor of the model is compared, those that were solved again and the new one included."""
    proof = proof_of(made.expected(), made.saved)
    assert proof.problems == ()
    assert (proof.layers, proof.weights) == (5, len(SHAPES) + 1)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (SCORED, "was scored, and is not edited"),
        (PROJECTION, "is replaced, and the edit record does not say so"),
        (NORM_BIAS, "is replaced, and the edit record does not say so"),
        (MAP, "is replaced, and the edit record does not say so"),
    ],
)
def test_a_tensor_left_out_of_the_record_is_named(name: str, what: str, made: Edited) -> None:
    """Its patch, what was done to it and its digest each say so, whatever kind it is of; nothing else is blamed."""
    made.edit = made.without(name)
    problems = made.problems()
    assert {line.partition(": ")[0] for line in problems} == {name}
    assert {f"{name}: {what}", f"{name}: the edit record and the patch disagree"} <= set(problems)
    assert f"{name}: was changed, and is not in the edit record" in problems


@pytest.mark.parametrize("name", UNTOUCHED)
def test_a_change_that_no_step_made_is_named(name: str, made: Edited) -> None:
    """A bias, a gain or an embedding: one entry is enough, and there is no other problem."""
    made.saved[name].view(-1)[0] += 1
    assert made.problems() == (
        f"{name}: is not the source's weight with the edit made once",
        f"{name}: was changed, and is not in the edit record",
    )


@pytest.mark.parametrize("name", UNTOUCHED)
def test_a_change_that_record_and_patch_tell_of_is_named_all_the_same(name: str, made: Edited) -> None:
    """Who changes a bias and writes record and patch to it has not made it a step of the edit."""
    made.saved[name].view(-1)[0] += 1
    told = tensor_edit(name, TowerName.IMAGE, made.original[name], made.saved[name])
    made.edit = dataclasses.replace(made.edit, tensors=(*made.edit.tensors, told))
    made.patch = Patch({**made.patch.tensors, name: replaced(made.original[name], made.saved[name])})
    assert made.problems() == (
        f"{name}: is in the edit record, and no step replaces it",
        f"{name}: is not the source's weight with the edit made once",
    )


@pytest.mark.parametrize("name", [PROJECTION, NORM_BIAS, MAP])
def test_a_solved_tensor_that_is_off_is_named_with_its_difference(name: str, made: Edited) -> None:
    """By a thousandth of its largest entry, with a record that promises just that: solved again it is another."""
    off = made.solved[name].clone()
    off.view(-1)[int(off.abs().argmax())] *= 1.001
    made.saved[name] = off
    told = tensor_edit(name, TowerName.IMAGE, made.original.get(name), off)
    made.edit = dataclasses.replace(made.edit, tensors=tuple(told if t.name == name else t for t in made.edit.tensors))
    made.patch = Patch({**made.patch.tensors, name: replaced(made.original.get(name), off)})
    assert made.problems() == (f"{name}: differs by 0.001 of its largest entry from what its fit gives",)


def test_last_digits_of_a_solver_are_no_difference(made: Edited) -> None:
    """Another machine solves to the last digits; ten times the limit is no last digit, nor is NaN or another shape."""
    scale = float(made.solved[PROJECTION].abs().max())
    honest = made.solved[PROJECTION].clone()
    made.solved[PROJECTION] = honest + 0.5 * SOLVED_AGAIN * scale
    assert made.problems() == ()
    made.solved[PROJECTION] = honest + 10 * SOLVED_AGAIN * scale
    assert [line.partition(":")[0] for line in made.problems()] == [PROJECTION]
    made.solved[PROJECTION] = honest.clone()
    made.solved[PROJECTION][0, 0] = torch.nan
    assert [line.partition(":")[0] for line in made.problems()] == [PROJECTION]
    made.solved[PROJECTION] = honest.T.contiguous()
    assert made.problems() == (f"{PROJECTION}: has shape (3, 6), solved again (6, 3)",)


@pytest.mark.parametrize("name", [SCORED, PROJECTION, NORM_BIAS, MAP])
@pytest.mark.parametrize("field", ["kind", "digest_before", "digest_after"])
def test_record_and_patch_that_disagree_are_named(name: str, field: str, made: Edited) -> None:
    """In what was done, to which tensor, or with which result."""
    value = EditKind.TRAINED if field == "kind" else digest("9")
    parts = dict(made.patch.tensors)
    parts[name] = dataclasses.replace(parts[name], **{field: value})
    made.patch = Patch(parts)
    assert made.problems() == (f"{name}: the edit record and the patch disagree",)


def test_a_tensor_that_only_the_patch_has_is_named(made: Edited) -> None:
    """Negated entries of a layer that was not scored, or a replaced one that no step makes."""
    bias = replaced(made.original[UNTOUCHED[0]], made.original[UNTOUCHED[0]] + 1)
    made.patch = Patch({**made.patch.tensors, UNTOUCHED[0]: bias})
    assert made.problems() == (f"{UNTOUCHED[0]}: the edit record and the patch disagree",)
    negated = dataclasses.replace(made.patch.tensors[SCORED], digest_before="", digest_after="")
    made.patch = Patch({**made.patch.tensors, UNTOUCHED[0]: negated})
    assert f"{UNTOUCHED[0]}: is in the patch, and was not scored" in made.problems()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"indices": torch.tensor([0, 5, 22], dtype=torch.int32)},
            "the patch edits other entries than the scores select",
        ),
        ({"factor": -0.5}, "the patch has factor -0.5, the recipe -1"),
    ],
)
def test_other_entries_and_factors_are_named(changes: dict, what: str, made: Edited) -> None:
    """Selected again from the scores: what record and patch say is not believed."""
    parts = dict(made.patch.tensors)
    parts[SCORED] = dataclasses.replace(parts[SCORED], **changes)
    made.patch = Patch(parts)
    assert made.problems() == (f"{SCORED}: {what}",)


@pytest.mark.parametrize("name", [SCORED, PROJECTION, MAP, UNTOUCHED[0]])
def test_a_tensor_that_was_not_saved_is_named(name: str, made: Edited) -> None:
    """And so is one that the source model does not have."""
    del made.saved[name]
    assert made.problems() == (f"{name}: is missing",)
    made.saved = {**made.saved, name: made.solved.get(name, made.original.get(name)), "stray": torch.ones(2)}
    assert "stray: the source model has no such weight" in made.problems()


def test_a_step_on_top_of_scored_entries_replaces_them(made: Edited) -> None:
    """Where the last map was scored as well, its values are the solved ones, and what was selected is not looked for."""
    after = noise("again", SHAPES[OTHER])
    made.solved[OTHER] = made.saved[OTHER] = after
    told = tensor_edit(OTHER, TowerName.IMAGE, made.original[OTHER], after)
    made.edit = dataclasses.replace(made.edit, tensors=(*made.without(OTHER).tensors, told))
    made.patch = Patch({**made.patch.tensors, OTHER: replaced(made.original[OTHER], after)})
    assert made.problems() == ()
    made.saved = {**made.saved, OTHER: made.original[OTHER]}
    assert {line.partition(":")[0] for line in made.problems()} == {OTHER}


# --- trained weights ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class TrainedModel:
    """A model of which training changed three tensors."""

    original: dict[str, Tensor]
    saved: dict[str, Tensor]
    edit: EditRecord

    def problems(self, training: TrainingRecord | None = None) -> tuple[str, ...]:
        expected = expected_trained(self.original, self.source, self.edit, training)
        return proof_of(expected, self.saved).problems

    source: dict[str, Tensor] = dataclasses.field(default_factory=dict)


@pytest.fixture
def trained() -> TrainedModel:
    original = {name: noise(name, shape) for name, shape in SHAPES.items()}
    changed = (SCORED, NORM_BIAS, UNTOUCHED[0])
    after = {name: tensor + 1 if name in changed else tensor.clone() for name, tensor in original.items()}
    tensors = [
        dataclasses.replace(tensor_edit(n, TowerName.IMAGE, original[n], after[n]), kind=EditKind.TRAINED)
        for n in changed
    ]
    source = {name: tensor.clone() for name, tensor in after.items()}
    return TrainedModel(original, after, record_of(tensors, Patch({}), after), source)


@pytest.mark.parametrize("name", [SCORED, NORM_BIAS, UNTOUCHED[0]])
def test_a_trained_tensor_left_out_of_the_record_is_named(name: str, trained: TrainedModel) -> None:
    """A bias or a normalisation as well as a weight."""
    assert trained.problems() == ()
    kept = tuple(tensor for tensor in trained.edit.tensors if tensor.name != name)
    trained.edit = dataclasses.replace(trained.edit, tensors=kept)
    assert trained.problems() == (f"{name}: was changed, and is not in the edit record",)


@pytest.mark.parametrize("name", SHAPES)
def test_trained_weights_that_were_saved_otherwise_are_named(name: str, trained: TrainedModel) -> None:
    """One entry of any tensor, trained or not."""
    trained.saved[name].view(-1)[0] += 1
    problems = trained.problems()
    assert {line.partition(":")[0] for line in problems} == {name}
    assert f"{name}: is not the source's weight with the edit made once" in problems


def test_a_record_of_other_trained_weights_is_named(trained: TrainedModel) -> None:
    """What the record promises is held to the weights as they came."""
    first = dataclasses.replace(trained.edit.tensors[0], digest_after=digest("9"))
    trained.edit = dataclasses.replace(trained.edit, tensors=(first, *trained.edit.tensors[1:]))
    assert trained.problems() == (
        f"{SCORED}: the edit record has another weight",
        f"{SCORED}: is not what the edit record promises",
    )


def test_digests_are_of_float32_bits() -> None:
    """Minus zero is another bit than zero, so a sign that was lost is seen where the value is 0."""
    zero = torch.zeros(2)
    assert digest_of_tensor(zero) != digest_of_tensor(-zero)
