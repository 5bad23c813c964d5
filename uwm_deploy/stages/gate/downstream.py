"""Limits on what came out behind the edited towers: captions and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from uwm_deploy.bundle.downstream import check_own, foreign
from uwm_deploy.recipes.policy import Limit
from uwm_deploy.records.codec import json_from_record
from uwm_deploy.records.downstream import BENIGN, KINDS, DownstreamReport
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.metrics import Estimate
from uwm_deploy.records.model import Digest
from uwm_deploy.records.verdict import IN_TRAINING, OF_REPORT, Check, Result, statement
from uwm_deploy.safeground.interval import Z95
from uwm_deploy.stages.gate.limits import check, check_value
from uwm_deploy.stages.gate.measured import Measured, Metrics, change_of, share_of
from uwm_deploy.stages.gate.outputs_agree import contradictions
from uwm_deploy.stages.gate.safer import EDITED


def downstream_checks(
    reports: Sequence[DownstreamReport], limits: Sequence[Limit], verify: VerifyReport
) -> list[Check]:
    """One check per limit; without a report of its kind it was not run, which never passes.

    Args:
        reports: At most one of a kind.
        limits: Of the policy.
        verify: What is judged: its edit, safety head and variants.

    Raises:
        InputError: If a report is of another edit, another safety head or another variant.
        RecipeError: If a limit names a judge that the report does not have.
    """
    for report in reports:
        check_own(report, foreign(report, verify))
    known = {report.kind: downstream_metrics(report) for report in reports}
    checks = []
    for number, limit in enumerate(limits):
        kind = next(kind for kind in KINDS if limit.metric.startswith(f"downstream.{kind}."))
        rule = f"downstream[{number}]"
        checks.append(check(EDITED, known[kind], limit, rule=rule) if kind in known else _not_run(limit, kind, rule))
    return checks


def sound_outputs(reports: Sequence[DownstreamReport]) -> Iterator[Check]:
    """That the numbers agree, and nothing was measured on images of the training. No policy can switch it off.

    Args:
        reports: At most one of a kind.
    """
    none = Limit(metric="", at_most=0, reason="what was learned by heart says little of other images")
    for report in reports:
        wrong = next(contradictions(report), "")
        yield statement(f"{OF_REPORT}{report.kind}: numbers agree", "data", not wrong, f"{wrong}; measure it again")
        for name, seen in report.seen.items():
            found = Measured(seen.images, seen.of)
            yield check_value(f"{OF_REPORT}{report.kind}: images{IN_TRAINING}{name}", "data", found, none)


def language_notes(reports: Sequence[DownstreamReport]) -> Iterator[str]:
    """Which model said or drew what was judged: it is in no bundle, and another one was not measured."""
    for report in reports:
        beside = f" with adapters {report.tower.adapter_digest[:19]}" if report.tower.adapter_digest else ""
        yield f"{report.kind}.json is of {report.model} ({report.model_digest[:19]}){beside}, and of no other model"


def digests_of(reports: Sequence[DownstreamReport]) -> dict[str, Digest]:
    """Kind to the digest of the file that a report lies in."""
    return {found.kind: digest_of_bytes(json_from_record(found).encode()) for found in reports}


def downstream_metrics(report: DownstreamReport) -> Metrics:
    """Name to number of one report; what is kept is that of benign inputs."""
    start = f"downstream.{report.kind}"
    found: dict[str, Callable[[], Measured]] = {}
    for judge, sides in report.flagged.items():
        for side, share in sides.items():
            found[f"{start}.{side}.{judge}"] = share_of(share.edited)
            found[f"{start}.{side}.{judge}.delta"] = change_of(share.change)
    found |= {
        f"{start}.kept.{name}": _mean(sides[BENIGN], difference=False)
        for name, sides in report.kept.items()
        if BENIGN in sides
    }
    if report.kind == "draw":
        changes = {name: sides[BENIGN].change for name, sides in report.reference.items() if BENIGN in sides}
        found |= {f"{start}.kept.{name}.delta": _mean(change, difference=True) for name, change in changes.items()}
    return found


def _mean(found: Estimate, *, difference: bool) -> Callable[[], Measured]:
    spread = (found.high - found.low) / 2 / Z95 * math.sqrt(found.n)
    return lambda: Measured(found.value, found.n, found.low, found.high, spread, difference=difference)


def _not_run(limit: Limit, kind: str, rule: str) -> Check:
    least = limit.at_least is not None
    return Check(
        name=limit.metric,
        subject=EDITED,
        result=Result.NOT_RUN,
        measured=None,
        limit=limit.at_least if least else limit.at_most,
        direction="at_least" if least else "at_most",
        detail=f"nothing was measured behind the tower: --downstream {kind}.json, after `uwm-deploy downstream {kind}`",
        rule=rule,
    )
