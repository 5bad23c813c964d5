"""Which items of a set are used: all of them, or a seeded sample. An item's place in the set never changes."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from uwm_deploy.recipe import CalibrationSet


def sample_of(n: int, spec: CalibrationSet, concept_of: Callable[[int], str]) -> list[int]:
    """Indices that are used, ascending, so that files are read from front to back.

    Args:
        n: Items there are.
        spec: Its `sampling`, `limit`, `per_concept` and `seed` say which.
        concept_of: Concept of an item.
    """
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
