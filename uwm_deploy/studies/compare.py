"""Every safety method on one model and one set: made in a process of its own, measured on the same items, with its cost."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from uwm_deploy.data.open import open_source
from uwm_deploy.data.zero_shot_suite import names_from
from uwm_deploy.edits.methods import methods_from_name
from uwm_deploy.errors import ExitCode, InputError, PrerequisiteError, UwmError
from uwm_deploy.pipeline.request import Request, resolved_recipe
from uwm_deploy.pipeline.run import load_source
from uwm_deploy.recipes.resolve import calibration_set_of, read_training
from uwm_deploy.records.codec import (
    json_from_record,
    plain_from_record,
    read_record,
    record_from_plain,
    write_record,
)
from uwm_deploy.records.edit import CLOSED_FORM, EditRecord, Method, Placement, ScoreRecord
from uwm_deploy.records.files import locked, whole_folder, write_atomic
from uwm_deploy.records.metrics import Flips
from uwm_deploy.records.studies import ComparedMethod, MethodComparison, MethodCost
from uwm_deploy.records.training import Trainer
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.paper_table import COLUMNS, PRICE_COLUMNS, cell, markdown_table, notes, price_cell
from uwm_deploy.runtime.machine import machine
from uwm_deploy.runtime.versions import versions
from uwm_deploy.safeground.outcomes import flips_since
from uwm_deploy.safeground.preference import METRICS
from uwm_deploy.safeground.tradeoff import pareto, zero_shot_mean
from uwm_deploy.studies.evaluate import NOTHING, Evaluator, Subject, ground_of, open_encoders, subject_from

DEFAULT = "none,uwm,gradient-unsafe,gradient-safe-clip,safe-clip,safer-clip,uwm+safe-clip"
"""The methods of the field that run on any set of quadruples."""

SHOWN = ("PS", "PU", "GS", "P_ts", "P_tu", "P_vs", "P_vu")
"""Metrics whose change is said with its interval."""

PRICE_SHOWN = {
    "safe@1": "safe_retrieval@1",
    "safe@10": "safe_retrieval@10",
    "hard safe@10": "hard_safe_retrieval@10",
    "unsafe first Tu": "unsafe-first-text",
    "unsafe first Vu": "unsafe-first-image",
}
"""Column to a change of retrieval that is said with its interval."""

_MARKS = "os^Dv*Pp"
"""Shapes in the picture: nothing is told by colour alone."""

_COST = "cost.json"
_PACKAGES = ("torch", "transformers", "peft", "numpy", "pillow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One row.

    Attributes:
        trainer: Trained first, or nothing.
        method: Edit that is made on that or on the model itself; `none` makes nothing.
        placement: Of a closed-form step, where another than the usual one is asked for.
        subject: A model that is there already, instead of all this.
    """

    label: str
    trainer: Trainer | None = None
    method: str = NOTHING
    placement: str = ""
    subject: Subject | None = None


def wanted_from(text: str) -> list[Wanted]:
    """Rows of ``none,uwm,safe-clip,uwm+safe-clip,LABEL=MODEL[:METHOD]``.

    Raises:
        InputError: If one is not understood, or two have one label.
    """
    rows = [_wanted(part.strip()) for part in text.split(",") if part.strip()]
    labels = [row.label for row in rows]
    if not rows or len(set(labels)) < len(labels):
        raise InputError(f"--methods {text!r} names nothing, or a row twice", fix="name every method once")
    return rows


