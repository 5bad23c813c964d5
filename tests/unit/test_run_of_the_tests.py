"""What the tests promise of themselves: no skip passes where all must run, and nobody changes what all share."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFTEST = "from tests.conftest import *\n"
SKIPPED = """
import pytest

def test_runs():
    pass

def test_is_skipped():
    pytest.skip("{reason}")
"""
SHARED = """
from tests.made_once import copy_of, made_once

def test_looks(tmp_path_factory, tmp_path):
    folder = made_once(tmp_path_factory, "shared", lambda to: (to / "a.txt").write_text("a"))
    own = copy_of(folder, tmp_path / "own")
    (own / "a.txt").write_text("b")
    again = made_once(tmp_path_factory, "shared", lambda to: 1 / 0)
    {line}
    assert (folder, (folder / "a.txt").read_text()) == (again, "{left}")
"""


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder of tests with the hooks of ours, run by a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)
    pytester.makeconftest(CONFTEST)
    return pytester


@pytest.mark.parametrize(
    ("must_run", "reason", "workers", "code"),
    [
        ("1", "not run: cyclonedx is not installed", "0", 1),
        ("1", "not run: cyclonedx is not installed", "1", 1),
        ("1", "not run: this machine has no NVIDIA GPU", "0", 0),
        ("", "not run: cyclonedx is not installed", "0", 0),
    ],
    ids=["must run", "must run in a worker", "cannot run", "may be skipped"],
)
def test_a_skip_fails_where_all_must_run(
    must_run: str, reason: str, workers: str, code: int, inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless no such machine could run it; its name and its reason are told, by whichever worker it was met."""
    monkeypatch.setenv("UWM_DEPLOY_TESTS_MUST_RUN", must_run)
    inner.makepyfile(SKIPPED.format(reason=reason))
    done = inner.runpytest_subprocess("-n", workers)
    assert done.ret == code
    done.assert_outcomes(passed=1, skipped=1)
    assert (f"test_is_skipped: Skipped: {reason}" in done.stdout.str()) is bool(code)


def test_a_file_that_is_skipped_whole_counts(inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is missing when the file is read."""
    monkeypatch.setenv("UWM_DEPLOY_TESTS_MUST_RUN", "1")
    inner.makepyfile('import pytest\npytest.importorskip("no_such_package")\n')
    done = inner.runpytest_subprocess("-n", "1")
    assert done.ret == 1
    assert "no_such_package" in done.stdout.str()


@pytest.mark.parametrize(
    ("line", "left", "code"),
    [("pass", "a", 0), ('(folder / "a.txt").write_text("c")', "c", 1)],
    ids=["looks", "changes"],
)
def test_what_is_made_once_is_changed_by_nobody(line: str, left: str, code: int, inner: pytest.Pytester) -> None:
    """It is made by one, found by the next, and a change fails the run although every test passed."""
    inner.makepyfile(SHARED.format(line=line, left=left))
    done = inner.runpytest_subprocess("-n", "1")
    done.assert_outcomes(passed=1)
    assert done.ret == code
    assert ("shared/a.txt" in done.stdout.str()) is bool(code)
