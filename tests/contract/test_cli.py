"""The command line: light, in sections, documented; a stage's command takes its own options; every failure is told."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from uwm_deploy.cli import COMMANDS, SECTIONS, cli
from uwm_deploy.commands import build, failure, fields, look, options, ship, until
from uwm_deploy.commands.failure import INTERRUPTED, failure_of
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.errors import BusyError, ExitCode, IntegrityError, UwmError
from uwm_deploy.pipeline.plan import plan_of
from uwm_deploy.pipeline.request import Request
from uwm_deploy.recipes import shipped
from uwm_deploy.stages.table import SOURCES
from uwm_deploy.stages.table import STAGES as TABLE

ROOT = Path(__file__).parents[2]
CLI_PAGE = (ROOT / "docs" / "reference" / "cli.md").read_text()
HEAVY = ("torch", "transformers", "open_clip", "onnx", "polygraphy", "onnxruntime")
STAGES = tuple(stage.name for stage in TABLE)
CONTEXT = click.Context(cli)
PIPELINE = ("score", "fit", "edit", "export", "compile", "verify", "build")
LINE = 60
"""Characters of the first line of a command's help."""


def command_of(name: str) -> click.Command:
    found = cli.get_command(CONTEXT, name)
    assert found is not None
    return found


def all_commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with its whole name, those below another one too."""
    for name in COMMANDS:
        command = command_of(name)
        yield name, command
        for inner, below in getattr(command, "commands", {}).items():
            yield f"{name} {inner}", below


ALL = dict(all_commands())


def option_names(name: str) -> set[str]:
    return {option for parameter in ALL[name].params for option in parameter.opts if option.startswith("--")}


# --- light ----------------------------------------------------------------------------------------------------------


def _loaded_after(code: str) -> set[str]:
    """Modules a fresh interpreter holds after running some code."""
    script = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    return set(done.stdout.splitlines()[-1].split())


def _after(arguments: list[str]) -> set[str]:
    return _loaded_after(
        f"from click.testing import CliRunner; from uwm_deploy.cli import cli\nCliRunner().invoke(cli, {arguments!r})"
    )


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["models"], ["data", "make", "--help"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    """Help and the list of models work without the build packages."""
    assert not {name.split(".")[0] for name in _after(arguments)} & set(HEAVY)


def test_help_imports_no_command_and_nothing_that_it_does_not_print_with() -> None:
    """The list of commands is there before any of them is."""
    loaded = _after(["--help"])
    assert not {name.split(".")[0] for name in loaded} & {*HEAVY, "numpy", "rich"}
    ours = {name for name in loaded if name.startswith("uwm_deploy.commands.")}
    assert ours == {f"uwm_deploy.commands.{name}" for name in ("failure", "help_width", "printed")}


def test_help_of_every_command_imports_neither_numpy_nor_rich() -> None:
    """Options are known before anything that computes is."""
    lines = [f"CliRunner().invoke(cli, {[*name.split(), '--help']!r}, catch_exceptions=False)" for name in ALL]
    code = "\n".join(["from click.testing import CliRunner; from uwm_deploy.cli import cli", *lines])
    assert not {name.split(".")[0] for name in _loaded_after(code)} & {*HEAVY, "numpy", "rich"}


def test_help_is_there_at_once() -> None:
    """At most 0.4 s of computing, the best of three: other programs run beside the tests."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "uwm_deploy.cli", "--help"], capture_output=True, check=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) <= 0.4


def test_gate_and_package_import_no_torch() -> None:
    """What judges and packages never reaches torch, transformers or onnx."""
    code = "import uwm_deploy.stages.gate.gate, uwm_deploy.bundle.write, uwm_deploy.pipeline.attest, uwm_deploy.pipeline.run"
    loaded = {name.split(".")[0] for name in _loaded_after(code)}
    assert not loaded & {"torch", "transformers", "open_clip", "onnx", "polygraphy"}


# --- help and docs --------------------------------------------------------------------------------------------------


def test_stages_stand_in_pipeline_order() -> None:
    """`--help` lists the stages in the order they run; a stage has a command exactly where the table says so."""
    listed = [name for name in SECTIONS["Build"] if name in STAGES]
    assert listed == [stage for stage in STAGES if stage in listed]
    assert list(SECTIONS["Build"]) == ["build", *listed]
    assert {stage.name for stage in TABLE if stage.command} == COMMANDS.keys() & set(STAGES)


