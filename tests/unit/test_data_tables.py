"""Tables of text: JSON, JSON Lines and CSV; column mapping, patterns, and everything that can be wrong with a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data_sets import open_manifest, open_set, pair, png, put
from uwm_deploy.data import rows as rows_module
from uwm_deploy.data.patterns import Pattern
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.errors import DataError, InputError, RecipeError

COLUMNS = {"id": "number", "concept": "tag", "safe_text": "calm", "unsafe_text": "wild"}
ROWS = [
    {"number": i, "tag": "Fire", "calm": f'a "quiet", calm\nroom {i} ü', "wild": f"a room on fire {i} 火"}
    for i in range(5)
]


def _table(folder: Path, name: str, data: bytes | str, **keys: Any) -> QuadrupleSource:
    put(folder / name, data)
    return open_set(folder, **{"source": "table", "table": name, "columns": COLUMNS} | keys)


def _csv(delimiter: str = ",") -> str:
    def field(value: object) -> str:
        return '"' + str(value).replace('"', '""') + '"'

    return "\r\n".join(delimiter.join(map(field, row)) for row in [list(ROWS[0]), *(r.values() for r in ROWS)]) + "\r\n"


FILES = {
    "array.json": json.dumps(ROWS),
    "indented.json": json.dumps(ROWS, indent=3, ensure_ascii=False),
    "empty-lines.jsonl": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "plain.csv": _csv(),
    "plain.tsv": _csv("\t"),
}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte order mark"])
@pytest.mark.parametrize("name", list(FILES))
def test_every_format_gives_the_same_set(name: str, mark: bytes, tmp_path: Path) -> None:
    """Ids, concepts and captions, also with line breaks, quotes and a byte order mark; in any order of reading."""
    source = _table(tmp_path, name, mark + FILES[name].encode())
    assert source.ids == [str(i) for i in range(5)]
    assert set(source.concepts) == {"fire"}
    assert (source.has_texts, source.has_images) == (True, False)
    for i in (4, 0, 3, 1, 2):
        assert source.read_texts(i) == (ROWS[i]["calm"], ROWS[i]["wild"])


def test_a_json_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that do not fit into one piece are put together, at the right byte, also behind wide characters."""
    monkeypatch.setattr(rows_module, "_CHUNK_CHARACTERS", 7)
    source = _table(tmp_path, "t.json", json.dumps(ROWS, ensure_ascii=False))
    assert [source.read_texts(i) for i in range(5)] == [(row["calm"], row["wild"]) for row in ROWS]


def test_files_of_a_pattern_are_one_table(tmp_path: Path) -> None:
    """A glob's files follow each other by name, also below a folder whose own name looks like a pattern."""
    folder = tmp_path / "[a]"
    for part in (1, 0):
        rows = [row | {"number": 10 * part + i} for i, row in enumerate(ROWS)]
        put(folder / f"part-{part}.jsonl", "\n".join(json.dumps(row) for row in rows))
    source = open_set(folder, source="table", table="part-*.jsonl", columns=COLUMNS)
    assert source.ids == [str(i) for i in (*range(5), *range(10, 15))]
    assert source.read_texts(7) == (ROWS[2]["calm"], ROWS[2]["wild"])


def test_a_table_in_two_formats_is_refused(tmp_path: Path) -> None:
    """The same rows as JSON and as CSV would be every item twice."""
    put(tmp_path / "t.csv", FILES["plain.csv"])
    with pytest.raises(DataError, match=r"t\.csv, t\.json"):
        _table(tmp_path, "t.json", FILES["array.json"], table="t.*")


