"""Whether what must have been executed was, and where."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from uwm_deploy.recipes.policy import EvidenceRule
from uwm_deploy.records.evidence import ArtifactEvidence, Evidence
from uwm_deploy.records.graph import target_of
from uwm_deploy.records.verdict import Check, Result, statement

NAME = "required evidence"
"""Name of every check of this kind."""


def required(name: str, artifacts: Iterable[ArtifactEvidence]) -> Check:
    """Whether a variant was executed."""
    found = {a.variant: a for a in artifacts}
    if name in found and found[name].evidence is Evidence.EXECUTED:
        return dataclasses.replace(not_run(name, "", "required"), result=Result.PASS)
    reason = found[name].reason if name in found else "it was not built"
    return not_run(name, f"not run: {reason}", "required")


def not_run(subject: str, detail: str, rule: str) -> Check:
    """A check that nothing was measured for."""
    return Check(
        name=NAME,
        subject=subject,
        result=Result.NOT_RUN,
        measured=None,
        limit=None,
        direction="equals",
        detail=detail.strip("; "),
        rule=rule,
    )


def is_for(rule: EvidenceRule, artifact: ArtifactEvidence) -> bool:
    """Whether a rule is about a variant."""
    return target_of(artifact.variant) is rule.target and (not rule.precision or artifact.precision in rule.precision)


def missing(rules: Sequence[EvidenceRule], artifacts: Sequence[ArtifactEvidence]) -> list[Check]:
    """Evidence that a policy asks for of variants that were not executed, or not built."""
    found = []
    for number, rule in enumerate(rules):
        name = f"evidence[{number}]"
        built = [a for a in artifacts if is_for(rule, a)]
        waiting = [a for a in built if a.evidence is not Evidence.EXECUTED]
        found += [not_run(a.variant, f"not run: {a.reason}; {rule.reason}", name) for a in waiting]
        if not built and not rule.if_built:
            found.append(not_run(rule.target.value, f"no such variant was built; {rule.reason}", name))
    return found


def ran_where(artifact: ArtifactEvidence, rule: EvidenceRule, name: str) -> Check:
    """Whether an executed variant ran where a rule wants it to."""
    where = artifact.where
    capability = where.get("compute_capability", "")
    on_gpu = bool(capability) or where.get("provider", "").startswith(("CUDA", "Tensorrt", "NvTensorRTRTX"))
    device = "gpu" if on_gpu else "cpu"
    right = rule.device in ("any", device) and (not rule.compute_capability or capability in rule.compute_capability)
    wanted = " ".join(
        [
            *([rule.device] if rule.device != "any" else []),
            *(["of compute capability"] if rule.compute_capability else []),
        ]
    )
    ran = f"{where.get('device', device)}{f' of compute capability {capability}' if capability else ''}"
    otherwise = f"it ran on {ran}, must be {wanted} {' or '.join(rule.compute_capability)} {rule.reason}".strip()
    return statement(NAME, artifact.variant, right, otherwise, rule=name)
