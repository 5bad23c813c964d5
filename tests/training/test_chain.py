"""Trained weights through the whole chain: compared with their base, found in every artifact, with their own record."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from tests.made_once import made_once
from uwm_deploy.cli import cli
from uwm_deploy.edits.patch import Patch
from uwm_deploy.errors import InputError, IntegrityError
from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.pipeline.plan import plan_of
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes.resolve import calibration_set_of, recipe_of
from uwm_deploy.records.codec import json_from_record, record_from_json, write_record
from uwm_deploy.records.edit import EditKind, Method
from uwm_deploy.records.evidence import Evidence
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.training import Trainer, TrainingRecord
from uwm_deploy.records.verdict import Result
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.evidence import dossier_of
from uwm_deploy.report.html import page
from uwm_deploy.report.inspection import describe

QUIET = Reporter(quiet=True)
ROOT = Path(__file__).parents[2]
Models = dict[Trainer, tuple[Path, TrainingRecord]]


@pytest.fixture(scope="session")
def measured_on(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A small evaluation set, and the policy without what so few items and epochs cannot support."""

    def write(folder: Path) -> None:
        (folder / "eval.toml").write_text('format = 1\nname = "eval"\nsource = "demo"\nsplit = "test"\nlimit = 64\n')
        text = (ROOT / "ci" / "default.toml").read_text()
        head, _, rest = text.partition("[[edit]]")
        artifact = rest[rest.index("[[artifact]]") :]
        limits = [part for part in artifact.split("\n\n") if "zero_shot" not in part and "[[concept]]" not in part]
        text = head + "edit = []\n" + "\n\n".join(limits)
        text = text.replace('name = "default"', 'name = "policy"')
        (folder / "policy.toml").write_text(text.replace("min_n = 200", "min_n = 32"))

    folder = made_once(tmp_path_factory, "measured-on", write)
    return str(folder / "eval.toml"), str(folder / "policy.toml")


def _request(model: Path, folder: Path, calibration: str, measured_on: tuple[str, str], **changed: object) -> Request:
    request = Request(
        model=str(model),
        calibration=calibration,
        evaluation=measured_on[0],
        policy=measured_on[1],
        targets=("onnxruntime",),
        out=folder / "bundle",
        work=folder / "work",
        device="cpu",
        workers=0,
    )
    return dataclasses.replace(request, **changed)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def bundled(
    trained: Models, small_set: str, measured_on: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Trainer], tuple[Request, Outcome]]:
    """A bundle of a method, made when it is first asked for."""

    @functools.cache
    def of(method: Trainer) -> tuple[Request, Outcome]:
        request = _request(trained[method][0], tmp_path_factory.mktemp("bundle"), small_set, measured_on)
        return request, run(request, until="package", reporter=QUIET)

    return of


@pytest.mark.parametrize("method", [Trainer.SAFE_CLIP, pytest.param(Trainer.SAFER_CLIP, marks=pytest.mark.slow)])
def test_a_trained_model_becomes_a_gated_bundle(
    method: Trainer, bundled: Callable[[Trainer], tuple[Request, Outcome]], trained: Models
) -> None:
    """It passes; every trained weight is found in the graphs; the original of the report is the base."""
    request, outcome = bundled(method)
    record = trained[method][1]
    assert outcome.verdict is not None
    assert outcome.verdict.result is Result.PASS, outcome.verdict.causes
    assert outcome.verdict.proven == ("onnxruntime-fp32",)
    assert outcome.edit is not None
    assert outcome.edit.methods == (Method.TRAINED,)
    assert outcome.edit.model.weights_digest == record.base.weights_digest
    assert outcome.edit.edited_weights_digest == record.trained_weights_digest
    assert {tensor.name for tensor in outcome.edit.tensors if tensor.changed} == set(record.weights)
    assert {tensor.kind for tensor in outcome.edit.tensors} == {EditKind.TRAINED}
    assert sum(graph.fingerprint.layers for graph in outcome.onnx) == len(record.weights)
    assert outcome.report is not None
    assert outcome.report.edit_proof is not None
    assert outcome.report.edit_proof.problems == ()
    executed = next(a for a in outcome.report.artifacts if a.variant == "onnxruntime-fp32")
    assert executed.evidence is Evidence.EXECUTED
    assert set(executed.canaries) == {"image", "text"}
    assert max(executed.canaries.values()) < 0.01  # far nearer to the trained model than to the base
    held = record_from_json(
        TrainingRecord,
        (request.out / "reports" / "training.json").read_bytes(),
        where="training.json",  # type: ignore[operator]
    )
    assert held == record


