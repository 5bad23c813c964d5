"""`bench` and what `doctor` says of precisions: only what was executed has numbers, and everything else says why not."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from tests.small_build import copy_small_work, write_sets
from tests.uwm_edit import UWM
from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.cli import cli
from uwm_deploy.errors import InputError, IntegrityError, PrerequisiteError
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.graph import LayerSensitivity, Precision, PrecisionPlan, PrecisionStep
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.studies import WARM_ROUNDS, BenchReport
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.doctor import capabilities
from uwm_deploy.report.tables.latencies import bench_csv, bench_lines
from uwm_deploy.report.tables.precision_plan import print_plan
from uwm_deploy.runtime import probe
from uwm_deploy.runtime.tensorrt import gpu_reason
from uwm_deploy.studies import bench as engine_bench

ROOT = Path(__file__).parents[2]
POLICY = """format = 1
name = "policy"
required = []
min_proven = 1
edit = []

[[artifact]]
metric = "parity.cosine_min"
at_least = 0.99999
min_n = 1
reason = "INT8 is not that near, so one variant fails"
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small build with a proven, a failed and, without a GPU, an unproven variant."""
    folder = tmp_path_factory.mktemp("bench")
    copy_small_work(tmp_path_factory, folder / "work")
    write_sets(folder, evaluation=16, zero_shot=16)
    (folder / "policy.toml").write_text(POLICY)
    request = Request(
        **UWM, calibration=str(folder / "cal.toml"), evaluation=str(folder / "eval.toml"),
        policy=str(folder / "policy.toml"), precisions=("fp32", "int8"), out=folder / "bundle", work=folder / "work",
        workers=0,
    )  # fmt: skip
    outcome = run(request, until="package", reporter=Reporter(quiet=True))
    assert {"score", "edit", "export"} <= set(outcome.reused)
    return folder / "bundle"


def measured(bundle: Path, variants: tuple[str, ...] = (), batches: tuple[int, ...] = (2,)) -> BenchReport:
    opened = open_bundle(bundle, allow_failed=True)
    contenders, not_run = engine_bench.contenders_of(opened, variants)
    return engine_bench.bench(opened, contenders, not_run, batches=batches, seconds=0.01, progress=lambda *_: None)


@pytest.fixture(scope="module")
def report(bundle: Path) -> BenchReport:
    return measured(bundle, batches=(4, 1))


def test_every_executable_variant_is_measured_and_labelled(report: BenchReport) -> None:
    """Both towers, all batches, cold and warm; proof or its lack stands beside the numbers."""
    states = {subject.name: subject.state for subject in report.subjects}
    assert states["onnxruntime-fp32"] == "proven"
    assert states["onnxruntime-int8"] == "failed"
    cells = {(row.subject, row.tower, row.batch) for row in report.warm}
    assert cells == {(name, tower, batch) for name in states for tower in TowerName for batch in (1, 4)}
    assert {(row.subject, row.tower) for row in report.cold} == {
        (name, tower) for name in states for tower in TowerName
    }
    assert all(row.batch == 1 and row.open_ms > 0 and row.first_call_ms > 0 for row in report.cold)
    for row in report.warm:
        assert row.calls >= WARM_ROUNDS
        assert 0 < row.ratio_low <= row.ratio <= row.ratio_high
        assert row.throughput_per_s > 0
        if row.subject == report.against:
            assert row.ratio == 1
    assert all(subject.where["provider"] and set(subject.digests) == {"image", "text"} for subject in report.subjects)
    assert report.machine["cpu"]
    assert report.clocks_before["load"]


def test_what_cannot_run_here_is_not_run(report: BenchReport, bundle: Path) -> None:
    """Without a driver an engine has a reason and no number; asked for alone it is an error of the environment."""
    if not gpu_reason():
        pytest.skip("this machine has a GPU")
    assert set(report.not_run) == {"tensorrt-rtx-fp32", "tensorrt-rtx-int8"}
    assert all(gpu_reason() in reason for reason in report.not_run.values())
    assert not {row.subject for row in report.warm} & set(report.not_run)
    lines = bench_lines(report)
    assert f"tensorrt-rtx-fp32: not run: {gpu_reason()}" in lines
    with pytest.raises(PrerequisiteError, match="nothing can be measured"):
        measured(bundle, ("tensorrt-rtx-fp32",))


def test_one_that_does_not_open_is_not_run(bundle: Path) -> None:
    """An engine that its runtime refuses takes nobody else's numbers away."""
    opened = open_bundle(bundle, allow_failed=True)
    contenders, _ = engine_bench.contenders_of(opened, ("onnxruntime-fp32", "onnxruntime-int8"))

    def refused(_: TowerName) -> engine_bench.Session:
        raise PrerequisiteError("built for another GPU", fix="build it again")

    broken = engine_bench.Contender(contenders[1].subject, refused)
    found = engine_bench.bench(opened, [contenders[0], broken], {}, batches=[1], seconds=0.01, progress=lambda *_: None)
    assert found.not_run == {"onnxruntime-int8": "built for another GPU"}
    assert {row.subject for row in found.warm} == {"onnxruntime-fp32"}


