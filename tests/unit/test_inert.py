"""What data say is text in every place: a real renderer makes nothing of it, and no value begins a line of its own."""

from __future__ import annotations

import dataclasses
import json
import logging
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner
from markdown_it import MarkdownIt

from tests.data_sets import png
from tests.unit.test_report import make, write_bundle
from tests.unit.test_signature import write_keys
from uwm_deploy.cli import cli
from uwm_deploy.errors import DataError
from uwm_deploy.records.verdict import Result
from uwm_deploy.report.in_toto import evaluations_from_verdict
from uwm_deploy.report.markdown import markdown_from_verdict
from uwm_deploy.report.markdown_table import code, inert, inline, markdown_of_cells, markdown_table
from uwm_deploy.report.oscal import oscal_from_verdict
from uwm_deploy.runtime.logs import event
from uwm_deploy.serve.embed.sources import Naming, items_of

RENDERER = MarkdownIt("commonmark").enable(["table", "strikethrough"])

FROM_DATA = [
    r"\[click\](//evil.example/x)", "[click](//evil.example/x)", r"\\[c\\](x)", "![i](x)", r"!\[i\](x)", "[c][d]", "[c]: /x",
    "<b>x</b>", r"\<b>x\</b>", "<https://e.x>", "https://e.x", "www.e.x", "WWW.e.x", "a@b.c", "mailto:a@b.c", "&lt;b&gt;",
    "`x`", r"\`x\`", "*x*", "**x**", r"\*x\*", "_x_", "__x__", "~~x~~", "# x", "#", "> x", "- x", "+ x", "* x",
    "1. x", "1) x", "---", "***", "===", "    x", "a | b", r"a \| b", "\\", "|---|", "-", "x\n# y", "a\n\n<b>", "$x$",
    "snake_case_name",
]  # fmt: skip
_TEXT = {"text", "paragraph_open", "paragraph_close", "inline", "text_special"}


def _shown(markdown: str, allowed: set[str]) -> tuple[set[str], str]:
    """What a renderer makes of Markdown besides what is allowed, and the text that is seen."""
    tokens = RENDERER.parse(markdown)
    inner = [child for token in tokens for child in token.children or ()]
    kinds = {token.type for token in [*tokens, *inner]} - _TEXT - allowed
    return kinds, "".join(child.content for child in inner)


@pytest.mark.parametrize("text", FROM_DATA)
def test_nothing_from_data_is_rendered(text: str) -> None:
    """As a paragraph, behind a dash, in a heading and in a cell: the text is seen, and is nothing else."""
    seen = "".join(_shown(inert("x" + text), set())[1].split())[1:]
    item, heading = {"bullet_list_open", "bullet_list_close", "list_item_open", "list_item_close"}, "heading_{}"
    for markdown, allowed in (
        (inert(text), set()),
        (f"- {inert(text)}", item),
        (f"# {inert(text)}", {heading.format("open"), heading.format("close")}),
    ):
        kinds, shown = _shown(markdown, allowed)
        assert not kinds, (markdown, kinds)
        assert "".join(shown.split()) == seen
    for cell, inside in ((inline(text), set()), (code(text), {"code_inline"})):
        tokens = RENDERER.parse(markdown_of_cells(["a", "b"], [[cell, "end"]]))
        kinds = [token.type for token in tokens]
        assert (kinds.count("tr_open"), kinds.count("td_open")) == (2, 2)
        assert {child.type for token in tokens for child in token.children or ()} <= {"text", "text_special", *inside}
    for linked in ("://", "www.", "@b", "mailto:"):
        assert linked not in inert(text).lower()
    table = markdown_table([{"name": text, "n": "1"}])
    assert not [t for t in RENDERER.parse(table) for c in t.children or () if c.type not in ("text", "text_special")]


def test_a_hostile_verdict_is_text_in_every_form() -> None:
    """Markdown, OSCAL and in-toto: no link from a concept, and no character that turns the text around."""
    concept = "\\[click\\](//evil.example/x)\u202e"
    made = make()
    verdict = made.verdict()
    checks = tuple(
        dataclasses.replace(check, concept=concept, detail=f"{check.detail}\u202e", subject=f"{check.subject}\u202e")
        for check in verdict.checks
    )
    verdict = dataclasses.replace(verdict, checks=checks, policy="strict\u202e")
    rendered = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown_from_verdict(verdict))
    assert concept[:-1] in rendered
    assert "<a " not in rendered
    at = datetime(2026, 1, 1, tzinfo=UTC)
    for text in (
        oscal_from_verdict(verdict, version="1", at=at),
        evaluations_from_verdict(verdict, version="1"),
        markdown_from_verdict(verdict),
    ):
        assert "202e" in text
        assert "\u202e" not in text
        assert "\u202e" not in str([json.loads(line) for line in text.splitlines() if line.startswith('{"')])


def test_no_value_begins_a_line_of_its_own(tmp_path: Path) -> None:
    """A bundle's folder with a line break in its name: each line of the output is one of the command's own."""
    made = make()
    bundle = tmp_path / "b\n::error::x"
    write_bundle(made, bundle, verdict=dataclasses.replace(made.verdict(), result=Result.PASS))
    key, public = write_keys(tmp_path, "key")
    for words in (
        ["sign", str(bundle), "--key", str(key)],
        ["verify-signature", str(bundle), "--public-key", str(public)],
        ["inspect", str(bundle)],
        ["report", str(bundle), "--out", str(tmp_path / "r\n::error::x.html")],
    ):
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, result.output
        assert "\n::error" not in result.output, words
        assert words[0] == "inspect" or r"\u{a}::error::x" in result.output, words


@pytest.mark.parametrize("name", ["n\n::error::c.png", "a\x1b[31m.png", "a\u202e.png"])
def test_keys_show_every_character(name: str, tmp_path: Path) -> None:
    """A file's name becomes a key in Parquet, and is printed by others."""
    (tmp_path / name).write_bytes(png(0))
    with pytest.raises(DataError, match="holds a character that shows nothing"):
        list(items_of(tmp_path, Naming(kind="images", key="key", column="image")))
    (tmp_path / name).rename(tmp_path / "a\u200cb.png")
    assert [item.key for item in items_of(tmp_path, Naming(kind="images", key="key", column="image"))] == [
        "a\u200cb.png"
    ]


def test_a_log_line_shows_what_a_caller_brought(caplog: pytest.LogCaptureFixture) -> None:
    """As one line in which every character can be seen."""
    with caplog.at_level("WARNING", "uwm_deploy.runtime"):
        event(logging.WARNING, "item-failed", error="a\n::error::b\x1b[2J\u202e")
    assert caplog.records[0].getMessage().isprintable()