def _wanted(text: str) -> Wanted:
    if "=" in text:
        subject = subject_from(text)
        return Wanted(label=subject.label, subject=subject)
    placed, _, placement = text.partition("@")
    parts = placed.split("+")
    trainers = [Trainer(part) for part in parts if part in list(Trainer)]
    edits = "+".join(part for part in parts if part not in list(Trainer)) or NOTHING
    known = [m.value for m in Method if m is not Method.TRAINED]
    closed = edits.rpartition("+")[2] in CLOSED_FORM
    understood = (
        (closed or not placement)
        and len(trainers) <= 1
        and set(edits.split("+")) <= set(known)
        and placement in ("", *Placement)
    )
    if not understood or (trainers and len(parts) > 1 and edits == NOTHING):
        raise InputError(
            f"--methods: {text!r} is not understood",
            fix=f"use {', '.join([*known, *Trainer])}, steps on each other such as uwm+safety-axis or uwm+safe-clip, "
            "safety-axis@embedding for the other placement, or LABEL=MODEL",
        )
    try:
        methods_from_name(edits)
    except InputError as error:
        raise InputError(f"--methods: {error.what}", fix=error.fix) from error
    return Wanted(label=text, trainer=trainers[0] if trainers else None, method=edits, placement=placement)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareRequest:
    """What the user asked for; None takes the recipe's value.

    Attributes:
        rows: The first one is what the others are compared with.
        work: Models are made below it, and reused by the next run.
        out: Folder for the tables and the picture.
        train_options: Further words for every `train` command.
    """

    rows: Sequence[Wanted]
    out: Path
    work: Path
    model: str = "demo"
    checkpoint: Path | None = None
    revision: str | None = None
    calibration: str | None = None
    evaluation: str | None = None
    zero_shot: Sequence[str] | None = None
    data: Path | None = None
    device: str = "auto"
    workers: int = 2
    train_options: tuple[str, ...] = ()


def run_compare(methods: str, *, as_json: bool, work: Path | None, out: Path | None, **options: Any) -> int:
    """The command: measures, prints, and says where the files are."""
    from uwm_deploy.report.summary import print_rows

    options["zero_shot"] = names_from(options["zero_shot"]) if options["zero_shot"] else None
    work = work or Path(".uwm") / resolved_recipe(Request(model=options["model"])).name / "compare"
    folder = out or work / "report"
    result = compare(CompareRequest(rows=wanted_from(methods), work=work, out=folder, **options), Reporter())
    if as_json:
        click.echo(json_from_record(result), nl=False)
        return exit_code_of(result)
    tables = (table_rows, price_rows, change_rows, price_change_rows, cost_rows)
    for rows in (make(result) for make in tables):
        print_rows(rows)
    click.echo("\n".join([*lines_of(result), f"tables and picture: {folder}"]))
    return exit_code_of(result)


def compare(request: CompareRequest, reporter: Reporter) -> MethodComparison:
    """Makes, measures and writes.

    Raises:
        InputError: If calibration and evaluation are one set, or there is no such set.
        PrerequisiteError: If no row could run.
        UwmError: If a model cannot be measured.
    """
    asked = Request(
        model=request.model, checkpoint=request.checkpoint, revision=request.revision, device=request.device
    )
    recipe = resolved_recipe(asked)
    calibration, evaluation = (
        request.calibration or recipe.data.calibration,
        request.evaluation or recipe.data.evaluation,
    )
    _check_apart(calibration, evaluation)
    with locked(request.work):
        maker = _Maker(request, calibration, reporter)
        made = [maker.made(row) for row in request.rows]
        whole = Subject(label="", model=request.model, request=asked)
        ground = ground_of(evaluation, request.zero_shot, data=request.data, default=whole)
        evaluator = Evaluator(ground, workers=request.workers, reporter=reporter, with_items=True)
        rows: list[ComparedMethod] = []
        for row in made:
            first = next((found.safety for found in rows if found.safety is not None), None)
            rows.append(_measured(row, evaluator, reporter, first))
    if not any(row.safety for row in rows):
        raise PrerequisiteError(f"no method could run: {rows[0].reason}", fix="see `uwm-deploy doctor`")
    result = MethodComparison(
        model=load_source(asked, reporter).ref,
        calibration=calibration,
        measured_on=ground.name,
        n=len(ground.source) if ground.source else 0,
        rows=tuple(rows),
        machine=machine(),
        versions=versions(_PACKAGES),
    )
    with whole_folder(request.out) as folder:
        write(result, folder)
    return result


def _check_apart(calibration: str, evaluation: str) -> None:
    """What a method was made on says nothing about it."""
    sets = []
    for name in (calibration, evaluation):
        spec, _, base = calibration_set_of(name)
        sets.append(set(open_source(dataclasses.replace(spec, zero_shot=()), base=base).ids))
    if common := sets[0] & sets[1]:
        raise InputError(
            f"{calibration} and {evaluation} share {len(common)} items", fix="measure on another set by --evaluation"
        )


@dataclass(frozen=True, slots=True)
class _Made:
    """A model that can be measured, or the reason why there is none."""

    label: str
    subject: Subject | None
    cost: MethodCost | None
    reason: str = ""


