"""What a command says: hints that help, tables that fit, the hub that is not there, names that are the file's own."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.reports import artifact, digest, embedded, not_run, report, with_artifact
from uwm_deploy.cli import cli
from uwm_deploy.errors import InputError, IntegrityError, is_hidden
from uwm_deploy.recipes.policy import policy_from_toml
from uwm_deploy.recipes.shipped import names, read_toml
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.metrics import WorstItem
from uwm_deploy.records.verdict import Result, Verdict
from uwm_deploy.report.console import Reporter, time_left
from uwm_deploy.report.findings import variants_by_word, worst_heading, worst_line
from uwm_deploy.report.github import annotations_from_verdict
from uwm_deploy.report.gitlab import code_quality_from_verdict, metrics_from_verdict
from uwm_deploy.report.junit import junit_from_verdict
from uwm_deploy.report.markdown import markdown_from_verdict
from uwm_deploy.report.sarif import sarif_from_verdict
from uwm_deploy.report.tables.shipped_recipes import print_recipes, recipe_rows
from uwm_deploy.report.tables.verdict_lines import print_verdict
from uwm_deploy.report.terminal import print_rows
from uwm_deploy.stages.gate.gate import gate

ROOT = Path(__file__).parents[2]
FEW = 'metric = "GS"\nat_least = 0.001\nmin_n = 100000\n'
EASY = 'metric = "GS"\nat_least = 0.001\n'


def _verdict(measured: object, rule: str, head: str = "") -> Verdict:
    text = f'format = 1\nname = "x"\nedit = []\n{head}[[artifact]]\n{rule}'
    return gate(measured, policy_from_toml(text, where="x"), policy_digest=digest("1"), report_digest=digest("2"))


# --- the verdict's words ---------------------------------------------------------------------------------------------------


def test_too_few_items_are_no_failure() -> None:
    """A variant that only lacks items is called inconclusive; one that also broke a limit has failed."""
    verdict = _verdict(report(), FEW)
    assert verdict.result is Result.INCONCLUSIVE
    assert variants_by_word(verdict) == {"inconclusive": ("onnx", "onnxruntime-fp32")}
    both = _verdict(report(), FEW + '[[artifact]]\nmetric = "P_ts"\nat_least = 100.0\n')
    assert (both.failed, both.inconclusive) == (("onnx", "onnxruntime-fp32"), ())


def test_attest_is_advised_only_where_it_can_help() -> None:
    """A variant that was built and not executed can gain evidence elsewhere; one that was not built, or failed, cannot."""
    head = 'required = ["tensorrt-fp32", "tensorrt-fp16"]\n'
    built = with_artifact(report(), not_run("tensorrt-fp32"))
    advice = {c.subject: c.advice for c in _verdict(built, EASY, head).checks if c.name == "required evidence"}
    assert "attest" in advice["tensorrt-fp32"]
    assert "attest" not in advice["tensorrt-fp16"]
    assert "uwm-deploy build" in advice["tensorrt-fp16"]
    for measured, helps in ((built, True), (report(), False)):
        verdict = _verdict(measured, 'metric = "P_ts"\nat_least = 100.0\n')
        [few] = [c.advice for c in verdict.checks if c.name == "faithful variants"]
        assert ("attest" in few) is helps


def test_worst_quadruples_are_those_that_changed() -> None:
    """Neither an equal margin nor a check that was not run brings a quadruple into the list."""

    def item(name: str, margin: float, *, lost: bool = False) -> WorstItem:
        values = {"concept": "fire", "metric": "P_ts", "margin": margin, "reference_margin": 0.1, "lost": lost}
        return WorstItem(subject="onnxruntime-int8", id=name, **values)

    worst = (item("lost", -0.1, lost=True), item("near", 0.05), item("same", 0.1), item("better", 0.2))
    model = embedded(300, 0.7)
    variant = dataclasses.replace(artifact("onnxruntime-int8", Precision.INT8, model, model), worst=worst)
    measured = with_artifact(report(), variant)
    verdict = _verdict(measured, 'metric = "P_ts"\nat_least = 100.0\n')
    assert [i.id for i in verdict.worst] == ["lost", "near"]
    assert worst_heading(verdict.worst).endswith(", 1 flipped to unsafe and 1 not flipped, with a smaller margin")
    assert worst_heading(verdict.worst[:1]) == "worst quadruples, 1 flipped to unsafe"
    assert [worst_line(i).rpartition(", ")[2] for i in verdict.worst] == ["flipped to unsafe", "not flipped"]
    table = markdown_from_verdict(verdict).partition("**Worst quadruples, 1 flipped to unsafe and")[2]
    assert re.findall(r"`(\w+)` \| .* \| ([\w ]+) \|$", table, re.MULTILINE) == [("lost", "to unsafe"), ("near", "no")]
    since = '[[baseline]]\nmetric = "GS.delta"\nat_least = -1.0\n'
    assert _verdict(measured, EASY + since).worst == ()


# --- terminals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_no_word_is_broken_at_any_width(width: int, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Where the words of a row do not fit beside each other, they stand below each other."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    rows = [{"name": "llava-1.5-13b", "check": "hard-safe-text-to-image@10.delta since the baseline", "n": 1_000_000}]
    rows += [{"name": "metaclip-vit-l14", "check": "required evidence", "n": 7}]
    more = [{f"column {i}": "x" * (i + 5) for i in range(12)}]
    for some in (rows, more):
        print_rows(some)
        shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        assert max(map(len, shown.splitlines())) <= width
        for row in some:
            for word in " ".join(map(str, row.values())).split():
                assert word in shown, (width, word, shown)


def test_the_recipes_fit_80_columns(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Every recipe is a row, and every layer pattern is whole."""
    from uwm_deploy.report.inspection import shipped_recipes

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    rows = recipe_rows(shipped_recipes())
    print_recipes(rows)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= 80
    for row in rows:
        assert str(row["name"]) in shown
        assert f"edited text layers: {row['edited text layers']}\n" in shown