def test_help_lists_every_command_in_its_section_on_one_line() -> None:
    """Each with its whole sentence, in a terminal of 80 columns."""
    lines = CliRunner().invoke(cli, ["-h"], terminal_width=80).output.splitlines()
    for section, commands in SECTIONS.items():
        start = lines.index(f"{section}:") + 1
        shown = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines[start : start + len(commands)])
        assert shown == {name: line for name, (_, line) in commands.items()}


@pytest.mark.parametrize("name", list(ALL))
def test_help_begins_with_a_short_sentence_and_has_an_example(name: str) -> None:
    """A capital, a full stop, at most 60 characters; the list of commands says the same."""
    text = ALL[name].help or ""
    first = text.splitlines()[0]
    assert re.fullmatch(r"[A-Z][^.]*\.", first), first
    assert len(first) <= LINE
    assert name not in COMMANDS or first == COMMANDS[name][1]
    shown = CliRunner().invoke(cli, [*name.split(), "-h"])
    assert shown.exit_code == 0
    assert f"uwm-deploy {name}" in shown.output.split("Example", 1)[1]


@pytest.mark.parametrize("name", ["", *ALL])
def test_help_fits_80_columns(name: str) -> None:
    """Every page of it, examples too; no name is split at a hyphen; a long example is one command for a shell."""
    shown = CliRunner().invoke(cli, [*name.split(), "--help"], terminal_width=80).output
    assert [line for line in shown.splitlines() if len(line) > 80] == []
    assert re.findall(r"\S*[^\W_]-$", shown, re.MULTILINE) == []
    assert "\u2011" not in shown
    for example in re.findall(r"^ +(uwm-deploy (?:.*\\\n)*.*)$", shown, re.MULTILINE):
        assert "\\" not in "".join(shlex.split(example)).replace("\n", ""), example


@pytest.mark.parametrize("name", list(ALL))
def test_every_option_has_help(name: str) -> None:
    """An option without help is a riddle."""
    for parameter in ALL[name].params:
        assert isinstance(parameter, click.Argument) or (isinstance(parameter, click.Option) and parameter.help)


def test_docs_name_every_command_in_its_section() -> None:
    """docs/reference/cli.md has a table for each section, in the order of the help."""
    parts = re.split(r"^### ", CLI_PAGE.split("## Options")[0], flags=re.MULTILINE)
    tables = {part.splitlines()[0]: re.findall(r"^\| `([a-z -]+)` \|", part, re.MULTILINE) for part in parts[1:]}
    for section, commands in SECTIONS.items():
        wanted = [name for name in ALL if name.split()[0] in commands]
        assert tables[section] == wanted


def test_docs_list_the_options_of_every_group() -> None:
    """docs/reference/cli.md has a row for each record that several commands have, with exactly its options."""
    rows = dict(re.findall(r"^\| ([a-z -]+) \| ((?:`--[a-z0-9-]+`(?:, )?)+) \|", CLI_PAGE, re.MULTILINE))
    for kind in records_in(options):
        name = re.sub(r"(?<=.)([A-Z])", r" \1", kind.__name__.removesuffix("Options")).lower()
        given = [names[0] for _, names, _ in fields.options_of(kind)]
        assert re.findall(r"--[a-z0-9-]+", rows[name.replace("zero shot", "zero-shot")]) == given


def test_exit_codes_are_documented() -> None:
    """Every exit code stands in docs/reference/cli.md with its number."""
    for code in (*map(int, ExitCode), INTERRUPTED):
        assert f"| {code} |" in CLI_PAGE


# --- options --------------------------------------------------------------------------------------------------------


def records_in(module: Any) -> list[type]:
    own = [kind for kind in vars(module).values() if getattr(kind, "__module__", "") == module.__name__]
    return [kind for kind in own if dataclasses.is_dataclass(kind)]


@pytest.mark.parametrize("kind", [*records_in(options), *records_in(until)], ids=lambda kind: kind.__name__)
def test_records_of_options_are_frozen(kind: Any) -> None:
    """What was asked for is not changed on the way, and a record has no other attributes."""
    assert kind.__dataclass_params__.frozen
    assert "__slots__" in vars(kind)


