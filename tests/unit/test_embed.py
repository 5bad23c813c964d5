"""Embedding many items: the callable, the parts, resuming after a kill, what is refused, and a cluster's result."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException
from PIL import Image
from pyarrow import parquet

from tests.data_sets import put, write_shard
from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.cli import cli
from uwm_deploy.errors import (
    ContractError,
    DataError,
    EvidenceError,
    InputError,
    IntegrityError,
    PrerequisiteError,
    UnreadableError,
)
from uwm_deploy.records.files import digest_of_file
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.service import Serving
from uwm_deploy.serve.embed.batch import EmbedBatch
from uwm_deploy.serve.embed.job import EmbedReport, _batches
from uwm_deploy.serve.embed.parts import PartWriter, finished_keys
from uwm_deploy.serve.embed.sources import Item

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(built) -> Path:
    request, _ = built
    return request.out


def _jpeg(seed: int) -> bytes:
    colours = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(colours).resize((40, 40), Image.Resampling.BICUBIC).save(stream, "JPEG")
    return stream.getvalue()


def _embed(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["embed", *map(str, arguments)])


def _rows(folder: Path) -> dict[str, tuple[np.ndarray, str]]:
    """All rows of a folder by key; no key may be there twice."""
    found: dict[str, tuple[np.ndarray, str]] = {}
    for path in sorted(folder.glob("part-*.parquet")):
        table = parquet.read_table(path)
        rows = np.asarray(table["embedding"].combine_chunks().flatten()).reshape(len(table), -1)
        for key, row, error in zip(table["key"].to_pylist(), rows, table["error"].to_pylist(), strict=True):
            assert key not in found
            found[key] = row, error
    return found


def _assert_same(left: dict[str, tuple[np.ndarray, str]], right: dict[str, tuple[np.ndarray, str]]) -> None:
    assert left.keys() == right.keys()
    for key, (row, error) in left.items():
        assert right[key][1] == error
        np.testing.assert_allclose(row, right[key][0], atol=1e-5)


def test_the_callable_is_columns_in_and_columns_out(bundle: Path) -> None:
    """Rows equal the encoder's, in order; broken items and items with an error already cost their row only."""
    images = [_jpeg(0), b"no image", _jpeg(1), None, float("nan")]
    errors = ["", "", "", "never read", ""]
    found = EmbedBatch(bundle)({"key": ["a", 2, "c", "d", "e"], "image": images, "error": errors})
    assert list(found) == ["key", "embedding", "error", "bundle", "variant", "space"]
    assert found["key"].tolist() == ["a", "2", "c", "d", "e"]
    assert found["error"][[0, 2]].tolist() == ["", ""]
    assert "not a whole image" in found["error"][1]
    assert found["error"][3:].tolist() == ["never read", "it has no image"]
    assert np.isnan(found["embedding"][[1, 3, 4]]).all()
    assert set(found["bundle"]) == {digest_of_file(bundle / "manifest.json")}
    with SafeEncoder.open(bundle) as encoder:
        np.testing.assert_allclose(found["embedding"][[0, 2]], encoder.encode_image([images[0], images[2]]), atol=1e-5)
        texts = EmbedBatch(bundle, kind="texts", key="id", column="caption", dtype="float16")
        rows = texts({"id": np.array([1, 2]), "caption": np.array(["a red circle", "a star"]), "more": [0, 0]})
        assert rows["embedding"].dtype == np.float16
        np.testing.assert_allclose(
            rows["embedding"].astype(np.float32), encoder.encode_text(["a red circle", "a star"]), atol=1e-3
        )
    assert EmbedBatch(bundle)({"key": [], "image": []})["embedding"].shape == (0, 64)
    with pytest.raises(InputError, match="no column 'image'; it has key"):
        EmbedBatch(bundle)({"key": []})


@pytest.mark.parametrize("at_load", [True, False])
def test_a_thread_that_cannot_be_started_says_nothing_about_the_bundle(bundle: Path, at_load: bool) -> None:
    """Neither changed nor closed: each new thread wants a stack that is larger than the address space."""
    encoder = None if at_load else SafeEncoder.open(bundle, serving=Serving(selftest_rows=0))
    before = threading.stack_size(1 << 47)
    try:
        with pytest.raises(PrerequisiteError, match="no more threads"):
            (encoder or SafeEncoder.open(bundle)).encode_text(["a red circle"])
    finally:
        threading.stack_size(before)


