"""The trainer: what is frozen stays frozen, what is merged is what was learnt, a run that was stopped ends like others."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.training.conftest import SHORT, request_for
from uwm_deploy.errors import InputError, IntegrityError
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.resolve import recipe_of
from uwm_deploy.records.training import EpochResult, Trainer, TrainingRecord
from uwm_deploy.report.console import Reporter
from uwm_deploy.towers.digests import digest_of_weights
from uwm_deploy.towers.load import load_model
from uwm_deploy.towers.protocol import LoadedModel
from uwm_deploy.training import trainer
from uwm_deploy.training.adapters import Adapters, Student
from uwm_deploy.training.checkpoints import CHECKPOINT, State, read_state, write_state
from uwm_deploy.training.losses import MemberEmbeddings, safe_clip_terms, weighted_sum
from uwm_deploy.training.settings import PUBLISHED, TARGETS, settings_of
from uwm_deploy.training.trainer import train

QUIET = Reporter(quiet=True)


@pytest.fixture
def model() -> LoadedModel:
    """The demo model, fresh."""
    recipe = recipe_of("demo")[0]
    return load_model(recipe, folder=resources.checkpoint_folder(recipe.model.repo, ""), device="cpu")


def _inputs(model: LoadedModel, b: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    rng, side = np.random.default_rng(0), model.ref.image.crop
    ids = np.full((2 * b, 8), model.ref.text.eos_id)
    ids[:, :5] = rng.integers(0, 900, (2 * b, 5))
    return torch.from_numpy(ids), torch.from_numpy(rng.normal(size=(2 * b, 3, side, side)).astype(np.float32))


def _step(model: LoadedModel, adapters: Adapters, reference: MemberEmbeddings) -> MemberEmbeddings:
    """One step of Adam on the real loss; the embeddings after it."""
    student = Student(model).train()
    optimiser = torch.optim.Adam(adapters.tensors.values(), lr=1e-2)
    for _ in range(2):  # of the two factors of an adapter one begins at 0, so the other moves in the second step
        optimiser.zero_grad(set_to_none=True)
        terms = safe_clip_terms(student(*_inputs(model)), reference)
        torch.autograd.backward(weighted_sum(terms, PUBLISHED[Trainer.SAFE_CLIP].weights))
        optimiser.step()
    with torch.no_grad():
        found: MemberEmbeddings = student.eval()(*_inputs(model))
    return found


def test_gradients_reach_the_adapters_and_nothing_else(model: LoadedModel) -> None:
    """Every adapter gets one; no weight, bias or embedding does, and none of the published targets is missed."""
    adapters = Adapters(model, PUBLISHED[Trainer.SAFE_CLIP])
    with torch.no_grad():
        reference = Student(model).eval()(*_inputs(model))
    _step(model, adapters, reference)
    for name, parameter in model.source.named_parameters():
        assert (parameter.grad is not None) == (name in adapters.tensors) == (".lora_" in name), name
    assert all(float(p.grad.abs().sum()) > 0 for p in adapters.tensors.values() if p.grad is not None)
    reached = {name.split(".lora_")[0].rpartition(".")[2] for name in adapters.tensors}
    assert reached == set(TARGETS)


def test_a_second_model_is_truly_frozen(model: LoadedModel) -> None:
    """The reference is no view of the trained model: its digest and its embeddings stay, those of the other move."""
    recipe = recipe_of("demo")[0]
    frozen = load_model(recipe, folder=resources.checkpoint_folder(recipe.model.repo, ""), device="cpu")
    with torch.no_grad():
        before = Student(frozen).eval()(*_inputs(frozen))
    adapters = Adapters(model, PUBLISHED[Trainer.SAFE_CLIP])
    after = _step(model, adapters, before)
    with torch.no_grad():
        again = Student(frozen).eval()(*_inputs(frozen))
    assert digest_of_weights(dict(frozen.source.named_parameters())) == frozen.ref.weights_digest
    for left, right, moved in zip(before, again, after, strict=True):
        assert torch.equal(left, right)
        assert not torch.allclose(left, moved, atol=1e-4)


def test_a_merge_is_the_weight_plus_the_scaled_product(model: LoadedModel) -> None:
    """``W + alpha / rank * B A`` for every target, computed in numpy; all else is bit-equal; outputs are the adapters'."""
    before = {name: p.detach().clone().numpy() for name, p in model.source.named_parameters()}
    adapters = Adapters(model, settings_of(Trainer.SAFE_CLIP, alpha=3.0, rank=2))
    with torch.no_grad():
        reference = Student(model).eval()(*_inputs(model))
    after = _step(model, adapters, reference)
    state = {name: part.numpy() for name, part in adapters.state().items()}
    changed = adapters.merge()
    merged = {name: p.detach().numpy() for name, p in model.source.named_parameters()}
    assert set(merged) == set(before)
    for name, weight in before.items():
        part = name.removesuffix(".weight")
        if f"{part}.lora_A.default.weight" not in state:
            assert np.array_equal(merged[name], weight), name
            assert name not in changed
            continue
        a, b = state[f"{part}.lora_A.default.weight"], state[f"{part}.lora_B.default.weight"]
        product = (b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)).reshape(weight.shape)
        assert np.allclose(merged[name], weight + 1.5 * product, atol=1e-6), name
        assert name in changed
    with torch.no_grad():
        plain = Student(model).eval()(*_inputs(model))
    for left, right in zip(plain, after, strict=True):
        assert torch.allclose(left, right, atol=1e-5)


