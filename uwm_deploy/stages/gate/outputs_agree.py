"""Whether the numbers of a report of captions or pictures agree: one that was changed by hand seldom does."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from uwm_deploy.records.downstream import ANY, REFUSED, DownstreamReport, Flagged
from uwm_deploy.records.metrics import Estimate
from uwm_deploy.safeground.interval import flips, wilson

_CLOSE = 1e-6
"""Percent, for sums in another order."""

_MOST = 10_000_000
"""Inputs of a side, far above any run: a report that says more would only cost memory."""


def contradictions(report: DownstreamReport) -> Iterator[str]:
    """What cannot be, where there is something: each share, change and interval is computed again from its counts.

    A report holds no single outputs, so a mean can only be compared with its own parts.

    Args:
        report: As it was read.
    """
    named = {judge.name for judge in report.judges}
    if set(report.flagged) != {*named, ANY}:
        yield f"it has shares of {', '.join(sorted(report.flagged))}, and judges {', '.join(sorted(named))}"
    for judge, sides in report.flagged.items():
        for side, share in sides.items():
            if told := _of_share(share, report.n.get(side, 0), report.alone.get(side, 0)):
                yield f"{judge}, {side}: {told}"
            if judge not in (ANY, REFUSED) and (whole := report.flagged.get(ANY, {}).get(side)):
                below = (share.original.value > whole.original.value, share.edited.value > whole.edited.value)
                if any(below):
                    yield f"{judge}, {side}: more is flagged by it than by any"
    yield from _of_means(report)


def _of_means(report: DownstreamReport) -> Iterator[str]:
    for score, kept in report.kept.items():
        for side, mean in kept.items():
            if _outside(mean) or mean.n != report.alone.get(side):
                yield f"{score}, {side}: the mean is not within its interval, or of other inputs"
    for score, both in report.reference.items():
        for side, found in both.items():
            apart = found.change.value - (found.edited.value - found.original.value)
            parts = (found.original, found.edited, found.change)
            if not abs(apart) < _CLOSE or any(_outside(part) or part.n != report.alone.get(side) for part in parts):
                yield f"{score}, {side}: the change is not that of the two means"


def _of_share(share: Flagged, n: int, alone: int) -> str:
    """Empty where both shares, the change and all intervals follow from four counts."""
    change, counts = share.change, [round(part.value / 100 * n) for part in (share.original, share.edited)]
    if not 0 < n <= _MOST:
        return f"{n} inputs are none that could have been run"
    stay = counts[0] - change.lost
    if change.n != n or stay < 0 or stay + change.gained != counts[1] or stay + change.lost + change.gained > n:
        return "the shares are not those of what was lost and gained"
    if any(part.independent != alone for part in (share.original, share.edited, change)):
        return "it counts other independent inputs"
    cells = ((True, True, stay), (True, False, change.lost), (False, True, change.gained))
    rest = n - stay - change.lost - change.gained
    before, after = (
        np.array([cell[side] for cell in (*cells, (False, False, rest)) for _ in range(cell[2])], dtype=bool)
        for side in (0, 1)
    )
    again = flips(before, after, [str(i) for i in range(n)], clusters=alone)
    shares = [wilson(count, n, clusters=alone) for count in counts]
    said = [(p.value, p.low, p.high, float(p.n)) for p in (share.original, share.edited)]
    said += [(change.delta, change.delta_low, change.delta_high, change.p_value)]
    made = [(p.value, p.low, p.high, float(p.n)) for p in shares]
    made += [(again.delta, again.delta_low, again.delta_high, again.p_value)]
    return "" if np.allclose(said, made, rtol=_CLOSE, atol=_CLOSE) else "an interval is not that of its counts"


def _outside(found: Estimate) -> bool:
    return not (math.isfinite(found.value) and found.low <= found.value <= found.high)
