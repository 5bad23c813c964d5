"""Rounds weights to 8 bits so that outputs move least, each entry up or down, and no pair of products overflows.

Rounding every entry to the nearest number ignores that channels of an activation move together: errors of one column can
make up for those of another. So columns are rounded one after the other, and what one column's rounding does to the outputs
is taken into the columns that follow, by the second moments of the activation.

ONNX Runtime's kernels for x86 without 8-bit instructions add the products of two neighbouring channels in 16 bits. With
activations up to 255 they hold as long as the two weights together are at most 128, whatever their signs. That costs a
fraction of a bit; the same bound on each weight alone would cost a whole one.
"""

from __future__ import annotations

import numpy as np

PAIR = 128
"""Largest sum of the absolute values of two neighbouring weights: 255 * 128 fits into a signed 16-bit number."""

_LARGEST = 127
_DAMPING = 0.01
"""Share of the mean second moment that is added to each: channels that never move must not blow up."""

_BLOCK = 64
"""Columns whose errors are gathered before they are taken into all later columns at once."""

_SMALLEST_SCALE = 1e-12


def paired_scale(weight: np.ndarray) -> np.ndarray:
    """Scales with which no entry and no pair of neighbours is too large; they do not depend on signs.

    Args:
        weight: (out, in) float32.

    Returns:
        (out,) float32.
    """
    size = np.abs(weight.astype(np.float32))
    even = size[:, : size.shape[1] // 2 * 2]
    pairs = (even[:, 0::2] + even[:, 1::2]).max(axis=1, initial=0.0)
    found = np.maximum(size.max(axis=1) / _LARGEST, pairs / PAIR)
    scale: np.ndarray = np.maximum(found, _SMALLEST_SCALE).astype(np.float32)
    return scale


def rounded_by_moments(weight: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """A weight in 8 bits: every entry is one of its two neighbours, chosen so that outputs move least.

    Args:
        weight: (out, in) float32.
        moments: (in, in) float64, mean product of every two channels of what is multiplied.

    Returns:
        (out, in) int8; an entry that is not 0 has the sign of the weight's.
    """
    wanted = weight.astype(np.float64) / paired_scale(weight)[:, None]
    low, high, factor = np.floor(wanted), np.ceil(wanted), _factor(moments)
    rest, codes = wanted.copy(), np.zeros_like(wanted)
    for start in range(0, wanted.shape[1], _BLOCK):
        stop = min(start + _BLOCK, wanted.shape[1])
        errors = np.zeros((len(wanted), stop - start))
        for column in range(start, stop):
            code = np.clip(np.rint(rest[:, column]), low[:, column], high[:, column])
            room = PAIR - np.abs(codes[:, column - 1]) if column % 2 else np.full(len(code), _LARGEST)
            codes[:, column] = np.sign(code) * np.minimum(np.abs(code), np.minimum(room, _LARGEST))
            errors[:, column - start] = (rest[:, column] - codes[:, column]) / factor[column, column]
            rest[:, column + 1 : stop] -= np.outer(errors[:, column - start], factor[column, column + 1 : stop])
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    rounded: np.ndarray = codes.astype(np.int8)
    return rounded


def is_rounded(weight: np.ndarray, codes: np.ndarray) -> bool:
    """Whether 8-bit numbers are a weight, every entry rounded up or down.

    Args:
        weight: (out, in) float32.
        codes: (out, in) int8.
    """
    wanted = weight.astype(np.float64) / paired_scale(weight)[:, None]
    return bool((np.abs(wanted - codes) < 1 + 1e-4).all() and (np.sign(codes) * wanted >= 0).all())


def fits(codes: np.ndarray) -> bool:
    """Whether no sum of two products overflows in 16 bits.

    Args:
        codes: (in, out) int8, in the orientation of the multiplication.
    """
    size = np.abs(codes.astype(np.int16))
    even = size[: len(size) // 2 * 2]
    return bool((even[0::2] + even[1::2] <= PAIR).all())


def _factor(moments: np.ndarray) -> np.ndarray:
    """Upper triangular, (in, in): row i says how an error in column i is made up for in the columns after it."""
    damped = moments + np.eye(len(moments)) * max(_DAMPING * float(np.diag(moments).mean()), _SMALLEST_SCALE)
    lower: np.ndarray = np.linalg.cholesky(np.linalg.inv(damped))
    return lower.T
