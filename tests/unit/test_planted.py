"""What somebody has planted beside a bundle, or a long name: one clear line, and nothing outside is touched."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.unit.test_machine_failures import no_more_files
from tests.unit.test_report import make, write_bundle
from tests.unit.test_signature import write_keys
from uwm_deploy.cli import cli
from uwm_deploy.errors import InputError, PrerequisiteError
from uwm_deploy.graphs.timing_cache import _alone
from uwm_deploy.records.files import locked, write_atomic
from uwm_deploy.records.locks import hold, release
from uwm_deploy.records.replacing import replacing, workplace_of
from uwm_deploy.records.verdict import Result


def _link(place: Path) -> Path:
    """A link at a place that leads to a file with something in it."""
    victim = place.parent.parent / "victim"
    victim.write_text("precious")
    place.symlink_to(victim)
    return victim


def _timing(folder: Path) -> None:
    with _alone(folder / "times.cache"):
        pass


def _build(folder: Path) -> None:
    with locked(folder):
        pass


def _lock(folder: Path) -> None:
    lock = hold(folder / "x.lock", "busy", "wait")
    assert lock is not None
    release(lock)


def _bundle(folder: Path) -> None:
    with replacing(folder.parent / "b"):
        pass


PLACES = {"times.lock": _timing, ".lock": _build, "x.lock": _lock, "in a workplace": _bundle}


@pytest.mark.timeout(20)  # a lock that follows a link waits for a file that never comes
@pytest.mark.parametrize("planted", ["link", "dangling", "folder"])
@pytest.mark.parametrize("name", PLACES)
def test_a_lock_follows_no_link_and_empties_no_file(name: str, planted: str, tmp_path: Path) -> None:
    """A link's target stays as it is, or is not made; the message names what is in the way."""
    folder = tmp_path / (".tmp-b" if name == "in a workplace" else "run")
    folder.mkdir()
    place = folder / (".lock" if name == "in a workplace" else name)
    if planted == "folder":
        place.mkdir()
    elif planted == "link":
        _link(place)
    else:
        place.symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="is in the way") as caught:
        PLACES[name](folder)
    assert str(place) in caught.value.what
    victim = tmp_path / "victim"
    assert victim.exists() == (planted == "link")
    assert not victim.exists() or victim.read_text() == "precious"


def test_a_lock_that_is_there_keeps_its_content(tmp_path: Path) -> None:
    """Somebody's file of the same name is not emptied."""
    (tmp_path / "times.lock").write_text("precious")
    _timing(tmp_path)
    assert (tmp_path / "times.lock").read_text() == "precious"


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff\xfe", b"9" * 5000, b"12\n", b"-1", "²".encode()])
def test_a_workplace_with_a_garbled_note_is_cleared(content: bytes, tmp_path: Path) -> None:
    """Nobody knows what it replaced, so nothing counts as finished: the work is done again."""
    (tmp_path / "b").mkdir()
    (folder := workplace_of(tmp_path / "b")).mkdir()
    (folder / "replaces").write_bytes(content)
    with replacing(tmp_path / "b") as place:
        assert not place.finished
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_lock_that_cannot_be_made_leaves_no_workplace(tmp_path: Path) -> None:
    """As without a descriptor: exit code 6, and nothing beside the bundle."""
    (tmp_path / "b").mkdir()
    with no_more_files(), pytest.raises(PrerequisiteError, match="too many files are open"), replacing(tmp_path / "b"):
        pass
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("name", ["b" * 252, "ü" * 126, "b" * 255])
def test_a_long_name_can_be_written(name: str, tmp_path: Path) -> None:
    """A file system takes 255 bytes; what lies beside a folder or a file has a name, too."""
    made = make()
    bundle = write_bundle(made, tmp_path / "s", verdict=dataclasses.replace(made.verdict(), result=Result.PASS))
    bundle = bundle.rename(tmp_path / name)
    key, _ = write_keys(tmp_path, "key")
    result = CliRunner().invoke(cli, ["sign", str(bundle), "--key", str(key)])
    assert result.exit_code == 0, result.output
    write_atomic(tmp_path / f"{name[:-1]}x", "x")
    assert (tmp_path / f"{name[:-1]}x").read_text() == "x"
    assert not [path for path in os.listdir(tmp_path) if path.startswith(".tmp-")]


@pytest.mark.parametrize("words", [["inspect"], ["gate"], ["report"], ["data", "check"], ["models", "--json", "--x"]])
def test_a_name_that_no_file_can_have_is_bad_input(words: list[str], tmp_path: Path) -> None:
    """Exit code 2 and one line."""
    result = CliRunner().invoke(cli, [*words, str(tmp_path / ("b" * 300))])
    assert (result.exit_code, "internal" in result.output) == (2, False), result.output
