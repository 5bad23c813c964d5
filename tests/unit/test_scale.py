"""Scoring and evaluation at scale: several processes, shards, what fits into memory, bfloat16 passes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.forked_ranks import Ended, two_ranks
from tests.uwm_edit import UWM, UWM_OPTIONS, entries
from uwm_deploy.cli import cli
from uwm_deploy.data.demo.source import DemoSource
from uwm_deploy.data.ranks import Ranks
from uwm_deploy.data.torchrun import ProcessGroup, join
from uwm_deploy.edits import sharded_sums as shards
from uwm_deploy.edits.methods import needs_gradients, with_method
from uwm_deploy.edits.pair_stream import PairStream
from uwm_deploy.edits.pairs import scoring_order
from uwm_deploy.edits.patch import Patch
from uwm_deploy.edits.selection import selected_indices
from uwm_deploy.edits.sharded_sums import Scale, Shard, shards_of
from uwm_deploy.errors import ContractError, DataError, InputError, PrerequisiteError
from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.edit_spec import EditSpecs
from uwm_deploy.recipes.resolve import calibration_set_of, recipe_of
from uwm_deploy.records.edit import Method, ScoreRecord
from uwm_deploy.records.model import TowerName
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.stages.score.score import score_to_folder
from uwm_deploy.towers.batch_size import MOST_PAIRS, USUAL_PAIRS, _power_of_two, pairs_that_fit
from uwm_deploy.towers.load import load_model, resolve_device, weights_bytes
from uwm_deploy.towers.protocol import LoadedModel

ROOT = Path(__file__).parents[2]
PAIRS, SHARD = 90, 32

CHILD = f"""
import sys
from uwm_deploy.edits import sharded_sums as shards
shards.SHARD_PAIRS = {SHARD}
from uwm_deploy.cli import main
main(sys.argv[1:])
"""
"""The command line with small shards, so that a small set has several."""


# --- one process and two --------------------------------------------------------------------------------------------


def sets_in(folder: Path) -> list[str]:
    for name, split, limit in (("cal", "calibration", PAIRS), ("eval", "test", 45)):
        zero_shot = 'zero_shot = ["colour"]\nzero_shot_limit = 60\n' if name == "eval" else ""
        text = f'format = 1\nname = "{name}"\nsource = "demo"\nsplit = "{split}"\nlimit = {limit}\n{zero_shot}'
        (folder / f"{name}.toml").write_text(text)
    (folder / "child.py").write_text(CHILD)
    return ["--calibration", str(folder / "cal.toml"), "--evaluation", str(folder / "eval.toml")]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As many as each of two processes has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("scale")
    sets_in(made)
    return made


@pytest.fixture(scope="module")
def alone(folder: Path, one_thread: None) -> Outcome:
    """Verified by one process."""
    request = Request(
        **UWM, calibration=str(folder / "cal.toml"), evaluation=str(folder / "eval.toml"), targets=("onnxruntime",),
        work=folder / "one", out=folder / "out", device="cpu",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_PAIRS", SHARD)
        return run(request, until="verify", reporter=Reporter(quiet=True))


@pytest.fixture(scope="module")
def together(folder: Path) -> subprocess.CompletedProcess[str]:
    """The same by two processes of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(folder / "child.py"), "verify", *sets_in(folder), "--work", str(folder / "two"), "--device", "cpu"]
    command += ["--target", "onnxruntime", "--json", *UWM_OPTIONS]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)


