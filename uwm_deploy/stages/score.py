"""Stage `score`: one pass over the pairs of each tower, scores saved for any later selection."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from uwm_deploy.codec import json_from_record
from uwm_deploy.datasets.source import PairBatch
from uwm_deploy.errors import ContractError
from uwm_deploy.recipe import EditSpec, EditSpecs
from uwm_deploy.records import (
    CalibrationRecord,
    LayerScore,
    Method,
    Pairing,
    ScorePart,
    ScoreRecord,
    TowerName,
)
from uwm_deploy.stages.pairs import Group, PairsOf, Tally, no_pair_of, runs
from uwm_deploy.stages.score_gradients import by_gradients
from uwm_deploy.towers.protocol import LoadedModel, Tower
from uwm_deploy.uwm.digests import digest_of_tensor
from uwm_deploy.uwm.methods import gradient_batch, needs_gradients, pairing_of, rule_of
from uwm_deploy.uwm.saliency import STD_EPS, LayerScorer
from uwm_deploy.workspace import digest_of_file

SCORES, RECORD = "scores.safetensors", "score.json"


def score_to_folder(
    model: LoadedModel,
    calibration: CalibrationRecord,
    pairs: PairsOf,
    edits: EditSpecs,
    folder: Path,
    concepts: Mapping[str, str] | None = None,
) -> ScoreRecord:
    """Scores the towers that are to be edited, each on the unedited model, and saves scores and record.

    Args:
        model: The source model.
        calibration: What the pairs come from.
        pairs: Stream of pairs for a tower, over a set in `scoring_order`; for gradients not sorted by length.
        edits: Method, rules and layers per tower. The method `none` reads no pairs.
        folder: Where the files go.
        concepts: Item id to concept, needed for one score per concept.

    Raises:
        DataError: If more than 1% of the pairs have no finite contribution, or there are none.
        ContractError: If an edited layer was never reached by the forward pass.
    """
    tallies = {name: Tally(name) for name in (TowerName.TEXT, TowerName.IMAGE)}
    scored = [] if edits.method is Method.NONE else [name for name in tallies if name in edits.towers]
    pairing = _common_pairing(edits, scored)
    seconds: dict[str, float] = {}
    whole: dict[str, Tensor] = {}
    parts: list[ScorePart] = []
    for name in scored:
        started = time.perf_counter()
        for concept, scores, count in _groups(model, pairs, edits, concepts, tallies[name]):
            if concept:
                parts.append(_saved_part(folder, name, concept, scores, count, len(parts)))
            else:
                whole |= scores
        if edits.per_concept:
            _check_concepts(name, parts, concepts or {})
        seconds[name] = time.perf_counter() - started
    save_file(whole, folder / SCORES)
    with_gradients = scored if needs_gradients(edits.method) else []
    record = ScoreRecord(
        model=model.ref,
        calibration=calibration,
        rules={name: rule_of(edits.method, edits.of(name)) for name in scored},
        pairing=pairing,
        n_pairs={name: tallies[name].count for name in scored},
        left_out={name: tallies[name].left_out() for name in scored},
        layers=tuple(layer for name in tallies for layer in _layers(model.tower(name), edits.of(name))),
        scores_digest=digest_of_file(folder / SCORES),
        dtype="float32",
        device=str(next(model.source.parameters()).device),
        seconds=seconds,
        method=edits.method,
        gradient_batch={name: gradient_batch(edits.of(name), name, model.ref) for name in with_gradients},
        parts=tuple(parts),
    )
    (folder / RECORD).write_text(json_from_record(record), encoding="utf-8")
    return record


def _common_pairing(edits: EditSpecs, scored: Sequence[TowerName]) -> Pairing | None:
    found = {pairing_of(edits.method, edits.of(name)) for name in scored}
    if len(found) > 1:
        raise ContractError("text and image ask for different pairings", fix="use one pairing in the recipe")
    return next(iter(found), None)


def _layers(tower: Tower, edit: EditSpec) -> Iterator[LayerScore]:
    for name, layer in tower.layers(edit.layers).items():
        shape = (layer.weight.shape[0], layer.weight.shape[1])
        yield LayerScore(tower=tower.name, name=name, shape=shape, weight_digest=digest_of_tensor(layer.weight))


def _saved_part(
    folder: Path, tower: TowerName, concept: str, scores: dict[str, Tensor], count: int, number: int
) -> ScorePart:
    """Writes the scores of one concept, so that only one concept's are in memory at a time."""
    file = f"scores-{number:04d}.safetensors"
    save_file(scores, folder / file)
    return ScorePart(tower=tower, concept=concept, file=file, digest=digest_of_file(folder / file), n_pairs=count)


def _check_concepts(tower: TowerName, parts: list[ScorePart], concepts: Mapping[str, str]) -> None:
    """A concept whose items could all not be read would be missing from the union without a word."""
    missing = set(concepts.values()) - {part.concept for part in parts if part.tower is tower}
    if missing:
        raise no_pair_of(min(missing), tower)


def _groups(
    model: LoadedModel, pairs: PairsOf, edits: EditSpecs, concepts: Mapping[str, str] | None, tally: Tally
) -> Iterator[Group]:
    """Scores of one tower, concept by concept when there is one score per concept."""
    if edits.per_concept and concepts is None:
        raise ContractError("one score per concept was asked for, but no concepts were given", fix="pass `concepts`")
    concept_of = concepts if edits.per_concept else None
    if needs_gradients(edits.method):
        yield from by_gradients(model, pairs, edits, concept_of, tally)
    else:
        yield from _by_activations(model.tower(tally.tower), pairs, edits, concept_of, tally)
    tally.check()


def _by_activations(
    tower: Tower, pairs: PairsOf, edits: EditSpecs, concepts: Mapping[str, str] | None, tally: Tally
) -> Iterator[Group]:
    edit, stream = edits.of(tower.name), pairs(tower.name)
    pairing = pairing_of(edits.method, edit)
    assert pairing is not None
    for concept, batches in runs(stream, concepts):
        scorers = _scored(tower, batches, edit, pairing, tally)
        count = tally.counted(min(scorer.count for scorer in scorers.values()), concept)
        yield concept, {layer: scorer.score().cpu().contiguous() for layer, scorer in scorers.items()}, count
    tally.not_read(stream.left_out)


@torch.inference_mode()
def _scored(
    tower: Tower, batches: Iterable[PairBatch], edit: EditSpec, pairing: Pairing, tally: Tally
) -> dict[str, LayerScorer]:
    """Runs pairs through a tower with a scorer on every edited layer.

    Raises:
        ContractError: If an edited layer was never reached by the forward pass.
    """
    scorers = {
        name: LayerScorer(layer.weight, edit.rule, pairing, STD_EPS[tower.name], tally.leave_out)
        for name, layer in tower.layers(edit.layers).items()
    }
    device = next(iter(scorers.values())).weight.device
    with scoring(tower, scorers, edit) as set_batch:
        for batch in batches:
            tally.total += len(batch.ids)
            inputs = torch.from_numpy(np.concatenate([batch.safe, batch.unsafe])).to(device)
            set_batch(tower.valid_tokens(inputs), batch.ids)
            tower.embed(inputs)
    for scorer in scorers.values():
        scorer.flush()
    silent = [name for name, scorer in scorers.items() if scorer.calls == 0]
    if silent and tally.total:
        raise ContractError(
            f"layer {silent[0]} was never reached by the forward pass, so it has no score",
            fix="name a layer whose forward is called",
        )
    return scorers


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