def test_canaries_that_found_no_memory_say_nothing_about_the_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs may well be the edited model; with less memory nobody knows."""

    def run(rows: np.ndarray) -> np.ndarray:
        raise RuntimeException("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc")

    with SafeEncoder.open(bundle) as encoder:
        monkeypatch.setattr(encoder._services[TowerName.TEXT]._batcher, "_run", run)
        with pytest.raises(PrerequisiteError, match="not enough memory"):
            encoder._monitor.check_at_load(4, encoder._preprocessing, allow_unsafe=False)


def test_the_callable_is_small_until_it_works_and_opens_the_bundle_once(bundle: Path) -> None:
    """Pickled before and after its first batch; a copy in the same process shares the opened bundle."""
    run = EmbedBatch(bundle)
    before = pickle.dumps(run)
    run({"key": ["a"], "image": [_jpeg(0)]})
    copy = pickle.loads(pickle.dumps(run))
    assert len(before) < 1000
    assert copy.encoder() is run.encoder()


def test_a_failure_that_is_not_the_items_stops(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that fails must not become a million rows with an error; broken items alone are no such failure."""
    run = EmbedBatch(bundle)
    session = run.encoder().session(TowerName.IMAGE)

    def lost(rows: np.ndarray) -> np.ndarray:
        raise RuntimeError("the device was lost")

    def zeros(rows: np.ndarray) -> np.ndarray:
        return np.zeros((len(rows), 64), dtype=np.float32)

    batcher = run.encoder()._services[TowerName.IMAGE]._batcher
    for broken, error in ((lost, RuntimeError), (zeros, ContractError)):
        monkeypatch.setattr(batcher, "_run", broken)
        with pytest.raises(error):
            run({"key": ["a", "b"], "image": [_jpeg(0), _jpeg(1)]})
    monkeypatch.setattr(batcher, "_run", session.run)
    assert all(run({"key": ["a"], "image": [b""]})["error"])


def test_another_bundle_at_the_same_path_is_refused(bundle: Path, tmp_path: Path) -> None:
    """What a job was started with is what every process must find, even if the other is a good one."""
    run = EmbedBatch(bundle, digest="sha256:" + 64 * "0")
    with pytest.raises(IntegrityError, match="another bundle"):
        run({"key": ["a"], "image": [_jpeg(0)]})
    with pytest.raises(InputError, match="is not a bundle"):
        EmbedBatch(tmp_path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 20 items, one of them broken, one without an image."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        members: dict[str, bytes | str] = {}
        for number in range(20 * shard, 20 * shard + 20):
            members[f"k{number:03d}.jpg"] = b"broken" if number == 7 else _jpeg(number)
            members[f"k{number:03d}.txt"] = f"a circle number {number}"
        if shard == 1:
            del members["k025.jpg"]
        write_shard(folder / f"{shard:02d}.tar", members)
    return folder


def test_shards_folder_and_tables_give_the_same_rows(bundle: Path, shards: Path, tmp_path: Path) -> None:
    """One set of items as shards, files, Parquet and JSON Lines; broken ones are rows with an error everywhere."""
    done = _embed(bundle, shards / "{00..02}.tar", "--out", tmp_path / "tar", "--part-rows", 20, "--batch", 8, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["rows"], report["errors"], report["parts"]) == (60, 2, 3)
    assert report["space"] in open_bundle(bundle).manifest.spaces.values()
    wanted = _rows(tmp_path / "tar")
    assert {key for key, (_, error) in wanted.items() if error} == {"k007", "k025"}
    assert "they are .txt" in wanted["k025"][1]
    images = {f"k{n:03d}": b"broken" if n == 7 else _jpeg(n) for n in range(60) if n != 25}
    for key, data in images.items():
        put(tmp_path / "files" / key[:3] / f"{key}.jpg", data)
    columns = {"id": list(images), "picture": list(images.values())}
    parquet.write_table(pa.table(columns), tmp_path / "items.parquet", row_group_size=7)
    lines = [json.dumps({"id": key, "picture": f"files/{key[:3]}/{key}.jpg"}) for key in images]
    put(tmp_path / "items.jsonl", "\n".join([*lines, json.dumps({"id": "out", "picture": "../secret.jpg"})]))
    naming = ("--key", "id", "--column", "picture")
    for source, more in (("files", ()), ("items.parquet", naming), ("items.jsonl", naming)):
        out = tmp_path / f"{source}-out"
        done = _embed(bundle, tmp_path / source, "--out", out, *more)
        assert done.exit_code == 0, done.output
        found = {Path(key).stem: row for key, row in _rows(out).items()}
        if source == "items.jsonl":
            assert "leaves the set's folder" in found.pop("out")[1]
        assert found.keys() == wanted.keys() - {"k025"}
        for key, (row, error) in found.items():
            assert bool(error) == (key == "k007")
            np.testing.assert_allclose(row, wanted[key][0], atol=1e-5)


def test_parts_say_what_they_are(bundle: Path, shards: Path, tmp_path: Path) -> None:
    """Fixed-size lists of float16, the digest in a column and in the metadata, and texts by the text tower."""
    done = _embed(bundle, shards / "*.tar", "--out", tmp_path, "--kind", "texts", "--dtype", "float16")
    assert done.exit_code == 0, done.output
    (part,) = tmp_path.glob("*.parquet")
    table = parquet.read_table(part)
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), 64)
    digest = digest_of_file(bundle / "manifest.json")
    body = json.loads(table.schema.metadata[b"uwm-deploy"])
    assert (body["bundle"], body["kind"], body["dtype"]) == (digest, "texts", "float16")
    assert set(table["bundle"].to_pylist()) == {digest}
    with SafeEncoder.open(bundle) as encoder:
        row, space = encoder.encode_text("a circle number 33")[0], encoder.space
    assert body["space"] == space
    assert set(table["space"].to_pylist()) == {space}
    np.testing.assert_allclose(_rows(tmp_path)["k033"][0].astype(np.float32), row, atol=1e-3)


