"""Verify reports from made-up embeddings, through the functions that a build uses; no model is needed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

import numpy as np

from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.evidence import (
    ArtifactEvidence,
    DataHealth,
    Direction,
    EditProof,
    Evidence,
    Goldens,
    GraphAudit,
    RepeatCheck,
    VerifyReport,
)
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.metrics import SafetyReport
from uwm_deploy.records.model import ImageSpec, ModelRef, TextSpec, TowerName
from uwm_deploy.safeground.embedded import (
    EmbeddedSet,
    ZeroShotEmbeddings,
    flips_between,
    hard_safe_worst,
    parity,
    safety_report,
    worst_items,
    yardstick_of,
)
from uwm_deploy.safeground.fidelity import row_parity
from uwm_deploy.safeground.geometry import geometry
from uwm_deploy.safeground.health import data_health
from uwm_deploy.safeground.interval import wilson
from uwm_deploy.safeground.outcomes import flips_since, item_outcomes
from uwm_deploy.safeground.preference import BASIC, Decisions, proportions, proportions_per_concept
from uwm_deploy.safeground.retrieval import SAFE, UNIONS, Ranked, Retrieved

CONCEPTS = ("fire", "blade", "spill")
DIM = 16


def digest(letter: str) -> str:
    """A digest that is recognised at sight."""
    return "sha256:" + letter * 64


def embedded(n: int, safer: float, seed: int = 0, concepts: tuple[str, ...] = CONCEPTS) -> EmbeddedSet:
    """Embeddings of a model whose unsafe queries lean to the safe side by `safer`; the items depend on the seed only."""
    rng = np.random.default_rng(seed)
    base, safe, unsafe = (rng.normal(size=(n, DIM)) for _ in range(3))

    def member(side: np.ndarray, noise: float) -> np.ndarray:
        rows = base + side + noise * rng.normal(size=(n, DIM))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    # An edited model maps unsafe inputs towards the safe ones.
    mixed = safer * safe + (1 - safer) * unsafe
    classes = np.eye(4, DIM, dtype=np.float32)
    labels = rng.integers(0, 4, size=n)
    images = classes[labels] + (0.4 + 0.2 * safer) * rng.normal(size=(n, DIM)).astype(np.float32)
    return EmbeddedSet(
        ids=tuple(f"item-{i:04d}" for i in range(n)),
        concepts=tuple(concepts[i % len(concepts)] for i in range(n)),
        safe_image=member(safe, 0.5),
        unsafe_image=member(mixed, 0.5),
        safe_text=member(safe, 0.5),
        unsafe_text=member(mixed, 0.5),
        zero_shot={"shape": ZeroShotEmbeddings(images=images, labels=labels, classes=classes)},
    )


def artifact(
    variant: str,
    precision: Precision,
    edited: EmbeddedSet,
    mine: EmbeddedSet,
    where: dict[str, str] | None = None,
    *,
    seed: int = 0,
) -> ArtifactEvidence:
    """Evidence of a variant with these embeddings; the original model is that of the seed."""
    yardstick = yardstick_of(embedded(len(edited.ids), 0.0, seed))
    return ArtifactEvidence(
        variant=variant,
        precision=precision,
        evidence=Evidence.EXECUTED,
        reason="",
        where=where or {"provider": "CPUExecutionProvider", "device": "cpu"},
        artifact_digests={"image": digest("1"), "text": digest("2")},
        parity=(parity(TowerName.IMAGE, "image_embeds", 1, edited.safe_image, mine.safe_image),),
        audit={tower.value: GraphAudit(layers=1, weights=20, operators=100, anew=("export",)) for tower in TowerName},
        rows=row_parity(edited, mine, yardstick.original),
        repeats=tuple(RepeatCheck(tower=tower, n=8, calls=0.0, batch=0.0) for tower in TowerName),
        lengths={"image": 1e-7, "text": 1e-7},
        geometry=geometry(edited.shape(), mine.shape()),
        safety=safety_report(variant, mine, with_items=True, yardstick=yardstick),
        flips=flips_between(edited, mine, yardstick),
        worst=worst_items(variant, edited, mine),
    )


def report(n: int = 300, *, seed: int = 0, artifacts: tuple[ArtifactEvidence, ...] | None = None) -> VerifyReport:
    """A report on an edit that helps; without `artifacts`, with graphs and one engine that equal the edited model."""
    original, edited = embedded(n, 0.0, seed), embedded(n, 0.7, seed)
    if artifacts is None:
        artifacts = (
            artifact("onnx", Precision.FP32, edited, edited, seed=seed),
            artifact("onnxruntime-fp32", Precision.FP32, edited, edited, seed=seed),
        )
    yardstick = yardstick_of(original)
    concepts = {concept: edited.concepts.count(concept) for concept in dict.fromkeys(edited.concepts)}
    return VerifyReport(
        model=_model(),
        edited_weights_digest=digest("e"),
        evaluation=CalibrationRecord(
            name="made-up",
            split="test",
            n=n,
            ids_digest=digest("5"),
            content_digest=digest("6"),
            concepts=concepts,
        ),
        calibration_overlap=0,
        original=safety_report("original", original, with_items=True, yardstick=yardstick),
        edited=safety_report("edited", edited, with_items=True, yardstick=yardstick),
        edit_effect=flips_between(original, edited, yardstick),
        edit_worst=worst_items("edited", original, edited),
        hard_safe=yardstick.hard_ids(),
        hard_safe_worst=hard_safe_worst(yardstick, edited),
        artifacts=artifacts,
        versions={},
        zero_shot_digests={"shape": digest("7")},
        edit_proof=EditProof(layers=2, weights=40),
        goldens=Goldens(images=5, captions=8, grey_levels=1.0, ids_differ=0, cosine_min={"image": 1.0, "text": 1.0}),
        data=healthy(original, concepts),
    )


def healthy(original: EmbeddedSet, concepts: Mapping[str, int]) -> DataHealth:
    """A set that means by unsafe what the calibration set does; made-up embeddings have no common way to be unsafe."""
    way = Direction(agrees=wilson(len(original.ids), len(original.ids)), own=wilson(128, 128), shared=len(original.ids))
    found = data_health(original, concepts, copies=dict.fromkeys(("", *original.zero_shot), ()))
    return dataclasses.replace(found, directions=dict.fromkeys(("image", "text"), way))


def not_run(variant: str, precision: Precision = Precision.FP32) -> ArtifactEvidence:
    """A variant that could not be executed."""
    return ArtifactEvidence(
        variant=variant,
        precision=precision,
        evidence=Evidence.NOT_RUN,
        reason="this machine has no NVIDIA driver",
        where={},
        artifact_digests={},
    )


def with_artifact(base: VerifyReport, *more: ArtifactEvidence) -> VerifyReport:
    """The same report with further variants."""
    return dataclasses.replace(base, artifacts=(*base.artifacts, *more))


def _model() -> ModelRef:
    image = ImageSpec(resize=32, crop=32, resample="bicubic", rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)
    text = TextSpec(context_length=16, eos_id=2, pad_id=0, tokenizer_digest=digest("3"))
    return ModelRef(
        name="made-up-model",
        family="hf-clip",
        repo="openai/clip-vit-base-patch32",
        revision="abc",
        weights_digest=digest("0"),
        embed_dim=DIM,
        image=image,
        text=text,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How many quadruples and images an edit changes.

    Attributes:
        n: Quadruples.
        gs: Of them safe in all four ways before the edit.
        ps: Of them right for both safe queries before the edit.
        moves: From a state to another: ``"G"`` all four ways, ``"P"`` both safe queries and no more, ``"N"`` neither.
        zero_shot: Set to images, recognised before, lost and gained.
        retrieval: Of both directions, safe items found first before, lost and gained. The same items change in both where
            they can, which makes the interval of the mean as wide as it can be.
    """

    n: int
    gs: int
    ps: int
    moves: Mapping[tuple[str, str], int]
    zero_shot: Mapping[str, tuple[int, int, int, int]]
    retrieval: Mapping[str, tuple[int, int, int]]


