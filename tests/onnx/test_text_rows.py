"""Rows of any length at their edges: what keeps them whole, and what captions of every length must show."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import model_of
from uwm_deploy.errors import ContractError
from uwm_deploy.recipes.compile_spec import ExportSpec
from uwm_deploy.records.graph import Profile, RowLengths, TensorSpec
from uwm_deploy.runtime.lengths import cut_together, lengths_of
from uwm_deploy.runtime.parts import InParts
from uwm_deploy.stages.text_rows import text_rows
from uwm_deploy.stages.verify.captions import WholeRows, captions_of_every_length, check_lengths
from uwm_deploy.towers.protocol import ModuleTower

BY = RowLengths(longest=77, end_id=90, step=8)
IDS = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "tokens"), lengths=BY)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fixed_length": True}, "the tower reads what follows the end token"),
        ({"padding_side": "left"}, "the tower reads what follows the end token"),
        ({"context_length": 16}, "they have 16 ids only"),
        ({"context_length": 17}, ""),
    ],
)
def test_texts_that_end_otherwise_or_are_short_stay_whole(change: dict[str, Any], told: str) -> None:
    """What the tokenizer does counts too, whatever the tower pools at."""
    model = model_of("clip-vit-l14")
    text = dataclasses.replace(model.ref.text, **change)
    found = text_rows(model.text, dataclasses.replace(model.ref, text=text), ExportSpec())
    assert (found.why_whole, found.lengths is None) == (told, bool(told))


def test_a_machine_that_fails_says_nothing_of_the_tower() -> None:
    """Memory that ran out is no reason for whole rows: the export stops."""

    class Exhausted(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            raise MemoryError

    model = model_of("clip-vit-l14")
    assert isinstance(model.text, ModuleTower)
    with pytest.raises(MemoryError):
        text_rows(model.text.extended(Exhausted()), model.ref, ExportSpec())


def test_no_rows_stay_none_and_rows_without_ids_are_refused() -> None:
    """There is no longest among none."""
    assert cut_together(np.zeros((0, 77), np.int64), IDS).shape == (0, 77)
    with pytest.raises(ContractError, match="at most 77 ids"):
        lengths_of(np.zeros((1, 0), np.int64), BY)


def test_rows_of_one_request_are_as_long_as_the_longest_needs() -> None:
    """A server takes one array: no row loses its end token."""
    rows = np.zeros((3, 77), np.int64)
    rows[[0, 1, 2], [3, 20, 9]] = 90
    assert np.array_equal(cut_together(rows, IDS), rows[:, :24])


def rows_of_words() -> np.ndarray:
    """One caption with a larger id than its end token, and one of its words behind the end; (1, 77) int64."""
    ids = np.full((1, 77), 7, np.int64)
    ids[0, :6] = 1, 5, 95, 6, 90, 8
    return ids


def test_captions_of_every_length_are_made_of_words() -> None:
    """Neither what stands behind an end token nor a larger id than it, at which some towers pool."""
    rows = captions_of_every_length(rows_of_words(), BY)
    assert set(np.unique(rows)) == {1, 5, 6, 7, 90}


class LastRowIs(InParts):
    """A runtime that is right but for the last row of each call."""

    def __init__(self, last: tuple[float, float]) -> None:
        out = TensorSpec(name="text_embeds", dtype="float32", shape=("batch", 2))
        super().__init__(Profile(min=1, opt=4, max=8), (IDS,), (out,))
        self.last = last

    def _call(self, rows: np.ndarray, outputs: tuple[TensorSpec, ...]) -> list[np.ndarray]:
        return [np.asarray([(1.0, 0.0)] * (len(rows) - 1) + [self.last], np.float32) for _ in outputs]


@pytest.mark.parametrize(
    ("last", "cosine", "error"),
    [((1, 0), 1.0, ""), ((0, 1), 0.0, ""), ((np.nan, 1), -1.0, "no finite embeddings")],
)
def test_the_worst_caption_of_a_length_counts(last: tuple[float, float], cosine: float, error: str) -> None:
    """One of four that is wrong, or no number, is enough."""
    whole = WholeRows(lengths=BY, ids=rows_of_words(), encode=lambda rows: np.tile(np.float32([1, 0]), (len(rows), 1)))
    found = check_lengths(LastRowIs(last), whole)
    assert [part.tokens for part in found] == list(BY.all)
    assert {(part.cosine_min, part.error) for part in found} == {(cosine, error)}
