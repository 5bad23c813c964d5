"""Memory does not grow with the content of a set: ten times the items cost an index, not the items."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from tests.data_sets import toml

ROOT = Path(__file__).parents[2]

INDEX_BYTES = 600
"""Most that an item may add: its id, its concept, its place, and room that containers keep while they grow. Content is
several times that in each of these sets."""

READ = """
import re, sys
from pathlib import Path
from uwm_deploy.data.open import open_source
from uwm_deploy.recipes.data_set import calibration_set_from_toml
path = Path(sys.argv[1])
source = open_source(calibration_set_from_toml(path.read_text(), where="set"), base=path.parent)
assert len(source) == int(sys.argv[2])
record = source.record  # reads every member of every item
for index in range(0, len(source), 97):
    item = source.read(index)
    assert source.read_texts(index) == (f"calm {item.id}", f"wild {item.id}")
    if source.has_images:
        assert item.safe_image.size == item.unsafe_image.size == (24, 24)
# Not getrusage: its peak is that of the parent, where the parent was larger when it started this process.
peak_kilobytes = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(peak_kilobytes * 1024, record.n)
"""


def _peak_bytes(path: Path, n: int) -> int:
    """Largest resident size of a process of its own that reads all of a set."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", READ, str(path), str(n)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    peak, count = map(int, done.stdout.split())
    assert count == n
    return peak


def _noise() -> bytes:
    """An image of nearly two kilobytes that does not compress."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(stream, "PNG")
    assert len(stream.getvalue()) > 1700
    return stream.getvalue()


def _assert_flat(small: int, large: int, items: int, content_bytes: int) -> None:
    """The growth is that of an index, and the test could tell if it were that of the content."""
    allowed = items * INDEX_BYTES
    assert content_bytes > 3 * allowed
    assert large - small < allowed, f"{(large - small) / items:.0f} bytes per item"


def _parquet_set(folder: Path, n: int, *, group: int) -> Path:
    """A manifest with its images inside."""
    image, rows = _noise(), 5000
    schema = pa.schema([(name, pa.string()) for name in ("id", "concept", "safe_text", "unsafe_text")])
    for name in ("safe_image", "unsafe_image"):
        schema = schema.append(pa.field(name, pa.binary()))
    names = [f"{i:06d}" for i in range(n)]
    table = pa.table(
        {
            "id": names,
            "concept": [f"concept {i % 20}" for i in range(n)],
            "safe_text": [f"calm {name}" for name in names],
            "unsafe_text": [f"wild {name}" for name in names],
            "safe_image": pa.chunked_array([pa.array([image] * rows)] * (n // rows)),
            "unsafe_image": pa.chunked_array([pa.array([image] * rows)] * (n // rows)),
        },
        schema=schema,
    )
    folder.mkdir()
    parquet.write_table(table, folder / "m.parquet", row_group_size=group, compression="none", use_dictionary=False)
    (folder / "set.toml").write_text(toml(source="manifest", manifest="m.parquet"))
    return folder / "set.toml"


def test_a_parquet_manifest_of_100_000_lines(tmp_path: Path) -> None:
    """360 MB of images, all in one row group, which is the hardest: reading them takes the memory of reading a tenth."""
    sizes = (10_000, 100_000)
    small, large = (_peak_bytes(_parquet_set(tmp_path / str(n), n, group=n), n) for n in sizes)
    _assert_flat(small, large, 90_000, 90_000 * 2 * len(_noise()))


@pytest.mark.slow
def test_a_text_only_manifest_of_100_000_lines(tmp_path: Path) -> None:
    """Captions stay in their file too."""
    peaks = []
    for n in (10_000, 100_000):
        with (tmp_path / "m.jsonl").open("w") as stream:
            for i in range(n):
                pad = " " * 1000
                stream.write(f'{{"id": "{i}", {pad} "safe_text": "calm {i}", {pad} "unsafe_text": "wild {i}"}}\n')
        (tmp_path / "set.toml").write_text(toml(source="manifest", manifest="m.jsonl"))
        peaks.append(_peak_bytes(tmp_path / "set.toml", n))
    _assert_flat(*peaks, 90_000, 90_000 * 2000)


def _shard(path: Path, first: int, n: int) -> None:
    image = _noise()
    with path.open("wb") as stream:
        for i in range(first, first + n):
            for ending, data in (
                ("safe.png", image),
                ("unsafe.png", image),
                ("safe.txt", f"calm {i:06d}".encode()),
                ("unsafe.txt", f"wild {i:06d}".encode()),
            ):
                header = tarfile.TarInfo(f"{i:06d}.{ending}")
                header.size = len(data)
                stream.write(header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))
        stream.write(bytes(1024))


@pytest.mark.slow
def test_a_stream_of_shards(tmp_path: Path) -> None:
    """Ten shards take the memory of one."""
    peaks = []
    for shards in (1, 10):
        for number in range(shards):
            _shard(tmp_path / f"s-{number}.tar", 1500 * number, 1500)
        (tmp_path / "set.toml").write_text(toml(source="webdataset", shards=f"s-{{0..{shards - 1}}}.tar"))
        peaks.append(_peak_bytes(tmp_path / "set.toml", 1500 * shards))
    _assert_flat(*peaks, 13_500, 13_500 * 2 * len(_noise()))
