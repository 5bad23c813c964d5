"""An evaluation set as one model sees it, and what is measured on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from uwm_deploy.errors import DataError, IntegrityError
from uwm_deploy.records import Flips, OutputParity, SafetyReport, TowerName, WorstItem
from uwm_deploy.safeground.interval import flips
from uwm_deploy.safeground.outcomes import item_outcomes
from uwm_deploy.safeground.preference import BASIC, METRICS, Decisions, decisions, proportions, proportions_per_concept
from uwm_deploy.safeground.retrieval import retrieval
from uwm_deploy.safeground.zero_shot import TopOne, top1

WORST = 10
"""Quadruples that a report names, the worst first."""

_MEMBERS = ("safe_image", "unsafe_image", "safe_text", "unsafe_text")


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroShotEmbeddings:
    """One zero-shot set.

    Attributes:
        images: (n, d).
        labels: (n,) int64, rows of `classes`.
        classes: (c, d), one prompt per class.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedSet:
    """Embeddings of length 1 of every member of every quadruple.

    Attributes:
        ids: n item ids.
        concepts: n concepts.
        safe_image: (n, d) float32; the other members likewise.
        zero_shot_missing: Sets that were asked for and are not here, with the reason.
    """

    ids: tuple[str, ...]
    concepts: tuple[str, ...]
    safe_image: np.ndarray
    unsafe_image: np.ndarray
    safe_text: np.ndarray
    unsafe_text: np.ndarray
    zero_shot: Mapping[str, ZeroShotEmbeddings]
    zero_shot_missing: Mapping[str, str] = field(default_factory=dict)

    def decisions(self) -> Decisions:
        """Decisions on every quadruple."""
        return decisions(self.safe_image, self.unsafe_image, self.safe_text, self.unsafe_text)

    def is_finite(self) -> bool:
        """Whether every embedding is a number."""
        parts = [getattr(self, name) for name in _MEMBERS]
        parts += [rows for part in self.zero_shot.values() for rows in (part.images, part.classes)]
        return all(bool(np.isfinite(rows).all()) for rows in parts)

    def to_tensors(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays for a safetensors file; ids and concepts as UTF-8 JSON bytes."""
        names = json.dumps({"ids": self.ids, "concepts": self.concepts}).encode()
        tensors = {f"{prefix}.{name}": getattr(self, name) for name in _MEMBERS}
        tensors[f"{prefix}.names"] = np.frombuffer(names, dtype=np.uint8)
        for name, part in self.zero_shot.items():
            tensors[f"{prefix}.zero_shot.{name}.images"] = part.images
            tensors[f"{prefix}.zero_shot.{name}.labels"] = part.labels
            tensors[f"{prefix}.zero_shot.{name}.classes"] = part.classes
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray], prefix: str) -> EmbeddedSet:
        """Reads what `to_tensors` wrote.

        Raises:
            IntegrityError: If something is missing.
        """
        try:
            names = json.loads(tensors[f"{prefix}.names"].tobytes())
            start = f"{prefix}.zero_shot."
            sets = sorted({key.removeprefix(start).rsplit(".", 1)[0] for key in tensors if key.startswith(start)})
            return cls(
                ids=tuple(names["ids"]),
                concepts=tuple(names["concepts"]),
                zero_shot={
                    name: ZeroShotEmbeddings(
                        images=tensors[f"{start}{name}.images"],
                        labels=tensors[f"{start}{name}.labels"],
                        classes=tensors[f"{start}{name}.classes"],
                    )
                    for name in sets
                },
                safe_image=tensors[f"{prefix}.safe_image"],
                unsafe_image=tensors[f"{prefix}.unsafe_image"],
                safe_text=tensors[f"{prefix}.safe_text"],
                unsafe_text=tensors[f"{prefix}.unsafe_text"],
            )
        except (KeyError, ValueError, TypeError) as error:
            raise IntegrityError(f"reference embeddings are incomplete: {error}", fix="build again") from error


def safety_report(subject: str, embedded: EmbeddedSet, *, with_items: bool = False) -> SafetyReport:
    """Everything SafeGround says about one model; what every single item came to only if asked for."""
    decided = embedded.decisions()
    recognised = {name: _recognised(part) for name, part in embedded.zero_shot.items()}
    hits = {name: part.hits for name, part in recognised.items()}
    members = [getattr(embedded, name) for name in _MEMBERS]
    return SafetyReport(
        subject=subject,
        preference=proportions(decided),
        per_concept=proportions_per_concept(decided, embedded.concepts),
        retrieval=retrieval(*members),
        zero_shot={name: part.proportion() for name, part in recognised.items()},
        zero_shot_missing=dict(embedded.zero_shot_missing),
        items=item_outcomes(decided, embedded.concepts, hits) if with_items else None,
    )


def worst_items(subject: str, reference: EmbeddedSet, candidate: EmbeddedSet) -> tuple[WorstItem, ...]:
    """The quadruples with the worst decisions of a candidate: lost ones first, then by how far the margin fell.

    Args:
        subject: The candidate's name.
        reference: What it is compared with.
        candidate: On the same items.
    """
    before = np.stack([reference.decisions().margins[name] for name in BASIC])
    after = np.stack([candidate.decisions().margins[name] for name in BASIC])
    fall = after - before
    lost = (before > 0) & (after <= 0)
    worst = np.argmin(np.where(lost, fall - 4, fall), axis=0)  # a margin is at most 2 from 0, so lost ones come first
    columns = np.arange(fall.shape[1])
    order = np.lexsort((columns, fall[worst, columns], ~lost[worst, columns]))[:WORST]
    return tuple(
        WorstItem(
            subject=subject,
            id=candidate.ids[i],
            concept=candidate.concepts[i],
            metric=BASIC[worst[i]],
            margin=float(after[worst[i], i]),
            reference_margin=float(before[worst[i], i]),
            lost=bool(lost[worst[i], i]),
        )
        for i in order
        if fall[worst[i], i] < 0
    )


def flips_between(reference: EmbeddedSet, candidate: EmbeddedSet) -> dict[str, Flips]:
    """Decision flips of every preference metric and zero-shot set, on the same items.

    Raises:
        DataError: If the two are not of the same items in the same order.
    """
    if reference.ids != candidate.ids or set(reference.zero_shot) != set(candidate.zero_shot):
        raise DataError("two models were embedded on different items", fix="evaluate both on the same set")
    before, after = reference.decisions(), candidate.decisions()
    result = {name: flips(before.metric(name), after.metric(name), reference.ids) for name in METRICS}
    for name, part in reference.zero_shot.items():
        other = candidate.zero_shot[name]
        ids = [f"{name}-{i}" for i in range(len(part.labels))]
        result[f"zero_shot.{name}"] = flips(_recognised(part).hits, _recognised(other).hits, ids)
    return result


def _recognised(part: ZeroShotEmbeddings) -> TopOne:
    return top1(part.images, part.labels, part.classes)


def parity(tower: TowerName, output: str, batch: int, reference: np.ndarray, candidate: np.ndarray) -> OutputParity:
    """Differences of one output from its reference, row by row.

    Args:
        tower: Which tower.
        output: Name of the output.
        batch: Rows per call of the candidate.
        reference: (n, d).
        candidate: (n, d).

    Raises:
        DataError: If there is nothing to compare or the shapes differ.
    """
    if not len(reference) or reference.shape != candidate.shape:
        raise DataError(
            f"{output} has shape {candidate.shape}, the reference {reference.shape}", fix="export with a dynamic batch"
        )
    finite = bool(np.isfinite(candidate).all() and np.isfinite(reference).all())
    left, right = (np.nan_to_num(part.astype(np.float64)) for part in (reference, candidate))
    before, after = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1)
    lengths = before * after
    # A row without length has no direction; it must not count as equal.
    cosine = np.where(lengths > 0, np.einsum("nd,nd->n", left, right) / np.where(lengths > 0, lengths, 1), -1.0)
    difference = np.abs(left - right)
    return OutputParity(
        tower=tower,
        output=output,
        batch=batch,
        n=len(reference),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        cosine_min=float(np.clip(cosine, -1, 1).min()),
        cosine_mean=float(np.clip(cosine, -1, 1).mean()),
        finite=finite,
        norm_error=float((np.abs(after - before) / np.where(before > 0, before, 1)).max()),
    )
