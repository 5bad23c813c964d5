"""The files of a small project that builds as it stands: two sets, a recipe, a policy, and the gate in CI."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from uwm_deploy.recipes.shipped import names, read_toml
from uwm_deploy.records.names import segment_of

TRAIN, TEST, POLICY = "train.toml", "test.toml", "policy.toml"
CI = "ci.yml"

_SET = """\
# {what}
# It is a set of the drawn demo world, so that the project builds as it stands.
# For your own set, remove the lines from `source` to `limit`, and take the three lines below them.
format = 1
name = "{name}"
source = "demo"
split = "{split}"
limit = {limit}
# source = "manifest"
# manifest = "{name}-pairs.jsonl"   # written by: uwm-deploy data make PICTURES --out {name}-pairs.jsonl
# limit = 0                         # 0 takes all pairs
{zero_shot}"""

_OWN_ZERO_SHOT = """\
# Labelled pictures measure what the model knows: one folder per class, below `labelled`.
# zero_shot = ["imagefolder:labelled::a photo of a {}."]
"""

_RECIPE = """\
# The recipe: which model, how it is edited, and what it is compiled for. docs/reference/recipes.md has every key.
# For your own model, set `family` and `repo`. `repo` is a folder with config.json and safetensors (`./NAME` is
# one beside this file), or a name on the hub with its commit in `revision`. `uwm-deploy models` lists the shipped recipes:
# begin with the one of your family.
# The file has the name of the recipe, and so have its run folder and its bundle.
"""

_DATA = """\
[data]   # a path starts at the folder of this file
calibration = "{train}"
evaluation = "{test}"
"""

_POLICY = """\
# The policy: the limits that a build must keep. It begins as a copy of the policy `default`.
"""

_CI = """\
# The gate as a job of GitHub Actions. Copy this file to .github/workflows/. The bundle must be in the repository, or come
# from an earlier job. uwm-deploy is on no package index yet: put a wheel of it into wheels/ (pip wheel --no-deps .).
name: gate
on: [push, pull_request]
jobs:
  gate:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v4
      - run: python3 -m pip install wheels/uwm_deploy-*.whl
      - run: uwm-deploy gate {bundle} --policy {policy} --junit gate.xml --markdown gate.md
"""


def recipe_name(folder: Path) -> str:
    """Name of a project's recipe: that of its folder, unless another file has it already.

    Args:
        folder: Where the files will lie.
    """
    name = segment_of(folder.resolve().name)
    taken = {Path(file).stem for file in (TRAIN, TEST, POLICY)}
    return f"{name}-model" if name in taken.union(names("export")) else name


def project_files(folder: Path) -> Mapping[str, str]:
    """Content of each file of a project, by its name.

    Args:
        folder: Where they will lie, as the commands in them give it.
    """
    name, policy = recipe_name(folder), read_toml("ci", "default")[0]
    shipped_sets = '["shape", "colour", "background"]'
    return {
        TRAIN: _SET.format(
            what="Calibration: the edit is made from these pairs.",
            name="train",
            split="calibration",
            limit=1024,
            zero_shot="",
        ),
        TEST: _SET.format(
            what="Evaluation: everything is measured on these quadruples, which the edit never saw.",
            name="test",
            split="test",
            limit=1000,
            zero_shot=f"zero_shot = {shipped_sets}\n{_OWN_ZERO_SHOT}",
        ),
        f"{name}.toml": _RECIPE + _recipe(name),
        POLICY: _POLICY + _named(policy, "default", "policy"),
        CI: _CI.format(bundle=f"dist/{name}", policy=shlex.quote(_in_repository(folder / POLICY))),
    }


def _recipe(name: str) -> str:
    """The demo's recipe under another name, on the sets of the project."""
    text = _named(_TRAIN.sub("", _after_comments(read_toml("export", "demo")[0])), "demo", name)
    return _DATA_OF_DEMO.sub(lambda _: _DATA.format(train=TRAIN, test=TEST), text)


def _in_repository(file: Path) -> str:
    """Path of a file from the working folder, where a repository begins, or from the folder that the project lies in."""
    path = file.resolve()
    base = Path.cwd() if path.is_relative_to(Path.cwd()) else path.parents[1]
    return path.relative_to(base).as_posix()


_DATA_OF_DEMO = re.compile(r"\[data\]\n(?:\w+ = .*\n)+")

_TRAIN = re.compile(r"\n(?:#[^\n]*\n)*\[train\]\n[^\[]*")
"""Settings that were chosen for the demo's own training; a recipe without them has the published ones."""


def _after_comments(text: str) -> str:
    """A file without the comments that it begins with."""
    lines = text.splitlines(keepends=True)
    while lines and lines[0].startswith("#"):
        del lines[0]
    return "".join(lines)


def _named(text: str, old: str, new: str) -> str:
    """A file under another name; a name must be its file's."""
    line = f'name = "{old}"'
    assert line in text
    return text.replace(line, f'name = "{new}"', 1)