def test_every_option_of_the_pipeline_is_a_field_of_the_request() -> None:
    """So that none can be read on the command line and then be lost."""
    asked = {name for name, _, _ in fields.options_of(until.UntilPackage)}
    assert asked == {field.name for field in dataclasses.fields(Request)} - {"leave_out"}


def test_what_is_asked_for_reaches_the_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every option of `build`, each under its own name, and nothing else."""
    words = {
        "--model": "m", "--checkpoint": "c", "--revision": "r", "--original": str(tmp_path), "--weights": "random",
        "--calibration": "cal", "--evaluation": "ev", "--method": "uwm", "--selection": "hard", "--tower": "text",
        "--keep-mass": "0.5", "--factor": "2", "--placement": "auto", "--max-retrieval-loss": "3",
        "--axis": "g=1,o=0,kappa=0,a=1,tau=0", "--safety-head": "h", "--target": "tensorrt", "--precision": "fp16",
        "--budget": "flips=1%", "--keep-float32": "x*", "--policy": "p", "--baseline": "b", "--out": "o",
        "--bundle-version": "7", "--work": "w", "--device": "cuda", "--workers": "5", "--batch-pairs": "6",
        "--score-dtype": "bf16", "--downstream": "d",
    }  # fmt: skip
    made: list[Request] = []
    monkeypatch.setattr(build, "run_until", lambda _, asked, outputs: made.append(until.request_of(asked)) or Shown())
    flags = ["--per-concept", "--refittable"]
    result = CliRunner().invoke(cli, ["build", *flags, *(word for pair in words.items() for word in pair)])
    assert result.exit_code == 0, result.output
    (request,) = made
    assert all(
        getattr(request, field.name) != getattr(Request(), field.name)
        for field in dataclasses.fields(Request)
        if field.name != "leave_out"
    )
    assert (request.targets, request.float32, request.towers) == (("tensorrt",), ("x*",), ("text",))
    assert (request.batch_pairs, request.bundle_version, request.out) == (6, 7, Path("o"))


def test_without_options_the_request_is_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line's defaults are the library's."""
    made: list[Request] = []
    monkeypatch.setattr(build, "run_until", lambda _, asked, outputs: made.append(until.request_of(asked)) or Shown())
    assert CliRunner().invoke(cli, ["build"]).exit_code == 0
    assert made == [Request()]


def test_a_stage_adds_options_and_takes_none_of_a_later_one() -> None:
    """Each command takes what the one before it takes, and what its own settings read."""
    taken = [option_names(name) for name in PIPELINE]
    added = [after - before for before, after in itertools.pairwise(taken)]
    assert all(before <= after for before, after in itertools.pairwise(taken))
    assert dict(zip(PIPELINE[1:], added, strict=True)) == {
        "fit": {"--selection", "--keep-mass", "--factor", "--placement"},
        "edit": {"--max-retrieval-loss", "--axis"},
        "export": {"--safety-head"},
        "compile": {"--target", "--precision", "--budget", "--keep-float32", "--refittable"},
        "verify": {"--evaluation"},
        "build": {
            "--policy", "--downstream", "--baseline", "--out", "--bundle-version",
            "--junit", "--markdown", "--sarif", "--gitlab", "--github", "--in-toto", "--oscal",
        },
    }  # fmt: skip
    assert option_names("package") == option_names("build") - {
        "--junit", "--markdown", "--sarif", "--gitlab", "--github", "--in-toto", "--oscal",
    }  # fmt: skip


