"""Whether an edit reaches what a language or a diffusion model reads: told from its record, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tests.families import recipe_of
from tests.reports import report as verify_report
from uwm_deploy.cli import cli
from uwm_deploy.errors import InputError
from uwm_deploy.pipeline.reach import check_reaches_diffusion, check_reaches_language_model
from uwm_deploy.recipes.published import published_outputs
from uwm_deploy.records.edit import ClosedFormRecord, EditRecord, EditStep, Method, Placement, TensorEdit
from uwm_deploy.records.head import Action
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.language import LanguageInputs
from uwm_deploy.runtime.results import Risk, Risks
from uwm_deploy.studies.downstream.edited import edited_tower_at

FC2 = "vision_model.encoder.layers.{}.mlp.fc2.weight"
TEXT = "text_model.encoder.layers.0.self_attn.out_proj.weight"


def reads(name: str) -> bool:
    """Of a language model that reads what the first two layers make."""
    return name.removeprefix("vision_model.").startswith(("embeddings.", "encoder.layers.0.", "encoder.layers.1."))


def record(*tensors: tuple[TowerName, str], axis: Placement | None = None, first: Method | None = None) -> EditRecord:
    """An edit that changed these tensors."""
    steps = [] if first is None else [EditStep(method=first)]
    if axis is not None:
        found = ClosedFormRecord(placement=axis, fitted_on="sha256:0", n_pairs={})
        steps.append(EditStep(method=Method.SAFETY_AXIS, axis=found))
    return EditRecord(
        model=verify_report().model,
        edited_weights_digest="sha256:1",
        patch_digest="sha256:2",
        tensors=tuple(
            TensorEdit(
                tower=tower,
                name=name,
                shape=(2, 2),
                selected=1,
                share=0.25,
                digest_before="sha256:3",
                digest_after="sha256:4",
            )
            for tower, name in tensors
        ),
        steps=tuple(steps),
    )


IMAGE, TEXTS = TowerName.IMAGE, TowerName.TEXT
PROJECTION = (IMAGE, "visual_projection.weight")


def test_a_language_model_reads_only_layers_below_its_own() -> None:
    """A changed layer below reaches it; a later one, the projection, maps and the other tower do not."""
    assert check_reaches_language_model(record((IMAGE, FC2.format(1)), first=Method.UWM), reads) == ()
    for edit, why in (
        (record((IMAGE, FC2.format(2)), first=Method.UWM), "only later layers changed"),
        (record((TEXTS, TEXT), first=Method.UWM), "no tensor of the image tower changed"),
        (record(PROJECTION, axis=Placement.WEIGHTS), "method safety-axis changes embeddings only"),
        (record((IMAGE, "image_map.weight"), axis=Placement.EMBEDDING), "method safety-axis changes embeddings only"),
        (record(first=Method.NONE), "no tensor of the image tower changed"),
    ):
        with pytest.raises(InputError, match=why):
            check_reaches_language_model(edit, reads)


def test_the_part_that_does_not_reach_it_is_told() -> None:
    """Of two steps the first one is measured, and a note says that the second one is not."""
    both = record((IMAGE, FC2.format(0)), PROJECTION, first=Method.UWM, axis=Placement.WEIGHTS)
    (note,) = check_reaches_language_model(both, reads)
    assert "safety-axis" in note
    assert "not in these numbers" in note


def test_diffusion_reads_the_text_tower_and_no_axis() -> None:
    """An edit of images alone, and a closed-form step in either placement, are refused."""
    check_reaches_diffusion(record((TEXTS, TEXT), first=Method.UWM))
    with pytest.raises(InputError, match="changes nothing in the text tower"):
        check_reaches_diffusion(record((IMAGE, FC2.format(0)), first=Method.UWM))
    for placement, first in ((Placement.WEIGHTS, None), (Placement.EMBEDDING, None), (Placement.WEIGHTS, Method.UWM)):
        with pytest.raises(InputError, match="diffusion reads hidden states"):
            check_reaches_diffusion(record((TEXTS, TEXT), axis=placement, first=first))


@pytest.mark.parametrize("table", ["uwm-captions", "safe-clip-i2p"])
def test_published_outputs_are_shown_and_not_run(table: str, tmp_path: Path) -> None:
    """Every published number stands there with "not run"; a wrong row or file is refused."""
    found = CliRunner().invoke(cli, ["reproduce", table, "--markdown"])
    assert found.exit_code == 6, found.output
    rows = published_outputs()[table].rows
    assert found.output.count("| not run |") == sum(len(row.values) for row in rows)
    assert all(f"{value:.1f}" in found.output for row in rows for value in row.values)
    assert f"0 of {len(rows)} rows ran" in found.output
    (tmp_path / "a.json").write_text("{}")
    wrong = CliRunner().invoke(cli, ["reproduce", table, "--downstream", f"nobody={tmp_path / 'a.json'}"])
    assert wrong.exit_code == 2
    assert "has no row 'nobody'" in wrong.output
    broken = CliRunner().invoke(cli, ["reproduce", table, "--downstream", f"{rows[0].label}={tmp_path / 'a.json'}"])
    assert broken.exit_code == 5


@pytest.mark.parametrize(
    ("decision", "category", "has", "lacks"),
    [
        (Action.REDIRECT, "fire", "may show this: fire", "Decline"),
        (Action.BLOCK, "fire", "Decline", "Answer"),
        (Action.BLOCK, "", "could not be checked", "may show"),
    ],
)
def test_a_risk_has_its_safety_prompt(decision: Action, category: str, has: str, lacks: str) -> None:
    """By category and decision; an image that cannot be read is declined, one that is only flagged gets none."""
    risk = Risk(category=category, probability=0.9, level=0.9, decision=decision)
    assert has in risk.safety_prompt
    assert lacks not in risk.safety_prompt
    assert risk.mixed_in
    for category, decision in (("safe", Action.ALLOW), ("fire", Action.FLAG)):
        left = Risk(category=category, probability=0.9, level=0.1, decision=decision, told="It may burn.")
        assert (left.mixed_in, left.safety_prompt) == (False, "")


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.5-13b"])
def test_recipes_of_llava_have_the_published_settings(name: str) -> None:
    """The vision tower alone, the second layer of every MLP, 8.5% of the score's mass, negated."""
    edit = recipe_of(name).entries
    assert edit.towers == (TowerName.IMAGE,)
    assert (edit.image.layers, edit.image.keep_mass, edit.image.factor) == (("*.mlp.fc2",), 0.915, -1.0)