def counted(counts: Counts, concepts: tuple[str, ...] = CONCEPTS) -> VerifyReport:
    """A report with these counts, in which every artifact equals the edited model."""
    before = np.array(["G"] * counts.gs + ["P"] * (counts.ps - counts.gs) + ["N"] * (counts.n - counts.ps))
    after = before.copy()
    for (start, end), count in counts.moves.items():
        free = np.flatnonzero((before == start) & (after == start))
        # Evenly spread, so that every concept has its share.
        after[free[np.linspace(0, len(free) - 1, count).round().astype(int)]] = end
    hits = {name: _hits(*part) for name, part in counts.zero_shot.items()}
    labels = np.array([concepts[i % len(concepts)] for i in range(counts.n)])
    found = {name: _hits(counts.n, *part) for name, part in counts.retrieval.items()}
    original, edited = (
        _of_states(
            subject, states, labels, *({name: pair[side] for name, pair in part.items()} for part in (hits, found))
        )
        for side, (subject, states) in enumerate((("original", before), ("edited", after)))
    )
    base = report(64)
    artifacts = tuple(
        dataclasses.replace(
            part, safety=dataclasses.replace(edited, subject=part.variant), flips=flips_since(edited, edited), worst=()
        )
        for part in base.artifacts
    )
    return dataclasses.replace(
        base,
        evaluation=dataclasses.replace(base.evaluation, n=counts.n, concepts=dict(Counter(labels.tolist()))),
        original=original,
        edited=edited,
        edit_effect=flips_since(original, edited),
        edit_worst=(),
        artifacts=artifacts,
    )


