"""Locks a policy before the run, and checks after it that nothing moved: criteria that are chosen later fit any result."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from uwm_deploy.data.open import open_source
from uwm_deploy.errors import EvidenceError, InputError
from uwm_deploy.recipes.policy import SECTIONS, Policy
from uwm_deploy.recipes.resolve import calibration_set_of, policy_of
from uwm_deploy.records.codec import json_from_record, read_record
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.files import digest_of_bytes, digest_of_file, write_output
from uwm_deploy.records.model import Digest
from uwm_deploy.records.policy_lock import Criterion, PolicyLock

_FIX = "judge with the policy that was locked, or lock the new one and measure again"


def lock_policy(policy: str, evaluation: str, out: Path, *, by: str) -> tuple[PolicyLock, Digest]:
    """Writes down what will count, before it is measured.

    Args:
        policy: Name or file.
        evaluation: Set that will be measured, name or file; empty leaves it open.
        out: File that is written; one that is there is never replaced.
        by: Who answers for it.

    Returns:
        The lock, and the digest of its file. Whoever gets the digest before the run can check it after the run.

    Raises:
        InputError: If there is a file already, or nobody answers for the lock.
    """
    if not by.strip():
        raise InputError("a lock needs someone who answers for it", fix="give --by")
    if out.exists():
        raise InputError(f"{out} is there already, and a lock is never replaced", fix="lock into another file")
    rules, digest = policy_of(policy)
    spec, _, base = calibration_set_of(evaluation) if evaluation else (None, "", None)
    data = open_source(spec, base=base).record if spec else None
    lock = PolicyLock(
        policy=rules.name,
        policy_digest=digest,
        criteria=tuple(_criteria(rules)),
        evaluation=data.name if data else "",
        ids_digest=data.ids_digest if data else "",
        content_digest=data.content_digest if data else "",
        locked_by=by.strip(),
        locked=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    content = json_from_record(lock).encode()
    write_output(out, content)
    return lock, digest_of_bytes(content)


def _criteria(policy: Policy) -> Iterator[Criterion]:
    for section in SECTIONS:
        for number, limit in enumerate(getattr(policy, section)):
            least = limit.at_least is not None
            bound = limit.at_least if least else limit.at_most
            yield Criterion(
                rule=f"{section}[{number}]",
                metric=limit.metric,
                direction="at_least" if least else "at_most",
                limit=bound,
                bound=limit.bound,
                min_n=limit.min_n,
            )


def kept_lock(path: Path, policy: tuple[str, Digest], report: VerifyReport, measured: str = "") -> str:
    """Checks that a report is judged by what was locked before it was made.

    Args:
        path: File of the lock.
        policy: Name and digest of the policy that judges.
        report: What was measured.
        measured: ISO time at which measuring began; empty for a report alone, which does not say it.

    Returns:
        A line for whoever reads the verdict.

    Raises:
        InputError: If the lock names no time.
        EvidenceError: If policy, set or time are others.
    """
    lock, data = read_record(PolicyLock, path), report.evaluation
    if (lock.policy, lock.policy_digest) != policy:
        raise EvidenceError(
            f"policy {policy[0]} is not the one that was locked: {lock.policy}, {lock.locked}", fix=_FIX
        )
    locked = (lock.ids_digest, lock.content_digest)
    if lock.ids_digest and locked != (data.ids_digest, data.content_digest):
        raise EvidenceError(f"{data.name} is not the set that was locked: {lock.evaluation}", fix=_FIX)
    since = _time(lock.locked, str(path))
    if measured and _time(measured, "the bundle") < since:
        raise EvidenceError(f"the policy was locked on {lock.locked}, after measuring began ({measured})", fix=_FIX)
    line = f"criteria locked on {lock.locked} by {lock.locked_by}: {digest_of_file(path)}"
    return line if measured else f"{line}; a report alone does not say when it was measured, so that was not checked"


def _time(text: str, where: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"{where}: {text!r} is no time", fix="restore the file, or lock the policy again") from error
    if found.tzinfo is None:
        raise InputError(f"{where}: {text} has no time zone", fix="restore the file, or lock the policy again")
    return found
