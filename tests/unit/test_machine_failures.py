"""Failures of the machine are no facts about items: a full table of files, a broken disk, no memory, nothing mounted."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from PIL import Image
from pyarrow import parquet

from tests.data_sets import members, open_manifest, open_set, pair, png, put, toml, write_shard
from tests.unit.test_report import make, write_bundle
from tests.unit.test_signature import write_keys
from uwm_deploy.bundle.sign import sign_bundle
from uwm_deploy.cli import cli
from uwm_deploy.commands.failure import failure_of
from uwm_deploy.data.check import check, opened
from uwm_deploy.data.embedding import content_digest, content_digests
from uwm_deploy.data.finding import matching, walked
from uwm_deploy.data.null_counts import never_null
from uwm_deploy.data.reading import read_all
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.data.zero_shot_readers import folder_set
from uwm_deploy.edits.pair_stream import PairStream
from uwm_deploy.errors import DataError, MissingFileError, UnreadableError, unreadable
from uwm_deploy.recipes.data_set import calibration_set_from_toml
from uwm_deploy.records.data import DataReport
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.model import ImageSpec, TextSpec, TowerName
from uwm_deploy.records.verdict import Result
from uwm_deploy.runtime.image import crop_from_image, image_from
from uwm_deploy.runtime.tokenizer import Tokenizer

EIO = Path("/proc/self/mem")
"""A plain file by its type, of which the first page cannot be read: the system says EIO."""

SILENT = {"workers": 0, "progress": lambda *_: None}
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    """No file can be opened: the table of this process is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _pictures(folder: Path, n: int = 3) -> QuadrupleSource:
    rows = [pair(i, safe_image=f"p/{i}.png", unsafe_image=f"p/{i + n}.png") for i in range(n)]
    for i in range(2 * n):
        put(folder / "p" / f"{i}.png", png(i))
    return open_manifest(folder, rows)


def _spec() -> ImageSpec:
    return ImageSpec(resize=8, crop=8, resample="bicubic", rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)


def _checked(folder: Path) -> DataReport:
    spec = calibration_set_from_toml(toml(source="manifest", manifest="pairs.jsonl"), where="mine.toml")
    return check(opened(spec, base=folder), **SILENT)


@pytest.mark.parametrize(
    "use",
    [
        lambda source, _: source.read(0),
        lambda source, _: source.record,
        lambda source, _: content_digests(source, **SILENT),
        lambda source, _: list(read_all(source.read, len(source), **SILENT, label="")),
    ],
    ids=["read", "digest", "overlap", "all"],
)
def test_a_full_table_of_files_is_no_fact_about_an_item(use: Callable[..., Any], tmp_path: Path) -> None:
    """Exit code 6 with what the system said, wherever a set is read; the same set is whole when it is over."""
    source = _pictures(tmp_path)
    with no_more_files(), pytest.raises(UnreadableError, match=r"\.png cannot be read: Too many open files"):
        use(source, tmp_path)
    use(source, tmp_path)


def test_a_check_stops_where_the_disk_fails(tmp_path: Path) -> None:
    """An image that gives EIO is no broken item, while one that is missing or cut is."""
    _pictures(tmp_path)
    (tmp_path / "p" / "1.png").write_bytes(png(1)[:45])
    (tmp_path / "p" / "2.png").unlink()
    assert [item.id for item in _checked(tmp_path).broken] == ["i1", "i2"]
    (tmp_path / "p" / "0.png").unlink()
    (tmp_path / "p" / "0.png").symlink_to(EIO)
    with pytest.raises(UnreadableError, match="Input/output error"):
        _checked(tmp_path)


def test_what_is_recorded_of_an_item_names_no_place(tmp_path: Path) -> None:
    """Reasons go into score.json and verify.json: of a path, only what it takes to find the file."""
    source = _pictures(tmp_path)
    put(tmp_path / "p" / "0.png", "x")
    (tmp_path / "p" / "1.png").unlink()
    (tmp_path / "p" / "2.png").unlink()
    (tmp_path / "p" / "2.png").mkdir()
    reasons = []
    for index in range(3):
        with pytest.raises(DataError) as caught:
            source.read(index)
        reasons.append(caught.value.what)
    assert [str(tmp_path) in reason for reason in reasons] == [False] * 3
    assert [f"safe_image: p/{i}.png " in reason for i, reason in enumerate(reasons)] == [True] * 3
    put(tmp_path / "set" / "dog" / "1.png", "x")
    with pytest.raises(DataError) as caught:
        folder_set("set", "a {}", tmp_path / "set").read(0)
    assert str(tmp_path) not in caught.value.what


