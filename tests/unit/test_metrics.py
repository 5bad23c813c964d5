"""The runtime's metrics: what dashboards rely on, values, and how they meet those of the host."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from uwm_deploy.errors import DataError
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.drift import DriftMonitor, DriftState
from uwm_deploy.runtime.metrics import Metrics
from uwm_deploy.runtime.selftest import SelfTest
from uwm_deploy.runtime.watch import TowerWatch, record_selftest

_IDENTITY = dict.fromkeys(("bundle", "manifest", "edited_weights", "variant", "space", "device", "provider"), 'x"\\\n')
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_METRICS = {
    "uwm_info": ("gauge", set(_IDENTITY)),
    "uwm_items_total": ("counter", {"tower", "outcome"}),
    "uwm_refused_total": ("counter", {"tower"}),
    "uwm_request_seconds": ("histogram", {"tower"}),
    "uwm_prepare_seconds": ("histogram", {"tower"}),
    "uwm_queue_seconds": ("histogram", {"tower"}),
    "uwm_engine_seconds": ("histogram", {"tower"}),
    "uwm_batch_rows": ("histogram", {"tower"}),
    "uwm_items_on_their_way": ("gauge", {"tower"}),
    "uwm_items_in_line": ("gauge", {"tower"}),
    "uwm_canary_ok": ("gauge", set()),
    "uwm_canary_ratio": ("gauge", {"tower"}),
    "uwm_canary_limit": ("gauge", set()),
    "uwm_selftests_total": ("counter", {"outcome"}),
    "uwm_risk_decisions_total": ("counter", {"decision"}),
    "uwm_drift_rows": ("gauge", {"tower"}),
    "uwm_drift_shift": ("gauge", {"tower"}),
    "uwm_drift_spread": ("gauge", {"tower"}),
    "uwm_drift_alert": ("gauge", {"tower"}),
}
"""Name, type and labels that dashboards and alerts of users rely on."""


def _counted(refresh: Callable[[], None] = lambda: None) -> Metrics:
    """Metrics after a little of everything."""
    metrics = Metrics(_IDENTITY, refresh)
    watch = TowerWatch(TowerName.IMAGE, metrics, DriftMonitor(4))
    watch.batch(np.zeros((3, 4)), [0.1, 0.5, 9.0], 0.02)
    watch.prepared(0.5, 2)
    watch.answered([np.ones(4) / 2, DataError("bad"), np.ones(4) / 2], 0.3)
    watch.refused()
    watch.queue(3, 1)
    watch.drifted(DriftState(5, 0.25, 0.5, alert=True))
    metrics.risk_decisions.labels(decision="block").inc(2)
    record_selftest(metrics, SelfTest({"image": 0.001}, 0.5, "", 0.1))
    return metrics


def _samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def test_metrics_have_the_names_types_labels_and_buckets_that_dashboards_rely_on() -> None:
    """Exactly these, read by the other side's parser: nothing is renamed, added or left out."""
    text = _counted().text()
    kinds = dict(line.split()[2:] for line in text.splitlines() if line.startswith("# TYPE"))
    found: dict[str, set[str]] = {}
    buckets: dict[str, tuple[float, ...]] = {}
    for name, labels in _samples(text):
        base = re.sub("_(bucket|sum|count)$", "", name)
        found.setdefault(base, set()).update({key for key, _ in labels} - {"le"})
        bounds = {float(value) for key, value in labels if key == "le"}
        buckets[base] = tuple(sorted({*buckets.get(base, ()), *bounds}))
    assert {name: (kinds[name], found[name]) for name in found} == _METRICS
    assert set(kinds) == set(_METRICS)
    for name, (kind, _) in _METRICS.items():
        if kind == "histogram":
            bounds = (1, 2, 4, 8, 16, 32, 64, 128) if name == "uwm_batch_rows" else _SECONDS
            assert buckets[name] == (*bounds, math.inf), name