def test_a_bundle_says_how_it_was_trained(bundled: Callable[[Trainer], tuple[Request, Outcome]]) -> None:
    """`inspect`, the card, the parts list and the report page; none calls it an edit without training."""
    out = bundled(Trainer.SAFE_CLIP)[0].out
    assert out is not None
    assert describe(out)["trained by"].startswith("safe-clip from demo, 32 quadruples of small")
    card = (out / "README.md").read_text()
    assert "By training:" in card
    assert "unsafe-weights-manipulation" not in card
    assert "as they were trained" in (out / "bom.cdx.json").read_text()
    assert "reports/training.json" in page(dossier_of(out))


def test_an_edit_goes_on_top_of_trained_weights(
    trained: Models, small_set: str, measured_on: tuple[str, str], tmp_path: Path
) -> None:
    """The original is then the trained model; its training record is not about the edited weights, so not beside them."""
    model, record = trained[Trainer.SAFE_CLIP]
    request = _request(model, tmp_path, small_set, measured_on, method="uwm")
    outcome = run(request, until="edit", reporter=QUIET)
    assert outcome.edit is not None
    assert outcome.edit.methods == (Method.UWM,)
    assert outcome.edit.model.weights_digest == record.trained_weights_digest
    assert sum(tensor.selected for tensor in outcome.edit.tensors) > 0
    assert not (tmp_path / "work" / "edit" / "model" / "training.json").exists()


@pytest.mark.parametrize(
    ("in_recipe", "trained_on", "found"),
    [
        ("sets/small.toml", "small", "sets/small.toml"),
        ("demo", "small", "small.toml"),
        ("sets/other.toml", "small", "small.toml"),
        ("sets/other.toml", "demo-head", "demo-head"),
        ("demo", "demo", "demo"),
    ],
)
def test_the_set_of_a_training_is_named_by_its_file_or_as_it_ships(
    trained: Models, tmp_path: Path, in_recipe: str, trained_on: str, found: str
) -> None:
    """The record has the name of the set, not its path."""
    record = trained[Trainer.SAFE_CLIP][1]
    text = record.recipe.replace('calibration = "demo"', f'calibration = "{in_recipe}"')
    data = dataclasses.replace(record.calibration, name=trained_on)
    write_record(tmp_path / "training.json", dataclasses.replace(record, recipe=text, calibration=data))
    assert recipe_of(str(tmp_path))[0].data.calibration == found


