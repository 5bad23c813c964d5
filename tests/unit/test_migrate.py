"""Stored embeddings through a map: values, resuming, every refusal, on small arrays of all three kinds of store."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from pyarrow import parquet

from tests.data_sets import put
from uwm_deploy.cli import cli
from uwm_deploy.commands.migrate import _told, _tower
from uwm_deploy.errors import (
    ContractError,
    DataError,
    EvidenceError,
    InputError,
    IntegrityError,
    PrerequisiteError,
    UwmError,
)
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.embedding_map import EmbeddingMap, Mapper
from uwm_deploy.safeground.embedded import EmbeddedSet
from uwm_deploy.serve.embed import stored_index, stored_npy
from uwm_deploy.serve.embed.known import KnownEmbeddings, evidence_of
from uwm_deploy.serve.embed.migrate import MigrateReport, Migration, migrate, open_stored
from uwm_deploy.serve.embed.parts import METADATA, PartWriter
from uwm_deploy.serve.embed.stored import Label

ROOT = Path(__file__).parents[2]
DIM = 12
BEFORE, AFTER = "space:sha256:before", "space:sha256:after"
LABEL = Label(tower=TowerName.IMAGE, space=AFTER, migrated_from=BEFORE, bundle="sha256:b", variant="onnxruntime-fp32")


def _unit_rows(count: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _map(seed: int = 7) -> EmbeddingMap:
    rng = np.random.default_rng(seed)
    return EmbeddingMap(rng.standard_normal((DIM, DIM)).astype(np.float32), rng.standard_normal(DIM).astype(np.float32))


def _wanted(rows: np.ndarray, map: EmbeddingMap | None = None) -> np.ndarray:
    """What the map makes of rows, in float64, written as the formula."""
    map = map or _map()
    y = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    made = np.stack([map.weight.astype(np.float64) @ one + map.bias for one in y])
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def _evidence(count: int = 3, *, before: bool = True) -> KnownEmbeddings:
    safe, unsafe = _unit_rows(count, 1), _unit_rows(count, 2)
    return KnownEmbeddings(
        rows={f"item-{n}": n for n in range(count)},
        before=(safe, unsafe) if before else None,
        after=(_wanted(safe), _wanted(unsafe)),
    )


def _migration(**changes: Any) -> Migration:
    return dataclasses.replace(Migration(map=_map(), label=LABEL, evidence=_evidence()), **changes)


def _run(stored: Path, out: Path, *, keys: Path | None = None, chunk: int = 8, **changes: Any) -> MigrateReport:
    return migrate(open_stored(stored, keys), out, _migration(**changes), chunk=chunk)


def _save(path: Path, rows: np.ndarray, **beside: object) -> Path:
    np.save(path, rows)
    if beside:
        path.with_suffix(".json").write_text(json.dumps(beside))
    return path


# --- the map ----------------------------------------------------------------------------------------------------------


def test_a_mapper_equals_the_formula_in_place_and_leaves_kept_rows() -> None:
    """Within 1e-6 of float64; rows of any length of a chunk, into themselves too; kept rows may hold anything."""
    rows, mapper = _unit_rows(20), Mapper(_map(), 20)
    rows[4], keep = np.nan, np.arange(20) == 4
    out = np.zeros_like(rows)
    assert mapper(rows, out, keep) is None
    np.testing.assert_allclose(out[~keep], _wanted(rows[~keep]), atol=1e-6)
    assert np.isnan(out[4]).all()
    some = rows[5:9].copy()
    assert mapper(some, some) is None
    np.testing.assert_allclose(some, out[5:9], atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, 2.0])
def test_the_first_row_that_is_no_embedding_is_told_and_nothing_is_written(bad: float) -> None:
    """Not a number, not finite, without length, of another length."""
    rows, out = _unit_rows(6), np.full((6, DIM), 5.0, dtype=np.float32)
    rows[[3, 5]] = rows[3] * 2 if bad == 2.0 else bad
    assert Mapper(_map(), 6)(rows, out) == 3
    assert (out == 5.0).all()


def test_a_row_that_the_map_sends_to_nothing_is_told() -> None:
    """It has no direction, so it cannot be of length 1."""
    nothing = EmbeddingMap(np.zeros((DIM, DIM), np.float32), np.zeros(DIM, np.float32))
    assert Mapper(nothing, 2)(_unit_rows(2), np.empty((2, DIM), np.float32)) == 0
    with pytest.raises(ContractError):
        EmbeddingMap(np.zeros((DIM, DIM + 1), np.float32), np.zeros(DIM, np.float32))


# --- .npy -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "within"), [(np.float32, 1e-6), (np.float16, 1e-3)])
def test_npy_in_npy_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type, within: float) -> None:
    """Same shape and element type, several parts of several chunks, and beside it what it is; names are kept."""
    monkeypatch.setattr(stored_npy, "PART_BYTES", 20 * DIM * np.dtype(dtype).itemsize)
    rows, names = _unit_rows(50).astype(dtype), [f"n{n}" for n in range(50)]
    stored = _save(tmp_path / "old.npy", rows, space=BEFORE, tower="image", names=names, more=1)
    report = _run(stored, tmp_path / "new.npy")
    found = np.load(tmp_path / "new.npy")
    assert found.dtype == dtype
    np.testing.assert_allclose(found, _wanted(rows), atol=within)
    assert (report.rows, report.parts, report.finished_before, report.errors) == (50, 3, 0, 0)
    said = json.loads((tmp_path / "new.json").read_text())
    assert (said["space"], said["migrated_from"], said["rows"], said["names"]) == (AFTER, BEFORE, 50, names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.json", "new.npy", "old.json", "old.npy"]
    assert _run(stored, tmp_path / "new.npy").finished_before == 50


def test_a_run_that_was_stopped_goes_on_at_the_next_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is at `out` before it is whole; the rows of finished parts are not made again."""
    monkeypatch.setattr(stored_npy, "PART_BYTES", 16 * DIM * 4)
    rows = _unit_rows(50)
    stored, out = _save(tmp_path / "old.npy", rows), tmp_path / "new.npy"

    def stop(_: str, done: int, __: int) -> None:
        if done >= 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        migrate(open_stored(stored), out, _migration(), chunk=8, progress=stop)
    assert not out.exists()
    with pytest.raises(InputError, match="of another job"):
        _run(stored, out, label=dataclasses.replace(LABEL, bundle="sha256:c"))
    seen: list[int] = []
    report = migrate(open_stored(stored), out, _migration(), chunk=8, progress=lambda _, done, __: seen.append(done))
    assert (report.finished_before, report.rows, min(seen)) == (32, 18, 32)
    np.testing.assert_allclose(np.load(out), _wanted(rows), atol=1e-6)
    assert not (tmp_path / "new.npy.migrating").exists()


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """SIGKILL after the second part, then again: the file of an undisturbed run."""
    rows = _unit_rows(400)
    stored, out = _save(tmp_path / "old.npy", rows), tmp_path / "new.npy"
    script = (
        "import time, sys\nfrom pathlib import Path\nfrom tests.unit import test_migrate as t\n"
        f"t.stored_npy.PART_BYTES = 8 * {DIM} * 4\n"
        "t.migrate(t.open_stored(Path(sys.argv[1])), Path(sys.argv[2]), t._migration(), chunk=8, "
        "progress=lambda *_: time.sleep(0.02))"
    )
    command = [sys.executable, "-c", script, str(stored), str(out)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    state = tmp_path / "new.npy.migrating" / "state.json"
    while process.poll() is None and not (state.exists() and json.loads(state.read_text())["done"] >= 16):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    report = _run(stored, out)
    assert 16 <= report.finished_before < 400
    assert report.finished_before + report.rows == 400
    np.testing.assert_allclose(np.load(out), _wanted(rows), atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (_unit_rows(4, dim=DIM + 1), f"has embeddings of {DIM + 1} numbers, the model has {DIM}"),
        (_unit_rows(4).astype(np.float64), "float32 or float16"),
        (_unit_rows(4)[0], "float32 or float16"),
        (np.asfortranarray(_unit_rows(4)), "in columns"),
        (_unit_rows(0), "at least one row"),
        (np.array([{}], dtype=object), "cannot be read"),
    ],
)
def test_files_that_cannot_be_migrated(tmp_path: Path, rows: np.ndarray, message: str) -> None:
    """Another size, element type or order, no rows, no numbers: bad input, and nothing is written."""
    with pytest.raises(InputError, match=message) as caught:
        _run(_save(tmp_path / "old.npy", rows), tmp_path / "new.npy")
    assert caught.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["old.npy"]