def test_a_language_model_is_told_which_images_are_mixed_in() -> None:
    """By their decisions; none without a safety head."""
    actions = (Action.ALLOW, Action.FLAG, Action.REDIRECT, Action.BLOCK)
    shares = np.tile([0.2, 0.5, 0.3], (4, 1))
    levels, categories = np.linspace(0, 1, 4), np.array([0, 1, 2, 1])
    risk = Risks(("safe", "fire", "spill"), shares, levels, categories, actions, {"spill": "It may be wet."})
    given = LanguageInputs(np.zeros((4, 2, 3), np.float32), np.zeros((4, 1, 5), np.float32), risk)
    assert given.mixed_in.tolist() == [False, False, True, True]
    assert [bool(prompt) for prompt in given.safety_prompts] == given.mixed_in.tolist()
    assert given.safety_prompts[2].startswith("It may be wet.")
    assert "this: fire" in given.safety_prompts[3]
    plain = LanguageInputs(given.features, None, None)
    assert (plain.mixed_in.any(), set(plain.safety_prompts)) == (False, {""})


def test_no_signature_is_asked_of_what_has_none(tmp_path: Path) -> None:
    """A run folder or a checkpoint cannot have one, and is not taken for one that has."""
    for asked in ({"public_key": tmp_path / "key.pub"}, {"min_bundle_version": 1}):
        with pytest.raises(InputError, match="is no bundle"):
            edited_tower_at(tmp_path, **asked)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds no edited model"):
        edited_tower_at(tmp_path)
