"""One small set, and one small training run of each method that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from uwm_deploy.records.training import Trainer, TrainingRecord
from uwm_deploy.report.console import Reporter
from uwm_deploy.training.trainer import TrainRequest, train

SHORT = {"batch": 16, "rate": 3e-3, "validation_share": 0.34}


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> str:
    """48 quadruples of the drawn world."""
    path = tmp_path_factory.mktemp("set") / "small.toml"
    path.write_text('format = 1\nname = "small"\nsource = "demo"\nsplit = "calibration"\nlimit = 48\n')
    return str(path)


def request_for(method: Trainer, folder: Path, calibration: str, epochs: int, **changed: object) -> TrainRequest:
    """A run of seconds."""
    return TrainRequest(
        method=method,
        changed={**SHORT, "epochs": epochs, **changed},
        out=folder / "model",
        work=folder / "work",
        calibration=calibration,
        device="cpu",
        workers=0,
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, small_set: str) -> dict[Trainer, tuple[Path, TrainingRecord]]:
    """Folder and record of each method, two epochs."""
    found = {}
    for method in Trainer:
        request = request_for(method, tmp_path_factory.mktemp(method.value), small_set, 2)
        found[method] = (request.out, train(request, Reporter(quiet=True)))
    return found
