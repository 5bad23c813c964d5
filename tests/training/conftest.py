"""One small set, and one small training run of each method that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.made_once import made_once
from uwm_deploy.records.training import Trainer, TrainingRecord
from uwm_deploy.report.console import Reporter
from uwm_deploy.training.trainer import TrainRequest, train

SHORT = {"batch": 16, "rate": 3e-3, "validation_share": 0.34}


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> str:
    """48 quadruples of the drawn world."""
    text = 'format = 1\nname = "small"\nsource = "demo"\nsplit = "calibration"\nlimit = 48\n'
    folder = made_once(tmp_path_factory, "small-set", lambda to: (to / "small.toml").write_text(text))
    return str(folder / "small.toml")


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

    def all_of(folder: Path) -> dict[Trainer, tuple[Path, TrainingRecord]]:
        requests = {method: request_for(method, folder / method.value, small_set, 2) for method in Trainer}
        return {method: (asked.out, train(asked, Reporter(quiet=True))) for method, asked in requests.items()}

    return all_of(made_once(tmp_path_factory, "trained", all_of))  # a finished run is taken over, and gives its record
