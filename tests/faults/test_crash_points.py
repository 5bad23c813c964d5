"""A kill before each file operation: the bundle opens as the old or the new one, the same command then does its work."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.faults.crash_points import FAULTS
from tests.small_build import build_small, write_sets
from tests.unit.test_migrate import BEFORE, _unit_rows
from tests.unit.test_report import make, write_bundle
from tests.unit.test_resigning import waiting_bundle
from tests.unit.test_signature import write_keys
from tests.uwm_edit import UWM_OPTIONS
from uwm_deploy.bundle.open import is_bundle, open_bundle
from uwm_deploy.bundle.sign import sign_bundle
from uwm_deploy.errors import InputError
from uwm_deploy.pipeline.save import edited_at
from uwm_deploy.records.replacing import replacing, workplace_of
from uwm_deploy.records.verdict import Result
from uwm_deploy.report.inspection import describe
from uwm_deploy.studies.build_files import build_files
from uwm_deploy.studies.subjects import Subject

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
KILLED = ("sign", "baseline set", "attest", "refit", "embed", "triton", "migrate", "build")
"""Rows of the page's table of kills."""

FAULTY = ("sign", "verify-signature", "baseline set", "attest", "refit", "embed", "triton", "migrate", "build")
"""Rows of its table of faults."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """A folder with a bundle, and where commands find a copy of it.

    Attributes:
        template: The folder as it is.
        folder: The copy.
    """

    template: Path
    folder: Path
    policy: str

    def job(self, name: str, *words: object, shown: str = "bundle", **more: Any) -> dict[str, Any]:
        """A command for `tests.faults.crash_points`; paths are relative to the folder."""
        job = {"name": name, "template": str(self.template), "folder": str(self.folder), "shown": shown}
        return job | {"words": [str(word) for word in words]} | more


def stopped(*jobs: dict[str, Any]) -> None:
    """Stops each job at its operations; nothing is lost, nothing is left, and the same command does its work."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.crash_points"],
        input=json.dumps(jobs), stdout=subprocess.PIPE, text=True, env=environment, check=True,
    )  # fmt: skip
    for row in json.loads(done.stdout):
        lost = sum("neither old nor new" in what for _, what in row["wrong"])
        cells = (row["name"], len(row["operations"]), row["stopped"], row["old"], row["new"], lost)
        print("| " + " | ".join(map(str, cells)) + " |")  # the page's table, with -s
        assert row["code"] == row["ends"], row["output"]
        assert row["wrong"] == []
        assert row["stopped"] >= 5


@pytest.fixture
def tiny(tmp_path: Path) -> Scene:
    """A bundle of kilobytes that holds records alone, a folder for a baseline, and stored embeddings."""
    (template := tmp_path / "template").mkdir()
    made = make()
    write_bundle(made, template / "bundle", verdict=dataclasses.replace(made.verdict(), result=Result.PASS))
    key, _ = write_keys(template, "key")
    shutil.copytree(template / "bundle", template / "signed")
    sign_bundle(template / "signed", key)
    (template / "baseline").mkdir()
    np.save(template / "rows.npy", _unit_rows(24))
    (template / "rows.json").write_text(json.dumps({"tower": "image", "space": BEFORE}))
    return Scene(template, tmp_path / "run", "")


def test_a_kill_before_any_operation_loses_nothing(tiny: Scene) -> None:
    """Signing, a baseline in a bundle and in a folder, a migrated store; with and without exchange of names."""
    stopped(
        tiny.job("sign", "sign", "bundle", "--key", "key.pem", whole=True),
        tiny.job("baseline set", "accept", "bundle", "bundle", most=12),
        tiny.job("baseline set, two renames", "accept", "bundle", "bundle", without_exchange=True, most=12),
        tiny.job("baseline set, folder", "accept", "bundle", "baseline", shown="baseline/baseline.json"),
        tiny.job("migrate", "migrate-store", "rows.npy", "new.npy", shown="new.npy", most=10),
    )


def test_a_bundle_without_a_name_for_a_moment_is_a_bundle(tiny: Scene) -> None:
    """Where a process was killed between two renames, nothing is put in the place of the bundle, and readers find it."""
    place = tiny.template / "bundle"
    (beside := workplace_of(place)).mkdir()
    assert not is_bundle(beside)
    place.rename(beside / "old")
    assert is_bundle(place)
    assert Subject(label="it", model=str(place)).is_bundle
    assert describe(place)["bundle"] == open_bundle(beside / "old", allow_failed=True).manifest.name
    assert build_files(place).name == open_bundle(beside / "old", allow_failed=True).manifest.name
    with pytest.raises(InputError, match="is a bundle"):
        edited_at(place)
    shutil.rmtree(beside / "old")
    assert not is_bundle(place)


def _fails(folder: Path, *, placed: bool) -> None:
    """Puts another folder in its place, and fails before or after."""
    with replacing(folder) as place:
        with place.whole() as new:
            (new / "file").touch()
            if not placed:
                raise OSError("now")
        raise OSError("now")


