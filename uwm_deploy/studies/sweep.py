"""Many edits from one scoring pass: each point measured, the trade-off drawn, one point picked by a stated rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uwm_deploy.data.embedding import prepare
from uwm_deploy.data.open import open_source
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.edits.methods import selects
from uwm_deploy.edits.score_files import concepts_of
from uwm_deploy.errors import InputError, UwmError
from uwm_deploy.pipeline.plan import plan_of
from uwm_deploy.pipeline.request import Request, resolved_recipe
from uwm_deploy.pipeline.run import Run
from uwm_deploy.recipes.recipe import Recipe
from uwm_deploy.recipes.resolve import calibration_set_of
from uwm_deploy.records.edit import FitRecord, Method, ScoreRecord
from uwm_deploy.records.files import whole_folder
from uwm_deploy.records.metrics import SafetyReport
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.studies import SweepPoint, SweepReport
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.study_files import write_sweep
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.embedded import safety_report, yardstick_of
from uwm_deploy.safeground.tradeoff import PICKED_METRIC, gain, zero_shot_mean
from uwm_deploy.stages.verify.verify import embed_model
from uwm_deploy.studies.sweep_values import KEEP_MASSES, LOSSES, keep_masses_of
from uwm_deploy.studies.swept_edits import edited_points, strength_points
from uwm_deploy.towers.protocol import LoadedModel


def sweep(
    request: Request,
    *,
    keep_masses: Sequence[float] | None,
    factors: Sequence[float] | None,
    on: str | None,
    max_drop: float | None,
    out: Path,
    reporter: Reporter,
    losses: Sequence[float] | None = None,
) -> SweepReport:
    """Scores or fits once, or reuses that; then measures every point, and writes tables, picture and JSON.

    Args:
        request: Model, method, calibration set and where to work.
        losses: Of an edit with a closed-form step: points of safe retrieval that each choice of its strength may lose;
            `LOSSES` without it.
        keep_masses: See `keep_masses_of`; `KEEP_MASSES` without it.
        factors: Multipliers of the selected entries; those of the recipe or the method without it.
        on: Set that is measured; the calibration set without it.
        max_drop: With it a point is picked: highest GS among those that lose at most so many points of zero-shot mean.
        out: Folder for `sweep.json`, `sweep.csv`, `sweep.md` and `sweep.png`.
        reporter: Progress.

    Raises:
        InputError: If a point is to be picked on the evaluation set, or on a set without zero-shot sets; if the method
            selects nothing.
    """
    recipe = resolved_recipe(request)
    values = _values_of(recipe, keep_masses, factors, losses)
    measured_on = on or recipe.data.calibration
    source = _open(measured_on)
    if max_drop is not None:
        _check_may_pick(source, recipe.data.evaluation)
    if recipe.closed_form is not None and on is None:
        reporter.line("sweep      note: measured on the pairs that the strengths are made from; --on names another set")
    made = Run(plan_of(request), reporter).until("fit")
    score, model = made.outcome.left(ScoreRecord), made.models.original
    with reporter.stage("sweep", f"{values.count} points on {measured_on}"):
        measuring = _Measuring(model, source, request.workers, reporter)
        if recipe.closed_form is not None:
            points = _strengths(made, values, measuring)
        else:
            points = _entries(made, score, values, measuring)
        report = SweepReport(
            model=model.ref,
            measured_on=source.record,
            scores_digest=score.scores_digest,
            original=measuring.original,
            points=points,
            rule="" if max_drop is None else rule_text(max_drop),
            picked=None if max_drop is None else pick(measuring.original, points, max_drop),
            method=recipe.method,
            selection={tower.value: recipe.entries.of(tower).selection for tower in TowerName},
            concepts=concepts_of(score),
        )
        with whole_folder(out) as folder:
            write_sweep(report, folder)
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class _Values:
    """What the points differ in: `losses` for a safety axis, the others for an edit that selects entries."""

    keep_masses: tuple[float, ...] = ()
    factors: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()

    @property
    def count(self) -> int:
        """Number of points that are asked for."""
        return len(self.losses) or len(self.keep_masses) * len(self.factors)


def _values_of(
    recipe: Recipe,
    keep_masses: Sequence[float] | None,
    factors: Sequence[float] | None,
    losses: Sequence[float] | None,
) -> _Values:
    """What was asked for, or the defaults of the method's strength; what is given must be of that strength."""
    closed, entries = recipe.closed_form, recipe.entries
    if closed.method is not Method.SAFETY_AXIS if closed else not selects(entries.method):
        raise InputError(f"method {recipe.method} has no strength that could be swept", fix="choose another --method")
    unused = [keep_masses, factors] if closed else [losses]
    if any(part is not None for part in unused):
        options = "--keep-mass and --factor" if closed else "--max-retrieval-loss"
        raise InputError(f"a sweep of method {recipe.method} has no use for {options}", fix="leave it out")
    if closed:
        return _Values(losses=tuple(losses or LOSSES))
    return _Values(
        keep_masses=tuple(keep_masses or keep_masses_of(KEEP_MASSES)),
        factors=tuple(factors or dict.fromkeys((entries.text.factor, entries.image.factor))),
    )


