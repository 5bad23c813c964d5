"""What is counted while a bundle serves, and how it is told."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.drift import DriftMonitor, DriftState
from uwm_deploy.runtime.logs import event
from uwm_deploy.runtime.metrics import Metrics
from uwm_deploy.runtime.selftest import SelfTest


@dataclass(slots=True)
class TowerWatch:
    """Counts for one tower; see `batching.Observer`."""

    tower: TowerName
    metrics: Metrics
    drift: DriftMonitor
    _alert: bool = False

    def batch(self, found: np.ndarray | None, waited_s: Sequence[float], seconds: float) -> None:
        """One call of the engine; see `batching.Observer.batch`.

        Args:
            found: Its results, (n, d) float32 or wider; None if it failed.
            waited_s: Per row, from arrival to the call.
            seconds: Duration of the call.
        """
        label = self.tower.value
        self.metrics.engine.labels(tower=label).observe(seconds)
        self.metrics.rows.labels(tower=label).observe(len(waited_s))
        queue = self.metrics.queue.labels(tower=label)
        for waited in waited_s:
            queue.observe(waited)
        if found is None:
            event(logging.ERROR, "engine-failed", tower=label, rows=len(waited_s))

    def prepared(self, seconds: float, items: int) -> None:
        """So many items were prepared together."""
        prepare = self.metrics.prepare.labels(tower=self.tower.value)
        for _ in range(items):
            prepare.observe(seconds / items)

    def answered(self, rows: Sequence[np.ndarray | Exception], seconds: float) -> None:
        """A whole call came to its end.

        Args:
            rows: Of each item its embedding, (d,) float32 of length 1, or the error.
            seconds: Duration of the whole call.
        """
        label = self.tower.value
        self.metrics.request.labels(tower=label).observe(seconds)
        good = [row for row in rows if not isinstance(row, Exception)]
        if good:
            self.metrics.items.labels(tower=label, outcome="ok").inc(len(good))
            self.drift.add(np.stack(good))
        for position, row in enumerate(rows):
            if isinstance(row, Exception):
                self.metrics.items.labels(tower=label, outcome=type(row).__name__).inc()
                event(logging.WARNING, "item-failed", tower=label, position=position, error=str(row))

    def refused(self) -> None:
        """A call found no place in time."""
        self.metrics.refused.labels(tower=self.tower.value).inc()
        event(logging.WARNING, "refused", tower=self.tower.value)

    def queue(self, on_their_way: int, in_line: int) -> None:
        """How full it is now."""
        self.metrics.on_their_way.labels(tower=self.tower.value).set(on_their_way)
        self.metrics.in_line.labels(tower=self.tower.value).set(in_line)

    def drifted(self, state: DriftState) -> None:
        """What the drift monitor finds; an alert is logged when it begins and when it ends."""
        label = self.tower.value
        if state.alert != self._alert:
            self._alert = state.alert
            level = logging.WARNING if state.alert else logging.INFO
            name = "drift" if state.alert else "drift-over"
            event(level, name, tower=label, rows=state.n, shift=round(state.shift, 4), spread=round(state.spread, 4))
        self.metrics.drift_rows.labels(tower=label).set(state.n)
        self.metrics.drift_shift.labels(tower=label).set(state.shift)
        self.metrics.drift_spread.labels(tower=label).set(state.spread)
        self.metrics.drift_alert.labels(tower=label).set(float(state.alert))


def record_selftest(metrics: Metrics, result: SelfTest) -> None:
    """A self-test was carried out."""
    metrics.tested(result.ok, result.limit, result.ratios)
    level = logging.INFO if result.ok else logging.CRITICAL
    ratios = {tower: round(ratio, 6) for tower, ratio in result.ratios.items()}
    event(level, "selftest", ok=result.ok, ratios=ratios, limit=result.limit, error=result.error)