def test_a_time_for_wrong_answers_is_no_result(bundle: Path, report: BenchReport) -> None:
    """Every answer of the timed calls is compared with the edited model's; a turned one ends the run."""
    opened = open_bundle(bundle, allow_failed=True)
    contenders, _ = engine_bench.contenders_of(opened, ("onnxruntime-fp32",))

    class Turned:
        """A session that is fast and wrong from its third call on."""

        def __init__(self, inner: engine_bench.Session) -> None:
            self.inner, self.calls, self.where = inner, 0, inner.where
            self.max_batch, self.concurrency = inner.max_batch, inner.concurrency

        def run(self, batch: np.ndarray) -> np.ndarray:
            self.calls += 1
            return self.inner.run(batch) * (-1 if self.calls > 2 else 1)

        def close(self) -> None:
            self.inner.close()

    wrong = engine_bench.Contender(contenders[0].subject, lambda tower: Turned(contenders[0].open(tower)))  # type: ignore[arg-type,return-value]
    with pytest.raises(IntegrityError, match="other embeddings than the edited model's while it was timed"):
        engine_bench.bench(opened, [wrong], {}, batches=[1], seconds=0.2, progress=lambda *_: None)
    for row in report.warm:
        assert row.cosine_min > (0.9999 if row.subject == "onnxruntime-fp32" else 0.8)


def test_bad_requests_are_refused(bundle: Path) -> None:
    """An unknown variant, a batch above the profile, another model as the reference."""
    with pytest.raises(InputError, match="no variant 'onnxruntime-fp64'"):
        measured(bundle, ("onnxruntime-fp64",))
    with pytest.raises(InputError, match="--batch 33 is above 32"):
        measured(bundle, batches=(1, 33))
    done = CliRunner().invoke(cli, ["bench", str(bundle), "--torch", "no-such-model"])
    assert done.exit_code == 2
    assert "no-such-model" in done.output


def test_too_few_calls_have_no_percentile() -> None:
    """The slowest of five calls is not called a 95th percentile."""
    few, many = [[0.002], [0.004], [0.003]], [[0.001] * 40, [0.002] * 40, [0.003] * 40]
    row = engine_bench.latency_of("a", TowerName.IMAGE, 4, few, few)
    assert (row.latency_ms_p50, row.latency_ms_p95, row.latency_ms_p99) == (3.0, None, None)
    assert (row.calls, row.ratio) == (3, 1.0)
    assert row.throughput_per_s == pytest.approx(3 * 4 / 0.009)
    row = engine_bench.latency_of("b", TowerName.IMAGE, 4, many, few)
    assert row.latency_ms_p99 == pytest.approx(3.0)
    assert (row.ratio_low, row.ratio, row.ratio_high) == pytest.approx((0.5, 0.5, 1.0))


def test_report_survives_json_and_csv_has_every_row(report: BenchReport) -> None:
    """Nothing is lost on the way to machines; an unknown percentile is an empty cell."""
    assert record_from_json(BenchReport, json_from_record(report), where="x") == report
    rows = list(csv.DictReader(io.StringIO(bench_csv(report))))
    assert [(row["variant"], row["tower"], int(row["batch"])) for row in rows] == [
        (row.subject, row.tower.value, row.batch) for row in report.warm
    ]
    for row, source in zip(rows, report.warm, strict=True):
        assert (row["latency_ms_p99"] == "") == (source.latency_ms_p99 is None)
        assert float(row["latency_ms_p50"]) == source.latency_ms_p50


