"""What is counted while a bundle serves, and how it is told."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.drift import DriftMonitor, DriftState
from uwm_deploy.runtime.logs import event
from uwm_deploy.runtime.metrics import ROWS, SECONDS, Family, Metrics
from uwm_deploy.runtime.selftest import SelfTest

FAMILIES = (
    Family("uwm_info", "gauge", "Which bundle and variant this process serves; always 1."),
    Family("uwm_items_total", "counter", "Items that were answered, by outcome (ok, or the kind of error)."),
    Family("uwm_refused_total", "counter", "Calls refused because the queue was full for too long."),
    Family("uwm_request_seconds", "histogram", "Whole calls of the encoder.", SECONDS),
    Family("uwm_prepare_seconds", "histogram", "Decoding and preprocessing, or tokenising, per item.", SECONDS),
    Family("uwm_queue_seconds", "histogram", "From prepared to the start of the engine's call, per item.", SECONDS),
    Family("uwm_engine_seconds", "histogram", "Calls of the engine.", SECONDS),
    Family("uwm_batch_rows", "histogram", "Rows per call of the engine.", ROWS),
    Family("uwm_items_on_their_way", "gauge", "Items that were let in and not answered yet."),
    Family("uwm_items_in_line", "gauge", "Items of callers that wait to be let in."),
    Family("uwm_canary_ok", "gauge", "1 if the last self-test found the edited model, 0 if not."),
    Family(
        "uwm_canary_ratio", "gauge", "Worst canary of the last self-test; above uwm_canary_limit it is the wrong model."
    ),
    Family("uwm_canary_limit", "gauge", "Largest ratio that is fine."),
    Family("uwm_selftests_total", "counter", "Self-tests, by outcome."),
    Family("uwm_risk_decisions_total", "counter", "Images whose risk was asked for, by decision."),
    Family("uwm_drift_rows", "gauge", "Embeddings seen by the drift monitor."),
    Family("uwm_drift_shift", "gauge", "Distance of the running mean from the evidence's, in its standard deviations."),
    Family("uwm_drift_spread", "gauge", "Running standard deviation divided by the evidence's."),
    Family("uwm_drift_alert", "gauge", "1 if shift or spread is beyond its limit."),
)
"""Every metric of the runtime."""


@dataclass(slots=True)
class TowerWatch:
    """Counts for one tower; see `batching.Observer`."""

    tower: TowerName
    metrics: Metrics
    drift: DriftMonitor

    def batch(self, found: np.ndarray | None, waited_s: Sequence[float], seconds: float) -> None:
        """See `batching.Observer.batch`."""
        label = self.tower.value
        self.metrics.observe("uwm_engine_seconds", [seconds], tower=label)
        self.metrics.observe("uwm_batch_rows", [len(waited_s)], tower=label)
        self.metrics.observe("uwm_queue_seconds", waited_s, tower=label)
        if found is None:
            event(logging.ERROR, "engine-failed", tower=label, rows=len(waited_s))

    def prepared(self, seconds: float, items: int) -> None:
        """So many items were prepared together."""
        self.metrics.observe("uwm_prepare_seconds", [seconds / items] * items, tower=self.tower.value)

    def answered(self, rows: Sequence[np.ndarray | Exception], seconds: float) -> None:
        """A whole call came to its end."""
        label = self.tower.value
        self.metrics.observe("uwm_request_seconds", [seconds], tower=label)
        good = [row for row in rows if not isinstance(row, Exception)]
        if good:
            self.metrics.add("uwm_items_total", len(good), tower=label, outcome="ok")
            self.drift.add(np.stack(good))
        for position, row in enumerate(rows):
            if isinstance(row, Exception):
                self.metrics.add("uwm_items_total", tower=label, outcome=type(row).__name__)
                event(logging.WARNING, "item-failed", tower=label, position=position, error=str(row))

    def refused(self) -> None:
        """A call found no place in time."""
        self.metrics.add("uwm_refused_total", tower=self.tower.value)
        event(logging.WARNING, "refused", tower=self.tower.value)

    def queue(self, on_their_way: int, in_line: int) -> None:
        """How full it is now."""
        self.metrics.set("uwm_items_on_their_way", on_their_way, tower=self.tower.value)
        self.metrics.set("uwm_items_in_line", in_line, tower=self.tower.value)

    def drifted(self, state: DriftState) -> None:
        """What the drift monitor finds; an alert is logged when it begins and when it ends."""
        label = self.tower.value
        if state.alert != bool(self.metrics.value("uwm_drift_alert", tower=label)):
            level = logging.WARNING if state.alert else logging.INFO
            name = "drift" if state.alert else "drift-over"
            event(level, name, tower=label, rows=state.n, shift=round(state.shift, 4), spread=round(state.spread, 4))
        self.metrics.set("uwm_drift_rows", state.n, tower=label)
        self.metrics.set("uwm_drift_shift", state.shift, tower=label)
        self.metrics.set("uwm_drift_spread", state.spread, tower=label)
        self.metrics.set("uwm_drift_alert", float(state.alert), tower=label)


def tested(metrics: Metrics, result: SelfTest) -> None:
    """A self-test was carried out."""
    metrics.set("uwm_canary_ok", float(result.ok))
    metrics.set("uwm_canary_limit", result.limit)
    for tower, ratio in result.ratios.items():
        metrics.set("uwm_canary_ratio", ratio, tower=tower)
    metrics.add("uwm_selftests_total", outcome="ok" if result.ok else "failed")
    level = logging.INFO if result.ok else logging.CRITICAL
    ratios = {tower: round(ratio, 6) for tower, ratio in result.ratios.items()}
    event(level, "selftest", ok=result.ok, ratios=ratios, limit=result.limit, error=result.error)
