"""Broken files of every kind: an error of one line and the right exit code, no abort, no hang, no memory beyond bounds."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.faults.fuzz import said_of
from tests.faults.fuzz_reader import Reader, new_folder
from tests.faults.fuzz_readers import NAMES, READERS
from tests.faults.mutations import mutated

ROOT = Path(__file__).parents[2]
CASES = int(os.environ.get("FUZZ_CASES", "600"))
"""Of each reader; `-m slow -s` prints the table."""

MOST_KB = 1_000_000
SECONDS = 900
FIXED = 10
"""Mutations of each reader tests read."""


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reader]:
    """A reader by its name, made once."""
    folder, made = tmp_path_factory.mktemp("readers"), dict[str, Reader]()

    def by_name(name: str) -> Reader:
        if name not in made:
            made[name] = READERS[name](new_folder(folder / str(len(made))))
        return made[name]

    return by_name


@pytest.mark.parametrize("name", list(READERS))
def test_a_small_fixed_corpus_is_refused_in_one_line(name: str, known: Callable[[str], Reader]) -> None:
    """The same broken files in every run; whole ones are read."""
    reader = known(name)
    for seed in reader.seeds:
        assert said_of(reader.read, seed) is None
        reader.read(seed)
    for number in range(FIXED):
        data = mutated(reader.seeds[number % len(reader.seeds)], reader.form, number)
        assert said_of(reader.read, data) is None, number


def _tar(size: bytes, *, checked: bool = True, kind: bytes = b"0") -> bytes:
    """A shard whose first header claims a size."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("k.safe.png"), io.BytesIO())
    data = bytearray(stream.getvalue())
    data[124:136] = size
    data[156:157] = kind
    data[148:156] = b" " * 8
    if checked:
        data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


def _pax(size: bytes) -> bytes:
    """A shard whose member has its size in a header of its own."""
    record = b" size=" + size + b"\n"
    record = str(len(record) + 2).encode() + record
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        header = tarfile.TarInfo("x")
        header.type, header.size = tarfile.XHDTYPE, len(record)
        archive.addfile(header, io.BytesIO(record))
        archive.addfile(tarfile.TarInfo("k.safe.png"), io.BytesIO())
    return stream.getvalue()


def _parquet_of(column: bytes, value: bytes) -> bytes:
    """A table with bytes that are no UTF-8 in the place of a name or a value of the same length."""
    stream = io.BytesIO()
    rows = {"id": ["abcd"], "concept": ["fire"], "safe_text": ["calm"], "unsafe_text": ["wild"]}
    table = pa.table(rows | {"safe_image": ["0.png"], "unsafe_image": ["1.png"]})
    parquet.write_table(table, stream, compression="none", use_dictionary=False)
    return stream.getvalue().replace(column, value)


def _npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)


