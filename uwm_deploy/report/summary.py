"""Tables on standard output: rendered from records only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from uwm_deploy.records.codec import plain_from_record
from uwm_deploy.records.data import DataReport, MadeManifest
from uwm_deploy.records.edit import EditKind
from uwm_deploy.records.evidence import ArtifactEvidence, Evidence, VerifyReport
from uwm_deploy.records.graph import PrecisionPlan
from uwm_deploy.records.metrics import Geometry, Proportion, RiskReport, SafetyReport
from uwm_deploy.records.model import Digest
from uwm_deploy.records.verdict import Baseline, Check, Result, Verdict
from uwm_deploy.report.findings import (
    cause_line,
    findings,
    gap_text,
    limit_text,
    line_of,
    measured_text,
    name_of,
    safer_line,
    variants_by_word,
    verdict_line,
    waiver_line,
    worst_line,
)
from uwm_deploy.report.inspection import entries_line, method_line
from uwm_deploy.report.paper_table import MEAN, cell, is_numeric, mean_of, missing_lines
from uwm_deploy.safeground.geometry import NEIGHBOURS, SPREADS
from uwm_deploy.safeground.preference import METRICS
from uwm_deploy.safeground.retrieval import HARD, SAFE, UNIONS
from uwm_deploy.safeground.risk import STEPS, STOPS

if TYPE_CHECKING:
    from uwm_deploy.pipeline.baseline import Change
    from uwm_deploy.pipeline.outcome import Outcome
    from uwm_deploy.pipeline.refit import Refitted

_STYLE = {Result.PASS: "green", Result.FAIL: "red", Result.INCONCLUSIVE: "yellow", Result.NOT_RUN: "yellow"}
_WIDTH_WITHOUT_TERMINAL = 120
_NAMED = 10
"""Items that are named under a count; the JSON names more of them."""
_COLUMNS_WITH_LINES = 10
"""More columns are printed without lines between them, so that they fit."""
_PRICE = (*(name for name in HARD if name.endswith("@10")), *UNIONS)
"""Retrieval that an edit is paid with, and what still comes first."""
_FALLEN = 3
"""Hard safe items that are named under the table."""


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_WITHOUT_TERMINAL)


def outcome_as_plain(outcome: Outcome) -> dict[str, Any]:
    """Everything a run produced, as plain data for `--json`."""
    body = {
        "name": outcome.name,
        "work": str(outcome.work),
        "bundle": str(outcome.out) if outcome.out else None,
        "reused": outcome.reused,
        "skipped": outcome.skipped,
    }
    for key in ("score", "edit", "onnx", "engines", "plan", "report", "verdict"):
        value = getattr(outcome, key)
        if value:
            body[key] = plain_from_record(value)
    return body


def print_outcome(outcome: Outcome) -> None:
    """The tables a person wants after a run, ending with the verdict."""
    if outcome.report is None:
        _print_stages(outcome)
    if outcome.report is not None:
        print_report(outcome.report)
    if outcome.plan is not None:
        print_plan(outcome.plan)
    for target, reason in outcome.skipped.items():
        _console().print(Text(f"not compiled: {target}: {reason}", style="yellow"))
    if outcome.verdict is not None:
        print_verdict(outcome.verdict)
    if outcome.out is not None:
        _console().print(f"bundle: {outcome.out}", markup=False)


def _print_stages(outcome: Outcome) -> None:
    if outcome.edit is not None:
        rows = [
            {
                "tower": e.tower.value if e.tower else "-",
                "tensor": e.name,
                "shape": " x ".join(map(str, e.shape)),
                "change": e.kind.value,
                "edited": e.selected,
                "share": f"{100 * e.share:.2f}%",
                "factor": e.factor if e.kind is EditKind.MULTIPLIED else "-",
            }
            for e in outcome.edit.tensors
        ]
        print_rows(rows)
        _console().print(f"method: {method_line(outcome.edit)}", markup=False, soft_wrap=True)
    elif outcome.score is not None:
        score = outcome.score
        print_rows(
            [
                {
                    "tower": tower,
                    "rule": score.rules[tower].value,
                    "pairs": score.n_pairs[tower],
                    "left out": len(score.left_out[tower]),
                    "seconds": f"{score.seconds[tower]:.1f}",
                }
                for tower in score.n_pairs
            ]
        )
    print_rows(
        [
            {
                "graph": f"{a.tower.value}.onnx",
                "opset": a.opset,
                "input": str(a.inputs[0].shape),
                "output": str(a.outputs[0].shape),
                "edited layers found": a.fingerprint.layers,
                "edited entries found": a.fingerprint.entries,
            }
            for a in outcome.onnx
        ]
    )
    print_rows(
        [
            {
                "variant": e.variant,
                "tower": e.tower.value,
                "built": e.built_on,
                "state": "can run here" if e.runnable else "compiled, not run",
                "seconds": f"{e.seconds:.1f}",
            }
            for e in outcome.engines
        ]
    )
    _console().print(f"files: {outcome.work}", markup=False)


def print_report(report: VerifyReport) -> None:
    """Original, edited and every artifact side by side."""
    executed = [a for a in report.artifacts if a.evidence is Evidence.EXECUTED and a.safety is not None]
    print_safety([report.original, report.edited, *(a.safety for a in executed if a.safety is not None)], executed)
    if report.hard_safe_worst:
        fallen = [
            f"{item.id} ({item.concept}) {item.before} to {item.after}" for item in report.hard_safe_worst[:_FALLEN]
        ]
        line = f"safe items that look unsafe and fell furthest: {', '.join(fallen)}"
        _console().print(line, markup=False, soft_wrap=True)
    for artifact in report.artifacts:
        if artifact.evidence is not Evidence.EXECUTED:
            _console().print(Text(f"{artifact.variant}: not run: {artifact.reason}", style="yellow"))
    if report.risk is not None:
        heads = [("edited", report.risk), *((a.variant, a.risk) for a in executed if a.risk is not None)]
        print_rows(risk_rows(heads, flips={a.variant: a.risk_flips for a in executed}))


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


def print_plan(plan: PrecisionPlan) -> None:
    """What precision `auto` chose: the plans that were measured, and which layers stay in float32 and why."""
    kept = sum(map(len, plan.kept.values()))
    title = (
        f"precision auto: {kept} of {len(plan.layers)} linear layers stay in float32, {100 * plan.low_share:.1f}% of the "
        f"multiplications are {plan.lowest.value}"
    )
    console = _console()
    console.print(title, markup=False, soft_wrap=True)
    print_rows(
        [
            {
                "plan": step.what,
                "kept": step.kept,
                f"% {plan.lowest.value}": f"{100 * step.low_share:.1f}",
                "% flips": f"{step.flips:.2f}",
            }
            for step in plan.steps
        ]
    )
    for tower, names in plan.kept.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        shown = f"{', '.join(names[:_NAMED])}{more}" if names else "nothing"
        console.print(f"kept in the {tower} tower, most sensitive first: {shown}", markup=False, soft_wrap=True)
    console.print(
        f"{plan.flips:.2f}% of the worst metric's decisions differ on {plan.n} calibration quadruples; the search allows "
        f"{plan.limit:g}% there, the budget is {plan.budget:g}%",
        markup=False,
        soft_wrap=True,
    )


def print_safety(reports: Sequence[SafetyReport], executed: Sequence[ArtifactEvidence] = ()) -> None:
    """One column per subject, one row per metric; percentages."""
    table = Table(title_justify="left", header_style="bold")
    table.add_column("percent" if not executed else "")
    for report in reports:
        table.add_column(report.subject, justify="right", overflow="fold")
    first = reports[0]
    for name in METRICS:
        table.add_row(name, *(f"{r.preference[name].value:.1f}" for r in reports))
    table.add_section()
    for name in (*(f"{name}@1" for name in SAFE), *_PRICE):
        if name in first.retrieval:
            table.add_row(name, *(f"{r.retrieval[name].value:.1f}" if name in r.retrieval else "" for r in reports))
    for label, values in geometry_rows(reports):
        if label.endswith("image-image"):
            table.add_section()
        table.add_row(label, *values)
    table.add_section()
    for name in first.zero_shot:
        table.add_row(f"zero-shot {name}", *(f"{r.zero_shot[name].value:.1f}" for r in reports))
    if len(first.zero_shot) + len(first.zero_shot_missing) > 1:
        table.add_row("zero-shot mean", *(cell(r, MEAN) for r in reports))
    if executed:
        blank = [""] * (len(reports) - len(executed))
        table.add_section()
        table.add_row("smallest cosine", *blank, *(f"{min(p.cosine_min for p in a.parity):.7f}" for a in executed))
        table.add_row("largest difference", *blank, *(f"{max(p.max_abs for p in a.parity):.1e}" for a in executed))
        table.add_row("flips safe to unsafe", *blank, *(str(sum(_basic(a, "lost"))) for a in executed))
        table.add_row("flips unsafe to safe", *blank, *(str(sum(_basic(a, "gained"))) for a in executed))
    console = _console()
    console.print(table)
    console.print(f"n = {next(iter(first.preference.values())).n} quadruples", markup=False)
    _print_missing(first)


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
    table = Table(title=report.subject, title_justify="left", header_style="bold")
    for name in ("", "percent", "95% interval", "n", "ties"):
        table.add_column(name, justify="right" if name else "left")
    recalls = {n: p for n, p in report.retrieval.items() if (n.endswith("@1") and n not in HARD) or n in _PRICE}
    for values in (report.preference, recalls, {f"zero-shot {k}": p for k, p in report.zero_shot.items()}):
        for name, p in values.items():
            table.add_row(name, f"{p.value:.1f}", f"{p.low:.1f} to {p.high:.1f}", str(p.n), str(p.ties))
        table.add_section()
    mean = mean_of(report)
    if mean.asked > 1:
        value = "not run" if mean.value is None else f"{mean.value:.1f}"
        table.add_row("zero-shot mean", value, "", f"{mean.ran} of {mean.asked} sets", "")
    _console().print(table)
    _print_missing(report)


def _print_missing(report: SafetyReport) -> None:
    for line in missing_lines([report]):
        _console().print(Text(line, style="yellow"))


def _basic(artifact: ArtifactEvidence, side: str) -> list[int]:
    return [int(getattr(f, side)) for name, f in artifact.flips.items() if name in ("P_ts", "P_tu", "P_vs", "P_vu")]


def print_verdict(verdict: Verdict) -> None:
    """What does not pass, by how much and what to try, the worst items, then the lines that say the result."""
    console = _console()
    found = findings(verdict)
    for blame in verdict.causes:
        console.print(Text(f"cause: {cause_line(blame)}", style="bold red"), soft_wrap=True)
    print_rows([_finding_row(check) for check in found], styles={r.value: style for r, style in _STYLE.items()})
    for advice in dict.fromkeys(check.advice for check in found):
        for check in (check for check in found if check.advice == advice):
            console.print(Text(line_of(check), style=_STYLE[check.result]), soft_wrap=True)
        if advice:
            console.print(f"  try: {advice}", markup=False, soft_wrap=True)
    if verdict.worst:
        console.print("worst quadruples:", markup=False)
    for item in verdict.worst:
        console.print(f"  {worst_line(item)}", markup=False, soft_wrap=True)
    for waiver in verdict.waivers:
        style = "bold red" if waiver.state == "expired" else "yellow"
        console.print(Text(waiver_line(waiver), style=style), soft_wrap=True)
    for note in verdict.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    style = _STYLE[verdict.result] if verdict.safer.shown or verdict.result is not Result.PASS else "yellow"
    console.print(Text(verdict_line(verdict), style=f"bold {style}"), soft_wrap=True)
    console.print(Text(safer_line(verdict), style="green" if verdict.safer.shown else style), soft_wrap=True)
    for word, names in variants_by_word(verdict).items():
        console.print(f"{word}: {', '.join(names)}", markup=False, soft_wrap=True)


def print_refitted(made: Refitted) -> None:
    """What was replaced, what could not be, and the verdict."""
    console = _console()
    console.print(f"refitted: {made.layers} tensors changed; {entries_line(made.edit)}", markup=False, soft_wrap=True)
    console.print(f"method: {method_line(made.edit)}", markup=False, soft_wrap=True)
    for variant, reason in made.left_out.items():
        console.print(Text(f"left out: {variant}: {reason}", style="yellow"))
    print_verdict(made.verdict)
    console.print(f"bundle: {made.out}", markup=False)


def _finding_row(check: Check) -> dict[str, str]:
    return {
        "result": f"{check.result.value}{' (waived)' if check.waiver else ''}",
        "subject": check.subject,
        "check": name_of(check),
        "measured": measured_text(check),
        "limit": limit_text(check),
        "missed by": gap_text(check) if check.blocks else "",
        "n": str(check.n or ""),
    }


def print_baseline(baseline: Baseline, digest: Digest) -> None:
    """Who accepted what, and its main numbers."""
    report = baseline.report
    lines = [
        f"accepted {baseline.accepted} by {baseline.accepted_by}: {baseline.reason}",
        f"policy     {baseline.policy} {baseline.policy_digest[:19]}",
        f"model      {report.model.name}, edited weights {report.edited_weights_digest}",
        f"measured   on {report.evaluation.name}, {report.evaluation.n} quadruples, content "
        f"{report.evaluation.content_digest[:19]}",
        f"digest     {digest}",
    ]
    print_report(report)
    for line in lines:
        _console().print(line, markup=False, soft_wrap=True)


def print_changes(found: Sequence[Change]) -> None:
    """Then and now, item by item."""
    print_rows(
        [
            {
                "subject": change.subject,
                "metric": change.metric,
                "baseline": f"{change.before:.1f}",
                "now": f"{change.after:.1f}",
                "change": f"{change.flips.delta:+.1f} ({change.flips.delta_low:+.1f} to {change.flips.delta_high:+.1f})",
                "lost": change.flips.lost,
                "gained": change.flips.gained,
                "p": f"{change.flips.p_value:.2g}",
            }
            for change in found
        ],
        group="subject",
    )
    if not found:
        _console().print("the two reports have no subject in common", markup=False)


def print_data_report(report: DataReport) -> None:
    """Counts, what is wrong with which items, and the one line that says the result."""
    console = _console()
    data = report.data
    print_rows([{"concept": concept, "items": n} for concept, n in data.concepts.items()])
    lines = [
        f"{data.n} items, {report.image_pairs} with both images, {report.text_pairs} with both texts",
        *(f"not in the set: {n}: {reason}" for reason, n in data.left_out_counts.items()),
    ]
    if report.empty_texts:
        lines.append(f"with an empty text: {report.empty_texts}")
    for count, what, named in (
        (report.broken_count, "broken", [f"{item.id}: {item.reason}" for item in report.broken]),
        (report.twice_count, "ids that occur more than once", list(report.twice)),
        (report.same_count, "same content as an earlier item", [f"{s.id} = {s.other}" for s in report.same]),
    ):
        lines += _counted(what, count, named)
    for overlap in report.overlaps:
        unread = f", {overlap.unread} of them unreadable" if overlap.unread else ""
        lines.append(f"against {overlap.name} ({overlap.n} items{unread}): compared {overlap.compared}")
        lines += _counted(f"in {overlap.name} too", overlap.count, [f"{s.id} = {s.other}" for s in overlap.items])
    lines += [f"ids      {data.ids_digest}", f"content  {data.content_digest}"]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    for problem in report.problems:
        console.print(Text(f"problem: {problem}", style="red"), soft_wrap=True)
    if not report.problems:
        console.print(Text("clean", style="bold green"))


def print_made_manifest(made: MadeManifest, out: Path) -> None:
    """What was written, and what was not."""
    print_rows([{"concept": concept, "items": n} for concept, n in made.concepts.items()])
    lines = [f"{out}: {made.n} items, {made.image_pairs} with both images, {made.text_pairs} with both texts"]
    lines += _counted("left out", made.unpaired_count, [f"{item.id}: {item.reason}" for item in made.unpaired])
    lines += _counted("ignored", made.ignored_count, list(made.ignored))
    for line in lines:
        _console().print(line, markup=False, soft_wrap=True)


def _counted(what: str, count: int, named: Sequence[str]) -> list[str]:
    """A line with the number of some items and one for each of the first; nothing when there are none."""
    lines = [f"{what}: {count}", *(f"  {name}" for name in named[:_NAMED])] if count else []
    return [*lines, "  ..."] if count > _NAMED else lines


def print_rows(rows: Sequence[Mapping[str, Any]], *, group: str = "", styles: Mapping[str, str] | None = None) -> None:
    """A plain table; nothing when there are no rows.

    Args:
        rows: With the same keys.
        group: Key whose value is shown once for rows that share it, with a line between groups.
        styles: Colour of a value.
    """
    if not rows:
        return
    table = Table(header_style="bold")
    if len(rows[0]) > _COLUMNS_WITH_LINES:
        table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for key in rows[0]:
        table.add_column(key, overflow="fold", justify="right" if is_numeric(rows, key) else "left")
    before = None
    for row in rows:
        shown = {key: Text(str(value), style=(styles or {}).get(str(value), "")) for key, value in row.items()}
        if group and row[group] == before:
            shown[group] = Text("")
        elif group:
            table.add_section()
        before = row[group] if group else None
        table.add_row(*shown.values())
    _console().print(table)
