"""Sets with texts alone or images alone: one tower is scored and edited, the other one ships as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.uwm_edit import UWM
from uwm_deploy.data.demo.source import DemoSource
from uwm_deploy.errors import DataError
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes.resolve import calibration_set_of
from uwm_deploy.records.codec import record_from_json
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.model import TowerName
from uwm_deploy.report.console import Reporter

ITEMS = 48


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same quadruples as a set of texts and as a set of images; and an evaluation set."""
    folder = tmp_path_factory.mktemp("sets")
    spec, _, _ = calibration_set_of("demo")
    source = DemoSource(spec)
    (folder / "images").mkdir()
    rows: dict[str, list[str]] = {"text": [], "image": []}
    for index in range(ITEMS):
        item = source.read(index)
        assert item.safe_image is not None
        assert item.unsafe_image is not None
        common = {"id": item.id, "concept": item.concept}
        rows["text"].append(json.dumps({**common, "safe_text": item.safe_text, "unsafe_text": item.unsafe_text}))
        names = {side: f"images/{index}-{side}.png" for side in ("safe", "unsafe")}
        item.safe_image.save(folder / names["safe"])
        item.unsafe_image.save(folder / names["unsafe"])
        rows["image"].append(json.dumps({**common, "safe_image": names["safe"], "unsafe_image": names["unsafe"]}))
    for kind, lines in rows.items():
        (folder / f"{kind}.jsonl").write_text("\n".join(lines))
        (folder / f"{kind}.toml").write_text(
            f'format = 1\nname = "{kind}-only"\nsource = "manifest"\nmanifest = "{kind}.jsonl"\n'
        )
    (folder / "eval.toml").write_text('format = 1\nname = "eval"\nsource = "demo"\nsplit = "test"\nlimit = 60\n')
    return folder


def request(sets: Path, kind: str, work: Path, towers: tuple[str, ...]) -> Request:
    return Request(
        **UWM,
        calibration=str(sets / f"{kind}.toml"), evaluation=str(sets / "eval.toml"), towers=towers, work=work,
        out=work / "bundle", targets=("onnxruntime",),
    )  # fmt: skip


@pytest.mark.parametrize("kind", [pytest.param("text", marks=pytest.mark.slow), "image"])
def test_one_tower_is_edited_and_both_ship(kind: str, sets: Path, tmp_path: Path) -> None:
    """In the other tower nothing is selected, and its graph is proven to hold the unedited weights.

    The slow case is packed as well; what packs a bundle does not ask which towers were edited.
    """
    until = "package" if kind == "text" else "verify"
    outcome = run(request(sets, kind, tmp_path, (kind,)), until=until, reporter=Reporter(quiet=True))
    assert outcome.score is not None
    assert dict(outcome.score.n_pairs) == {kind: ITEMS}
    edit = record_from_json(EditRecord, (tmp_path / "edit" / "edit.json").read_bytes(), where="edit.json")
    assert {tensor.tower for tensor in edit.tensors} == set(TowerName)
    assert all((tensor.selected > 0) == (tensor.tower == kind) for tensor in edit.tensors)
    assert list(edit.first.settings) == [kind]
    assert [graph.fingerprint.mismatches for graph in outcome.onnx] == [(), ()]
    assert outcome.report is not None
    assert all(part.cosine_min > 0.99999 for evidence in outcome.report.artifacts for part in evidence.parity)
    assert outcome.report.edit_effect["P_ts"].n == 60


@pytest.mark.parametrize(("kind", "other"), [("text", "image"), ("image", "text")])
def test_a_set_without_the_pairs_is_refused_with_the_way_out(kind: str, other: str, sets: Path, tmp_path: Path) -> None:
    """Both towers are edited unless it is said otherwise; nothing is skipped in silence."""
    with pytest.raises(DataError, match=f"no {other} pairs") as caught:
        run(request(sets, kind, tmp_path, ()), until="score", reporter=Reporter(quiet=True))
    assert f"--tower {kind}" in caught.value.fix
    assert not (tmp_path / "score").exists()
