"""Where tests must run, as in CI, one that is skipped is a failure unless no such machine could run it."""

from __future__ import annotations

import os

import pytest

MUST_RUN = "UWM_DEPLOY_TESTS_MUST_RUN"
"""Set by `.ci/run`."""

ALLOWED = (
    "GPU",
    "package nvidia-modelopt is not installed",  # [quantize] and [ray] are installed when slow tests are asked for
    "ray is not installed",
    "package nudenet is not installed",  # its pins bring another build of ONNX Runtime
    "UWM_DEPLOY_MLSERVER_VENV names no virtual environment",  # mlserver's pins contradict this package's
    "UWM_OSCAL_SCHEMA does not name",  # NIST's schema is not in this repository
    "UWM_SIGNING_CORPUS does not name",  # nor are models that other tools signed
    "chromium is not there",  # a program of the system, which not every machine may install
    "axe-core is not there",  # from another registry than Python's
    "is installed here",  # what such a test is about is that a package is missing
)
"""Parts of reasons: what machines of CI cannot have, or do not install."""


class SkipsMustBeAllowed:
    """Plugin of the process that reports: it sees the outcomes of all workers."""

    def __init__(self) -> None:
        self._refused: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a test, or its fixtures."""
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Of a whole file, when it is read."""
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(part in reason for part in ALLOWED):
            self._refused[report.nodeid] = reason

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """The run fails."""
        if self._refused and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """And says why."""
        if self._refused:
            terminalreporter.section(f"skipped, but {MUST_RUN} is set: install what is missing", red=True)
        for name, reason in self._refused.items():
            terminalreporter.line(f"{name}: {reason}")


def register(config: pytest.Config) -> None:
    """Where the environment says that tests must run, and this is no worker."""
    if os.environ.get(MUST_RUN) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkipsMustBeAllowed())
