"""What every section of a report page is put together from: headings, figures and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from uwm_deploy.records.metrics import Proportion
from uwm_deploy.report.charts import Bar, Tone
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
    """Something that opens on a click; print shows it as the reader left it, with `printed` always open."""
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


def share_bar(label: str, tone: Tone, share: Proportion) -> Bar:
    """The bar of a share, percent, with its interval."""
    return Bar(label=label, tone=tone, value=share.value, low=share.low, high=share.high, shown=f"{share.value:.1f}")


def share_cells(share: Proportion) -> dict[str, Child]:
    """The cells of a share in a table."""
    interval = f"{share.low:.1f} to {share.high:.1f}"
    return {"percent": f"{share.value:.1f}", "95% interval": interval, "n": str(share.n)}


def marked(label: str, dossier: Dossier) -> str:
    """The label of a subject, with a sign before that of a variant that failed."""
    return f"✕ {label}" if dossier.verdict and label in dossier.verdict.failed else label
