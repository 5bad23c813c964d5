"""One small build of the demo, for the test files that look at what it left."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from tests.uwm_edit import UWM
from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.report.console import Reporter


def build_small(factory: pytest.TempPathFactory) -> tuple[Request, Outcome]:
    """A build into a folder of its own: 96 quadruples to calibrate, 240 and 210 images to measure.

    The work is done once per run of the tests: whoever comes first leaves its stages for the others, which take them over.
    """
    folder, shared = factory.mktemp("build"), _shared(factory) / "small-build"
    with (shared.parent / "small-build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():
            making = shared.with_name("small-build.making")
            making.mkdir()
            run(_request(making), until="package", reporter=Reporter(quiet=True))
            making.rename(shared)
    shutil.copytree(shared / "work", folder / "work")
    request = _request(folder)
    return request, run(request, until="package", reporter=Reporter(quiet=True))


def _shared(factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests; its workers have one each, side by side."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def _request(folder: Path) -> Request:
    for name, split, limit in (("cal", "calibration", 96), ("eval", "test", 240)):
        zero_shot = 'zero_shot = ["colour"]\nzero_shot_limit = 210\n' if name == "eval" else ""
        text = f'format = 1\nname = "{name}"\nsource = "demo"\nsplit = "{split}"\nlimit = {limit}\n{zero_shot}'
        (folder / f"{name}.toml").write_text(text)
    return Request(
        **UWM,
        calibration=str(folder / "cal.toml"),
        evaluation=str(folder / "eval.toml"),
        policy="demo",
        out=folder / "bundle",
        work=folder / "work",
    )
