"""`uwm-deploy init`: a project whose files are read without a word, and that builds as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from uwm_deploy.cli import cli
from uwm_deploy.pipeline.plan import plan_of
from uwm_deploy.pipeline.request import Request
from uwm_deploy.runtime.encoder import SafeEncoder


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
    assert list(given) == ["--model", "--calibration", "--evaluation", "--policy"]
    return Request(**{name.removeprefix("--"): value for name, value in given.items()})


def test_every_file_of_the_project_is_read(project: str) -> None:
    """Recipe, sets and policy make a plan that no count speaks against; every file has comments; CI gates its bundle."""
    plan = plan_of(_request(project))
    assert (plan.recipe.name, plan.policy.name) == ("model", "policy")
    assert (plan.calibration.name, plan.evaluation.name) == ("train", "test")
    assert plan.calibration.split != plan.evaluation.split
    files = sorted(Path("mine").iterdir())
    assert [file.name for file in files] == ["ci.yml", "model.toml", "policy.toml", "test.toml", "train.toml"]
    assert all(file.read_text().startswith("# ") for file in files)
    steps = yaml.safe_load(Path("mine/ci.yml").read_text())["jobs"]["gate"]["steps"]
    assert "uwm-deploy gate dist/model --policy mine/policy.toml" in steps[-1]["run"]


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
    assert (tmp_path / "empty" / "model.toml").is_file()


@pytest.mark.slow
def test_the_project_builds_opens_and_is_gated_as_its_ci_file_says(project: str) -> None:
    """Slow, because it is a whole build; only the target that needs a GPU is left out."""
    _run(*shlex.split(project.splitlines()[-1])[1:], "--target", "onnxruntime")
    steps = yaml.safe_load(Path("mine/ci.yml").read_text())["jobs"]["gate"]["steps"]
    _run(*shlex.split(steps[-1]["run"])[1:])
    with SafeEncoder.open("dist/model") as encoder:
        assert encoder.variant == "onnxruntime-fp32"