class _Measuring:
    """Measures one edit after the other on the same inputs, against the model before its edit."""

    def __init__(self, model: LoadedModel, source: QuadrupleSource, workers: int, reporter: Reporter) -> None:
        self.reporter = reporter
        tokenizer = Tokenizer(model.tokenizer_json, model.ref.text)
        self._prepared = prepare(source, model.ref.image, tokenizer, workers=workers, progress=reporter.progress)
        unedited = embed_model(model, self._prepared, "original", reporter.progress)
        self._yardstick = yardstick_of(unedited)
        self.original = safety_report("original", unedited, yardstick=self._yardstick)

    def measure(self, model: LoadedModel, label: str) -> SafetyReport:
        """SafeGround, retrieval and zero-shot of what the model is now."""
        embedded = embed_model(model, self._prepared, label, self.reporter.progress)
        return safety_report(label, embedded, yardstick=self._yardstick)


def _strengths(made: Run, values: _Values, measuring: _Measuring) -> tuple[SweepPoint, ...]:
    """One point per loss under which some strength keeps the limits."""
    fit, recipe, folder = made.outcome.left(FitRecord), made.plan.recipe, made.plan.folder
    assert recipe.closed_form is not None
    fitted, _ = made.models.before_closed_form(made.ranks)
    return tuple(
        SweepPoint(
            keep_mass=recipe.entries.text.keep_mass,
            factor=recipe.entries.text.factor,
            shares={},
            safety=measuring.measure(fitted, f"{loss:g}"),
            max_retrieval_loss=loss,
            setting=setting,
        )
        for loss, setting in strength_points(
            fitted, recipe.closed_form, fit, folder.fit, values.losses, measuring.reporter
        )
    )


def _entries(made: Run, score: ScoreRecord, values: _Values, measuring: _Measuring) -> tuple[SweepPoint, ...]:
    """One point per keep_mass and factor."""
    model, entries, scores = made.models.original, made.plan.recipe.entries, made.plan.folder.scores
    return tuple(
        SweepPoint(
            keep_mass=keep_mass,
            factor=factor,
            shares=shares,
            safety=measuring.measure(model, f"{keep_mass:g}, {factor:g}"),
        )
        for keep_mass, factor, shares in edited_points(
            model, score, scores, entries, values.keep_masses, values.factors
        )
    )


def _open(name: str) -> QuadrupleSource:
    spec, _, base = calibration_set_of(name)
    return open_source(spec, base=base)


def _check_may_pick(source: QuadrupleSource, evaluation: str) -> None:
    """What the result is reported on must have no say in how it is made."""
    spec, _, base = calibration_set_of(evaluation)
    try:
        others = set(open_source(spec, base=base).ids) if source.record.name != spec.name else set(source.ids)
    except UwmError:  # the evaluation set is not at hand; only its name can be compared
        others = set()
    if common := others & set(source.ids):
        raise InputError(
            f"{source.record.name} shares {len(common)} items with the evaluation set {evaluation}",
            fix="pick on the calibration or a validation set",
        )
    if not source.zero_shot_names:
        raise InputError(
            f"data set {source.record.name} names no zero-shot sets, so what an edit costs cannot be measured",
            fix="add `zero_shot` to its TOML",
        )


def rule_text(max_drop: float) -> str:
    """The rule of `pick`, in words."""
    return f"highest {PICKED_METRIC} among the points whose zero-shot mean falls by at most {max_drop:g} points"


def pick(original: SafetyReport, points: Sequence[SweepPoint], max_drop: float) -> int | None:
    """Position of the point that the rule picks; of equals the one that edits least; None when no point keeps the limit."""
    allowed = [i for i, p in enumerate(points) if zero_shot_mean(original) - zero_shot_mean(p.safety) <= max_drop]
    return max(allowed, key=lambda i: (gain(original, points[i]), points[i].keep_mass), default=None)
