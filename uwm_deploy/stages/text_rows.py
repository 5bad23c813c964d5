"""Which lengths the rows of a text graph may have: decided by how the tower is built, and proven by running it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uwm_deploy.errors import first_line
from uwm_deploy.recipes.compile_spec import ExportSpec
from uwm_deploy.records.graph import RowLengths
from uwm_deploy.records.machine import failure_of_machine
from uwm_deploy.records.model import ModelRef, TextSpec, TowerName
from uwm_deploy.towers.protocol import Tower

STEP = 8
"""Rows are cut to a multiple of this many ids: few lengths for a runtime to prepare, and few ids too many."""

WHOLE_ROWS = 'set rows = "whole" under [export] of the recipe'

_SAME = 1e-4
"""Largest difference of an entry, as a share of the largest entry, that is rounding: other sums have another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRows:
    """What was decided.

    Attributes:
        lengths: Of the rows; None where all are whole.
        why_whole: Why all are whole; empty where they are not, and for images.
    """

    lengths: RowLengths | None = None
    why_whole: str = ""


WHOLE = TextRows()


def text_rows(tower: Tower, ref: ModelRef, spec: ExportSpec) -> TextRows:
    """Which lengths the rows of a tower's graph may have.

    Args:
        tower: On the CPU.
        ref: Its model.
        spec: What the recipe asks for.
    """
    if tower.name is not TowerName.TEXT:
        return WHOLE
    text = ref.text
    if spec.rows == "whole":
        return TextRows(why_whole="the recipe asks for it")
    if text.fixed_length or not tower.pools_at_end or text.padding_side != "right":
        return TextRows(why_whole="the tower reads what follows the end token")
    if text.context_length <= 2 * STEP:
        return TextRows(why_whole=f"they have {text.context_length} ids only")
    lengths = RowLengths(longest=text.context_length, end_id=text.eos_id, step=STEP)
    if problem := _problem(tower, text, lengths):
        return TextRows(why_whole=problem)
    return TextRows(lengths=lengths)


@torch.no_grad()
def _problem(tower: Tower, text: TextSpec, lengths: RowLengths) -> str:
    """Empty where captions of every length have one embedding, cut or whole and whatever follows their end token."""
    rows = _captions(tower, text, lengths)
    try:
        whole = torch.stack([tower.embed(rows), tower.embed(_padded(rows, text, lengths))])
        for place, length in enumerate(lengths.all):
            found, wanted = tower.embed(rows[place : place + 1, :length])[0], whole[:, place]
            apart = float((found - wanted).abs().max() / wanted.abs().max())
            if not apart <= _SAME:
                return f"cut to {length} ids, an embedding differs by {apart:.2g} of its largest entry"
    except Exception as error:  # towers are built of any modules; one that fails on short rows takes whole ones
        if failure_of_machine(error) is not None:
            raise
        return f"the tower does not take shorter ones: {first_line(error)}"
    return ""


def _captions(tower: Tower, text: TextSpec, lengths: RowLengths) -> Tensor:
    """Words, the end token in the last place of each length, and other words behind it; (lengths, L) int64."""
    tables = [m.num_embeddings for m in tower.graph_module().modules() if isinstance(m, nn.Embedding)]
    words = text.vocabulary or max(tables)
    rows = torch.randint(0, words, (len(lengths.all), lengths.longest), generator=torch.Generator().manual_seed(0))
    # None is the end token, or larger: some towers pool at the largest.
    rows[rows >= text.eos_id] = 0 if text.eos_id else 1
    for place, length in enumerate(lengths.all):
        rows[place, length - 1] = text.eos_id
    return rows


def _padded(rows: Tensor, text: TextSpec, lengths: RowLengths) -> Tensor:
    """The same captions as the tokenizer pads them, (lengths, L) int64."""
    padded = rows.clone()
    for place, length in enumerate(lengths.all):
        padded[place, length:] = text.pad_id
    return padded
