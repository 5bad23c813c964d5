"""Whether an encoder still serves the edited model, and what it is given still looks like the evidence; and its metrics."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from uwm_deploy.bundle.open import Bundle
from uwm_deploy.errors import IntegrityError, PrerequisiteError, UwmError
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.machine import failure_of_machine
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.drift import DriftMonitor, DriftState
from uwm_deploy.runtime.fork import Home
from uwm_deploy.runtime.logs import event
from uwm_deploy.runtime.metrics import Metrics
from uwm_deploy.runtime.preprocessing import Preprocessing
from uwm_deploy.runtime.raw_canaries import prepared_raw, problem_of_raw
from uwm_deploy.runtime.selftest import SelfTest, canaries_of, reference_mean
from uwm_deploy.runtime.service import TowerService
from uwm_deploy.runtime.watch import TowerWatch, record_selftest
from uwm_deploy.safeground.canaries import CANARIES, RATIO_LIMIT, Canaries

SELFTEST_SECONDS = 60.0
"""A self-test that takes longer has failed: whoever asks wants to know whether requests are answered."""


class Monitor:
    """Self-tests, drift and metrics of one encoder.

    Args:
        bundle: Which holds the canaries and the evidence.
        identity: See `Metrics`.

    Attributes:
        metrics: Of the encoder.
        watches: What counts for each tower.
    """

    def __init__(self, bundle: Bundle, identity: Mapping[str, str]) -> None:
        self._bundle, self._canaries, self._variant = bundle, canaries_of(bundle), identity["variant"]
        self.metrics = Metrics(identity, self._refresh)
        width = bundle.manifest.model.embed_dim
        self.watches = {tower: TowerWatch(tower, self.metrics, DriftMonitor(width)) for tower in TowerName}
        self._services: Mapping[TowerName, TowerService] = {}
        self._means: dict[TowerName, np.ndarray | None] = {}
        self._lock, self._home = threading.Lock(), Home()

    def begin(self, services: Mapping[TowerName, TowerService]) -> None:
        """The towers are at work."""
        self._services = services

    def selftest(self, rows: int) -> SelfTest:
        """Runs the canaries through the served path.

        Args:
            rows: Canaries per edited tower, at most those that there are.
        """
        if (
            self._home.elsewhere
        ):  # nothing is counted: the locks of the metrics may be held by threads that are not here
            return SelfTest(
                {}, RATIO_LIMIT, "the encoder was opened in another process, which this one was forked off", 0.0
            )
        return self._selftest(rows)[0]

    def _selftest(self, rows: int) -> tuple[SelfTest, Exception | None]:
        """The result, and what was raised meanwhile."""
        started, ratios, error, raised = time.monotonic(), {}, "", None
        try:
            for tower, canaries in self._canaries.items():
                some = Canaries(canaries.inputs[:rows], canaries.original[:rows], canaries.edited[:rows])
                ratios[tower.value] = some.worst(self._services[tower].run_rows(some.inputs, SELFTEST_SECONDS))
        except Exception as failure:  # whatever it is, the answer to the probe is no
            error, raised = str(failure) or type(failure).__name__, failure
        if not self._canaries:
            error = "the bundle has no canaries"
        result = SelfTest(ratios, RATIO_LIMIT, error, time.monotonic() - started)
        record_selftest(self.metrics, result)
        return result, raised

    def check_at_load(self, rows: int, preprocessing: Preprocessing, *, allow_unsafe: bool) -> None:
        """The self-test before the first caller is let in: prepared rows, and encoded images.

        Texts are asked where all canaries are: opening a large vocabulary may take longer than all else.

        Args:
            rows: See `selftest`; 0 leaves it out.
            preprocessing: As the encoder uses it.
            allow_unsafe: Whether what does not answer like the edited model is let pass.

        Raises:
            IntegrityError: If it does not.
            PrerequisiteError: If the machine failed, which says nothing about the bundle.
        """
        if not rows:
            return
        result, raised = self._selftest(rows)
        if isinstance(raised, PrerequisiteError):
            raise raised
        if raised is not None and (failure := failure_of_machine(raised, self._bundle.path)):
            raise failure from raised
        if not result.ok and not allow_unsafe:
            told = result.error or ", ".join(f"{tower} {ratio:.3g}" for tower, ratio in result.ratios.items())
            raise IntegrityError(
                f"variant {self._variant} does not answer like the edited model (canaries: {told}; limit {RATIO_LIMIT})",
                fix="build the bundle again; do not serve it",
            )
        if not allow_unsafe:
            self._check_raw(preprocessing, TowerName if rows >= CANARIES else (TowerName.IMAGE,))

    def _check_raw(self, preprocessing: Preprocessing, towers: Iterable[TowerName]) -> None:
        """Encoded images and texts of the bundle become what they became when it was built."""
        precision = Precision(self._bundle.engines(self._variant)[TowerName.IMAGE].precision)

        def embed(tower: TowerName, items: Sequence[bytes]) -> np.ndarray:
            rows = prepared_raw(preprocessing, tower, items)
            return self._services[tower].run_rows(rows, SELFTEST_SECONDS)

        if problem := problem_of_raw(self._bundle, embed, precision, towers):
            raise IntegrityError(f"variant {self._variant}: {problem}", fix="build the bundle again; do not serve it")

    def drift(self) -> dict[str, DriftState]:
        """Per tower, how the embeddings of late compare with those of the evaluation set; empty without evidence.

        Raises:
            InputError: In a forked process.
        """
        self._home.check()
        found = {}
        for tower in self._services:
            mean, watch = self._mean(tower), self.watches[tower]
            if mean is not None:
                found[tower.value] = watch.drift.state(mean)
                watch.drifted(found[tower.value])
        return found

    def _refresh(self) -> None:
        for service in self._services.values():
            service.told()
        self.drift()

    def _mean(self, tower: TowerName) -> np.ndarray | None:
        """Of the evidence; read when first asked for, since it can be large."""
        with self._lock:
            if tower not in self._means:
                try:
                    self._means[tower] = reference_mean(self._bundle, tower)
                except UwmError as error:  # changed on disk since it was checked: no reason to stop counting
                    event(logging.ERROR, "no-reference", tower=tower.value, error=str(error))
                    self._means[tower] = None
            return self._means[tower]
