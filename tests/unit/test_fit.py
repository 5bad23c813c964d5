"""The pass that a closed-form step is fitted from: any batches, order and number of processes, resumed, flat, checked."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, distributed, nn

from tests.forked_ranks import two_ranks
from uwm_deploy.data import torchrun
from uwm_deploy.data.demo.source import DemoSource
from uwm_deploy.data.order import in_order
from uwm_deploy.data.source import PairBatch, QuadrupleSource
from uwm_deploy.edits import sharded_sums as shards
from uwm_deploy.edits.closed_form import tensors_of
from uwm_deploy.edits.fit_files import FEATURES, SUMS, read_features, read_sums
from uwm_deploy.edits.pair_stream import PairStream
from uwm_deploy.edits.sharded_sums import Scale
from uwm_deploy.errors import DataError, IntegrityError
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.resolve import calibration_set_of, recipe_of
from uwm_deploy.records.data import CalibrationRecord, LeftOut
from uwm_deploy.records.edit import FitRecord, Method, Placement
from uwm_deploy.records.model import ImageSpec, ModelRef, TextSpec, TowerName
from uwm_deploy.records.strength import AxisSetting
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.stages.fit import KEPT, fit_to_folder
from uwm_deploy.towers.load import load_model
from uwm_deploy.towers.protocol import LoadedModel, ModuleTower

ROOT = Path(__file__).parents[2]
SETTING = AxisSetting(g=0.5, o=0.5, kappa=0.2, a=1.0, tau=0.5)
PAIRS, SHARD = 40, 16
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    """The shipped model; not to be changed."""
    return load_model(recipe_of("demo")[0], folder=resources.checkpoint_folder("shipped:demo", ""), device="cpu")


class StoppedHereError(Exception):
    """Something from outside."""


class Stopping(DemoSource):
    """At one image the run is stopped."""

    stop_at: int = -1

    def read(self, index: int):
        if index == self.stop_at:
            raise StoppedHereError
        return super().read(index)

    def read_texts(self, index: int):
        item = DemoSource.read(self, index)
        return item.safe_text, item.unsafe_text


def source_of(stop_at: int = -1) -> Stopping:
    source = Stopping(dataclasses.replace(calibration_set_of("demo")[0], limit=PAIRS))
    source.stop_at = stop_at
    return source


def fitted(
    model: LoadedModel,
    folder: Path,
    *,
    placement: Placement = Placement.WEIGHTS,
    batch: int = 16,
    source: QuadrupleSource | None = None,
    scale: Scale | None = None,
    read: list[str] | None = None,
) -> tuple[FitRecord, Tensors]:
    """The fit's record and the step that it gives; `read` takes the ids of the pairs that were read."""
    folder.mkdir(exist_ok=True)
    whole = source or source_of()

    class Watched(PairStream):
        def __iter__(self) -> Iterator[PairBatch]:
            for part in super().__iter__():
                yield part
                if read is not None:
                    read.extend(part.ids)

    def pairs(tower: TowerName) -> PairStream:
        return Watched(
            whole, tower, model.ref.image, Tokenizer(model.tokenizer_json, model.ref.text), batch_pairs=batch,
            workers=0, max_broken_share=0.0, progress=lambda *_: None,
        )  # fmt: skip

    concepts = dict(zip(whole.ids, whole.concepts, strict=True))
    method = Method.SAFETY_AXIS
    record = fit_to_folder(model, None, whole.record, pairs, concepts, {}, method, placement, folder, scale)
    assert record is not None
    return record, tensors_of(model, method, SETTING, read_sums(folder, record), placement)[0]


ROUNDING = 1e-5
"""A float32 forward pass rounds otherwise in another batch, which a score direction from few pairs enlarges tenfold."""


