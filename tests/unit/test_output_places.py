"""Where results and errors go: devices, pipes and links as they are, and an output that takes nothing."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.unit.test_report import make, write_bundle
from uwm_deploy.cli import cli
from uwm_deploy.errors import InputError
from uwm_deploy.records.files import _is_open_already, write_atomic, write_output
from uwm_deploy.records.places import refuse_foreign


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one that is not for serving."""
    return write_bundle(make(), tmp_path_factory.mktemp("made") / "tiny")


def test_a_pipe_and_a_link_stay_what_they_are(bundle: Path, tmp_path: Path) -> None:
    """As a shell writes to them; the file behind a link is written, and the link is still one."""
    fifo, link, behind = tmp_path / "fifo", tmp_path / "link", tmp_path / "behind.sarif"
    os.mkfifo(fifo)
    behind.write_text("old")
    link.symlink_to("behind.sarif")
    took: list[str] = []
    reader = threading.Thread(target=lambda: took.append(fifo.read_text()), daemon=True)
    reader.start()
    words = ["gate", str(bundle), "--policy", "demo", "--markdown", str(fifo), "--sarif", str(link)]
    result = CliRunner().invoke(cli, words)
    reader.join(10)
    assert result.exit_code in (0, 3), result.output
    assert took[0].startswith("#")
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert link.is_symlink()
    assert '"runs"' in behind.read_text()


def test_standard_output_that_is_a_file_is_not_emptied(tmp_path: Path) -> None:
    """`> out.txt` with `--markdown /dev/stdout`: what stands there already stays.

    By its name in /proc, where no broken code can put a file in the place of the machine's own.
    """
    code = "from pathlib import Path; from uwm_deploy.records.files import _is_open_already, write_output as w; "
    code += "print('first', flush=True); w(Path('/proc/self/fd/1'), 'second\\n')"
    with (tmp_path / "out.txt").open("a") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out.txt").read_text() == "first\nsecond\n"


@pytest.mark.parametrize("kind", ["fifo", "socket"])
def test_a_record_never_takes_the_place_of_a_pipe(kind: str, tmp_path: Path) -> None:
    """A file of a run folder or a data set: nobody wants a pipe there, and waiting for a reader would take for ever."""
    place = tmp_path / "record.json"
    if kind == "fifo":
        os.mkfifo(place)
    else:
        os.mknod(place, stat.S_IFSOCK | 0o600)
    with pytest.raises(InputError, match=r"record\.json is in the way: it is no plain file"):
        write_atomic(place, "x")
    assert os.listdir(tmp_path) == ["record.json"]
    assert not place.is_file()


def test_a_file_that_is_not_there_is_made_with_its_folder(tmp_path: Path) -> None:
    """As every other file that is written."""
    write_output(tmp_path / "new" / "file", b"x")
    assert (tmp_path / "new/file").read_bytes() == b"x"


@pytest.mark.parametrize("way", ["full", "closed"])
@pytest.mark.parametrize(("words", "code"), [(["inspect", "nothing"], 2), (["no-such-command"], 2)])
def test_the_exit_code_needs_no_standard_error(way: str, words: list[str], code: int, tmp_path: Path) -> None:
    """A full disk under a log, or no log at all."""
    to = {"full": "2>/dev/full", "closed": "2>&-"}[way]
    line = f'exec "$0" -m uwm_deploy.cli {" ".join(words)} {to}'
    done = subprocess.run(["sh", "-c", line, sys.executable], cwd=tmp_path, stdout=subprocess.PIPE)
    assert done.returncode == code


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["build", "--help"]])
def test_help_that_nobody_can_read_is_no_internal_error(words: list[str]) -> None:
    """A full disk is the machine's failure, in one line; a reader who has read enough is told nothing."""
    command = " ".join(["-m", "uwm_deploy.cli", *words])
    full = subprocess.run(
        ["sh", "-c", f'exec "$0" {command} >/dev/full', sys.executable], capture_output=True, text=True
    )
    assert full.returncode == 6
    [line] = full.stderr.splitlines()
    assert line.startswith("error: ")
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        gone = subprocess.run([sys.executable, *command.split()], stdout=closed, stderr=subprocess.PIPE, text=True)
    assert gone.stderr == ""


def test_a_file_that_is_named_by_way_of_dev_is_a_file(tmp_path: Path) -> None:
    """It is replaced, and not written behind what it holds."""
    (tmp_path / "file").write_text("old")
    write_output(Path(f"/dev/..{tmp_path}/file"), "new")
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("words", [["report", "/"], ["inspect", "/"], ["sign", "/", "--key", "none"], ["migrate", "/"]])
def test_the_root_is_no_bundle(words: list[str]) -> None:
    """It has no name, and nothing lies beside it."""
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: "), result.output


def test_a_working_folder_that_was_removed_is_said(tmp_path: Path) -> None:
    """Python's own error names no file."""
    (tmp_path / "gone").mkdir()
    line = 'cd gone && rmdir ../gone && exec "$0" -m uwm_deploy.cli init project'
    done = subprocess.run(["sh", "-c", line, sys.executable], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.startswith("error: ")) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("/dev/stdout", True),
        ("/dev/stderr", True),
        ("/dev/fd/3", True),
        ("/proc/self/fd/3", True),
        ("/dev/../dev/stdout", True),
        ("/dev/shm/results.json", False),
        ("/dev/fd/../shm/results.json", False),
    ],
)
def test_names_of_what_is_open_already(path: str, known: bool) -> None:
    """Only these are written behind what they hold; a file in shared memory is a file. Nothing is opened here."""
    assert _is_open_already(Path(path)) is known


def test_a_folder_with_anything_else_in_it_is_never_replaced(tmp_path: Path) -> None:
    """An empty one is, and one with the mark of its kind."""
    refuse_foreign(tmp_path, "mark", "is no such folder")
    (tmp_path / "mine").write_text("")
    with pytest.raises(InputError, match="exists and is no such folder"):
        refuse_foreign(tmp_path, "mark", "is no such folder")
    (tmp_path / "mark").write_text("")
    refuse_foreign(tmp_path, "mark", "is no such folder")