@pytest.mark.parametrize(("change", "message"), [(np.nan, "is not finite"), (2.0, "has length 2.0000, not 1")])
def test_the_first_bad_row_is_named_with_its_key(tmp_path: Path, change: float, message: str) -> None:
    """Place from 0, and the key where keys are known; `out` does not appear."""
    rows = _unit_rows(30)
    rows[[17, 20]] *= change
    keys = put(tmp_path / "keys.txt", "".join(f"pictures/{n}.jpg\n" for n in range(30)))
    with pytest.raises(DataError, match=rf"row 17 \(from 0\), key pictures/17.jpg: its embedding {message}"):
        _run(_save(tmp_path / "old.npy", rows), tmp_path / "new.npy", keys=keys)
    assert not (tmp_path / "new.npy").exists()


def test_what_is_in_the_way_stays(tmp_path: Path) -> None:
    """A file, a folder, what stands beside them, the store itself; and a store that has changed since."""
    rows = _unit_rows(10)
    stored = _save(tmp_path / "old.npy", rows)
    other, folder = _save(tmp_path / "a.npy", rows), tmp_path / "b.npy"
    folder.mkdir()
    put(tmp_path / "c.json", '{"space": "another"}')
    for out in (other, folder, tmp_path / "c.npy", stored):
        with pytest.raises(InputError):
            _run(stored, out)
    np.testing.assert_array_equal(np.load(other), rows)
    _run(stored, tmp_path / "new.npy")
    os.utime(stored, ns=(0, 0))
    with pytest.raises(InputError, match="exists and is something else"):
        _run(stored, tmp_path / "new.npy")


