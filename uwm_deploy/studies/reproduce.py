"""Published tables next to what this machine measures; what it lacks data or weights for is "not run", with the reason."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uwm_deploy.data.open import open_source
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.data.zero_shot_suite import DEMO_SETS, open_suite
from uwm_deploy.data.zero_shot_table import NAMES, PUBLISHED
from uwm_deploy.errors import InputError, PrerequisiteError, UwmError
from uwm_deploy.pipeline.request import Request
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.data_set import CalibrationSet
from uwm_deploy.recipes.published import PublishedRow, PublishedTable, published, published_outputs
from uwm_deploy.recipes.resolve import calibration_set_of, recipe_of
from uwm_deploy.records.edit import Method, methods_name
from uwm_deploy.records.metrics import SafetyReport
from uwm_deploy.records.reproduction import Agreement, ReproducedNumber, ReproducedRow, Reproduction
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.paper_table import MEAN, mean_of, proportion_of
from uwm_deploy.studies.encoders import open_encoders
from uwm_deploy.studies.evaluate import Evaluator
from uwm_deploy.studies.evaluation_sets import EvaluationSets
from uwm_deploy.studies.published_outputs import reproduced_outputs
from uwm_deploy.studies.subjects import NOTHING, Subject

_SIZES = {part.name: part.size for part in PUBLISHED}
_ROUNDING = 1e-9

MAX_ABSENT_SHARE = 0.01
"""Quadruples without an image, of which more make the measured numbers another set's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproduceSettings:
    """What the user has and wants.

    Attributes:
        demo: The same code on the demo model and its sets, for which nothing is published.
        calibration: Set that edits are made from, instead of the table's.
        evaluation: Set of quadruples, instead of the table's.
        data: Folder of the zero-shot sets.
        checkpoints: Recipe to a folder with its weights.
        download: Whether missing weights may be fetched.
        work: Run folders of edits are made in it.
        downstream: Row of a table of captions or pictures to the report that it is read from.
    """

    demo: bool = False
    calibration: str | None = None
    evaluation: str | None = None
    data: Path | None = None
    checkpoints: Mapping[str, Path] = field(default_factory=dict)
    download: bool = False
    work: Path | None = None
    downstream: Mapping[str, Path] = field(default_factory=dict)
    device: str = "auto"
    workers: int = 2


def reproduce(name: str, settings: ReproduceSettings, reporter: Reporter) -> Reproduction:
    """Measures every row of a published table that can be measured here.

    Raises:
        InputError: If there is no such table, or a set that the user named cannot be opened.
        UwmError: If an edit breaks its contract.
    """
    tables, outputs = published(), published_outputs()
    if name in outputs:
        return reproduced_outputs(name, outputs[name], settings.downstream)
    if name not in tables:
        names = [*tables, *outputs]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names
        raise InputError(f"no published table is named {name!r}", fix=f"nearest: {', '.join(near)}")
    table = _demo_table(tables[name]) if settings.demo else tables[name]
    measured = _MeasuredTable(table, settings, reporter)
    rows = tuple(measured.row(row) for row in table.rows)
    return Reproduction(table=name, title=table.title, source=table.source, note=table.note, rows=rows)


def _demo_table(table: PublishedTable) -> PublishedTable:
    """The same columns for the demo model, with its own zero-shot sets; nothing is published for it."""
    kept = [column for column in table.columns if column not in NAMES]
    columns = (*DEMO_SETS, *kept) if len(kept) < len(table.columns) else tuple(kept)
    rows = [
        PublishedRow(label=label, model="demo", method=method, values=())
        for label, method in (
            ("demo", NOTHING),
            ("demo + UWM", Method.UWM.value),
            ("demo + UWM + safety axis", methods_name((Method.UWM, Method.SAFETY_AXIS))),
        )
    ]
    return dataclasses.replace(
        table,
        title=f"{table.title}: the same code on the demo",
        source="nothing is published for the demo",
        note="the demo shows that the command works; its numbers say nothing about the paper's",
        calibration="demo",
        evaluation="demo-test" if table.evaluation else "",
        columns=columns,
        rows=tuple(rows),
    )


