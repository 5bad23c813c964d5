"""What every section of a report page is put together from: headings, figures, tables, and whom the numbers are of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from uwm_deploy.records.evidence import ArtifactEvidence, Evidence, VerifyReport
from uwm_deploy.records.metrics import SafetyReport
from uwm_deploy.report.charts import Tone
from uwm_deploy.report.evidence import Dossier
from uwm_deploy.report.markup import NOTHING, Child, Html, tag


def section(key: str, head: str, lead: Child, *body: Child) -> Html:
    """One part of the page, with a heading that can be linked to."""
    words = tag("p", {"class": "lead"}, lead) if lead else None
    return tag("section", {"id": key}, tag("h2", {}, head), words, *body)


def figure(head: str, drawn: Html, legend: Sequence[Html], rows: Sequence[Mapping[str, Child]]) -> Html:
    """A picture with its legend and its table."""
    key = tag("ul", {"class": "legend"}, *legend) if legend else None
    return tag("figure", {}, tag("figcaption", {}, head), key, drawn, folded("The numbers", table(rows)))


def folded(words: str, inner: Html, *, printed: bool = False) -> Html:
    """Something that opens on a click; in print it is as the reader left it, or open."""
    return tag("details", {"class": "printed" if printed else None}, tag("summary", {}, words), inner)


def table(rows: Sequence[Mapping[str, Child]]) -> Html:
    """Rows with the same keys; the first column names the row, columns of numbers are set to the right."""
    if not rows:
        return tag("p", {}, "none")
    right = {key for key in list(rows[0])[1:] if all(_is_number(row[key]) for row in rows)}
    head = [tag("th", {"scope": "col", "class": "number" if key in right else None}, key) for key in rows[0]]
    body = []
    for row in rows:
        first, *rest = row.items()
        cells = [tag("th", {"scope": "row"}, first[1])]
        cells += [tag("td", {"class": "number" if key in right else None}, value) for key, value in rest]
        body.append(tag("tr", {}, *cells))
    inner = tag("table", {}, tag("thead", {}, tag("tr", {}, *head)), tag("tbody", {}, *body))
    return tag("div", {"class": "scroll", "tabindex": 0, "role": "group", "aria-label": "table"}, inner)


def _is_number(value: Child) -> bool:
    text = "" if value is None else str(value)
    return not text or text[0] in "0123456789+-\N{MINUS SIGN}" or text == NOTHING


def executed(report: VerifyReport) -> list[tuple[ArtifactEvidence, SafetyReport]]:
    """Artifacts with numbers."""
    return [(a, a.safety) for a in report.artifacts if a.evidence is Evidence.EXECUTED and a.safety is not None]


def subjects(report: VerifyReport) -> Iterator[tuple[str, Tone, SafetyReport]]:
    """Original, edited and what was executed, in that order."""
    yield "original", "original", report.original
    yield "edited", "edited", report.edited
    for artifact, safety in executed(report):
        yield artifact.variant, "engine", safety


def marked(label: str, dossier: Dossier) -> str:
    """A variant that failed is marked wherever it is drawn."""
    return f"✕ {label}" if dossier.verdict and label in dossier.verdict.failed else label
