"""What is printed fits 80 columns outside a terminal: lines go on further in, tables come in parts; nothing is lost."""

from __future__ import annotations

import os
import pty
import re
import string
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from tests.reports import artifact, embedded, report
from tests.serve.server import needs_triton_client
from uwm_deploy.cli import cli
from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.pipeline.request import Request
from uwm_deploy.records.graph import LayerSensitivity, Precision, PrecisionPlan
from uwm_deploy.records.model import TowerName
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.lines import COLUMNS, Whole, printed_lines
from uwm_deploy.report.plain import plain_lines
from uwm_deploy.report.tables.precision_plan import print_plan
from uwm_deploy.report.tables.safety_numbers import print_report
from uwm_deploy.report.terminal import NAMED, print_rows

UNBREAKABLE = re.compile(r"[0-9a-f]{40,72}\b|\S*/\S{12,}|`[^`]{20,}`|https?://\S+")
"""Digests, paths, commands and addresses: a line with one may be longer."""


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a terminal nor `COLUMNS`: as in a pipe or a log."""
    monkeypatch.delenv("COLUMNS", raising=False)


def _too_long(text: str) -> list[str]:
    return [line for line in text.splitlines() if cell_len(line) > COLUMNS and not UNBREAKABLE.search(line)]


WORD = st.text(alphabet=string.ascii_letters + string.digits + ":;,.-漢字", min_size=1, max_size=30)


@given(st.integers(0, 6), st.lists(WORD, min_size=1, max_size=40), st.integers(40, 120))
def test_a_long_line_keeps_every_word_in_order(indent: int, words: list[str], width: int) -> None:
    """No piece is too wide, no word is broken or lost, and what goes on stands further in."""
    line = " " * indent + " ".join(words)
    first, *more = lines = printed_lines(line, width)
    assert max(map(cell_len, lines)) <= max(width, 66)  # a word takes up to 60 cells, behind the indentation
    assert " ".join(lines).split() == words
    assert first.startswith(line[: indent + 1])
    assert all(line.startswith("  ") for line in more)


def test_what_stands_behind_a_label_stays_in_its_column() -> None:
    """Values stand below each other; a word that is too wide for the column begins as far in as it can."""
    wide = "g=0.5,o=1,kappa=0.3,a=1,tau=0.3,rho=0.03,axes=2,repel_text=0.1"
    lines = printed_lines(f"method                   uwm+safety-axis; {'words ' * 9}axis {wide}", COLUMNS)
    assert [len(line) - len(line.lstrip()) for line in lines] == [0, 25, COLUMNS - len(wide)]
    said = "shown safer: GS.delta +34.6 (95% interval 31.5 to 37.6), PS.delta +3.8 (95% interval 1.6 to 5.9)"
    assert [line[:4] for line in printed_lines(said, COLUMNS)] == ["show", "  in"]


@pytest.mark.parametrize("text", ["/a path/with blanks" * 9, "| a | row | of | Markdown |" * 9])
def test_what_is_copied_is_never_broken(text: str) -> None:
    """A path and a row stay one line; so does a command between backticks."""
    assert printed_lines(Whole(text), COLUMNS) == [text]
    command = f"`uwm-deploy build --model {'m' * 60} --out dist/x`"
    assert f"  {command}." in printed_lines(f"try: run {command}. Then {'look ' * 20}", COLUMNS)


def test_many_variants_stand_in_further_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """Nine variants do not fit beside each other: every one has its column, and every table its first column."""
    model = embedded(60, 0.7)
    names = [f"onnxruntime-{kind}-{i}" for kind in ("int8", "w8a16", "fp16") for i in range(3)]
    print_report(report(60, artifacts=tuple(artifact(name, Precision.INT8, model, model) for name in names)))
    shown = capsys.readouterr().out
    assert _too_long(shown) == []
    heads = [line.split() for line in shown.splitlines() if "┃" in line]
    assert len(heads) > 1
    assert sorted(name for head in heads for name in head if name != "┃") == sorted(["original", "edited", *names])
    assert shown.count("\n GS ") == shown.count("\n smallest cosine ") == len(heads)


def test_values_come_in_parts_and_prose_as_lists(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers stay in columns, with the columns that name a row in each part; a row with a sentence becomes one."""
    row = {"tower": "image", "batch": "1", **{f"column {i}": f"{i}.5 (0.25-1.75)" for i in range(7)}}
    print_rows([row, row | {"batch": "8"}], names=2)
    shown = capsys.readouterr().out
    assert _too_long(shown) == []
    assert shown.count("┃ tower ┃ batch ┃") == shown.count("┏") > 1
    assert all(shown.count(f"{i}.5 (0.25-1.75)") == 2 for i in range(7))
    print_rows([{"check": "c" * 30, "subject": "s" * 40, "detail": "a sentence that says what was found", "n": 3}])
    shown = capsys.readouterr().out
    assert _too_long(shown) == []
    assert "┏" not in shown
    assert " ".join(shown.split()).endswith("detail: a sentence that says what was found; n: 3")


