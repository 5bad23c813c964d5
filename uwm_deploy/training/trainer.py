"""Trains both towers of a model for safety, beside a frozen copy of it; resumable, seeded, on one device or several."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uwm_deploy.data.embedding import prepare
from uwm_deploy.data.open import open_source
from uwm_deploy.data.source import QuadrupleSource, check_own_pairs
from uwm_deploy.data.torchrun import in_this_process, join, with_averaged_gradients
from uwm_deploy.errors import ContractError, InputError, imported
from uwm_deploy.pipeline.request import Request, resolved_recipe
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.built import text_of_built
from uwm_deploy.recipes.recipe import Recipe, TrainSpec
from uwm_deploy.recipes.resolve import TRAINING, calibration_set_of, read_training, recipe_of
from uwm_deploy.records.codec import plain_from_record, write_record
from uwm_deploy.records.files import digest_of_plain, locked, whole_folder
from uwm_deploy.records.model import Digest
from uwm_deploy.records.places import refuse_foreign
from uwm_deploy.records.training import EpochResult, Trainer, TrainingRecord, TrainingSettings
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.runtime.versions import versions
from uwm_deploy.safeground.retrieval import recalls
from uwm_deploy.stages.verify.verify import embed_model
from uwm_deploy.towers.digests import digest_of_weights
from uwm_deploy.towers.load import load_model, resolve_device
from uwm_deploy.towers.protocol import LoadedModel
from uwm_deploy.training.adapters import Adapters, Student
from uwm_deploy.training.checkpoints import CHECKPOINT, State, moments_of, put_moments, read_state, write_state
from uwm_deploy.training.data import TrainingData, total, training_data
from uwm_deploy.training.losses import MemberEmbeddings
from uwm_deploy.training.settings import settings_of

_PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """What the user asked for; None takes the recipe's value.

    Attributes:
        changed: Settings other than those of the recipe and, where that names none, the published ones.
        out: Folder for the trained model.
        work: Run folder, where a run that was stopped goes on from.
    """

    method: Trainer
    out: Path
    changed: Mapping[str, Any] = field(default_factory=dict)
    model: str = "demo"
    checkpoint: Path | None = None
    revision: str | None = None
    calibration: str | None = None
    work: Path | None = None
    device: str = "auto"
    workers: int = 2


def train(request: TrainRequest, reporter: Reporter) -> TrainingRecord:
    """Trains, or goes on with a run that was stopped, or says what is there already; writes the trained model.

    Args:
        request: Model, data and settings.
        reporter: Progress.

    Returns:
        The record, which lies beside the weights.

    Raises:
        InputError: If the model cannot be trained, or the output folder holds something else.
        DataError: If the set is too small, or an item cannot be read.
        ContractError: If the reference or a weight without adapter changed, or a loss is not finite.
        PrerequisiteError: If a package is missing.
    """
    imported("peft", "package peft is not installed", fix="pip install 'uwm-deploy[train]'")
    there = read_training(request.out)
    if there is None:
        refuse_foreign(request.out, TRAINING, "holds no trained model")
    run = _Run(request, reporter)
    if there is not None and run.made(there):
        reporter.line(f"train      {request.out} is what this would make, reused")
        return there
    return run.trained()


class _Run:
    """One training run: resolved inputs, the two models, the state."""

    def __init__(self, request: TrainRequest, reporter: Reporter) -> None:
        self.request, self.reporter = request, reporter
        if read_training(Path(request.model)) is not None:
            raise InputError(f"{request.model} was trained already", fix="train from the model it was made from")
        asked = Request(
            model=request.model,
            checkpoint=request.checkpoint,
            revision=request.revision,
            calibration=request.calibration,
        )
        self.recipe: Recipe = resolved_recipe(asked)
        self.settings = settings_for(self.recipe.train, request)
        self.recipe_text = text_of_built(recipe_of(request.model)[1], self.recipe)
        self.spec, _, base = calibration_set_of(self.recipe.data.calibration)
        check_own_pairs(self.spec)  # `safer-clip` looks for the nearest itself
        self.source: QuadrupleSource = open_source(dataclasses.replace(self.spec, zero_shot=()), base=base)
        self.ranks = join(request.device)
        self.device = torch.device(resolve_device(request.device))
        self.work = request.work or Path(".uwm") / self.recipe.name / f"train-{self.settings.method.value}"
        self.reference = self._load()

    def _load(self) -> LoadedModel:
        source = self.recipe.model
        folder = resources.checkpoint_folder(source.repo, source.revision, family=source.family)
        return load_model(self.recipe, folder=folder, device=str(self.device))

    def made(self, there: TrainingRecord) -> bool:
        """Whether a trained model is what this run would make."""
        return (there.settings, there.base.weights_digest, there.calibration, there.processes) == (
            self.settings,
            self.reference.ref.weights_digest,
            self.source.record,
            self.ranks.world,
        )

    @property
    def key(self) -> Digest:
        """Digest of everything that the weights after an epoch depend on."""
        parts = [self.settings, self.source.record]
        processes = self.ranks.world
        return digest_of_plain([*map(plain_from_record, parts), self.reference.ref.weights_digest, processes])

    def trained(self) -> TrainingRecord:
        """Trains and writes the result."""
        if not self.ranks.first:
            return self._trained()
        with locked(self.work), self.reporter.stage("train", f"{self.recipe.name}, {self.settings.method.value}"):
            return self._trained()

    def _trained(self) -> TrainingRecord:
        data = self._data()
        before = self.reference.ref.weights_digest
        model = self._load()
        adapters = Adapters(model, self.settings)
        count, parameters = adapters.count, sum(p.numel() for p in self.reference.source.parameters())
        state = self._epochs(model, adapters, data)
        after = digest_of_weights(dict(self.reference.source.named_parameters()))
        if after != before:
            raise ContractError("the frozen reference changed while the model was trained", fix="report this")
        adapters.load(state.best)
        changed = adapters.merge()
        record = TrainingRecord(
            settings=self.settings,
            base=self.reference.ref,
            calibration=self.source.record,
            n_training=len(data.training),
            n_validation=len(data.validation),
            trained_weights_digest=digest_of_weights(dict(model.source.named_parameters())),
            weights=changed,
            reference_digest=after,
            epochs=tuple(state.epochs),
            best_epoch=state.best_epoch,
            stopped_early=len(state.epochs) < self.settings.epochs,
            trainable_parameters=count,
            parameters=parameters,
            examples_seen=sum(epoch.n for epoch in state.epochs),
            seconds=sum(epoch.seconds for epoch in state.epochs),
            processes=self.ranks.world,
            device=self.device.type,
            peak_gpu_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0,
            versions=versions(_PACKAGES),
            recipe=self.recipe_text,
        )
        self.ranks.first_only(lambda: self._write(model, record))
        return record

    def _write(self, model: LoadedModel, record: TrainingRecord) -> None:
        with whole_folder(self.request.out) as folder:
            model.save(folder)
            write_record(folder / TRAINING, record)
        (self.work / CHECKPOINT).unlink(missing_ok=True)

    def _data(self) -> TrainingData:
        reference = self.reference
        tokenizer = Tokenizer(reference.tokenizer_json, reference.ref.text)
        prepared = prepare(
            self.source,
            reference.ref.image,
            tokenizer,
            workers=self.request.workers,
            progress=self.reporter.progress,
        )
        embedded = embed_model(reference, prepared, "frozen reference", self.reporter.progress)
        return training_data(prepared, embedded, reference.ref.text, self.settings)

    def _epochs(self, model: LoadedModel, adapters: Adapters, data: TrainingData) -> State:
        """All epochs that are left, with the state written after each."""
        path = self.work / CHECKPOINT
        state = read_state(path, self.key) or State(self.key)
        optimiser = torch.optim.Adam(adapters.tensors.values(), lr=self.settings.rate)
        if state.epochs:
            adapters.load(state.adapters)
            put_moments(optimiser, adapters.tensors, state.moments)
            self.reporter.line(f"           going on after epoch {len(state.epochs)}")
        student = with_averaged_gradients(Student(model), self.ranks)
        while len(state.epochs) < self.settings.epochs and state.waited < self.settings.patience:
            result = self._epoch(len(state.epochs) + 1, student, optimiser, data)
            _take(state, result, self.settings, adapters)
            state.adapters, state.moments = adapters.state(), moments_of(optimiser, adapters.tensors)
            if self.ranks.first:
                write_state(path, state)
            self.reporter.line(_line(result, state.best_epoch == result.epoch))
        return state

    def _epoch(
        self, epoch: int, student: torch.nn.Module, optimiser: torch.optim.Optimizer, data: TrainingData
    ) -> EpochResult:
        started = time.perf_counter()
        # Of the epoch, not of what came before it: a run that goes on draws the same dropout.
        torch.manual_seed(int(np.random.default_rng([self.settings.seed, epoch, self.ranks.rank]).integers(2**62)))
        student.train()
        sums: dict[str, float] = {}
        batches = list(self._batches(data.rows_of(epoch, self.settings)))
        for step, rows in enumerate(batches, start=1):
            terms = data.terms(self._embedded(student, data, rows), rows, self.settings.method)
            loss = total(terms, self.settings)
            if not bool(loss.isfinite()):
                raise ContractError(f"the loss is {float(loss.detach())} in epoch {epoch}", fix="use a lower --rate")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # it has no annotations
            optimiser.step()
            values = {name: float(term.detach()) for name, term in {**terms, "": loss}.items()}
            sums = {name: sums.get(name, 0.0) + value / len(batches) for name, value in values.items()}
            self.reporter.progress(
                f"epoch {epoch} of {self.settings.epochs}, loss {values['']:.4f}", step, len(batches)
            )
        validation, recall = self._validation(student, data)
        return EpochResult(
            epoch=epoch,
            n=sum(map(len, batches)) * self.ranks.world,
            terms={name: value for name, value in sums.items() if name},
            loss=sums[""],
            validation_loss=validation,
            recall_sum=recall,
            seconds=time.perf_counter() - started,
        )

    def _batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """This process's batches; with several, what does not fill a batch of each is left out of this epoch."""
        world, rank, size = self.ranks.world, self.ranks.rank, self.settings.batch
        end = len(rows) if world == 1 else len(rows) // (size * world) * (size * world)
        if not end:
            raise InputError(
                f"{len(rows)} quadruples do not fill a batch of {world} processes", fix="use a smaller --batch"
            )
        for start in range(0, end, size * world):
            yield rows[start + rank * size : start + (rank + 1) * size]

    def _embedded(self, student: torch.nn.Module, data: TrainingData, rows: np.ndarray) -> MemberEmbeddings:
        lower = torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")
        with lower:
            found: MemberEmbeddings = student(*data.inputs(rows, self.device))
        return found

    @torch.no_grad()
    def _validation(self, student: torch.nn.Module, data: TrainingData) -> tuple[float, float]:
        """Loss and sum of six recalls at 1, percent, on what is held out; every process comes to the same."""
        plain = in_this_process(student).eval()
        rows, size = data.validation, self.settings.batch
        loss, parts = 0.0, []
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            parts.append(self._embedded(plain, data, some))
            loss += float(total(data.terms(parts[-1], some, self.settings.method), self.settings)) * len(some)
        members = [torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)]
        return loss / len(rows), recall_sum(*members)


