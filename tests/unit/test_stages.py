"""How stages are run and reused, on toy stages; and what the real ones say of themselves."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import toy_stages
from tests.data_sets import pair, png, put, toml
from uwm_deploy.errors import ContractError, InputError, PrerequisiteError
from uwm_deploy.pipeline import closure
from uwm_deploy.pipeline.closure import digest_of_sources, root, sources_of
from uwm_deploy.pipeline.plan import foreseen, plan_of
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import Run, run
from uwm_deploy.records.verdict import Verdict
from uwm_deploy.stages.job import Job
from uwm_deploy.stages.table import NAMES, SOURCES, STAGES
from uwm_deploy.stages.verify.make import _overlap

ROOT = Path(__file__).parents[2]
ALL = ["score", "edit", "convert-fp16", "compile-ort-fp32", "compile-ort-fp16", "gate", "package"]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    toy_stages.WORDS.clear()
    toy_stages.FAILS.clear()


def test_every_folder_is_made_once_and_in_order(tmp_path: Path) -> None:
    """A stage that two others read is made once, before both."""
    assert toy_stages.run(tmp_path) == ALL


def test_a_second_run_makes_nothing(tmp_path: Path) -> None:
    """All inputs are the same, so every folder is reused."""
    toy_stages.run(tmp_path)
    assert toy_stages.run(tmp_path) == []


def test_a_run_ends_at_the_stage_that_is_asked_for(tmp_path: Path) -> None:
    """What is not read is not made; the next run goes on from there."""
    assert toy_stages.run(tmp_path, until="convert") == ALL[:3]
    assert toy_stages.run(tmp_path) == ALL[3:]


@pytest.mark.parametrize(
    ("changed", "made"), [("package", ["package"]), ("gate", ["gate"]), ("convert", ["convert-fp16"])]
)
def test_a_setting_remakes_its_own_stage(tmp_path: Path, changed: str, made: list[str]) -> None:
    """A stage whose setting changed is remade; those that read it are not, because it left the same bytes."""
    toy_stages.run(tmp_path)
    assert toy_stages.run(tmp_path, settings=lambda name: "new" if name == changed else None) == made


def test_other_bytes_remake_what_reads_them(tmp_path: Path) -> None:
    """A variant reads the folder of its own precision only, so the other one is reused."""
    toy_stages.run(tmp_path)
    toy_stages.WORDS["convert"] = "other"
    found = toy_stages.run(tmp_path, settings=lambda name: "new" if name == "convert" else None)
    assert found == ["convert-fp16", "compile-ort-fp16"]


@pytest.mark.parametrize("harm", ["changed", "added", "removed"])
def test_a_folder_that_was_changed_is_remade(tmp_path: Path, harm: str) -> None:
    """A stage's folder holds exactly what the stage left, or it is made again."""
    toy_stages.run(tmp_path)
    folder = tmp_path / "work" / "edit"
    if harm == "changed":
        (folder / "word").write_text("mine", encoding="utf-8")
    elif harm == "added":
        (folder / "README.md").write_text("mine", encoding="utf-8")
    else:
        (folder / "word").unlink()
    assert toy_stages.run(tmp_path) == ["edit"]
    assert (folder / "word").read_text() == "word"


def test_what_lies_outside_the_folder_is_looked_for(tmp_path: Path) -> None:
    """The bundle is written outside the run folder; where it is gone, it is written again."""
    toy_stages.run(tmp_path)
    (tmp_path / "shipped").unlink()
    assert toy_stages.run(tmp_path) == ["package"]


def test_a_stage_that_fails_keeps_what_was_there(tmp_path: Path) -> None:
    """The stages before it and its own old folder stay; nothing is half-written."""
    toy_stages.run(tmp_path)
    toy_stages.FAILS["gate"] = ContractError
    with pytest.raises(ContractError):
        toy_stages.run(tmp_path, settings=lambda name: "new" if name == "gate" else None)
    names = sorted(p.name for p in (tmp_path / "work").iterdir() if p.is_dir())
    assert names == sorted(ALL)
    assert not (tmp_path / "work" / "gate" / "half").exists()
    toy_stages.FAILS.clear()
    assert toy_stages.run(tmp_path) == []


@pytest.mark.parametrize("dies_in", ["edit", "compile-ort-fp16", "package"])
def test_a_killed_run_resumes(tmp_path: Path, dies_in: str) -> None:
    """After SIGKILL in a stage, the next run makes that stage and the later ones, and leaves no temporary folder."""
    code = "import sys; from pathlib import Path; from tests import toy_stages; toy_stages.run(Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOY_DIES_IN": dies_in}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "work" / dies_in).exists()
    assert toy_stages.run(tmp_path) == ALL[ALL.index(dies_in) :]
    assert not list((tmp_path / "work").glob(".tmp-*"))


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    """The second one ends before it makes anything."""

    class NestedError(Exception):
        """The first run is in the middle of a stage."""

    def second(*_: object) -> None:
        with pytest.raises(InputError, match="another build"):
            toy_stages.run(tmp_path)
        raise NestedError

    toy_stages.FAILS["edit"] = second  # type: ignore[assignment]
    with pytest.raises(NestedError):
        toy_stages.run(tmp_path)