def assert_same(left: Tensors, right: Tensors, share: float = ROUNDING) -> None:
    """The same matrices, up to a share of their largest entry."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert float((tensor - right[name]).abs().max()) <= share * float(tensor.abs().max()), name


@pytest.fixture(scope="module")
def wanted(demo: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[Placement, Tensors]:
    """The step of one pass in batches of 16."""
    root = tmp_path_factory.mktemp("wanted")
    return {placement: fitted(demo, root / placement, placement=placement)[1] for placement in Placement}


# --- what must not matter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", list(Placement))
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_the_batch_size_does_not_matter(batch: int, placement: Placement, demo, wanted, tmp_path: Path) -> None:
    """Nor, with it, to which length a caption is padded. Features are those of a model, with their rounding."""
    record, found = fitted(demo, tmp_path / "fit", placement=placement, batch=batch)
    assert record.n_pairs == {"image": PAIRS, "text": PAIRS}
    assert_same(found, wanted[placement])


def test_the_order_and_the_shards_do_not_matter(demo, wanted, tmp_path: Path, monkeypatch) -> None:
    """Another order of the set, cut into shards that are kept in files between."""
    order = np.random.default_rng(0).permutation(PAIRS).tolist()
    monkeypatch.setattr(shards, "SHARD_PAIRS", SHARD)
    scale = Scale(kept=tmp_path / "sums", key="k")
    _, found = fitted(demo, tmp_path / "fit", source=in_order(source_of(), order), scale=scale)
    assert (tmp_path / "sums" / "image-0000.safetensors").is_file()
    assert_same(found, wanted[Placement.WEIGHTS])


def test_a_part_that_memory_does_not_hold_counts_once(demo, wanted, tmp_path: Path) -> None:
    """A batch is halved until it fits; what was done already is not added again."""
    lines: list[str] = []

    def short(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > 10:
            raise torch.OutOfMemoryError("out of memory")

    handles = [t.graph_module().register_forward_pre_hook(short) for t in (demo.image, demo.text)]
    try:
        record, found = fitted(demo, tmp_path / "fit", scale=Scale(notice=lines.append))
    finally:
        for handle in handles:
            handle.remove()
    assert record.n_pairs == {"image": PAIRS, "text": PAIRS}
    assert len(lines) == 4
    assert_same(found, wanted[Placement.WEIGHTS])


@pytest.mark.slow
def test_two_processes_fit_what_one_fits(tmp_path: Path, monkeypatch) -> None:
    """Every sum and every kept feature is the same number, after another step too."""
    text = f'format = 1\nname = "cal"\nsource = "demo"\nsplit = "calibration"\nlimit = {PAIRS}\n'
    (tmp_path / "cal.toml").write_text(text)
    monkeypatch.setattr(shards, "SHARD_PAIRS", SHARD)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as each of two processes has
    try:
        request = Request(
            calibration=str(tmp_path / "cal.toml"), method="uwm+safety-axis", axis=SETTING, work=tmp_path / "one",
            device="cpu", workers=0,
        )  # fmt: skip
        run(request, until="edit", reporter=Reporter(quiet=True))
    finally:
        torch.set_num_threads(threads)
    axis = ",".join(f"{name}={getattr(SETTING, name)}" for name in ("g", "o", "kappa", "a", "tau"))
    # On to `verify`: there the steps before the closed-form one are made again, in every process.
    command = ["verify", "--method", "uwm+safety-axis", "--axis", axis, "--device", "cpu", "--workers", "0"]
    command += ["--calibration", str(tmp_path / "cal.toml"), "--evaluation", str(tmp_path / "test.toml")]
    command += ["--target", "onnxruntime", "--work", str(tmp_path / "two")]
    (tmp_path / "test.toml").write_text('format = 1\nname = "test"\nsource = "demo"\nsplit = "test"\nlimit = 24\n')
    first, other = two_ranks(tmp_path, command)
    assert (first.code, other.code) == (0, 0), first.errors + other.errors
    for file in (SUMS, FEATURES):
        one, two = (load_file(tmp_path / name / "fit" / file) for name in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[key], two[key]) for key in one), file
    patches = [(tmp_path / name / "edit" / "patch.safetensors").read_bytes() for name in ("one", "two")]
    assert patches[0] == patches[1]
    assert (tmp_path / "two" / "verify" / "verify.json").is_file()
    assert {path.name for path in (tmp_path / "two").iterdir() if path.name.startswith(".")} <= {".lock"}


def test_sums_on_the_cpu_are_sent_over_any_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """One backend, nccl, takes tensors from a GPU only, gloo from the CPU only, and the sums of a fit are on the CPU."""
    total = torch.zeros(2, dtype=torch.float64)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for backend, device in (("nccl", "cuda:3"), ("gloo", "cpu")):
        monkeypatch.setattr(distributed, "get_backend", lambda backend=backend: backend)
        assert torchrun._wire(total) == torch.device(device)


# --- a killed pass --------------------------------------------------------------------------------------------------


def test_a_killed_pass_resumes_after_the_last_whole_shard(demo, tmp_path: Path, monkeypatch) -> None:
    """The resumed pass reads the rest only, and ends with the very sums and features of one that was not stopped."""
    monkeypatch.setattr(shards, "SHARD_PAIRS", 8)
    whole, _ = fitted(demo, tmp_path / "a")
    lines: list[str] = []
    scale = Scale(kept=tmp_path / "sums", key="k", notice=lines.append)
    with pytest.raises(StoppedHereError):
        fitted(demo, tmp_path / "b", source=source_of(stop_at=29), scale=scale)
    assert not (tmp_path / "b" / SUMS).exists()
    read: list[str] = []
    resumed, _ = fitted(demo, tmp_path / "b", scale=scale, read=read)
    assert lines[0] == "image: resumed after 3 of 5 shards"
    assert len(read) == PAIRS - 24 + PAIRS  # the other tower had not begun
    assert (resumed.sums_digest, resumed.features_digest) == (whole.sums_digest, whole.features_digest)
    fitted(demo, tmp_path / "c", scale=dataclasses.replace(scale, key="other"), read=(again := []))
    assert len(again) == 2 * PAIRS


def test_damaged_files_are_told(demo, tmp_path: Path) -> None:
    """Sums and features are read as their record describes them, or not at all."""
    record, _ = fitted(demo, tmp_path / "fit")
    for name, read in ((SUMS, read_sums), (FEATURES, read_features)):
        content = (tmp_path / "fit" / name).read_bytes()
        (tmp_path / "fit" / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(IntegrityError, match=name):
            read(tmp_path / "fit", record)
        (tmp_path / "fit" / name).write_bytes(content)
        read(tmp_path / "fit", record)


# --- what is left out, and how much memory it takes -----------------------------------------------------------------

WIDE = 256


class _Linear(nn.Module):
    """An embedding that costs next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDE, WIDE, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, WIDE) to the same."""
        embeds: Tensor = self.linear(rows)
        return embeds


def stub() -> LoadedModel:
    """Two towers that are a multiplication."""
    torch.manual_seed(0)
    graphs = nn.ModuleDict({tower.value: _Linear() for tower in TowerName})
    image = ImageSpec(resize=2, crop=2, resample="bicubic", rescale=1.0, mean=(0, 0, 0), std=(1, 1, 1))
    text = TextSpec(context_length=WIDE, eos_id=0, pad_id=0, tokenizer_digest="")
    ref = ModelRef(
        name="stub", family="hf-clip", repo="random", revision="", weights_digest="", embed_dim=WIDE, image=image,
        text=text,
    )  # fmt: skip
    towers = [ModuleTower(graphs[tower.value], tower, WIDE) for tower in (TowerName.IMAGE, TowerName.TEXT)]
    return LoadedModel(ref, graphs, *towers, b"", lambda _: None)


@dataclass
class Drawn:
    """Pairs that are drawn as they are read; those of some numbers hold NaN."""

    n: int
    broken: frozenset[int] = frozenset()
    batch: int = 500
    items: Sequence[int] = ()
    left_out: list[LeftOut] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.items = self.items if len(self.items) else range(self.n)

    @property
    def ids(self) -> Sequence[str]:
        return [f"{i:06d}" for i in self.items]

    def part(self, items: range) -> Drawn:
        return dataclasses.replace(self, items=self.items[items.start : items.stop], left_out=[])

    def check(self, broken: Sequence[LeftOut]) -> None:
        assert not broken

    def __iter__(self) -> Iterator[PairBatch]:
        for start in range(0, len(self.items), self.batch):
            items = self.items[start : start + self.batch]
            sides = np.stack([np.random.default_rng(item).standard_normal((2, WIDE)) for item in items], axis=1)
            safe, unsafe = sides.astype(np.float32)
            unsafe[:, 0] += 2
            for place, item in enumerate(items):
                if item in self.broken:
                    (safe if item % 2 else unsafe)[place, item % WIDE] = np.nan
            yield PairBatch(ids=tuple(f"{i:06d}" for i in items), safe=safe, unsafe=unsafe)


RECORD = CalibrationRecord(name="drawn", split="", n=0, ids_digest="", content_digest="", concepts={})


def fit_drawn(
    folder: Path, n: int, broken: Callable[[TowerName], Sequence[int]] = lambda _: (), **how: Any
) -> FitRecord:
    streams = {tower: Drawn(n, frozenset(broken(tower)), **how) for tower in TowerName}
    concepts = dict.fromkeys(Drawn(n).ids, "all")
    record = fit_to_folder(
        stub(), None, RECORD, streams.__getitem__, concepts, {}, Method.SAFETY_AXIS, Placement.EMBEDDING, folder
    )
    assert record is not None
    return record


def test_neither_batches_nor_order_matter_where_features_are_the_same(tmp_path: Path) -> None:
    """Sums are all that a step is made of."""

    def step(name: str, **how: Any) -> Tensors:
        (tmp_path / name).mkdir()
        record = fit_drawn(tmp_path / name, 600, **how)
        sums = read_sums(tmp_path / name, record)
        return tensors_of(stub(), Method.SAFETY_AXIS, SETTING, sums, Placement.EMBEDDING)[0]

    first = step("first", batch=16)
    for batch in (1, 7, 64):
        assert_same(first, step(f"batch-{batch}", batch=batch), 1e-6)
    order = np.random.default_rng(0).permutation(600).tolist()
    assert_same(first, step("order", batch=16, items=order), 1e-6)


def test_pairs_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    """By name, in the tower where it was so; a quadruple with one of them is not kept, the other tower's sums hold it."""
    record = fit_drawn(tmp_path, 300, lambda tower: (7, 12) if tower is TowerName.IMAGE else (12, 40, 299))
    assert record.n_pairs == {"image": 298, "text": 297}
    named = {tower: {item.id: item.reason for item in items} for tower, items in record.left_out.items()}
    assert named["image"] == dict.fromkeys(("000007", "000012"), "not finite")
    assert named["text"] == dict.fromkeys(("000012", "000040", "000299"), "not finite")
    assert record.kept == 300 - 4
    sums = read_sums(tmp_path, record)
    assert {tower.value: part.count for tower, part in sums.items()} == record.n_pairs
    features = read_features(tmp_path, record)
    assert len(features["image.safe"]) == len(features["text.unsafe"]) == 296
    assert all(np.isfinite(array).all() for name, array in features.items() if name != "names")


