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

from uwm_deploy.data.source import PairBatch
from uwm_deploy.edits.methods import gradient_batch, needs_gradients, pairing_of, rule_of, selects
from uwm_deploy.edits.pairs import PairCounts, Pairs, PairsOf, no_pair_of
from uwm_deploy.edits.saliency import STD_EPS, LayerScorer, score_from_sums
from uwm_deploy.edits.selection import selected_indices
from uwm_deploy.edits.sharded_sums import Dtype, PartialSum, Scale, Shard, shards_of, totals
from uwm_deploy.errors import ContractError, InputError
from uwm_deploy.recipes.edit_spec import EditSpec, EditSpecs
from uwm_deploy.records.codec import write_record
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.edit import LayerScore, MaskAgreement, Pairing, ScorePart, ScoreRecord
from uwm_deploy.records.files import digest_of_file
from uwm_deploy.records.model import TowerName
from uwm_deploy.stages.score.gradients import PART, Sizes, by_gradients
from uwm_deploy.towers.batch_size import BatchSplitter
from uwm_deploy.towers.digests import digest_of_tensor
from uwm_deploy.towers.protocol import LoadedModel, Tower

SCORES, RECORD = "scores.safetensors", "score.json"

AGREEMENT_PAIRS = 256
"""Pairs on which masks in bfloat16 are compared with those in float32."""

Group = tuple[str, dict[str, Tensor], int]
"""Concept, or nothing when all pairs make one score; scores by layer, on the CPU; pairs in them."""


def _all_scores(
    model: LoadedModel,
    pairs: PairsOf,
    edits: EditSpecs,
    concepts: Mapping[str, str] | None,
    counts_by_tower: Mapping[TowerName, PairCounts],
    towers: Sequence[TowerName],
    scale: Scale,
    folder: Path,
) -> tuple[dict[str, Tensor], list[ScorePart], dict[str, float]]:
    """Scores of all pairs by layer, the saved scores of single concepts, and the seconds of each tower."""
    seconds: dict[str, float] = {}
    whole: dict[str, Tensor] = {}
    parts: list[ScorePart] = []
    for name in towers:
        started = time.perf_counter()
        for concept, scores, count in _groups(model, pairs, edits, concepts, counts_by_tower[name], scale):
            if concept:
                parts.append(_saved_part(folder, name, concept, scores, count, len(parts)))
            else:
                whole |= scores
        seconds[name] = time.perf_counter() - started
    return whole, parts, seconds


def _scored_towers(edits: EditSpecs) -> list[TowerName]:
    """Towers that are scored, in order; none where the method selects nothing."""
    order = (TowerName.TEXT, TowerName.IMAGE)
    return [name for name in order if name in edits.towers] if selects(edits.method) else []


def _gradient_batches(edits: EditSpecs, scored: Sequence[TowerName], model: LoadedModel) -> dict[str, int]:
    """Items per gradient of each tower, for the methods that have gradients."""
    with_gradients = scored if needs_gradients(edits.method) else []
    return {name: gradient_batch(edits.of(name), name, model.architecture) for name in with_gradients}


def score_to_folder(
    model: LoadedModel,
    calibration: CalibrationRecord,
    pairs: PairsOf,
    edits: EditSpecs,
    folder: Path,
    concepts: Mapping[str, str] | None = None,
    scale: Scale | None = None,
) -> ScoreRecord | None:
    """Scores the towers that are to be edited, each on the unedited model, and saves scores and record.

    Args:
        model: The source model.
        calibration: What the pairs come from.
        pairs: Stream of pairs for a tower, over a set in `scoring_order`; for gradients not sorted by length.
        edits: Method, rules and layers per tower. The methods `none` and `trained` read no pairs.
        folder: Where the files go.
        concepts: Item id to concept, needed for one score per concept.
        scale: The processes that share the work, and where totals wait for a killed run; without it this one alone.

    Returns:
        The record; in the first process only, which writes the files.

    Raises:
        DataError: If more than 1% of the pairs have no finite contribution, or there are none.
        ContractError: If an edited layer was never reached by the forward pass.
    """
    counts_by_tower = {name: PairCounts(name) for name in (TowerName.TEXT, TowerName.IMAGE)}
    scored, scale = _scored_towers(edits), scale or Scale()
    pairing = _common_pairing(edits, scored)
    _check_dtype(edits, scale)
    whole, parts, seconds = _all_scores(model, pairs, edits, concepts, counts_by_tower, scored, scale, folder)
    if not scale.ranks.first:
        return None
    agreeing = scored if scale.dtype == "bfloat16" else []
    save_file(whole, folder / SCORES)
    record = ScoreRecord(
        model=model.ref,
        calibration=calibration,
        rules={name: rule_of(edits.method, edits.of(name)) for name in scored},
        pairing=pairing,
        n_pairs={name: counts_by_tower[name].count for name in scored},
        left_out={name: counts_by_tower[name].left_out() for name in scored},
        layers=tuple(layer for name in counts_by_tower for layer in _layers(model.tower(name), edits.of(name))),
        scores_digest=digest_of_file(folder / SCORES),
        dtype=scale.dtype,
        device=str(next(model.source.parameters()).device),
        seconds=seconds,
        method=edits.method,
        gradient_batch=_gradient_batches(edits, scored, model),
        parts=tuple(parts),
        agreement={name: bfloat16_agreement(model.tower(name), pairs(name), edits, scale) for name in agreeing},
    )
    write_record(folder / RECORD, record)
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


