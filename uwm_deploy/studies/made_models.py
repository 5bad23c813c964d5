"""Makes the models of a comparison, each by the command that a user would give, and keeps what making it cost."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from uwm_deploy.bundle.layout import RunFolder
from uwm_deploy.errors import UwmError
from uwm_deploy.pipeline.request import Request
from uwm_deploy.recipes.resolve import read_training
from uwm_deploy.records.codec import plain_from_record, read_record, record_from_plain
from uwm_deploy.records.edit import EditRecord, ScoreRecord
from uwm_deploy.records.files import write_atomic
from uwm_deploy.records.model import Digest
from uwm_deploy.records.studies import MethodCost
from uwm_deploy.records.training import Trainer
from uwm_deploy.report.console import Reporter
from uwm_deploy.studies.comparison_rows import CompareRequest, MethodRow
from uwm_deploy.studies.own_process import Usage, run_measured
from uwm_deploy.studies.subjects import NOTHING, Subject

_COST = "cost.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeModel:
    """A model that can be measured, or the reason why there is none.

    Attributes:
        subject: None where the model could not be made.
        cost: None for a model that was not made here.
        reason: Why it could not be made.
    """

    label: str
    subject: Subject | None = None
    cost: MethodCost | None = None
    reason: str = ""


class ModelMaker:
    """Makes the models of all rows below one folder; what two rows share is trained once."""

    def __init__(self, request: CompareRequest, calibration: str, reporter: Reporter) -> None:
        self.request, self.calibration, self.reporter = request, calibration, reporter
        self._trained: dict[Trainer, MadeModel] = {}

    def made(self, row: MethodRow) -> MadeModel:
        """The model of one row; an error becomes its reason, because the rows before it may have taken hours."""
        if row.subject is not None:
            return MadeModel(label=row.label, subject=row.subject)
        if row.trainer is None and row.method == NOTHING:
            return MadeModel(label=row.label, subject=self._unedited(row.label))
        try:
            below = self._train(row.trainer) if row.trainer else None
            if below is not None and (row.method == NOTHING or below.subject is None):
                return dataclasses.replace(below, label=row.label)
            return self._edit(row, below)
        except UwmError as error:
            return MadeModel(label=row.label, reason=error.what)

    def _unedited(self, label: str) -> Subject:
        asked = self.request
        request = Request(
            checkpoint=asked.checkpoint, revision=asked.revision, device=asked.device, workers=asked.workers
        )
        return Subject(label=label, model=asked.model, request=request)

    def _train(self, trainer: Trainer) -> MadeModel:
        if trainer not in self._trained:
            work = self.request.work / trainer.value
            model = work / "model"
            words = ["train", trainer.value, *self._source(), "--out", str(model), *self.request.train_options]
            usage = self._run(trainer.value, words, work)
            record = read_training(model)
            assert record is not None
            cost = _cost(
                usage,
                gpu_seconds=record.seconds if record.device == "cuda" else 0.0,
                peak_gpu_bytes=record.peak_gpu_bytes,
                trainable_parameters=record.trainable_parameters,
                data_seen=record.examples_seen,
            )
            cost = _kept(work / _COST, cost, record.trained_weights_digest)
            subject = Subject(label=trainer.value, model=str(model))
            self._trained[trainer] = MadeModel(label=trainer.value, subject=subject, cost=cost)
        return self._trained[trainer]

    def _edit(self, row: MethodRow, below: MadeModel | None) -> MadeModel:
        work = self.request.work / row.label
        place = ["--placement", row.placement] if row.placement else []
        usage = self._run(row.label, ["edit", *self._source(below), "--method", row.method, *place], work)
        made = RunFolder(work)
        score = read_record(ScoreRecord, made.score_record)
        edit = read_record(EditRecord, made.edit_record)
        fitted = [step.axis.n_pairs for step in edit.steps if step.axis is not None]
        seen = sum(max(part.values(), default=0) for part in (score.n_pairs, *fitted))
        cost = _kept(work / _COST, _cost(usage, data_seen=seen), edit.edited_weights_digest)
        if below is not None and below.cost is not None:
            cost = _together(below.cost, cost, below.label)
        return MadeModel(label=row.label, subject=Subject(label=row.label, model=str(made.edited_model)), cost=cost)

    def _source(self, below: MadeModel | None = None) -> list[str]:
        """Options that say which model a command starts from, and on which set."""
        request = self.request
        words = ["--calibration", self.calibration, "--device", request.device, "--workers", str(request.workers)]
        if below is not None:
            assert below.subject is not None
            return ["--model", below.subject.model, *words]
        words = ["--model", request.model, *words]
        words += ["--checkpoint", str(request.checkpoint)] if request.checkpoint else []
        return words + (["--revision", request.revision] if request.revision else [])

    def _run(self, label: str, words: list[str], work: Path) -> Usage:
        self.reporter.line(f"compare    {label}")
        return run_measured([*words, "--work", str(work)])


def _cost(
    usage: Usage,
    *,
    data_seen: int,
    gpu_seconds: float = 0.0,
    peak_gpu_bytes: int = 0,
    trainable_parameters: int = 0,
) -> MethodCost:
    return MethodCost(
        seconds=usage.seconds,
        cpu_seconds=usage.cpu_seconds,
        peak_rss_bytes=usage.peak_rss_bytes,
        gpu_seconds=gpu_seconds,
        peak_gpu_bytes=peak_gpu_bytes,
        trainable_parameters=trainable_parameters,
        data_seen=data_seen,
    )


def _kept(path: Path, cost: MethodCost, weights: Digest) -> MethodCost:
    """The cost of making these weights: of the run that made them, not of a later one that reused them."""
    if path.is_file():
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["weights"] == weights:
            return record_from_plain(MethodCost, body["cost"], where=path.name)
    write_atomic(path, json.dumps({"weights": weights, "cost": plain_from_record(cost)}))
    return cost


def _together(first: MethodCost, second: MethodCost, label: str) -> MethodCost:
    """One after the other: time adds up, memory does not."""
    return MethodCost(
        seconds=first.seconds + second.seconds,
        cpu_seconds=first.cpu_seconds + second.cpu_seconds,
        peak_rss_bytes=max(first.peak_rss_bytes, second.peak_rss_bytes),
        gpu_seconds=first.gpu_seconds + second.gpu_seconds,
        peak_gpu_bytes=max(first.peak_gpu_bytes, second.peak_gpu_bytes),
        trainable_parameters=first.trainable_parameters,
        data_seen=first.data_seen + second.data_seen,
        includes=label,
    )
