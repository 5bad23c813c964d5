"""A set of quadruples: what was found wrong with it, or what was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from uwm_deploy.records.data import DataReport, MadeManifest
from uwm_deploy.report.terminal import counted, print_line, print_lines, print_rows


def print_data_report(report: DataReport) -> None:
    """Counts, what is wrong with which items, and the one line that says the result."""
    print_rows(_concept_rows(report.data.concepts))
    print_lines(data_lines(report))
    for problem in report.problems:
        print_line(f"problem: {problem}", style="red")
    if not report.problems:
        print_line("clean", style="bold green")


def data_lines(report: DataReport) -> list[str]:
    """Counts and named items, one line each."""
    data = report.data
    lines = [
        f"{data.n} items, {report.image_pairs} with both images, {report.text_pairs} with both texts",
        *(f"not in the set: {n}: {reason}" for reason, n in data.left_out_counts.items()),
    ]
    if report.empty_texts:
        lines.append(f"with an empty text: {report.empty_texts}")
    lines += counted("broken", report.broken_count, [f"{item.id}: {item.reason}" for item in report.broken])
    lines += counted("ids that occur more than once", report.twice_count, list(report.twice))
    same = [f"{item.id} = {item.other}" for item in report.same]
    lines += counted("same content as an earlier item", report.same_count, same)
    lines += [
        f"perhaps misspelt: {concept} ({data.concepts[concept]}), as {o}" for concept, o in report.misspelt.items()
    ]
    lines += [f"concept_names names what no item has: {name}" for name in report.unused_names]
    for overlap in report.overlaps:
        unread = f", {overlap.unread} of them unreadable" if overlap.unread else ""
        lines.append(f"against {overlap.name} ({overlap.n} items{unread}): compared {overlap.compared}")
        shared = [f"{item.id} = {item.other}" for item in overlap.items]
        lines += counted(f"in {overlap.name} too", overlap.count, shared)
    return [*lines, f"ids      {data.ids_digest}", f"content  {data.content_digest}"]


def print_made_manifest(made: MadeManifest, out: Path) -> None:
    """What was written, and what was not."""
    print_rows(_concept_rows(made.concepts))
    print_line(f"{out}: {made.n} items, {made.image_pairs} with both images, {made.text_pairs} with both texts")
    print_lines(counted("left out", made.unpaired_count, [f"{item.id}: {item.reason}" for item in made.unpaired]))
    print_lines(counted("ignored", made.ignored_count, list(made.ignored)))
    if made.unread_count:
        print_lines(counted("note: columns that were not read", made.unread_count, list(made.unread)))
        print_line(f"  say what one is with --column, as in --column safe_text={made.unread[0]}")


def _concept_rows(concepts: Mapping[str, int]) -> list[dict[str, object]]:
    return [{"concept": concept, "items": n} for concept, n in concepts.items()]
