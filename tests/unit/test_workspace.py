"""Atomic files, whole folders, locks and reuse."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from uwm_deploy.errors import InputError
from uwm_deploy.pipeline.folder import current, stamp
from uwm_deploy.records.files import locked, whole_folder, write_atomic


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    """A stage folder appears with all its files when the block ends."""
    with whole_folder(tmp_path / "stage") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "stage").exists()
    assert (tmp_path / "stage" / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["stage"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    """An error inside the block keeps the previous folder and leaves no temporary one."""
    with whole_folder(tmp_path / "stage") as folder:
        (folder / "a").write_text("old")

    def fails() -> None:
        with whole_folder(tmp_path / "stage") as folder:
            (folder / "a").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert (tmp_path / "stage" / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["stage"]


def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    """After kill -9 in the middle, the folder does not exist and the next locked run clears the remains."""
    code = (
        "import os, signal, sys; from pathlib import Path; from uwm_deploy.records.files import locked, whole_folder\n"
        "root = Path(sys.argv[1])\n"
        "with locked(root), whole_folder(root / 'stage') as folder:\n"
        "    (folder / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "stage").exists()
    assert list(tmp_path.glob(".tmp-*"))
    with locked(tmp_path):
        assert not list(tmp_path.glob(".tmp-*"))


def test_reuse_needs_equal_inputs_and_equal_files(tmp_path: Path) -> None:
    """A stage is current only with the same inputs and its own bytes untouched."""
    with whole_folder(tmp_path / "stage") as folder:
        (folder / "a").write_text("1")
        stamp(folder, {"weights": "x"})
    assert current(tmp_path / "stage", {"weights": "x"})
    assert not current(tmp_path / "stage", {"weights": "y"})
    (tmp_path / "stage" / "a").write_text("2")
    assert not current(tmp_path / "stage", {"weights": "x"})


def test_an_added_file_ends_reuse(tmp_path: Path) -> None:
    """A file that the stage did not write makes it not current."""
    with whole_folder(tmp_path / "stage") as folder:
        stamp(folder, {})
    (tmp_path / "stage" / "extra").write_text("")
    assert not current(tmp_path / "stage", {})


def test_two_builds_in_one_folder_are_refused(tmp_path: Path) -> None:
    """The second build gets one clear line."""
    with locked(tmp_path), pytest.raises(InputError, match="another build"), locked(tmp_path):
        pass


def test_a_file_in_the_way_is_a_clear_error(tmp_path: Path) -> None:
    """A path below a plain file cannot be written, and the error says so."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="in the way"):
        write_atomic(tmp_path / "file" / "x", b"")


def test_a_full_disk_is_a_clear_error() -> None:
    """No space left becomes one line with exit code 6, not a traceback."""
    from uwm_deploy.errors import ExitCode, PrerequisiteError
    from uwm_deploy.records.machine import disk_errors

    def fill() -> None:
        with disk_errors(Path("/dev/full")), open("/dev/full", "wb", buffering=0) as stream:
            stream.write(b"x")

    with pytest.raises(PrerequisiteError, match="no space left") as caught:
        fill()
    assert caught.value.exit_code is ExitCode.ENVIRONMENT
