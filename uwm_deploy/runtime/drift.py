"""Whether what is embedded in production still looks like what the model was measured on.

Embeddings have length 1, so their mean says both where they lie and how far they spread: the total variance is one minus the
squared length of the mean. Only the mean is kept, weighted towards the last rows.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class DriftState:
    """Running embeddings of one tower against those of the evaluation set.

    Attributes:
        n: Rows seen.
        shift: Distance between the two means, in standard deviations of the evaluation set's embeddings.
        spread: Standard deviation of the running embeddings divided by that of the evaluation set's.
        alert: Whether one of the two is beyond its limit, over enough rows.
    """

    n: int
    shift: float
    spread: float
    alert: bool


@dataclass(slots=True)
class DriftMonitor:
    """Running mean of one tower's embeddings.

    Attributes:
        width: d.
        window: Rows that the running mean mostly consists of, and fewest rows for an alert.
        shift_limit: Largest `DriftState.shift` without an alert.
        spread_limit: An alert when the spread is below this, or above its inverse.
    """

    width: int
    window: int = 1000
    shift_limit: float = 0.5
    spread_limit: float = 0.5
    _running: np.ndarray = field(init=False)
    _n: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._running = np.zeros(self.width)

    def add(self, rows: np.ndarray) -> None:
        """Takes in embeddings.

        Args:
            rows: (n, d), any floating dtype, rows of length 1.
        """
        if not len(rows):
            return
        with self._lock:
            self._n += len(rows)
            # A plain mean until the window is full, then one that forgets.
            weight = min(1.0, len(rows) / min(self._n, self.window))
            self._running += weight * (rows.mean(axis=0, dtype=np.float64) - self._running)

    def state(self, mean: np.ndarray) -> DriftState:
        """Drift of the rows so far; no alert before a whole window.

        Args:
            mean: (d,) float64, mean of the evaluation set's embeddings of length 1.
        """
        with self._lock:
            n, running = self._n, self._running.copy()
        if not n:
            return DriftState(0, 0.0, 1.0, False)
        deviation = _deviation(mean)
        shift = float(np.linalg.norm(running - mean)) / deviation
        spread = _deviation(running) / deviation
        far = shift > self.shift_limit or not self.spread_limit <= spread <= 1 / self.spread_limit
        return DriftState(n, shift, spread, far and n >= self.window)


def unit_mean(rows: np.ndarray) -> np.ndarray:
    """Mean of embeddings, each divided by its length.

    Args:
        rows: (n, d), any floating dtype.

    Returns:
        (d,) float64.
    """
    rows = rows.astype(np.float64)
    mean: np.ndarray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(axis=0)
    return mean


def _deviation(mean: np.ndarray) -> float:
    return math.sqrt(max(1.0 - float(mean @ mean), 1e-12))