def test_keys_are_one_per_row(tmp_path: Path) -> None:
    """Too few, too many, not readable: bad input before anything is written."""
    stored = _save(tmp_path / "old.npy", _unit_rows(3))
    for text in (b"a\nb\n", b"a\nb\nc\nd\n", b"\xff\n"):
        with pytest.raises(InputError):
            _run(stored, tmp_path / "new.npy", keys=put(tmp_path / "keys.txt", text))
    with pytest.raises(InputError):
        _run(stored, tmp_path / "new.npy", keys=tmp_path / "none.txt")
    assert _run(stored, tmp_path / "new.npy", keys=put(tmp_path / "keys.txt", "a\nb\nc")).rows == 3


def test_what_stands_beside_a_file_must_make_sense(tmp_path: Path) -> None:
    """A tower that there is not, and text that is no JSON; a list is none of ours."""
    stored = _save(tmp_path / "old.npy", _unit_rows(3))
    put(tmp_path / "old.json", '["a", "b"]')
    assert not open_stored(stored).space
    for text in ('{"tower": "both"}', "{"):
        put(tmp_path / "old.json", text)
        with pytest.raises(DataError):
            open_stored(stored)


def test_a_tower_is_never_guessed(tmp_path: Path) -> None:
    """The other tower's map would fit: without a word it is an error, and so are two words that differ."""
    stored = _save(tmp_path / "old.npy", _unit_rows(3))
    with pytest.raises(InputError, match="--tower image or text"):
        _tower(open_stored(stored), None)
    assert _tower(open_stored(stored), "text") is TowerName.TEXT
    said = _save(tmp_path / "said.npy", _unit_rows(3), tower="text")
    assert _tower(open_stored(said), None) is TowerName.TEXT
    with pytest.raises(InputError, match="holds text embeddings, not image"):
        _tower(open_stored(said), "image")


# --- what the evidence knows ------------------------------------------------------------------------------------------


def _known(tmp_path: Path) -> tuple[Path, np.ndarray, Path]:
    """Ten rows, of which three are items of the evidence."""
    evidence, rows = _evidence(), _unit_rows(10)
    assert evidence.before is not None
    rows[2], rows[5], rows[9] = evidence.before[0][0], evidence.before[1][1], evidence.before[1][2]
    keys = ["a", "b", "item-0", "c", "d", "item-1/unsafe", "e", "f", "item-9", "item-2"]
    return tmp_path / "old.npy", rows, put(tmp_path / "keys.txt", "\n".join(keys))


@pytest.mark.parametrize("before", [True, False])
def test_keys_of_the_evidence_are_compared(tmp_path: Path, before: bool) -> None:
    """By their id, with or without the member; where an earlier step is recorded nowhere, on the result alone."""
    path, rows, keys = _known(tmp_path)
    report = _run(_save(path, rows), tmp_path / "new.npy", keys=keys, evidence=_evidence(before=before))
    assert report.checked == 3
    assert "checked 3 items against the bundle's evidence" in _told(report, tmp_path)