def test_a_long_list_of_layers_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """The first ones are named, the others counted, and the place of the whole list is said."""
    names = tuple(f"vision_model.encoder.layers.{i}.self_attn.out_proj" for i in range(60))
    plan = PrecisionPlan(
        lowest=Precision.INT8, budget=0.5, limit=0.25, n=512, kept={"image": names, "text": ()}, flips=0.2,
        low_share=0.4, layers=tuple(
            LayerSensitivity(tower=TowerName.IMAGE, name=n, sensitivity=1e-6, kept=True) for n in names
        ), steps=(),
    )  # fmt: skip
    print_plan(plan)
    shown = capsys.readouterr().out
    assert _too_long(shown) == []
    assert "kept in the image tower, most sensitive first: 60\n" in shown
    assert f"  {names[NAMED - 1]}\n  ... and 50 more, see --json\n" in shown
    assert names[NAMED] not in shown


def test_plain_data_is_lines_at_any_depth() -> None:
    """Objects in a list have their own lines, long lists are counted, and a row of bits is cut; a digest stays whole."""
    found = {"checks": [{"name": f"c{i}", "of": {"n": i}} for i in range(12)], "bits": "01" * 200, "none": []}
    lines = plain_lines(found | {"digest": f"sha256:{'0' * 64}", "ids": [f"id-{i}" for i in range(101)]})
    assert lines[1:4] == [f"  - {'name':<24} c0", "    of", f"      {'n':<24} 0"]
    assert {"  ... and 2 more, see --json", "  ... and 1 more, see --json"} <= set(lines)
    assert any(line.endswith("0101... (400 characters, see --json)") for line in lines)
    assert f"{'digest':<24} sha256:{'0' * 64}" in lines
    assert f"{'none':<24} none" in lines


def test_log_lines_go_on_too(capsys: pytest.CaptureFixture[str]) -> None:
    """What a stage says on standard error is broken like a result."""
    Reporter().line(f"edit       {'strength chosen among many ' * 9}")
    shown = capsys.readouterr().err
    assert _too_long(shown) == []
    assert all(line.startswith(" " * 11) for line in shown.splitlines()[1:])


@pytest.mark.parametrize(
    "command",
    [
        "inspect BUNDLE",
        "inspect BUNDLE/reports/verify.json",
        "inspect BUNDLE/reports/verdict.json",
        "inspect BUNDLE/patch.safetensors",
        "gate BUNDLE",
        "gate BUNDLE --policy strict",
        "report BUNDLE --out FOLDER/page.html",
        "verify-signature BUNDLE",
        "sign BUNDLE",
        "policy lock --policy strict --out FOLDER/lock.json --by A",
        "baseline set BUNDLE --policy demo --at FOLDER/base --by A --reason first",
        "models",
        "doctor",
        "init FOLDER/mine",
        "data check SET --for build",
        "triton write BUNDLE FOLDER/repository",
        "evaluate BUNDLE --evaluation SET",
    ],
)
def test_a_command_prints_80_columns(command: str, built: tuple[Request, Outcome], tmp_path: Path) -> None:
    """Of results and progress; an error is one line, which scripts read."""
    if command.startswith("triton"):
        needs_triton_client()
    request, _ = built
    places = {"BUNDLE": request.out, "FOLDER": tmp_path, "SET": request.evaluation}
    words = [re.sub("BUNDLE|FOLDER|SET", lambda found: str(places[found[0]]), word) for word in command.split()]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code in (0, 2, 3, 4), done.output
    assert done.output
    assert [line for line in _too_long(done.output) if not line.startswith("error: ")] == []


def test_an_error_is_one_line_in_a_log_and_goes_on_at_a_terminal() -> None:
    """Scripts read the line; at a terminal it is broken between words, with the same words."""
    command = [sys.executable, "-m", "uwm_deploy.cli", "build", "--precision", "none"]
    piped = subprocess.run(command, capture_output=True, text=True, check=False)
    (line,) = piped.stderr.splitlines()
    assert len(line) > COLUMNS
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 60))
    done = subprocess.run(command, stderr=theirs, stdout=theirs, check=False)
    os.close(theirs)
    shown = os.read(ours, 4096).decode().splitlines()
    os.close(ours)
    assert done.returncode == piped.returncode == 2
    assert max(map(len, shown)) <= 60
    assert " ".join(shown).split() == line.split()


def test_columns_of_the_environment_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever wants wider tables in a log says how wide."""
    monkeypatch.setenv("COLUMNS", "200")
    print_rows([{f"column {i}": "1.5" for i in range(12)}])
    assert max(map(len, capsys.readouterr().out.splitlines())) > COLUMNS
