"""Stage `score`: hooks on the edited layers, one pass over the pairs, scores saved for any later selection."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from uwm_deploy.codec import json_from_record
from uwm_deploy.datasets.source import PairBatch
from uwm_deploy.errors import ContractError, DataError
from uwm_deploy.recipe import EditSpec, EditSpecs
from uwm_deploy.records import CalibrationRecord, LayerScore, LeftOut, ScoreRecord, TowerName
from uwm_deploy.towers.protocol import LoadedModel, Tower
from uwm_deploy.uwm.digests import digest_of_tensor
from uwm_deploy.uwm.saliency import STD_EPS, LayerScorer
from uwm_deploy.workspace import digest_of_file

MAX_LEFT_OUT_SHARE = 0.01
"""More pairs without a finite contribution are an error (method.md section 2)."""

SCORES, RECORD = "scores.safetensors", "score.json"


class Pairs(Protocol):
    """Batches of pairs, and what could not be read."""

    left_out: list[LeftOut]

    def __iter__(self) -> Iterator[PairBatch]:
        """Batches in order."""


def score_to_folder(
    model: LoadedModel,
    calibration: CalibrationRecord,
    pairs: Callable[[TowerName], Pairs],
    edits: EditSpecs,
    folder: Path,
) -> ScoreRecord:
    """Scores both towers, each on the unedited model, and saves scores and record.

    Args:
        model: The source model.
        calibration: What the pairs come from.
        pairs: Stream of pairs for a tower.
        edits: Rules and layers per tower.
        folder: Where the two files go.

    Raises:
        DataError: If more than 1% of the pairs have no finite contribution, or there are none.
        ContractError: If an edited layer was never reached by the forward pass.
    """
    if edits.text.pairing != edits.image.pairing:
        raise ContractError("text and image ask for different pairings", fix="use one pairing in the recipe")
    scores: dict[str, Tensor] = {}
    layers: list[LayerScore] = []
    counts: dict[str, int] = {}
    seconds: dict[str, float] = {}
    left_out: dict[str, tuple[LeftOut, ...]] = {}
    for name, edit in ((TowerName.TEXT, edits.text), (TowerName.IMAGE, edits.image)):
        started = time.perf_counter()
        tower, stream = model.tower(name), pairs(name)
        scorers, not_finite = score_tower(tower, stream, edit)
        seconds[name] = time.perf_counter() - started
        counts[name] = min(scorer.count for scorer in scorers.values())
        left_out[name] = (*stream.left_out, *(LeftOut(id=i, reason="not finite") for i in not_finite))
        for layer, scorer in scorers.items():
            scores[layer] = scorer.score().cpu().contiguous()
            shape = (scorer.weight.shape[0], scorer.weight.shape[1])
            layers.append(
                LayerScore(tower=name, name=layer, shape=shape, weight_digest=digest_of_tensor(scorer.weight))
            )
    save_file(scores, folder / SCORES)
    record = ScoreRecord(
        model=model.ref,
        calibration=calibration,
        rules={"text": edits.text.rule, "image": edits.image.rule},
        pairing=edits.text.pairing,
        n_pairs=counts,
        left_out=left_out,
        layers=tuple(layers),
        scores_digest=digest_of_file(folder / SCORES),
        dtype="float32",
        device=str(next(model.source.parameters()).device),
        seconds=seconds,
    )
    (folder / RECORD).write_text(json_from_record(record), encoding="utf-8")
    return record


@torch.inference_mode()
def score_tower(tower: Tower, pairs: Iterable[PairBatch], edit: EditSpec) -> tuple[dict[str, LayerScorer], list[str]]:
    """Runs the pairs through a tower with a scorer on every edited layer.

    Returns:
        Scorer per layer, and the ids of pairs that some layer left out.
    """
    not_finite: dict[str, None] = {}
    eps = STD_EPS[tower.name]
    scorers = {
        name: LayerScorer(layer.weight, edit.rule, edit.pairing, eps, lambda ids: not_finite.update(dict.fromkeys(ids)))
        for name, layer in tower.layers(edit.layers).items()
    }
    device = next(iter(scorers.values())).weight.device
    total = 0
    with scoring(tower, scorers, edit) as set_batch:
        for batch in pairs:
            total += len(batch.ids)
            inputs = torch.from_numpy(np.concatenate([batch.safe, batch.unsafe])).to(device)
            set_batch(tower.valid_tokens(inputs), batch.ids)
            tower.embed(inputs)
    for scorer in scorers.values():
        scorer.flush()
    _check(tower, scorers, list(not_finite), total)
    return scorers, list(not_finite)


@contextlib.contextmanager
def scoring(
    tower: Tower, scorers: dict[str, LayerScorer], edit: EditSpec
) -> Iterator[Callable[[Tensor | None, tuple[str, ...]], None]]:
    """Hooks that feed the scorers; yields the function that announces each batch."""
    current: list[Any] = [None, ()]

    def hook_for(scorer: LayerScorer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            scorer.add(inputs[0], current[0], current[1])

        return hook

    def set_batch(valid: Tensor | None, ids: tuple[str, ...]) -> None:
        current[:] = [valid, ids]

    layers = tower.layers(edit.layers)
    handles = [layers[name].register_forward_pre_hook(hook_for(scorer)) for name, scorer in scorers.items()]
    try:
        yield set_batch
    finally:
        for handle in handles:
            handle.remove()


def _check(tower: Tower, scorers: dict[str, LayerScorer], not_finite: list[str], total: int) -> None:
    if total == 0:
        raise DataError(f"no pair reached the {tower.name.value} tower", fix="check the calibration set")
    silent = [name for name, scorer in scorers.items() if scorer.calls == 0]
    if silent:
        raise ContractError(
            f"layer {silent[0]} was never reached by the forward pass, so it has no score",
            fix="name a layer whose forward is called",
        )
    if len(not_finite) > MAX_LEFT_OUT_SHARE * total:
        raise DataError(
            f"{len(not_finite)} of {total} {tower.name.value} pairs have no finite score ({', '.join(not_finite[:5])})",
            fix="remove empty captions and constant images",
        )