@pytest.mark.parametrize(("n", "bad"), [(300, 4), (2000, 21)])
def test_more_than_one_percent_is_an_error(n: int, bad: int, tmp_path: Path) -> None:
    """Over all shards together, and nothing is written."""
    spread = range(0, n, n // bad)[:bad]
    with pytest.raises(DataError, match=f"{bad} of {n} text pairs have no finite"):
        fit_drawn(tmp_path, n, lambda tower: spread if tower is TowerName.TEXT else ())
    assert not list(tmp_path.iterdir())


MEASURE = """
import re, sys
from pathlib import Path
from tests.unit.test_fit import fit_drawn
record = fit_drawn(Path(sys.argv[1]), int(sys.argv[2]))
assert record.n_pairs == {"image": int(sys.argv[2]), "text": int(sys.argv[2])}
# Not getrusage: its peak is that of the parent, where the parent was larger when it started this process.
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024, record.kept)
"""


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_pairs(tmp_path: Path) -> None:
    """Six times the pairs cost an index; their features would be more than six times that."""
    peaks, sizes = [], (5_000, 30_000)
    for n in sizes:
        (tmp_path / str(n)).mkdir()
        command = [sys.executable, "-c", MEASURE, str(tmp_path / str(n)), str(n)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        peak, kept = map(int, re.findall(r"\d+", done.stdout.splitlines()[-1]))
        assert kept == KEPT
        peaks.append(peak)
    allowed, content = 600 * (sizes[1] - sizes[0]), 2 * 2 * 4 * WIDE * (sizes[1] - sizes[0])
    assert content > 6 * allowed
    assert peaks[1] - peaks[0] < allowed, f"{(peaks[1] - peaks[0]) / (sizes[1] - sizes[0]):.0f} bytes per pair"
