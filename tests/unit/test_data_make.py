"""`data make`: folders to a manifest, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.data_sets import png, put
from uwm_deploy.cli import cli
from uwm_deploy.data.open import open_source
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.data.table import set_of_manifest
from uwm_deploy.records.codec import record_from_json
from uwm_deploy.records.data import MadeManifest


def _make(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["data", "make", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def _open(manifest: Path) -> QuadrupleSource:
    return open_source(set_of_manifest(manifest), base=manifest.parent)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two concepts with three items each: images and captions."""
    for c, concept in enumerate(("fire", "a spill")):
        for i in range(3):
            for s, side in enumerate(("safe", "unsafe")):
                folder = tmp_path / "pictures" / concept / side
                put(folder / f"{i}.x.PNG", png(10 * c + i + 100 * s))
                put(folder / f"{i}.x.txt", f"\ufeff {side} ü {i}\n")
    return tmp_path / "pictures"


@pytest.mark.parametrize("name", ["pairs.jsonl", "../pairs.ndjson", "pairs.parquet", "../pairs.pq"])
def test_the_manifest_opens_as_the_folder_lies(name: str, pictures: Path) -> None:
    """Ids, concepts, captions and images, beside or above the folder; `data check` finds it clean."""
    out = pictures / name
    code, output = _make(pictures, "--out", out)
    assert code == 0, output
    source = _open(Path(os.path.normpath(out)))
    assert source.ids == [f"{concept}/{i}.x" for concept in ("a spill", "fire") for i in range(3)]
    assert source.concepts == ["a spill"] * 3 + ["fire"] * 3
    item = source.read(4)
    assert (item.safe_text, item.unsafe_text) == ("safe ü 1", "unsafe ü 1")
    assert item.safe_image.getpixel((0, 0))[0] == 1
    assert item.unsafe_image.getpixel((0, 0))[0] == 101
    assert CliRunner().invoke(cli, ["data", "check", str(out), "--workers", "0"]).exit_code == 0


def test_embedded_images_need_no_folder(pictures: Path, tmp_path: Path) -> None:
    """The Parquet file is the whole set: the same content after the folder is gone, and it may lie anywhere."""
    assert _make(pictures, "--out", pictures / "pairs.jsonl")[0] == 0
    content = _open(pictures / "pairs.jsonl").record
    assert _make(pictures, "--out", tmp_path / "elsewhere" / "all.parquet", "--embed")[0] == 0
    pictures.rename(tmp_path / "gone")
    record = _open(tmp_path / "elsewhere" / "all.parquet").record
    assert (record.content_digest, record.ids_digest) == (content.content_digest, content.ids_digest)


def test_the_same_folder_gives_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    """Names are sorted, whatever order the disk gives them in."""
    for name in ("a", "b"):
        assert _make(pictures, "--out", tmp_path / f"{name}.jsonl")[0] == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


@pytest.mark.parametrize(("suffix", "has"), [(".txt", (False, True)), (".PNG", (True, False))])
def test_one_kind_alone_will_do(suffix: str, has: tuple[bool, bool], pictures: Path) -> None:
    """Captions alone and images alone make sets for one tower."""
    for path in pictures.rglob(f"*{'.PNG' if suffix == '.txt' else '.txt'}"):
        path.unlink()
    code, output = _make(pictures, "--out", pictures / "pairs.jsonl")
    assert code == 0
    source = _open(pictures / "pairs.jsonl")
    assert (source.has_images, source.has_texts) == has
    assert f"6 items, {6 * has[0]} with both images, {6 * has[1]} with both texts" in output


def test_without_concepts_there_is_one(pictures: Path) -> None:
    """FOLDER/safe and FOLDER/unsafe are one concept, `all`."""
    assert _make(pictures / "fire", "--out", pictures / "fire" / "pairs.jsonl")[0] == 0
    source = _open(pictures / "fire" / "pairs.jsonl")
    assert (source.ids, source.concepts) == (["0.x", "1.x", "2.x"], ["all"] * 3)


def test_what_is_no_part_of_the_layout_is_named(pictures: Path) -> None:
    """Other files and folders are passed over, and said; hidden ones are not."""
    for name in (
        "readme.md",
        "fire/notes.txt",
        "fire/safe/clip.mp4",
        "fire/safe/sub/0.png",
        ".hidden",
        "fire/safe/.x.png",
    ):
        put(pictures / name, b"x")
    code, output = _make(pictures, "--out", pictures.parent / "pairs.jsonl", "--json")
    assert code == 0
    made = record_from_json(MadeManifest, output, where="stdout")
    assert made.ignored_count == 4
    assert set(made.ignored) == {"readme.md", "fire/notes.txt", "fire/safe/clip.mp4", "fire/safe/sub"}
    assert (made.n, made.concepts, made.image_pairs, made.text_pairs) == (6, {"a spill": 3, "fire": 3}, 6, 6)


