"""Passes of AdamW: a run that was killed goes on after its last whole pass, and ends as one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from uwm_deploy.errors import ContractError, IntegrityError
from uwm_deploy.training.passes import Kept, Passed, PassSettings, run_passes

SETTINGS = PassSettings(epochs=4, batch=3, learning_rate=0.1, seed=1)


def trained(kept: Kept | None, *, die_at: int = 99, settings: PassSettings = SETTINGS) -> tuple[Tensor, Passed]:
    """A line through ten points, with noise that is drawn in the passes."""
    weight = torch.nn.Parameter(torch.zeros(2))
    x = torch.linspace(-1, 1, 10)
    calls = []

    def loss_of(rows: Tensor) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == die_at:
            raise KeyboardInterrupt
        noisy = 3 * x[rows] - 1 + 0.01 * torch.randn(len(rows))
        return {"fit": (weight[0] * x[rows] + weight[1] - noisy).square().mean(), "size": 1e-3 * weight.square().sum()}

    parameters = {"line": weight}
    passed = run_passes(parameters, loss_of, 10, settings, lambda *_: None, label="line", kept=kept)
    return weight.detach(), passed


def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """Bit for bit, whichever pass it dies in; another run's file is not taken."""
    whole, passed = trained(None)
    assert passed.totals[-1] < 0.8 * passed.totals[0]
    for number, die_at in enumerate((2, 6, 14)):
        kept = Kept(folder=tmp_path / str(number), key="a")
        with pytest.raises(KeyboardInterrupt):
            trained(kept, die_at=die_at)
        assert kept.file.is_file() == (die_at > 4)
        again, resumed = trained(kept)
        assert torch.equal(again, whole)
        assert resumed.losses == passed.losses
        assert trained(kept, die_at=1)[0].equal(whole)  # nothing is left to do
        with pytest.raises(KeyboardInterrupt):
            trained(Kept(folder=tmp_path / str(number), key="b"), die_at=1)


def test_a_damaged_file_and_a_loss_that_is_none_are_told(tmp_path: Path) -> None:
    """A cut file is an integrity error; a loss that leaves the numbers ends the run."""
    kept = Kept(folder=tmp_path, key="a")
    with pytest.raises(KeyboardInterrupt):
        trained(kept, die_at=6)
    kept.file.write_bytes(kept.file.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match="cannot be read"):
        trained(kept)
    with pytest.raises(ContractError, match="the loss is"):
        trained(None, settings=PassSettings(epochs=2, batch=3, learning_rate=1e30, seed=1))