def _tensors(kind: str) -> bytes:
    header = json.dumps({"inputs": {"dtype": kind, "shape": [1], "data_offsets": [0, 1]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(1)


_DEEP = b"[" * 100_000 + b"]" * 100_000
FOUND: Mapping[str, tuple[str, bytes]] = {
    "a tar header of 8 GiB": ("webdataset", _tar(b"77777777777\0")),
    "a tar header of 2^64 bytes": ("webdataset", _tar(b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff")),
    "a tar header of a negative size": ("webdataset", _tar(b"\xff" * 12)),
    "a tar header of no number": ("embed: tar", _tar(b"zzzzzzzzzzz\0")),
    "a tar header of 2^64 bytes for embed": ("embed: tar", _tar(b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff")),
    "a long name of 8 GiB": ("webdataset", _tar(b"77777777777\0", kind=b"L")),
    "a long name of a negative size": ("webdataset", _tar(b"\xff" * 12, kind=b"x")),
    "ten billion shards": ("shard names", b"{0..99999}{0..99999}"),
    "shards whose names are long": ("shard names", b"{" + b"0" * 3000 + b"1..99999}"),
    "shards without number": ("shard names", b"{a,b}" * 800),
    "a range of thousands of digits": ("shard names", b"{0.." + b"9" * 5000 + b"}"),
    "a tar header with a wrong sum": ("webdataset", _tar(b"77777777777\0", checked=False)),
    "a tar header that leads back": ("webdataset", _pax(b"-1024")),
    "a tar header of 2^80 bytes": ("embed: tar", _pax(b"9" * 24)),
    "a Parquet column named in no UTF-8": ("parquet", _parquet_of(b"safe_text", b"safe_\xff\xfe\xff\xfe")),
    "a Parquet value in no UTF-8": ("parquet", _parquet_of(b"calm", b"\xff\xfe\xff\xfe")),
    "a Parquet key in no UTF-8": ("embed: parquet", _parquet_of(b"abcd", b"\xff\xfe\xff\xfe")),
    "a Parquet text in no UTF-8 for embed": ("embed: parquet", _parquet_of(b"calm", b"\xff\xfe\xff\xfe")),
    "texts of a head nested deep": ("head texts", _DEEP),
    "a stamp nested deep": ("stamp", _DEEP),
    "a deep file for inspect": ("inspect json", b'{"a":' * 900 + b"1" + b"}" * 900),
    "a list that is deep for inspect": ("inspect json", b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"),
    "what stands beside rows, nested deep": ("beside rows", _DEEP),
    "half a character in a manifest": ("manifest", b'{"name": "\\ud800"}'),
    "a graph that protobuf refuses": ("onnx", b"\x3a\x02\x5a\x80"),
    "rows whose header does not end": ("stored rows", _npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,\n")),
    "canaries of a type without a numpy type": ("canaries", _tensors("F8_E4M3")),
    "embeddings of a type without a numpy type": ("embeddings", _tensors("F8_E5M2")),
    "raw canaries of a type without a numpy type": ("raw canaries", _tensors("F8_E4M3")),
    "a signature with a byte behind it": ("model.sig", b"{}\n"),
    "a key with nothing in it": ("keys", b"-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n"),
}
"""What mutation, or a look at the code, has found: it stays refused."""


@pytest.mark.parametrize("title", list(FOUND))
def test_what_was_found_stays_refused(title: str, known: Callable[[str], Reader]) -> None:
    """Each is refused as input, in one line."""
    name, data = FOUND[title]
    assert said_of(known(name).read, data) is None


def test_every_kind_of_fault_is_seen_by_the_program_that_looks_for_it() -> None:
    """An internal error, a failure of the machine and several lines are findings; an error of the input is none."""
    from uwm_deploy.errors import DataError, PrerequisiteError

    def raising(error: BaseException) -> Callable[[bytes], object]:
        def read(_: bytes) -> object:
            raise error

        return read

    assert said_of(raising(DataError("x is broken", fix="mend it")), b"") is None
    for error in (KeyError("x"), RecursionError(), SystemError("x"), PrerequisiteError("no memory"), OSError(5, "x")):
        assert said_of(raising(error), b"") is not None, error
    assert np.unique([mutated(b"[1, 2]", "json", seed) for seed in range(50)]).size > 25


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_reader_withstands_broken_files(tmp_path: Path) -> None:
    """Coverage-guided where atheris is installed; each reader in a process of its own, whose memory is measured."""
    rows, wrong = [], []
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    limit = lambda: resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))  # noqa: E731
    for number, name in enumerate(NAMES):
        (folder := tmp_path / str(number)).mkdir()
        with (folder / "said").open("w") as said, (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.fuzz", str(folder), str(CASES), name],
                stdout=said, stderr=log, env=environment, preexec_fn=limit,
            )  # fmt: skip
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        found = (folder / "said").read_text().splitlines()
        rows.append((name, CASES, len(found), process.returncode, usage.ru_maxrss // 1000))
        print("| " + " | ".join(map(str, rows[-1])) + " |", flush=True)
        if found or process.returncode or usage.ru_maxrss > MOST_KB:
            wrong.append((rows[-1], found, (folder / "log").read_text()[-1000:]))
    print(f"{sum(row[1] for row in rows)} cases, {len(rows)} readers, largest {max(row[4] for row in rows)} MB")
    assert wrong == []
