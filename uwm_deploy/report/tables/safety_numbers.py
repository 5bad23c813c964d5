"""SafeGround, retrieval, geometry, zero-shot and the safety head: subjects side by side, or one with its intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from uwm_deploy.records.evidence import ArtifactEvidence, Evidence, VerifyReport
from uwm_deploy.records.metrics import Geometry, Proportion, RiskReport, SafetyReport
from uwm_deploy.report.measured_subjects import executed_artifacts, measured_subjects
from uwm_deploy.report.paper_table import MEAN, cell, mean_of, missing_lines
from uwm_deploy.report.terminal import print_line, print_rows, print_sections
from uwm_deploy.safeground.geometry import NEIGHBOURS, SPREADS
from uwm_deploy.safeground.preference import BASIC, METRICS
from uwm_deploy.safeground.retrieval import HARD, SAFE, UNIONS
from uwm_deploy.safeground.risk import STEPS, STOPS

_PRICE = (*(name for name in HARD if name.endswith("@10")), *UNIONS)
"""Retrieval that an edit is paid with, and how often an unsafe result still comes first."""

_FALLEN = 3
"""Hard safe items that are named under the table."""


def print_report(report: VerifyReport) -> None:
    """Original, edited and every artifact side by side."""
    executed = [artifact for artifact, _ in executed_artifacts(report)]
    print_safety([safety for _, _, safety in measured_subjects(report)], executed)
    if fallen := report.hard_safe_worst[:_FALLEN]:
        named = ", ".join(f"{item.id} ({item.concept}) {item.before} to {item.after}" for item in fallen)
        print_line(f"safe items that look unsafe and fell furthest: {named}")
    for artifact in report.artifacts:
        if artifact.evidence is not Evidence.EXECUTED:
            print_line(f"{artifact.variant}: not run: {artifact.reason}", style="yellow")
    if report.risk is not None:
        heads = [("edited", report.risk), *((a.variant, a.risk) for a in executed if a.risk is not None)]
        print_rows(risk_rows(heads, flips={a.variant: a.risk_flips for a in executed}))


def print_safety(reports: Sequence[SafetyReport], executed: Sequence[ArtifactEvidence] = ()) -> None:
    """One column per subject, one row per metric; percentages.

    Args:
        reports: The first one says which metrics there are.
        executed: Artifacts that the last reports are of; their parity and flips are added.
    """
    first = reports[0]
    retrieval = (*(f"{name}@1" for name in SAFE), *_PRICE)
    zero_shot = [
        [f"zero-shot {name}", *(f"{r.zero_shot[name].value:.1f}" for r in reports)] for name in first.zero_shot
    ]
    if len(first.zero_shot) + len(first.zero_shot_missing) > 1:
        zero_shot.append(["zero-shot mean", *(cell(r, MEAN) for r in reports)])
    print_sections(
        ["" if executed else "percent", *(report.subject for report in reports)],
        [
            [[name, *(f"{r.preference[name].value:.1f}" for r in reports)] for name in METRICS],
            [[name, *(_recall(r, name) for r in reports)] for name in retrieval if name in first.retrieval],
            [[label, *values] for label, values in geometry_rows(reports)],
            zero_shot,
            _artifact_rows(executed, blank=len(reports) - len(executed)),
        ],
    )
    print_line(f"n = {next(iter(first.preference.values())).n} quadruples")
    _print_missing(first)


def _recall(report: SafetyReport, name: str) -> str:
    return f"{report.retrieval[name].value:.1f}" if name in report.retrieval else ""


def _artifact_rows(executed: Sequence[ArtifactEvidence], blank: int) -> list[list[str]]:
    """Parity and flips of what was executed; nothing without any.

    Args:
        executed: The subjects of the last columns.
        blank: Columns of numbers before them.
    """
    if not executed:
        return []
    rows = {
        "smallest cosine": [f"{min(p.cosine_min for p in a.parity):.7f}" for a in executed],
        "largest difference": [f"{max(p.max_abs for p in a.parity):.1e}" for a in executed],
        "flips safe to unsafe": [str(sum(a.flips[name].lost for name in BASIC if name in a.flips)) for a in executed],
        "flips unsafe to safe": [str(sum(a.flips[name].gained for name in BASIC if name in a.flips)) for a in executed],
    }
    return [[label, *[""] * blank, *cells] for label, cells in rows.items()]


def geometry_rows(reports: Sequence[SafetyReport]) -> list[tuple[str, list[str]]]:
    """Neighbours kept, then spread, against the original model; nothing of what no report has."""
    found = [report.geometry for report in reports]
    near = [(f"neighbours {name}", [_near(part, name) for part in found]) for name in NEIGHBOURS]
    spread = [(f"spread {tower}", [_spread(part, tower) for part in found]) for tower in SPREADS]
    return [(label, values) for label, values in (*near, *spread) if any(values)]


def _near(part: Geometry | None, name: str) -> str:
    return f"{part.neighbours[name].value:.2f}" if part and name in part.neighbours else ""


def _spread(part: Geometry | None, tower: str) -> str:
    return f"{part.spread[tower]:.2f}" if part and tower in part.spread else ""


def print_measured(report: SafetyReport) -> None:
    """One subject: every number with its interval, its items and its ties."""
    recalls = {n: p for n, p in report.retrieval.items() if (n.endswith("@1") and n not in HARD) or n in _PRICE}
    zero_shot = _interval_rows({f"zero-shot {name}": p for name, p in report.zero_shot.items()})
    mean, sections = mean_of(report), [_interval_rows(report.preference), _interval_rows(recalls), zero_shot]
    if mean.asked > 1:
        value = "not run" if mean.value is None else f"{mean.value:.1f}"
        sections.append([["zero-shot mean", value, "", f"{mean.ran} of {mean.asked} sets", ""]])
    print_sections(("", "percent", "95% interval", "n", "ties"), sections, title=report.subject)
    _print_missing(report)


def _interval_rows(found: Mapping[str, Proportion]) -> list[list[str]]:
    return [
        [name, f"{p.value:.1f}", f"{p.low:.1f} to {p.high:.1f}", str(p.n), str(p.ties)] for name, p in found.items()
    ]


def _print_missing(report: SafetyReport) -> None:
    for line in missing_lines([report]):
        print_line(line, style="yellow")


def risk_rows(
    subjects: Sequence[tuple[str, RiskReport]], flips: Mapping[str, Proportion | None] | None = None
) -> list[dict[str, str]]:
    """A safety head on each subject: what it finds, and beside every share of unsafe images that of safe ones.

    Args:
        subjects: Names and reports.
        flips: Subject to images decided otherwise than by the edited model.
    """

    def row(name: str, of: Callable[[RiskReport], str]) -> dict[str, str]:
        return {"safety head": name, **{subject: of(risk) for subject, risk in subjects}}

    rows = [row("AUROC", lambda risk: f"{risk.auroc.value:.1f}")]
    for step in STEPS:
        rows.append(row(f"unsafe, at least {step.value}", lambda risk, key=step.value: f"{risk.recall[key].value:.1f}"))  # type: ignore[misc]
        rows.append(row(f"safe, at least {step.value}", lambda risk, key=step.value: f"{risk.benign[key].value:.1f}"))  # type: ignore[misc]
    if all(risk.benign_zero_shot for _, risk in subjects):
        name = f"zero-shot images, at least {STOPS.value}"
        rows.append(row(name, lambda risk: f"{risk.benign_zero_shot[STOPS.value].value:.1f}"))
    rows += [
        row("unsafe, concept right", lambda risk: f"{risk.named.value:.1f}"),
        row("calibration error, level", lambda risk: f"{risk.ece:.1f}"),
        row("calibration error, category", lambda risk: f"{risk.category_ece:.1f}"),
    ]
    if found := flips or {}:
        parts = {subject: found.get(subject) for subject, _ in subjects}
        cells = {subject: f"{part.value:.2f}" if part else "" for subject, part in parts.items()}
        rows.append({"safety head": "decisions changed", **cells})
    return rows
