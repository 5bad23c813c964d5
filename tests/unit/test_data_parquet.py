"""Parquet: paths, bytes and image structs give the same set as JSON Lines; damage is one clear line."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.data_sets import open_manifest, open_set, png, put
from uwm_deploy.data.reading import read_all
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.errors import DataError, PrerequisiteError

N = 40


def _rows() -> list[dict[str, Any]]:
    return [
        {
            "id": f"i{i}",
            "concept": "fire" if i % 3 else "smoke",
            "safe_image": f"p/{i}.png",
            "unsafe_image": f"p/{i + N}.png",
            "safe_text": f"calm {i}",
            "unsafe_text": f"wild {i} 火",
        }
        for i in range(N)
    ]


def _with_images(rows: list[dict[str, Any]], how: str) -> list[dict[str, Any]]:
    if how == "paths":
        return rows
    result = []
    for i, row in enumerate(rows):
        images: dict[str, Any] = {"safe_image": png(i), "unsafe_image": png(i + N)}
        if how == "structs":
            images = {key: {"bytes": value, "path": "not/looked/at.png"} for key, value in images.items()}
        if how == "structs of paths":
            images = {key: {"bytes": None, "path": row[key]} for key in images}
        result.append(row | images)
    return result


def _parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def _open(folder: Path, rows: list[dict[str, Any]], **options: Any) -> QuadrupleSource:
    _parquet(folder / "pairs.parquet", rows, **options)
    return open_set(folder, source="manifest", manifest="pairs.parquet")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The images of `_rows`."""
    for i in range(2 * N):
        put(tmp_path / "p" / f"{i}.png", png(i))
    return tmp_path


@pytest.mark.parametrize("group", [7, 1000])
@pytest.mark.parametrize("how", ["paths", "bytes", "structs", "structs of paths"])
def test_every_way_to_give_an_image_is_the_same_set(how: str, group: int, pictures: Path) -> None:
    """The record equals that of JSON Lines, and so does every item, in any order and with any row groups."""
    lines = open_manifest(pictures, _rows())
    source = _open(pictures, _with_images(_rows(), how), row_group_size=group)
    assert source.record.content_digest == lines.record.content_digest
    assert source.record.ids_digest == lines.record.ids_digest
    for i in (0, 1, 39, 17, 18, 3, 0):
        item, same = source.read(i), lines.read(i)
        assert item.safe_image.tobytes() == same.safe_image.tobytes()
        assert item.unsafe_image.tobytes() == same.unsafe_image.tobytes()
        assert source.read_texts(i) == lines.read_texts(i)


def test_without_statistics_the_images_are_found_all_the_same(tmp_path: Path) -> None:
    """A file that does not say how many values are missing is looked through."""
    rows = _with_images(_rows(), "bytes")
    rows[5] |= {"safe_image": None, "unsafe_image": None}
    source = _open(tmp_path, rows, write_statistics=False, row_group_size=16)
    assert source.has_images
    assert source.read(5).safe_image is None
    assert source.read(6).safe_image.getpixel((0, 0)) == (6, 0, 90)


def _red(source: QuadrupleSource, index: int) -> tuple[int, str | None]:
    item = source.read(index)
    return item.unsafe_image.getpixel((0, 0))[0], item.safe_text


def test_worker_processes_read_the_same(tmp_path: Path) -> None:
    """A forked process has its own place in the file, also after the parent has read."""
    source = _open(tmp_path, _with_images(_rows(), "bytes"), row_group_size=9)
    source.read(30)
    rows = list(read_all(partial(_red, source), N, 2, "", lambda *_: None))
    assert rows == [(i + N, f"calm {i}") for i in range(N)]


