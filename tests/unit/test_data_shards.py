"""WebDataset shards: what is an item, how shards are named, and what can be wrong with a tar file."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from functools import partial
from pathlib import Path

import pytest

from tests.data_sets import members, open_set, png, put, write_shard
from uwm_deploy.data.archive import expanded
from uwm_deploy.data.archive import members as members_of
from uwm_deploy.data.reading import read_all
from uwm_deploy.data.shards import _MOST_OPEN
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.errors import DataError


def _open(folder: Path, shards: str | list[str] = "s-{000..001}.tar", **keys: object) -> QuadrupleSource:
    return open_set(folder, source="webdataset", shards=shards, **keys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of three items."""
    for shard in range(2):
        numbers = range(3 * shard, 3 * shard + 3)
        together = {name: data for i in numbers for name, data in members(f"a/k{i}", i).items()}
        write_shard(tmp_path / f"s-{shard:03d}.tar", together)
    return tmp_path


def test_members_of_one_key_are_an_item(folder: Path) -> None:
    """Key, concept, captions and images, in the order of the shards and of the keys in them."""
    source = _open(folder)
    assert source.ids == [f"a/k{i}" for i in range(6)]
    assert source.concepts == ["smoke", "fire"] * 3
    assert (source.has_texts, source.has_images) == (True, True)
    for i in (5, 0, 3):
        item = source.read(i)
        assert source.read_texts(i) == (f"a calm {i}", f"a fire {i}") == (item.safe_text, item.unsafe_text)
        assert item.safe_image.getpixel((0, 0)) == (i, 0, 90)
        assert item.unsafe_image.getpixel((0, 0)) == ((i + 1000) % 256, (i + 1000) // 256, 90)


def test_captions_may_stand_in_the_description(tmp_path: Path) -> None:
    """`.json` has concept and texts; a text file comes before it; members of other kinds are passed over."""
    texts = {"concept": "fire", "safe_text": "calm", "unsafe_text": "wild", "url": "x"}
    shard = {
        "1.json": json.dumps(texts),
        "1.mp3": b"x",
        "README": b"x",
        "2.json": json.dumps(texts),
        "2.safe.txt": "own",
    }
    write_shard(tmp_path / "s.tar", shard)
    source = _open(tmp_path, "s.tar")
    assert source.ids == ["1", "2"]
    assert source.read_texts(0) == ("calm", "wild")
    assert source.read_texts(1) == ("own", "wild")
    assert not source.has_images


def test_an_item_without_a_member_is_not_whole(tmp_path: Path) -> None:
    """It stays in the set, has no pair, and can be left out by `missing_images`."""
    lost = members("b", 2)
    del lost["b.unsafe.png"], lost["b.safe.txt"]
    write_shard(tmp_path / "s.tar", members("a", 1) | lost)
    source = _open(tmp_path, "s.tar")
    assert source.ids == ["a", "b"]
    assert source.read(1).unsafe_image is None
    assert source.read_texts(1) is None
    source = _open(tmp_path, "s.tar", missing_images="drop")
    assert source.ids == ["a"]
    assert source.record.left_out_counts == {"no unsafe image": 1}


def test_the_format_of_the_tar_does_not_matter(tmp_path: Path) -> None:
    """Long names, folders between the files, a leading ./ and every tar format of Python."""
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"s-{number}.tar", "w", format=form) as archive:
            archive.add(put(tmp_path / "d" / "x", b"").parent, "./folder", recursive=False)
            for name, data in members(f"./folder/{'k' * 80}{number}", number).items():
                path = put(tmp_path / "member", data)
                archive.add(path, name)
    source = _open(tmp_path, "s-*.tar")
    assert source.ids == [f"folder/{'k' * 80}{number}" for number in range(3)]
    assert source.read_texts(2) == ("a calm 2", "a fire 2")


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{a,b}-{0..1}.tar", ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]),
        ("{a}.tar", ["{a}.tar"]),
    ],
)
def test_braces_stand_for_names(name: str, names: list[str]) -> None:
    """Ranges keep their zeros, choices multiply."""
    assert sorted(expanded(name)) == sorted(names)


