"""Stage `fit`: one pass over the pairs of both towers, summed for the closed-form step; some features kept for its strength.

Sums only, in shards like scores: memory is flat, a killed run resumes, and any batch size and number of processes give the
same step (docs/background/safety-axis.md).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from uwm_deploy.data.embedding import PreparedZeroShot, prepare_zero_shot
from uwm_deploy.data.source import PairBatch
from uwm_deploy.edits.closed_form import features_in_place, fitted_weights, placement_of
from uwm_deploy.edits.fit_files import FEATURES, RECORD, SUMS
from uwm_deploy.edits.moments import Moments, moments_of
from uwm_deploy.edits.pair_stream import PairStream
from uwm_deploy.edits.pairs import PairCounts, Pairs, PairsOf
from uwm_deploy.edits.sharded_sums import PartialSum, Scale, Shard, shards_of, totals
from uwm_deploy.records.codec import write_record
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.edit import FitRecord, Method, Placement
from uwm_deploy.records.files import digest_of_file
from uwm_deploy.records.model import TowerName
from uwm_deploy.stages.job import Job
from uwm_deploy.stages.models import Models
from uwm_deploy.towers.batch_size import USUAL_PAIRS, BatchSplitter
from uwm_deploy.towers.digests import digest_of_weights
from uwm_deploy.towers.protocol import LoadedModel, Tower

KEPT = 4096
"""Most quadruples whose features are kept for the choice of the strength; evenly spaced in the set."""

ZERO_SHOT_ITEMS = 2048
"""Most items of each zero-shot set whose features are kept; evenly spaced."""

_SUMS = ("sum_safe", "sum_unsafe", "gram_safe", "gram_unsafe", "gram_cross", "length_sum")
_KEPT = ("safe", "unsafe", "original_safe", "original_unsafe")


def fit_to_folder(
    model: LoadedModel,
    original: LoadedModel | None,
    calibration: CalibrationRecord,
    pairs: PairsOf,
    concepts: Mapping[str, str],
    zero_shot: Mapping[str, PreparedZeroShot],
    method: Method,
    placement: Placement,
    folder: Path,
    scale: Scale | None = None,
) -> FitRecord | None:
    """Sums the features of both towers, and saves sums, kept features and record.

    Args:
        model: As the step before left it.
        original: The source model, where a step came before; its embeddings are what a choice is compared with.
        calibration: What the pairs come from.
        pairs: Stream of pairs for a tower, in the order of the set.
        concepts: Item id to concept.
        zero_shot: Sets whose accuracy a choice may not lose; needed in the first process only.
        method, placement: Of the step.
        folder: Where the files go.
        scale: The processes that share the work, and where totals wait for a killed run; without it this one alone.

    Returns:
        The record; in the first process only, which writes the files.

    Raises:
        DataError: If more than 1% of the pairs have features that are not finite, or there are none.
    """
    scale, weights = scale or Scale(), fitted_weights(model, placement)
    sums: dict[str, np.ndarray] = {}
    rows: dict[TowerName, dict[str, np.ndarray]] = {}
    counts, seconds = {name: PairCounts(name) for name in TowerName}, {}
    kept = _kept_ids(pairs(TowerName.TEXT).ids)
    for name in TowerName:
        started = time.perf_counter()
        moments, rows[name] = _tower(model, original, pairs(name), weights[name], kept, placement, counts[name], scale)
        sums |= moments.to_tensors(name.value)
        seconds[name.value] = time.perf_counter() - started
    if not scale.ranks.first:
        return None
    save_file(sums, folder / SUMS)
    names = _save_features(model, original, rows, kept, concepts, zero_shot, placement, folder)
    record = FitRecord(
        model=(original or model).ref,
        calibration=calibration,
        method=method,
        fitted_on=digest_of_weights(model.named_parameters()),
        placement=placement,
        n_pairs={name.value: counts[name].count for name in TowerName},
        left_out={name.value: counts[name].left_out() for name in TowerName},
        kept=len(names),
        sums_digest=digest_of_file(folder / SUMS),
        features_digest=digest_of_file(folder / FEATURES),
        seconds=seconds,
    )
    write_record(folder / RECORD, record)
    return record


def _save_features(
    model: LoadedModel,
    original: LoadedModel | None,
    rows: Mapping[TowerName, Mapping[str, np.ndarray]],
    kept: Sequence[str],
    concepts: Mapping[str, str],
    zero_shot: Mapping[str, PreparedZeroShot],
    placement: Placement,
    folder: Path,
) -> list[str]:
    """Saves what a choice of the strength is made from; the ids of the items in it."""
    features, names = _kept_features(rows, kept, concepts)
    for set_name, part in zero_shot.items():
        features |= _zero_shot(model, original, set_name, part, placement)
    save_file(features, folder / FEATURES)
    return names


def _kept_ids(ids: Sequence[object]) -> list[str]:
    """At most `KEPT` of the ids, evenly spaced."""
    places = np.linspace(0, max(0, len(ids) - 1), min(KEPT, len(ids))).round().astype(int)
    return [str(ids[i]) for i in places]


def _kept_features(
    rows: Mapping[TowerName, Mapping[str, np.ndarray]], kept: Sequence[str], concepts: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Features of the items that both towers have, by name, and their ids.

    Args:
        rows: By tower and part (n, m) float32, and under ``there`` (n,) bool.
        kept: n item ids.
        concepts: Item id to concept.
    """
    there = rows[TowerName.IMAGE]["there"] & rows[TowerName.TEXT]["there"]
    features = {
        f"{tower.value}.{part}": np.ascontiguousarray(rows[tower][part][there])
        for tower in TowerName
        for part in rows[tower]
        if part != "there"
    }
    names = [item for item, present in zip(kept, there, strict=True) if present]
    features["names"] = _as_bytes({"ids": names, "concepts": [concepts[item] for item in names]})
    return features, names


