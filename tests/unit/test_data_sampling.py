"""Which items of a set are used: seeded, the same everywhere, and in the record."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from tests.data_sets import open_manifest, pair
from uwm_deploy.data.sampling import sample_of
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.errors import DataError, RecipeError
from uwm_deploy.recipes.data_set import calibration_set_from_toml


def _sample(concepts: list[str], /, **keys: object) -> list[int]:
    lines = "".join(f"{key} = {value!r}\n" for key, value in keys.items())
    text = f'format = 1\nname = "x"\nsource = "manifest"\nmanifest = "m"\n{lines}'
    spec = calibration_set_from_toml(text, where="x")
    return sample_of(len(concepts), spec, concepts.__getitem__)


def _of(concept: str, concepts: list[str], chosen: list[int]) -> list[int]:
    """Which of a concept's own items are chosen."""
    places = [i for i, name in enumerate(concepts) if name == concept]
    return [places.index(i) for i in chosen if concepts[i] == concept]


def test_shuffle_is_the_official_code_s() -> None:
    """The first `limit` of Python's own seeded shuffle of all items, in the set's order."""
    numbers = list(range(1000))
    random.Random(5).shuffle(numbers)
    assert _sample(["a"] * 1000, sampling="shuffle", limit=64, seed=5) == sorted(numbers[:64])


@pytest.mark.parametrize("sampling", ["sample", "shuffle"])
def test_a_sample_is_seeded_and_ascending(sampling: str) -> None:
    """The same seed gives the same items, another seed others; no item twice; 0 or a large limit takes all."""
    draw = [_sample(["a"] * 500, sampling=sampling, limit=100, seed=seed) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    assert draw[0] == sorted(set(draw[0]))
    assert len(draw[0]) == 100
    assert _sample(["a"] * 50, sampling=sampling, limit=0) == list(range(50))
    assert _sample(["a"] * 50, sampling=sampling, limit=50, seed=3) == list(range(50))


def test_per_concept_takes_so_many_of_each() -> None:
    """A concept with fewer gives all it has."""
    concepts = ["a", "b"] * 40 + ["c"] * 3
    chosen = _sample(concepts, sampling="per-concept", per_concept=10)
    assert [len(_of(name, concepts, chosen)) for name in "abc"] == [10, 10, 3]
    assert chosen == sorted(set(chosen))


def test_a_concept_s_sample_does_not_depend_on_the_others() -> None:
    """Concepts that are added, removed or mixed in otherwise change nothing for this one."""
    alone = ["a"] * 60
    mixed = [name for _ in range(60) for name in ("x", "a", "y")]
    other = ["y"] * 500 + ["a"] * 60
    first, second, third = (_sample(c, sampling="per-concept", per_concept=7) for c in (alone, mixed, other))
    assert _of("a", alone, first) == _of("a", mixed, second) == _of("a", other, third)
    assert _of("y", other, third) != _of("a", other, third)


def _ids_digest(source: QuadrupleSource) -> str:
    return "sha256:" + hashlib.sha256("\n".join(source.ids).encode()).hexdigest()


def test_the_record_has_the_digest_of_the_ordered_ids(tmp_path: Path) -> None:
    """SHA-256 over the ids of the sample, one per line; it follows order, seed and size."""
    rows = [pair(i, concept="ab"[i % 2]) for i in range(30)]
    seen = set()
    for used, keys in (
        (rows, {}),
        (rows[::-1], {}),
        (rows, {"limit": 10}),
        (rows, {"limit": 10, "seed": 1}),
        (rows, {"limit": 10, "sampling": "shuffle"}),
        (rows, {"per_concept": 5, "sampling": "per-concept"}),
    ):
        source = open_manifest(tmp_path, used, **keys)
        assert source.record.ids_digest == _ids_digest(source)
        assert source.record.n == len(source.ids)
        seen.add(source.record.ids_digest)
    assert len(seen) == 6
    assert source.record.concepts == {"a": 5, "b": 5}


def test_a_sample_reads_the_rows_it_names(tmp_path: Path) -> None:
    """Captions of a sample belong to its ids."""
    source = open_manifest(tmp_path, [pair(i) for i in range(50)], limit=9, seed=4)
    for index, name in enumerate(source.ids):
        assert source.read_texts(index) == (f"a calm {name[1:]}", f"a fire {name[1:]}")


def test_concepts_are_chosen_after_the_sample() -> None:
    """What is left of a sample is what was in it: leaving a concept out changes nothing about the others."""
    names = [f"c{i % 4}" for i in range(80)]
    whole = _sample(names, limit=40)
    without, only = _sample(names, limit=40, leave_out=["c1"]), _sample(names, limit=40, concepts=["c1"])
    assert sorted([*without, *only]) == whole
    assert {names[i] for i in only} == {"c1"}


def test_a_concept_that_is_not_there_is_refused_with_the_nearest() -> None:
    """Otherwise a typing error would leave nothing out."""
    with pytest.raises(DataError, match="did you mean hazard0"):
        _sample(["hazard0", "other"] * 4, leave_out=["hazrd0"])


def test_concepts_are_taken_or_left_out() -> None:
    """Both at once would contradict each other."""
    with pytest.raises(RecipeError, match="concepts and leave_out"):
        _sample(["a", "b"], leave_out=["a"], concepts=["b"])