def test_the_set_of_a_training_is_read_again_without_being_named(
    trained: Models, small_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the working folder; where it is not there, the error names its file."""
    monkeypatch.chdir(tmp_path)
    request = Request(model=str(trained[Trainer.SAFE_CLIP][0]))
    with pytest.raises(InputError, match=r"small\.toml does not exist"):
        plan_of(request)
    shutil.copy(small_set, tmp_path)
    assert plan_of(request).calibration == calibration_set_of(small_set)[0]


def test_the_patch_of_trained_weights_can_not_be_applied(bundled: Callable[[Trainer], tuple[Request, Outcome]]) -> None:
    """It only names digests; neither `refit` nor the patch itself makes one model of the other."""
    out = bundled(Trainer.SAFE_CLIP)[0].out
    assert out is not None
    patch = Patch.from_file(out / "patch.safetensors")
    name = next(iter(patch.tensors))
    base = load_file(ROOT / "uwm_deploy" / "data" / "demo" / "model" / "model.safetensors")
    with pytest.raises(IntegrityError, match="not what the patch promises"):
        Patch({name: patch.tensors[name]}).apply({name: base[name].clone()})
    result = CliRunner().invoke(cli, ["refit", str(out), "--revert", "--out", str(out.parent / "back")])
    assert result.exit_code == 2
    assert "the weights were trained" in result.output


def test_other_weights_than_the_record_s_are_refused(
    trained: Models, small_set: str, measured_on: tuple[str, str], tmp_path: Path
) -> None:
    """One entry of one weight is enough; so is another base, another training set, a method's setting."""
    model = tmp_path / "model"
    shutil.copytree(trained[Trainer.SAFE_CLIP][0], model)
    weights = load_file(model / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="not those of their training record"):
        run(_request(model, tmp_path, small_set, measured_on), until="edit", reporter=QUIET)
    whole = trained[Trainer.SAFE_CLIP][0]
    other = _request(whole, tmp_path / "a", small_set, measured_on, original=trained[Trainer.SAFER_CLIP][0])
    with pytest.raises(IntegrityError, match="the original is not the model that was trained"):
        run(other, until="edit", reporter=QUIET)
    with pytest.raises(IntegrityError, match="is not the 48 quadruples"):
        run(_request(whole, tmp_path / "b", measured_on[0], measured_on), until="edit", reporter=QUIET)
    with pytest.raises(InputError, match="so --keep-mass has no effect"):
        run(_request(whole, tmp_path / "c", small_set, measured_on, keep_mass=0.9), until="edit", reporter=QUIET)
    with pytest.raises(InputError, match="--original"):
        run(Request(model="demo", method="trained", work=tmp_path / "d"), until="edit", reporter=QUIET)


def test_weights_that_were_trained_elsewhere_need_no_record(
    trained: Models, small_set: str, measured_on: tuple[str, str], tmp_path: Path
) -> None:
    """A published checkpoint as it is, compared with the base it names; here the trained folder without its record."""
    model = tmp_path / "model"
    shutil.copytree(trained[Trainer.SAFE_CLIP][0], model)
    (model / "training.json").unlink()
    base = ROOT / "uwm_deploy" / "data" / "demo" / "model"
    request = _request(model, tmp_path, small_set, measured_on, method="trained", original=base)
    outcome = run(request, until="edit", reporter=QUIET)
    assert outcome.edit is not None
    assert outcome.edit.edited_weights_digest == trained[Trainer.SAFE_CLIP][1].trained_weights_digest
    assert outcome.edit.model.weights_digest == trained[Trainer.SAFE_CLIP][1].base.weights_digest


CHANGED = (
    "text_model.final_layer_norm.bias",
    "text_model.encoder.layers.1.self_attn.q_proj.bias",
    "text_model.embeddings.position_embedding.weight",
    "vision_model.encoder.layers.0.layer_norm1.bias",
    "vision_model.embeddings.class_embedding",
    "logit_scale",
)


def test_a_trained_model_s_record_lists_every_tensor_that_differs(
    trained: Models, small_set: str, measured_on: tuple[str, str], tmp_path: Path
) -> None:
    """Biases, normalisations and embeddings as well as weights, found in every graph; a logit scale is in neither tower."""
    model = tmp_path / "model"
    shutil.copytree(trained[Trainer.SAFE_CLIP][0], model)
    (model / "training.json").unlink()
    weights = load_file(model / "model.safetensors")
    for name in CHANGED:
        weights[name] += 0.01
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    base = ROOT / "uwm_deploy" / "data" / "demo" / "model"
    request = _request(model, tmp_path, small_set, measured_on, method="trained", original=base)
    outcome = run(request, until="gate", reporter=QUIET)
    assert outcome.edit is not None
    listed = {tensor.name: tensor for tensor in outcome.edit.tensors}
    assert {name for name, tensor in listed.items() if tensor.changed} == {
        *trained[Trainer.SAFE_CLIP][1].weights,
        *CHANGED,
    }
    for name in CHANGED:
        assert listed[name].kind is EditKind.TRAINED
        assert listed[name].selected == weights[name].numel()
        assert (listed[name].tower is None) is (name == "logit_scale")
        assert (listed[name].tower is TowerName.TEXT) is name.startswith("text_model")
    graphs = {graph.tower: graph.fingerprint for graph in outcome.onnx}
    assert {tower: found.layers for tower, found in graphs.items()} == {t: len(outcome.edit.of(t)) for t in TowerName}
    assert outcome.report is not None
    assert outcome.report.edit_proof is not None
    assert outcome.report.edit_proof.problems == ()
    assert outcome.report.edit_proof.layers == len(listed)
    for artifact in outcome.report.artifacts:
        assert [audit.edit for audit in artifact.audit.values()] == [(), ()], artifact.variant
    assert outcome.verdict is not None
    assert outcome.verdict.result is Result.PASS, outcome.verdict.causes


def test_a_record_round_trips_and_the_command_prints_it(trained: Models, small_set: str) -> None:
    """`train --json` says what lies beside the weights."""
    folder, record = trained[Trainer.SAFE_CLIP]
    assert record_from_json(TrainingRecord, json_from_record(record), where="record") == record
    options = ["--epochs=2", "--batch=16", "--rate=3e-3", "--validation-share=0.34", "--device=cpu", "--json"]
    command = ["train", "safe-clip", "--calibration", small_set, "--out", str(folder), *options]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["trained_weights_digest"] == record.trained_weights_digest
