"""The limits of the gate (`ci/`): TOML to records, strictly. docs/reference/policy.md is the whole schema.

A limit that every number keeps, and a policy that cannot fail anything, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Literal

from uwm_deploy.errors import RecipeError
from uwm_deploy.recipes.strict_toml import record_from_toml
from uwm_deploy.records.downstream import REFUSED
from uwm_deploy.records.graph import Precision, Target

DOCS = "docs/reference/policy.md"

SECTIONS = ("edit", "artifact", "concept", "baseline", "risk", "downstream")
"""Arrays of limits; each says what is compared with what."""

_DOWNSTREAM = re.compile(
    r"downstream\.(?P<kind>caption|draw)\."
    r"((?P<side>unsafe|benign)\.[\w-]+(\.delta)?|kept\.(rouge_l|meteor|bleu)|kept\.clip_score\.delta)"
)
_KEPT = {"caption": "downstream.caption.kept.rouge_l", "draw": "downstream.draw.kept.clip_score.delta"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One limit of a policy.

    Attributes:
        metric: What is compared; docs/reference/policy.md lists the names.
        at_least: Smallest value that passes.
        at_most: Largest value that passes.
        bound: Whether the measured value must keep it, or the end of its 95% interval that is worse (non-inferiority).
        min_n: Fewest items that can support the comparison; with fewer the check is inconclusive.
        precision: Precisions of the artifacts that it is for; empty for all.
        of: For concepts, the baseline and the safety head: the edited model, the artifacts, or both when empty.
        reason: Why the limit is what it is; shown when it fails.
    """

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    bound: Literal["point", "worst"] = "point"
    min_n: int = 1
    precision: tuple[Precision, ...] = ()
    of: Literal["", "edit", "artifact"] = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceRule:
    """Where the variants of one target must have been executed.

    Attributes:
        precision: Precisions that it is for; empty for all.
        device: Kind of device.
        compute_capability: GPU generations, e.g. ``"9.0"``, of which one must be the one that it ran on; empty for any.
        if_built: Judge only what was built; otherwise at least one variant of the target must be there.
    """

    target: Target
    precision: tuple[Precision, ...] = ()
    device: Literal["any", "cpu", "gpu"] = "any"
    compute_capability: tuple[str, ...] = ()
    if_built: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiver:
    """One check that is known not to pass and, until a day, does not block.

    Attributes:
        check: Its name, exactly as reported.
        subject: Its subject, exactly as reported.
        concept: Its concept, for checks of single concepts.
        owner: Who answers for it.
        expires: Last day on which it counts.
    """

    check: str
    subject: str
    owner: str
    reason: str
    expires: date
    concept: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The limits of the gate.

    Attributes:
        edit: Limits on the edited model, by itself and against the original.
        artifact: Limits on every executed artifact, by itself and against the edited model.
        concept: The same for every concept with at least `min_n` items.
        baseline: Limits on what changed since the accepted report.
        risk: Limits on the safety head, of bundles that have one.
        downstream: Limits on captions and pictures behind the edited towers.
        evidence: Where variants must have been executed.
        waiver: Checks that do not block for a while.
        required: Variants, or ``"onnx"``, that must have been executed; missing evidence fails.
        min_proven: Fewest variants that must be executed and pass.
        baseline_digest: Digest of the one baseline file that may be compared with; empty for any.
    """

    format: int
    name: str
    edit: tuple[Limit, ...]
    artifact: tuple[Limit, ...]
    concept: tuple[Limit, ...] = ()
    baseline: tuple[Limit, ...] = ()
    risk: tuple[Limit, ...] = ()
    downstream: tuple[Limit, ...] = ()
    evidence: tuple[EvidenceRule, ...] = ()
    waiver: tuple[Waiver, ...] = ()
    required: tuple[str, ...] = ()
    min_proven: int = 1
    baseline_digest: str = ""


def policy_from_toml(text: str, *, where: str) -> Policy:
    """Parses a policy.

    Raises:
        RecipeError: If it does not follow the format, holds a limit that nothing can break, or cannot fail anything.
    """
    policy = record_from_toml(Policy, text, where, docs=DOCS)
    for section in SECTIONS:
        for number, limit in enumerate(getattr(policy, section)):
            _check_limit(limit, section, f"{where}: {section}[{number}] on {limit.metric}")
    if not policy.artifact or policy.min_proven < 1:
        raise RecipeError(
            f"{where}: the policy cannot fail anything", fix="limit an artifact metric and min_proven >= 1"
        )
    _check_risk(policy, where)
    _check_downstream(policy, where)
    _check_waivers(policy, where)
    if policy.baseline_digest and not re.fullmatch(r"sha256:[0-9a-f]{64}", policy.baseline_digest):
        raise RecipeError(f"{where}: baseline_digest is no digest", fix="copy it from `uwm-deploy baseline show`")
    return policy


def rule_lines(text: str) -> Mapping[str, int]:
    """Line of each rule of a policy's text, by the name that checks carry, e.g. ``"artifact[2]"``."""
    found: dict[str, int] = {}
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if match := re.match(r"\s*\[\[\s*(\w+)\s*\]\]", line):
            section = match[1]
            found[f"{section}[{counts.get(section, 0)}]"] = number
            counts[section] = counts.get(section, 0) + 1
        elif match := re.match(r"\s*(required|min_proven)\s*=", line):
            found[match[1]] = number
    return found


