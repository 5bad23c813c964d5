"""The gate against planted faults: one of every kind and stage. `uwm-deploy selftest` plants all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from uwm_deploy.cli import cli
from uwm_deploy.records import Cause, Result
from uwm_deploy.selftest.faults import plant_all
from uwm_deploy.selftest.peers import Peers
from uwm_deploy.selftest.rebuilds import PER_EDIT, rebuild_all, variations
from uwm_deploy.selftest.world import World
from uwm_deploy.selftest.zoo import FAULTS
from uwm_deploy.stages.causes import STAGE_ORDER

ONE_OF_EACH = list({(fault.cause, fault.stage): fault for fault in reversed(FAULTS)}.values())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("fault", ONE_OF_EACH, ids=lambda fault: fault.name)
def test_a_planted_fault_is_named(fault: object, world: World) -> None:
    """The gate fails, and its first cause is the one that was planted."""
    (found,) = plant_all(world, [fault], None, lambda *_: None)  # type: ignore[list-item]
    assert (found.found_cause, found.found_stage) == (found.cause, found.stage), found.detectors


def test_the_honest_build_has_no_cause(world: World, tmp_path: Path) -> None:
    """Measured by the same code, what nobody touched passes every check."""
    verdict = world.verdict(world.honest, tmp_path)
    assert verdict.result is Result.PASS
    assert verdict.causes == ()
    assert all(check.cause is None for check in verdict.checks)


def test_other_tools_see_what_they_can_see(world: World, tmp_path: Path) -> None:
    """The comparison is fair: a stale engine differs from its graph, and a graph of the wrong weights from its model."""
    faults = {fault.name: fault for fault in FAULTS}
    peers = Peers(world)
    stale = faults["stale-engine"].plant(world, tmp_path / "stale")
    wrong = faults["edit-not-exported"].plant(world, tmp_path / "wrong")
    assert peers.caught(stale) == {"onnx.checker": False, "polygraphy run": True, "allclose 1e-3": False}  # type: ignore[arg-type]
    assert peers.caught(wrong) == {"onnx.checker": False, "polygraphy run": False, "allclose 1e-3": True}  # type: ignore[arg-type]
    assert not any(peers.caught(world.honest).values())


def test_honest_rebuilds_pass(tmp_path: Path) -> None:
    """Two of the fifty: the first edit, as it is and in other batches with other workers."""
    found = list(rebuild_all(tmp_path, 2, lambda *_: None))
    assert [rebuild.result for rebuild in found] == [Result.PASS] * 2, [rebuild.failing for rebuild in found]


def test_fifty_rebuilds_differ() -> None:
    """No rebuild is counted twice, and each kind of setting takes several values."""
    found = variations(50)
    assert len(set(found)) == 50
    assert len({v.seed for v in found}) == 50 // PER_EDIT
    for setting in ("batch_pairs", "threads", "workers", "max_batch", "half"):
        assert len({getattr(v, setting) for v in found}) > 1, setting


def test_the_zoo_covers_every_cause_and_stage() -> None:
    """Every cause that the gate can name by itself is planted, names are unique, and there are at least thirty."""
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 30
    assert {fault.cause for fault in FAULTS} == set(Cause) - {Cause.MODEL, Cause.DECISIONS}
    assert {fault.stage for fault in FAULTS} <= set(STAGE_ORDER)


def test_the_command_fails_when_a_fault_is_not_there(tmp_path: Path) -> None:
    """A fault by another name is bad input."""
    done = CliRunner().invoke(cli, ["selftest", "--fault", "no-such", "--rebuilds", "0"])
    assert done.exit_code == 2
    assert "stale-engine" in done.output


def test_the_command_says_how_many(tmp_path: Path) -> None:
    """One fault by hand, with its table."""
    table = tmp_path / "table.md"
    done = CliRunner().invoke(
        cli, ["selftest", "--fault", "file-added", "--rebuilds", "0", "--json", "--markdown", str(table)]
    )
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    assert [fault["named"] for fault in body["faults"]] == [True]
    assert "integrity @ package" in table.read_text()