def _check_dtype(edits: EditSpecs, scale: Scale) -> None:
    if scale.dtype != "float32" and needs_gradients(edits.method):
        raise InputError(
            f"method {edits.method.value} has no bfloat16 pass: its gradients are float32",
            fix="leave --score-dtype out",
        )


def _groups(
    model: LoadedModel,
    pairs: PairsOf,
    edits: EditSpecs,
    concepts: Mapping[str, str] | None,
    counts: PairCounts,
    scale: Scale,
) -> Iterator[Group]:
    """Scores of one tower, concept by concept when there is one score per concept; none but in the first process."""
    if edits.per_concept and concepts is None:
        raise ContractError("one score per concept was asked for, but no concepts were given", fix="pass `concepts`")
    tower, edit = model.tower(counts.tower), edits.of(counts.tower)
    stream, gradients = pairs(tower.name), needs_gradients(edits.method)
    sizes = Sizes(BatchSplitter("quadruples" if gradients else "pairs", scale.notice), scale.part or PART, scale.notice)

    def scored(shard: Shard) -> PartialSum:
        if gradients:
            return by_gradients(model, lambda name: pairs(name).part(shard.items), edits, tower.name, sizes)
        return _by_activations(tower, stream.part(shard.items), edits, scale.dtype, sizes.forward)

    def check(found: PairCounts) -> None:
        stream.check(list(found.unread.values()))

    multiple = gradient_batch(edit, tower.name, model.architecture) if gradients else 1
    wanted = concepts if edits.per_concept else None
    shards = shards_of(stream.ids, wanted, multiple=multiple)
    if missing := set((wanted or {}).values()) - {group[0].concept for group in shards}:
        raise no_pair_of(min(missing), tower.name)
    for concept, total in totals(shards, scored, check, tower.name, scale):
        counts.add(total.counts)
        if scale.ranks.first:
            count = counts.add_score(total.count, concept)
            yield concept, _finished(tower, total, edits), count
    if scale.ranks.first:
        counts.check()


@torch.inference_mode()
def _finished(tower: Tower, total: PartialSum, edits: EditSpecs) -> dict[str, Tensor]:
    """Scores by layer, on the CPU, in the memory of their sums."""
    edit, scores = edits.of(tower.name), {}
    pairing = pairing_of(edits.method, edit)
    for name, layer in tower.layers(edit.layers).items():
        sums = [part.to(layer.weight.device) for part in total.sums.pop(name)]
        if pairing is None:
            score = sums[0].div_(max(1, total.divisors[name]))
        else:
            score = score_from_sums(sums, total.divisors[name], layer.weight, edit.rule, pairing)
        scores[name] = score.cpu().contiguous()
    return scores


def _by_activations(
    tower: Tower, batches: Pairs, edits: EditSpecs, dtype: Dtype, splitter: BatchSplitter
) -> PartialSum:
    """Sums of some pairs."""
    edit, counts = edits.of(tower.name), PairCounts(tower.name)
    pairing = pairing_of(edits.method, edit)
    assert pairing is not None
    scorers = _scored(tower, batches, edit, pairing, counts, dtype, splitter)
    counts.not_read(batches.left_out)
    return PartialSum(
        sums={name: scorer.take_sums() for name, scorer in scorers.items()},
        divisors={name: scorer.count for name, scorer in scorers.items()},
        count=min(scorer.count for scorer in scorers.values()),
        counts=counts,
    )