def _as_bytes(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def _tower(
    model: LoadedModel,
    original: LoadedModel | None,
    stream: Pairs,
    weight: np.ndarray,
    kept: Sequence[str],
    placement: Placement,
    counts: PairCounts,
    scale: Scale,
) -> tuple[Moments, dict[str, np.ndarray]]:
    """Sums of one tower, and the kept rows; whole in the first process."""
    name = counts.tower
    before = original.tower(name) if original else None
    splitter = BatchSplitter("pairs", scale.notice)
    with torch.inference_mode(), features_in_place(model, name, placement) as features:

        def summed(shard: Shard) -> PartialSum:
            return _summed(stream.part(shard.items), features, before, model.tower(name), weight, kept, splitter)

        def check(found: PairCounts) -> None:
            stream.check(list(found.unread.values()))

        [(_, total)] = totals(shards_of(stream.ids, None), summed, check, name, scale)
    counts.add(total.counts)
    if not scale.ranks.first:
        return _NO_PAIRS, {}
    counts.add_score(total.count, "")
    parts = [part.cpu().numpy() for part in total.sums["sums"]]
    moments = dict(zip(_SUMS, parts, strict=True))
    length_sum = float(moments.pop("length_sum")[0])
    rows = dict(zip((*_KEPT, "there"), (part.cpu().numpy() for part in total.sums["kept"]), strict=True))
    if original is None:
        rows = {part: rows[part] for part in ("safe", "unsafe", "there")}
    rows["there"] = rows["there"] > 0
    return Moments(count=total.count, length_sum=length_sum, **moments), rows


_NO_PAIRS = Moments(
    count=0, sum_safe=np.zeros(0), sum_unsafe=np.zeros(0), gram_safe=np.zeros((0, 0)), gram_unsafe=np.zeros((0, 0)),
    gram_cross=np.zeros((0, 0)), length_sum=0.0,
)  # fmt: skip


def _device(tower: Tower) -> torch.device:
    return next(tower.graph_module().parameters()).device


def _summed(
    batches: Pairs,
    features: Callable[[Tensor], Tensor],
    original: Tower | None,
    tower: Tower,
    weight: np.ndarray,
    kept: Sequence[str],
    splitter: BatchSplitter,
) -> PartialSum:
    """Sums of some pairs; kept rows lie at their places among zeros, so that shards add up to all of them."""
    counts, device = PairCounts(tower.name), _device(tower)
    (width, size), places = weight.shape, {item: place for place, item in enumerate(kept)}
    total = moments_of(np.zeros((0, size)), np.zeros((0, size)), weight)
    shapes = (size, size, width, width) if original is not None else (size, size, 0, 0)
    rows = [np.zeros((len(kept), columns), np.float32) for columns in shapes] + [np.zeros(len(kept), np.float32)]

    def forward(batch: PairBatch) -> tuple[np.ndarray, np.ndarray]:
        inputs = torch.from_numpy(np.concatenate([batch.safe, batch.unsafe])).to(device)
        found = features(inputs).cpu().numpy()
        return found[: len(batch.ids)], found[len(batch.ids) :]

    for batch in batches:
        counts.total += len(batch.ids)
        for part, (safe, unsafe) in splitter.run(batch, forward):
            finite = np.isfinite(safe).all(1) & np.isfinite(unsafe).all(1)
            counts.leave_out(item for item, good in zip(part.ids, finite, strict=True) if not good)
            total += moments_of(safe[finite], unsafe[finite], weight)
            at = [(i, places[item]) for i, item in enumerate(part.ids) if item in places and finite[i]]
            if not at:
                continue
            here, there = (list(side) for side in zip(*at, strict=True))
            rows[0][there], rows[1][there], rows[4][there] = safe[here], unsafe[here], 1.0
            if original is not None:
                rows[2][there] = _embedded(original, part.safe[here])
                rows[3][there] = _embedded(original, part.unsafe[here])
    counts.not_read(batches.left_out)
    sums = [np.atleast_1d(np.asarray(getattr(total, name), dtype=np.float64)) for name in _SUMS]
    return PartialSum(
        sums={"sums": [torch.from_numpy(part) for part in sums], "kept": [torch.from_numpy(part) for part in rows]},
        divisors={"sums": total.count},
        count=total.count,
        counts=counts,
    )


@torch.inference_mode()
def _embedded(tower: Tower, inputs: np.ndarray) -> np.ndarray:
    """(n, d) of length 1, float32."""
    parts = []
    for rows in np.split(inputs, range(USUAL_PAIRS[tower.name], len(inputs), USUAL_PAIRS[tower.name])):
        embeds = tower.embed(torch.from_numpy(np.ascontiguousarray(rows)).to(_device(tower))).float()
        parts.append((embeds / embeds.norm(dim=1, keepdim=True)).cpu().numpy())
    return np.concatenate(parts)


def _zero_shot(
    model: LoadedModel, original: LoadedModel | None, name: str, prepared: PreparedZeroShot, placement: Placement
) -> dict[str, np.ndarray]:
    """Features of one zero-shot set, and where a step came before the original model's embeddings."""
    n = len(prepared.labels)
    chosen = np.linspace(0, n - 1, min(n, ZERO_SHOT_ITEMS)).round().astype(int)
    found = {f"zero_shot.{name}.labels": np.asarray(prepared.labels)[chosen].astype(np.int64)}
    for part, tower in (("images", TowerName.IMAGE), ("classes", TowerName.TEXT)):
        whole = part == "classes"
        inputs = prepared.prompts if whole else np.concatenate([prepared.pixels[i : i + 1] for i in chosen])
        with torch.inference_mode(), features_in_place(model, tower, placement) as features:
            device = _device(model.tower(tower))
            rows = [
                features(torch.from_numpy(np.ascontiguousarray(inputs[i : i + 32])).to(device)).cpu().numpy()
                for i in range(0, len(inputs), 32)
            ]
        found[f"zero_shot.{name}.{part}"] = np.concatenate(rows)
        if original is not None:
            found[f"zero_shot.{name}.original_{part}"] = _embedded(original.tower(tower), inputs)
    return found


def make(job: Job, out: Path) -> None:
    """Sums the features of the calibration set, of the model as the step before left it."""
    plan, models = job.plan, job.shared(Models)
    spec = plan.recipe.closed_form
    assert spec is not None
    model, original = models.before_closed_form(job.ranks)
    placement, why = placement_of(model, spec)
    if why and job.ranks.first:
        job.notes.line(f"fit        {why}")
    source, batch_pairs = plan.calibration_source, models.batch_pairs(job.ranks)

    def pairs(tower: TowerName) -> PairStream:
        workers = plan.workers if tower is TowerName.IMAGE else 0
        return models.pairs(source, tower, batch_pairs=batch_pairs[tower], workers=workers)

    for tower in TowerName:
        pairs(tower)  # a set without pairs for one of them is refused before anything is summed
    zero_shot = {}
    if job.ranks.first:
        zero_shot = prepare_zero_shot(
            source, models.original.ref.image, models.tokenizer, workers=plan.workers, progress=job.notes.progress
        )
    scale = Scale(ranks=job.ranks, kept=job.folder.fitting, key=job.key, notice=job.notes.line)
    concepts = dict(zip(source.ids, source.concepts, strict=True))
    fit_to_folder(model, original, source.record, pairs, concepts, zero_shot, spec.method, placement, out, scale)