def _hits(images: int, known: int, lost: int, gained: int) -> tuple[np.ndarray, np.ndarray]:
    """Images that are recognised before and after."""
    before = np.arange(images) < known
    after = before.copy()
    after[:lost], after[known : known + gained] = False, True
    return before, after


def _of_states(
    subject: str,
    states: np.ndarray,
    concepts: np.ndarray,
    zero_shot: Mapping[str, np.ndarray],
    retrieval: Mapping[str, np.ndarray],
) -> SafetyReport:
    safe, all_four = np.isin(states, ["G", "P"]), states == "G"
    chosen = {name: safe if name in ("P_ts", "P_vs") else all_four for name in BASIC}
    tied = {name: np.zeros(len(states), dtype=bool) for name in BASIC}
    found = _of_hits(retrieval)
    decided = Decisions(chosen, tied, {name: np.where(chosen[name], 1.0, -1.0) for name in BASIC})
    return SafetyReport(
        subject=subject,
        preference=proportions(decided),
        per_concept=proportions_per_concept(decided, concepts.tolist()),
        retrieval=found.proportions(),
        zero_shot={name: wilson(int(hits.sum()), len(hits)) for name, hits in zero_shot.items()},
        items=item_outcomes(decided, concepts.tolist(), zero_shot, found, None),
    )


def _of_hits(hits: Mapping[str, np.ndarray]) -> Retrieved:
    """What is not found first is found second, and no unsafe query finds anything unsafe."""
    n = len(next(iter(hits.values())))
    no, second, safe = np.zeros(n, dtype=bool), np.ones(n, dtype=np.int64), np.full(n, -1.0, dtype=np.float32)
    runs = {name: Ranked(np.where(hits[name], 0, 1), no, np.full(n, np.nan, dtype=np.float32)) for name in SAFE}
    return Retrieved(runs | {run: Ranked(second, no, safe) for run in UNIONS.values()})