def test_columns_of_a_foreign_table_are_mapped(tmp_path: Path) -> None:
    """Parquet shards with other names, whole numbers with gaps, categories, and a column that is not used."""
    for part in range(2):
        table = pa.table(
            {
                "number": pa.array([10.0 * part + i for i in range(3)]),
                "tag": pa.array(["Hate", "Fire", "Hate"]).dictionary_encode(),
                "calm": ["a", "b", "c"],
                "wild": pa.array(["d", "e", None], pa.large_string()),
                "other": [[1], [2], [3]],
            }
        )
        parquet.write_table(table, put(tmp_path / f"part-{part}.parquet", b""))
    columns = {"id": "{number:03d}", "concept": "tag", "safe_text": "calm", "unsafe_text": "wild"}
    source = open_set(tmp_path, source="table", table="part-*.parquet", columns=columns)
    assert source.ids == ["000", "001", "002", "010", "011", "012"]
    assert source.concepts == ["hate", "fire", "hate"] * 2
    assert source.read_texts(4) == ("b", "e")
    assert source.read_texts(5) is None
    with pytest.raises(DataError, match="no column 'wild2'; it has number, tag"):
        open_set(tmp_path, source="table", table="part-*.parquet", columns=columns | {"unsafe_text": "wild2"})


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "no Parquet": lambda path: path.write_bytes(b"PAR1, or so it says"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_a_broken_file_is_one_clear_line(name: str, tmp_path: Path) -> None:
    """Cut, foreign, empty or missing files are refused with their name."""
    path = _parquet(tmp_path / "pairs.parquet", _rows())
    DAMAGE[name](path)
    with pytest.raises(DataError, match=r"pairs\.parquet cannot be read"):
        open_set(tmp_path, source="manifest", manifest="pairs.parquet")


def test_damaged_pages_are_one_clear_line(tmp_path: Path) -> None:
    """Rubbish in the middle of a file is noticed when the set is opened or when the item is read, never later."""
    path = _parquet(
        tmp_path / "pairs.parquet", _with_images(_rows(), "bytes"), compression="zstd", use_dictionary=False
    )
    data = bytearray(path.read_bytes())
    middle = len(data) // 3
    data[4 : 2 * middle] = bytes(2 * middle - 4)
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"pairs\.parquet cannot be read"):
        open_set(tmp_path, source="manifest", manifest="pairs.parquet").read(0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"id": ["a"], "safe_text": ["x"], "unsafe_text": ["y"], "colour": ["red"]}, "unknown key 'colour'"),
        ({"id": ["a"], "safe_text": ["x"]}, "unpaired text"),
        ({"safe_text": ["x"], "unsafe_text": ["y"]}, "has no id"),
        ({"id": [None], "safe_text": ["x"], "unsafe_text": ["y"]}, "has no id"),
        ({"id": ["a"], "safe_text": [1], "unsafe_text": ["y"]}, "not a text"),
        ({"id": ["a"], "safe_image": [3], "unsafe_image": ["y"]}, "neither a path nor bytes"),
        ({"id": ["a"], "safe_image": ["../x"], "unsafe_image": ["y"]}, "leaves the set's folder"),
        ({"id": ["a", "a"], "safe_text": ["x", "x"], "unsafe_text": ["y", "y"]}, "occurs more than once"),
    ],
)
def test_a_wrong_manifest_is_refused(table: dict[str, list[Any]], message: str, tmp_path: Path) -> None:
    """The same strictness as for JSON Lines."""
    parquet.write_table(pa.table(table), tmp_path / "pairs.parquet")
    with pytest.raises(DataError) as caught:
        open_set(tmp_path, source="manifest", manifest="pairs.parquet")
    assert message in str(caught.value)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    """Parquet allows it; which of them is meant nobody knows."""
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["id", "id", "safe_text"])
    parquet.write_table(table, tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match="names a column twice"):
        open_set(tmp_path, source="manifest", manifest="pairs.parquet")


def test_a_caption_that_is_not_utf_8_is_a_broken_table(tmp_path: Path) -> None:
    """Parquet promises UTF-8 and does not check it."""
    raw = pa.array([b"a", b"\xff\xfe"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    parquet.write_table(pa.table({"id": text, "safe_text": text, "unsafe_text": text}), tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match=r"pairs\.parquet cannot be read"):
        open_set(tmp_path, source="manifest", manifest="pairs.parquet")


def test_without_pyarrow_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base install is told what to install."""
    _parquet(tmp_path / "pairs.parquet", _rows())
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PrerequisiteError, match=r"pyarrow.*'uwm-deploy\[build\]'"):
        open_set(tmp_path, source="manifest", manifest="pairs.parquet")