@pytest.mark.parametrize("name", ["{9..1}.tar", "{0..99999999}.tar", "{0..999}{0..999}.tar"])
def test_braces_that_stand_for_too_much_are_refused(name: str) -> None:
    """A range backwards, or one that would fill the memory with names."""
    with pytest.raises(DataError, match=r"range of|stands for"):
        expanded(name)


def test_shards_are_named_by_lists_and_patterns(folder: Path) -> None:
    """A list keeps its order; a pattern is sorted, also in a folder whose own name looks like one."""
    assert _open(folder, ["s-001.tar", "s-000.tar"]).ids[0] == "a/k3"
    odd = folder / "[x]"
    odd.mkdir()
    (folder / "s-000.tar").rename(odd / "s-000.tar")
    assert len(_open(odd, "*.tar")) == 3
    with pytest.raises(DataError, match="no shard matches"):
        _open(folder, "t-*.tar")


def _append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def _damage_header(path: Path) -> None:
    with tarfile.open(path) as archive:
        place = archive.getmembers()[7].offset
    data = bytearray(path.read_bytes())
    data[place : place + 100] = b"\xff" * 100
    path.write_bytes(bytes(data))


def _cut(path: Path, *, inside: bool) -> None:
    with tarfile.open(path) as archive:
        member = archive.getmembers()[7]
    os.truncate(path, member.offset_data + 10 if inside else member.offset)