class _Maker:
    """Makes the models of all rows below one folder."""

    def __init__(self, request: CompareRequest, calibration: str, reporter: Reporter) -> None:
        self.request, self.calibration, self.reporter = request, calibration, reporter
        self._trained: dict[Trainer, _Made] = {}

    def made(self, row: Wanted) -> _Made:
        """One row; what cannot be made has a reason, because the rows before it may have taken hours."""
        request = Request(
            checkpoint=self.request.checkpoint, revision=self.request.revision, device=self.request.device
        )
        if row.subject is not None:
            return _Made(row.label, row.subject, None)
        if row.trainer is None and row.method == NOTHING:
            whole = dataclasses.replace(request, workers=self.request.workers)
            return _Made(row.label, Subject(label=row.label, model=self.request.model, request=whole), None)
        try:
            below = self._train(row.trainer) if row.trainer else None
            if row.method == NOTHING:
                assert below is not None
                return dataclasses.replace(below, label=row.label)
            return (
                self._edit(row, below)
                if below is None or below.subject
                else dataclasses.replace(below, label=row.label)
            )
        except UwmError as error:
            return _Made(row.label, None, None, error.what)

    def _train(self, trainer: Trainer) -> _Made:
        if trainer not in self._trained:
            work = self.request.work / trainer.value
            model = work / "model"
            words = ["train", trainer.value, *self._source(), "--out", str(model), *self.request.train_options]
            usage = self._run(trainer.value, words, work)
            record = read_training(model)
            assert record is not None
            gpu = record.device == "cuda"
            cost = MethodCost(
                **usage,
                gpu_seconds=record.seconds if gpu else 0.0,
                peak_gpu_bytes=record.peak_gpu_bytes,
                trainable_parameters=record.trainable_parameters,
                data_seen=record.examples_seen,
            )
            cost = _kept(work / _COST, cost, record.trained_weights_digest)
            self._trained[trainer] = _Made(trainer.value, Subject(label=trainer.value, model=str(model)), cost)
        return self._trained[trainer]

    def _edit(self, row: Wanted, below: _Made | None) -> _Made:
        work = self.request.work / row.label
        source = self._source() if below is None else self._source(below)
        place = ["--placement", row.placement] if row.placement else []
        usage = self._run(row.label, ["edit", *source, "--method", row.method, *place], work)
        score = read_record(ScoreRecord, work / "score" / "score.json")
        edit = read_record(EditRecord, work / "edit" / "edit.json")
        fitted = [s.axis.n_pairs for s in edit.steps if s.axis is not None]
        seen = sum(max(part.values(), default=0) for part in (score.n_pairs, *fitted))
        cost = MethodCost(**usage, gpu_seconds=0.0, peak_gpu_bytes=0, trainable_parameters=0, data_seen=seen)
        cost = _kept(work / _COST, cost, edit.edited_weights_digest)
        if below is not None and below.cost is not None:
            cost = _together(below.cost, cost, below.label)
        return _Made(row.label, Subject(label=row.label, model=str(work / "edit" / "model")), cost)

    def _source(self, below: _Made | None = None) -> list[str]:
        request = self.request
        words = ["--calibration", self.calibration, "--device", request.device, "--workers", str(request.workers)]
        if below is not None:
            assert below.subject is not None
            return ["--model", below.subject.model, *words]
        words = ["--model", request.model, *words]
        words += ["--checkpoint", str(request.checkpoint)] if request.checkpoint else []
        return words + (["--revision", request.revision] if request.revision else [])

    def _run(self, label: str, words: list[str], work: Path) -> dict[str, Any]:
        """One command in a process of its own, so that its memory is its own; what it used.

        Raises:
            UwmError: If it ends with an error, which it has said itself.
        """
        command = [sys.executable, "-m", "uwm_deploy.cli", *words, "--work", str(work)]
        root = str(Path(__file__).resolve().parents[2])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        }
        self.reporter.line(f"compare    {label}")
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)  # noqa: S603 -- this program
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.terminate()
            child.wait()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise PrerequisiteError(
                f"`uwm-deploy {' '.join(words[:2])}` ended with exit code {child.returncode}; its error is above",
                fix="run it alone",
            )
        return {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_rss_bytes": usage.ru_maxrss * 1024,
        }


def _kept(path: Path, cost: MethodCost, weights: str) -> MethodCost:
    """The cost of making these weights: of the run that made them, not of one that found them there."""
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