@torch.inference_mode()
def _scored(
    tower: Tower,
    batches: Iterable[PairBatch],
    edit: EditSpec,
    pairing: Pairing,
    counts: PairCounts,
    dtype: Dtype,
    splitter: BatchSplitter,
) -> dict[str, LayerScorer]:
    """Runs pairs through a tower with a scorer on every edited layer.

    Raises:
        ContractError: If an edited layer was never reached by the forward pass.
        PrerequisiteError: If memory does not hold one pair.
    """
    scorers = {
        name: LayerScorer(layer.weight, edit.rule, pairing, STD_EPS[tower.name], counts.leave_out)
        for name, layer in tower.layers(edit.layers).items()
    }
    device = next(iter(scorers.values())).weight.device
    lower = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    with scoring(tower, scorers, edit) as set_batch:

        def forward(batch: PairBatch) -> None:
            inputs = torch.from_numpy(np.concatenate([batch.safe, batch.unsafe])).to(device)
            counts_here = None if batch.counts is None else torch.from_numpy(batch.counts).to(device)
            set_batch(tower.valid_tokens(inputs, counts_here), batch.ids)
            with lower:
                tower.embed(inputs)

        def forget() -> None:
            for scorer in scorers.values():
                scorer.undo()

        for batch in batches:
            counts.total += len(batch.ids)
            splitter.run(batch, forward, forget)
    for scorer in scorers.values():
        scorer.flush()
    silent = [name for name, scorer in scorers.items() if scorer.calls == 0]
    if silent and counts.total:
        raise ContractError(
            f"layer {silent[0]} was never reached by the forward pass, so it has no score",
            fix="name a layer whose forward is called",
        )
    return scorers


def bfloat16_agreement(tower: Tower, stream: Pairs, edits: EditSpecs, scale: Scale) -> MaskAgreement:
    """Which entries a sample of the pairs selects in either dtype, layer by layer, and how far that is the same.

    Args:
        tower: Whose scores are made in bfloat16.
        stream: All pairs.
        edits: What is selected, and how.
        scale: Takes the line about it.
    """
    edit = edits.of(tower.name)
    items = range(0, len(stream.ids), max(1, len(stream.ids) // AGREEMENT_PAIRS))[:AGREEMENT_PAIRS]
    splitter = BatchSplitter("pairs", scale.notice)
    selected: list[dict[str, Tensor]] = []
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        part = _by_activations(tower, stream.part(items), edits, dtype, splitter)
        count, scores = part.count, _finished(tower, part, edits)
        selected.append({name: selected_indices(s, edit.keep_mass, edit.selection) for name, s in scores.items()})
    pairs = [(layer, selected[0][name], selected[1][name]) for name, layer in tower.layers(edit.layers).items()]
    common = [int(torch.isin(left, right).sum()) for _, left, right in pairs]
    either = [len(left) + len(right) - n for (_, left, right), n in zip(pairs, common, strict=True)]
    equal = [1 - (n - m) / layer.weight.numel() for (layer, _, _), n, m in zip(pairs, either, common, strict=True)]
    jaccard = [m / n if n else 1.0 for n, m in zip(either, common, strict=True)]
    found = MaskAgreement(
        n_pairs=count,
        keep_mass=edit.keep_mass,
        selection=edit.selection,
        equal_min=min(equal),
        equal_mean=sum(equal) / len(equal),
        jaccard_min=min(jaccard),
        jaccard_mean=sum(jaccard) / len(jaccard),
    )
    scale.notice(
        f"{tower.name.value}: bfloat16 and float32 masks of {count} pairs: entries equal {found.equal_min:.4%} at least, "
        f"{found.equal_mean:.4%} on average; selected in common {found.jaccard_min:.2%} at least, "
        f"{found.jaccard_mean:.2%} on average"
    )
    return found


@contextlib.contextmanager
def scoring(
    tower: Tower, scorers: dict[str, LayerScorer], edit: EditSpec
) -> Iterator[Callable[[Tensor | None, tuple[str, ...]], None]]:
    """Feeds the scorers from hooks on the layers, for as long as the block lasts.

    Args:
        tower: The tower that is scored.
        scorers: Scorer by layer.
        edit: Names the layers.

    Yields:
        A function to call before each batch, which settles the batch before it. It takes the tokens that count, (2b, T) bool
        or None, and the ids of the b pairs.
    """
    current: list[Any] = [None, ()]

    def hook_for(scorer: LayerScorer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            with torch.autocast(inputs[0].device.type, enabled=False):  # statistics are float32 whatever the forward is
                scorer.add(inputs[0], current[0], current[1])

        return hook

    def set_batch(valid: Tensor | None, ids: tuple[str, ...]) -> None:
        for scorer in scorers.values():
            scorer.settle()
        current[:] = [valid, ids]

    layers = tower.layers(edit.layers)
    handles = [layers[name].register_forward_pre_hook(hook_for(scorer)) for name, scorer in scorers.items()]
    try:
        yield set_batch
    finally:
        for handle in handles:
            handle.remove()