def test_a_variant_that_cannot_be_made_is_left_out(tmp_path: Path) -> None:
    """The others are made, and what comes after reads those; without any, the reasons are the error."""
    toy_stages.FAILS["compile-ort-fp16"] = PrerequisiteError
    assert toy_stages.run(tmp_path) == [
        "score",
        "edit",
        "convert-fp16",
        "compile-ort-fp32",
        "compile-ort-fp16",
        "gate",
        "package",
    ]
    assert not (tmp_path / "work" / "compile-ort-fp16").exists()
    assert (tmp_path / "work" / "gate" / "read.json").read_text() == '["compile-ort-fp32"]'
    toy_stages.FAILS["compile-ort-fp32"] = PrerequisiteError
    with pytest.raises(PrerequisiteError, match="ort-fp32: compile-ort-fp32; ort-fp16: compile-ort-fp16"):
        toy_stages.run(tmp_path / "none")


# --- the real stages -----------------------------------------------------------------------------------------------


def test_stages_read_earlier_ones_and_known_sources() -> None:
    """The list is the order."""
    for place, stage in enumerate(STAGES):
        assert set(stage.reads) <= set(NAMES[:place]), stage.name
        assert set(stage.sources) <= set(SOURCES), stage.name


def test_every_module_of_the_room_is_a_stage() -> None:
    """`ls uwm_deploy/stages` shows the stages, and what they are given."""
    given = {"__init__", "job", "models", "table", "text_rows", "traced", "__pycache__"}
    assert {path.stem for path in (root() / "stages").iterdir()} - given == set(NAMES)


def _stages_that_reach(path: str) -> set[str]:
    return {stage.name for stage in STAGES if root() / path in sources_of(stage.module)}


@pytest.mark.parametrize("room", ["report", "commands", "pipeline", "studies", "training", "serve"])
def test_views_and_commands_change_no_stage(room: str) -> None:
    """No stage reaches a room above the stages, so a comment there leaves every folder as it is."""
    for path in (root() / room).rglob("*.py"):
        assert _stages_that_reach(path.relative_to(root()).as_posix()) == set(), path


@pytest.mark.parametrize(
    ("path", "reached_by"),
    [
        ("stages/score/score.py", {"score"}),
        ("edits/saliency.py", {"score"}),
        ("edits/moments.py", {"fit", "edit", "verify"}),
        ("stages/export.py", {"export"}),
        ("graphs/engine_builder.py", {"convert", "compile"}),
        ("graphs/modelopt_quantiser.py", {"convert"}),  # started by its name
        ("stages/gate/limits.py", {"gate"}),
        ("stages/verify/executed.py", {"verify"}),
    ],
)
def test_sources_are_those_of_the_stages_that_use_them(path: str, reached_by: set[str]) -> None:
    """A change of one makes these stages again."""
    assert reached_by <= _stages_that_reach(path)
    if path.startswith(("stages/", "edits/saliency")):
        assert _stages_that_reach(path) == reached_by


def test_adapters_that_are_imported_by_name_are_reached() -> None:
    """Scores change when the module of any model family does."""
    names = {path.name for path in sources_of("uwm_deploy.stages.score.make")}
    assert {"hf_clip.py", "siglip.py", "open_clip.py", "llava.py"} <= names


