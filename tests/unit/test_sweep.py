"""The sweep: nested edits, the pick, the front, and the command on a small set."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from uwm_deploy.cli import cli
from uwm_deploy.errors import InputError
from uwm_deploy.pipeline.request import Request, resolved_recipe
from uwm_deploy.pipeline.run import load_source, run
from uwm_deploy.records.codec import plain_from_record
from uwm_deploy.records.metrics import Proportion, SafetyReport
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.studies import SweepPoint
from uwm_deploy.report.console import Reporter
from uwm_deploy.safeground.preference import METRICS
from uwm_deploy.safeground.tradeoff import pareto
from uwm_deploy.studies.sweep import pick
from uwm_deploy.studies.sweep_values import factors_of, keep_masses_of
from uwm_deploy.studies.swept_edits import edited_points

PIECES = """format = 1
name = "few-{split}"
source = "demo"
split = "{split}"
limit = 24
zero_shot = ["colour"]
zero_shot_limit = 120
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small calibration set and a small evaluation set."""
    folder = tmp_path_factory.mktemp("sweep")
    for split in ("calibration", "validation"):
        (folder / f"{split}.toml").write_text(PIECES.format(split=split))
    return folder


def test_ranges_and_lists() -> None:
    """A range is even in the logarithm of the edited share and has both ends; a list is sorted."""
    values = keep_masses_of("0.9:0.99:3")
    assert values == pytest.approx((0.9, 1 - 0.1 / 10**0.5, 0.99), abs=1e-5)
    assert keep_masses_of("0.98,0.9,0.98") == (0.9, 0.98)
    assert len(keep_masses_of("0.9:0.995")) == 8
    assert factors_of("-1,0,0.5") == (-1.0, 0.0, 0.5)


@pytest.mark.parametrize("text", ["", "a", "0.9:", "0:0.9", "1.5", "0.9:0.99:x", "0.9:1"])
def test_what_is_no_range_is_refused(text: str) -> None:
    """Each mistake names the option and what would be right."""
    with pytest.raises(InputError, match="--keep-mass"):
        keep_masses_of(text)
    with pytest.raises(InputError, match="--factor"):
        factors_of("-1,x")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"selection": "hard", "per_concept": True},
        {"method": "difference", "selection": "adaptive"},  # signed scores
        {"method": "gradient-unsafe"},  # texts hard, images adaptive
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "recipe",
)
def test_each_point_is_the_edit_and_the_model_is_left_as_it_was(changes: dict, small: Path, tmp_path: Path) -> None:
    """Whatever the method, a point's weights are those that `edit` makes; afterwards every weight has its old bits."""
    request = Request(
        **({"method": "uwm"} | changes),
        calibration=str(small / "calibration.toml"),
        work=tmp_path,
        device="cpu",
        workers=0,
    )
    quiet = Reporter(quiet=True)
    score = run(request, until="score", reporter=quiet).score
    assert score is not None
    model = load_source(request, quiet)
    before = {name: p.detach().clone() for name, p in model.source.named_parameters()}
    edits, file, seen = resolved_recipe(request).entries, tmp_path / "score" / "scores.safetensors", []
    for keep, factor, shares in edited_points(model, score, file, edits, (0.9, 0.98), (-1.0, 0.5)):
        seen.append((keep, factor))
        point = dataclasses.replace(request, keep_mass=keep, factor=factor)
        outcome = run(point, until="edit", reporter=quiet)
        assert "score" in outcome.reused
        saved = load_file(tmp_path / "edit" / "model" / "model.safetensors")
        assert all(torch.equal(p, saved[name]) for name, p in model.source.named_parameters())
        for tower, share in shares.items():
            layers = outcome.edit.of(TowerName(tower))
            entries = sum(layer.shape[0] * layer.shape[1] for layer in layers)
            assert share == sum(layer.selected for layer in layers) / entries > 0
    assert seen == [(0.98, -1.0), (0.9, -1.0), (0.98, 0.5), (0.9, 0.5)]
    assert all(torch.equal(p, before[name]) for name, p in model.source.named_parameters())


def _report(gs: float, zero_shot: float) -> SafetyReport:
    def of(value: float) -> Proportion:
        return Proportion(value=value, n=100, low=0, high=100)

    return SafetyReport(
        subject="",
        preference=dict.fromkeys(METRICS, of(gs)),
        per_concept={},
        retrieval={},
        zero_shot={"a": of(zero_shot)},
    )