@pytest.mark.parametrize("name", [*PIPELINE, "package"])
def test_a_stages_command_runs_through_that_stage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own name is where the run ends; `build` and `package` end with the bundle."""
    ended: list[str] = []
    for module in (build, ship):
        monkeypatch.setattr(module, "run_until", lambda stage, *_: ended.append(stage) or Shown())
    assert CliRunner().invoke(cli, [name]).exit_code == 0
    assert ended == ["package" if name == "build" else name]
    assert ended[0] in STAGES


def depends_on(request: Request) -> dict[str, object]:
    """What each stage's folders depend on by a request, apart from what the stages before left."""
    plan = plan_of(request)
    return {
        stage.name: [
            [(variant.name, stage.settings(plan, variant)) for variant in stage.each(plan)],
            [SOURCES[source](plan) for source in stage.sources],
        ]
        for stage in TABLE
    }


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({"method": "unsafe-only"}, "score"),
        ({"per_concept": True}, "score"),
        ({"towers": ("image",)}, "score"),
        ({"score_dtype": "bf16"}, "score"),
        ({"weights": "random"}, "score"),
        ({"calibration": "demo-validation"}, "score"),
        ({"selection": "hard"}, "fit"),
        ({"keep_mass": 0.5}, "fit"),
        ({"factor": 0.5}, "fit"),
        ({"method": None, "placement": "embedding"}, "fit"),
        ({"method": None, "max_retrieval_loss": 1.0}, "edit"),
        ({"precisions": ("fp16",)}, "compile"),
        ({"float32": ("x",), "precisions": ("fp16",)}, "compile"),
        ({"budget": "flips=3%", "precisions": ("auto",)}, "compile"),
        ({"refittable": True}, "compile"),
        ({"targets": ("tensorrt",)}, "compile"),
        ({"evaluation": "demo-validation"}, "verify"),
        ({"policy": "strict"}, "gate"),
        ({"bundle_version": 3}, "package"),
        ({"out": Path("elsewhere")}, "package"),
    ],
)
def test_an_option_belongs_to_the_first_stage_that_reads_it(changes: dict[str, Any], command: str) -> None:
    """No stage before it depends on the option; the stage itself does, so its command must take it."""
    method = changes.get("method", "uwm") and "uwm"  # None is the recipe's, which has a closed-form step
    base = Request(method=method, targets=("onnxruntime",))
    asked = dataclasses.replace(base, **changes)
    before, after = depends_on(base), depends_on(asked)
    own = {"compile": {"convert", "compile"}, "gate": {"gate"}, "fit": {"fit", "edit"}}.get(command, {command})
    changed = [name for name in STAGES if before[name] != after[name]]
    assert changed[0] in own
    takes = {name for name, _, _ in fields.options_of(UNTIL[command])}
    assert set(changes) <= takes


UNTIL = {
    "score": until.UntilScore, "fit": until.UntilFit, "edit": until.UntilEdit, "export": until.UntilExport,
    "compile": until.UntilCompile, "verify": until.UntilVerify, "gate": until.UntilPackage,
    "package": until.UntilPackage,
}  # fmt: skip


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "what", "near"),
    [
        (["build", "--model", "clip-vit-l41"], "no recipe 'clip-vit-l41'", "clip-vit-l14"),
        (["build", "--calibration", "visu-tst"], "no data set 'visu-tst'", "visu-test"),
        (["verify", "--evaluation", "demo-tset"], "no data set 'demo-tset'", "demo-test"),
        (["data", "check", "dmo"], "no data set 'dmo'", "demo"),
        (["gate", "report.json", "--policy", "strickt"], "no policy 'strickt'", "strict"),
        (["build", "--policy", "defualt"], "no policy 'defualt'", "default"),
    ],
)
def test_an_unknown_name_is_told_as_what_it_is_with_the_nearest_one(words: list[str], what: str, near: str) -> None:
    """A recipe, a data set or a policy, never the folder that it was looked for in."""
    result = CliRunner().invoke(cli, [*words, "--json"])
    error = error_of(result)
    assert (error["kind"], error["what"], error["exit_code"]) == ("InputError", what, 2)
    assert error["fix"].removeprefix("nearest: ").split(", ")[0] == near


@pytest.mark.parametrize("word", ["export", "calibration", "ci"])
def test_a_missing_file_is_told_as_what_it_is(word: Any, tmp_path: Path) -> None:
    """The same for paths."""
    with pytest.raises(UwmError, match=rf"^{shipped.WORDS[word]} file .*none\.toml does not exist"):
        shipped.read_toml(word, str(tmp_path / "none.toml"))


