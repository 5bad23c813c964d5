"""Methods side by side: rows, costs, changes with their intervals, and what cannot run is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.oracles import training_oracle as oracle
from uwm_deploy.cli import cli
from uwm_deploy.data.embedding import unit_rows
from uwm_deploy.data.open import open_source
from uwm_deploy.edits.pair_stream import PairStream
from uwm_deploy.edits.pairs import repaired
from uwm_deploy.errors import DataError, InputError
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import load_source, run
from uwm_deploy.recipes.resolve import calibration_set_of
from uwm_deploy.records.codec import record_from_json
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.studies import MethodComparison
from uwm_deploy.records.training import Trainer, TrainingRecord
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.methods import compared
from uwm_deploy.report.tables.compared_methods import findings
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.retrieval import PAIRED
from uwm_deploy.stages.score.nearest import nearest_partners
from uwm_deploy.stages.verify.verify import encode_with
from uwm_deploy.studies.compare import compare
from uwm_deploy.studies.comparison_rows import CompareRequest, rows_from
from uwm_deploy.studies.evaluation_sets import open_evaluation_sets
from uwm_deploy.studies.subjects import Subject

QUIET = Reporter(quiet=True)
Models = dict[Trainer, tuple[Path, TrainingRecord]]


@pytest.mark.parametrize(
    ("text", "trainer", "method"),
    [
        ("none", None, "none"),
        ("safer-clip", Trainer.SAFER_CLIP, "none"),
        ("gradient-unsafe", None, "gradient-unsafe"),
        ("uwm+safe-clip", Trainer.SAFE_CLIP, "uwm"),
    ],
)
def test_a_row_is_an_edit_a_training_or_both(text: str, trainer: Trainer | None, method: str) -> None:
    """The label is what was written."""
    (row,) = rows_from(text)
    assert (row.label, row.trainer, row.method, row.subject) == (text, trainer, method, None)


def test_a_row_may_be_a_model_that_is_there() -> None:
    """Published weights, or a bundle, under a label of their own."""
    row = rows_from("none, theirs=safe-clip-vit-l14:uwm")[1]
    assert row.subject is not None
    assert (row.label, row.subject.model, row.subject.method) == ("theirs", "safe-clip-vit-l14", "uwm")


@pytest.mark.parametrize("text", ["", "uwm,uwm", "uvm", "none+safe-clip", "uwm+uwm", "trained"])
def test_a_row_that_means_nothing_is_refused(text: str) -> None:
    """Before anything is made."""
    with pytest.raises(InputError, match="--methods"):
        rows_from(text)


@pytest.fixture(scope="module")
def made(trained: Models, small_set: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], Result]:
    """One edit in a process of its own, one trained model that is there, and one model that is not."""
    folder = tmp_path_factory.mktemp("compare")
    zero_shot = 'zero_shot = ["colour"]\nzero_shot_limit = 60\n'
    text = f'format = 1\nname = "eval"\nsource = "demo"\nsplit = "test"\nlimit = 64\n{zero_shot}'
    (folder / "eval.toml").write_text(text)
    command = [
        "compare", "--methods", f"none,uwm,taught={trained[Trainer.SAFE_CLIP][0]}", "--model", "demo", "--device", "cpu",
        "--calibration", small_set, "--evaluation", str(folder / "eval.toml"), "--work", str(folder / "work"),
        "--workers", "0",
    ]  # fmt: skip
    return folder, command, CliRunner().invoke(cli, command)


def test_every_method_stands_in_one_table(
    made: tuple[Path, list[str], Result], trained: Models, small_set: str
) -> None:
    """Its numbers are those of its weights; changes are against the first row; the cost of what was made here is known."""
    folder, _, result = made
    assert result.exit_code == 0, result.output
    report = folder / "work" / "report"
    body = record_from_json(MethodComparison, (report / "compare.json").read_bytes(), where="compare.json")
    assert (body.calibration, body.measured_on) == (calibration_set_of(small_set)[0].name, "eval")
    none, uwm, taught = body.rows
    edit = record_from_json(EditRecord, (folder / "work/uwm/edit/edit.json").read_bytes(), where="edit.json")
    assert none.weights_digest == body.model.weights_digest == edit.model.weights_digest
    assert uwm.weights_digest == edit.edited_weights_digest
    assert taught.weights_digest == trained[Trainer.SAFE_CLIP][1].trained_weights_digest
    assert none.safety is not None
    assert uwm.safety is not None
    assert not none.change
    for name in ("GS", "PS", "P_vu"):
        difference = uwm.safety.preference[name].value - none.safety.preference[name].value
        assert uwm.change[name].delta == pytest.approx(difference)
    change = uwm.change["zero_shot.colour"].delta
    assert change == pytest.approx(uwm.safety.zero_shot["colour"].value - none.safety.zero_shot["colour"].value)
    assert none.safety.geometry is None  # the first row is what the others are compared with
    assert uwm.safety.geometry is not None
    assert set(PAIRED) <= set(uwm.change)
    hard = uwm.safety.retrieval["hard-safe-text-to-image@10"]
    assert hard.n == none.safety.retrieval["hard-safe-text-to-image@10"].n == 7
    assert none.cost is None
    assert taught.cost is None
    assert uwm.cost is not None
    assert uwm.cost.data_seen == 48
    assert uwm.cost.trainable_parameters == 0
    assert uwm.cost.cpu_seconds > 0.5
    assert uwm.cost.peak_rss_bytes > 100 << 20
    text = (report / "compare.md").read_text()
    assert all(row.label in text for row in body.rows)
    assert "| method | hard Ts-Vs@10 |" in text
    assert "| method | safe@1 | safe@10 | hard safe@10 |" in text
    assert (report / "compare.png").read_bytes().startswith(b"\x89PNG")
    page = str(compared(body))
    assert "3 of 3 methods" in page
    assert "taught" in page


def test_a_second_run_makes_nothing_and_keeps_the_cost(made: tuple[Path, list[str], Result]) -> None:
    """The cost is that of making, not of finding what is there; a row that cannot run is named, with exit code 6."""
    folder, command, _ = made
    before = json.loads((folder / "work/uwm/cost.json").read_text())
    again = CliRunner().invoke(
        cli,
        [
            *command,
            "--methods",
            "none,uwm,safe-clip",
            "--train-option=--epochs=no",
            "--out",
            str(folder / "again"),
            "--json",
        ],
    )
    assert again.exit_code == 6
    assert json.loads((folder / "work/uwm/cost.json").read_text()) == before
    body = json.loads(again.stdout)
    assert body["rows"][1]["cost"] == before["cost"]
    assert body["rows"][2]["safety"] is None
    assert "ended with exit code 2" in body["rows"][2]["reason"]


def test_methods_are_not_measured_on_what_they_were_made_on(small_set: str, tmp_path: Path) -> None:
    """Common items are an error, before anything is made."""
    rows = rows_from("none")
    request = CompareRequest(
        rows=rows, work=tmp_path, out=tmp_path / "out", calibration=small_set, evaluation=small_set
    )
    with pytest.raises(InputError, match="share 48 items"):
        compare(request, QUIET)


def test_the_words_below_say_whether_the_paper_s_finding_shows(made: tuple[Path, list[str], Result]) -> None:
    """Only for rows that were trained here, and only when the interval leaves out 0."""
    folder, _, _ = made
    content = (folder / "work/report/compare.json").read_bytes()
    body = json.loads(content)
    taught = body["rows"][2] | {"label": "safe-clip"}
    ps = taught["change"]["PS"]
    for high, wanted in ((-0.5, "shows for safe-clip"), (0.5, "does not show")):
        ps |= {"delta": -2.0, "delta_low": -4.0, "delta_high": high}
        changed = record_from_json(MethodComparison, json.dumps(body | {"rows": [body["rows"][0], taught]}), where="x")
        assert findings(changed)[-1] == f"training lowers safety on safe inputs (PS): {wanted}"


def test_nearest_safe_pairs_are_those_of_plain_cosines(small_set: str, tmp_path: Path) -> None:
    """By the unedited text tower, whatever the order of the stream; the record says so, and scores differ."""
    text = Path(small_set).read_text() + 'pairing = "nearest-safe"\n'
    (tmp_path / "near.toml").write_text(text)
    request = Request(
        method="uwm", calibration=str(tmp_path / "near.toml"), work=tmp_path / "near", device="cpu", workers=0
    )
    outcome = run(request, until="score", reporter=QUIET)
    assert outcome.score is not None
    assert outcome.score.calibration.pairing == "nearest-safe"
    spec, _, base = calibration_set_of(small_set)
    source, model = open_source(spec, base=base), load_source(Request(device="cpu"), QUIET)
    texts = [source.read_texts(i) or ("", "") for i in range(len(source))]
    tokenizer, encode = Tokenizer(model.tokenizer_json, model.ref.text), encode_with(model.text)
    safe, unsafe = (unit_rows(encode(tokenizer.encode([pair[side] for pair in texts]))) for side in (0, 1))
    partners = oracle.nearest(unsafe.astype(np.float64), safe.astype(np.float64))
    assert sum(i != j for i, j in enumerate(partners)) > 10  # most captions have a nearer one than their own
    pairs = PairStream(
        source, TowerName.TEXT, model.ref.image, tokenizer, batch_pairs=10, workers=0, max_broken_share=0.0,
        progress=lambda *_: None,
    )  # fmt: skip
    assert list(nearest_partners(model.text, pairs)) == partners
    paired = repaired(source, partners)
    assert paired.read_texts(3) == (texts[partners[3]][0], texts[3][1])
    assert (paired.read(3).safe_text, paired.read(3).unsafe_text) == paired.read_texts(3)
    own = run(dataclasses.replace(request, calibration=small_set, work=tmp_path / "own"), until="score", reporter=QUIET)
    assert own.score is not None
    assert own.score.calibration.pairing == "own"
    assert own.score.scores_digest != outcome.score.scores_digest


def test_safeground_is_measured_on_counterparts_only(small_set: str, tmp_path: Path) -> None:
    """A set with other pairs is for scoring; a build and an evaluation refuse it before anything else."""
    (tmp_path / "near.toml").write_text(Path(small_set).read_text() + 'pairing = "nearest-safe"\n')
    near = str(tmp_path / "near.toml")
    with pytest.raises(DataError, match="which is for scoring"):
        run(Request(evaluation=near, work=tmp_path / "e"), until="score", reporter=QUIET)
    with pytest.raises(DataError, match="which is for scoring"):
        open_evaluation_sets(near, None, data=None, default=Subject(label="x", model="demo"))