@pytest.mark.parametrize(("before", "what"), [(True, "stored"), (False, "migrated")])
def test_an_item_of_another_space_is_refused_by_its_key(tmp_path: Path, before: bool, what: str) -> None:
    """Cosine below 0.999 to what is recorded: exit code 5 with the key, before anything is written."""
    path, rows, keys = _known(tmp_path)
    rows[5] = _unit_rows(1, 99)[0]
    with pytest.raises(EvidenceError, match=f"item-1/unsafe: its {what} embedding has cosine"):
        _run(_save(path, rows), tmp_path / "new.npy", keys=keys, evidence=_evidence(before=before))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["keys.txt", "old.npy"]


def test_without_keys_of_the_evidence_it_is_said(tmp_path: Path) -> None:
    """No keys, or none that the evidence has: nothing was compared, and the result says which."""
    stored = _save(tmp_path / "old.npy", _unit_rows(3))
    report = _run(stored, tmp_path / "new.npy")
    assert "without keys: not checked" in _told(report, tmp_path)
    report = _run(stored, tmp_path / "other.npy", keys=put(tmp_path / "keys.txt", "a\nb\nc"))
    assert "no key of the evidence is in it: not checked" in _told(report, tmp_path)


def test_a_map_that_does_not_make_the_evidence_is_refused() -> None:
    """Another map, the other tower's, or one that sends a row to nothing; the right one is silent."""
    _evidence().check_map(_map())
    _evidence(before=False).check_map(_map(8))  # nothing to compare with
    for wrong in (_map(8), EmbeddingMap(np.zeros((DIM, DIM), np.float32), np.zeros(DIM, np.float32))):
        with pytest.raises(IntegrityError, match="does not make its evidence"):
            _evidence().check_map(wrong)


def test_evidence_is_of_one_tower() -> None:
    """Members of the tower that is asked for, by id."""
    parts = {name: _unit_rows(2, seed) for seed, name in enumerate(("safe_image", "unsafe_image", "safe_text"))}
    one = EmbeddedSet(ids=("x", "y"), concepts=("c", "c"), unsafe_text=_unit_rows(2, 5), zero_shot={}, **parts)
    found = evidence_of(one, None, TowerName.TEXT)
    assert found.knows("y/safe")
    assert not found.knows("z")
    np.testing.assert_array_equal(found.after[1], one.unsafe_text)
    assert found.before is None


# --- FAISS ------------------------------------------------------------------------------------------------------------


def _indexes() -> dict[str, Callable[[Any, np.ndarray], Any]]:
    def ids(faiss: Any, rows: np.ndarray, kind: str) -> Any:
        index = getattr(faiss, kind)(faiss.IndexFlatIP(DIM))
        index.add_with_ids(rows, np.arange(1000, 1000 + len(rows)))
        return index

    def flat(faiss: Any, rows: np.ndarray, kind: str) -> Any:
        index = getattr(faiss, kind)(DIM)
        index.add(rows)
        return index

    return {
        "IndexFlatIP": lambda faiss, rows: flat(faiss, rows, "IndexFlatIP"),
        "IndexFlatL2": lambda faiss, rows: flat(faiss, rows, "IndexFlatL2"),
        "IndexIDMap": lambda faiss, rows: ids(faiss, rows, "IndexIDMap"),
        "IndexIDMap2": lambda faiss, rows: ids(faiss, rows, "IndexIDMap2"),
    }


@pytest.fixture
def faiss() -> Any:
    return pytest.importorskip("faiss", reason="needs the extra [examples]")


@pytest.mark.parametrize("kind", _indexes())
def test_flat_indexes_keep_their_kind_and_ids(faiss: Any, tmp_path: Path, kind: str) -> None:
    """Vectors are those of the formula, in order; metric and ids are as they were; ids are the keys."""
    rows = _unit_rows(50)
    faiss.write_index(_indexes()[kind](faiss, rows), str(tmp_path / "old.index"))
    report = _run(tmp_path / "old.index", tmp_path / "new.index")
    opened = faiss.read_index(str(tmp_path / "new.index"))  # what is cast below is its memory
    found = faiss.downcast_index(opened)
    assert type(found).__name__ == kind
    with_ids = kind.startswith("IndexIDMap")
    flat = faiss.downcast_index(found.index) if with_ids else found
    np.testing.assert_allclose(flat.reconstruct_n(0, 50), _wanted(rows), atol=1e-6)
    _, places = found.search(_wanted(rows[3:4]).astype(np.float32), 1)
    assert places[0][0] == (1003 if with_ids else 3)
    assert (report.rows, report.keyed) == (50, with_ids)
    assert _run(tmp_path / "old.index", tmp_path / "new.index").finished_before == 50