@pytest.mark.parametrize("placed", [False, True])
def test_a_failure_after_the_new_folder_is_in_place_leaves_it_as_a_kill_would(tmp_path: Path, placed: bool) -> None:
    """The next command knows that the work is done, and clears up; one that failed before has left nothing to know."""
    (folder := tmp_path / "bundle").mkdir()
    with pytest.raises(OSError, match="now"):
        _fails(folder, placed=placed)
    assert (folder / "file").exists() == placed
    assert workplace_of(folder).exists() == placed
    with replacing(folder) as place:
        assert place.finished == placed
    assert not workplace_of(folder).exists()


def test_a_fault_in_any_operation_is_told_and_costs_nothing(tiny: Scene) -> None:
    """Errors of a disk, of limits and of memory, at whatever is read or written: exit code 6, one line, and no trace."""
    stopped(
        tiny.job("sign", "sign", "bundle", "--key", "key.pem", faults=True, most=12),
        tiny.job(
            "verify-signature", "verify-signature", "signed", "--public-key", "key.pub", shown="signed", faults=True
        ),
        tiny.job("migrate", "migrate-store", "rows.npy", "new.npy", shown="new.npy", faults=True, most=9),
    )


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The bundle of the small build, plain, signed, and with a variant that waits for evidence; and texts to embed."""
    built = build_small(tmp_path_factory)
    assert built[0].out is not None
    template = tmp_path_factory.mktemp("template")
    key, _ = write_keys(template, "key")
    for name in ("plain", "signed"):
        shutil.copytree(built[0].out, template / name)
    sign_bundle(template / "signed", key)
    waiting_bundle(built, key, template / "waiting")
    lines = [json.dumps({"key": f"k{n}", "text": f"a red circle {n}"}) for n in range(12)]
    (template / "texts.jsonl").write_text("\n".join(lines))
    return Scene(template, tmp_path_factory.mktemp("copies") / "run", built[0].policy)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("faults", [False, True])
@pytest.mark.parametrize("name", ["sign", "verify-signature", "baseline set", "attest", "refit", "embed", "triton"])
def test_every_operation_of_a_command_on_a_real_bundle(scene: Scene, name: str, faults: bool) -> None:
    """On real bundles: what signs them, what executes them, what serves them, and what puts another edit in."""
    judged = ["--policy", scene.policy, "--key", "key.pem"]
    accept = ["--by", "jo", "--reason", "1.0", *judged]
    embed = ["--kind", "texts", "--out", "rows", "--part-rows", 4, "--batch", 2]
    words, more = {
        "sign": (["sign", "plain", "--key", "key.pem"], {"shown": "plain"}),
        "verify-signature": (["verify-signature", "signed", "--public-key", "key.pub"], {"shown": "signed"}),
        "baseline set": (["baseline", "set", "signed", "--at", "signed", *accept], {"shown": "signed"}),
        "attest": (["attest", "waiting", "--workers", 0, *judged], {"shown": "waiting"}),
        "refit": (["refit", "signed", "--revert", "--workers", 0, *judged], {"shown": "signed", "ends": 3}),
        "embed": (["embed", "signed", "texts.jsonl", *embed], {"shown": "rows", "rows": 12}),
        "triton": (["triton", "signed", "models"], {"shown": "models"}),
    }[name]
    if faults or name != "verify-signature":  # which changes nothing
        stopped(scene.job(name, *words, faults=faults, whole=True, **more))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("faults", [False, True])
def test_every_operation_of_a_migration(tiny: Scene, faults: bool) -> None:
    """Stored embeddings that move into another space."""
    stopped(tiny.job("migrate", "migrate-store", "rows.npy", "new.npy", shown="new.npy", faults=faults, whole=True))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("faults", [False, True])
def test_every_operation_of_a_build(tmp_path: Path, faults: bool) -> None:
    """A build from nothing: what was stopped goes on, and ends with the bundle of one that was not."""
    (template := tmp_path / "template").mkdir()
    write_sets(template, calibration=16, evaluation=100, zero_shot=20)
    places = ["--calibration", "cal.toml", "--evaluation", "eval.toml", "--work", "work", "--out", "bundle"]
    words = ["build", *UWM_OPTIONS, "--policy", "demo", "--workers", 0, "--target", "onnxruntime", *places]
    scene = Scene(template, tmp_path / "run", "demo")
    stopped(scene.job("build", *words, faults=faults, whole=True))


def _table(title: str) -> list[list[str]]:
    """Rows of the page's table below a heading, without its head."""
    text = PAGE.read_text().split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


@pytest.mark.parametrize(("title", "names", "each"), [("Kills", KILLED, 1), ("Faults", FAULTY, len(FAULTS))])
def test_the_page_has_a_row_for_every_command(title: str, names: tuple[str, ...], each: int) -> None:
    """As the slow tests print them: every operation was stopped, what it left is old or new, and nothing is lost."""
    rows = _table(title)
    assert tuple(row[0] for row in rows) == names
    for name, *numbers in rows:
        operations, stops, old, new, lost = map(int, numbers)
        assert (old + new, lost) == (stops, 0), name
        assert stops == operations * each, name


def test_the_page_has_a_row_for_every_reader() -> None:
    """At least 20,000 broken files, no finding, no process that ended by itself, and less than 1 GB each."""
    from tests.faults.fuzz_readers import NAMES

    rows = _table("Broken files")
    assert tuple(row[0] for row in rows) == NAMES
    assert sum(int(row[1]) for row in rows) >= 20_000
    assert all((row[2], row[3]) == ("0", "0") and int(row[4]) < 1000 for row in rows)
