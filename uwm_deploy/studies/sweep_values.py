"""Values of a sweep as they are written on the command line."""

from __future__ import annotations

import math

from uwm_deploy.errors import InputError

KEEP_MASSES = "0.9:0.995"
"""Range of keep_mass, where nothing else is asked for."""

LOSSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Points of safe retrieval that choices of a strength may lose, where nothing else is asked for."""

POINTS_OF_A_RANGE = 8
"""Points of `LOW:HIGH` when their number is not given."""


def keep_masses_of(text: str) -> tuple[float, ...]:
    """Values of ``0.9:0.995``, ``0.9:0.995:12`` or ``0.9,0.95,0.98``, ascending.

    A range is spaced evenly in the logarithm of the share that is edited, ``1 - keep_mass``, which is what matters.

    Raises:
        InputError: If it is none of these, or a value is not between 0 and 1.
    """
    try:
        if ":" in text:
            low, high, *rest = text.split(":")
            count = int(rest[0]) if rest else POINTS_OF_A_RANGE
            first, last = math.log(1 - float(low)), math.log(1 - float(high))
            steps = [first + (last - first) * i / max(1, count - 1) for i in range(count)]
            values = [1 - math.exp(step) for step in steps]
        else:
            values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--keep-mass {text!r} is not understood", fix="use 0.9:0.995 or 0.9,0.95,0.98") from error
    if not values or any(not 0 < value < 1 for value in values):
        raise InputError(f"--keep-mass {text!r} holds a value outside 0 to 1", fix="use shares between 0 and 1")
    return tuple(sorted({round(value, 6) for value in values}))


def losses_of(text: str) -> tuple[float, ...]:
    """Values of ``1,2,4``, ascending.

    Raises:
        InputError: If one is no number of points.
    """
    try:
        values = sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise InputError(f"--max-retrieval-loss {text!r} is not a list of numbers", fix="use 1,2,4") from error
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise InputError(f"--max-retrieval-loss {text!r} holds no points", fix="use 1,2,4")
    return tuple(values)


def factors_of(text: str) -> tuple[float, ...]:
    """Values of ``-1,0,0.5``.

    Raises:
        InputError: If one is not a number.
    """
    try:
        values = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise InputError(f"--factor {text!r} is not a list of numbers", fix="use -1,0,0.5") from error
    if not all(map(math.isfinite, values)):
        raise InputError(f"--factor {text!r} holds NaN or infinity", fix="use -1,0,0.5")
    return values
