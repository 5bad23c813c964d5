"""Criteria that were written down before anything was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from uwm_deploy.records.model import Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """One limit of a policy, as it was when the policy was locked.

    Attributes:
        rule: Its place in the policy, e.g. ``"artifact[2]"``.
        bound: Whether the measured value is compared, or the worse end of its interval.
    """

    rule: str
    metric: str
    direction: Literal["at_least", "at_most"]
    limit: float
    bound: Literal["point", "worst"]
    min_n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLock:
    """A policy and a set, fixed before the run; `policy-lock.json`.

    Attributes:
        policy: Name of the policy.
        policy_digest: Of its bytes, as a verdict records it.
        criteria: Every limit in it.
        evaluation: Name of the set that will be measured; empty where it was left open.
        ids_digest: Of its items, likewise.
        content_digest: Of their content, likewise.
        locked_by: Who answers for it.
        locked: ISO time in UTC.
    """

    policy: str
    policy_digest: Digest
    criteria: tuple[Criterion, ...]
    evaluation: str
    ids_digest: Digest
    content_digest: Digest
    locked_by: str
    locked: str
