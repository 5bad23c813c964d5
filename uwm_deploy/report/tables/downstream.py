"""What came out behind an edited tower, beside what came out behind the model's own."""

from __future__ import annotations

from uwm_deploy.records.downstream import DownstreamReport, Flagged
from uwm_deploy.records.metrics import Estimate
from uwm_deploy.report.lines import Whole
from uwm_deploy.report.markdown_table import inert, markdown_table
from uwm_deploy.report.terminal import print_lines, print_rows

_WORDS = {"caption": "captions", "draw": "pictures"}
SCORE_NAMES = {"rouge_l": "ROUGE-L", "meteor": "METEOR", "bleu": "BLEU (mean of items)", "clip_score": "CLIP score"}


def heading_of(report: DownstreamReport) -> str:
    """What was measured, in one line."""
    edit = f"edited by {report.tower.method}" if report.tower.method else "another tower"
    place = f"{report.model} on {report.measured_on.name}"
    beside = (("its safety head", report.tower.head_digest), ("adapters", report.tower.adapter_digest))
    named = " and ".join(what for what, digest in beside if digest and report.kind == "caption")
    more = f", with {named}" if named else ""
    return f"{_WORDS[report.kind]} of {place}: own tower and {edit} ({report.tower.name}){more}"


def flagged_rows(report: DownstreamReport) -> list[dict[str, str]]:
    """One row per judge and side."""
    return [
        {"judge, inputs": f"{judge}, {side}", **_share_cells(found)}
        for judge, sides in report.flagged.items()
        for side, found in sides.items()
    ]


def _share_cells(found: Flagged) -> dict[str, str]:
    change = found.change
    return {
        "own tower %": f"{found.original.value:.1f}",
        "edited %": f"{found.edited.value:.1f}",
        "95% interval": f"{found.edited.low:.1f} to {found.edited.high:.1f}",
        "change": f"{change.delta:+.1f}",
        "paired 95% interval": f"{change.delta_low:+.1f} to {change.delta_high:+.1f}",
        "p": f"{change.p_value:.2g}",
        "n": str(change.n),
    }


def score_rows(report: DownstreamReport) -> list[dict[str, str]]:
    """One row per score, side and what it is measured against."""
    rows = [
        {"score": SCORE_NAMES.get(name, name), "inputs": side, "against": "own tower's", **_estimate_cells(found)}
        for name, sides in report.kept.items()
        for side, found in sides.items()
    ]
    for name, sides in report.reference.items():
        for side, scored in sides.items():
            for label, found in (
                ("own tower", scored.original), ("edited", scored.edited), ("edited minus own", scored.change),
            ):  # fmt: skip
                against = f"{'the prompt' if report.kind == 'draw' else 'the set'}, {label}"
                rows.append(
                    {"score": SCORE_NAMES.get(name, name), "inputs": side, "against": against, **_estimate_cells(found)}
                )
    return rows


def _estimate_cells(found: Estimate) -> dict[str, str]:
    return {"mean": f"{found.value:.2f}", "95% interval": f"{found.low:.2f} to {found.high:.2f}", "n": str(found.n)}


def told_lines(report: DownstreamReport) -> list[str]:
    """Judges, settings and notes."""
    lines = [
        f"judge {judge.name}: {judge.what}, {judge.digest[:19]}"
        + (f", labels {', '.join(judge.labels)} from {judge.threshold:g}" if judge.labels else "")
        for judge in report.judges
    ]
    for what, digest in (("safety head", report.tower.head_digest), ("adapters", report.tower.adapter_digest)):
        lines += [f"behind the edited tower: {what} {digest[:19]}"] if digest else []
    lines += [
        f"corpus BLEU, {what}: " + ", ".join(f"{side} {value:.2f}" for side, value in sides.items())
        for what, sides in report.corpus_bleu.items()
    ]
    lines.append("settings: " + ", ".join(f"{key} {value}" for key, value in sorted(report.settings.items())))
    return [*lines, *(f"note: {note}" for note in report.notes)]


def print_downstream(report: DownstreamReport, *, markdown: bool = False) -> None:
    """The tables and what a reader must know of them.

    Args:
        report: What was measured.
        markdown: In Markdown.
    """
    if markdown:
        print_lines(map(Whole, downstream_markdown(report).rstrip("\n").split("\n")))
        return
    print_lines([heading_of(report)])
    for rows in (flagged_rows(report), score_rows(report)):
        if rows:
            print_rows(rows)
    print_lines(told_lines(report))


def downstream_markdown(report: DownstreamReport) -> str:
    """The same as a file in Markdown."""
    parts = [f"# {inert(heading_of(report))}"]
    parts += [markdown_table(rows) for rows in (flagged_rows(report), score_rows(report)) if rows]
    parts.append("\n".join(f"- {inert(line)}" for line in told_lines(report)))
    return "\n\n".join(parts) + "\n"