def test_command_writes_table_picture_and_compares_with_torch(bundle: Path, tmp_path: Path) -> None:
    """The reference is found by the bundle's own recipe, measured in the same run, and called what it is."""
    picture, table = tmp_path / "bench.png", tmp_path / "bench.csv"
    command = ["bench", str(bundle), "--seconds", "0.01", "--batch", "1", "--variant", "onnxruntime-fp32"]
    done = CliRunner().invoke(
        cli, [*command, "--threads", "1", "--json", "--csv", str(table), "--picture", str(picture)]
    )
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    assert body["against"] == "torch"
    assert {s["name"]: s["state"] for s in body["subjects"]} == {"torch": "reference", "onnxruntime-fp32": "proven"}
    assert {s["where"]["threads"] for s in body["subjects"]} == {"1"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(table.read_text().splitlines()) == 5


def test_it_needs_no_torch(bundle: Path) -> None:
    """With torch and all of the build packages out of reach, the engines are measured and the reference is not run."""
    code = (
        "import sys, importlib.util as u\n"
        "names = ('torch', 'transformers', 'onnx', 'onnx_ir', 'polygraphy', 'matplotlib')\n"
        "sys.modules.update({name: None for name in names})\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name in names else find(name, *rest)\n"
        "from uwm_deploy.cli import main\n"
        f"main(['bench', {str(bundle)!r}, '--seconds', '0.01', '--batch', '1', '--variant', 'onnxruntime-fp32'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert "torch: not run: package torch is not installed" in done.stdout
    assert "onnxruntime-fp32" in done.stdout


@pytest.mark.parametrize("precision", probe.PROBED)
def test_probe_graphs_are_valid(precision: Precision) -> None:
    """The checker passes what doctor tries, so a refusal is about the precision and not about the file."""
    model = onnx.load_from_string(probe.probe_graph(precision))
    onnx.checker.check_model(model, full_check=True)


def test_doctor_lists_every_precision_and_what_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ONNX Runtime executes was tried; without a GPU the engines, refit and CUDA are not run, never omitted."""
    found = {one.what: one for one in capabilities()}
    expected = {f"{target} {p.value}" for target in ("onnxruntime", "tensorrt", "tensorrt-rtx") for p in probe.PROBED}
    assert expected <= set(found)
    assert {p.value for p in probe.PROBED if found[f"onnxruntime {p.value}"].ok} >= {"fp32", "int8"}
    assert not found["onnxruntime bf16"].ok
    if gpu_reason():
        needs = [name for name in found if name.startswith(("tensorrt ", "tensorrt-rtx "))]
        assert {"tensorrt refit", "tensorrt-rtx refit", "tensorrt-rtx fp8"} <= set(needs)
        for name in [*needs, "onnxruntime CUDA provider"]:
            assert not found[name].ok
            assert "not run" in found[name].detail
    monkeypatch.setattr(probe, "probe_graph", lambda _: b"broken")
    assert [one.ok for one in capabilities() if one.what == "onnxruntime fp32"] == [False]


def test_plan_is_printed_with_its_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    """Every plan that was measured, what stays in float32, and the budget that was kept."""
    names = tuple(f"layers.{i}.fc1" for i in range(12))
    plan = PrecisionPlan(
        lowest=Precision.INT8, budget=0.5, limit=0.25, n=512, kept={"image": names, "text": ()}, flips=0.2,
        low_share=0.4,
        layers=tuple(LayerSensitivity(tower=TowerName.IMAGE, name=n, sensitivity=1e-6, kept=True) for n in names),
        steps=(PrecisionStep(what="all lowered", kept=0, low_share=1.0, flips=3.125),),
    )  # fmt: skip
    print_plan(plan)
    text = " ".join(capsys.readouterr().out.split())
    for part in ("12 of 12 linear layers stay in float32, 40.0%", "all lowered", "3.12", "layers.9.fc1 ... and 2 more"):
        assert part in text
    assert "kept in the text tower, most sensitive first: nothing" in text
    assert "the search allows 0.25%, the budget is 0.5%" in text
    assert "computes in float32" not in text
    print_plan(dataclasses.replace(plan, low_share=0.0))
    text = " ".join(capsys.readouterr().out.split())
    assert "No layer is in int8 within this budget: this variant computes in float32. One flip of 512" in text


def test_inputs_fit_the_graphs(bundle: Path) -> None:
    """Noise of the image's shape; captions that end with the end token, as a real one does."""
    opened = open_bundle(bundle, allow_failed=True)
    inputs = {tower: engine_bench.inputs_of(opened, tower, 5) for tower in TowerName}
    engines = opened.engines("onnxruntime-fp32")
    for tower, rows in inputs.items():
        assert rows.shape[1:] == tuple(size.max for size in engines[tower].inputs[0].row_sizes)
        assert rows.dtype == engines[tower].inputs[0].dtype
    ids = inputs[TowerName.TEXT]
    assert np.all((ids == opened.manifest.model.text.eos_id).any(axis=1))
