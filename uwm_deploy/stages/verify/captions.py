"""Whether a text graph that cuts rows gives captions of every length what the edited model gives them, whole.

An evaluation set may hold no caption of some length, and an engine may be wrong at that length alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from uwm_deploy.data.embedding import unit_rows
from uwm_deploy.errors import first_line
from uwm_deploy.records.evidence import LengthCheck
from uwm_deploy.records.graph import RowLengths
from uwm_deploy.runtime.session import Session

_EACH = 4
"""Captions of each length: two that fill it, and two that are as short as it takes."""

Encode = Callable[[np.ndarray], np.ndarray]
"""From whole rows (n, L) int64 to embeddings (n, d) float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeRows:
    """What a text graph that cuts rows is compared with.

    Attributes:
        lengths: That it cuts them to.
        ids: (n, L) int64, captions whose words are taken.
        encode: What embeds the same rows whole: (n, L) int64 to (n, d) float32.
    """

    lengths: RowLengths
    ids: np.ndarray
    encode: Encode


def check_lengths(session: Session, reference: WholeRows) -> list[LengthCheck]:
    """Embeds captions of every length, which are made of the words of other captions.

    Args:
        session: The artifact's text tower.
        reference: The edited model.

    Returns:
        One check per length, ascending.
    """
    rows = captions_of_every_length(reference.ids, reference.lengths)
    wanted, found = unit_rows(reference.encode(rows)), []
    for place, tokens in enumerate(reference.lengths.all):
        mine = slice(place * _EACH, (place + 1) * _EACH)
        try:
            got = unit_rows(session.run(rows[mine]))
        except Exception as error:  # runtimes share no base class; whatever it is, the artifact cannot do this
            found.append(LengthCheck(tokens=tokens, n=0, cosine_min=-1.0, max_abs=2.0, error=first_line(error)))
            continue
        found.append(_compared(tokens, wanted[mine], got))
    return found


def captions_of_every_length(ids: np.ndarray, lengths: RowLengths) -> np.ndarray:
    """Captions whose end token is in the first and in the last place that each length has.

    Args:
        ids: (n, L) int64, captions that begin with the start token.
        lengths: Wanted lengths.

    Returns:
        (4 * lengths, L) int64.
    """
    words, padding = _words(ids, lengths.end_id), int(ids[0, -1])
    random, rows, before = np.random.default_rng(0), [], 0
    for length in lengths.all:
        shortest = min(max(before + 1, 2), length)
        for count in (length, shortest, length, shortest):
            row = np.full(lengths.longest, padding, dtype=np.int64)
            row[0], row[1:count] = ids[0, 0], random.choice(words, count - 1)
            row[count - 1] = lengths.end_id
            rows.append(row)
        before = length
    return np.stack(rows)


def _words(ids: np.ndarray, end_id: int) -> np.ndarray:
    """Words of captions, (k,) int64; no id is the end token, or larger, which some towers would pool at."""
    is_end = ids == end_id
    before = np.cumsum(is_end, axis=1) == 0
    before[:, 0] = False  # the start token
    found: np.ndarray = ids[before & (ids < end_id)]
    return found if len(found) else ids[:, :1].ravel()


def _compared(tokens: int, wanted: np.ndarray, found: np.ndarray) -> LengthCheck:
    if wanted.shape != found.shape or not np.isfinite(found).all():
        return LengthCheck(tokens=tokens, n=len(wanted), cosine_min=-1.0, max_abs=2.0, error="no finite embeddings")
    cosines = np.einsum("nd,nd->n", wanted.astype(np.float64), found.astype(np.float64))
    return LengthCheck(
        tokens=tokens,
        n=len(wanted),
        cosine_min=float(np.clip(cosines, -1, 1).min()),
        max_abs=float(np.abs(wanted - found).max()),
    )