def _measured(made: _Made, evaluator: Evaluator, reporter: Reporter, first: Any) -> ComparedMethod:
    if made.subject is None:
        return ComparedMethod(
            label=made.label, weights_digest="", safety=None, change={}, cost=None, reason=made.reason
        )
    encoders = open_encoders(made.subject, reporter)
    report = dataclasses.replace(evaluator.measure(encoders), subject=made.label)
    change: Mapping[str, Flips] = {}
    if first is not None:
        change = {name: _without_ids(part) for name, part in flips_since(first, report).items()}
    return ComparedMethod(
        label=made.label, weights_digest=encoders.weights_digest, safety=report, change=change, cost=made.cost
    )


def _without_ids(part: Flips) -> Flips:
    return dataclasses.replace(part, lost_ids=(), gained_ids=())


# --- what a person reads ------------------------------------------------------------------------------------------------


def table_rows(result: MethodComparison) -> list[dict[str, str]]:
    """The paper's columns, one row per method."""
    return [
        {"method": row.label, **{c: cell(row.safety, c) if row.safety else "not run" for c in COLUMNS}}
        for row in result.rows
    ]


def price_rows(result: MethodComparison) -> list[dict[str, str]]:
    """Hard safe queries, what unsafe queries find first, neighbours and spread."""
    return [
        {"method": row.label, **{c: price_cell(row.safety, c) for c in PRICE_COLUMNS}}
        for row in result.rows
        if row.safety
    ]


def interval_rows(result: MethodComparison) -> list[dict[str, str]]:
    """The nine metrics with their 95% intervals."""
    return [
        {
            "method": row.label,
            **{
                name: f"{p.value:.1f} ({p.low:.1f} to {p.high:.1f})"
                for name in METRICS
                for p in [row.safety.preference[name]]
            },
        }
        for row in result.rows
        if row.safety
    ]


def change_rows(result: MethodComparison) -> list[dict[str, str]]:
    """Change against the first row, on the same items, with the paired 95% interval."""
    base = _first(result)
    return [
        {
            "method": row.label,
            **{name: _change(row.change[name]) for name in SHOWN},
            "zero-shot mean": _signed(_mean_change(base, row)),
        }
        for row in result.rows
        if row.change
    ]


def price_change_rows(result: MethodComparison) -> list[dict[str, str]]:
    """Change of retrieval against the first row, on the same items, with the paired 95% interval; nothing without any."""
    return [
        {"method": row.label, **{head: _change(row.change.get(name)) for head, name in PRICE_SHOWN.items()}}
        for row in result.rows
        if any(name in row.change for name in PRICE_SHOWN.values())
    ]


def _change(f: Flips | None) -> str:
    return f"{f.delta:+.1f} ({f.delta_low:+.1f} to {f.delta_high:+.1f})" if f else "-"


def cost_rows(result: MethodComparison) -> list[dict[str, str]]:
    """What each took."""
    rows = []
    for row in result.rows:
        cost = row.cost
        rows.append(
            {
                "method": row.label,
                "CPU s": f"{cost.cpu_seconds:.0f}" if cost else "-",
                "wall s": f"{cost.seconds:.0f}" if cost else "-",
                "GPU s": f"{cost.gpu_seconds:.0f}" if cost and cost.gpu_seconds else "-",
                "memory MiB": f"{cost.peak_rss_bytes >> 20}" if cost else "-",
                "GPU memory MiB": f"{cost.peak_gpu_bytes >> 20}" if cost and cost.peak_gpu_bytes else "-",
                "trained parameters": str(cost.trainable_parameters) if cost else "-",
                "quadruples seen": str(cost.data_seen) if cost else "-",
            }
        )
    return rows


def findings(result: MethodComparison) -> list[str]:
    """What the table says, method by method, in words; a change whose interval holds 0 is none."""
    lines = [f"not run: {row.label}: {row.reason}" for row in result.rows if row.safety is None]
    base = _first(result)
    for row in result.rows:
        if not row.change:
            continue
        words = [f"{name} {_word(row.change[name])}" for name in ("PS", "PU", "GS")]
        mean = _mean_change(base, row)
        words += [f"zero-shot mean {mean:+.1f}"] if not math.isnan(mean) else []
        lines.append(f"{row.label}: {', '.join(words)}")
    if (trained := [row for row in result.rows if row.change and row.label in list(Trainer)]) and base is not None:
        lower = [row.label for row in trained if row.change["PS"].delta_high < 0]
        shows = f"shows for {', '.join(lower)}" if lower else "does not show"
        lines.append(f"training lowers safety on safe inputs (PS): {shows}")
    return lines


