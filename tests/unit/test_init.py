"""`uwm-deploy init`: a project whose files are read without a word, and that builds as it stands."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from uwm_deploy.cli import cli
from uwm_deploy.errors import InputError
from uwm_deploy.pipeline.plan import plan_of
from uwm_deploy.pipeline.request import Request
from uwm_deploy.runtime.encoder import SafeEncoder

ROOT = Path(__file__).parents[2]


def _run(*words: str) -> str:
    done = CliRunner().invoke(cli, list(words))
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `init` says; the current folder holds the project."""
    monkeypatch.chdir(tmp_path)
    return _run("init", "mine")


def _request(out: str) -> Request:
    words = shlex.split(out.split("build it:\n")[1].replace("\\\n", ""))
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert list(given) == ["--model", "--policy"]
    return Request(**{name.removeprefix("--"): value for name, value in given.items()})


def test_every_file_of_the_project_is_read(project: str) -> None:
    """Recipe, sets and policy make a plan that no count speaks against; every file has comments; CI gates its bundle."""
    plan = plan_of(_request(project))
    assert (plan.recipe.name, plan.policy.name, plan.out) == ("mine", "policy", Path("dist/mine"))
    assert (plan.calibration.name, plan.evaluation.name) == ("train", "test")
    assert plan.calibration.split != plan.evaluation.split
    files = sorted(Path("mine").iterdir())
    assert [file.name for file in files] == ["ci.yml", "mine.toml", "policy.toml", "test.toml", "train.toml"]
    assert all(file.read_text().startswith("# ") for file in files)
    steps = yaml.safe_load(Path("mine/ci.yml").read_text())["jobs"]["gate"]["steps"]
    assert "uwm-deploy gate dist/mine --policy mine/policy.toml" in steps[-1]["run"]


def test_the_commented_lines_are_a_set_of_ones_own(project: str) -> None:
    """Whoever takes the comments away as they say gets a set that opens."""
    text = Path("mine/train.toml").read_text()
    own = re.sub(r"(?m)^(source|split|limit) = .*\n", "", text)
    own = re.sub(r"(?m)^# (source|manifest|limit) = ", r"\1 = ", own)
    Path("mine/train.toml").write_text(own)
    Path("captions.csv").write_text("safe_text,unsafe_text\na room,a room on fire\n")
    _run("data", "make", "captions.csv", "--out", "mine/train-pairs.jsonl")
    assert "1 items, 0 with both images, 1 with both texts" in _run(
        "data", "check", "mine/train.toml", "--workers", "0"
    )


@pytest.mark.parametrize("there", ["file", "full folder"])
def test_what_is_there_is_not_touched(there: str, tmp_path: Path) -> None:
    """Exit code 2; an empty folder is filled."""
    (place := tmp_path / "mine").write_text("x") if there == "file" else (tmp_path / "mine").mkdir()
    if there == "full folder":
        (place := tmp_path / "mine") and (place / "notes").write_text("x")
    done = CliRunner().invoke(cli, ["init", str(tmp_path / "mine")])
    assert (done.exit_code, "is there already" in done.output) == (2, True)
    (tmp_path / "empty").mkdir()
    _run("init", str(tmp_path / "empty"))
    assert (tmp_path / "empty" / "empty.toml").is_file()


def test_readme_and_tutorial_build_a_project_as_init_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command in all three places."""
    monkeypatch.chdir(tmp_path)
    said = " ".join(_run("init", "my-project").split("build it:\n")[1].replace("\\\n", "").split())
    for page in ("README.md", "docs/tutorial.md"):
        assert f"    {said}\n" in (ROOT / page).read_text(), page


@pytest.mark.parametrize("start", [".", "..", "elsewhere"])
def test_a_recipe_finds_its_sets_wherever_one_stands(
    start: str, project: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths in it start at its own folder, and not at the working folder, where other files of these names lie."""
    (tmp_path / "elsewhere").mkdir()
    place = {".": tmp_path, "..": tmp_path / "mine", "elsewhere": tmp_path / "elsewhere"}[start]
    for name in ("train", "test"):
        if start != "..":
            (place / f"{name}.toml").write_text("other")
    monkeypatch.chdir(place)
    plan = plan_of(Request(model=os.path.relpath(tmp_path / "mine" / "mine.toml")))
    assert (plan.calibration.name, plan.evaluation.name) == ("train", "test")
    assert plan.calibration_base == plan.evaluation_base == tmp_path / "mine"
    assert str(tmp_path) not in plan.recipe_text


