"""Which items of a set are used: all of them, or a seeded sample. An item's place in the set never changes."""

from __future__ import annotations

import difflib
import hashlib
import random
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from uwm_deploy.errors import DataError
from uwm_deploy.recipes.data_set import CalibrationSet


def sample_of(n: int, spec: CalibrationSet, concept_of: Callable[[int], str]) -> list[int]:
    """Indices that are used, ascending, so that files are read from front to back.

    Args:
        n: Items there are.
        spec: Its `sampling`, `limit`, `per_concept` and `seed` say which; then `concepts` and `leave_out` which of those.
        concept_of: Concept of an item.

    Raises:
        DataError: If a concept is named of which there is no item.
    """
    chosen = _sampled(n, spec, concept_of)
    if not (spec.concepts or spec.leave_out):
        return chosen
    there = {concept_of(index) for index in chosen}
    if unknown := sorted({*spec.concepts, *spec.leave_out} - there):
        near = difflib.get_close_matches(unknown[0], sorted(there), n=1, cutoff=0.3)
        raise DataError(
            f"data set {spec.name} has no item of the concept {unknown[0]!r}",
            fix=f"did you mean {near[0]}? It has {', '.join(sorted(there))}"
            if near
            else f"it has {', '.join(sorted(there))}",
        )
    wanted = set(spec.concepts) or there - set(spec.leave_out)
    return [index for index in chosen if concept_of(index) in wanted]


def _sampled(n: int, spec: CalibrationSet, concept_of: Callable[[int], str]) -> list[int]:
    if spec.sampling == "per-concept":
        return _per_concept(n, spec, concept_of)
    if spec.limit <= 0 or spec.limit >= n:
        return list(range(n))
    if spec.sampling == "shuffle":
        shuffled = list(range(n))
        random.Random(spec.seed).shuffle(shuffled)  # noqa: S311 -- the official code's generator, not a secret
        return sorted(shuffled[: spec.limit])
    chosen = np.random.default_rng(spec.seed).choice(n, size=spec.limit, replace=False)
    return sorted(int(i) for i in chosen)


def _per_concept(n: int, spec: CalibrationSet, concept_of: Callable[[int], str]) -> list[int]:
    """At most `per_concept` of each; one concept's sample does not depend on which others there are."""
    members: dict[str, list[int]] = defaultdict(list)
    for index in range(n):
        members[concept_of(index)].append(index)
    chosen: list[int] = []
    for concept, indices in members.items():
        if len(indices) > spec.per_concept:
            stream = int.from_bytes(hashlib.sha256(concept.encode()).digest()[:8])
            picked = np.random.default_rng([spec.seed, stream]).choice(
                len(indices), size=spec.per_concept, replace=False
            )
            chosen += [indices[i] for i in picked]
        else:
            chosen += indices
    return sorted(chosen)