def test_metrics_have_the_values_that_were_counted() -> None:
    """Counts, sums, gauges and buckets, with what a label may hold escaped."""
    samples = _samples(_counted().text())

    def value(name: str, **labels: str) -> float:
        return samples[name, frozenset(labels.items())]

    assert value("uwm_info", **_IDENTITY) == 1
    assert value("uwm_items_total", tower="image", outcome="ok") == 2
    assert value("uwm_items_total", tower="image", outcome="DataError") == 1
    assert value("uwm_refused_total", tower="image") == 1
    assert value("uwm_batch_rows_sum", tower="image") == 3
    assert value("uwm_engine_seconds_bucket", tower="image", le="0.025") == 1
    assert value("uwm_engine_seconds_bucket", tower="image", le="0.01") == 0
    assert value("uwm_queue_seconds_bucket", tower="image", le="0.1") == 1
    assert value("uwm_queue_seconds_bucket", tower="image", le="+Inf") == 3
    assert value("uwm_queue_seconds_sum", tower="image") == pytest.approx(9.6)
    assert value("uwm_prepare_seconds_count", tower="image") == 2
    assert value("uwm_prepare_seconds_sum", tower="image") == pytest.approx(0.5)
    assert value("uwm_request_seconds_sum", tower="image") == pytest.approx(0.3)
    assert (value("uwm_items_on_their_way", tower="image"), value("uwm_items_in_line", tower="image")) == (3, 1)
    assert (value("uwm_canary_ok"), value("uwm_canary_limit")) == (1, 0.5)
    assert value("uwm_canary_ratio", tower="image") == 0.001
    assert value("uwm_selftests_total", outcome="ok") == 1
    assert value("uwm_risk_decisions_total", decision="block") == 2
    assert value("uwm_drift_shift", tower="image") == 0.25
    assert value("uwm_drift_alert", tower="image") == 1


def test_before_the_first_selftest_nothing_says_that_the_model_is_wrong() -> None:
    """A gauge without labels would be 0 from the start, and `uwm_canary_ok` 0 is an alarm."""
    assert "uwm_canary_ok" not in Metrics(_IDENTITY, lambda: None).text()


def test_metrics_stand_beside_those_of_the_host() -> None:
    """Two encoders do not clash; one registry inside the host's gives both, brought up to date, until it is taken out."""
    asked: list[int] = []
    first, second = _counted(lambda: asked.append(1)), _counted()
    host = CollectorRegistry(auto_describe=True)
    Counter("requests_total", "Of the host.", registry=host).inc()
    host.register(first.registry)
    assert not asked
    found = _samples(generate_latest(host).decode())
    assert asked == [1]
    assert found == {**_samples(first.text()), ("requests_total", frozenset()): 1.0} | {
        key: value for key, value in found.items() if key[0] == "requests_created"
    }
    with pytest.raises(ValueError, match="Duplicated"):
        host.register(second.registry)
    host.unregister(first.registry)
    host.register(second.registry)
    assert not {key for key in _samples(generate_latest(REGISTRY).decode()) if key[0].startswith("uwm_")}


_PROCESS = """
from uwm_deploy.runtime.metrics import Metrics
metrics = Metrics({"variant": "a"}, lambda: None)
metrics.refused.labels(tower="image").inc(2)
metrics.in_line.labels(tower="image").set(3)
"""


def test_processes_of_one_server_are_added_up_in_the_librarys_multiprocess_mode(tmp_path: Path) -> None:
    """Counters are summed over processes; a gauge stays that of its process, by its id."""
    for _ in range(2):
        environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", _PROCESS], env=environment, check=True, timeout=120)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    samples = _samples(generate_latest(registry).decode())
    assert samples["uwm_refused_total", frozenset({("tower", "image")})] == 4
    waiting = {
        value for (name, labels), value in samples.items() if name == "uwm_items_in_line" and "pid" in dict(labels)
    }
    assert waiting == {3}
    assert len({dict(labels)["pid"] for name, labels in samples if name == "uwm_items_in_line"}) == 2
