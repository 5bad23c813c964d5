"""`data make` from sets of other forms: each ends in a manifest that opens with the same items."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import pyarrow
import pytest
from click.testing import CliRunner

from tests.data_sets import png, put
from uwm_deploy.cli import cli
from uwm_deploy.data.open import open_source
from uwm_deploy.data.table import set_of_manifest

ITEMS = 3


def _make(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["data", "make", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def _same(manifest: Path, ids: list[str]) -> None:
    """Every item has its own pictures and captions."""
    source = open_source(set_of_manifest(manifest), base=manifest.parent)
    assert source.ids == ids
    for i in range(ITEMS):
        item = source.read(i)
        assert (item.safe_text, item.unsafe_text) == (f"calm {i}", f"wild {i}")
        assert item.safe_image.getpixel((0, 0))[0] == i
        assert item.unsafe_image.getpixel((0, 0))[0] == 100 + i


def _csv(folder: Path) -> Path:
    with (folder / "pairs.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["number", "tag", "good", "bad", "safe_image", "unsafe_image"])
        for i in range(ITEMS):
            put(folder / "images" / f"s{i}.png", png(i))
            put(folder / "images" / f"u{i}.png", png(100 + i))
            table.writerow([f"n{i}", "Fire", f"calm {i}", f"wild {i}", f"images/s{i}.png", f"images/u{i}.png"])
    return folder / "pairs.csv"


PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "own-data.md").read_text()

COLUMNS = [
    word for key in ("id=number", "concept=tag", "safe_text=good", "unsafe_text=bad") for word in ("--column", key)
]


def _saved(folder: Path, *, listed: int | None = None) -> Path:
    """A folder as `datasets.Dataset.save_to_disk` lays it: two Arrow streams, images as structs, and the state."""
    folder.mkdir()
    rows = [
        {
            "safe_image": {"bytes": png(i), "path": None},
            "unsafe_image": {"bytes": png(100 + i), "path": None},
            "safe_text": f"calm {i}",
            "unsafe_text": f"wild {i}",
        }
        for i in range(ITEMS)
    ]
    names = [f"data-{n:05d}-of-00002.arrow" for n in range(2)]
    for name, part in zip(names, (rows[:2], rows[2:]), strict=True):
        table = pyarrow.Table.from_pylist(part)
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names[:listed]], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def _shard(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for i in range(ITEMS):
            for name, content in (
                (f"{i}.safe.png", png(i)),
                (f"{i}.unsafe.png", png(100 + i)),
                (f"{i}.safe.txt", f"calm {i}".encode()),
                (f"{i}.unsafe.txt", f"wild {i}".encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def test_a_csv_becomes_a_manifest(tmp_path: Path) -> None:
    """By paths, and with the images inside."""
    table = _csv(tmp_path)
    for out in (["--out", tmp_path / "a.jsonl"], ["--out", tmp_path / "b.parquet", "--embed"]):
        code, output = _make(table, *COLUMNS, *out)
        assert code == 0, output
        _same(out[1], ["n0", "n1", "n2"])
    source = open_source(set_of_manifest(tmp_path / "a.jsonl"), base=tmp_path)
    assert source.concepts == ["fire"] * ITEMS


def test_captions_alone_become_a_manifest(tmp_path: Path) -> None:
    """A start without pictures."""
    (tmp_path / "captions.csv").write_text("safe_text,unsafe_text\na room,a room on fire\na cup,a cup of pills\n")
    code, output = _make(tmp_path / "captions.csv", "--out", tmp_path / "captions.jsonl")
    assert code == 0, output
    source = open_source(set_of_manifest(tmp_path / "captions.jsonl"), base=tmp_path)
    assert (source.ids, source.has_images) == (["000000", "000001"], False)
    assert source.read_texts(1) == ("a cup", "a cup of pills")


def test_columns_that_were_not_read_are_named(tmp_path: Path) -> None:
    """By name and with --column, in a table and in a saved set; none where all were read, as by a pattern."""
    table = _csv(tmp_path)
    code, output = _make(table, *COLUMNS[:4], "--out", tmp_path / "a.jsonl")
    assert (code, "0 with both texts" in output) == (0, True)
    assert re.search(r"not read: 2\n +good\n +bad\n.* --column safe_text=good\n", output), output
    code, output = _make(table, "--column", "id=n-{number}", *COLUMNS[2:], "--out", tmp_path / "b.jsonl", "--json")
    assert (code, json.loads(output)["unread_count"], json.loads(output)["unread"]) == (0, 0, [])
    saved = _saved(tmp_path / "saved")
    words = ["--column", "safe_text=unsafe_text", "--out", tmp_path / "c.parquet", "--embed", "--json"]
    code, output = _make(saved, *words)
    assert (code, json.loads(output)["unread"]) == (0, ["safe_text"])


def test_a_saved_data_set_becomes_a_manifest(tmp_path: Path) -> None:
    """Rows of all its files in order; without --embed it is refused, since no path names what lies inside."""
    folder = _saved(tmp_path / "saved")
    code, output = _make(folder, "--out", tmp_path / "a.parquet", "--embed")
    assert code == 0, output
    _same(tmp_path / "a.parquet", ["000000", "000001", "000002"])
    code, output = _make(folder, "--out", tmp_path / "b.parquet")
    assert (code, "--embed" in output, (tmp_path / "b.parquet").exists()) == (2, True, False)


@pytest.mark.parametrize("folder", [False, True])
def test_shards_become_a_manifest(folder: bool, tmp_path: Path) -> None:
    """One file, or a folder of them."""
    (tmp_path / "shards").mkdir()
    shard = _shard(tmp_path / "shards" / "a.tar")
    code, output = _make(shard.parent if folder else shard, "--out", tmp_path / "a.parquet", "--embed")
    assert code == 0, output
    _same(tmp_path / "a.parquet", ["0", "1", "2"])


def test_two_folders_become_a_manifest(tmp_path: Path) -> None:
    """Files of one name in both are one item, whatever the folders are called."""
    for i in range(ITEMS):
        for side, shade in (("calm", i), ("wild", 100 + i)):
            put(tmp_path / side / f"{i}.png", png(shade))
            put(tmp_path / side / f"{i}.txt", f"{side} {i}")
    code, output = _make(tmp_path / "calm", "--unsafe", tmp_path / "wild", "--out", tmp_path / "a.jsonl")
    assert code == 0, output
    _same(tmp_path / "a.jsonl", ["0", "1", "2"])


def test_an_item_without_its_counterpart_is_refused_or_left_out(tmp_path: Path) -> None:
    """A file that is not there, and an empty caption, are no members."""
    table = _csv(tmp_path)
    (tmp_path / "images" / "u1.png").unlink()
    table.write_text(table.read_text().replace("wild 2", ""))
    code, output = _make(table, *COLUMNS, "--out", tmp_path / "a.jsonl")
    assert (code, (tmp_path / "a.jsonl").exists()) == (2, False)
    assert "2 (n1: no unsafe image, n2: no unsafe text)" in " ".join(output.split())
    code, output = _make(table, *COLUMNS, "--out", tmp_path / "a.jsonl", "--drop-unpaired", "--json")
    assert (code, json.loads(output)["n"], json.loads(output)["unpaired_count"]) == (0, 1, 2)


@pytest.mark.parametrize("case", ["no column", "unknown key", "missing file", "splits", "shard column", "broken"])
def test_a_source_that_cannot_be_used_says_why(case: str, tmp_path: Path) -> None:
    """Exit code 2, a fix, and no manifest."""
    more: list[str] = []
    if case in ("no column", "unknown key"):
        (source := tmp_path / "x.csv").write_text("a,b\n1,2\n")
        more, words = {"no column": ([], "--column"), "unknown key": (["--column", "caption=a"], "safe_text")}[case]
    elif case == "missing file":
        source, words = _saved(tmp_path / "saved", listed=1), "save the set again"
    elif case == "splits":
        _saved((tmp_path / "all").mkdir() or tmp_path / "all" / "train")
        (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train"]}')
        source, words = tmp_path / "all", "all/train"
    elif case == "shard column":
        source, more, words = _shard(tmp_path / "a.tar"), ["--column", "id=x"], "no columns"
    else:
        (source := tmp_path / "x.arrow").write_bytes(b"ARROW1 not really")
        words = "Arrow was expected"
    code, output = _make(source, *more, "--out", tmp_path / "out.parquet", "--embed")
    assert (code, words in " ".join(output.split()), (tmp_path / "out.parquet").exists()) == (2, True, False), output


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one that makes or checks a manifest, on what the page says lies there; captions alone make an edit."""
    monkeypatch.chdir(tmp_path)
    for i in range(ITEMS):
        for side, folder, shade in (("safe", "calm", i), ("unsafe", "wild", 100 + i)):
            for place in (folder, f"pictures/fire/{side}"):
                put(tmp_path / place / f"{i}.png", png(shade))
                put(tmp_path / place / f"{i}.txt", f"{folder} {i}")
    put(tmp_path / "pairs.csv", _csv(tmp_path).read_text().replace("good,bad", "caption,nsfw_caption"))
    (tmp_path / "saved").mkdir()
    _saved(tmp_path / "saved" / "train")
    (tmp_path / "shards").mkdir()
    _shard(tmp_path / "shards" / "a.tar")
    (captions,) = re.findall(r"```csv\n(.*?)```", PAGE, re.DOTALL)
    put(tmp_path / "captions.csv", captions)
    put(tmp_path / "captions.toml", *re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL))
    commands = re.findall(r"^    uwm-deploy (.*)$", PAGE, re.MULTILINE)
    assert [" ".join(command.split()[:2]) for command in commands].count("data make") == 6
    for command in commands:
        words = shlex.split(command)
        if "my-test.toml" in words:  # tests of the check itself have sets that are large enough
            continue
        for made in (*tmp_path.glob("pairs.parquet"), *tmp_path.glob("pairs.jsonl")):
            made.unlink()
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0, (command, done.output)
    record = json.loads((tmp_path / ".uwm" / "demo" / "edit" / "edit.json").read_text())
    assert {tensor["tower"] for tensor in record["tensors"] if tensor["selected"]} == {"text"}