def test_two_processes_make_the_scores_of_one(alone: Outcome, together, folder: Path) -> None:
    """Every score is the same number, so every mask is the same; the records differ in their times only."""
    assert together.returncode == 0, together.stderr
    one, two = (load_file(folder / name / "score" / "scores.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    left, right = (Patch.from_file(folder / name / "edit" / "patch.safetensors") for name in ("one", "two"))
    for name, part in left.tensors.items():
        assert len(part.indices) > 0
        assert torch.equal(part.indices, right.tensors[name].indices)
    bodies = [json.loads((folder / name / "score" / "score.json").read_text()) for name in ("one", "two")]
    for body in bodies:
        assert body.pop("seconds").keys() == {"text", "image"}
    assert bodies[0] == bodies[1]
    assert bodies[0]["n_pairs"] == {"text": PAIRS, "image": PAIRS}


def test_two_processes_measure_what_one_measures(alone: Outcome, together, folder: Path) -> None:
    """Every embedding is the same, so is the whole report."""
    left, right = (load_file(folder / name / "verify" / "reference.safetensors") for name in ("one", "two"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert len({(folder / name / "verify" / "verify.json").read_text() for name in ("one", "two")}) == 1


def test_only_the_first_process_speaks(together, folder: Path) -> None:
    """One result on standard output, each line of the log once, nothing left of the shards."""
    assert json.loads(together.stdout)["score"]["n_pairs"] == {"image": PAIRS, "text": PAIRS}
    finished = [line.split()[0] for line in together.stderr.splitlines() if line.rstrip().endswith(" s")]
    assert [finished.count(stage) for stage in ("score", "edit", "export", "verify")] == [1, 1, 1, 1]
    one, two = ({path.name for path in (folder / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert {"score", "verify"} < two
    assert {name for name in two if name.startswith(".")} == {".lock"}


def test_evaluate_is_shared(alone: Outcome, folder: Path) -> None:
    """The saved edited model measured by two processes gives the report that one has written."""
    model = str(folder / "one" / "edit" / "model")
    arguments = ["evaluate", "--model", model, "--evaluation", str(folder / "eval.toml"), "--json", "--workers", "0"]
    first, other = two_ranks(folder, arguments)
    assert (first.code, other) == (0, Ended(code=0, output="", errors="")), first.errors
    report = json.loads(first.output)
    wanted = json.loads((folder / "one" / "verify" / "verify.json").read_text())["edited"]
    for part in ("preference", "per_concept", "zero_shot"):
        assert report[part] == wanted[part]
    # Alone, a model is its own original: other safe items look unsafe to it than to the unedited model.
    both = [{name: p for name, p in r["retrieval"].items() if not name.startswith("hard")} for r in (report, wanted)]
    assert both[0] == both[1]


def test_a_failure_of_one_process_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only the second process meets is told once, by the first; both end with its exit code, none hangs."""
    pairs = [{"id": f"i{n}", "safe_text": f"a red thing {n}", "unsafe_text": f"a fire {n}"} for n in range(2 * SHARD)]
    for n, row in enumerate(pairs):
        row |= {"safe_image": "good.png", "unsafe_image": "good.png" if n < SHARD else "broken.png"}
    sets_in(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no image")
    demo = DemoSource(dataclasses.replace(calibration_set_of("demo")[0], limit=1))
    demo.read(0).safe_image.save(tmp_path / "good.png")
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in pairs))
    text = 'format = 1\nname = "set"\nsource = "manifest"\nmanifest = "pairs.jsonl"\n'
    (tmp_path / "set.toml").write_text(text)
    arguments = ["score", "--calibration", str(tmp_path / "set.toml"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(shards, "SHARD_PAIRS", SHARD)
    first, other = two_ranks(tmp_path, [*arguments, "--workers", "0", "--device", "cpu"])
    assert (first.code, other.code, other.errors) == (2, 2, "")
    assert first.errors.count("error: process 1: ") == 1
    assert "broken.png" in first.errors
    assert "Traceback" not in first.errors
    assert not (tmp_path / "work" / "score").exists()


def test_a_failure_of_the_first_process_ends_all(tmp_path: Path) -> None:
    """Also where the others wait: a run folder that is no folder."""
    arguments = sets_in(tmp_path)[:2]  # scores depend on no evaluation set
    (tmp_path / "work").write_text("in the way")
    first, other = two_ranks(tmp_path, ["score", *arguments, "--work", str(tmp_path / "work"), "--device", "cpu"])
    assert first.code == 2
    assert str(tmp_path / "work") in first.errors
    assert other == Ended(code=2, output="", errors="")


@pytest.mark.parametrize(("rank", "world"), [("x", "2"), ("2", "2"), ("-1", "2")])
def test_a_broken_environment_is_refused(rank: str, world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not met by anyone, so nothing is waited for."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(InputError, match="start with torchrun"):
        join("cpu")


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No group is made, and a group of one shares nothing."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join("cpu") == Ranks()
    assert not torch.distributed.is_initialized()
    assert Ranks().dealt(5, 2) == [range(2), range(2, 4), range(4, 5)]


def test_a_group_is_joined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks again, such as a training run inside a command that joined, is given the group that is there."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("joined twice"))
    assert join("cpu") == ProcessGroup(1, 2)


def test_batches_are_dealt_and_put_back_in_order() -> None:
    """Every batch has one owner."""
    mine = [Ranks(rank, 3).dealt(22, 4) for rank in range(3)]
    assert sorted((part for parts in mine for part in parts), key=lambda part: part.start) == Ranks().dealt(22, 4)
    assert mine[1] == [range(4, 8), range(16, 20)]


# --- shards ---------------------------------------------------------------------------------------------------------


def source_of(limit: int) -> DemoSource:
    return DemoSource(dataclasses.replace(calibration_set_of("demo")[0], limit=limit))


def scored(
    model: LoadedModel,
    edits: EditSpecs,
    folder: Path,
    scale: Scale | None = None,
    *,
    limit: int = 40,
    share: float = 0.0,
    source: DemoSource | None = None,
    read: list[str] | None = None,
) -> tuple[ScoreRecord, dict[str, torch.Tensor]]:
    """Scores as the pipeline does; `read` takes the ids of the pairs that were read."""
    folder.mkdir(exist_ok=True)
    whole = source or source_of(limit)
    ordered = scoring_order(whole, edits, 0)

    class Watched(PairStream):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch
                if read is not None:
                    read.extend(batch.ids)

    def pairs(tower: TowerName) -> PairStream:
        return Watched(
            ordered, tower, model.ref.image, Tokenizer(model.tokenizer_json, model.ref.text), batch_pairs=8, workers=0,
            max_broken_share=share, progress=lambda *_: None,
            sort_by_length=not (edits.per_concept or needs_gradients(edits.method)),
        )  # fmt: skip

    concepts = dict(zip(whole.ids, whole.concepts, strict=True)) if edits.per_concept else None
    record = score_to_folder(model, whole.record, pairs, edits, folder, concepts, scale)
    files = [part.file for part in record.parts] or ["scores.safetensors"]
    return record, {f"{f}/{name}": t for f in files for name, t in load_file(folder / f).items()}


@pytest.fixture(scope="module")
def demo() -> tuple[EditSpecs, LoadedModel]:
    """The shipped model and what its recipe edits; not to be changed."""
    recipe, _ = recipe_of("demo")
    return entries(), load_model(recipe, folder=resources.checkpoint_folder("shipped:demo", ""), device="cpu")


def agree(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Masks agree in at least 99.95% of the entries."""
    assert left.keys() == right.keys()
    for name, scores in left.items():
        torch.testing.assert_close(scores, right[name], rtol=1e-3, atol=1e-6)
        one, two = (torch.zeros(scores.numel(), dtype=torch.bool) for _ in range(2))
        one[selected_indices(scores.abs(), 0.98)] = True
        two[selected_indices(right[name].abs(), 0.98)] = True
        if (one != two).float().mean() > 0.0005:
            return False
    return bool(left)


def test_shards_are_cut_by_number_and_concept() -> None:
    """Whole multiples, a shorter last one, never two concepts in one."""
    ids = [str(n) for n in range(shards.SHARD_PAIRS + 10)]
    size = shards.SHARD_PAIRS
    assert shards_of(ids, None) == [[Shard("", range(size)), Shard("", range(size, size + 10))]]
    assert shards_of(ids, None, multiple=size - 1)[0] == [Shard("", range(size + 10))]
    concepts = dict.fromkeys(ids[:3], "fire") | dict.fromkeys(ids[3:7], "storm")
    assert shards_of(ids[:7], concepts) == [[Shard("fire", range(3))], [Shard("storm", range(3, 7))]]
    with pytest.raises(ContractError, match="comes twice"):
        shards_of([*ids[:7], ids[0]], concepts)


@pytest.mark.parametrize("method", [Method.UWM, Method.DIFFERENCE, Method.GRADIENT_UNSAFE])
def test_shards_add_up_to_the_whole(method: Method, demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shards, with and without a folder between them, give the scores of one."""
    edits, model = with_method(demo[0], method=method), demo[1]
    if needs_gradients(method):
        smaller = [dataclasses.replace(edits.of(tower), gradient_batch=5) for tower in TowerName]
        edits = dataclasses.replace(edits, **{t.value: spec for t, spec in zip(TowerName, smaller, strict=True)})
    whole, wanted = scored(model, edits, tmp_path / "whole")
    monkeypatch.setattr(shards, "SHARD_PAIRS", 10)
    record, found = scored(model, edits, tmp_path / "parts")
    kept, again = scored(model, edits, tmp_path / "kept", Scale(kept=tmp_path / "sums", key="k"))
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert agree(found, wanted)
    assert record.n_pairs == kept.n_pairs == whole.n_pairs == {"text": 40, "image": 40}


def test_concepts_are_cut_into_shards(demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One score per concept, each from several shards, equals that from one."""
    edits = with_method(demo[0], per_concept=True)
    whole, wanted = scored(demo[1], edits, tmp_path / "whole")
    monkeypatch.setattr(shards, "SHARD_PAIRS", 3)
    record, found = scored(demo[1], edits, tmp_path / "parts", Scale(kept=tmp_path / "sums", key="k"))
    assert [(p.concept, p.n_pairs) for p in record.parts] == [(p.concept, p.n_pairs) for p in whole.parts]
    assert max(p.n_pairs for p in record.parts) > 3
    for name, scores in wanted.items():
        torch.testing.assert_close(found[name], scores, rtol=1e-3, atol=1e-6)


class StoppedHereError(Exception):
    """Something from outside."""


class Broken(DemoSource):
    """Some images cannot be read; at one the run is stopped."""

    broken: frozenset[int] = frozenset()
    stop_at: int = -1

    def read(self, index: int):
        if index == self.stop_at:
            raise StoppedHereError
        if index in self.broken:
            raise DataError(f"item {self.ids[index]} is broken")
        return super().read(index)

    def read_texts(self, index: int):
        item = DemoSource.read(self, index)
        return item.safe_text, item.unsafe_text


def broken_source(limit: int, broken: set[int], stop_at: int = -1) -> Broken:
    source = Broken(dataclasses.replace(calibration_set_of("demo")[0], limit=limit))
    source.broken, source.stop_at = frozenset(broken), stop_at
    return source


def test_a_stopped_run_resumes_after_the_last_whole_shard(
    demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed run reads the rest only, and ends with the very scores and records of one that was not stopped."""
    monkeypatch.setattr(shards, "SHARD_PAIRS", 8)
    edits, model = demo
    wanted, scores = scored(model, edits, tmp_path / "a", source=broken_source(40, {3}), share=0.1)
    lines: list[str] = []
    scale = Scale(kept=tmp_path / "sums", key="k", notice=lines.append)
    with pytest.raises(StoppedHereError):
        scored(model, edits, tmp_path / "b", scale, source=broken_source(40, {3}, stop_at=29), share=0.1)
    assert {path.name for path in (tmp_path / "sums").iterdir()} == {"text-0000.safetensors", "image-0000.safetensors"}
    read: list[str] = []
    again, resumed = scored(model, edits, tmp_path / "b", scale, source=broken_source(40, {3}), share=0.1, read=read)
    assert len(read) == 40 - 24
    assert lines == ["text: resumed after 5 of 5 shards", "image: resumed after 3 of 5 shards"]
    assert all(torch.equal(resumed[name], scores[name]) for name in scores)
    assert (again.n_pairs, again.left_out) == (wanted.n_pairs, wanted.left_out)
    assert [item.id for item in again.left_out["image"]] == [broken_source(40, set()).ids[3]]


def test_other_totals_are_not_taken(demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Totals of other inputs, of other shards and of half a file are left alone."""
    edits, model = demo
    monkeypatch.setattr(shards, "SHARD_PAIRS", 8)
    scale = Scale(kept=tmp_path / "sums", key="k")
    _, wanted = scored(model, edits, tmp_path / "a", scale, limit=20)
    files = {path: path.read_bytes() for path in (tmp_path / "sums").iterdir()}

    def reads(scale: Scale) -> int:
        read: list[str] = []
        _, found = scored(model, edits, tmp_path / "b", scale, limit=20, read=read)
        assert agree(found, wanted)
        for path, content in files.items():
            path.write_bytes(content)
        return len(read)

    assert reads(scale) == 0
    assert reads(dataclasses.replace(scale, key="other")) == 40
    for path, content in files.items():
        path.write_bytes(content[:-100])
    assert reads(scale) == 40
    monkeypatch.setattr(shards, "SHARD_PAIRS", 7)
    assert reads(scale) == 40


@pytest.mark.parametrize(("broken", "share"), [({1, 2, 20, 25}, 0.09), (set(range(40)), 1.0)])
def test_broken_items_count_over_all_shards(
    broken: set[int], share: float, demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few in each shard are too many together."""
    monkeypatch.setattr(shards, "SHARD_PAIRS", 10)
    source = broken_source(40, broken)
    with pytest.raises(DataError, match=f"{len(broken)} of 40 items of demo cannot be read"):
        scored(demo[1], demo[0], tmp_path / "x", source=source, share=share)


# --- what fits into memory ------------------------------------------------------------------------------------------


def out_of_memory(rows: int, most: int, error: Exception) -> None:
    if rows > most:
        raise error


@pytest.fixture
def short_of_memory(demo) -> Iterator:
    """Lets a layer in the middle of both towers fail with an error above a number of rows."""
    handles = []

    def install(most: int, error: Exception) -> None:
        for tower in (demo[1].image, demo[1].text):
            layer = list(tower.layers(demo[0].of(tower.name).layers).values())[2]
            handles.append(layer.register_forward_hook(lambda _, __, out: out_of_memory(len(out), most, error)))

    yield install
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["gpu", "cpu"],
)
@pytest.mark.parametrize("method", [Method.UWM, Method.GRADIENT_UNSAFE])
def test_a_batch_that_is_too_large_is_halved(method: Method, error, demo, short_of_memory, tmp_path: Path) -> None:
    """Layers that had already seen the batch do not count it twice; each halving is one line."""
    edits = with_method(demo[0], method=method)
    _, wanted = scored(demo[1], edits, tmp_path / "a", limit=24)
    short_of_memory(5, error)  # rows: a pair has two
    lines: list[str] = []
    record, found = scored(demo[1], edits, tmp_path / "b", Scale(notice=lines.append), limit=24)
    assert record.n_pairs == {"text": 24, "image": 24}
    assert agree(found, wanted)
    halved = [line for line in lines if "out of memory with 8 " in line and line.endswith("going on with 4")]
    assert len(halved) == 2 if method is Method.UWM else len(halved) >= 2
    assert all(parameter.grad is None for parameter in demo[1].source.parameters())


def test_one_pair_that_is_too_large_is_an_error(demo, short_of_memory, tmp_path: Path) -> None:
    """There is nothing left to halve."""
    short_of_memory(1, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(PrerequisiteError, match="memory does not hold one of the pairs"):
        scored(*demo[::-1], tmp_path / "a", limit=8)


def test_other_errors_are_not_taken_for_a_lack_of_memory(demo, short_of_memory, tmp_path: Path) -> None:
    """A fault is raised as it is, at once."""
    short_of_memory(5, RuntimeError("shapes do not match"))
    lines: list[str] = []
    with pytest.raises(RuntimeError, match="shapes do not match"):
        scored(*demo[::-1], tmp_path / "a", Scale(notice=lines.append), limit=8)
    assert lines == []


def test_a_batch_is_a_safe_power_of_two() -> None:
    """From what fits, between 1 and the most that is of use."""
    assert [_power_of_two(fits, 128) for fits in (0.0, 1.0, 6.0, 7.0, 1e9)] == [1, 1, 2, 4, 128]
    assert all(USUAL_PAIRS[tower] <= MOST_PAIRS[tower] for tower in TowerName)


def test_small_models_get_the_usual_batch(demo) -> None:
    """The trial pass leaves no hook behind."""
    for tower in (demo[1].image, demo[1].text):
        assert pairs_that_fit(tower, demo[1].ref) == USUAL_PAIRS[tower.name]
        assert not any(module._forward_hooks for module in tower.graph_module().modules())


def test_the_device_is_chosen(demo) -> None:
    """Without a GPU, or without one that has room, it is the CPU."""
    assert weights_bytes(demo[1].source) > 1_000_000
    assert resolve_device("auto", needed_bytes=1 << 60) == "cpu"


@pytest.mark.parametrize("value", ["0", "-3", "many", "1.5"])
def test_a_batch_must_be_a_number(value: str) -> None:
    """Bad usage, before anything is loaded."""
    result = CliRunner().invoke(cli, ["score", "--batch-pairs", value])
    assert result.exit_code == 2
    assert "neither auto nor a number of pairs" in result.output


# --- bfloat16 -------------------------------------------------------------------------------------------------------


def test_bfloat16_says_how_far_masks_agree(alone: Outcome, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The record holds the agreement on a sample, a line says it, and scores of one dtype never serve the other."""
    request = Request(
        **UWM, calibration=str(folder / "cal.toml"), work=folder / "bf16", device="cpu", score_dtype="bf16"
    )
    outcome = run(request, until="score", reporter=Reporter())
    assert outcome.score.dtype == "bfloat16"
    assert alone.score.dtype == "float32"
    assert alone.score.agreement == {}
    lines = capsys.readouterr().err
    for tower, found in outcome.score.agreement.items():
        assert f"{tower}: bfloat16 and float32 masks of {PAIRS} pairs" in lines
        assert found.n_pairs == PAIRS
        assert found.keep_mass == entries().of(TowerName(tower)).keep_mass
        assert 0.9 < found.equal_min <= found.equal_mean < 1
        assert 0.5 < found.jaccard_min <= found.jaccard_mean < 1
    assert outcome.score.agreement.keys() == {"text", "image"}
    one, two = (load_file(folder / name / "score" / "scores.safetensors") for name in ("one", "bf16"))
    for name, scores in one.items():
        assert two[name].dtype is torch.float32
        assert not torch.equal(scores, two[name])
        assert ((scores - two[name]).norm() / scores.norm()) < 0.05
    stamps = [json.loads((folder / name / "score" / "stage.json").read_text())["inputs"] for name in ("one", "bf16")]
    assert {key for key, value in stamps[0].items() if stamps[1][key] != value} == {"settings"}


def test_gradients_have_no_bfloat16_pass(demo, tmp_path: Path) -> None:
    """Refused, rather than left without effect."""
    edits = with_method(demo[0], method=Method.GRADIENT_UNSAFE)
    with pytest.raises(InputError, match="has no bfloat16 pass"):
        scored(demo[1], edits, tmp_path / "a", Scale(dtype="bfloat16"))
