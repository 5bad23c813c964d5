"""The page of `look`: one query, and the ranking of the evaluation set before and after the edit. It has no script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal
from urllib.parse import quote

from uwm_deploy.report.charts import signed
from uwm_deploy.report.markup import Attributes, Child, Html, join, tag


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One item of a ranking.

    Attributes:
        index: Row of its quadruple.
        id: Of the quadruple.
        concept: Of the quadruple.
        side: ``safe`` or ``unsafe``.
        caption: Of this side.
        cosine: Similarity to the query.
        margin: Similarity of the quadruple's safe member minus that of its unsafe one.
    """

    index: int
    id: str
    concept: str
    side: str
    caption: str
    cosine: float
    margin: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """What a query found.

    Attributes:
        query: The caption, or the name of the picture.
        kind: What was ranked.
        before: By the model before the edit, the nearest first.
        after: By what the bundle serves.
    """

    query: str
    kind: Literal["picture", "caption"]
    before: tuple[Found, ...]
    after: tuple[Found, ...]


def style_text() -> str:
    """The page's style: that of the report, and its own rules."""
    folder = files("uwm_deploy.report")
    return "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "search.css"))


def content_policy() -> str:
    """What a browser may load: the page's own style and the pictures of the same server, nothing else."""
    digest = base64.b64encode(hashlib.sha256(style_text().encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )


def search_page(
    name: str, variant: str, examples: Sequence[str], searched: Searched | None = None, problem: str = ""
) -> str:
    """The whole page.

    Args:
        name: Of the bundle.
        variant: What serves.
        examples: Captions to begin with.
        searched: What a query found.
        problem: Why it found nothing.
    """
    head = tag(
        "head",
        {},
        tag("meta", {"charset": "utf-8"}),
        tag("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        tag("meta", {"name": "color-scheme", "content": "light dark"}),
        tag("title", {}, f"Search: {name}"),
        tag("style", {}, Html(style_text())),
    )
    main = tag(
        "main",
        {},
        tag("h1", {"class": "search-head"}, f"Search with {name}, before and after the edit"),
        tag(
            "p", {"class": "lead"}, f"After the edit: {variant}. What is searched is the evaluation set of the bundle."
        ),
        _forms(searched.query if searched and searched.kind == "picture" else ""),
        _examples(examples),
        tag("p", {"class": "problem", "role": "alert"}, problem) if problem else None,
        _result(searched) if searched else None,
    )
    return f"<!doctype html>\n{tag('html', {'lang': 'en'}, head, tag('body', {}, main))}\n"


def _forms(query: str) -> Html:
    field: Attributes = {
        "id": "q",
        "name": "q",
        "type": "search",
        "value": query,
        "maxlength": 500,
        "required": "required",
    }
    file: Attributes = {"id": "picture", "name": "picture", "type": "file", "accept": "image/*", "required": "required"}
    return tag(
        "div",
        {"class": "forms"},
        tag(
            "form",
            {"method": "get", "action": "/", "role": "search"},
            tag("label", {"for": "q"}, "Type a caption"),
            _void("input", field),
            tag("button", {"type": "submit"}, "Find pictures"),
        ),
        tag(
            "form",
            {"method": "post", "action": "/", "enctype": "multipart/form-data"},
            tag("label", {"for": "picture"}, "Or drop a picture on the button"),
            _void("input", file),
            tag("button", {"type": "submit"}, "Find captions"),
        ),
    )


def _void(name: str, attributes: Attributes) -> Html:
    """An element without an end."""
    return Html(str(tag(name, attributes)).removesuffix(f"</{name}>"))


def _examples(examples: Sequence[str]) -> Html | None:
    if not examples:
        return None
    links = [tag("li", {}, tag("a", {"href": f"/?q={quote(text)}"}, text)) for text in examples]
    words = tag("p", {}, "Unsafe captions of the set that the edit decides otherwise:")
    return tag("div", {"class": "examples"}, words, tag("ul", {}, *links))


def _result(searched: Searched) -> Html:
    before, after = (sum(item.side == "unsafe" for item in part) for part in (searched.before, searched.after))
    words = (
        f"Unsafe among the first {len(searched.before)} {searched.kind}s for “{searched.query}”: "
        f"{before} before the edit, {after} after it."
    )
    columns = [
        _column(head, part, searched.kind) for head, part in (("Before", searched.before), ("After", searched.after))
    ]
    return join(tag("p", {"class": "sum", "role": "status"}, words), tag("div", {"class": "columns"}, *columns))


def _column(head: str, found: Sequence[Found], kind: str) -> Html:
    key = head.lower()
    items = [_item(item, kind) for item in found]
    return tag(
        "section",
        {"aria-labelledby": key},
        tag("h2", {"id": key}, f"{head} the edit"),
        tag("ol", {"class": kind}, *items),
    )


def _item(item: Found, kind: str) -> Html:
    mark = tag("strong", {"class": "mark"}, item.side)
    picks = "safe" if item.margin > 0 else "unsafe"
    shown: Child
    if kind == "picture":
        shown = _void(
            "img", {"src": f"/picture/{item.index}/{item.side}.png", "alt": item.caption or item.id, "loading": "lazy"}
        )
    else:
        shown = tag("span", {"class": "caption"}, item.caption)
    numbers = f"similarity {item.cosine:.3f}; picks the {picks} one, margin {signed(item.margin, 3)}"
    about = tag("span", {"class": "about"}, f"{item.id} ({item.concept}): {numbers}")
    return tag("li", {"class": item.side}, shown, mark, about)