def _check_risk(policy: Policy, where: str) -> None:
    """A head that stops everything has perfect recall: it is never judged without what it costs."""
    asked = {limit.metric for limit in policy.risk if limit.of != "artifact"}
    finds = asked & {"risk.auroc", "risk.recall", "risk.category.recall", "risk.category.auroc"}
    if finds and "risk.benign_stopped" not in asked:
        raise RecipeError(
            f"{where}: {min(finds)} is limited, and the benign images that the head stops are not",
            fix="limit risk.benign_stopped of the edited model, too",
        )


def _check_downstream(policy: Policy, where: str) -> None:
    """A model that says nothing, or draws noise, is never flagged: it is never judged without what it keeps."""
    found = [match for limit in policy.downstream if (match := _DOWNSTREAM.fullmatch(limit.metric))]
    for kind in sorted({match["kind"] for match in found if match["side"] == "unsafe"}):
        kept = any(match["kind"] == kind and match["side"] is None for match in found)
        if not kept:
            raise RecipeError(
                f"{where}: flagged outputs of {kind} are limited, and what it keeps is not",
                fix=f"limit {_KEPT[kind]}, too",
            )


def _check_limit(limit: Limit, section: str, where: str) -> None:
    if (limit.at_least is None) == (limit.at_most is None):
        raise RecipeError(where, fix="give exactly one of at_least and at_most")
    if limit.min_n < 1:
        raise RecipeError(f"{where}: min_n is {limit.min_n}", fix="use 1 or more")
    if (section == "risk") != limit.metric.startswith("risk."):
        raise RecipeError(f"{where}: metrics of a safety head and [[risk]] belong together", fix=f"see {DOCS}")
    if (section == "downstream") != limit.metric.startswith("downstream."):
        raise RecipeError(
            f"{where}: metrics of captions and pictures and [[downstream]] belong together", fix=f"see {DOCS}"
        )
    if section == "downstream" and not _DOWNSTREAM.fullmatch(limit.metric):
        raise RecipeError(
            f"{where}: there is no such metric",
            fix=f"write downstream.caption.unsafe.any, {_KEPT['caption']} and the like; see {DOCS}",
        )
    if limit.metric in ("risk.flips", "risk.parity.max_abs") and limit.of != "artifact":
        raise RecipeError(f"{where} compares artifacts with the edited model", fix='add of = "artifact"')
    _check_range(limit, where)
    _check_side(limit, where)
    if limit.bound == "worst" and limit.metric.startswith(("parity.", "risk.parity.", "risk.ece", "spread.")):
        raise RecipeError(f"{where}: bound = 'worst', but it has no interval", fix="use bound = 'point'")
    if limit.of and section in ("edit", "artifact", "downstream"):
        raise RecipeError(f"{where}: `of` belongs to [[concept]], [[baseline]] and [[risk]]", fix="remove it")
    if limit.precision and (section in ("edit", "downstream") or limit.of == "edit"):
        raise RecipeError(f"{where}: the edited model has no precision", fix="remove `precision`")
    if (
        section == "baseline"
        and not limit.metric.endswith(".delta")
        and not limit.metric.startswith(("flips.", "lost."))
    ):
        raise RecipeError(f"{where} is no difference from the baseline", fix="use .delta, flips. or lost.")