@pytest.mark.parametrize("command", [["build"], ["gate", "x.json"], ["attest", "x"], ["refit", "x"]])
def test_the_shipped_policy_is_called_default(command: list[str]) -> None:
    """File, option and name inside; who asks for `policy`, its earlier name, is told."""
    assert shipped.names("ci") == ("default", "demo", "strict")
    assert 'name = "default"' in shipped.read_toml("ci", "default")[0]
    (policy,) = [parameter for parameter in command_of(command[0]).params if parameter.name == "policy"]
    assert policy.default == "default"
    assert Request().policy == "default"
    with pytest.raises(UwmError, match="no policy 'policy'; the shipped policy is called default"):
        shipped.read_toml("ci", "policy")


# --- failures -------------------------------------------------------------------------------------------------------


def error_of(result: Result) -> Mapping[str, Any]:
    """The error object, which is all of standard output; the exit code is the process's."""
    body = json.loads(result.stdout)
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"kind", "what", "fix", "exit_code"}
    assert body["error"]["exit_code"] == result.exit_code
    return body["error"]


CAPTION = ["downstream", "caption", "--model", ".", "--tower", ".", "--on", "demo"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["build", "--model", "dmo"], 2, "nearest: demo"),
        (["build", "--model", "demo", "--calibration", "nope"], 2, "no data set 'nope'"),
        (["build", "--model", "demo", "--keep-mass", "1.5"], 2, "range"),
        (["build", "--keep-mass", "nan"], 2, "nan is no finite number"),  # ranges of click take it
        (["build", "--factor", "inf"], 2, "inf is no finite number"),
        ([*CAPTION, "--threshold", "nan"], 2, "nan is no finite number"),
        ([*CAPTION, "--seed", str(2**63)], 2, "range"),
        (["train", "safety-head", "--out", "head", "--seed", str(2**64)], 2, "range"),
        (["gate", "nowhere"], 2, "nowhere"),
        (["inspect", "nowhere"], 2, "nowhere"),
        (["nonsense"], 2, "no command 'nonsense'"),
    ],
)
def test_bad_usage_is_one_line_with_its_exit_code(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown names and paths end with exit code 2 and no traceback; without --json standard output is empty."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["biuld"], "no command 'biuld'; nearest: build; see `cli --help`"),
        (["data", "chek"], "no command 'chek'; nearest: check; see `cli data --help`"),
        (["build", "--modle", "x"], "no option '--modle'; nearest: --model, --method; see `cli build --help`"),
        (
            ["train", "safe-clip", "--epoch=3"],
            "no option '--epoch'; nearest: --epochs; see `cli train safe-clip --help`",
        ),
        (["build", "--model"], "option '--model' has no value; write it behind the option"),
        (["build", "more"], "unexpected argument 'more'; see `cli build --help`"),
        (
            ["bench", "x", "--batch", "zero"],
            "invalid value for '--batch': 'zero' is not a whole number; see `cli bench --help`",
        ),
        (
            ["bench", "x", "--seconds", "a"],
            "invalid value for '--seconds': 'a' is not a number; see `cli bench --help`",
        ),
        (
            ["build", "--workers", "a"],
            "invalid value for '--workers': 'a' is not a whole number; see `cli build --help`",
        ),
        (["gate"], "missing argument 'REPORT'; see `cli gate --help`"),
    ],
)
def test_errors_of_click_look_like_ours(arguments: list[str], line: str) -> None:
    """What is wrong, a semicolon, how to fix it: the same words for the same thing, the nearest name first."""
    assert CliRunner().invoke(cli, arguments).stderr == f"error: {line}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["inspect", "--json"], "PATH"),
        (["inspect", "x", "--jsn", "--json"], "--jsn"),
        (["score", "--json", "--target", "onnxruntime"], "--target"),
        (["sign", "x", "--json"], "--key"),
        (["build", "--json", "--keep-mass", "2"], "--keep-mass"),
        (["build", "--json", "--axis", "g=x"], "--axis"),
        (["build", "--json", "--batch-pairs", "0"], "--batch-pairs"),
        (["baseline", "nonsense", "--json"], "nonsense"),
        (["nonsense", "--json"], "nonsense"),
    ],
)
def test_bad_usage_is_an_error_object(arguments: list[str], named: str) -> None:
    """A missing or an unknown word, a value out of range, at any depth; the object says where help is."""
    result = CliRunner().invoke(cli, arguments)
    error = error_of(result)
    assert (error["kind"], error["exit_code"]) == ("UsageError", 2)
    assert named in error["what"]
    assert re.search(r"`uwm-deploy.* --help`|`cli.* --help`", error["fix"])
    assert "error: " in result.stderr
    assert "Usage:" not in result.stderr