def test_names_beside_an_index_are_its_keys(faiss: Any, tmp_path: Path) -> None:
    """They are compared and kept; a row that is no embedding is named by them."""
    _, rows, keys = _known(tmp_path)
    names = keys.read_text().split("\n")
    faiss.write_index(_indexes()["IndexFlatIP"](faiss, rows), str(tmp_path / "old.index"))
    put(tmp_path / "old.json", json.dumps({"names": names, "tower": "image", "space": BEFORE}))
    assert _run(tmp_path / "old.index", tmp_path / "new.index").checked == 3
    assert json.loads((tmp_path / "new.json").read_text())["names"] == names
    rows[8] = 0
    faiss.write_index(_indexes()["IndexFlatIP"](faiss, rows), str(tmp_path / "old.index"))
    with pytest.raises(DataError, match="key item-9"):
        _run(tmp_path / "old.index", tmp_path / "third.index")


def test_indexes_that_do_not_keep_the_vectors_are_refused(faiss: Any, tmp_path: Path) -> None:
    """Graphs and cells were built for the old vectors, codes have lost them; the message says which it is."""
    rows = _unit_rows(300)
    for text in ("HNSW8", "IVF2,Flat", "PQ4x4", "SQ8"):
        index = faiss.index_factory(DIM, text)
        index.train(rows)
        index.add(rows)
        faiss.write_index(index, str(tmp_path / "old.index"))
        with pytest.raises(InputError, match=f"is a {type(index).__name__}"):
            _run(tmp_path / "old.index", tmp_path / "new.index")
    faiss.write_index(faiss.IndexFlatIP(DIM), str(tmp_path / "old.index"))
    with pytest.raises(DataError, match="without vectors"):
        _run(tmp_path / "old.index", tmp_path / "new.index")
    put(tmp_path / "old.index", b"IxFI and no more")
    with pytest.raises(DataError, match="no index that FAISS can read"):
        _run(tmp_path / "old.index", tmp_path / "new.index")


def test_without_faiss_an_index_is_exit_code_6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an optional package; what is no index at all is bad input, with or without it."""
    monkeypatch.setitem(sys.modules, "faiss", None)
    put(tmp_path / "old.index", b"IxFI")
    with pytest.raises(PrerequisiteError, match="pip install faiss-cpu") as caught:
        open_stored(tmp_path / "old.index")
    assert caught.value.exit_code == 6
    for path in (put(tmp_path / "rows.csv", "1,2,3,4"), tmp_path / "nowhere"):
        with pytest.raises(InputError):
            open_stored(path)
    assert stored_index.__doc__


# --- Parquet parts ----------------------------------------------------------------------------------------------------


def _batch(keys: list[str], rows: np.ndarray, *, space: str = BEFORE, failed: tuple[int, ...] = ()) -> dict[str, Any]:
    rows = rows.copy()
    rows[list(failed)] = np.nan
    same = {"bundle": "sha256:old", "variant": "onnxruntime-fp32", "space": space}
    errors = ["broken" if n in failed else "" for n in range(len(keys))]
    return {"key": keys, "embedding": rows, "error": errors} | {name: [one] * len(keys) for name, one in same.items()}


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Three parts of ten items; item 4 is broken."""
    rows, keys = _unit_rows(30), [f"k{n}" for n in range(30)]
    for start in (0, 10, 20):
        some = slice(start, start + 10)
        PartWriter(tmp_path / "old")(_batch(keys[some], rows[some], failed=(4,) if start == 0 else ()))
    return tmp_path / "old", dict(zip(keys, rows, strict=True))


def _read(folder: Path) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
    for path in sorted(folder.glob("part-*.parquet")):
        table = parquet.read_table(path)
        for row in table.to_pylist():
            yield row["key"], np.asarray(row["embedding"]), row