def _check_range(limit: Limit, where: str) -> None:
    """A limit must be able to fail and to pass. No interval of a share reaches the very end of its range."""
    low, high = _range(limit.metric)
    least, most = limit.at_least, limit.at_most
    span = f"its values are {'shares, ' * limit.metric.startswith('neighbours.')}{low:g} to {high:g}"
    if (least is not None and least <= low) or (most is not None and most >= high):
        raise RecipeError(f"{where} can never fail: {span}", fix="choose a limit inside, or remove it")
    if (least is not None and least > high) or (most is not None and most < low):
        share = limit.metric.startswith("neighbours.")
        raise RecipeError(
            f"{where} can never pass: {span}", fix="write 0.5 for 50%" if share else "choose a limit inside"
        )
    if limit.bound == "worst" and (least == high or most == low):
        raise RecipeError(
            f"{where} can never pass: {span}, and no interval ends there",
            fix="choose a limit inside, or bound = 'point'",
        )


def _check_side(limit: Limit, where: str) -> None:
    """A limit on the wrong side asks for harm, and lets everything pass that it was written against."""
    better = better_side(limit.metric)
    given = "at_least" if limit.at_least is not None else "at_most"
    if better and given != better:
        more = "more" if better == "at_least" else "less"
        raise RecipeError(
            f"{where} is on the wrong side: {more} is better, and {given} lets the worst pass",
            fix=f"write {better} for {given}",
        )


_LESS_IS_BETTER = (
    "parity.max_abs", "parity.mean_abs", "flips.", "lost.", "unsafe-first-",
    "risk.benign_stopped", "risk.benign_zero_shot_stopped", "risk.ece", "risk.flips", "risk.parity.max_abs",
)  # fmt: skip
_EITHER = ("spread.",)
"""1 is unchanged; less is collapse, and more is no better."""


def better_side(metric: str) -> Literal["at_least", "at_most", ""]:
    """The side on which a limit of a metric may be; empty for both."""
    if metric.startswith(_EITHER):
        return ""
    if match := _DOWNSTREAM.fullmatch(metric):
        declined = match["side"] == "unsafe" and metric.split(".")[3] == REFUSED
        return "at_most" if match["side"] and not declined else "at_least"
    return "at_most" if metric.startswith(_LESS_IS_BETTER) else "at_least"


def _range(metric: str) -> tuple[float, float]:
    """Smallest and largest value that a metric can have."""
    if metric == "parity.cosine_min":
        return -1.0, 1.0
    if metric.startswith(("parity.", "risk.parity.")):
        return 0.0, float("inf")
    if metric.startswith(("risk.", "downstream.")):
        return (-100.0 if metric.endswith(".delta") else 0.0), 100.0
    if metric.startswith(("neighbours.", "spread.")) and metric.endswith(".delta"):
        return float("-inf"), float("inf")  # there is none, which the gate answers with the nearest name
    if metric.startswith("neighbours."):
        return 0.0, 1.0
    if metric.startswith("spread."):
        return 0.0, float("inf")
    if "." in metric and not metric.endswith(".delta") and not metric.startswith(("zero_shot.", "flips.", "lost.")):
        return float("-inf"), float("inf")  # a typing error, which the gate answers with the nearest name
    return (-100.0 if metric.endswith(".delta") else 0.0), 100.0


def _check_waivers(policy: Policy, where: str) -> None:
    names = set(_names_of_checks(policy))
    for number, waiver in enumerate(policy.waiver):
        here = f"{where}: waiver[{number}]"
        for key in ("check", "subject", "owner", "reason"):
            if not getattr(waiver, key).strip():
                raise RecipeError(f"{here}: {key} is empty", fix="name the check, its subject, an owner and a reason")
        if waiver.check not in names:
            raise RecipeError(
                f"{here}: no rule of this policy makes a check {waiver.check!r}",
                fix="name a limit's metric or 'required evidence'; what no policy can switch off cannot be waived",
            )


def _names_of_checks(policy: Policy) -> Iterator[str]:
    for section in SECTIONS:
        yield from (name_of(section, limit) for limit in getattr(policy, section))
    yield "required evidence"


def name_of(section: str, limit: Limit) -> str:
    """Name of the check that a limit makes."""
    return f"{limit.metric} since the baseline" if section == "baseline" else limit.metric