def test_a_comment_changes_the_digest_of_those_that_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A digest is of the bytes, a comment included; files outside the closure have no say."""
    before = {stage.name: digest_of_sources(stage.module) for stage in STAGES}
    changed, whole = root() / "stages" / "score" / "score.py", closure._digest
    monkeypatch.setattr(closure, "_digest", lambda path: "other" if path == changed else whole(path))
    digest_of_sources.cache_clear()
    after = {stage.name: digest_of_sources(stage.module) for stage in STAGES}
    digest_of_sources.cache_clear()
    assert {name for name in NAMES if before[name] != after[name]} == {"score"}


def test_imports_for_the_type_checker_do_not_count() -> None:
    """They are never executed; those inside functions are."""
    code = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from uwm_deploy.report import card\n"
        "else:\n    from uwm_deploy.graphs import cpu_integers\n"
        "def f():\n    import uwm_deploy.errors\n"
        'NAME = "uwm_deploy.towers.llava"\n'
    )
    found = {name for name in closure._named(ast.parse(code)) if name.startswith("uwm_deploy")}
    assert found >= {"uwm_deploy.graphs.cpu_integers", "uwm_deploy.errors", "uwm_deploy.towers.llava"}
    assert not any("report" in name for name in found)


_DISTRIBUTIONS = {
    "torch": "torch", "transformers": "transformers", "open_clip": "open_clip_torch", "numpy": "numpy", "PIL": "pillow",
    "tokenizers": "tokenizers", "onnx": "onnx", "onnxscript": "onnxscript", "onnx_ir": "onnx-ir", "polygraphy": "polygraphy",
    "onnxruntime": "onnxruntime",
}  # fmt: skip


@pytest.mark.parametrize(
    "stage", [stage for stage in STAGES if stage.name not in ("gate", "package")], ids=lambda s: s.name
)
def test_libraries_whose_versions_matter_are_named(stage: object) -> None:
    """What a stage's own module imports from outside is among the libraries that it depends on."""
    file = closure.file_of(stage.module)  # type: ignore[attr-defined]
    assert file is not None
    folder = [file] if file.parent.name == "stages" else list(file.parent.glob("*.py"))
    for path in folder:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if known := _DISTRIBUTIONS.get(name.partition(".")[0]):
                    assert known in stage.libraries, (path, name)  # type: ignore[attr-defined]


# --- what is known before the first stage --------------------------------------------------------------------------


def _set(folder: Path, limit: int, more: str = "") -> str:
    path = folder / f"set-{limit}.toml"
    path.write_text(
        f'format = 1\nname = "tiny"\nsource = "demo"\nsplit = "test"\nlimit = {limit}\n{more}', encoding="utf-8"
    )
    return str(path)


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"policy": "defualt"}, InputError),
        ({"evaluation": "demo-tset"}, InputError),
        ({"calibration": "nowhere.toml"}, InputError),
        ({"out": "taken"}, InputError),
        ({"baseline": Path("nowhere")}, InputError),
        ({"safety_head": Path("nowhere")}, InputError),
    ],
)
def test_what_can_be_refused_at_once_is_refused_before_anything_is_made(
    tmp_path: Path, asked: dict[str, object], error: type[Exception]
) -> None:
    """Scoring takes hours; a wrong name is found before it."""
    if asked.get("out"):
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "mine.txt").write_text("", encoding="utf-8")
        asked = {"out": tmp_path / "taken"}
    request = Request(work=tmp_path / "work", **{"out": tmp_path / "out", **asked})  # type: ignore[arg-type]
    with pytest.raises(error):
        run(request, until="package", reporter=toy_stages.Log())
    assert not [p for p in (tmp_path / "work").glob("*") if p.name != ".lock"]


def test_checks_that_cannot_pass_are_told_beforehand(tmp_path: Path) -> None:
    """Too few quadruples for the policy, and of every concept, and no zero-shot set where it limits zero-shot."""
    few = plan_of(Request(evaluation=_set(tmp_path, 20), work=tmp_path, out=tmp_path / "out"))
    words = ("200 quadruples", "30 items of a concept", "zero-shot")
    assert [word in line for word, line in zip(words, foreseen(few), strict=True)] == [True] * 3
    enough = plan_of(
        Request(evaluation=_set(tmp_path, 300, 'zero_shot = ["colour"]\n'), work=tmp_path, out=tmp_path / "out")
    )
    assert foreseen(enough) == []


def test_verify_says_how_many_quadruples_are_there_twice(tmp_path: Path) -> None:
    """They are counted twice, under whatever ids; nothing is said of a set without them."""
    said = []
    for copies in (0, 3):
        folder = tmp_path / str(copies)
        rows = [pair(i, safe_image=f"{i}.png", unsafe_image=f"{i + 9}.png") for i in range(5)]
        rows += [row | {"id": f"again{row['id']}"} for row in rows[:copies]]
        for i in range(18):
            put(folder / f"{i}.png", png(i))
        put(folder / "pairs.jsonl", "\n".join(map(json.dumps, rows)))
        evaluation = put(folder / "eval.toml", toml(source="manifest", manifest="pairs.jsonl"))
        plan = plan_of(Request(calibration=_set(tmp_path, 4), evaluation=str(evaluation), work=tmp_path, workers=0))
        log = toy_stages.Log()
        assert _overlap(Job(plan=plan, notes=log, card=lambda *_, **__: "")) == 0
        said += log.lines
    assert [("3 of 8 quadruples of mine" in line) for line in said] == [True]


def test_what_was_not_pulled_is_no_record(tmp_path: Path) -> None:
    """An outcome gives records of stages that ran, and never an old one that lies in the folder."""
    plan = plan_of(Request(work=tmp_path / "work", out=tmp_path / "out"))
    outcome = Run(plan, toy_stages.Log(), stages=toy_stages.stages()).outcome
    assert outcome.verdict is None
    with pytest.raises(LookupError, match="gate"):
        outcome.left(Verdict)