@pytest.mark.parametrize("method", list(Trainer))
def test_the_record_proves_what_was_trained(
    method: Trainer, trained: dict[Trainer, tuple[Path, TrainingRecord]], model: LoadedModel
) -> None:
    """Reference unchanged by digest, saved weights those of the record, all others the base's, the best epoch kept."""
    folder, record = trained[method]
    assert record.reference_digest == record.base.weights_digest == model.ref.weights_digest
    assert record.n_training + record.n_validation == record.calibration.n == 48
    saved = load_model(recipe_of(str(folder))[0], folder=folder, device="cpu")
    assert saved.ref.weights_digest == record.trained_weights_digest != record.base.weights_digest
    weights, base = dict(saved.source.named_parameters()), dict(model.source.named_parameters())
    for name, parameter in weights.items():
        assert torch.equal(parameter, base[name]) == (name not in record.weights), name
    assert len(record.epochs) == 2
    best = min(record.epochs, key=lambda epoch: epoch.validation_loss)
    assert record.best_epoch == best.epoch
    assert set(record.epochs[0].terms) == set(record.settings.weights)
    stages = [epoch.n for epoch in record.epochs]
    assert stages == ([32, 32] if method is Trainer.SAFE_CLIP else [11, 22])  # the curriculum adds a third per epoch
    assert not list(folder.glob("*.bin"))


class _Stop(Reporter):
    """Interrupts in the middle of the second epoch, as Ctrl-C would."""

    def progress(self, label: str, done: int, total: int) -> None:
        if label.startswith("epoch 2"):
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", list(Trainer))
def test_a_run_that_was_stopped_ends_with_the_same_weights(
    method: Trainer, trained: dict[Trainer, tuple[Path, TrainingRecord]], small_set: str, tmp_path: Path
) -> None:
    """Bit for bit, dropout and Adam's moments included; nothing is written but one safetensors file until the end."""
    request = request_for(method, tmp_path, small_set, 2)
    with pytest.raises(KeyboardInterrupt):
        train(request, _Stop(quiet=True))
    assert not request.out.exists()
    held = load_file(tmp_path / "work" / CHECKPOINT)
    assert {name.split("/")[0] for name in held} == {"adapters", "best", "moments"}
    record = train(request, QUIET)
    folder, whole = trained[method]
    assert record.trained_weights_digest == whole.trained_weights_digest
    assert [dataclasses.replace(e, seconds=0) for e in record.epochs] == [
        dataclasses.replace(e, seconds=0) for e in whole.epochs
    ]
    assert (folder / "model.safetensors").read_bytes() == (request.out / "model.safetensors").read_bytes()
    assert not (tmp_path / "work" / CHECKPOINT).exists()


def test_a_finished_run_is_reused_and_other_settings_train_again(
    trained: dict[Trainer, tuple[Path, TrainingRecord]], small_set: str, tmp_path: Path
) -> None:
    """The same command says what is there; another seed makes another model; a foreign folder is never replaced."""
    folder, record = trained[Trainer.SAFE_CLIP]
    request = dataclasses.replace(request_for(Trainer.SAFE_CLIP, tmp_path, small_set, 2), out=folder)
    assert train(request, QUIET) == record
    other = request_for(Trainer.SAFE_CLIP, tmp_path, small_set, 1, seed=1)
    assert train(other, QUIET).trained_weights_digest != record.trained_weights_digest
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no trained model"):
        train(dataclasses.replace(request, out=tmp_path / "foreign"), QUIET)