def test_the_pick_keeps_its_limit() -> None:
    """Highest GS within the allowed loss, the smaller edit among equals, nothing when no point keeps the limit."""
    original = _report(2, 90)
    values = [(0.99, 3, 89), (0.98, 5, 86), (0.97, 5, 86), (0.9, 9, 70)]
    points = [SweepPoint(keep_mass=k, factor=-1, shares={}, safety=_report(g, z)) for k, g, z in values]
    assert pick(original, points, 5) == 1
    assert pick(original, points, 2) == 0
    assert pick(original, points, 30) == 3
    assert pick(original, points, 0.5) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    """A point is on the front exactly when no other is at least as good in both and better in one."""

    def beaten(p: tuple[float, float]) -> bool:
        return any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)

    assert {points[i] for i in pareto(points)} == {p for p in points if not beaten(p)}


def test_the_command_writes_table_and_picture(small: Path) -> None:
    """Scores are reused, every point is a row, the files appear together; picking on the evaluation set is refused."""
    arguments = ["sweep", "--calibration", str(small / "calibration.toml"), "--work", str(small / "work")]
    arguments += ["--method", "uwm", "--keep-mass", "0.9,0.98", "--pick", "100", "--workers", "0", "--json"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    body = json.loads((small / "work" / "sweep" / "sweep.json").read_text())
    assert [p["keep_mass"] for p in body["points"]] == [0.98, 0.9]
    assert body["picked"] in (0, 1)
    assert body["original"]["geometry"] is None
    assert all(set(p["safety"]["geometry"]["spread"]) == {"image", "text"} for p in body["points"])
    shown = [set(part["retrieval"]) for part in (body["original"], *(p["safety"] for p in body["points"]))]
    assert shown[0] == shown[1] == shown[2]
    assert (body["method"], body["concepts"]) == ("uwm", [])
    assert {p["factor"] for p in body["points"]} == {-1}  # the recipe's
    assert body["measured_on"]["name"] == "few-calibration"
    assert (small / "work" / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len((small / "work" / "sweep" / "sweep.md").read_text().splitlines()) == 5
    refused = CliRunner().invoke(cli, [*arguments, "--on", "demo-test"])
    assert refused.exit_code == 2
    assert "shares 1000 items with the evaluation set" in refused.output


def test_the_command_sweeps_another_method(small: Path, tmp_path: Path) -> None:
    """With the factor and the selection of the method, and a report that says so; one run folder serves both."""
    arguments = ["sweep", "--calibration", str(small / "calibration.toml"), "--work", str(small / "work")]
    arguments += ["--method", "gradient-safe-clip", "--per-concept", "--keep-mass", "0.995", "--workers", "0"]
    done = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    body = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert body["method"] == "gradient-safe-clip"
    assert body["selection"] == {"image": "hard", "text": "hard"}
    assert len(body["concepts"]) > 1
    (point,) = body["points"]
    assert point["factor"] == 0
    assert point["shares"]["text"] > 0.005  # the union of selections of 0.5% each


def test_strengths_of_an_axis_are_swept_on_the_model_they_were_fitted_on(tmp_path: Path) -> None:
    """Each point is what `edit` makes under that limit: the table says which strength, the more may be lost the safer."""
    text = PIECES.format(split="calibration").replace("limit = 24", "limit = 96")
    (tmp_path / "cal.toml").write_text(text)
    words = ["sweep", "--method", "safety-axis", "--calibration", str(tmp_path / "cal.toml"), "--workers", "0"]
    words += ["--max-retrieval-loss", "10,40", "--work", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, [*words, "--json"])
    assert result.exit_code == 0, result.output
    points = json.loads((tmp_path / "out" / "sweep.json").read_text())["points"]
    assert [point["max_retrieval_loss"] for point in points] == [10.0, 40.0]
    gains = [point["safety"]["preference"]["GS"]["value"] for point in points]
    assert gains == sorted(gains)
    request = Request(
        method="safety-axis", calibration=str(tmp_path / "cal.toml"), max_retrieval_loss=10.0, work=tmp_path / "run",
        workers=0,
    )  # fmt: skip
    edit = run(request, until="edit", reporter=Reporter(quiet=True)).edit
    assert edit is not None
    assert edit.closed_form is not None
    assert edit.closed_form.axis is not None
    assert plain_from_record(edit.closed_form.axis.setting) == points[0]["setting"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "leace"], "no strength"),
        (["--method", "uwm+leace"], "no strength"),
        (["--method", "none"], "no strength"),
        (["--method", "safety-axis", "--keep-mass", "0.9"], "--keep-mass"),
        (["--method", "uwm+safety-axis", "--factor", "-1"], "--factor"),
        (["--method", "uwm", "--max-retrieval-loss", "4"], "--max-retrieval-loss"),
        (["--method", "safety-axis", "--max-retrieval-loss", "4,x"], "not a list"),
        (["--method", "safety-axis", "--max-retrieval-loss", "-1"], "no points"),
    ],
)
def test_options_that_a_method_has_no_use_for_are_refused(words: list[str], said: str) -> None:
    """Before anything is read; the error names the option or the method."""
    result = CliRunner().invoke(cli, ["sweep", *words])
    assert result.exit_code == 2, result.output
    assert said in result.output