def test_a_set_above_the_recipe_or_at_a_full_path_is_found(project: str, tmp_path: Path) -> None:
    """And one that is not there is named by its path, with where it starts."""
    recipe = Path("mine/mine.toml")
    (tmp_path / "train.toml").write_text(Path("mine/train.toml").read_text().replace("1024", "7"))
    text = recipe.read_text().replace('"train.toml"', '"../train.toml"')
    recipe.write_text(text.replace('"test.toml"', f'"{tmp_path / "mine" / "test.toml"}"'))
    plan = plan_of(Request(model=str(recipe)))
    assert (plan.calibration.limit, plan.evaluation.name) == (7, "test")
    (tmp_path / "train.toml").unlink()
    with pytest.raises(InputError, match=r"mine/\.\./train\.toml does not exist.*starts at the recipe's folder"):
        plan_of(Request(model=str(recipe)))


def test_projects_beside_each_other_share_nothing(project: str) -> None:
    """Each has a run folder and a bundle of its own."""
    plans = [plan_of(_request(said)) for said in (project, _run("init", "other"))]
    assert {str(plan.out) for plan in plans} == {"dist/mine", "dist/other"}
    assert len({plan.folder.root for plan in plans}) == 2


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("a b/it's mine", "it-s-mine"),
        ("train", "train-model"),
        ("policy", "policy-model"),
        ("demo", "demo-model"),
        ("clip-vit-b32", "clip-vit-b32-model"),
        (".hidden", "hidden"),
    ],
)
def test_any_folder_gives_a_name(folder: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of the project and no shipped recipe has it; the commands are those of a shell, blanks and quotes included."""
    monkeypatch.chdir(tmp_path)
    plan = plan_of(_request(_run("init", folder)))
    assert (plan.recipe.name, plan.policy.name) == (name, "policy")
    ((_, gate),) = yaml.safe_load(Path(folder, "ci.yml").read_text())["jobs"]["gate"]["steps"][-1].items()
    assert shlex.split(gate)[:5] == ["uwm-deploy", "gate", f"dist/{name}", "--policy", f"{folder}/policy.toml"]


def test_the_working_folder_becomes_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is filled and not replaced, so that whoever stands in it still does; its path is in no file."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    plan = plan_of(_request(_run("init", ".")))
    assert (plan.recipe.name, plan.calibration.name) == ("mine", "train")
    assert len(os.listdir(".")) == 5
    monkeypatch.chdir(tmp_path)
    _run("init", str(tmp_path / "other"))
    assert "gate dist/other --policy other/policy.toml" in Path("other/ci.yml").read_text()
    assert all(str(tmp_path) not in file.read_text() for file in Path("other").iterdir())


@pytest.mark.slow
def test_the_project_builds_opens_and_is_gated_as_its_ci_file_says(project: str) -> None:
    """Slow, because it is a whole build; only the target that needs a GPU is left out."""
    _run(*shlex.split(project.splitlines()[-1])[1:], "--target", "onnxruntime")
    steps = yaml.safe_load(Path("mine/ci.yml").read_text())["jobs"]["gate"]["steps"]
    _run(*shlex.split(steps[-1]["run"])[1:])
    with SafeEncoder.open("dist/mine") as encoder:
        assert encoder.variant == "onnxruntime-fp32"
