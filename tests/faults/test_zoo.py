"""The gate against planted faults: one of every kind, stage and edit. `uwm-deploy selftest` plants all of them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.made_once import copy_of
from uwm_deploy.cli import cli
from uwm_deploy.edits.proof import proof_of
from uwm_deploy.edits.replay import expected_edit
from uwm_deploy.records.strength import (
    AxisSetting,
    FoldKind,
    LimitUse,
    StrengthCandidate,
    StrengthChoice,
    StrengthLimit,
    StrengthLimits,
)
from uwm_deploy.records.verdict import Cause, Result
from uwm_deploy.stages.gate.causes import STAGE_ORDER
from uwm_deploy.studies.selftest import run as selftest
from uwm_deploy.studies.selftest.artifacts import in_half_precision
from uwm_deploy.studies.selftest.faults import plant_all
from uwm_deploy.studies.selftest.honest_builds import FOLDED, MAPPED, UWM, Build, HonestBuilds, MadeBy
from uwm_deploy.studies.selftest.peers import Peers
from uwm_deploy.studies.selftest.rebuilds import PER_EDIT, rebuild_all, variations
from uwm_deploy.studies.selftest.zoo import FAULTS, Fault

ROOT = Path(__file__).parents[2]
BY_NAME = {fault.name: fault for fault in FAULTS}
ONE_OF_EACH = list({(fault.cause, fault.stage, fault.world): fault for fault in reversed(FAULTS)}.values())


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> HonestBuilds:
    """The second build has UWM as its first step, so it goes on from the scores of the first one."""
    folder = tmp_path_factory.mktemp("worlds")
    found = HonestBuilds(folder)
    copy_of(found.of(UWM).folder / "work", folder / "world-1" / "work")
    return found


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=[pytest.mark.slow] * (f.world is MAPPED)) for f in ONE_OF_EACH],
    ids=lambda fault: fault.name,
)
def test_a_planted_fault_is_named(fault: Fault, worlds: HonestBuilds) -> None:
    """The gate fails, and its first cause is the one that was planted; of a closed-form step whatever the policy limits."""
    (found,) = plant_all(worlds, [fault], None, lambda *_: None)
    assert (found.found_cause, found.found_stage) == (found.cause, found.stage), found.detectors
    limits = {"parity.cosine_min", "flips.any", "lost.GS"}
    assert fault.world is UWM or not limits.issuperset(found.detectors)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("axis-of-another-model", "of its largest entry from what its fit gives"),
        ("strength-of-its-own", "another strength than was asked for: g 0.9 for 0.5"),
        ("step-left-out", "has the steps uwm, where uwm+safety-axis was asked for"),
        ("patch-of-other-values", "visual_projection.weight: the patch makes something else than it promises"),
        ("tensor-not-listed", "vision_model.post_layernorm.bias: is replaced, and the edit record does not say so"),
    ],
)
def test_a_closed_form_step_that_is_not_what_was_asked_for(
    name: str, words: str, worlds: HonestBuilds, tmp_path: Path
) -> None:
    """Neither what was put into the model nor what the record says of it is believed; the problem says what is wrong.

    That such a problem fails the gate, and is its first cause, is what `axis-reversed` shows above.
    """
    fault = BY_NAME[name]
    world = worlds.of(fault.world)
    build = fault.plant(world, tmp_path / "planted")
    assert isinstance(build, Build)
    expected = expected_edit(world.recipe, world.made_from(build.original), build.edit, build.patch)
    found = proof_of(expected, build.edited.named_parameters())
    assert any(words in problem for problem in found.problems[:3]), found.problems


def _choice(limits: StrengthLimits, *settings: AxisSetting) -> StrengthChoice:
    use = LimitUse(limit=StrengthLimit.RETRIEVAL, folds=FoldKind.RANDOM, loss=0.0, margin=0.0, at_most=4.0)
    tried = [
        StrengthCandidate(setting=s, measured={}, objective=1.0, keeps=True, broken=None, tightest=use)
        for s in settings
    ]
    return StrengthChoice(
        candidates=tuple(tried), chosen=0, original={}, limits=limits, n=96, hard_safe=0, zero_shot_sets=(),
        concepts_left_out=(), seed=0, seconds=0.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lost", "chosen", "words"),
    [
        (4.0, None, "does not say how its strength was chosen"),
        (9.0, 0.5, "was chosen under other limits than were asked for"),
        (4.0, 0.7, "another strength than was chosen: g 0.5 for 0.7"),
        (4.0, 0.5, ""),
    ],
    ids=["not chosen", "other limits", "another one", "honest"],
)
def test_a_chosen_strength_is_what_the_record_says(
    lost: float, chosen: float | None, words: str, worlds: HonestBuilds
) -> None:
    """Where no strength was asked for, the record tells how it was chosen, and it is that one."""
    world = worlds.of(FOLDED)
    first, last = world.recipe.edit
    assert last.axis is not None
    asked = dataclasses.replace(last, axis=dataclasses.replace(last.axis, setting=None))
    step = world.honest.edit.steps[-1]
    assert step.axis is not None
    assert step.axis.setting is not None
    settings = [dataclasses.replace(step.axis.setting, g=g) for g in (chosen or 0.0, 0.5)]
    choice = _choice(StrengthLimits(retrieval_loss=lost), *settings) if chosen else None
    told = dataclasses.replace(step, axis=dataclasses.replace(step.axis, choice=choice))
    found = expected_edit(
        dataclasses.replace(world.recipe, edit=(first, asked)),
        world.made_from(world.original),
        dataclasses.replace(world.honest.edit, steps=(*world.honest.edit.steps[:-1], told)),
        world.honest.patch,
    )
    assert [words in problem for problem in found.problems] == [True] * bool(words), found.problems


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if f.stage == "package" or f.name == "manifest-edited"], ids=lambda f: f.name
)
def test_a_bundle_that_was_changed_is_refused(fault: Fault, worlds: HonestBuilds) -> None:
    """Planted without anything being executed, so all of them are tried here."""
    (found,) = plant_all(worlds, [fault], None, lambda *_: None)
    assert found.named, found.detectors


@pytest.mark.parametrize(
    "made_by",
    [UWM, FOLDED, pytest.param(MAPPED, marks=pytest.mark.slow)],
    ids=["uwm", "weights", "embedding"],
)
def test_the_honest_build_has_no_cause(made_by: MadeBy, worlds: HonestBuilds, tmp_path: Path) -> None:
    """Measured by the same code, what nobody touched passes every check."""
    world = worlds.of(made_by)
    verdict = world.verdict(world.honest, tmp_path)
    assert verdict.result is Result.PASS
    assert verdict.causes == ()
    assert all(check.cause is None for check in verdict.checks)


@pytest.mark.slow
def test_a_map_in_float32_is_no_fault_of_an_engine_in_half_precision(worlds: HonestBuilds, tmp_path: Path) -> None:
    """Only a map that was rounded too is named."""
    world = worlds.of(MAPPED)
    assert world.verdict(in_half_precision(world, tmp_path / "fp16"), tmp_path).causes == ()


def test_other_tools_see_what_they_can_see(worlds: HonestBuilds, tmp_path: Path) -> None:
    """The comparison is fair: a stale engine differs from its graph, and a graph of the wrong weights from its model."""
    world, peers = worlds.of(UWM), Peers()
    stale = BY_NAME["stale-engine"].plant(world, tmp_path / "stale")
    wrong = BY_NAME["edit-not-exported"].plant(world, tmp_path / "wrong")
    assert peers.caught(stale) == {"onnx.checker": False, "polygraphy run": True, "allclose 1e-3": False}  # type: ignore[arg-type]
    assert peers.caught(wrong) == {"onnx.checker": False, "polygraphy run": False, "allclose 1e-3": True}  # type: ignore[arg-type]
    assert not any(peers.caught(world.honest).values())


@pytest.mark.parametrize(
    "numbers",
    [(1,), (0, 4, 7, 9, 14, 17)],
    ids=["one", "six"],
)
@pytest.mark.slow
def test_honest_rebuilds_pass(numbers: tuple[int, ...], tmp_path: Path) -> None:
    """Some of the sixty: in lower precision, in each placement, with other operator sets."""
    chosen = [variations(60)[number] for number in numbers]
    found = list(rebuild_all(tmp_path, chosen, lambda *_: None))
    assert {rebuild.result for rebuild in found} == {Result.PASS}, [rebuild.failing for rebuild in found]
    assert len(found) == len(numbers)


def test_sixty_rebuilds_differ() -> None:
    """No rebuild is counted twice, each kind of setting takes several values, and two processes share all of them."""
    found = variations(60)
    assert len(set(found)) == 60
    assert len({v.seed for v in found}) == 60 // PER_EDIT
    for setting in ("made_by", "batch_pairs", "opset", "ids", "threads", "workers", "max_batch", "lower", "provider"):
        assert len({getattr(v, setting) for v in found}) > 1, setting
    assert {(v.made_by, v.threads) for v in found} == {(m, n) for m in (UWM, FOLDED, MAPPED) for n in (1, 2, 4)}
    for lower in ("fp16", "auto"):
        assert {v.made_by for v in found if v.lower == lower} == {UWM, FOLDED, MAPPED}
    assert [n for part in selftest.groups(62) for n in part] == list(range(62))


def test_the_zoo_covers_every_cause_and_stage() -> None:
    """Every cause that the gate can name by itself is planted, names are unique, and there are at least a hundred."""
    assert len(BY_NAME) == len(FAULTS) >= 100
    assert {fault.cause for fault in FAULTS} == set(Cause) - {Cause.MODEL, Cause.ANOMALY, Cause.DECISIONS}
    assert {fault.stage for fault in FAULTS} <= set(STAGE_ORDER)


def test_the_pages_hold_every_fault() -> None:
    """docs/reference/faults.md has the run of all of them, each with what was named; the other pages say as many."""
    page = (ROOT / "docs" / "reference" / "faults.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in page.splitlines() if line.startswith("| ")][1:]
    found = {name: (text, must, named) for name, text, must, named in rows if name in BY_NAME}
    assert found == {f.name: (f.text, f"{f.cause} @ {f.stage}", "yes") for f in FAULTS}
    for text in (page, (ROOT / "docs" / "reference" / "policy.md").read_text()):
        assert [int(n) for n in re.findall(r"(\d+) (?:of \d+ fail the gate|planted faults)", text)] == [len(FAULTS)]
    assert "honest rebuilds: 0 of 60 do not pass" in page


def test_the_command_fails_when_a_fault_is_not_there(tmp_path: Path) -> None:
    """A fault by another name is bad input."""
    done = CliRunner().invoke(cli, ["selftest", "--fault", "no-such", "--rebuilds", "0"])
    assert done.exit_code == 2
    assert "stale-engine" in done.output


def test_the_command_says_how_many(worlds: HonestBuilds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One fault by hand, with its table; the honest build is the one that is here already."""
    monkeypatch.setattr(selftest, "HonestBuilds", lambda _: worlds)
    table = tmp_path / "table.md"
    done = CliRunner().invoke(
        cli, ["selftest", "--fault", "file-added", "--rebuilds", "0", "--json", "--markdown", str(table)]
    )
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    assert [fault["named"] for fault in body["faults"]] == [True]
    assert "integrity @ package" in table.read_text()
