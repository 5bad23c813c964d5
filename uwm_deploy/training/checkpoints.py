"""Where a training run stands: one safetensors file, optimiser included, written whole after every epoch; no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from uwm_deploy.errors import IntegrityError
from uwm_deploy.records.codec import plain_from_record, record_from_plain
from uwm_deploy.records.files import write_atomic
from uwm_deploy.records.plain_json import value_from_json
from uwm_deploy.records.tensor_file import all_tensors, open_tensors
from uwm_deploy.records.training import EpochResult

CHECKPOINT = "checkpoint.safetensors"

_AGAIN = "remove it; training starts again"


@dataclass(slots=True)
class State:
    """State from which the next epoch starts.

    Attributes:
        key: Digest of everything that the run depends on.
        epochs: Those that are done.
        best_epoch: Whose adapters are `best`; 0 before the first.
        waited: Epochs since the last one that was better in loss or recall.
        adapters: Adapters by name as the last epoch left them, (rank, in) and (out, rank) float32.
        best: Adapters of the best epoch, the same shapes, (rank, in) and (out, rank) float32.
        moments: Adam's state by parameter: float32 of any shape (the parameter's own), and a step count ().
    """

    key: str
    epochs: list[EpochResult] = field(default_factory=list)
    best_epoch: int = 0
    waited: int = 0
    adapters: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def write_state(path: Path, state: State) -> None:
    """Writes the whole file or nothing."""
    tensors = {f"adapters/{name}": part for name, part in state.adapters.items()}
    tensors |= {f"best/{name}": part for name, part in state.best.items()}
    tensors |= {f"moments/{name}/{kind}": part for name, parts in state.moments.items() for kind, part in parts.items()}
    about = {
        "key": state.key,
        "epochs": [plain_from_record(epoch) for epoch in state.epochs],
        "best_epoch": state.best_epoch,
        "waited": state.waited,
    }
    content = {name: part.detach().cpu().contiguous() for name, part in tensors.items()}
    write_atomic(path, save(content, {"about": json.dumps(about, sort_keys=True)}))


def read_state(path: Path, key: str) -> State | None:
    """The state of a run that was stopped; None when there is none, or it is another run's.

    Raises:
        IntegrityError: If the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with open_tensors(path, fix=_AGAIN, kind=IntegrityError) as file:
            about: dict[str, Any] = value_from_json((file.metadata() or {})["about"])
            if about["key"] != key:
                return None
            tensors = all_tensors(file)
        epochs = [record_from_plain(EpochResult, part, where=path.name) for part in about["epochs"]]
        best_epoch, waited = int(about["best_epoch"]), int(about["waited"])
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path.name} cannot be read: {error}", fix=_AGAIN) from error
    moments: dict[str, dict[str, Tensor]] = {}
    for name, part in _below(tensors, "moments").items():
        parameter, _, kind = name.rpartition("/")
        moments.setdefault(parameter, {})[kind] = part
    return State(
        key=key,
        epochs=epochs,
        best_epoch=best_epoch,
        waited=waited,
        adapters=_below(tensors, "adapters"),
        best=_below(tensors, "best"),
        moments=moments,
    )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): part for name, part in tensors.items() if name.startswith(f"{prefix}/")}


def moments_of(optimiser: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """State of Adam by the names of its parameters.

    Args:
        optimiser: Adam.
        names: Parameters by name, float32, any shape.

    Returns:
        By parameter, on the CPU: ``exp_avg`` and ``exp_avg_sq``, float32 of any shape (the parameter's own); ``step``, ().
    """
    return {name: {k: v.detach().cpu().clone() for k, v in optimiser.state[p].items()} for name, p in names.items()}


def put_moments(
    optimiser: torch.optim.Optimizer, names: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Puts a state back; the step count stays on the CPU, where Adam keeps it.

    Args:
        optimiser: Adam.
        names: Parameters by name, float32, any shape.
        moments: State by parameter, float32 of any shape (the parameter's own), see `moments_of`.
    """
    for name, parameter in names.items():
        optimiser.state[parameter] = {
            kind: part.clone() if kind == "step" else part.to(parameter.device) for kind, part in moments[name].items()
        }