class _MeasuredTable:
    """What all rows of one table are measured on."""

    def __init__(self, table: PublishedTable, settings: ReproduceSettings, reporter: Reporter) -> None:
        self.table, self.settings, self.reporter = table, settings, reporter
        self.calibration = settings.calibration or table.calibration
        if settings.calibration:
            calibration_set_of(settings.calibration)
        self.no_quadruples: UwmError | None = None
        self.not_whole = ""
        suite = open_suite(_sets_of(table), data=settings.data)
        sets = EvaluationSets(
            name=settings.evaluation or table.evaluation or table.title, source=self._source(), suite=suite
        )
        self.evaluator = Evaluator(sets, workers=settings.workers, reporter=reporter)

    def _source(self) -> QuadrupleSource | None:
        """The quadruples; None with the reason noted when the table's set is not here."""
        if not self.table.evaluation:
            return None
        try:
            spec, _, base = calibration_set_of(self.settings.evaluation or self.table.evaluation)
            source = open_source(dataclasses.replace(spec, zero_shot=()), base=base)
        except (InputError, PrerequisiteError) as error:
            if self.settings.evaluation:
                raise
            self.no_quadruples = error
            return None
        if not self.settings.demo:
            self.not_whole = self._why_not_whole(spec, source)
        return source

    def _why_not_whole(self, spec: CalibrationSet, source: QuadrupleSource) -> str:
        """Why the quadruples are not those that the published numbers are of; empty when they are."""
        if self.settings.evaluation and spec.name != self.table.evaluation:
            return f"measured on {spec.name}, published for {self.table.evaluation}"
        if spec.limit or spec.per_concept:
            return f"a sample of {spec.name}"
        absent = sum(source.record.left_out_counts.values())
        if absent > MAX_ABSENT_SHARE * (absent + len(source)):
            return f"{absent} of {absent + len(source)} items of {spec.name} are not here"
        return ""

    def row(self, row: PublishedRow) -> ReproducedRow:
        """Measures one row."""
        not_run = ReproducedRow(label=row.label, model=row.model, method=row.method, cells=())
        sets = self.evaluator.sets
        if sets.source is None and not sets.suite.sets:
            if self.no_quadruples:
                return dataclasses.replace(not_run, reason=self.no_quadruples.what, fix=self.no_quadruples.fix)
            reasons = ", ".join(dict.fromkeys(sets.suite.missing.values()))
            return dataclasses.replace(not_run, reason=reasons, fix="see docs/reference/zero-shot.md")
        try:
            report = self.evaluator.measure(open_encoders(self._subject(row), self.reporter))
        except (InputError, PrerequisiteError) as error:  # the rows before it may have taken hours
            return dataclasses.replace(not_run, reason=error.what, fix=error.fix)
        tolerance = self.table.tolerance if row.method == NOTHING else self.table.edited_tolerance
        cells = [
            self._cell(report, column, row.values[i] if row.values else None, tolerance[i] if row.values else None)
            for i, column in enumerate(self.table.columns)
        ]
        return dataclasses.replace(not_run, cells=tuple(cells))

    def _subject(self, row: PublishedRow) -> Subject:
        work = self.settings.work / f"{row.model}-{row.method}" if self.settings.work else None
        request = Request(
            checkpoint=self._checkpoint(row.model),
            calibration=self.calibration,
            evaluation=self.calibration,  # an edit reads no evaluation set, and the table's may not be here
            work=work,
            device=self.settings.device,
            workers=self.settings.workers,
        )
        return Subject(label=row.label, model=row.model, method=row.method, request=request)

    def _checkpoint(self, model: str) -> Path:
        if model in self.settings.checkpoints:
            return self.settings.checkpoints[model]
        source = recipe_of(model)[0].model
        try:
            return resources.checkpoint_folder(
                source.repo, source.revision, family=source.family, local_only=not self.settings.download
            )
        except (InputError, PrerequisiteError) as error:
            if self.settings.download or not source.revision:
                raise
            raise PrerequisiteError(
                f"the weights {source.repo}@{source.revision[:12]} are not on this machine",
                fix="pass --download, or --checkpoint RECIPE=FOLDER",
            ) from error

    def _cell(
        self, report: SafetyReport, column: str, value: float | None, tolerance: float | None
    ) -> ReproducedNumber:
        cell = ReproducedNumber(
            column=column, published=value, tolerance=tolerance, measured=None, result=Agreement.NOT_RUN
        )
        found, why = proportion_of(report, column), self._incomparable(report, column)
        if column == MEAN:
            mean = mean_of(report)
            cell = dataclasses.replace(cell, measured=mean.value, n=mean.ran)
        elif found is not None:
            cell = dataclasses.replace(cell, measured=found.value, low=found.low, high=found.high, n=found.n)
        if cell.measured is None:
            reason = self.no_quadruples.what if self.no_quadruples else ""
            if column == MEAN:
                reason = "none of the sets is here"
            return dataclasses.replace(cell, reason=report.zero_shot_missing.get(column, reason))
        if value is None or tolerance is None or why:
            return dataclasses.replace(cell, result=Agreement.NOT_COMPARABLE, reason=why or "nothing is published")
        within = abs(cell.measured - value) <= tolerance + _ROUNDING
        return dataclasses.replace(cell, result=Agreement.WITHIN if within else Agreement.OUTSIDE)

    def _incomparable(self, report: SafetyReport, column: str) -> str:
        """Why a measured number is not of the items the published one is of; empty when it is."""
        if self.settings.demo:
            return "nothing is published for the demo"
        if column != MEAN and column not in report.zero_shot:
            return self.not_whole
        if column == MEAN and not (mean := mean_of(report)).complete:
            return f"{mean.ran} of {mean.asked} sets"
        for name in report.zero_shot if column == MEAN else [column]:
            n = report.zero_shot[name].n
            if n != _SIZES.get(name, n):
                return f"{name} has {n} items here, {_SIZES[name]} when it is whole"
        return ""


def _sets_of(table: PublishedTable) -> Sequence[str]:
    """The zero-shot sets that the columns need."""
    named = [column for column in table.columns if column in NAMES or column in DEMO_SETS]
    whole = DEMO_SETS if any(row.model == "demo" for row in table.rows) else NAMES
    return named or (whole if MEAN in table.columns else ())


def checkpoints_from(texts: Sequence[str]) -> dict[str, Path]:
    """Parses ``RECIPE=FOLDER``.

    Raises:
        InputError: If one is not of that form, or names no recipe or no folder.
    """
    found: dict[str, Path] = {}
    for text in texts:
        recipe, equals, folder = text.partition("=")
        if not equals or not folder:
            raise InputError(f"--checkpoint {text!r} is not understood", fix="write RECIPE=FOLDER")
        if recipe not in resources.names("export"):
            raise InputError(f"--checkpoint {text!r}: no recipe is named {recipe!r}", fix="see uwm-deploy models")
        if not Path(folder).is_dir():
            raise InputError(f"--checkpoint {text!r}: there is no such folder", fix="check the path")
        found[recipe] = Path(folder)
    return found