DAMAGE = {
    "gone": (lambda path: path.unlink(), "does not exist"),
    "no tar": (lambda path: path.write_bytes(b"x" * 5000), "is no whole tar file"),
    "no bytes": (lambda path: path.write_bytes(b""), "is no whole tar file"),
    "broken header": (_damage_header, "is broken or cut off at byte"),
    "cut in a member": (partial(_cut, inside=True), "is no whole tar file"),
    "cut between members": (partial(_cut, inside=False), "is broken or cut off at byte"),
    "joined": (lambda path: _append(path, path.read_bytes()), "goes on after its end"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_a_broken_shard_is_one_clear_line(name: str, folder: Path) -> None:
    """No damage makes a set silently smaller."""
    damage, message = DAMAGE[name]
    damage(folder / "s-001.tar")
    with pytest.raises(DataError) as caught:
        _open(folder)
    assert message in str(caught.value)
    assert "s-001.tar" in str(caught.value)


def test_a_compressed_shard_is_refused(folder: Path) -> None:
    """Its members have no places that could be kept."""
    (folder / "s-001.tar").write_bytes(gzip.compress((folder / "s-001.tar").read_bytes()))
    with pytest.raises(DataError, match="without compression"):
        _open(folder)


BAD = {
    "key twice": ({"a.safe.png": png(1), "a.safe.jpg": png(1)}, "key 'a' has two of"),
    "broken description": ({"a.json": "{"}, "key 'a': .json is not JSON"),
    "deep description": ({"a.json": "[" * 200_000}, "key 'a': .json is not JSON"),
    "description of another kind": ({"a.json": "[]"}, "is not an object"),
    "concept of another kind": ({"a.json": '{"concept": 3}'}, "concept is '3'"),
    "half a character": ({"a.json": '{"concept": "\\ud800"}'}, "half a character"),
    "no quadruples": ({"a.jpg": png(1), "a.txt": "x"}, "has no quadruples"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_wrong_item_is_named(name: str, tmp_path: Path) -> None:
    """Shard and key stand in the error."""
    body, message = BAD[name]
    write_shard(tmp_path / "s.tar", body)
    with pytest.raises(DataError) as caught:
        _open(tmp_path, "s.tar")
    assert message in str(caught.value)


def test_a_link_in_a_shard_is_refused(tmp_path: Path) -> None:
    """A link could name anything; nothing of it is followed."""
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        link = tarfile.TarInfo("a.safe.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    with pytest.raises(DataError, match="is no plain file"):
        _open(tmp_path, "s.tar")


def test_a_key_in_two_shards_is_an_id_twice(folder: Path) -> None:
    """Keys are ids, over all shards."""
    (folder / "s-001.tar").write_bytes((folder / "s-000.tar").read_bytes())
    with pytest.raises(DataError, match="id 'a/k0' occurs more than once"):
        _open(folder)


def test_broken_members_break_their_item_only(tmp_path: Path) -> None:
    """A caption that is not UTF-8 and an image that is none are named when they are read."""
    wrong = {"b.safe.png": b"x", "b.unsafe.png": png(1), "b.safe.txt": b"\xff", "b.unsafe.txt": "x"}
    write_shard(tmp_path / "s.tar", members("a", 1) | wrong)
    source = _open(tmp_path, "s.tar")
    assert source.read(0).id == "a"
    with pytest.raises(DataError, match="item b: caption is not UTF-8"):
        source.read_texts(1)
    write_shard(tmp_path / "s.tar", members("a", 1) | wrong | {"b.safe.txt": "x"})
    with pytest.raises(DataError, match="item b, safe_image: image bytes is not a whole image"):
        _open(tmp_path, "s.tar").read(1)


def test_a_member_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    """Its size is known before its content: a sparse file of 200 MB in a shard costs nothing."""
    header = tarfile.TarInfo("a.safe.png")
    header.size = 200 << 20
    other = tarfile.TarInfo("a.unsafe.png")
    other.size = len(png(1))
    with (tmp_path / "s.tar").open("wb") as stream:
        stream.write(header.tobuf())
        stream.seek(header.size, io.SEEK_CUR)
        stream.write(other.tobuf() + png(1).ljust(512, b"\0") + bytes(1024))
    source = _open(tmp_path, "s.tar")
    with pytest.raises(DataError, match=r"item a: s\.tar: a member has 209715200 bytes"):
        source.read(0)


def test_many_shards_need_few_open_files(tmp_path: Path) -> None:
    """Any order of reading works with more shards than may be open."""
    n = _MOST_OPEN + 8
    for i in range(n):
        write_shard(tmp_path / f"s-{i:03d}.tar", members(f"k{i:03d}", i))
    source = _open(tmp_path, f"s-{{000..{n - 1:03d}}}.tar")
    before = len(os.listdir("/proc/self/fd"))
    for i in (*range(n), 0, n - 1, 5):
        assert source.read_texts(i) == (f"a calm {i}", f"a fire {i}")
    assert len(os.listdir("/proc/self/fd")) <= before + _MOST_OPEN
    del source
    assert len(os.listdir("/proc/self/fd")) <= before


def _texts(source: QuadrupleSource, index: int) -> tuple[str, str] | None:
    return source.read_texts(index)


def test_worker_processes_read_the_same(folder: Path) -> None:
    """Shards are read by place, so processes do not disturb each other."""
    source = _open(folder)
    rows = list(read_all(partial(_texts, source), 6, 2, "", lambda *_: None))
    assert rows == [(f"a calm {i}", f"a fire {i}") for i in range(6)]


def _header(kind: bytes, content: bytes, size: int | None = None) -> bytes:
    """A header that goes on behind its block, with what stands there."""
    made = tarfile.TarInfo("././@LongLink")
    made.type, made.size = kind, len(content) if size is None else size
    return made.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    ("before", "says"),
    [
        (_header(tarfile.XHDTYPE, b"12 path=aaa\n") * 3000, "nested too deep"),
        (_header(tarfile.GNUTYPE_LONGNAME, b"a" * 120 + b"\0") * 3000, "nested too deep"),
        (_header(tarfile.XHDTYPE, b"9" * 400 + b" size=1\n"), "no whole tar file"),
        (_header(tarfile.GNUTYPE_LONGNAME, b"a" * (1 << 21)), "a header claims 2097152 bytes"),
        (_header(tarfile.XHDTYPE, b"12 path=aaa\n", 1 << 40), "a header claims 1099511627776 bytes"),
    ],
    ids=["pax", "long names", "digits", "long header", "size"],
)
def test_headers_before_a_member_are_bounded(before: bytes, says: str, tmp_path: Path) -> None:
    """In number, in size, and in what they say of themselves."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("1.json"))
    (tmp_path / "s.tar").write_bytes(before + stream.getvalue())
    with pytest.raises(DataError, match=says):
        list(members_of(tmp_path / "s.tar"))