def test_items_without_a_counterpart_are_refused_or_left_out(pictures: Path) -> None:
    """Each is named with what it lacks; nothing is written unless it is asked for."""
    (pictures / "fire" / "unsafe" / "1.x.PNG").unlink()
    (pictures / "a spill" / "safe" / "2.x.txt").unlink()
    out = pictures / "pairs.jsonl"
    code, output = _make(pictures, "--out", out)
    assert code == 2
    assert "without a counterpart: 2 " in output
    assert "(a spill/2.x: no safe text, fire/1.x: no unsafe image)" in output
    assert not list(pictures.glob("*.jsonl*"))
    assert not list(pictures.glob(".tmp*"))
    code, output = _make(pictures, "--out", out, "--drop-unpaired")
    assert code == 0
    assert "left out: 2\n  a spill/2.x: no safe text\n  fire/1.x: no unsafe image" in output
    assert len(_open(out)) == 4


def _two_of_a_name(folder: Path) -> None:
    put(folder / "fire" / "safe" / "0.x.jpg", b"x")


def _not_utf_8(folder: Path) -> None:
    put(folder / "fire" / "safe" / "0.x.txt", b"\xff")


def _empty(folder: Path) -> None:
    put(folder / "fire" / "safe" / "0.x.txt", " \n")


def _huge(folder: Path) -> None:
    put(folder / "fire" / "safe" / "0.x.txt", b"x" * (1 << 21))


def _no_sides(folder: Path) -> None:
    put(folder / "other" / "0.png", b"x")


def _odd_name(folder: Path) -> None:
    put(Path(os.fsdecode(os.fsencode(folder / "fire" / "safe") + b"/\xff.txt")), "x")


def _nothing(folder: Path) -> None:
    for path in folder.rglob("*.*"):
        path.unlink()


WRONG = {
    "two of a name": (_two_of_a_name, "has both 0.x.PNG and 0.x.jpg"),
    "not UTF-8": (_not_utf_8, "0.x.txt is not UTF-8"),
    "empty caption": (_empty, "0.x.txt is empty"),
    "huge caption": (_huge, "0.x.txt has more than 1048576 bytes"),
    "neither safe nor unsafe": (_no_sides, "other has neither safe/ nor unsafe/"),
    "odd name": (_odd_name, "which is not UTF-8"),
    "nothing": (_nothing, "has no pair of files"),
}


@pytest.mark.parametrize("name", list(WRONG))
@pytest.mark.parametrize("out", ["pairs.jsonl", "pairs.parquet"])
def test_a_wrong_folder_leaves_nothing_behind(name: str, out: str, pictures: Path) -> None:
    """One line that names the file, exit code 2, and no manifest, whole or half; an old one stays as it was."""
    change, message = WRONG[name]
    change(pictures)
    code, output = _make(pictures, "--out", pictures.parent / out)
    assert code == 2
    assert message in output
    assert [path.name for path in pictures.parent.iterdir()] == ["pictures"]
    put(pictures.parent / out, "old")
    assert _make(pictures, "--out", pictures.parent / out, "--force")[0] == 2
    assert (pictures.parent / out).read_bytes() == b"old"


def test_a_manifest_is_replaced_only_with_force(pictures: Path) -> None:
    """Without --force the file that is there is not touched; a folder is never replaced."""
    out = put(pictures / "pairs.jsonl", "old")
    code, output = _make(pictures, "--out", out)
    assert (code, out.read_text()) == (2, "old")
    assert "is there already" in output
    assert _make(pictures, "--out", out, "--force")[0] == 0
    assert len(_open(out)) == 6
    (pictures.parent / "x.jsonl").mkdir()
    assert _make(pictures, "--out", pictures.parent / "x.jsonl", "--force")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pictures", "--out", "pairs.json"], "is no manifest's name"),
        (["pictures", "--out", "pairs.jsonl", "--embed"], "only Parquet holds images"),
        (["pictures", "--out", "elsewhere/pairs.jsonl"], "above its own folder"),
        (["pictures", "--out", "pictures/fire/pairs.jsonl"], "above its own folder"),
        (["nowhere", "--out", "pairs.jsonl"], "is no folder"),
        (["pictures/fire/safe/0.x.txt", "--out", "pairs.jsonl"], "is no folder"),
        (["pictures"], "missing option '--out'"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[Any], message: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, and nothing is made, not even a folder."""
    monkeypatch.chdir(pictures.parent)
    code, output = _make(*arguments)
    assert code == 2
    assert message in output
    assert [path.name for path in pictures.parent.iterdir()] == ["pictures"]


def test_lines_are_what_the_docs_say(pictures: Path) -> None:
    """One JSON object per line, paths from the manifest's own folder."""
    assert _make(pictures, "--out", pictures.parent / "pairs.jsonl")[0] == 0
    assert json.loads((pictures.parent / "pairs.jsonl").read_text().splitlines()[3]) == {
        "id": "fire/0.x",
        "concept": "fire",
        "safe_image": "pictures/fire/safe/0.x.PNG",
        "unsafe_image": "pictures/fire/unsafe/0.x.PNG",
        "safe_text": "safe ü 0",
        "unsafe_text": "unsafe ü 0",
    }