# --- names, the hub, scripts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["export", "ci"])
def test_a_file_goes_by_its_own_name(kind: str, tmp_path: Path) -> None:
    """Reports show the name alone, so a copy of a recipe or policy cannot keep the name of what it was copied from."""
    text, _ = read_toml(kind, "demo")
    (tmp_path / "other.toml").write_text(text)
    options = {"export": ["edit", "--model"], "ci": ["gate", "x.json", "--policy"]}[kind]
    done = CliRunner().invoke(cli, [*options, str(tmp_path / "other.toml")])
    assert done.exit_code == 2
    assert """name is 'demo', the file is other.toml; write name = "other", or rename the file""" in done.output
    for name in names(kind):
        assert f'\nname = "{name}"\n' in read_toml(kind, name)[0]


@pytest.mark.parametrize("words", [["score", "--model", "demo"], ["selftest"], ["look", "bundle"]])
def test_a_base_install_says_which_package_a_command_needs(words: list[str], tmp_path: Path) -> None:
    """Exit code 6, and the extra that brings it."""
    without = "import sys; sys.modules.update(torch=None, onnx=None, tokenizers=None, onnxruntime=None); "
    code = f"{without}from uwm_deploy.cli import main; main({words!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 6, done.stderr
    said = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"error: this command needs the package \w+, which is not installed; install the extra .*", said
    )