def test_scoring_stops_where_the_disk_fails(tmp_path: Path) -> None:
    """The items are not left out; the worker's error comes as it is, without its traceback."""
    source = _pictures(tmp_path)
    tokenizer = Tokenizer(*_words())
    for workers in (0, 1):
        stream = PairStream(
            source, TowerName.IMAGE, _spec(), tokenizer, batch_pairs=2, workers=workers, max_broken_share=1,
            progress=lambda *_: None,
        )  # fmt: skip
        (tmp_path / "p" / "0.png").unlink()
        (tmp_path / "p" / "0.png").symlink_to(EIO)
        with pytest.raises(UnreadableError) as caught:
            list(stream)
        assert caught.value.what == f"{tmp_path}/p/0.png cannot be read: Input/output error"
        (tmp_path / "p" / "0.png").unlink()
        put(tmp_path / "p" / "0.png", png(0))
        assert [item for batch in stream for item in batch.ids] == ["i0", "i1", "i2"]


def _words() -> tuple[bytes, TextSpec]:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel

    content = Backend(WordLevel({"a": 0, "b": 1}, unk_token="a")).to_str().encode()
    return content, TextSpec(context_length=4, eos_id=1, pad_id=0, tokenizer_digest=digest_of_bytes(content))


@pytest.mark.parametrize("source", ["pairs.jsonl", "pairs.json", "pairs.csv", "pairs.parquet", "pairs.tar"])
def test_a_table_that_cannot_be_read_is_no_broken_table(source: str, tmp_path: Path) -> None:
    """Whatever it is stored as: exit code 6 for the machine, and 2 for a file that is not there."""
    keys: dict[str, Any] = {"source": "table", "table": source, "columns": {"safe_text": "s", "unsafe_text": "u"}}
    if source.endswith(".tar"):
        keys = {"source": "webdataset", "shards": source}
    with pytest.raises(DataError):
        open_set(tmp_path, **keys)
    put(tmp_path / source, "x")
    with no_more_files(), pytest.raises(UnreadableError, match="Too many open files"):
        open_set(tmp_path, **keys)


def test_rows_and_members_are_read_again_later(tmp_path: Path) -> None:
    """A shard and a table of bytes whose next read fails: the item is not broken."""
    write_shard(tmp_path / "a.tar", members("a", 1))
    shards = open_set(tmp_path, source="webdataset", shards="a.tar")
    rows = [pair(i, safe_image=png(i), unsafe_image=png(i + 9)) for i in range(2)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    table = open_set(tmp_path, source="manifest", manifest="pairs.parquet")
    for source in (shards, table):
        source._members.__dict__.get("_descriptors", {}).clear()
        with no_more_files(), pytest.raises(UnreadableError, match="Too many open files"):
            source.read(0)
        assert source.read(0).safe_image is not None


def test_a_zero_shot_set_is_not_missing_because_of_the_disk(tmp_path: Path) -> None:
    """A file that cannot be read now, and a folder: neither makes a set that is not measured."""
    put(tmp_path / "set" / "dog" / "1.png", png(1))
    part = folder_set("set", "a {}", tmp_path / "set")
    with no_more_files():
        with pytest.raises(UnreadableError):
            part.read(0)
        with pytest.raises(UnreadableError, match=r"folder .* cannot be read"):
            folder_set("set", "a {}", tmp_path / "set")


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library leaves it out, of wildcards and of a walk, and a set would be smaller without a word."""
    for name in ("a/1.tar", "b/2.tar", "b/.hidden.tar", "c.tar"):
        put(tmp_path / name, "")
    assert matching("*/*.tar", tmp_path) == [tmp_path / "a/1.tar", tmp_path / "b/2.tar"]
    assert matching(str(tmp_path / "?" / "2.tar"), Path("elsewhere")) == [tmp_path / "b/2.tar"]
    assert matching("*/9.tar", tmp_path) == []
    list_of, scan_of = os.listdir, os.scandir

    def failing(real: Callable[..., Any], path: Any) -> Any:
        if Path(path).name == "b":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", partial(failing, list_of))
    monkeypatch.setattr(os, "scandir", partial(failing, scan_of))
    for look in (lambda: matching("*/*.tar", tmp_path), lambda: list(walked(tmp_path))):
        with pytest.raises(UnreadableError, match="Stale file handle"):
            look()


def test_what_is_no_plain_file_is_neither_waited_for_nor_read_for_ever(tmp_path: Path) -> None:
    """A pipe, a device, a folder and a socket's place are broken images; no descriptor stays open."""
    os.mkfifo(tmp_path / "pipe.png")
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        with pytest.raises(DataError, match="is not a whole image"):
            image_from(path)
    with pytest.raises(MissingFileError, match="does not exist"):
        image_from(tmp_path / "none.png")
    assert len(os.listdir("/proc/self/fd")) == before
    rows = [pair(0, safe_image="pipe.png", unsafe_image="pipe.png")]
    assert open_manifest(tmp_path, rows).record.n == 1  # its digest does not wait either


def test_a_worker_that_is_ended_is_the_machines_fault(tmp_path: Path) -> None:
    """As by the system when memory runs out: one line and exit code 6, not a lost pool."""

    def read(index: int) -> int:
        if index == 20:
            os.kill(os.getpid(), 9)
        return index

    with pytest.raises(UnreadableError, match="a process that reads items was ended"):
        list(read_all(read, 40, 1, "items", lambda *_: None))


_OF_THE_MACHINE = (
    errno.EACCES, errno.EPERM, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENOMEM, errno.EIO, errno.EMFILE, errno.ENFILE,
    errno.ESTALE, errno.EHOSTDOWN, errno.EAGAIN, errno.EBUSY, errno.ENODEV,
)  # fmt: skip


@pytest.mark.parametrize("number", _OF_THE_MACHINE, ids=errno.errorcode.get)
def test_what_another_try_or_user_may_read_is_no_fact_about_an_item(number: int) -> None:
    """A right that is missing, a share that is gone, a limit: exit code 6 with the system's words, never a broken item."""
    said = unreadable("1.png", OSError(number, os.strerror(number)), fix="mend it")
    assert isinstance(said, UnreadableError)
    assert (said.exit_code, os.strerror(number) in str(said)) == (6, True)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, None])
