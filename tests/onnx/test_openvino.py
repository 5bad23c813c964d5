"""Target `openvino`: a model computes the same, holds the edit, runs in its precision, and is opened from bytes."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib.util
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.onnx.conftest import Exported
from tests.onnx.test_precision import PROFILE, convert, reference, rows
from uwm_deploy.errors import ContractError, PrerequisiteError
from uwm_deploy.graphs.openvino_builder import named_constants
from uwm_deploy.graphs.stored_weights import named_weights
from uwm_deploy.records.files import digest_of_file, joined_digest
from uwm_deploy.records.graph import EngineArtifact, OnnxArtifact, Precision, Target
from uwm_deploy.records.studies import BenchSubject
from uwm_deploy.runtime.openvino import OpenVinoSession, _SignalStack, reason_not_usable
from uwm_deploy.runtime.session import external_data_of, open_engine
from uwm_deploy.stages.compile import engine_from_onnx
from uwm_deploy.stages.convert.convert import embed_with
from uwm_deploy.studies.bench import Contender
from uwm_deploy.studies.bench import _opened as bench_opened

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="not run: package openvino is not installed"
)


def compiled(exported: Exported, graph: OnnxArtifact, source: Path, folder: Path) -> EngineArtifact:
    folder.mkdir(exist_ok=True)
    return engine_from_onnx(graph, source, Target.OPENVINO, PROFILE, exported.case.edits, folder)


def opened(engine: EngineArtifact, folder: Path, calls: int = 1) -> OpenVinoSession:
    data = external_data_of(folder, engine.external_data)
    session = open_engine(engine, (folder / engine.file).read_bytes(), data, threads=1, calls=calls)
    assert isinstance(session, OpenVinoSession)
    return session


@needs_openvino
def test_float32_computes_the_same_from_the_same_constants(exported: Exported, tmp_path: Path) -> None:
    """Embeddings are the exported graph's, at any batch, and every constant with a name is the graph's, bit for bit."""
    engine = compiled(exported, exported.artifact, exported.folder, tmp_path)
    assert (engine.variant, engine.runnable, engine.built_on) == ("openvino-fp32", True, "cpu")
    files = [tmp_path / engine.file, tmp_path / engine.external_data]
    assert engine.digest == joined_digest([digest_of_file(file) for file in files])
    held = dict(named_constants(tmp_path / engine.file))
    edits = {edit.name for edit in exported.case.edits}
    shared = {n: w for n, w in named_weights(exported.folder / exported.artifact.file) if n in held}
    assert edits <= shared.keys()
    assert all(np.array_equal(held[name], weight) for name, weight in shared.items())
    session = opened(engine, tmp_path)
    assert session.where["computes_in"] == "f32"
    for count in (1, 3, 9):  # more than its profile takes at once
        assert np.abs(session.run(rows(exported, count)) - reference(exported, count)).max() < 1e-5


@needs_openvino
@pytest.mark.parametrize(("precision", "cosine"), [("int8", 0.97), ("w8a16", 0.999), ("bf16", 0.999)])
def test_lower_precisions_are_multiplied_in_what_they_say(
    exported: Exported, tmp_path: Path, precision: str, cosine: float
) -> None:
    """Near float32 and not equal; OpenVINO itself says what it multiplies in; a row does not depend on its batch."""
    lowered = Precision(precision)
    if reason := reason_not_usable(precision):
        with pytest.raises(PrerequisiteError, match=reason):
            compiled(exported, convert(exported, tmp_path / "graphs", lowered), tmp_path / "graphs", tmp_path / "e")
        return
    graph = convert(exported, tmp_path / "graphs", lowered)
    engine = compiled(exported, graph, tmp_path / "graphs", tmp_path / "engine")
    kinds = {part.split()[0] for part in engine.settings["multiplied_in"].split(", ")}
    assert {"int8": "i8*i8", "w8a16": "f32*i8", "bf16": "bf16*bf16"}[precision] in kinds
    session, wanted = opened(engine, tmp_path / "engine"), reference(exported, 5)
    subject = BenchSubject(name=engine.variant, precision=lowered, state="proven", digests={})
    timed, where = bench_opened(Contender(subject, lambda _: opened(engine, tmp_path / "engine")), engine.tower)
    timed.close()
    assert (where["threads"], where["multiplied_in"]) == ("1", engine.settings["multiplied_in"])
    assert "computes_in" not in where
    found = session.run(rows(exported, 5))
    assert (found * wanted).sum(1).min() > cosine
    assert not np.array_equal(found, wanted)
    if lowered is Precision.W8A16:  # activations are not rounded as well, which OpenVINO does unless it is told not to
        other = embed_with(graph, tmp_path / "graphs" / graph.file, lowered, [rows(exported, 5)])
        assert np.abs(found - other).max() < 1e-5
    alone = np.concatenate([session.run(rows(exported, 5)[i : i + 1]) for i in range(5)])
    assert (alone * found).sum(1).min() > 0.9999


@needs_openvino
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.FP8])
def test_what_a_cpu_does_not_compute_in_is_refused(exported: Exported, tmp_path: Path, precision: Precision) -> None:
    """Before anything is written, with what to use instead."""
    graph = convert(exported, tmp_path / "graphs", precision)
    with pytest.raises(PrerequisiteError, match=f"does not compute in {precision.value}") as caught:
        compiled(exported, graph, tmp_path / "graphs", tmp_path / "engine")
    assert "int8" in caught.value.fix
    assert not list((tmp_path / "engine").iterdir())


@needs_openvino
def test_a_lost_edit_is_refused(text_export: Exported, tmp_path: Path) -> None:
    """The edit is looked up in the constants that were written, not in what the record says."""
    first, *others = text_export.case.edits
    other = dataclasses.replace(first, digest_after="sha256:" + "0" * 64)
    with pytest.raises(ContractError, match=r"the edit was lost in text\.xml"):
        engine_from_onnx(text_export.artifact, text_export.folder, Target.OPENVINO, PROFILE, (other, *others), tmp_path)


@needs_openvino
def test_it_opens_from_bytes_alone_and_says_what_is_wrong_with_them(exported: Exported, tmp_path: Path) -> None:
    """Checked bytes are what runs: no file is read again. Constants that are cut off, or no model, are an error."""
    engine = compiled(exported, exported.artifact, exported.folder, tmp_path)
    model, weights = ((tmp_path / name).read_bytes() for name in (engine.file, engine.external_data))
    for name in (engine.file, engine.external_data):
        (tmp_path / name).unlink()
    session = open_engine(engine, model, {engine.external_data: weights}, threads=1)
    assert np.abs(session.run(rows(exported, 2)) - reference(exported, 2)).max() < 1e-5
    for broken in ((model, weights[: len(weights) // 2]), (model, b""), (b"<net/>", weights), (b"", weights)):
        with pytest.raises(PrerequisiteError, match="OpenVINO cannot open the model") as caught:
            open_engine(engine, broken[0], {engine.external_data: broken[1]}, threads=1)
        assert caught.value.exit_code == 6


@needs_openvino
@pytest.mark.parametrize("calls", [1, 2])
def test_threads_get_their_own_rows(exported: Exported, tmp_path: Path, calls: int) -> None:
    """However many calls are under way: rows of one are never overwritten by another."""
    engine = compiled(exported, exported.artifact, exported.folder, tmp_path)
    session = opened(engine, tmp_path, calls)
    inputs = [exported.case.inputs(1 + seed % 3, seed).numpy() for seed in range(40)]
    wanted = [session.run(part) for part in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(session.run, inputs))
    assert all(np.abs(one - other).max() < 1e-6 for one, other in zip(found, wanted, strict=True))


@needs_openvino
def test_a_signal_after_sessions_were_closed_ends_nothing(exported: Exported, tmp_path: Path) -> None:
    """OpenVINO's own stack for signal handlers is never left behind: neither while a session is open, nor afterwards."""

    def stack() -> tuple[object, ...]:
        found = _SignalStack()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
        return found.address, found.flags, found.size_bytes

    engine = compiled(exported, exported.artifact, exported.folder, tmp_path)
    before = stack()
    one, two = opened(engine, tmp_path), opened(engine, tmp_path)
    assert stack() == before
    for session in (one, two):  # in the order they were opened
        session.run(rows(exported, 2))
        session.close()
    del one, two, session
    gc.collect()
    assert stack() == before
    heard: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert heard == [signal.SIGUSR1]


def test_without_the_package_it_says_how_to_get_it(
    text_export: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of its own kind before a process is started."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "openvino" else find(name))
    with pytest.raises(PrerequisiteError, match="package openvino is not installed") as caught:
        compiled(text_export, text_export.artifact, text_export.folder, tmp_path)
    assert caught.value.fix == "pip install 'uwm-deploy[openvino]'"