BROKEN = {
    "no array end": ("t.json", json.dumps(ROWS)[:-1], "row 6 is not JSON"),
    "cut row": ("t.json", json.dumps(ROWS)[:-20], "row 5 is not JSON"),
    "more behind the array": ("t.json", json.dumps(ROWS) + "[]", "more after the array"),
    "no comma": (
        "t.json",
        '[{"number": 1, "tag": "", "calm": "", "wild": ""} {}]',
        "row 2 is not JSON: ',' was expected",
    ),
    "array of numbers": ("t.json", "[1, 2]", "row 1 is not JSON: an object was expected"),
    "deep": ("t.json", '[{"a": ' + "[" * 200_000, "row 1 is not JSON"),
    "line of numbers": ("t.jsonl", "1\n", "line 1 is not an object"),
    "line cut": ("t.jsonl", json.dumps(ROWS[0]) + '\n{"number', "line 2 is not JSON"),
    "deep line": ("t.jsonl", "{" + '"a": [' * 200_000, "line 1 is not JSON"),
    "too few fields": ("t.csv", "number,tag,calm,wild\n1,b,c\n", "line 2 has 3 fields, the header has 4"),
    "open quote": ("t.csv", 'number,tag,calm,wild\n1,b,c,"d', "is not CSV"),
    "column twice": ("t.csv", "number,tag,calm,calm\n1,b,c,d\n", "names a column twice"),
    "missing column": ("t.csv", "number,tag,calm\n1,b,c\n", "no column 'wild'; it has number, tag, calm"),
    "not UTF-8": ("t.csv", b"number,tag,calm,wild\n1,b,c,\xff\n", "cannot be read"),
    "line not UTF-8": ("t.jsonl", b'{"number": "\xff"}\n', "line 1 is not JSON"),
    "array not UTF-8": ("t.json", b'[{"number": "\xff"}]\n', "cannot be read"),
    "text is a number": ("t.jsonl", json.dumps(ROWS[0] | {"wild": 3}), "column 'wild' holds '3', not a text"),
    "id is a list": ("t.jsonl", json.dumps(ROWS[0] | {"number": [1]}), "id is '[1]'"),
    "id is true": ("t.jsonl", json.dumps(ROWS[0] | {"number": True}), "id is 'True'"),
    "id is empty": ("t.csv", "number,tag,calm,wild\n,b,c,d\n", "line 2 has no id"),
    "id is half a character": ("t.jsonl", json.dumps(ROWS[0] | {"number": "\ud800"}), "half a character"),
    "concept is half a character": ("t.jsonl", json.dumps(ROWS[0] | {"tag": "\ud800"}), "half a character"),
    "id twice": ("t.jsonl", 2 * (json.dumps(ROWS[0]) + "\n"), "id '0' occurs more than once"),
    "nothing": ("t.json", "[]", "has no quadruples"),
    "no bytes": ("t.json", "", "has no quadruples"),
    "only a header": ("t.csv", "number,tag,calm,wild\n", "has no quadruples"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_table_is_one_clear_line(name: str, tmp_path: Path) -> None:
    """Every kind of damage is an error that names the file's line or row."""
    file, data, message = BROKEN[name]
    with pytest.raises(DataError) as caught:
        _table(tmp_path, file, data)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.json"])
def test_a_huge_row_never_fills_the_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row above the limit is refused in every format; here the limit is small."""
    monkeypatch.setattr(rows_module, "_LARGEST_ROW", 1000)
    monkeypatch.setattr(rows_module, "_CHUNK_CHARACTERS", 100)
    row = ROWS[0] | {"wild": "x" * 5000}
    body = {
        "t.jsonl": json.dumps(row),
        "t.csv": ",".join(row) + "\n" + "1,2,3," + "x" * 5000,
        "t.json": json.dumps([row]),
    }
    with pytest.raises(DataError, match=r"more than 1000 bytes|row 1 is not JSON"):
        _table(tmp_path, name, body[name])


def test_a_table_that_is_not_there_says_where_it_was_expected(tmp_path: Path) -> None:
    """A missing table, a pattern without match, a missing folder."""
    with pytest.raises(DataError, match=r"expects its table at .*none\.json"):
        open_set(tmp_path, source="table", table="none.json", columns=COLUMNS)
    with pytest.raises(DataError, match=r"no file matches .*none-\*"):
        open_set(tmp_path, source="table", table="none-*.json", columns=COLUMNS)
    with pytest.raises(DataError, match="which is no folder"):
        open_set(tmp_path, source="table", table="t.json", folder="nowhere", columns=COLUMNS)


def test_a_table_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    """Rows are found by their place; another row there is no fact about the item, so nothing goes on without it."""
    source = _table(tmp_path, "t.jsonl", "\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "t.jsonl").write_bytes(b"x" * 500)
    with pytest.raises(InputError, match="was changed while it was read") as caught:
        source.read_texts(2)
    assert not isinstance(caught.value, DataError)


def test_concepts_are_renamed_however_they_are_written(tmp_path: Path) -> None:
    """Case and blanks do not matter; an empty concept gets a name; others stay."""
    tags = ["Bodily  Bluids", "bodily bluids ", "HATE", "", None]
    rows = [ROWS[i] | {"tag": tag} for i, tag in enumerate(tags)]
    source = _table(tmp_path, "t.json", json.dumps(rows), concept_names={"bodily bluids": "bodily fluids"})
    assert source.concepts == ["bodily fluids", "bodily fluids", "hate", "unlabelled", "unlabelled"]
    assert source.record.concepts == {"bodily fluids": 2, "hate": 1, "unlabelled": 2}


def test_only_rows_of_the_split_are_used(tmp_path: Path) -> None:
    """A split column is compared with the set's split."""
    rows = [row | {"part": "train" if i < 3 else "test"} for i, row in enumerate(ROWS)]
    source = _table(tmp_path, "t.json", json.dumps(rows), split="test", columns=COLUMNS | {"split": "part"})
    assert source.ids == ["3", "4"]


def test_columns_called_row_and_split_are_columns(tmp_path: Path) -> None:
    """Only inside braces do these names mean the row's number and the set's split."""
    rows = [{"row": f"r{i}", "split": "x", "calm": "a", "wild": "b"} for i in range(2)]
    columns = {"id": "row", "safe_text": "calm", "unsafe_text": "wild"}
    assert _table(tmp_path, "t.json", json.dumps(rows), columns=columns).ids == ["r0", "r1"]
    columns |= {"id": "{split}-{row:03d}"}
    assert _table(tmp_path, "t.json", json.dumps(rows), columns=columns, split="val").ids == ["val-000", "val-001"]


# --- images -------------------------------------------------------------------------------------------------------------

PICTURES = {"safe_image": ["first/{number:04d}.png", "second/{number:04d}.png"], "unsafe_image": "wild/{number}/0.png"}


def _with_pictures(folder: Path, *, missing: str, lost: tuple[int, ...] = ()) -> QuadrupleSource:
    for i in range(5):
        put(folder / ("first" if i % 2 else "second") / f"{i:04d}.png", png(i))
        if i not in lost:
            put(folder / "wild" / str(i) / "0.png", png(100 + i))
    return _table(folder, "t.json", json.dumps(ROWS), columns=COLUMNS | PICTURES, missing_images=missing)


def test_the_first_alternative_that_is_there_is_taken(tmp_path: Path) -> None:
    """A number is padded as the pattern says, and looked for in each folder."""
    source = _with_pictures(tmp_path, missing="error")
    assert source.has_images
    assert source.read(0).safe_image.getpixel((0, 0)) == (0, 0, 90)
    assert source.read(3).safe_image.getpixel((0, 0)) == (3, 0, 90)
    assert source.read(3).unsafe_image.getpixel((0, 0)) == (103, 0, 90)


def test_items_without_their_image_are_left_out_by_name(tmp_path: Path) -> None:
    """`missing_images = "drop"` leaves them out before sampling, counted and named; the default finds them broken."""
    source = _with_pictures(tmp_path, missing="drop", lost=(1, 4))
    assert source.ids == ["0", "2", "3"]
    assert [(item.id, item.reason) for item in source.record.left_out] == [
        ("1", "unsafe image file is missing"),
        ("4", "unsafe image file is missing"),
    ]
    assert source.record.left_out_counts == {"unsafe image file is missing": 2}
    source = _with_pictures(tmp_path, missing="error", lost=(1, 4))
    assert len(source) == 5
    with pytest.raises(DataError, match=r"item 4, unsafe_image: .*does not exist"):
        source.read(4)


def test_a_set_whose_images_are_all_missing_says_where_the_first_was_expected(tmp_path: Path) -> None:
    """Nothing to score is an error with a path in it."""
    with pytest.raises(DataError, match=r"all 5 items lack an image, the first one .*wild/0/0\.png"):
        _with_pictures(tmp_path, missing="drop", lost=(0, 1, 2, 3, 4))


@pytest.mark.parametrize("path", ["/etc/hostname", "../secret.png", "a/../../secret.png", "a\0b.png"])
@pytest.mark.parametrize("missing", ["error", "drop"])
def test_a_path_never_leaves_the_folder(path: str, missing: str, tmp_path: Path) -> None:
    """Absolute paths, paths upwards and paths with a zero in them are refused when the set is opened."""
    put(tmp_path / "secret.png", png(1))
    row = pair(1, safe_image="a.png", unsafe_image=path)
    with pytest.raises(DataError, match="leaves the set's folder"):
        open_manifest(tmp_path / "set", [row], missing_images=missing)


def test_a_pattern_cannot_lead_out_of_the_folder_either(tmp_path: Path) -> None:
    """What a column puts into a path is checked like the path."""
    rows = [ROWS[0] | {"file": "../../secret"}]
    columns = COLUMNS | {"safe_image": "a/{file}.png", "unsafe_image": "b/{file}.png"}
    with pytest.raises(DataError, match="leaves the set's folder"):
        _table(tmp_path, "t.json", json.dumps(rows), columns=columns)


@pytest.mark.parametrize(
    "text", ["{a", "a}", "{}", "{a!r}", "{a:x}", "{a:>5}", "{a.b}", "{a[0]}", "{a:{b}}", "{0}", "{a:999d}"]
)
def test_only_names_and_widths_stand_in_braces(text: str) -> None:
    """The rest of Python's format language, which could reach into objects, is refused."""
    with pytest.raises(DataError, match="is no pattern"):
        Pattern(text, "here")


@pytest.mark.parametrize(
    ("text", "row", "filled"),
    [
        ("{a:06d}.png", {"a": 42}, "000042.png"),
        ("{a:06d}.png", {"a": "42"}, "000042.png"),
        ("{a:06d}.png", {"a": 42.0}, "000042.png"),
        ("{a}/{b}.png", {"a": "x", "b": 7}, "x/7.png"),
        ("{a}.png", {"a": None}, None),
        ("{a}.png", {"a": ""}, None),
        ("{a}.png", {}, None),
    ],
)
def test_a_pattern_is_filled_from_a_row(text: str, row: dict[str, Any], filled: str | None) -> None:
    """Numbers are padded, texts are put in as they are, an empty column is no path."""
    assert Pattern(text, "here").fill(row) == filled


@pytest.mark.parametrize("value", ["x", 1.5, True, [1], "9" * 5000])
def test_a_value_that_does_not_fit_is_refused(value: Any) -> None:
    """A number's place takes whole numbers only."""
    with pytest.raises(DataError, match="does not fit"):
        Pattern("{a:06d}", "here").fill({"a": value})


# --- manifests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pair(1, unsafe_text=None), "not an object of strings"),
        (pair(1, colour="red"), "unknown key 'colour'"),
        ({"id": "i1", "safe_text": "a"}, "item i1: unpaired text"),
        (pair(1, safe_image="a.png"), "item i1: unpaired image"),
        ({"id": "i1", "concept": "fire"}, "neither images nor texts"),
        (pair(1, id=""), "has no id"),
    ],
)
def test_a_manifest_is_read_strictly(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Null, unknown keys, half pairs and items of nothing are refused with their line."""
    with pytest.raises(DataError) as caught:
        open_manifest(tmp_path, [pair(0), row])
    assert message in str(caught.value)
    assert "line 2" in str(caught.value)


def test_one_tower_is_a_set(tmp_path: Path) -> None:
    """Texts alone and images alone are sets of their own."""
    texts = open_manifest(tmp_path, [pair(i) for i in range(3)])
    assert (texts.has_texts, texts.has_images) == (True, False)
    assert texts.read(1).safe_image is None
    for name in "ab":
        put(tmp_path / f"{name}.png", png(ord(name)))
    images = open_manifest(tmp_path, [{"id": "1", "safe_image": "a.png", "unsafe_image": "b.png"}])
    assert (images.has_texts, images.has_images) == (False, True)
    assert images.read_texts(0) is None
    assert images.read(0).safe_text is None


def test_half_a_character_in_a_caption_breaks_its_item_only(tmp_path: Path) -> None:
    """The item is named; the set opens, and its record can be made."""
    source = open_manifest(tmp_path, [pair(0), pair(1, unsafe_text="\ud83d")])
    assert source.read_texts(0) is not None
    with pytest.raises(DataError, match="item i1, unsafe_text holds half a character"):
        source.read_texts(1)
    assert source.record.n == 2


def test_the_content_digest_follows_every_member(tmp_path: Path) -> None:
    """Another caption, concept, order or image byte is another content; the same again is the same."""
    for name, number in (("a", 1), ("b", 2)):
        put(tmp_path / f"{name}.png", png(number))
    rows = [pair(i, safe_image="a.png", unsafe_image="b.png") for i in range(2)]
    first = open_manifest(tmp_path, rows).record
    assert open_manifest(tmp_path, rows).record == first
    seen = {first.content_digest}
    for changed in ([rows[0], rows[1] | {"safe_text": "x"}], [rows[0], rows[1] | {"concept": "x"}], rows[::-1]):
        seen.add(open_manifest(tmp_path, changed).record.content_digest)
    put(tmp_path / "b.png", png(3))
    seen.add(open_manifest(tmp_path, rows).record.content_digest)
    (tmp_path / "b.png").unlink()
    seen.add(open_manifest(tmp_path, rows).record.content_digest)
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "manifest"}, "`manifest` is missing"),
        ({"source": "table", "table": "a", "columns": {}}, "neither texts nor images"),
        ({"source": "table", "table": "a", "columns": {"safe_text": "a"}}, "one text of the pair"),
        ({"source": "manifest", "manifest": "a", "columns": {"id": "x"}}, "`columns` with source manifest"),
        ({"source": "manifest", "manifest": "a", "table": "b"}, "`table` with source manifest"),
        ({"source": "manifest", "manifest": "a", "sampling": "per-concept"}, "go together"),
        ({"source": "manifest", "manifest": "a", "sampling": "per-concept", "per_concept": 1, "limit": 1}, "alone"),
        ({"source": "manifest", "manifest": "a", "limit": -1}, "not negative"),
        ({"source": "manifest", "manifest": "a", "max_broken_share": 2.0}, "between 0 and 1"),
    ],
)
def test_a_wrong_definition_is_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Keys that contradict each other never get as far as the data."""
    with pytest.raises(RecipeError, match=message):
        open_set(tmp_path, **keys)