def test_what_is_wrong_about_a_path_is_a_fact_about_the_item(number: int | None) -> None:
    """It is so tomorrow, too; and libraries that parse files raise the error without a number."""
    said = unreadable("1.png", OSError(number, "x") if number else OSError("cannot identify it"), fix="mend it")
    assert isinstance(said, DataError)
    assert isinstance(said, MissingFileError) is (number in (errno.ENOENT, errno.ENOTDIR))


def test_what_nobody_caught_has_the_code_of_the_machine() -> None:
    """EIO and no memory end with 6 wherever they happen; a programming error stays one."""
    codes = [failure_of(error).exit_code for error in (OSError(errno.EIO, "x"), OSError(errno.ENOENT, "x"), KeyError())]
    assert codes == [6, 1, 1]


_MEASURED = """
import resource, sys
from PIL import Image
from uwm_deploy.records.model import ImageSpec
from uwm_deploy.runtime.image import crop_from_image, image_from
spec = ImageSpec(resize=8, crop=8, resample="bicubic", rescale=1, mean=(0,) * 3, std=(1,) * 3, fit="squash")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
crop_from_image(image_from(sys.argv[1]), spec)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_transparency_costs_one_copy(tmp_path: Path) -> None:
    """Of 10 megapixels, 40 MB decoded and 40 MB flat; a whole copy with an alpha channel was there three times."""
    Image.new("RGBA", (4000, 2500)).save(tmp_path / "a.png")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(tmp_path / "a.png")], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(done.stdout) < 110


def test_bands_change_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid over white and digested some rows at a time, an image of any mode is what it is as a whole."""
    from uwm_deploy.data.source import Quadruple
    from uwm_deploy.runtime import image as module

    random = np.random.default_rng(0)
    for mode in ("RGBA", "LA"):
        levels = random.integers(0, 256, (61, 37, len(mode)), dtype=np.uint8)
        made = Image.fromarray(levels, mode)
        layered = made.convert("RGBA")
        wanted = Image.alpha_composite(Image.new("RGBA", made.size, "white"), layered).convert("RGB")
        item = Quadruple(id="", concept="", safe_image=made, unsafe_image=made, safe_text="a", unsafe_text=None)
        whole = content_digest(item)
        monkeypatch.setattr(module, "_BAND_PIXELS", 100)
        monkeypatch.setattr("uwm_deploy.data.embedding._BAND_PIXELS", 100)
        assert module._over_white(made).tobytes() == wanted.tobytes()
        pixels = made.convert("RGB").tobytes()
        assert content_digest(item) == whole == digest_of_bytes(b"\0".join([pixels, pixels, b"a", b""]))
        monkeypatch.undo()