def test_a_killed_run_goes_on_with_no_row_lost_or_twice(bundle: Path, tmp_path: Path) -> None:
    """SIGKILL after the first part, then the same command: the rows of an undisturbed run, finished ones untouched."""
    for number in range(200):
        put(tmp_path / "files" / f"{number:03d}.jpg", b"" if number == 150 else _jpeg(number))
    common = ["embed", str(bundle), str(tmp_path / "files"), "--batch", "2", "--part-rows", "4", "--json", "--out"]
    command = [sys.executable, "-m", "uwm_deploy.cli", *common, str(tmp_path / "out")]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None and len(list(tmp_path.glob("out/part-*.parquet"))) < 3:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL  # else it was over before, and nothing was tried
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/part-*.parquet")}
    assert 12 <= len(_rows(tmp_path / "out")) < 200
    # What a run leaves that was killed while it wrote; whoever reads the folder meanwhile must not take it for a part.
    put(tmp_path / "out" / ".tmp-1-part-1.parquet", b"half")
    run = EmbedBatch(bundle)
    assert set(finished_keys(tmp_path / "out", run.identity())) == _rows(tmp_path / "out").keys()
    again = CliRunner().invoke(cli, [*common, str(tmp_path / "out")])
    assert again.exit_code == 0, again.output
    report = json.loads(again.stdout)
    assert report["finished_before"] == 4 * len(before)
    assert report["rows"] + report["finished_before"] == 200
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert not list(tmp_path.glob("out/.tmp-*"))
    assert CliRunner().invoke(cli, [*common, str(tmp_path / "whole")]).exit_code == 0
    _assert_same(_rows(tmp_path / "out"), _rows(tmp_path / "whole"))
    third = CliRunner().invoke(cli, [*common, str(tmp_path / "out")])
    assert json.loads(third.stdout)["rows"] == 0


def test_what_waited_is_written_when_a_run_fails(bundle: Path, shards: Path, tmp_path: Path) -> None:
    """Two items with one key end the run with their name; the rows before them are kept, and it ends so again."""
    shutil.copy(shards / "00.tar", tmp_path / "a.tar")
    shutil.copy(shards / "00.tar", tmp_path / "b.tar")
    for _ in range(2):
        done = _embed(bundle, tmp_path / "*.tar", "--out", tmp_path / "out", "--batch", 7)
        assert done.exit_code == 2
        assert "two items have the key 'k000'" in done.output
    assert len(_rows(tmp_path / "out")) == 14


