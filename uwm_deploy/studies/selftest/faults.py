"""Plants faults one after the other, and compares what the gate says with what it must say."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from uwm_deploy.errors import DataError, EvidenceError, IntegrityError, UwmError
from uwm_deploy.pipeline.judge import judge_file
from uwm_deploy.records.studies import FaultResult
from uwm_deploy.records.verdict import Cause, Result, Verdict
from uwm_deploy.studies.selftest.honest_builds import POLICY, Build, HonestBuild, HonestBuilds
from uwm_deploy.studies.selftest.peers import Peers
from uwm_deploy.studies.selftest.zoo import Fault

_REFUSED: tuple[tuple[type[UwmError], Cause, str], ...] = (
    (EvidenceError, Cause.EVIDENCE, "gate"),
    (IntegrityError, Cause.INTEGRITY, "package"),
    (DataError, Cause.DATA, "verify"),
)
"""What a refusal says about the fault; the first kind that fits."""


def plant_all(
    worlds: HonestBuilds, faults: Sequence[Fault], peers: Peers | None, progress: Callable[[str, int, int], None]
) -> Iterator[FaultResult]:
    """Plants faults and judges them.

    Args:
        worlds: The honest builds.
        faults: Which.
        peers: Other tools' checks to put the same artifacts through.
        progress: Called as it goes on.
    """
    for number, fault in enumerate(faults):
        world = worlds.of(fault.world)
        with tempfile.TemporaryDirectory(dir=world.folder) as folder:
            yield _result(world, fault, Path(folder), peers)
        progress("faults", number + 1, len(faults))


def _result(world: HonestBuild, fault: Fault, folder: Path, peers: Peers | None) -> FaultResult:
    caught: dict[str, bool] = {}
    try:
        planted = fault.plant(world, folder)
        if isinstance(planted, Build):
            if peers is not None:
                caught = peers.caught(planted)
            verdict = world.verdict(planted, folder)
        else:
            verdict = judge_file(planted, POLICY)
    except UwmError as error:
        cause, stage = _of_refusal(error)
        return _compared(fault, cause, stage, (f"refused: {error.what}",), caught)
    first = verdict.causes[0] if verdict.result is Result.FAIL and verdict.causes else None
    return _compared(
        fault, first.cause if first else None, first.stage if first else "", tuple(_detectors(verdict)), caught
    )


def _of_refusal(error: UwmError) -> tuple[Cause | None, str]:
    for kind, cause, stage in _REFUSED:
        if isinstance(error, kind):
            return cause, stage
    return None, ""


def _detectors(verdict: Verdict) -> Iterable[str]:
    """Checks that fail, each name once."""
    failing = [c.name for c in verdict.checks if c.blocks and c.result is Result.FAIL and c.rule != "min_proven"]
    return dict.fromkeys(failing)


def _compared(
    fault: Fault, cause: Cause | None, stage: str, detectors: tuple[str, ...], peers: dict[str, bool]
) -> FaultResult:
    return FaultResult(
        name=fault.name,
        text=fault.text,
        cause=fault.cause,
        stage=fault.stage,
        found_cause=cause,
        found_stage=stage,
        named=cause is fault.cause and stage == fault.stage,
        detectors=detectors,
        peers=peers,
    )