@pytest.mark.parametrize(
    "made",
    ["strip", "webp", "tile", "progressive"],
)
def test_small_files_of_large_images_are_refused_before_they_are_decoded(made: str, tmp_path: Path) -> None:
    """By side, by what a decoder keeps beside the image, and by a tile that is larger than the image."""
    path = tmp_path / f"a.{made}"
    if made == "strip":
        Image.new("1", (1, 70_000)).save(path, "PNG")
    elif made == "webp":
        Image.new("L", (5001, 5000)).save(path, "WEBP", quality=1, method=0)
    elif made == "tile":
        put(path, _tiff(20_000))
    else:
        Image.new("CMYK", (16, 16)).save(path, "JPEG", progressive=True)
        data = bytearray(path.read_bytes())
        at = data.index(b"\xff\xc2") + 5  # height and width of the frame
        data[at : at + 4] = (7000).to_bytes(2, "big") + (7000).to_bytes(2, "big")
        path.write_bytes(data)
    with pytest.raises(DataError, match=r"is longer than 65535|takes [0-9]+ bytes"):
        image_from(path)


def _tiff(tile: int) -> bytes:
    """An image of 16 x 16 in one tile of another size, compressed; its content does not matter."""
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 200, 325: 9}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(100)


def test_a_long_array_is_refused_too() -> None:
    """What a caller decoded is not bounded in pixels; a strip would still fill the memory when it is resized."""
    with pytest.raises(DataError, match="too long"):
        image_from(np.zeros((70_000, 1), dtype=np.uint8))
    with pytest.raises(DataError, match="too long"):
        image_from(Image.new("1", (70_000, 1)))


def test_a_parquet_file_that_ends_the_library_does_not_end_the_command(tmp_path: Path) -> None:
    """Statistics that contradict each other: the rows are read without them."""
    file = ROOT / "tests" / "cases" / "abort.parquet"
    done = subprocess.run(
        [sys.executable, "-m", "uwm_deploy.cli", "data", "check", str(file), "--workers", "0"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode in (0, 2), done.stderr[-500:]
    assert "terminate called" not in done.stderr
    assert never_null(parquet.ParquetFile(file).metadata, ["safe_image"]) == set()
    parquet.write_table(pa.table({"a": [b"x", b"y"], "b": [b"x", None]}), tmp_path / "whole.parquet")
    assert never_null(parquet.ParquetFile(tmp_path / "whole.parquet").metadata, ["a", "b"]) == {"a"}
    assert CliRunner().invoke(cli, ["data", "check", str(file), "--workers", "0"]).exit_code == done.returncode


WITHOUT_RIGHTS = """
import ctypes, os, sys
for capability in (1, 2):  # to read whatever one likes, which root may
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-m", "uwm_deploy.cli", *sys.argv[1:]])
"""


def test_what_may_not_be_read_is_no_fact_about_a_bundle(tmp_path: Path) -> None:
    """A folder or a file without the right to read it: "cannot be read" and exit code 6, never "not a bundle"."""
    made = make()
    passing = dataclasses.replace(made.verdict(), result=Result.PASS)
    bundle = write_bundle(made, tmp_path / "shelf" / "bundle", verdict=passing)
    key, _ = write_keys(tmp_path, "key")
    sign_bundle(bundle, key)
    verify, inspect = ["verify-signature", "--public-key", "key.pub"], ["inspect"]
    for command, place in (
        (verify, bundle), (verify, bundle / "manifest.json"), (inspect, bundle / "reports"), (inspect, bundle.parent)
    ):  # fmt: skip
        place.chmod(0)
        try:
            done = subprocess.run(
                [sys.executable, "-c", WITHOUT_RIGHTS, *command, str(bundle)],
                capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        finally:
            place.chmod(0o755)
        assert (done.returncode, done.stderr.count("\n")) == (6, 1), done.stderr
        assert "cannot be read" in done.stderr
        assert "Permission denied" in done.stderr


@contextlib.contextmanager
def _at_most(further_bytes: int) -> Iterator[None]:
    """This process gets so much more memory."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + further_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_strip_is_never_resized_as_a_whole() -> None:
    """One pixel high and 65,535 wide: at its full size it would take 10 GB."""
    strip = Image.new("RGB", (65_535, 1), "red")
    with _at_most(600_000_000):
        crop = crop_from_image(strip, _spec())
    assert (crop == [255, 0, 0]).all()


def test_a_crop_that_found_no_memory_is_no_fact_about_the_image() -> None:
    """The machine is at fault, whatever the image is."""
    image = Image.new("RGB", (20_000, 3000), "red")
    with _at_most(1_000_000), pytest.raises(UnreadableError, match="20000 x 3000 pixels cannot be resized: not enough"):
        crop_from_image(image, dataclasses.replace(_spec(), resize=6000, crop=6000))
