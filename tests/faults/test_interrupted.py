"""A build that is ended by a signal leaves nothing half-written, and the next one goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.uwm_edit import UWM_OPTIONS
from uwm_deploy.cli import cli
from uwm_deploy.edits import sharded_sums

ROOT = Path(__file__).parents[2]
CHILD = """
import sys
from uwm_deploy.edits import sharded_sums
sharded_sums.SHARD_PAIRS = 8
from uwm_deploy.cli import main
main(sys.argv[1:])
"""
"""The command line with small shards, so that a small set has several."""

PAIRS, SHARDS = 8, 8


def _command(folder: Path, shards: int = SHARDS) -> list[str]:
    for name, split, limit in (("cal", "calibration", PAIRS * shards), ("eval", "test", 40)):
        text = f'format = 1\nname = "{name}"\nsource = "demo"\nsplit = "{split}"\nlimit = {limit}\n'
        (folder / f"{name}.toml").write_text(text)
    (folder / "policy.toml").write_text(
        'format = 1\nname = "policy"\nedit = []\n[[artifact]]\nmetric = "parity.cosine_min"\nat_least = 0.9999\nmin_n = 32\n'
    )
    (folder / "child.py").write_text(CHILD)
    sets = ["--calibration", str(folder / "cal.toml"), "--evaluation", str(folder / "eval.toml"), "--workers", "0"]
    where = ["--work", str(folder / "work"), "--out", str(folder / "out"), "--policy", str(folder / "policy.toml")]
    command = [
        sys.executable,
        str(folder / "child.py"),
        "build",
        "--json",
        "--target",
        "onnxruntime",
        "--device",
        "cpu",
    ]
    return [*command, *UWM_OPTIONS, *sets, *where]


def _interruptible() -> None:
    """A shell that runs the tests in the background lets them ignore Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ended(command: list[str], when: Callable[[], bool], with_signal: signal.Signals) -> str:
    """Starts a build and sends it a signal as soon as something is there; what it had written to standard error."""
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True, preexec_fn=_interruptible,
    )  # fmt: skip
    while process.poll() is None and not when():
        time.sleep(0.001)
    os.killpg(process.pid, with_signal)
    _, errors = process.communicate()
    assert "Traceback" not in errors
    assert process.returncode == (130 if with_signal is signal.SIGINT else -with_signal)
    return errors


def _stages(work: Path) -> set[str]:
    return {path.name for path in work.iterdir() if not path.name.startswith(".")}


@pytest.mark.slow
def test_an_ended_build_resumes(tmp_path: Path) -> None:
    """Killed within a stage, it resumes after the last whole shard; interrupted, after the last whole stage; then it passes.

    That this gives the very bits of a run that was never ended is tested without signals, in `test_scale` and `test_fit`.
    """
    command, work = _command(tmp_path), tmp_path / "work"
    _ended(command, (work / ".scoring" / "image-0000.safetensors").exists, signal.SIGKILL)
    assert _stages(work) == set()
    lines = _ended(command, (work / "edit" / "stage.json").exists, signal.SIGINT).splitlines()
    resumed = [line.partition(": resumed after ") for line in lines if ": resumed after " in line]
    assert [name for name, _, _ in resumed] == ["text", "image"]
    assert [1 <= int(rest.split()[0]) <= SHARDS for _, _, rest in resumed] == [True, True]
    done = _stages(work)
    assert {"score", "edit"} <= done
    assert all((work / name / "stage.json").is_file() for name in done)
    assert not (tmp_path / "out").exists()
    record = json.loads((work / "score" / "score.json").read_text())
    assert record["n_pairs"] == {"text": PAIRS * SHARDS, "image": PAIRS * SHARDS}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    last = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result = json.loads(last.stdout)
    assert done <= set(result["reused"])
    assert result["verdict"]["result"] == "pass"
    assert not [path for path in work.iterdir() if path.name.startswith(".tmp-")]


def test_interrupted_scoring_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between two shards: one line, exit code 130, no stage; the same command goes on after the last whole shard."""
    _command(tmp_path, shards=3)
    work = tmp_path / "work"
    arguments = ["score", "--calibration", str(tmp_path / "cal.toml"), "--method", "uwm", "--work", str(work)]
    arguments += ["--device", "cpu", "--workers", "0"]
    command = [sys.executable, str(tmp_path / "child.py"), *arguments]
    _ended(command, (work / ".scoring" / "image-0000.safetensors").exists, signal.SIGINT)
    assert _stages(work) == set()
    monkeypatch.setattr(sharded_sums, "SHARD_PAIRS", PAIRS)
    last = CliRunner().invoke(cli, arguments)
    assert last.exit_code == 0, last.output
    assert last.stderr.count(": resumed after ") == 2
    assert _stages(work) == {"score"}
