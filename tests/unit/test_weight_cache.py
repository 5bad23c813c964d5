"""Weights that processes share: the same numbers, made once, and never taken from files that are not what was written."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from uwm_deploy.errors import InputError
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.graph import EngineArtifact, Profile, Target, TensorSpec
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime import weight_cache
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.logs import NAME
from uwm_deploy.runtime.service import Serving
from uwm_deploy.runtime.session import Contents, open_engine
from uwm_deploy.runtime.weight_cache import GRAPH, RECORD, WEIGHTS, Entry, WeightCache, key_of

ROOT = Path(__file__).parents[2]
WIDE = 1024
"""Width of the graph whose memory is measured: 16 weights of 4 MiB."""


@pytest.fixture(autouse=True)
def _warnings_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever level a library has given to all logs."""
    caplog.set_level(logging.WARNING, NAME)


def graph_of(width: int, layers: int) -> tuple[EngineArtifact, bytes]:
    """Some multiplications, one after the other, as an engine for ONNX Runtime."""
    rng = np.random.default_rng(0)
    names = ["rows", *(f"y{i}" for i in range(layers))]
    weights = [(rng.standard_normal((width, width)) / width**0.5).astype(np.float32) for _ in range(layers)]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(layers)]
    sides = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", width]) for n in (names[0], names[-1])]
    tensors = [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)]
    graph = helper.make_graph(nodes, "g", sides[:1], sides[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    data = model.SerializeToString()
    specs = [TensorSpec(name=name, dtype="float32", shape=("n", width)) for name in (names[0], names[-1])]
    engine = EngineArtifact(
        variant="onnxruntime-fp32", tower=TowerName.TEXT, target=Target.ONNXRUNTIME, precision="fp32", file="text.onnx",
        digest=digest_of_bytes(data), onnx_digest="", weights_digest="", inputs=(specs[0],), outputs=(specs[1],),
        profile=Profile(min=1, opt=2, max=4), normalised=False, settings={}, versions={}, built_on="cpu", runnable=True,
        seconds=0.0,
    )  # fmt: skip
    return engine, data


ENGINE, DATA = graph_of(64, 3)
ROWS = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)


class Reader:
    """Gives the bytes of an engine, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Contents:
        self.times += 1
        return DATA, {}


def embedded(cache: WeightCache, read: Callable[[], Contents]) -> np.ndarray:
    session = cache.open(ENGINE, read, threads=1)
    try:
        return session.run(ROWS)
    finally:
        session.close()


@pytest.fixture
def cache(tmp_path: Path) -> WeightCache:
    return WeightCache(tmp_path / "cache" / "weights")


@pytest.fixture(scope="module")
def wanted() -> np.ndarray:
    session = open_engine(ENGINE, DATA, {}, threads=1)
    try:
        return session.run(ROWS)
    finally:
        session.close()


def test_weights_in_8_bits_are_mapped_as_they_are(cache: WeightCache) -> None:
    """The same answer as unshared; the graph in the cache makes one weight at a time float32."""
    text = """
        <ir_version: 10, opset_import: ["" : 21]>
        agraph (float[n,64] rows) => (float[n,64] y)
        {
            first = DequantizeLinear <axis: int = 0, block_size: int = 64> (a, s)
            m = MatMul (rows, first)
            second = DequantizeLinear <axis: int = 0, block_size: int = 64> (b, s)
            y = MatMul (m, second)
        }
    """
    model, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    for name in ("a", "b"):
        codes = rng.integers(-127, 128, (64, 64)).astype(np.int8)
        model.graph.initializer.append(numpy_helper.from_array(codes, name))
    model.graph.initializer.append(numpy_helper.from_array(np.full((1, 64), 0.01, np.float32), "s"))
    data = model.SerializeToString()
    specs = [dataclasses.replace(ENGINE.inputs[0], name=name) for name in ("rows", "y")]
    engine = dataclasses.replace(
        ENGINE, precision="w8a16", digest=digest_of_bytes(data), inputs=(specs[0],), outputs=(specs[1],)
    )
    answers = [open_engine(engine, data, {}, threads=1).run(ROWS)]
    answers += [cache.open(engine, lambda: (data, {}), threads=1).run(ROWS) for _ in range(2)]
    assert all(np.array_equal(answer, answers[0]) for answer in answers[1:])
    shared = onnx.load(entry_of(cache) / GRAPH, load_external_data=False)
    assert [node.op_type for node in shared.graph.node] == ["DequantizeLinear", "MatMul"] * 2
    sizes = {t.name: {e.key: e.value for e in t.external_data}.get("length") for t in shared.graph.initializer}
    assert (sizes["a"], sizes["b"]) == ("4096", "4096")


def entry_of(cache: WeightCache) -> Path:
    """The one entry of a cache."""
    (found,) = [path for path in cache.folder.iterdir() if path.is_dir()]
    return found


def test_the_second_opening_reads_nothing_of_the_bundle(cache: WeightCache, wanted: np.ndarray) -> None:
    """Both answer bit for bit as an engine that was opened from its bytes; the files are nobody else's and read-only."""
    read = Reader()
    for _ in range(2):
        assert np.array_equal(embedded(cache, read), wanted)
    assert read.times == 1
    entry = entry_of(cache)
    assert {path.name: path.stat().st_mode & 0o777 for path in entry.iterdir()} == {
        GRAPH: 0o400, WEIGHTS: 0o400, RECORD: 0o400,
    }  # fmt: skip
    assert (cache.folder.stat().st_mode & 0o777, entry.stat().st_mode & 0o777) == (0o700, 0o700)


def damaged(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.chmod(0o600)
    path.write_bytes(change(path.read_bytes()))


def of_another(entry: Path, name: str) -> None:
    text = json.loads((entry / RECORD).read_text())
    text["key"][name] += "!"
    damaged(entry / RECORD, lambda _: json.dumps(text).encode())


def linked(entry: Path) -> None:
    moved = entry.rename(entry.parent.parent / "elsewhere")
    entry.symlink_to(moved)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a weight": lambda e: damaged(e / WEIGHTS, lambda data: bytes([data[0] ^ 1]) + data[1:]),
    "the last byte": lambda e: damaged(e / WEIGHTS, lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "cut short": lambda e: damaged(e / WEIGHTS, lambda data: data[:-64]),
    "longer": lambda e: damaged(e / WEIGHTS, lambda data: data + data[:64]),
    "empty": lambda e: damaged(e / WEIGHTS, lambda _: b""),
    "the graph": lambda e: damaged(e / GRAPH, lambda data: data.replace(b"MatMul", b"MatMuL")),
    "no record": lambda e: (e / RECORD).unlink(),
    "no JSON": lambda e: damaged(e / RECORD, lambda data: data[: len(data) // 2]),
    "not in UTF-8": lambda e: damaged(e / RECORD, lambda _: b"\xff{"),
    "another processor": lambda e: of_another(e, "processor"),
    "another ONNX Runtime": lambda e: of_another(e, "onnxruntime"),
    "another engine": lambda e: of_another(e, "engine"),
    "one file more": lambda e: (e / "more").write_bytes(b""),
    "a folder more": lambda e: (e / "more").mkdir(),
    "a hard link": lambda e: os.link(e / WEIGHTS, e.parent / "again"),
    "a link to the weights": lambda e: (
        (e / WEIGHTS).rename(e.parent / "moved") and (e / WEIGHTS).symlink_to("../moved")
    ),
    "a link to the entry": linked,
    "a pipe": lambda e: ((e / WEIGHTS).unlink(), os.mkfifo(e / WEIGHTS)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_as_it_was_written_is_made_again(cache: WeightCache, wanted: np.ndarray, change: str) -> None:
    """Nothing of such an entry is used: the bundle's bytes are read again, and the answer is right."""
    read = Reader()
    embedded(cache, read)
    CHANGES[change](entry_of(cache))
    assert np.array_equal(embedded(cache, read), wanted)
    assert read.times == 2
    assert np.array_equal(embedded(cache, read), wanted)
    assert read.times == 2


def test_another_processor_or_engine_has_an_entry_of_its_own(tmp_path: Path) -> None:
    """Flags of the processor are part of the key, its clock is not; so is the engine."""
    cpus = tmp_path / "cpuinfo"
    keys = []
    for text in (
        "flags\t: fpu avx2\ncpu MHz\t: 1\n",
        "flags\t: fpu avx2 avx512f\ncpu MHz\t: 1\n",
        "flags\t: fpu avx2\ncpu MHz\t: 2\n",
    ):
        cpus.write_text(text)
        keys.append(key_of(ENGINE, cpus))
    assert keys[0] == keys[2] != keys[1]
    assert key_of(graph_of(64, 2)[0], cpus) != keys[2]


def test_a_cache_of_others_is_refused(tmp_path: Path) -> None:
    """A link, or a folder that the group may write to: what is mapped from there could be changed."""
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(InputError, match="in the way"):
        embedded(WeightCache(tmp_path / "link"), Reader())
    real.chmod(0o770)
    with pytest.raises(InputError, match="not this user's alone"):
        embedded(WeightCache(real), Reader())
    assert not list(real.iterdir())


WORKER = """
import sys
from tests.unit.test_weight_cache import ENGINE, DATA, ROWS, WeightCache, Path
def read():
    print("read", flush=True)
    {before}
    return DATA, {{}}
row = WeightCache(Path(sys.argv[1])).open(ENGINE, read, threads=1).run(ROWS)
print(row.tobytes().hex())
"""


def started(cache: WeightCache, before: str = "") -> subprocess.Popen[str]:
    code = [sys.executable, "-c", WORKER.format(before=before), str(cache.folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


def test_processes_at_once_make_it_once(cache: WeightCache, wanted: np.ndarray) -> None:
    """One reads the bundle, the others wait for what it makes; one that was killed while it did so is in nobody's way."""
    killed = started(cache, "(Path(sys.argv[1]) / 'half').write_text(''); import os; os._exit(9)")
    assert killed.communicate(timeout=60)[0].split() == ["read"]
    assert killed.returncode == 9
    told = [worker.communicate(timeout=60) for worker in [started(cache) for _ in range(3)]]
    assert all(wanted.tobytes().hex() in out for out, _ in told), told
    assert sum(out.count("read") for out, _ in told) == 1


def test_a_disk_that_fills_up_costs_the_sharing_only(cache: WeightCache, wanted: np.ndarray) -> None:
    """A limit is like a full disk: the process has weights of its own, and leaves nothing in the cache."""
    limited = started(cache, "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
                             "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))")  # fmt: skip
    told, error = limited.communicate(timeout=60)
    assert wanted.tobytes().hex() in told, error
    assert "weights-not-shared" in error
    assert not [path for path in cache.folder.iterdir() if path.is_dir()]


def test_a_disk_without_room_costs_the_sharing_only(
    cache: WeightCache, wanted: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same where it is known beforehand; the log line says what is needed."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert np.array_equal(embedded(cache, Reader()), wanted)
    assert "MiB, and there are 0; free space" in caplog.text


DELETED = {"lock": "hold", "writing": "pack", "reading": "open_packed"}


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("moment", DELETED)
def test_a_cache_may_be_deleted_at_any_time(
    cache: WeightCache, wanted: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    moment: str, whole: bool, always: bool,
) -> None:  # fmt: skip
    """Once, and the entry is made again; each time, and the process has weights of its own, and says so."""
    place = f"uwm_deploy.runtime.weight_cache.{DELETED[moment]}"
    before, times = getattr(weight_cache, DELETED[moment]), []

    def after_it_was_deleted(*args: object, **named: object) -> object:
        if always or not times:
            times.append(1)
            for path in [cache.folder] if whole else list(cache.folder.iterdir()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return before(*args, **named)

    monkeypatch.setattr(place, after_it_was_deleted)
    assert np.array_equal(embedded(cache, Reader()), wanted)
    harmless = moment == "lock" and not whole  # there was nothing yet
    assert ("weights-not-shared" in caplog.text) == (always and not harmless)
    monkeypatch.setattr(place, before)
    read = Reader()
    assert np.array_equal(embedded(cache, read), wanted)
    assert read.times == (always and not harmless)


def test_a_folder_in_place_of_a_lock_is_named(cache: WeightCache) -> None:
    """By the path that the user knows, not by the number of an open file."""
    embedded(cache, Reader())
    lock = next(cache.folder.glob("*.lock"))
    shutil.rmtree(entry_of(cache))
    lock.unlink()
    lock.mkdir()
    with pytest.raises(InputError, match=re.escape(f"{lock} is in the way")):
        embedded(cache, Reader())


def test_a_limit_of_the_machine_is_no_damage(cache: WeightCache, caplog: pytest.LogCaptureFixture) -> None:
    """Without a free descriptor the entry cannot be looked at: it stays, and the log says what helps."""
    embedded(cache, Reader())
    kept = sorted((path.name, path.stat().st_mtime_ns) for path in entry_of(cache).iterdir())
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    holes = [os.open(os.devnull, os.O_RDONLY)]
    while holes[-1] < max(int(name) for name in os.listdir("/proc/self/fd")) - 1:  # the limit counts from 0
        holes.append(os.open(os.devnull, os.O_RDONLY))
    try:
        for more in (1, 2, 3):
            resource.setrlimit(resource.RLIMIT_NOFILE, (holes[-1] + more, before[1]))
            caplog.clear()
            embedded(cache, Reader())
            assert "too many files are open" in caplog.text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for hole in holes:
            os.close(hole)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in entry_of(cache).iterdir()) == kept


MEMORY = """
import sys
from pathlib import Path
from tests.unit.test_weight_cache import ROWS, WIDE, graph_of
from uwm_deploy.runtime.session import open_engine
from uwm_deploy.runtime.weight_cache import WeightCache
import numpy as np
import onnxruntime
def private():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Anonymous"))) / 2048
engine, data = graph_of(WIDE, 16)
before = private()
if sys.argv[1] == "own":
    session = open_engine(engine, data, {}, threads=1)
else:
    session = WeightCache(Path(sys.argv[1])).open(engine, lambda: (data, {}), threads=1)
row = session.run(np.ones((1, WIDE), np.float32))
print(private() - before, row.tobytes().hex())
"""


def test_a_process_has_no_copy_of_its_own(cache: WeightCache) -> None:
    """Of 64 MiB of weights hardly anything is memory of the process, not even of the one that made the entry."""

    def measured(which: str) -> tuple[float, str]:
        code, environment = [sys.executable, "-c", MEMORY, which], os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(code, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120, check=True)
        mib, row = done.stdout.split()
        return float(mib), row

    own, first, second = (measured(which) for which in ("own", str(cache.folder), str(cache.folder)))
    assert own[1] == first[1] == second[1]
    assert own[0] > 60
    assert max(first[0], second[0]) < 16


def test_a_bundle_is_served_from_shared_weights(built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the same embeddings, and a bundle that may not be written to."""
    monkeypatch.setenv("UWM_DEPLOY_CACHE", str(tmp_path / "cache"))
    bundle = Path(shutil.copytree(built[0].out, tmp_path / "bundle"))
    for path in [*bundle.rglob("*"), bundle]:
        path.chmod(0o500 if path.is_dir() else 0o400)
    images = [np.full((60, 70, 3), value, np.uint8) for value in (10, 200)]
    found = []
    for weights in ("own", "shared", "shared"):
        with SafeEncoder.open(bundle, device="cpu", serving=Serving(weights=weights)) as encoder:
            assert encoder.selftest().ok
            found.append((encoder.encode_image(images), encoder.encode_text(["a circle"])))
    assert all(np.array_equal(a, b) for row in found[1:] for a, b in zip(row, found[0], strict=True))
    assert len(list((tmp_path / "cache" / "weights").glob("*/" + RECORD))) == 2
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with SafeEncoder.open(bundle) as own, SafeEncoder.open(bundle, serving=Serving(weights="shared")) as without_room:
        assert without_room.why == own.why  # no other variant
    for path in [bundle, *bundle.rglob("*")]:
        path.chmod(0o700)
    with pytest.raises(InputError, match='pass "own" or "shared"'):
        Serving(weights="all")  # type: ignore[arg-type]


def test_the_record_of_an_entry_is_read_back(cache: WeightCache) -> None:
    """It names the parts of the weights, each by its digest."""
    embedded(cache, Reader())
    text = (entry_of(cache) / RECORD).read_text()
    entry = record_from_json(Entry, text, where=RECORD)
    assert json_from_record(entry) == text
    assert dict(entry.key) == key_of(ENGINE)
    assert len(entry.weights) == 1
