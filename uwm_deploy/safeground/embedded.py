"""An evaluation set as one model sees it, and what is measured on it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from uwm_deploy.errors import DataError, IntegrityError
from uwm_deploy.records.evidence import OutputParity
from uwm_deploy.records.metrics import Flips, RankChange, SafetyReport, WorstItem
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.plain_json import value_from_json
from uwm_deploy.safeground.geometry import Shape, geometry, shape_of
from uwm_deploy.safeground.hard_safe import hard_rows
from uwm_deploy.safeground.interval import Groups, clusters_of, flips
from uwm_deploy.safeground.outcomes import item_outcomes, mask_of
from uwm_deploy.safeground.preference import BASIC, METRICS, Decisions, decisions, proportions, proportions_per_concept
from uwm_deploy.safeground.retrieval import ITEMS, SAFE, Retrieved, retrieval_flips, retrieved
from uwm_deploy.safeground.top_one import TopOne, top1

WORST = 10
"""Quadruples that a report names, the worst first."""

_MEMBERS = ("safe_image", "unsafe_image", "safe_text", "unsafe_text")


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroShotEmbeddings:
    """One zero-shot set.

    Attributes:
        images: (n, d) float32, rows of length 1.
        labels: (n,) int64, rows of `classes`.
        classes: (c, d) float32, rows of length 1, one prompt per class.
        alike: Row numbers of images that are the same, group by group.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    alike: Groups = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedSet:
    """Embeddings of length 1 of every member of every quadruple.

    Attributes:
        ids: n item ids.
        concepts: n concepts.
        safe_image: (n, d) float32, rows of length 1.
        unsafe_image: (n, d) float32, rows of length 1.
        safe_text: (n, d) float32, rows of length 1.
        unsafe_text: (n, d) float32, rows of length 1.
        zero_shot: Zero-shot sets by name.
        zero_shot_missing: Sets that were asked for and are not here, with the reason.
        alike: Row numbers of quadruples that hang together by a shared picture or caption, group by group.
    """

    ids: tuple[str, ...]
    concepts: tuple[str, ...]
    safe_image: np.ndarray
    unsafe_image: np.ndarray
    safe_text: np.ndarray
    unsafe_text: np.ndarray
    zero_shot: Mapping[str, ZeroShotEmbeddings]
    zero_shot_missing: Mapping[str, str] = field(default_factory=dict)
    alike: Groups = ()
    # A report and every comparison with it need the same runs, which cost n x n similarities each.
    _retrieved: list[Retrieved] = field(init=False, repr=False, compare=False, default_factory=list)
    _shape: list[Shape] = field(init=False, repr=False, compare=False, default_factory=list)

    def decisions(self) -> Decisions:
        """Decisions on every quadruple."""
        return decisions(self.safe_image, self.unsafe_image, self.safe_text, self.unsafe_text)

    def retrieved(self) -> Retrieved:
        """What every query finds; worked out once."""
        if not self._retrieved:
            self._retrieved.append(retrieved(*(getattr(self, name) for name in _MEMBERS)))
        return self._retrieved[0]

    def shape(self) -> Shape:
        """Neighbours and spread of the safe embeddings; worked out once."""
        if not self._shape:
            self._shape.append(shape_of(self.safe_image, self.safe_text))
        return self._shape[0]

    def is_finite(self) -> bool:
        """Whether every embedding is a number."""
        parts = [getattr(self, name) for name in _MEMBERS]
        parts += [rows for part in self.zero_shot.values() for rows in (part.images, part.classes)]
        return all(bool(np.isfinite(rows).all()) for rows in parts)

    def _check_shapes(self) -> None:
        """A file may hold anything.

        Raises:
            ValueError: If its arrays do not belong together.
        """
        n, dim = self.safe_image.shape
        members = [getattr(self, name) for name in _MEMBERS]
        if any(part.shape != (n, dim) or part.dtype.kind != "f" for part in members):
            raise ValueError("its members are not of one shape")
        if (len(self.ids), len(self.concepts)) != (n, n) or not all(
            isinstance(x, str) for x in (*self.ids, *self.concepts)
        ):
            raise ValueError("it does not name every row")
        if any(not 0 <= row < n for group in self.alike for row in group):
            raise ValueError("it groups rows that are not there")
        for name, part in self.zero_shot.items():
            (m, width), (classes, other) = part.images.shape, part.classes.shape
            whole = part.labels.shape == (m,) and part.labels.dtype.kind == "i" and width == other == dim
            if not whole or (m and not 0 <= part.labels.min() <= part.labels.max() < classes):
                raise ValueError(f"its zero-shot set {name} contradicts itself")

    def to_tensors(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays for a safetensors file: (n, d) embeddings, (n,) labels; ids and concepts as UTF-8 JSON, (bytes,) uint8."""
        sets = {name: part.alike for name, part in self.zero_shot.items() if part.alike}
        known = {"ids": self.ids, "concepts": self.concepts, "alike": self.alike, "zero_shot_alike": sets}
        names = json.dumps(known).encode()
        tensors = {f"{prefix}.{name}": getattr(self, name) for name in _MEMBERS}
        tensors[f"{prefix}.names"] = np.frombuffer(names, dtype=np.uint8)
        for name, part in self.zero_shot.items():
            tensors[f"{prefix}.zero_shot.{name}.images"] = part.images
            tensors[f"{prefix}.zero_shot.{name}.labels"] = part.labels
            tensors[f"{prefix}.zero_shot.{name}.classes"] = part.classes
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray], prefix: str) -> EmbeddedSet:
        """Reads the arrays that `to_tensors` gave.

        Args:
            tensors: Arrays by name, (n, d) float32 and so on, see `to_tensors`.
            prefix: Beginning of their names.

        Raises:
            IntegrityError: If an array is missing.
        """
        try:
            names = value_from_json(tensors[f"{prefix}.names"].tobytes())
            start = f"{prefix}.zero_shot."
            sets = sorted({key.removeprefix(start).rsplit(".", 1)[0] for key in tensors if key.startswith(start)})
            found = cls(
                ids=tuple(names["ids"]),
                concepts=tuple(names["concepts"]),
                zero_shot={
                    name: ZeroShotEmbeddings(
                        images=tensors[f"{start}{name}.images"],
                        labels=tensors[f"{start}{name}.labels"],
                        classes=tensors[f"{start}{name}.classes"],
                        alike=_groups(names.get("zero_shot_alike", {}).get(name, ())),
                    )
                    for name in sets
                },
                safe_image=tensors[f"{prefix}.safe_image"],
                unsafe_image=tensors[f"{prefix}.unsafe_image"],
                safe_text=tensors[f"{prefix}.safe_text"],
                unsafe_text=tensors[f"{prefix}.unsafe_text"],
                alike=_groups(names.get("alike", ())),
            )
            found._check_shapes()
            return found
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise IntegrityError(f"reference embeddings are incomplete: {error}", fix="build again") from error


def _groups(rows: Iterable[Iterable[int]]) -> Groups:
    return tuple(tuple(int(row) for row in group) for group in rows)


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What all rows of a report are measured by, made once from the original model's embeddings.

    Attributes:
        original: The original model.
        hard: (m,) int64, rows of the *hard safe* items, the most unsafe-looking first; None where they cannot be told.
        shape: Neighbours and spread.
    """

    original: EmbeddedSet
    hard: np.ndarray | None
    shape: Shape

    def hard_ids(self) -> tuple[str, ...]:
        """Ids of the *hard safe* items, the most unsafe-looking first."""
        return tuple(self.original.ids[i] for i in (() if self.hard is None else self.hard))


def yardstick_of(original: EmbeddedSet) -> Yardstick:
    """Hard items, neighbours and spread of the original model.

    Raises:
        DataError: If an embedding is not finite.
    """
    if not original.is_finite():
        raise DataError("embeddings of the original model hold NaN or infinity", fix="mend the model")
    members = [getattr(original, name) for name in _MEMBERS]
    return Yardstick(original, hard_rows(*members), original.shape())


def safety_report(
    subject: str, embedded: EmbeddedSet, *, with_items: bool = False, yardstick: Yardstick | None = None
) -> SafetyReport:
    """Everything SafeGround says about one model.

    Args:
        subject: Its name.
        embedded: Its embeddings.
        with_items: Whether to say what every single item came to.
        yardstick: Of the original model, which may be this one; *hard safe* items and the geometry come from it, and are
            left out without it.

    Raises:
        DataError: If the yardstick is of other items.
    """
    if yardstick is not None and yardstick.original.ids != embedded.ids:
        raise DataError("two models were embedded on different items", fix="evaluate both on the same set")
    decided, known = embedded.decisions(), yardstick.original if yardstick else embedded
    recognised = {name: _recognised(part) for name, part in embedded.zero_shot.items()}
    hits = {name: part.hits for name, part in recognised.items()}
    alike = {name: part.alike for name, part in known.zero_shot.items()}
    found, hard = embedded.retrieved(), yardstick.hard if yardstick else None
    changed = None
    if yardstick is not None and yardstick.original is not embedded:
        changed = geometry(yardstick.shape, embedded.shape())
    return SafetyReport(
        subject=subject,
        preference=proportions(decided, known.alike),
        per_concept=proportions_per_concept(decided, embedded.concepts, known.alike),
        retrieval=found.proportions(hard, known.alike),
        zero_shot={name: part.proportion(alike.get(name, ())) for name, part in recognised.items()},
        zero_shot_missing=dict(embedded.zero_shot_missing),
        items=item_outcomes(decided, embedded.concepts, hits, found, hard, {"": known.alike} | alike)
        if with_items
        else None,
        geometry=changed,
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


def hard_safe_worst(yardstick: Yardstick, candidate: EmbeddedSet) -> tuple[RankChange, ...]:
    """The *hard safe* items whose right answer fell furthest, by the direction in which it fell more.

    Args:
        yardstick: Of the original model.
        candidate: On the same items.
    """
    if (rows := yardstick.hard) is None:
        return ()
    before, after = (
        np.stack([part.retrieved().runs[name].ranks[rows] for name in SAFE]) for part in (yardstick.original, candidate)
    )
    fall = after - before
    worst, columns = fall.argmax(0), np.arange(len(rows))
    order = np.argsort(-fall[worst, columns], kind="stable")[:WORST]
    return tuple(
        RankChange(
            id=candidate.ids[rows[i]],
            concept=candidate.concepts[rows[i]],
            query=SAFE[worst[i]],
            before=int(before[worst[i], i]) + 1,
            after=int(after[worst[i], i]) + 1,
        )
        for i in order
        if fall[worst[i], i] > 0
    )


def flips_between(
    reference: EmbeddedSet, candidate: EmbeddedSet, yardstick: Yardstick | None = None
) -> dict[str, Flips]:
    """Flips of every preference metric, of retrieval and of every zero-shot set, on the same items.

    Args:
        reference: The one.
        candidate: The other.
        yardstick: Of the original model; *hard safe* retrieval is left out without it.

    Raises:
        DataError: If the two are not of the same items in the same order.
    """
    if reference.ids != candidate.ids or set(reference.zero_shot) != set(candidate.zero_shot):
        raise DataError("two models were embedded on different items", fix="evaluate both on the same set")
    before, after = reference.decisions(), candidate.decisions()
    k = clusters_of(reference.alike, np.ones(len(reference.ids), dtype=bool))
    result = {name: flips(before.metric(name), after.metric(name), reference.ids, k) for name in METRICS}
    mask = None if yardstick is None or yardstick.hard is None else mask_of(yardstick.hard, len(reference.ids))
    hits = [{name: part.retrieved().hits(name) for name in ITEMS} for part in (reference, candidate)]
    result |= retrieval_flips(hits[0], hits[1], mask, reference.ids, reference.alike)
    for name, part in reference.zero_shot.items():
        other = candidate.zero_shot[name]
        ids = [f"{name}-{i}" for i in range(len(part.labels))]
        k = clusters_of(part.alike, np.ones(len(ids), dtype=bool))
        result[f"zero_shot.{name}"] = flips(_recognised(part).hits, _recognised(other).hits, ids, k)
    return result


def _recognised(part: ZeroShotEmbeddings) -> TopOne:
    return top1(part.images, part.labels, part.classes)


def parity(tower: TowerName, output: str, batch: int, reference: np.ndarray, candidate: np.ndarray) -> OutputParity:
    """Differences of one output from its reference, row by row.

    Args:
        tower: Which tower.
        output: Name of the output.
        batch: Rows per call of the candidate.
        reference: (n, d), any floating dtype.
        candidate: (n, d), any floating dtype.

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