def test_parts_in_parts_out(tmp_path: Path, parts: tuple[Path, dict[str, np.ndarray]]) -> None:
    """A part of the same name each; rows in order with their keys and errors, a broken item NaN as it was."""
    old, wanted = parts
    report = _run(old, tmp_path / "new", chunk=4)
    assert (report.rows, report.errors, report.parts) == (30, 1, 3)
    assert [p.name for p in sorted(old.glob("*.parquet"))] == [
        p.name for p in sorted((tmp_path / "new").glob("*.parquet"))
    ]
    before = {key: row for key, _, row in _read(old)}
    for key, row, line in _read(tmp_path / "new"):
        assert line["error"] == before[key]["error"] == ("broken" if key == "k4" else "")
        assert (line["bundle"], line["variant"], line["space"]) == (LABEL.bundle, LABEL.variant, AFTER)
        if key == "k4":
            assert np.isnan(row).all()
        else:
            np.testing.assert_allclose(row, _wanted(wanted.pop(key)[None])[0], atol=1e-6)
    assert list(wanted) == ["k4"]
    part = next((tmp_path / "new").glob("*.parquet"))
    said = json.loads(parquet.read_schema(part).metadata[METADATA])
    assert (said["space"], said["migrated_from"], said["dtype"]) == (AFTER, BEFORE, "float32")


def test_other_columns_and_float16_are_kept(tmp_path: Path) -> None:
    """What a user added to a part goes along; half precision stays half precision."""
    rows = _unit_rows(5).astype(np.float16)
    PartWriter(tmp_path / "old")(_batch(list("abcde"), rows))
    (part,) = (tmp_path / "old").glob("*.parquet")
    table = parquet.read_table(part)
    table = table.append_column("shelf", pa.array([3, 1, None, 1, 5])).replace_schema_metadata(table.schema.metadata)
    parquet.write_table(table, part)
    _run(tmp_path / "old", tmp_path / "new", chunk=2)
    made = parquet.read_table(tmp_path / "new" / part.name)
    assert made["shelf"].to_pylist() == [3, 1, None, 1, 5]
    assert made.schema.field("embedding").type == pa.list_(pa.float16(), DIM)
    found = np.stack([np.asarray(one) for one in made["embedding"].to_pylist()]).astype(np.float32)
    np.testing.assert_allclose(found, _wanted(rows), atol=1e-3)


def test_a_stopped_run_leaves_whole_parts_and_goes_on(
    tmp_path: Path, parts: tuple[Path, dict[str, np.ndarray]]
) -> None:
    """Finished parts are not written again; a half one that a killed run left is no part."""
    old, _ = parts

    def stop(_: str, done: int, __: int) -> None:
        if done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        migrate(open_stored(old), tmp_path / "new", _migration(), chunk=4, progress=stop)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "new").glob("part-*")}
    assert len(before) == 2
    put(tmp_path / "new" / ".tmp-1-part-x.parquet", b"half")
    report = _run(old, tmp_path / "new")
    assert (report.finished_before, report.rows, report.parts) == (20, 10, 1)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert not list((tmp_path / "new").glob(".tmp-*"))
    assert len({key for key, _, _ in _read(tmp_path / "new")}) == 30