def test_a_damaged_checkpoint_is_named_and_one_of_another_run_is_not_used(tmp_path: Path) -> None:
    """It is data, so it can be refused; it is never executed."""
    path = tmp_path / CHECKPOINT
    write_state(path, State("key", adapters={"a": torch.ones(2)}, best={}, moments={"a": {"step": torch.tensor(3.0)}}))
    found = read_state(path, "key")
    assert found is not None
    assert torch.equal(found.moments["a"]["step"], torch.tensor(3.0))
    assert read_state(path, "other") is None
    assert read_state(tmp_path / "nowhere", "key") is None
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_state(path, "key")


def _epochs(losses: list[float], recalls: list[float]) -> Iterator[EpochResult]:
    for epoch, (loss, recall) in enumerate(zip(losses, recalls, strict=True), start=1):
        yield EpochResult(epoch=epoch, n=1, terms={}, loss=0.0, validation_loss=loss, recall_sum=recall, seconds=0.0)


@pytest.mark.parametrize(("best", "wanted"), [("loss", 2), ("recall", 4)])
def test_the_best_epoch_and_the_end_follow_the_published_rule(model: LoadedModel, best: str, wanted: int) -> None:
    """Waiting begins anew when either is better; the kept epoch is the best by the one that was asked for."""
    settings = settings_of(Trainer.SAFE_CLIP, best=best)
    adapters, state, waited = Adapters(model, settings), State("key"), []
    for result in _epochs([3.0, 1.0, 2.0, 2.0, 2.0], [10.0, 10.0, 10.0, 11.0, 11.0]):
        trainer._take(state, result, settings, adapters)
        waited.append(state.waited)
    assert state.best_epoch == wanted
    assert waited == [0, 0, 1, 0, 1]


def test_half_precision_trains_and_keeps_the_weights_in_float32(small_set: str, tmp_path: Path) -> None:
    """The forward passes alone are in bfloat16."""
    (tmp_path / "less.toml").write_text(Path(small_set).read_text().replace("48", "32"))
    changed = {"precision": "bf16", "validation_share": 0.5}  # few quadruples: processors without bfloat16 are slow
    record = train(request_for(Trainer.SAFE_CLIP, tmp_path, str(tmp_path / "less.toml"), 1, **changed), QUIET)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {str(part.dtype) for part in tensors.values()} == {"float32"}
    assert record.settings.precision == "bf16"
    assert np.isfinite(record.epochs[0].loss)


def test_what_cannot_be_trained_is_refused(
    trained: dict[Trainer, tuple[Path, TrainingRecord]], small_set: str, tmp_path: Path
) -> None:
    """A model that was trained already, and a set that is too small to hold some of it out."""
    request = request_for(Trainer.SAFE_CLIP, tmp_path, small_set, 1)
    with pytest.raises(InputError, match="was trained already"):
        train(dataclasses.replace(request, model=str(trained[Trainer.SAFE_CLIP][0])), QUIET)
    with pytest.raises(InputError, match="too few"):
        train(request_for(Trainer.SAFE_CLIP, tmp_path, small_set, 1, validation_share=0.1), QUIET)


@pytest.mark.slow
def test_two_processes_train_one_model(small_set: str, tmp_path: Path) -> None:
    """Two processes on the CPU: one writes and speaks, each sees half of the quadruples, their gradients are averaged."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in (SHORT | {"batch": 8}).items()]
    command = [
        sys.executable, "-m", "tests.forked_ranks", str(tmp_path), "train", "safe-clip", "--calibration", small_set,
        "--device", "cpu", "--workers", "0",
        "--epochs", "1", *options, "--out", str(tmp_path / "model"), "--work", str(tmp_path / "work"), "--json",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    body = json.loads(done.stdout[done.stdout.index("{") :])
    assert body["processes"] == 2
    assert body["examples_seen"] == 32
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.gpu
def test_a_gpu_trains_in_bfloat16(small_set: str, tmp_path: Path) -> None:
    """The same command on a GPU; its memory stands in the record."""
    request = request_for(Trainer.SAFE_CLIP, tmp_path, small_set, 2, precision="bf16")
    record = train(dataclasses.replace(request, device="cuda"), QUIET)
    assert record.device == "cuda"
    assert record.peak_gpu_bytes > 0
    assert record.reference_digest == record.base.weights_digest
    assert record.epochs[-1].loss < record.epochs[0].loss