@pytest.mark.parametrize(
    ("error", "kind", "code", "line"),
    [
        (IntegrityError("x was changed", fix="build again"), "IntegrityError", 5, "error: x was changed; build again"),
        (BusyError("too much"), "BusyError", 6, "error: too much"),
        (ValueError("a\nb"), "InternalError", 1, "internal error: ValueError: a b; run again with --debug"),
        (KeyboardInterrupt(), "Interrupted", 130, "interrupted; finished stages are kept"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_every_kind_of_failure(
    error: BaseException, kind: str, code: int, line: str, as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line on standard error, and with --json the object on standard output."""

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr("uwm_deploy.report.inspection.describe", fails)
    result = CliRunner().invoke(cli, ["inspect", "x", *(["--json"] if as_json else [])])
    assert result.exit_code == code
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1
    if as_json:
        found = error_of(result)
        assert (found["kind"], found["what"] in line) == (kind, True)
    else:
        assert result.stdout == ""


def test_an_interruption_before_the_command_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a command is imported, say."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("uwm_deploy.cli.import_module", interrupted)
    result = CliRunner().invoke(cli, ["models", "--json"])
    assert (error_of(result)["kind"], result.exit_code) == ("Interrupted", INTERRUPTED)


def test_debug_shows_where_it_went_wrong(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The traceback is on standard error, beside the error object and the exit code that there are without it."""

    def fails(*_: Any) -> None:
        raise ValueError("inner")

    monkeypatch.setattr("uwm_deploy.report.inspection.describe", fails)
    result = CliRunner().invoke(cli, ["inspect", "x", "--debug", "--json"])
    assert (error_of(result)["exit_code"], result.exit_code) == (1, 1)
    assert "Traceback" in result.stderr
    assert "inner" in result.stderr


def test_debug_keeps_the_exit_code_of_a_kind(tmp_path: Path) -> None:
    """A user who asks for a traceback sees the same code as one who does not."""
    result = CliRunner().invoke(cli, ["gate", str(tmp_path / "nowhere"), "--debug"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_a_process_that_only_helps_prints_no_object(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Of a group, the first one's object is the only one."""
    monkeypatch.setattr(failure, "speaks", lambda: False)
    assert failure.say(IntegrityError("x"), as_json=True) == 5
    assert capsys.readouterr().out == ""


def test_every_kind_of_error_is_documented() -> None:
    """docs/reference/cli.md has the name of every type of error that the object can hold."""

    def kinds(base: type[UwmError]) -> Iterator[type[UwmError]]:
        for kind in base.__subclasses__():
            yield kind
            yield from kinds(kind)

    own = [kind.__name__ for kind in kinds(UwmError) if kind.__module__ == "uwm_deploy.errors"]
    for name in (*own, "UsageError", "InternalError", "Interrupted"):
        assert f"`{name}`" in CLI_PAGE
    documented = json.loads(re.search(r'\{"error": .*\}\}', CLI_PAGE)[0])["error"]  # type: ignore[index]
    assert documented.keys() == {field.name for field in dataclasses.fields(failure_of(ValueError()))}


def test_an_error_object_says_what_the_line_says() -> None:
    """`what` and `fix` make the line."""
    found = failure_of(IntegrityError("x was changed", fix="build again"))
    assert (found.what, found.fix, found.kind) == ("x was changed", "build again", "IntegrityError")


# --- results --------------------------------------------------------------------------------------------------------


def test_a_result_is_text_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain data sorted, the same as lines for people."""
    monkeypatch.setattr("uwm_deploy.report.inspection.describe", lambda _: {"b": 1, "a": {"c": ["d"]}})
    assert json.loads(CliRunner().invoke(cli, ["inspect", "x", "--json"]).stdout) == {"b": 1, "a": {"c": ["d"]}}
    text = CliRunner().invoke(cli, ["inspect", "x"]).stdout
    assert text.splitlines() == [f"{'b':<24} 1", "a", "  c", "    d"]


def test_notes_stay_out_of_json() -> None:
    """Lines for the log go to standard error beside data."""
    command = click.command()(prints(lambda: Shown(data={"a": 1}, text="one", notes=("note",), code=3)))
    with_json, without = CliRunner().invoke(command, ["--json"]), CliRunner().invoke(command)
    assert (json.loads(with_json.stdout), with_json.stderr, with_json.exit_code) == ({"a": 1}, "note\n", 3)
    assert (without.stdout, without.stderr, without.exit_code) == ("one\nnote\n", "", 3)


def test_records_in_records_give_their_options_in_order() -> None:
    """And a command gets the records, not the options."""

    def whole(device: options.DeviceOptions, target: options.TargetOptions) -> Shown:
        return Shown(text=f"{device.device} {target.targets}")

    command = click.command()(fields.takes_options(prints(whole)))
    names = [parameter.opts[0] for parameter in command.params]
    wanted = [
        "--device",
        "--target",
        "--precision",
        "--budget",
        "--keep-float32",
        "--refittable",
        "--json",
        "--quiet",
        "--debug",
    ]
    assert names == wanted
    found = CliRunner().invoke(command, ["--target", "tensorrt", "--device", "cpu"])
    assert found.stdout == "cpu ('tensorrt',)\n"


def test_a_required_option_is_required() -> None:
    """Not filled with nothing."""
    found = CliRunner().invoke(cli, ["verify-signature", "x"])
    assert (found.exit_code, "--public-key" in found.stderr) == (2, True)


# --- completion -----------------------------------------------------------------------------------------------------


def _completed(*words: str) -> list[str]:
    """What bash is offered for the last of some words."""
    environment = os.environ | {
        "_UWM_DEPLOY_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["uwm-deploy", *words]),
        "COMP_CWORD": str(len(words)),
    }
    script = [sys.executable, "-c", "from uwm_deploy.cli import main; main()"]
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_a_shell_is_printed_and_documented(shell: str) -> None:
    """By the line that docs/reference/cli.md gives."""
    line = f"_UWM_DEPLOY_COMPLETE={shell}_source uwm-deploy"
    assert line in CLI_PAGE
    environment = os.environ | {"_UWM_DEPLOY_COMPLETE": f"{shell}_source", "PATH": os.environ["PATH"]}
    script = [sys.executable, "-c", "from uwm_deploy.cli import main; main()"]
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert "_uwm_deploy_completion" in done.stdout, done.stderr
    assert f"_UWM_DEPLOY_COMPLETE={shell}_complete" in done.stdout


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["scor"], {"plain,score"}),
        (["baseline", "co"], {"plain,compare"}),
        (["build", "--model", "siglip2"], {"plain,siglip2-base"}),
        (["gate", "dist/demo", "--policy", "d"], {"plain,default", "plain,demo"}),
        (["build", "--calibration", "visu-t"], {"plain,visu-test"}),
        (["data", "check", "visu-v"], {"plain,visu-validation"}),
        (["sweep", "--on", "demo-h"], {"plain,demo-head"}),
        (["build", "--policy", "my-folder/"], {"file,my-folder/"}),
    ],
)
def test_names_are_completed(words: list[str], offered: set[str]) -> None:
    """Commands, recipes, data sets and policies; where no name fits, files."""
    assert set(_completed(*words)) == offered


NAMING = {"model": shipped.names("export"), "policy": shipped.names("ci")} | dict.fromkeys(
    ("calibration", "evaluation", "against", "on", "train_on", "validation"), shipped.names("calibration")
)
"""Parameters that take the name of something shipped."""


@pytest.mark.parametrize("name", list(ALL))
def test_every_option_that_takes_a_name_completes_it(name: str) -> None:
    """In every command; `swap` takes a folder, not a recipe."""
    for parameter in ALL[name].params:
        if parameter.name in NAMING and not isinstance(parameter.type, click.Path):
            items = parameter.shell_complete(click.Context(ALL[name]), "")
            assert tuple(item.value for item in items) == NAMING[str(parameter.name)], (name, parameter.name)


def test_look_opens_no_browser_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A bad path is an error before anything is opened."""
    monkeypatch.setattr(look.webbrowser, "open", lambda _: pytest.fail("opened"))
    assert CliRunner().invoke(cli, ["report", str(tmp_path / "none"), "--open"]).exit_code == 2
