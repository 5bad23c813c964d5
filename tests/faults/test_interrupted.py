"""A build that is killed in any stage leaves nothing half-written, and the next one resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.uwm_edit import UWM_OPTIONS

ROOT = Path(__file__).parents[2]


def _command(folder: Path) -> list[str]:
    for name, split, limit in (("cal", "calibration", 64), ("eval", "test", 64)):
        text = f'format = 1\nname = "{name}"\nsource = "demo"\nsplit = "{split}"\nlimit = {limit}\n'
        (folder / f"{name}.toml").write_text(text)
    (folder / "policy.toml").write_text(
        'format = 1\nname = "x"\nedit = []\n[[artifact]]\nmetric = "parity.cosine_min"\nat_least = 0.9999\nmin_n = 32\n'
    )
    sets = ["--calibration", str(folder / "cal.toml"), "--evaluation", str(folder / "eval.toml")]
    where = ["--work", str(folder / "work"), "--out", str(folder / "out"), "--policy", str(folder / "policy.toml")]
    command = [sys.executable, "-m", "uwm_deploy.cli", "build", "--json", "--target", "onnxruntime"]
    return [*command, *UWM_OPTIONS, *sets, *where]


def _interruptible() -> None:
    """A shell that runs the tests in the background lets them ignore Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _killed_at(command: list[str], stage: str, with_signal: signal.Signals) -> None:
    """Starts a build and sends it a signal as soon as a stage begins."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment, start_new_session=True,
        preexec_fn=_interruptible,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(stage) and line.rstrip().endswith("..."):
            os.killpg(process.pid, with_signal)
            break
    rest = process.stderr.read()
    process.wait()
    assert "Traceback" not in rest
    assert process.returncode == (130 if with_signal is signal.SIGINT else -with_signal)


def test_killed_builds_resume(tmp_path: Path) -> None:
    """Ended in one stage after the other, every finished stage is whole and reused, and no half folder has a name."""
    command = _command(tmp_path)
    done: list[str] = []
    for stage, with_signal in (("score", signal.SIGKILL), ("export", signal.SIGINT), ("verify", signal.SIGKILL)):
        _killed_at(command, stage, with_signal)
        names = {p.name for p in (tmp_path / "work").iterdir() if not p.name.startswith(".")}
        assert stage not in names
        for name in names:
            assert (tmp_path / "work" / name / "stage.json").is_file()
        assert not (tmp_path / "out").exists()
        assert set(done) <= names
        done = sorted(names)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    last = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result = json.loads(last.stdout)
    assert set(done) <= set(result["reused"])
    assert {"score", "edit"} <= set(done)
    assert result["verdict"]["result"] == "pass"
    assert not [p for p in (tmp_path / "work").iterdir() if p.name.startswith(".tmp-")]


def test_scoring_resumes_after_the_last_whole_shard(tmp_path: Path) -> None:
    """Ended twice within the images, once by each signal, it goes on each time, to the scores of one that was not."""
    (tmp_path / "cal.toml").write_text(
        'format = 1\nname = "cal"\nsource = "demo"\nsplit = "calibration"\nlimit = 320\n'
    )
    (tmp_path / "child.py").write_text(
        "import sys\nfrom uwm_deploy.edits import sharded_sums\nsharded_sums.SHARD_PAIRS = 32\n"
        "from uwm_deploy.cli import main\nmain(sys.argv[1:])\n"
    )
    options = ["--calibration", str(tmp_path / "cal.toml"), "--workers", "0", "--device", "cpu", *UWM_OPTIONS, "--work"]
    command = [sys.executable, str(tmp_path / "child.py"), "score", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    work, resumed = tmp_path / "work", []
    for with_signal in (signal.SIGKILL, signal.SIGINT):
        _killed_when_totals_change([*command, str(work)], work / ".scoring" / "image-0000.safetensors", with_signal)
        assert {p.name for p in work.iterdir() if not p.name.startswith(".")} == set()
    for folder in (work, tmp_path / "whole"):
        done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=True, env=environment)
        resumed.append([line for line in done.stderr.splitlines() if "resumed after" in line])
    assert resumed[0][0] == "text: resumed after 10 of 10 shards"
    assert 2 <= int(resumed[0][1].removeprefix("image: resumed after ").split()[0]) < 10
    assert resumed[1] == []
    assert {p.name for p in work.iterdir()} == {".lock", "score"}
    first, second = ((folder / "score" / "scores.safetensors").read_bytes() for folder in (work, tmp_path / "whole"))
    assert first == second


def _killed_when_totals_change(command: list[str], totals: Path, with_signal: signal.Signals) -> None:
    """Starts a run and sends it a signal as soon as a shard has been added to the totals."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    before = totals.stat().st_ino if totals.exists() else 0
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment, preexec_fn=_interruptible
    )  # fmt: skip
    while process.poll() is None and (not totals.exists() or totals.stat().st_ino == before):
        time.sleep(0.001)
    process.send_signal(with_signal)
    _, errors = process.communicate()
    assert "Traceback" not in errors
    assert process.returncode == (130 if with_signal is signal.SIGINT else -with_signal)