def test_bad_rows_and_items_of_the_evidence_in_parts(tmp_path: Path) -> None:
    """A NaN row without an error, a wrong item of the evidence: named by key; a broken item of it is passed over."""
    evidence = _evidence()
    assert evidence.before is not None
    rows = _unit_rows(6)
    rows[1], rows[3] = evidence.before[0][0], evidence.before[1][1]
    keys = ["a", "item-0/safe", "b", "item-1", "item-2", "c"]
    PartWriter(tmp_path / "good")(_batch(keys, rows, failed=(4,)))
    assert _run(tmp_path / "good", tmp_path / "new").checked == 2
    PartWriter(tmp_path / "nan")(_batch(keys, rows, failed=(4,)) | {"error": [""] * 6})
    with pytest.raises(EvidenceError, match="item-2"):  # what was taken for an embedding is none
        _run(tmp_path / "nan", tmp_path / "other")
    rows[5] = np.nan
    PartWriter(tmp_path / "bad")(_batch(keys[5:], rows[5:]))
    with pytest.raises(DataError, match=r"row 0 \(from 0\), key c: its embedding is not finite"):
        _run(tmp_path / "bad", tmp_path / "other")
    rows[3] = rows[0]
    PartWriter(tmp_path / "wrong")(_batch(keys, rows, failed=(4, 5)))
    with pytest.raises(EvidenceError, match="item-1"):
        _run(tmp_path / "wrong", tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_folders_that_cannot_be_migrated(tmp_path: Path, parts: tuple[Path, dict[str, np.ndarray]]) -> None:
    """No parts, foreign ones, several spaces or kinds, another release's; and --keys, which parts have themselves."""
    old, _ = parts

    def refused(folder: Path, message: str, kind: type[UwmError] = InputError, keys: Path | None = None) -> None:
        with pytest.raises(kind, match=message):
            _run(folder, tmp_path / "new", keys=keys)
        assert not (tmp_path / "new").exists()

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no Parquet parts")
    refused(old, "keys of their own", keys=tmp_path / "keys.txt")
    (tmp_path / "foreign").mkdir()
    parquet.write_table(pa.table({"key": ["a"]}), tmp_path / "foreign" / "mine.parquet")
    refused(tmp_path / "foreign", "not written by this command")
    put(tmp_path / "cut" / "part-0.parquet", b"PAR1")
    refused(tmp_path / "cut", "cannot be read", DataError)
    PartWriter(tmp_path / "spaces")(_batch(["x"], _unit_rows(1)))
    PartWriter(tmp_path / "spaces")(_batch(["y"], _unit_rows(1), space="space:sha256:third"))
    refused(tmp_path / "spaces", f"of {BEFORE} and of space:sha256:third|third and of {BEFORE}", EvidenceError)
    PartWriter(tmp_path / "kinds")(_batch(["x"], _unit_rows(1)))
    PartWriter(tmp_path / "kinds", "texts")(_batch(["y"], _unit_rows(1)))
    refused(tmp_path / "kinds", "has kind")
    part = sorted(old.glob("*.parquet"))[0]
    table = parquet.read_table(part)
    said = json.loads(table.schema.metadata[METADATA]) | {"format": 1}
    parquet.write_table(table.replace_schema_metadata({METADATA: json.dumps(said)}), part)
    refused(old, "another release")


def test_a_folder_of_something_else_is_not_written_into(
    tmp_path: Path, parts: tuple[Path, dict[str, np.ndarray]]
) -> None:
    """Other files, a file, parts of another space or of other rows than these: nothing of them is touched."""
    old, _ = parts
    put(tmp_path / "notes" / "todo.txt", "x")
    put(tmp_path / "file", "x")
    PartWriter(tmp_path / "third")(_batch(["z"], _unit_rows(1), space="space:sha256:third"))
    for out, kind in (
        (tmp_path / "notes", InputError),
        (tmp_path / "file", InputError),
        (tmp_path / "third", EvidenceError),
    ):
        with pytest.raises(kind):
            _run(old, out)
    with pytest.raises(EvidenceError, match=f"space:sha256:third.*{AFTER}"):
        _run(old, tmp_path / "third")
    _run(old, tmp_path / "new")
    os.utime(sorted(old.glob("*.parquet"))[0], ns=(0, 0))
    with pytest.raises(InputError, match="has source"):
        _run(old, tmp_path / "new")


def test_bad_usage_is_one_line(tmp_path: Path) -> None:
    """No bundle, no store: exit code 2 and no traceback."""
    stored = _save(tmp_path / "old.npy", _unit_rows(3))
    done = CliRunner().invoke(
        cli, ["migrate", str(stored), "--bundle", str(tmp_path), "--out", str(tmp_path / "new.npy")]
    )
    assert done.exit_code == 2
    assert "is not a bundle" in done.output


def test_a_space_is_named_by_its_id(tmp_path: Path) -> None:
    """A number is not taken for an id that differs."""
    np.save(tmp_path / "rows.npy", np.eye(4, dtype=np.float32))
    (tmp_path / "rows.json").write_text('{"space": 5}')
    with pytest.raises(DataError, match=r"rows\.json: \"space\" is no id"):
        stored_npy.NpyFile(tmp_path / "rows.npy")


def test_a_file_that_is_not_there_is_called_that(tmp_path: Path) -> None:
    """Nobody is told to save it with another library."""
    with pytest.raises(DataError, match=r"rows\.npy is no file; check the path"):
        stored_npy.NpyFile(tmp_path / "rows.npy")
