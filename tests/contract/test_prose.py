"""README, docs and `--help` are plain English: short sentences, the field's terms, and what a linter of prose asks."""

from __future__ import annotations

import ast
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import click
import pytest
from click.testing import CliRunner

from uwm_deploy.cli import COMMANDS, cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MEAN_WORDS, MEAN_WORDS_OF_A_PAGE, MOST_WORDS = 15, 20, 30

DIALECT = {
    r"undone on top of": "replaced",
    r"tokens? asks? them": "query of an attention",
    r"brings? its own\b(?! settings)": "uses its own default values",
    r"the recipe's values hold": "the values of the recipe are used",
    r"that no limit is for": "without a limit",
    r"for (?:who|whoever)\b": "for those who",
    r"\bas such\b": "leave it out",
    r"without a word": "silently",
    r"all the same\b(?=[,.;])": "anyway, still",
    r"\bfor ever\b": "never ends, always",
    r"\bwas not to be had\b": "was missing",
    r"\bcome[s]? to nothing\b": "fails",
    r"\bapart by\b": "separated by",
    r"\bmeans nothing on another\b": "is of no use with another",
    r"\butili[sz]e": "use",
    r"\bleverage": "use",
    r"\bin order to\b": "to",
}
"""What is no term of the field, with what to write instead."""

OFF = ("typography", "needless_variants", "weasel_words", "lexical_illusions")
"""Checks of proselint about quotes, against the field's terms (saliency), or that spans of code mislead."""


def prose(text: str) -> str:
    """The sentences of a page: without code, tables, headings, pictures and addresses; an item of a list is a paragraph."""
    text = re.sub(r"```.*?```", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"^(?: {4,}|\t|\||#|\s*</?\w).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "\n\n", text, flags=re.MULTILINE)


def sentences(text: str) -> list[str]:
    """Each sentence of a page; a span of code is one word."""
    plain = re.sub(r"`[^`]*`", "X", prose(text)).replace("**", "")
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", plain))
    return [found for part in paragraphs for found in re.split(r"(?<=[.!?])\s+(?=[A-Z\"(*])", part) if words_of(found)]


def words_of(sentence: str) -> int:
    """Numbers count as words."""
    return len(re.findall(r"[A-Za-z0-9][\w'%.,/-]*", sentence))


def sentence_lengths(text: str) -> list[int]:
    """Words of each sentence."""
    return [words_of(sentence) for sentence in sentences(text)]


def test_sentences_are_counted_as_a_reader_would() -> None:
    """Code, tables and headings are none; an item of a list ends where it ends."""
    page = "# A head\n\nOne two `three four`. Five six.\n\n- seven\n- eight nine\n\n| a | b |\n\n    code here\n"
    assert sentence_lengths(page) == [3, 2, 1, 2]


def test_sentences_are_short() -> None:
    """The mean over README and docs, and a little more for any one page."""
    lengths = {page.relative_to(ROOT).as_posix(): sentence_lengths(page.read_text()) for page in PAGES}
    long = {name: sum(found) / len(found) for name, found in lengths.items() if found}
    assert {name: mean for name, mean in long.items() if mean > MEAN_WORDS_OF_A_PAGE} == {}
    every = [count for found in lengths.values() for count in found]
    assert sum(every) / len(every) <= MEAN_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_sentence_is_long(page: Path) -> None:
    """One idea each: what needs more words is two sentences; the message shows where to split."""
    assert [text for text in sentences(page.read_text()) if words_of(text) > MOST_WORDS] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_use_the_words_of_the_field(page: Path) -> None:
    """None of the dialect; the message says what to write."""
    text = " ".join(prose(page.read_text()).split())
    found = {pattern: words for pattern, words in DIALECT.items() if re.search(pattern, text)}
    assert not found


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_uses_the_words_of_the_field(name: str) -> None:
    """The same for the help of every command."""
    text = " ".join(CliRunner().invoke(cli, [name, "--help"]).output.split())
    found = {pattern: words for pattern, words in DIALECT.items() if re.search(pattern, text)}
    assert not found


def _options(command: click.Command) -> Iterator[click.Option]:
    yield from (option for option in command.params if isinstance(option, click.Option))
    if isinstance(command, click.Group):
        for name in command.list_commands(context := click.Context(command)):
            yield from _options(cast("click.Command", command.get_command(context, name)))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_an_option_says_what_it_is(name: str) -> None:
    """It begins with a noun or a verb of its own, so that it is understood without the option above it."""
    command = cast("click.Command", cli.get_command(click.Context(cli), name))
    found = [option.help for option in _options(command) if option.help]
    assert found
    assert [
        text for text in found if re.match(r"(?:Of|For each|Whose|At most|The same|Only this|A certain|Why)\b", text)
    ] == []


def messages() -> Iterator[tuple[str, str]]:
    """Errors, their fixes, log lines and help of options: where each stands, and its words."""
    for path in sorted((ROOT / "uwm_deploy").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            if name.endswith("Error") or name in ("line", "print_line", "option", "flag", "repeated"):
                for value in (*call.args, *(word.value for word in call.keywords)):
                    parts = value.values if isinstance(value, ast.JoinedStr) else [value]
                    words = (part.value if isinstance(part, ast.Constant) else "X" for part in parts)
                    yield f"{path.name}:{call.lineno}", "".join(word for word in words if isinstance(word, str))


def test_errors_and_log_lines_use_the_words_of_the_field() -> None:
    """The same for what the program says."""
    said = list(messages())
    assert sum("no manifest" in text for _, text in said) == 1  # they are found
    found = [(where, words) for where, text in said for pattern, words in DIALECT.items() if re.search(pattern, text)]
    assert found == []


def test_proselint_finds_nothing(tmp_path: Path) -> None:
    """On the sentences of every page, where each span of code is a word of its own."""
    (tmp_path / "config.json").write_text(json.dumps({"checks": dict.fromkeys(OFF, False)}))
    numbers = itertools.count()
    for page in PAGES:
        text = re.sub(r"`[^`]*`", lambda _: f"code{next(numbers)}", prose(page.read_text()))
        (tmp_path / page.relative_to(ROOT).as_posix().replace("/", "-")).write_text(text)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "proselint",
            "check",
            "--config",
            "config.json",
            "-o",
            "compact",
            *sorted(path.name for path in tmp_path.glob("*.md")),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [
        line for line in done.stdout.splitlines() if line.strip() and not any(f": {check}" in line for check in OFF)
    ]
    assert (lines, done.stderr) == ([], "")
