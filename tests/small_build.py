"""One small build of the demo, for the test files that look at what it left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.made_once import copy_of, made_once
from tests.uwm_edit import UWM
from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.report.console import Reporter


def build_small(factory: pytest.TempPathFactory) -> tuple[Request, Outcome]:
    """A build into a folder of its own: 96 quadruples to calibrate, 240 and 210 images to measure.

    Its stages are made once per run of the tests and taken over here.
    """
    folder = factory.mktemp("build")
    copy_small_work(factory, folder / "work")
    request = _request(folder)
    return request, run(request, until="package", reporter=Reporter(quiet=True))


def copy_small_work(factory: pytest.TempPathFactory, to: Path) -> None:
    """The stages of that build, for one that shares its edit and is measured or compiled in another way.

    Args:
        factory: Of temporary folders of this worker.
        to: The run folder.
    """
    made = made_once(
        factory, "small-build", lambda to: run(_request(to), until="package", reporter=Reporter(quiet=True))
    )
    copy_of(made / "work", to)


def write_sets(folder: Path, calibration: int = 96, evaluation: int = 240, zero_shot: int = 210) -> None:
    """The data sets of the build, as files; so many quadruples and images each."""
    for name, split, limit in (("cal", "calibration", calibration), ("eval", "test", evaluation)):
        labelled = f'zero_shot = ["colour"]\nzero_shot_limit = {zero_shot}\n' if name == "eval" else ""
        text = f'format = 1\nname = "{name}"\nsource = "demo"\nsplit = "{split}"\nlimit = {limit}\n{labelled}'
        (folder / f"{name}.toml").write_text(text)


def _request(folder: Path) -> Request:
    write_sets(folder)
    return Request(
        **UWM,
        calibration=str(folder / "cal.toml"),
        evaluation=str(folder / "eval.toml"),
        policy="demo",
        out=folder / "bundle",
        work=folder / "work",
    )
