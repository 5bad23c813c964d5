"""What a serving process counts, in the classes of `prometheus_client`, one registry per encoder.

Nothing is put into the registry of the host by itself: encoders of one process, and the host's own metrics, never meet
unless the host registers one with the other (docs/reference/runtime.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from uwm_deploy.runtime.fork import Home

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of histograms of time."""

ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
"""Upper bounds of histograms of batch sizes."""

TOWER = ("tower",)

CONTENT_TYPE: Final = "text/plain; version=0.0.4"
"""Of `Metrics.text`."""

_LIVE: Final = "liveall"
"""A gauge is of the process that set it, and goes with it; read in the multiprocess mode of `prometheus_client` only."""


class Registry(CollectorRegistry):
    """A registry that brings its gauges up to date before it is read, and that is a collector itself.

    Args:
        refresh: Sets the gauges that are computed when they are asked for.

    Attributes:
        home: The process whose metrics they are.
    """

    def __init__(self, refresh: Callable[[], None]) -> None:
        super().__init__()
        self._refresh, self.home = refresh, Home()
        self._shown: set[Gauge] = set()
        self._showing = threading.Lock()

    def describe(self) -> list[Metric]:
        """Names for the registry that this one is registered with; nothing is computed."""
        return list(super().collect())

    def collect(self) -> Iterable[Metric]:
        """Every metric; without the times at which counters were made, which `prometheus_client` adds.

        None in a process that was forked off the encoder's, whose numbers stand still there, and whose locks may be held.
        """
        if self.home.elsewhere:
            return
        self._refresh()
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric

    def show(self, *gauges: Gauge) -> None:
        """Registers gauges that are not yet registered; from any thread."""
        with self._showing:
            for gauge in set(gauges) - self._shown:
                self.register(gauge)
            self._shown |= set(gauges)


class Metrics:
    """Every metric of one encoder; any thread may change one.

    Args:
        identity: Labels of ``uwm_info``: which bundle and variant is served, and where.
        refresh: Sets the gauges that are computed when they are asked for.

    Attributes:
        registry: Holds all of them; register it with the host's, or pass it to ``generate_latest``.
    """

    def __init__(self, identity: Mapping[str, str], refresh: Callable[[], None]) -> None:
        self.registry = registry = Registry(refresh)

        def counter(name: str, meaning: str, labels: tuple[str, ...]) -> Counter:
            return Counter(name, meaning, labels, registry=registry)

        def gauge(name: str, meaning: str, labels: tuple[str, ...] = TOWER) -> Gauge:
            return Gauge(name, meaning, labels, registry=registry, multiprocess_mode=_LIVE)

        def histogram(name: str, meaning: str, bounds: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(name, meaning, TOWER, registry=registry, buckets=bounds)

        info = gauge("uwm_info", "Which bundle and variant this process serves; always 1.", tuple(sorted(identity)))
        info.labels(**identity).set(1)
        self.items = counter(
            "uwm_items_total", "Items that were answered, by outcome (ok, or the kind of error).", ("tower", "outcome")
        )
        self.refused = counter("uwm_refused_total", "Calls refused because the queue was full for too long.", TOWER)
        self.request = histogram("uwm_request_seconds", "Whole calls of the encoder.")
        self.prepare = histogram("uwm_prepare_seconds", "Decoding and preprocessing, or tokenising, per item.")
        self.queue = histogram("uwm_queue_seconds", "From prepared to the start of the engine's call, per item.")
        self.engine = histogram("uwm_engine_seconds", "Calls of the engine.")
        self.rows = histogram("uwm_batch_rows", "Rows per call of the engine.", ROWS)
        self.on_their_way = gauge("uwm_items_on_their_way", "Items that were let in and not answered yet.")
        self.in_line = gauge("uwm_items_in_line", "Items of callers that wait to be let in.")
        # Registered by the first self-test: without a label they are 0 from the start, which would be an alarm.
        self.canary_ok = Gauge(
            "uwm_canary_ok", "1 if the last self-test found the edited model, 0 if not.",
            registry=None, multiprocess_mode=_LIVE,
        )  # fmt: skip
        self.canary_limit = Gauge(
            "uwm_canary_limit", "Largest ratio that is fine.", registry=None, multiprocess_mode=_LIVE
        )
        self.canary_ratio = gauge(
            "uwm_canary_ratio", "Worst canary of the last self-test; above uwm_canary_limit it is the wrong model."
        )
        self.selftests = counter("uwm_selftests_total", "Self-tests, by outcome.", ("outcome",))
        self.risk_decisions = counter(
            "uwm_risk_decisions_total", "Images whose risk was asked for, by decision.", ("decision",)
        )
        self.drift_rows = gauge("uwm_drift_rows", "Embeddings seen by the drift monitor.")
        self.drift_shift = gauge(
            "uwm_drift_shift", "Distance of the running mean from the evidence's, in its standard deviations."
        )
        self.drift_spread = gauge("uwm_drift_spread", "Running standard deviation divided by the evidence's.")
        self.drift_alert = gauge("uwm_drift_alert", "1 if shift or spread is beyond its limit.")

    def tested(self, ok: bool, limit: float, ratios: Mapping[str, float]) -> None:
        """A self-test was carried out.

        Args:
            ok: Whether it found the edited model.
            limit: Largest ratio that is fine.
            ratios: Of each edited tower's worst canary.
        """
        self.canary_ok.set(float(ok))
        self.canary_limit.set(limit)
        for tower, ratio in ratios.items():
            self.canary_ratio.labels(tower=tower).set(ratio)
        self.selftests.labels(outcome="ok" if ok else "failed").inc()
        self.registry.show(self.canary_ok, self.canary_limit)

    def text(self) -> str:
        """Everything in the text format of Prometheus; see `CONTENT_TYPE`.

        Raises:
            InputError: In a forked process.
        """
        self.registry.home.check()
        return generate_latest(self.registry).decode()
