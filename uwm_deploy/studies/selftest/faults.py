"""Plants faults one after the other, and compares what the gate says with what it must say."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from uwm_deploy.errors import DataError, EvidenceError, IntegrityError, RecipeError, UwmError
from uwm_deploy.pipeline.executed_here import executed_here
from uwm_deploy.pipeline.judge import Execute, judge_file
from uwm_deploy.records.studies import FaultResult
from uwm_deploy.records.verdict import Cause, Result, Verdict
from uwm_deploy.report.console import Reporter
from uwm_deploy.studies.selftest.honest_builds import POLICY, Build, HonestBuild, HonestBuilds
from uwm_deploy.studies.selftest.peers import Peers
from uwm_deploy.studies.selftest.zoo import Fault

_REFUSED: tuple[tuple[type[UwmError], Cause, str], ...] = (
    (EvidenceError, Cause.EVIDENCE, "gate"),
    (IntegrityError, Cause.INTEGRITY, "package"),
    (DataError, Cause.DATA, "verify"),
    (RecipeError, Cause.EVIDENCE, "gate"),
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
            verdict = judge_file(planted, POLICY, execute=_execute(world) if fault.execute else None)
    except UwmError as error:
        cause, stage = _of_refusal(error)
        return _compared(fault, [(cause, stage)], (f"refused: {error.what}",), caught)
    named = [(blame.cause, blame.stage) for blame in verdict.causes if verdict.result is Result.FAIL]
    return _compared(fault, named or [(None, "")], tuple(_detectors(verdict)), caught)


def _execute(world: HonestBuild) -> Execute:
    return lambda bundle, report: executed_here(bundle, world.source, report, Reporter(quiet=True))


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
    fault: Fault,
    named: Sequence[tuple[Cause | None, str]],
    detectors: tuple[str, ...],
    peers: dict[str, bool],
) -> FaultResult:
    """One fault, one cause: what is named beside it was not planted."""
    (cause, stage), *further = named
    return FaultResult(
        name=fault.name,
        text=fault.text,
        cause=fault.cause,
        stage=fault.stage,
        found_cause=cause,
        found_stage=stage,
        named=(cause, stage) == (fault.cause, fault.stage) and tuple(further) == fault.further,
        further=tuple(f"{other.value if other else ''} @ {where}" for other, where in further),
        detectors=detectors,
        peers=peers,
    )