def test_a_broken_shard_costs_what_cannot_be_read(bundle: Path, shards: Path, tmp_path: Path) -> None:
    """The others are embedded, its last whole item is not trusted, and the exit code says so; mended, the rest follows."""
    whole = (shards / "00.tar").read_bytes()
    put(tmp_path / "00.tar", whole[: len(whole) // 2])
    shutil.copy(shards / "01.tar", tmp_path)
    done = _embed(bundle, tmp_path / "*.tar", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "broken: shard" in done.output
    found = _rows(tmp_path / "out")
    assert 20 < len(found) < 40
    put(tmp_path / "00.tar", whole)
    assert _embed(bundle, tmp_path / "*.tar", "--out", tmp_path / "out").exit_code == 0
    assert len(_rows(tmp_path / "out")) == 40


def test_parts_of_anything_else_are_refused(bundle: Path, shards: Path, tmp_path: Path) -> None:
    """Another bundle's, another kind's or dtype's, a foreign or a cut file; nothing is written beside them."""
    arguments = (bundle, shards / "00.tar", "--out", tmp_path / "out")
    assert _embed(*arguments).exit_code == 0
    for more, message in ((("--kind", "texts"), "has kind images"), (("--dtype", "float16"), "has dtype float32")):
        done = _embed(*arguments, *more)
        assert done.exit_code == 2
        assert message in done.output
    (part,) = (tmp_path / "out").glob("*.parquet")
    rows = EmbedBatch(bundle)({"key": ["x"], "image": [_jpeg(0)]})
    other = rows | {"bundle": np.array(["sha256:other"], dtype=object)}
    PartWriter(tmp_path / "out")(other)
    done = _embed(*arguments)
    assert done.exit_code == 5
    assert "has bundle sha256:other" in done.output
    with pytest.raises(EvidenceError):
        list(finished_keys(tmp_path / "out", EmbedBatch(bundle).identity()))
    for data, message in ((part.read_bytes()[:-9], "cannot be read"), (None, "not written by this command")):
        shutil.rmtree(tmp_path / "out")
        if data is None:
            (tmp_path / "out").mkdir()
            parquet.write_table(pa.table({"key": ["a"]}), tmp_path / "out" / "mine.parquet")
        else:
            put(tmp_path / "out" / "part-0.parquet", data)
        done = _embed(*arguments)
        assert done.exit_code == 2
        assert message in done.output
        assert len(list((tmp_path / "out").iterdir())) == 2  # it, and the lock


def test_parts_of_another_space_are_refused_by_both_ids(bundle: Path, shards: Path, tmp_path: Path) -> None:
    """Whatever else is the same: exit code 5, and the message has the id of what is there and of what would be added."""
    rows = EmbedBatch(bundle)({"key": ["x"], "image": [_jpeg(0)]})
    PartWriter(tmp_path / "out")(rows | {"space": np.array(["space:sha256:other"], dtype=object)})
    done = _embed(bundle, shards / "00.tar", "--out", tmp_path / "out")
    assert done.exit_code == 5
    assert "space:sha256:other" in done.output
    assert rows["space"][0] in done.output


def test_a_part_is_of_one_bundle_and_named_by_its_keys(bundle: Path, tmp_path: Path) -> None:
    """The same rows again replace their part; rows of two bundles, or a key twice, are no part."""
    rows = EmbedBatch(bundle)({"key": ["a", "b"], "image": [_jpeg(0), _jpeg(1)]})
    writer = pickle.loads(pickle.dumps(PartWriter(tmp_path)))
    first = writer(rows)
    assert first["rows"].tolist() == [2]
    assert writer(rows)["part"].tolist() == first["part"].tolist()
    assert [path.name for path in tmp_path.glob("*.parquet")] == first["part"].tolist()
    with pytest.raises(InputError, match="several bundles"):
        writer(rows | {"bundle": np.array(["one", "two"], dtype=object)})
    with pytest.raises(InputError, match="twice"):
        writer(rows | {"key": np.array(["a", "a"], dtype=object)})
    parquet.write_table(parquet.read_table(tmp_path / first["part"][0]), tmp_path / "copy.parquet")
    put(tmp_path / "files" / "a.jpg", _jpeg(0))
    done = _embed(bundle, tmp_path / "files", "--out", tmp_path)
    assert done.exit_code == 2
    assert "has already" in done.output


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.tar", "does not exist"),
        ("*.tar", "does not exist"),
        ("a.zip", "no known kind"),
        ("empty", "has no images"),
        ("table.parquet", "no column 'key'; it has id"),
    ],
)
def test_sources_that_are_none(bundle: Path, tmp_path: Path, source: str, message: str) -> None:
    """One line, exit code 2, no part."""
    (tmp_path / "empty").mkdir()
    put(tmp_path / "a.zip", b"")
    parquet.write_table(pa.table({"id": [1]}), tmp_path / "table.parquet")
    done = _embed(bundle, tmp_path / source, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert message in done.output
    assert not list(tmp_path.glob("out/*.parquet"))


def test_rows_without_a_key_end_their_table(bundle: Path, tmp_path: Path) -> None:
    """What cannot be found again is not embedded; the line is named."""
    put(tmp_path / "t.jsonl", '{"key": 5, "text": "a star"}\n{"key": "b"}\n{"text": "a circle"}\n')
    done = _embed(bundle, tmp_path / "t.jsonl", "--kind", "texts", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "t.jsonl line 3: key 'key' is 'None'" in done.output
    found = _rows(tmp_path / "out")
    assert found.keys() == {"5", "b"}
    assert "it has no 'text'" in found["b"][1]


def _report() -> EmbedReport:
    return EmbedReport(bundle="", variant="", space="")


def test_a_batch_is_cut_where_its_bytes_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large images are, few of their bytes are in memory at a time; none is read before its turn."""
    read: list[int] = []

    def load(number: int) -> bytes:
        read.append(number)
        return bytes(100)

    monkeypatch.setattr("uwm_deploy.serve.embed.job.MOST_BYTES", 250)
    found = _batches((Item(str(n), lambda n=n: load(n)) for n in range(7)), 5, _report())  # type: ignore[misc]
    assert len(next(found)) == 3
    assert read == [0, 1, 2]
    assert [len(some) for some in found] == [3, 1]


def test_without_pyarrow_the_extra_is_named(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is opened or written."""
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    done = _embed(bundle, tmp_path, "--out", tmp_path / "out")
    assert done.exit_code == PrerequisiteError.exit_code
    assert "uwm-deploy[build]" in done.output
    assert not (tmp_path / "out").exists()


def test_ray_gives_the_rows_of_one_process(bundle: Path, shards: Path, tmp_path: Path) -> None:
    """The driver of docs/how-to/embedding.md, run as it stands: it goes on after itself, and `embed` after it."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'uwm-deploy[ray]'")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "how-to" / "embedding.md").read_text(), re.DOTALL)
    script = put(tmp_path / "driver.py", code)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_DEDUP_LOGS": "0"}

    def driven(source: Path) -> str:
        command = [sys.executable, str(script), str(bundle), str(source), str(tmp_path / "ray")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()[-1]

    assert driven(shards / "00.tar") == "20 rows"
    assert driven(shards) == "40 rows"
    assert _embed(bundle, shards / "*.tar", "--out", tmp_path / "one").exit_code == 0
    again = _embed(bundle, shards / "*.tar", "--out", tmp_path / "ray", "--json")
    assert (json.loads(again.stdout)["rows"], json.loads(again.stdout)["finished_before"]) == (0, 60)
    ray, one = _rows(tmp_path / "ray"), _rows(tmp_path / "one")
    # The shard's reader knows more about what is not there than a column does.
    assert (ray.pop("k025")[1], one.pop("k025")[1][:20]) == ("it has no image", "0 members are images")
    _assert_same(ray, one)


def test_a_source_with_a_broken_item_says_so() -> None:
    """A DataError of loading is the item's error, and its neighbours are loaded."""

    def broken() -> bytes:
        raise DataError("gone")

    (some,) = _batches(iter([Item("a", broken), Item("b", lambda: b"x")]), 9, _report())
    assert some == [("a", None, "gone"), ("b", b"x", "")]


def _table(folder: Path, n: int = 6) -> Path:
    """A table that names pictures, which are there."""
    for i in range(n):
        put(folder / "p" / f"{i}.jpg", _jpeg(i))
    rows = [{"key": f"k{i}", "image": f"p/{i}.jpg", "n": i} for i in range(n)]
    return put(folder / "t.jsonl", "\n".join(map(json.dumps, rows)))


def test_a_failure_of_the_machine_leaves_the_rows_unwritten(bundle: Path, tmp_path: Path) -> None:
    """A disk that fails stops the job with 6; rows before it are kept, and the same command goes on after it."""
    table = _table(tmp_path)
    (tmp_path / "p" / "4.jpg").rename(tmp_path / "4")
    (tmp_path / "p" / "4.jpg").symlink_to("/proc/self/mem")  # reading it is an error of input and output
    arguments = (bundle, table, "--out", tmp_path / "out", "--batch", 2)
    done = _embed(*arguments)
    assert done.exit_code == PrerequisiteError.exit_code
    assert "4.jpg cannot be read: Input/output error" in done.output
    assert set(_rows(tmp_path / "out")) == {"k0", "k1", "k2", "k3"}
    (tmp_path / "4").replace(tmp_path / "p" / "4.jpg")
    assert _embed(*arguments).exit_code == 0
    assert not any(error for _, error in _rows(tmp_path / "out").values())
    assert len(_rows(tmp_path / "out")) == 6


def test_files_that_are_not_there_yet_have_no_row(bundle: Path, tmp_path: Path) -> None:
    """Some, or all of them where nothing is mounted: exit code 2, counted and named, and tried again."""
    table, out = _table(tmp_path), tmp_path / "out"
    (tmp_path / "p").rename(tmp_path / "away")
    done = _embed(bundle, table, "--out", out, "--json")
    assert (done.exit_code, json.loads(done.stdout)["missing"], _rows(out)) == (2, 6, {})
    assert "k0: " in done.stderr
    (tmp_path / "away").rename(tmp_path / "p")
    (tmp_path / "p" / "3.jpg").unlink()
    done = _embed(bundle, table, "--out", out, "--json")
    assert (done.exit_code, json.loads(done.stdout)["missing"], len(_rows(out))) == (2, 1, 5)
    put(tmp_path / "p" / "3.jpg", _jpeg(3))
    done = _embed(bundle, table, "--out", out, "--json")
    assert (done.exit_code, json.loads(done.stdout)["rows"], len(_rows(out))) == (0, 1, 6)


def test_a_callable_tells_a_missing_file_from_a_missing_disk(bundle: Path, tmp_path: Path) -> None:
    """Among others it is the item's error; in a folder that is empty or not there it is the machine's."""
    put(tmp_path / "p" / "0.jpg", _jpeg(0))
    (tmp_path / "empty").mkdir()
    run = EmbedBatch(bundle)
    images = [str(tmp_path / "p" / name) for name in ("0.jpg", "1.jpg")]
    assert [bool(error) for error in run({"key": ["a", "b"], "image": images})["error"]] == [False, True]
    for folder in ("empty", "none"):
        with pytest.raises(UnreadableError, match=f"{folder} is missing or empty"):
            run({"key": ["a", "b"], "image": [images[0], str(tmp_path / folder / "1.jpg")]})


@pytest.mark.parametrize("kind", ["images", "texts"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_column_of_another_type_is_bad_input(kind: str, ending: str, bundle: Path, tmp_path: Path) -> None:
    """Numbers, and a name that no column has: exit code 2, and nothing is written that would never be tried again."""
    table = _table(tmp_path)
    if ending == "parquet":
        rows = [json.loads(line) for line in table.read_text().splitlines()]
        table = tmp_path / "t.parquet"
        parquet.write_table(pa.Table.from_pylist(rows), table)
    for column, message in (("n", "'n' is "), ("m", "no column 'm'")):
        done = _embed(bundle, table, "--out", tmp_path / "out", "--kind", kind, "--column", column)
        assert (done.exit_code, _rows(tmp_path / "out")) == (2, {})
        assert message in done.output
    run = EmbedBatch(bundle, kind=kind)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds float64, not"):
        run({"key": ["a", "b"], run.column: np.array([1.5, np.nan])})


def test_a_job_of_nothing_but_errors_is_no_success(bundle: Path, tmp_path: Path) -> None:
    """The wrong column of the right type: nothing is written. Where some were embedded before, the code says it."""
    rows = [{"key": f"k{i}", "image": f"p/{i}.jpg", "name": f"t{i % 2}.jsonl"} for i in range(3)]
    table = _table(tmp_path, 3)
    put(table, "\n".join(map(json.dumps, rows)))
    put(tmp_path / "t0.jsonl", "no image")
    put(tmp_path / "t1.jsonl", "no image")
    out = tmp_path / "out"
    done = _embed(bundle, table, "--out", out, "--column", "name")
    assert (done.exit_code, _rows(out)) == (2, {})
    assert "none of the first 3 items can be embedded" in done.output
    put(table, "\n".join(map(json.dumps, rows)))
    assert _embed(bundle, table, "--out", out).exit_code == 0
    put(tmp_path / "p" / "9.jpg", b"no image")
    put(table, json.dumps({"key": "k9", "image": "p/9.jpg"}))
    assert _embed(bundle, table, "--out", out).exit_code == 2
    assert "not a whole image" in _rows(out)["k9"][1]
    assert _embed(bundle, table, "--out", out).exit_code == 0
