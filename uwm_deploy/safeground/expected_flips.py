"""How many decisions a small change flips, estimated with less noise than by counting those that did.

Of 1,000 quadruples a handful are so near a tie that rounding can flip them, and whether it does is chance. The change of a
margin is known for every quadruple, though. So each margin is held against the changes of those nearest to it in size, in
both directions.
"""

from __future__ import annotations

import numpy as np

from uwm_deploy.safeground.preference import BASIC, Decisions

NEIGHBOURS = 65
"""Margins nearest in size whose changes count for a margin; what a change is may depend on how far from a tie it is."""


def expected_flips(before: Decisions, after: Decisions) -> float:
    """Expected percentage of decisions of the worst basic metric that a change flips.

    Args:
        before: Decisions of n quadruples.
        after: Decisions of the same quadruples after the change.
    """
    return max(_percent(before.margins[name], after.margins[name]) for name in BASIC)


def _percent(before: np.ndarray, after: np.ndarray) -> float:
    order = np.argsort(np.abs(before), kind="stable")
    size, change = np.abs(before)[order], np.abs(after - before)[order]
    width = min(NEIGHBOURS, len(size))
    windows = np.lib.stride_tricks.sliding_window_view(change, width)
    nearest = windows[np.clip(np.arange(len(size)) - width // 2, 0, len(windows) - 1)]
    # No change flips nothing, at a tie neither; half of the changes lead away from the tie.
    return 100 * float(np.mean((nearest >= size[:, None]) & (nearest > 0))) / 2