def settings_for(spec: TrainSpec, request: TrainRequest) -> TrainingSettings:
    """The published settings, with what the recipe and then the user changed."""
    of_recipe = {name: value for name, value in dataclasses.asdict(spec).items() if value}
    of_user = {name: value for name, value in request.changed.items() if value is not None}
    return settings_of(request.method, **(of_recipe | of_user))


def recall_sum(
    safe_text: np.ndarray, unsafe_text: np.ndarray, safe_image: np.ndarray, unsafe_image: np.ndarray
) -> float:
    """Sum of recall at 1, percent, both ways: safe texts and images, safe texts and unsafe images, the other way round.

    Unsafe texts with unsafe images are left out, because they should not find each other.

    Args:
        safe_text: (n, d) float32, rows of length 1; row i of each argument is of one quadruple.
        unsafe_text: (n, d) float32, rows of length 1.
        safe_image: (n, d) float32, rows of length 1.
        unsafe_image: (n, d) float32, rows of length 1.
    """
    pairs = ((safe_text, safe_image), (safe_text, unsafe_image), (unsafe_text, safe_image))
    return sum(recalls(left, right)[1].value + recalls(right, left)[1].value for left, right in pairs)


def _take(state: State, result: EpochResult, settings: TrainingSettings, adapters: Adapters) -> None:
    """The published rule: waiting begins anew when loss or recall is better than in any epoch before."""
    best_loss = min((e.validation_loss for e in state.epochs), default=float("inf"))
    best_recall = max((e.recall_sum for e in state.epochs), default=float("-inf"))
    better = {"loss": result.validation_loss < best_loss, "recall": result.recall_sum > best_recall}
    state.waited = 0 if any(better.values()) else state.waited + 1
    if better[settings.best]:
        state.best_epoch, state.best = result.epoch, adapters.state()
    state.epochs.append(result)


def _line(result: EpochResult, best: bool) -> str:
    terms = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in result.terms.items())
    return (
        f"           epoch {result.epoch}: loss {result.loss:.4f} ({terms}); held out: loss {result.validation_loss:.4f}, "
        f"recalls {result.recall_sum:.1f}{'; best so far' if best else ''}; {result.seconds:.1f} s"
    )


def summary_of(record: TrainingRecord) -> Mapping[str, Any]:
    """What a person wants to know of a run."""
    best = record.epochs[record.best_epoch - 1]
    return {
        "method": record.settings.method.value,
        "base": f"{record.base.name} {record.base.weights_digest[:19]}",
        "trained weights": record.trained_weights_digest[:19],
        "data": f"{record.calibration.name}: {record.n_training} trained on, {record.n_validation} held out",
        "epochs": f"{len(record.epochs)}, best {record.best_epoch}{', stopped early' if record.stopped_early else ''}",
        "held out": f"loss {best.validation_loss:.4f}, sum of recalls {best.recall_sum:.1f}",
        "trained parameters": f"{record.trainable_parameters} of {record.parameters}",
        "seconds": f"{record.seconds:.1f} on {record.device}",
    }
