"""Tests are offline, on the CPU, with few threads; a folder's need is its name."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads of several workers wait for each other on few cores: with two each, everything takes two to four times as long.
# One also where there is no worker: what starts the workers reads this first, and they inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import pytest

from tests import skips
from tests.made_once import changed_since

pytest_plugins = ["pytester"]

WORKER = "PYTEST_XDIST_WORKER" in os.environ

gc.disable()  # until all tests are collected: next to nothing of what is made before is garbage, and looking takes seconds


def pytest_configure(config: pytest.Config) -> None:
    """Where all tests must run, a skip is no success."""
    skips.register(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none, and says so."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="not run: this machine has no NVIDIA GPU"))


def pytest_collection_finish() -> None:
    """Modules stay to the end, so the garbage collector need not look through them; an export makes garbage in bulk."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Libraries that some test has imported are told to share the machine, and to look things up once."""
    if "onnxruntime" in sys.modules and WORKER:
        _one_thread_per_session()
    if "torch.onnx._internal.exporter._registration" in sys.modules:
        _operators_are_read_once()
    with _long_lines(item):
        yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Tests look for what is said, not for where a printed line goes on; `tests/unit/test_widths.py` does."""
    with _long_lines(item):
        yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """What a test has set is set back in here."""
    with _long_lines(item):
        yield


_COLUMNS = pytest.StashKey[str | None]()


@contextlib.contextmanager
def _long_lines(item: pytest.Item) -> Iterator[None]:
    """Printed lines are not broken, unless a fixture or the test says how wide they are; pytest's own are as before."""
    outside = os.environ.get("COLUMNS")
    _set_columns(item.stash.get(_COLUMNS, "4000"))
    try:
        yield
    finally:
        item.stash[_COLUMNS] = os.environ.get("COLUMNS")
        _set_columns(outside)


def _set_columns(value: str | None) -> None:
    os.environ.pop("COLUMNS", None)
    if value is not None:
        os.environ["COLUMNS"] = value


@functools.cache
def _one_thread_per_session() -> None:
    """ONNX Runtime takes every core by default, and its threads wait for work by spinning."""
    import onnxruntime

    class OneThread(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, model: object, sess_options: object = None, *more: object, **named: object) -> None:
            options = sess_options or onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.intra_op_num_threads or 1
            super().__init__(model, options, *more, **named)

    onnxruntime.InferenceSession = OneThread


@functools.cache
def _operators_are_read_once() -> None:
    """The exporter parses the source of some 500 operators for every graph, which is half of the time that it takes."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))


@pytest.hookimpl(tryfirst=True)  # before temporary folders are removed
def pytest_sessionfinish(session: pytest.Session) -> None:
    """What tests share is as it was made, else none of them is believed."""
    if hasattr(session.config, "workerinput"):
        return
    factory = session.config._tmp_path_factory
    session.config.stash[_CHANGED] = found = changed_since(factory.getbasetemp())
    if found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


_CHANGED = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Names what was changed."""
    found = config.stash.get(_CHANGED, [])
    if found:
        terminalreporter.section("tests changed what they share", red=True)
    for name in found:
        terminalreporter.line(name)


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores: workers wait for child processes, and for what another one makes for all."""
    return len(os.sched_getaffinity(0)) + 1