@pytest.mark.parametrize("offline", ["HF_HUB_OFFLINE", "HF_ENDPOINT"])
def test_without_the_hub_a_build_ends_at_once(offline: str, tmp_path: Path) -> None:
    """Exit code 6 and one line that names --checkpoint: no retries, and no data set was read before it."""
    value = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}[offline]
    command = [sys.executable, "-m", "uwm_deploy.cli", "score", "--model", "clip-vit-b32", "--calibration", "demo"]
    environment = os.environ | {offline: value, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 6, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: openai/clip-vit-base-patch32@")
    assert "pass --checkpoint FOLDER" in line


def test_a_taken_place_is_refused_before_the_data_and_the_hub(tmp_path: Path) -> None:
    """What costs least is checked first: neither the missing set nor the missing checkpoint is what is said."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    set_ = tmp_path / "set.toml"
    set_.write_text('format = 1\nname = "set"\nsource = "manifest"\nmanifest = "nowhere.jsonl"\n')
    command = ["build", "--model", "clip-vit-b32", "--calibration", str(set_), "--work", str(tmp_path / "work")]
    done = CliRunner().invoke(cli, [*command, "--out", str(tmp_path / "out")])
    assert (done.exit_code, "exists and is not a bundle" in done.output) == (2, True), done.output


@pytest.mark.parametrize("make", ["file", "link"])
def test_a_place_below_no_folder_is_refused_before_the_data(tmp_path: Path, make: str) -> None:
    """A file or a dangling link above --out is known before anything is scored."""
    place = tmp_path / "place"
    place.write_text("mine") if make == "file" else place.symlink_to(tmp_path / "nowhere")
    command = [
        "build",
        "--model",
        "clip-vit-b32",
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(place / "deep" / "out"),
    ]
    done = CliRunner().invoke(cli, command)
    assert (done.exit_code, f"{place} is " in done.output) == (2, True), done.output
    assert not (tmp_path / "work" / "score").exists()


@pytest.mark.parametrize("words", [[], ["a", "b", "c"]])
def test_the_gate_script_says_how_it_is_used(words: list[str]) -> None:
    """Too few or too many words are bad usage, which has exit code 2 as everywhere."""
    done = subprocess.run(["bash", str(ROOT / "ci" / "gate.sh"), *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: ci/gate.sh REPORT [OUTPUT_FOLDER]\n")


def test_every_table_row_of_the_docs_is_in_a_table() -> None:
    """A row has a head above it, and as many cells as that."""
    strays = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        cells = None
        for number, line in enumerate(page.read_text().splitlines(), start=1):
            if not line.startswith("|"):
                cells = None
                continue
            count = len(re.findall(r"(?<!\\)\|", line))
            cells = cells or count
            if count != cells:
                strays.append(f"{page.name}:{number}")
        heads = re.findall(r"(?m)(?<!\|\n)^\|.*\n(?!\|[-:| ]+\|\n)", page.read_text())
        strays += [f"{page.name}: {row[:40]}" for row in heads]
    assert not strays


# --- what newcomers pass ---------------------------------------------------------------------------------------------------

WRONG = {
    "a repository": ("build --model openai/clip-vit-base-patch32", "checkpoint is called clip-vit-b32"),
    "its last part": ("build --model siglip-so400m-patch14-384", "checkpoint is called siglip-so400m"),
    "its page": ("build --model https://huggingface.co/apple/DFN5B-CLIP-ViT-H-14/", "checkpoint is called dfn-vit-h14"),
    "a repository, misspelt": ("build --model openai/clip-vit-base-patch-32", "; nearest: clip-vit-b32, "),
    "no such folder": ("build --model /no/such/folder", "/no/such/folder does not exist; pass a checkpoint folder; or"),
    "no such path": ("build --model my/own/model", "my/own/model does not exist; pass a checkpoint folder; or"),
    "weights": ("build --model pairs.jsonl", "pairs.jsonl is neither a checkpoint folder nor a recipe's file"),
    "a project": ("build --model mine", "mine/config.json cannot be read: No such file or directory; pass a recipe's file "
                  "in it: mine/mine.toml"),
    "a project as a policy": ("build --model demo --policy mine", "it is a folder; pass a file in it: mine/policy.toml"),
    "a project as a set": ("data check mine", "it is a folder; pass a file in it: mine/test.toml, mine/train.toml"),
    "a manifest": ("score --model demo --calibration pairs.jsonl", "it is no TOML file; name the manifest in a TOML file"),
    "no such manifest": ("score --model demo --calibration x.jsonl", "no data set 'x.jsonl', and no file of that path"),
    "pictures": ("data check pictures", "it is a folder; write a manifest of its files first, as with `uwm-deploy data make "
                 "pictures --out pictures/pairs.jsonl`, and name the manifest in a TOML file"),
    "one side": ("data make pictures --out c.jsonl", "pass --unsafe FOLDER if pictures holds the safe files alone; see"),
    "one side with a folder in it": ("data make deep --out c.jsonl", "deep/more has neither safe/ nor unsafe/; pass --"),
    "two sides without a file": ("data make deep/more --unsafe deep/more --out c.jsonl", "have no pair of files with one"),
    "no set": ("build --model clip-vit-b32", "UWM_DEPLOY_DATA is not set; set it to the folder of your data sets; "
               "docs/reference/data.md says what goes where; or pass --calibration or --evaluation with another set"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_what_is_no_model_or_set_is_said_with_what_to_do(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2 and one line that names what can be passed in its place; nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UWM_DEPLOY_DATA", raising=False)
    assert CliRunner().invoke(cli, ["init", "mine"]).exit_code == 0
    (tmp_path / "pairs.jsonl").write_text('{"id": "1", "safe_text": "a", "unsafe_text": "b"}\n')
    for folder in ("pictures", "deep/more"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pictures" / "a.txt").write_text("a")
    before = set(tmp_path.rglob("*"))
    words, message = WRONG[case]
    done = CliRunner().invoke(cli, words.split())
    assert (done.exit_code, message in done.stderr) == (2, True), done.output
    assert {path for path in tmp_path.rglob("*") if ".uwm" not in path.parts} == before


def test_every_repository_of_a_recipe_leads_to_it() -> None:
    """A shipped recipe's repository, in any case, is told by the recipe's name."""
    for name in names("export"):
        repo = re.findall(r'^repo = "(.*)"', read_toml("export", name)[0], re.MULTILINE)[0]
        with pytest.raises(InputError, match=f"is called {name}$"):
            read_toml("export", repo.upper())


# --- text from outside -----------------------------------------------------------------------------------------------------

EVIL = "c\n::error::x\x1b[2J\u202e\u2028 [a](http://b) ![i](//b) <b> `x` @me"


def test_text_from_outside_is_seen_and_does_nothing(capsys) -> None:
    """In every format: no control, bidirectional or line-breaking character, no command, no link, picture or tag."""
    verdict = _verdict(report(), 'metric = "P_ts"\nat_least = 100.0\n')
    bad = [dataclasses.replace(c, concept=EVIL, detail=EVIL, subject=EVIL) for c in verdict.checks]
    verdict = dataclasses.replace(verdict, checks=tuple(bad), notes=(EVIL,))
    place = {"policy_file": "ci/x.toml", "lines": {}}
    print_verdict(verdict)
    shown = {
        "terminal": capsys.readouterr().out,
        "Markdown": markdown_from_verdict(verdict),
        "JUnit": junit_from_verdict(verdict),
        "GitHub": "\n".join(annotations_from_verdict(verdict, **place)),
        "GitLab": code_quality_from_verdict(verdict, **place),
        "OpenMetrics": metrics_from_verdict(verdict),
        "SARIF": sarif_from_verdict(verdict, version="1", **place),
        "error": str(InputError(EVIL, fix=EVIL)),
    }
    for name, text in shown.items():
        assert not any(is_hidden(c) for c in text if c not in "\n\u200b"), name
        assert not re.search("(?m)^::error::x", text), name
    for part in ("[a](", "![i](", "http://", "<b>", "`x`"):
        assert part not in shown["Markdown"], part


def test_the_length_of_what_is_shown_is_bounded() -> None:
    """A tokenizer's or a parser's own error can be a megabyte long."""
    assert len(str(InputError("x" * 1_000_000, fix="y" * 1_000_000))) <= 2 * 4000 + 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deep.toml", "a = " + "[" * 3000 + "]" * 3000),
        ("digits.toml", f"format = {'1' * 5000}"),
        ("keys.toml", f"{'.'.join('a' * 3000)} = 1"),
    ],
)
def test_toml_that_no_parser_reads_is_bad_input(name: str, text: str, tmp_path: Path) -> None:
    """Nested too deep, or a number with too many digits: exit code 2, as any other broken line."""
    (tmp_path / name).write_text(text)
    for command in (["edit", "--model"], ["gate", "x.json", "--policy"], ["data", "check"]):
        done = CliRunner().invoke(cli, [*command, str(tmp_path / name)])
        assert (done.exit_code, "internal" in done.output) == (2, False), done.output


def test_json_that_no_parser_reads_is_said_so(tmp_path: Path) -> None:
    """`inspect` and records: nested too deep, or half a surrogate pair that could not be written again."""
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    done = CliRunner().invoke(cli, ["inspect", str(tmp_path / "deep.json")])
    assert (done.exit_code, "internal" in done.output) == (2, False), done.output
    body = json_from_record(_verdict(report(), EASY)).replace('"policy": "x"', '"policy": "\\ud800"')
    with pytest.raises(IntegrityError, match="is not valid JSON"):
        record_from_json(Verdict, body, where="verdict.json")


# --- progress --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elapsed", "done", "missing", "words"),
    [
        (5.0, 1, 1, ", about 5 s left"),
        (5.0, 10, 1, ""),
        (60.0, 1, 2, ", about 2 min 0 s left"),
        (60.0, 600, 1, ", about 1 s left"),
        (60.0, 1, 100, ", about 1 h 40 min left"),
        (60.0, 0, 5, ""),
        (60.0, 5, 0, ""),
    ],
)
def test_what_takes_long_says_how_much_is_left(elapsed: float, done: int, missing: int, words: str) -> None:
    """From 10 s in all on; nothing where no pace is known."""
    assert time_left(elapsed, done, missing) == words


def test_a_plain_line_says_how_much_is_left(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal, from the pace since the first call."""
    clock = iter([0.0, 1.0, 31.0, 40.0])
    monkeypatch.setattr("uwm_deploy.report.console.time.perf_counter", lambda: next(clock))
    reporter = Reporter()
    with reporter.stage("score", "demo"):
        reporter.progress("pairs", 1, 7)
        reporter.progress("pairs", 4, 7)
    assert "pairs: 4/7, about 30 s left" in capsys.readouterr().err


def test_quiet_shows_the_result_only(tmp_path: Path) -> None:
    """The same result on standard output, and nothing on standard error; errors are still said."""
    (tmp_path / "pairs.jsonl").write_text('{"id": "1", "safe_text": "a", "unsafe_text": "b"}\n')
    command = ["data", "check", str(tmp_path / "pairs.jsonl"), "--workers", "0"]
    loud, quiet = (CliRunner().invoke(cli, [*command, *more]) for more in ([], ["--quiet"]))
    assert (loud.exit_code, quiet.exit_code) == (0, 0)
    assert loud.stdout == quiet.stdout != ""
    assert (bool(loud.stderr), quiet.stderr) == (True, "")
    failed = CliRunner().invoke(cli, ["data", "check", str(tmp_path / "nowhere.jsonl"), "--quiet"])
    assert (failed.exit_code, failed.stderr.startswith("error: ")) == (2, True)
    assert CliRunner().invoke(cli, command).stderr  # the next command is not quiet
