"""Ties are decided by exact row-wise products: the same on every machine, wherever a row lies."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from uwm_deploy.data.nearest_captions import nearest_safe
from uwm_deploy.safeground.geometry import nearest_of
from uwm_deploy.safeground.preference import decisions
from uwm_deploy.safeground.retrieval import recalls, retrieved
from uwm_deploy.safeground.similarity import rowwise, similarities
from uwm_deploy.safeground.top_one import top1


def _rows(n: int, d: int = 96, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _bent(product: np.ndarray) -> np.ndarray:
    """A matrix product whose last digits depend on the place, as those of a library may."""
    columns = np.arange(product.shape[1]) % 5 - 2
    return product + columns * np.finfo(np.float64).eps


@pytest.fixture(params=[False, True], ids=["library", "bent"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library at hand, and one that sums in another order."""
    if not request.param:
        return

    def each(queries: np.ndarray, candidates: np.ndarray):
        for some in similarities(queries, candidates):
            some.found = _bent(some.found)
            yield some

    for module in ("geometry", "retrieval", "top_one"):
        monkeypatch.setattr(f"uwm_deploy.safeground.{module}.similarities", each)
    monkeypatch.setattr("uwm_deploy.data.nearest_captions.similarities", each)


def test_every_tie_of_equal_candidates_is_seen(product: None) -> None:
    """Safe and unsafe candidates that are the same rows, in unions of sizes at which kernels have edges."""
    for n in (7, 250, 513):
        rows, queries = _rows(n), _rows(n, seed=1)
        found = retrieved(rows, rows, queries, queries)
        for run in ("unsafe-text-to-union", "unsafe-image-to-union"):
            assert found.runs[run].tied.all()
            assert (found.runs[run].lead == 0).all()
        assert [found.proportions()[name].ties for name in ("unsafe-first-text", "unsafe-first-image")] == [n, n]


def test_a_union_of_two_decides_as_a_preference(product: None) -> None:
    """Candidates that differ in the last digits of their similarity: the lead is the margin, to the last bit."""
    safe, query = _rows(300), _rows(300, seed=1)
    unsafe = safe.copy()
    unsafe[:, :2] = safe[:, 1::-1]  # two numbers change places
    query[:, 1] = query[:, 0]  # so both are equally similar, up to the order of the sum
    margins = decisions(safe, unsafe, query, query).margins["P_tu"]
    assert 0 < (margins != 0).sum() < 300
    lead = [retrieved(*(part[i : i + 1] for part in (safe, unsafe, query, query))) for i in range(300)]
    leads = np.array([found.runs["unsafe-text-to-union"].lead[0] for found in lead])
    assert np.array_equal(np.sign(leads), np.sign(-margins))
    some = next(similarities(query, np.concatenate([safe, unsafe])))
    some.settle(rowwise(query, safe))
    values = some.values()
    assert np.array_equal(values[np.arange(300), np.arange(300)] - values[np.arange(300), np.arange(300, 600)], margins)


def test_classes_and_neighbours_that_are_equal_are_equal(product: None) -> None:
    """Two classes of one prompt are a tie for all of their items; of equal neighbours and captions the first counts."""
    classes = np.concatenate([_rows(13), _rows(13)])
    images = _rows(13) + 0.1 * _rows(13, seed=2)
    found = top1(images, np.arange(13) + 13, classes)
    assert (found.ties.all(), found.hits.any()) == (True, False)
    captions = np.tile(_rows(11, seed=3), (5, 1))
    assert (nearest_safe(_rows(200, seed=4), captions)[0] < 11).all()
    nearest = nearest_of(_rows(40, seed=5), captions, same=False)
    assert all(set(row[row < 33] % 11) >= {row[-1] % 11} for row in nearest)
    assert recalls(captions, captions)[5].value == 100.0
    assert recalls(captions, captions)[1].ties == 55


def test_the_number_of_threads_changes_nothing() -> None:
    """The same bytes with one thread and with four."""
    code = (
        "import numpy as np; from tests.unit.test_similarity import _rows; from uwm_deploy.safeground.retrieval import *\n"
        "r = [_rows(600, seed=i) for i in range(4)]; r[1][:300] = r[0][300:]\n"
        "f = retrieved(*r); print([hash(x.tobytes()) for p in f.runs.values() for x in (p.ranks, p.tied, np.sign(p.lead))])"
    )
    said = set()
    for threads in ("1", "4"):
        environment = os.environ | {
            "OPENBLAS_NUM_THREADS": threads,
            "OMP_NUM_THREADS": threads,
            "PYTHONHASHSEED": "0",
        }
        said.add(subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True).stdout)
    assert len(said) == 1
