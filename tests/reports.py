"""Verify reports from made-up embeddings, through the functions that a build uses; no model is needed."""

from __future__ import annotations

import dataclasses

import numpy as np

from uwm_deploy.records import (
    ArtifactEvidence,
    CalibrationRecord,
    EditProof,
    Evidence,
    Goldens,
    ImageSpec,
    ModelRef,
    Precision,
    TextSpec,
    TowerName,
    VerifyReport,
)
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
from uwm_deploy.safeground.health import data_health

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
        data=data_health(original, concepts),
    )


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