def _word(f: Flips) -> str:
    text = f"{f.delta:+.1f} ({f.delta_low:+.1f} to {f.delta_high:+.1f})"
    return text if f.delta_low > 0 or f.delta_high < 0 else f"{text}, not told from 0"


def _first(result: MethodComparison) -> ComparedMethod | None:
    return next((row for row in result.rows if row.safety is not None), None)


def _mean_change(base: ComparedMethod | None, row: ComparedMethod) -> float:
    if base is None or base.safety is None or row.safety is None:
        return math.nan
    return zero_shot_mean(row.safety) - zero_shot_mean(base.safety)


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.1f}"


def lines_of(result: MethodComparison) -> list[str]:
    """What stands below the tables."""
    reports = [row.safety for row in result.rows if row.safety]
    machine = ", ".join(f"{key} {value}" for key, value in result.machine.items() if value)
    included = [
        f"{row.label} holds the cost of {row.cost.includes}" for row in result.rows if row.cost and row.cost.includes
    ]
    made = f"all made on {result.calibration} from {result.model.name}; cost of the whole command each ({machine})"
    return [*notes(reports), "; ".join([made, *included]), *findings(result)]


def markdown_of(result: MethodComparison) -> str:
    """All tables and the lines below them."""
    base = _first(result)
    parts = [
        f"# Methods on {result.measured_on}",
        markdown_table(table_rows(result)),
        "Safe queries that look unsafe, what unsafe queries find first, and what became of neighbours and spread:",
        markdown_table(price_rows(result)),
        f"Change against {base.label if base else '-'} on the same items, with the paired 95% interval:",
        markdown_table(change_rows(result)) if any(row.change for row in result.rows) else "",
        markdown_table(price_change_rows(result)) if price_change_rows(result) else "",
        "SafeGround with 95% Wilson intervals:",
        markdown_table(interval_rows(result)),
        "Cost:",
        markdown_table(cost_rows(result)),
        "\n".join(f"- {line}" for line in lines_of(result)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(result: MethodComparison, folder: Path) -> None:
    """JSON, Markdown and the picture."""
    write_record(folder / "compare.json", result)
    (folder / "compare.md").write_text(markdown_of(result), encoding="utf-8")
    draw(result, folder / "compare.png")


def draw(result: MethodComparison, path: Path) -> None:
    """Safety gained against knowledge kept, for all inputs and for safe ones alone; what nothing beats is ringed."""
    from matplotlib.figure import Figure

    base = _first(result)
    rows = [row for row in result.rows if row.safety is not None]
    kept = [_mean_change(base, row) for row in rows]
    known = not any(math.isnan(value) for value in kept)
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("GS", "PS"), strict=True):
        gained = [row.change[metric].delta if row.change else 0.0 for row in rows]
        xs = kept if known else [0.0] * len(rows)
        axes.axhline(0, color="0.8", linewidth=1, zorder=0)
        axes.axvline(0, color="0.8", linewidth=1, zorder=0)
        for i, (x, y, row) in enumerate(zip(xs, gained, rows, strict=True)):
            if row.change:
                low, high = row.change[metric].delta_low, row.change[metric].delta_high
                axes.plot([x, x], [low, high], color="0.7", linewidth=1, zorder=1)
            axes.scatter([x], [y], s=36, marker=_MARKS[i % len(_MARKS)], label=row.label, zorder=2)
        front = pareto(list(zip(xs, gained, strict=True)))
        axes.scatter(
            [xs[i] for i in front], [gained[i] for i in front], s=110, facecolors="none", edgecolors="0.4", zorder=3
        )
        axes.set_xlabel("zero-shot mean, change in points" if known else "no zero-shot set")
        axes.set_ylabel(f"{metric}, change in points, 95% interval")
    figure.axes[0].legend(fontsize=8, loc="best")
    figure.suptitle(f"{result.model.name} on {result.measured_on} (n = {result.n}); ringed: not beaten in both")
    figure.savefig(path, dpi=130, metadata={"Software": None})


def exit_code_of(result: MethodComparison) -> ExitCode:
    """6 when a row could not run, which is no comparison of what was asked for."""
    return ExitCode.ENVIRONMENT if any(row.safety is None for row in result.rows) else ExitCode.PASS
