"""Many edits from one scoring pass: each point measured, the trade-off drawn, one point picked by a stated rule."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from uwm_deploy.data.embedding import prepare
from uwm_deploy.data.open import open_source
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.edits.closed_form import Solved, put, tensors_of
from uwm_deploy.edits.fit_files import read_sums
from uwm_deploy.edits.methods import selects
from uwm_deploy.edits.selected import check_scores, concepts_of, selected_entries
from uwm_deploy.edits.solving import kept_features, limits_of
from uwm_deploy.edits.strength import choose_strengths, chosen_setting
from uwm_deploy.errors import InputError, UwmError
from uwm_deploy.pipeline.plan import plan_of
from uwm_deploy.pipeline.request import Request, resolved_recipe
from uwm_deploy.pipeline.run import Run
from uwm_deploy.recipes.edit_spec import ClosedForm, EditSpecs
from uwm_deploy.recipes.resolve import calibration_set_of
from uwm_deploy.records.codec import write_record
from uwm_deploy.records.edit import EditStep, FitRecord, Method, ScoreRecord
from uwm_deploy.records.files import whole_folder
from uwm_deploy.records.metrics import SafetyReport
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting
from uwm_deploy.records.studies import SweepPoint, SweepReport
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.inspection import axis_words
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.embedded import safety_report, yardstick_of
from uwm_deploy.safeground.tradeoff import PICKED_METRIC, gain, mean_recall, pareto, zero_shot_mean
from uwm_deploy.stages.verify.verify import embed_model
from uwm_deploy.towers.protocol import LoadedModel

POINTS_OF_A_RANGE = 8
"""Points of `LOW:HIGH` when their number is not given."""


def keep_masses_of(text: str) -> tuple[float, ...]:
    """Values of ``0.9:0.995``, ``0.9:0.995:12`` or ``0.9,0.95,0.98``, ascending.

    A range is spaced evenly in the logarithm of the share that is edited, ``1 - keep_mass``, which is what matters.

    Raises:
        InputError: If it is none of these, or a value is not between 0 and 1.
    """
    try:
        if ":" in text:
            low, high, *rest = text.split(":")
            count = int(rest[0]) if rest else POINTS_OF_A_RANGE
            first, last = math.log(1 - float(low)), math.log(1 - float(high))
            steps = [first + (last - first) * i / max(1, count - 1) for i in range(count)]
            values = [1 - math.exp(step) for step in steps]
        else:
            values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--keep-mass {text!r} is not understood", fix="use 0.9:0.995 or 0.9,0.95,0.98") from error
    if not values or any(not 0 < value < 1 for value in values):
        raise InputError(f"--keep-mass {text!r} holds a value outside 0 to 1", fix="use shares between 0 and 1")
    return tuple(sorted({round(value, 6) for value in values}))


LOSSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Points of safe retrieval that choices of a strength may lose, where nothing else is asked for."""


KEEP_MASSES = "0.9:0.995"
"""Range of keep_mass, where nothing else is asked for."""


def losses_of(text: str) -> tuple[float, ...]:
    """Values of ``1,2,4``, ascending.

    Raises:
        InputError: If one is no number of points.
    """
    try:
        values = sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise InputError(f"--max-retrieval-loss {text!r} is not a list of numbers", fix="use 1,2,4") from error
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise InputError(f"--max-retrieval-loss {text!r} holds no points", fix="use 1,2,4")
    return tuple(values)


def factors_of(text: str) -> tuple[float, ...]:
    """Values of ``-1,0,0.5``.

    Raises:
        InputError: If one is not a number.
    """
    try:
        values = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise InputError(f"--factor {text!r} is not a list of numbers", fix="use -1,0,0.5") from error
    if not all(map(math.isfinite, values)):
        raise InputError(f"--factor {text!r} holds NaN or infinity", fix="use -1,0,0.5")
    return values


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
    """Scores or fits once (or reuses that), then measures every point, and writes table, picture and JSON.

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
    edits, closed = recipe.entries, recipe.closed_form
    if closed.method is not Method.SAFETY_AXIS if closed else not selects(edits.method):
        raise InputError(f"method {recipe.method} has no strength that could be swept", fix="choose another --method")
    unused = [keep_masses, factors] if closed else [losses]
    if any(part is not None for part in unused):
        options = "--keep-mass and --factor" if closed else "--max-retrieval-loss"
        raise InputError(f"a sweep of method {recipe.method} has no use for {options}", fix="leave it out")
    factors = factors or tuple(dict.fromkeys((edits.text.factor, edits.image.factor)))
    keep_masses, losses = keep_masses or keep_masses_of(KEEP_MASSES), losses or LOSSES
    measured_on = on or recipe.data.calibration
    spec, _, base = calibration_set_of(measured_on)
    source = open_source(spec, base=base)
    if max_drop is not None:
        _check_may_pick(source, recipe.data.evaluation)
    if closed is not None and on is None:
        reporter.line("sweep      note: measured on the pairs that the strengths are made from; --on names another set")
    made = Run(plan_of(request), reporter)
    with made.locked():
        made.check("fit")
        made.get("fit")
    score, fit, model = made.outcome.score, made.outcome.fit, made.models.original
    assert score is not None
    tokenizer = Tokenizer(model.tokenizer_json, model.ref.text)
    count = len(losses) if closed else len(keep_masses) * len(factors)
    with reporter.stage("sweep", f"{count} points on {measured_on}"):
        prepared = prepare(source, model.ref.image, tokenizer, workers=request.workers, progress=reporter.progress)
        unedited = embed_model(model, prepared, "original", reporter.progress)
        yardstick = yardstick_of(unedited)
        original = safety_report("original", unedited, yardstick=yardstick)

        def measured(model: LoadedModel, label: str) -> SafetyReport:
            return safety_report(label, embed_model(model, prepared, label, reporter.progress), yardstick=yardstick)

        points: list[SweepPoint] = []
        if closed is not None:
            fitted, _ = made.models.before_closed_form()
            assert fit is not None
            for loss, setting in strength_points(fitted, closed, fit, made.plan.folder.fit, losses, reporter):
                safety = measured(fitted, f"{loss:g}")
                points.append(
                    SweepPoint(
                        keep_mass=edits.text.keep_mass,
                        factor=edits.text.factor,
                        shares={},
                        safety=safety,
                        max_retrieval_loss=loss,
                        setting=setting,
                    )
                )
        else:
            for keep_mass, factor, shares in edited_points(
                model, score, made.plan.folder.scores, edits, keep_masses, factors
            ):
                safety = measured(model, f"{keep_mass:g}, {factor:g}")
                points.append(SweepPoint(keep_mass=keep_mass, factor=factor, shares=shares, safety=safety))
        result = SweepReport(
            model=model.ref,
            measured_on=source.record,
            scores_digest=score.scores_digest,
            original=original,
            points=tuple(points),
            rule="" if max_drop is None else rule_text(max_drop),
            picked=None if max_drop is None else pick(original, points, max_drop),
            method=recipe.method,
            selection={tower.value: edits.of(tower).selection for tower in TowerName},
            concepts=concepts_of(score),
        )
        with whole_folder(out) as folder:
            write(result, folder)
    return result


def strength_points(
    model: LoadedModel, closed: ClosedForm, fit: FitRecord, folder: Path, losses: Sequence[float], reporter: Reporter
) -> Iterator[tuple[float, AxisSetting]]:
    """Puts the step of every strength into the model in turn, which stays as the last one left it.

    Args:
        model: As the step before left it.
        closed: The step.
        fit: Record of its sums.
        folder: Where the sums and the kept features are.
        losses: Points of safe retrieval that each choice may lose; one under which nothing keeps the limits is left out.
        reporter: Progress.

    Yields:
        The loss and what was chosen under it, while the model holds that edit.

    Raises:
        InputError: If nothing keeps the limits under any of them.
    """
    limits = [limits_of(dataclasses.replace(closed.axis, max_retrieval_loss=loss)) for loss in losses]
    choices, moments = choose_strengths(kept_features(model, fit, folder), limits), read_sums(folder, fit)
    if all(choice.chosen is None for choice in choices):
        chosen_setting(choices[-1])
    made = []
    for loss, choice in zip(losses, choices, strict=True):
        if choice.chosen is None:
            reporter.line(f"sweep      no strength keeps the limits at a loss of {loss:g}")
            continue
        setting = chosen_setting(choice)
        # All are solved before the first is put in: the step is made from the weights that are there now.
        made.append((loss, setting, tensors_of(model, closed.method, setting, moments, fit.placement)))
    for loss, setting, (tensors, towers) in made:
        put(model, Solved(tensors, towers, EditStep(method=closed.method)))
        yield loss, setting


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


@dataclass(slots=True)
class _Undo:
    """Original values of the entries of one weight that were touched."""

    weight: Tensor
    touched: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def multiply(self, indices: Tensor, factor: float) -> None:
        flat = self.weight.view(-1)
        at = indices.to(flat.device)
        self.touched.append(at)
        self.values.append(flat[at].clone())
        flat[at] = flat[at] * factor

    def restore(self) -> None:
        flat = self.weight.view(-1)
        for at, values in zip(self.touched, self.values, strict=True):
            flat[at] = values
        self.touched, self.values = [], []


@torch.no_grad()
def edited_points(
    model: LoadedModel,
    score: ScoreRecord,
    scores_file: Path,
    edits: EditSpecs,
    keep_masses: Sequence[float],
    factors: Sequence[float],
) -> Iterator[tuple[float, float, dict[str, float]]]:
    """Puts every point into the model in turn, and leaves the model as it was.

    Selections are nested: what a larger keep_mass selects, a smaller one selects too. So each step multiplies only the
    entries that are new.

    Args:
        model: The source model.
        score: Record of the scores.
        scores_file: The scores; those of single concepts lie beside it.
        edits: Method, and selection per tower; keep_mass and factor are those of the points.
        keep_masses: In any order.
        factors: Multipliers.

    Yields:
        keep_mass, factor, and the share of edited entries per tower, while the model holds that edit.

    Raises:
        IntegrityError: If the scores are of another model or method, or were changed.
    """
    check_scores(model, score, scores_file, edits)
    weights = {layer.name: model.source.get_parameter(f"{layer.name}.weight").detach() for layer in score.layers}
    undo = {name: _Undo(weight) for name, weight in weights.items()}
    for factor in factors:
        done = {name: torch.empty(0, dtype=torch.int64) for name in weights}
        try:
            for keep_mass in sorted(keep_masses, reverse=True):
                for layer in score.layers:
                    spec = dataclasses.replace(edits.of(layer.tower), keep_mass=keep_mass)
                    chosen = selected_entries(score, scores_file, layer, spec)
                    undo[layer.name].multiply(chosen[~torch.isin(chosen, done[layer.name])], factor)
                    done[layer.name] = chosen
                yield keep_mass, factor, _shares(score, done)
        finally:
            for undoing in undo.values():
                undoing.restore()


def _shares(score: ScoreRecord, chosen: Mapping[str, Tensor]) -> dict[str, float]:
    """Edited entries divided by all entries of the edited layers, per tower."""
    shares = {}
    for tower in TowerName:
        layers = [layer for layer in score.layers if layer.tower is tower]
        total = sum(layer.shape[0] * layer.shape[1] for layer in layers)
        shares[tower.value] = sum(len(chosen[layer.name]) for layer in layers) / total if total else 0.0
    return shares


def rule_text(max_drop: float) -> str:
    """The rule of `pick`, in words."""
    return f"highest {PICKED_METRIC} among the points whose zero-shot mean falls by at most {max_drop:g} points"


def pick(original: SafetyReport, points: Sequence[SweepPoint], max_drop: float) -> int | None:
    """Position of the point that the rule picks; of equals the one that edits least; None when no point keeps the limit."""
    allowed = [i for i, p in enumerate(points) if zero_shot_mean(original) - zero_shot_mean(p.safety) <= max_drop]
    return max(allowed, key=lambda i: (gain(original, points[i]), points[i].keep_mass), default=None)


COLUMNS = ("keep_mass", "factor", "text share %", "image share %")
STRENGTH_COLUMNS = ("max R@1 loss", "setting")
METRICS = ("P_ts", "P_tu", "P_vs", "P_vu", "PS", "PU", "GS")


def rows(report: SweepReport) -> list[dict[str, str]]:
    """The table: the original first, then every point; the picked one is marked."""

    def cells(safety: SafetyReport) -> dict[str, str]:
        mean = zero_shot_mean(safety)
        values = {name: f"{safety.preference[name].value:.1f}" for name in METRICS}
        recall = mean_recall(safety)
        return {**values, "R@1": f"{recall:.1f}", "zero-shot": "-" if math.isnan(mean) else f"{mean:.1f}"}

    columns = STRENGTH_COLUMNS if report.points and report.points[0].setting else COLUMNS
    table = [dict.fromkeys(columns, "-") | {columns[0]: "original"} | cells(report.original) | {"picked": ""}]
    for i, point in enumerate(report.points):
        picked = {"picked": "*" if i == report.picked else ""}
        table.append(dict(zip(columns, _setting_cells(point), strict=True)) | cells(point.safety) | picked)
    return table


def _setting_cells(point: SweepPoint) -> tuple[str, ...]:
    if point.setting is not None:
        return f"{point.max_retrieval_loss:g}", axis_words(point.setting).removeprefix("axis ")
    shares = [f"{100 * point.shares[tower]:.2f}" for tower in ("text", "image")]
    return f"{point.keep_mass:g}", f"{point.factor:g}", *shares


def label_of(point: SweepPoint) -> str:
    """What tells a point from the others of its sweep."""
    return f"{point.keep_mass:.3g}" if point.max_retrieval_loss is None else f"{point.max_retrieval_loss:g}"


def write(report: SweepReport, folder: Path) -> None:
    """JSON, CSV, Markdown and the picture."""
    table = rows(report)
    write_record(folder / "sweep.json", report)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    (folder / "sweep.csv").write_text(stream.getvalue(), encoding="utf-8")
    lines = ["| " + " | ".join(cells) + " |" for cells in (list(table[0]), ["---"] * len(table[0]))]
    lines += ["| " + " | ".join(row.values()) + " |" for row in table]
    (folder / "sweep.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(report, folder / "sweep.png")


def draw(report: SweepReport, path: Path) -> None:
    """Safety gain against what is kept, one line per factor, the Pareto front marked.

    Kept is the zero-shot mean; strengths of a safety axis hardly change it, so with them it is safe retrieval.
    """
    from matplotlib.figure import Figure

    strengths = report.points[0].setting is not None
    kept_of = mean_recall if strengths else zero_shot_mean
    base = kept_of(report.original)
    kept = [kept_of(p.safety) - base for p in report.points]
    gains = [gain(report.original, p) for p in report.points]
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color="0.8", linewidth=1, zorder=0)
    axes.axvline(0, color="0.8", linewidth=1, zorder=0)
    for factor in dict.fromkeys(p.factor for p in report.points):
        at = [i for i, p in enumerate(report.points) if p.factor == factor]
        name = "strengths of the axis" if strengths else f"factor {factor:g}"
        axes.plot([kept[i] for i in at], [gains[i] for i in at], marker="o", markersize=4, label=name)
        places: dict[tuple[float, float], list[str]] = {}
        for i in at:
            places.setdefault((kept[i], gains[i]), []).append(label_of(report.points[i]))
        for place, names in places.items():
            axes.annotate(", ".join(names), place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    if not math.isnan(base):
        front = pareto(list(zip(kept, gains, strict=True)))
        axes.scatter(
            [kept[i] for i in front], [gains[i] for i in front], s=90, facecolors="none", edgecolors="0.4",
            label="not beaten by any other point",
        )  # fmt: skip
    if report.picked is not None:
        axes.scatter(
            kept[report.picked], gains[report.picked], marker="*", s=160, color="black", label="picked", zorder=3
        )
    axes.set_xlabel(f"{'safe R@1' if strengths else 'zero-shot mean'}, change in points")
    axes.set_ylabel("GS, change in points")
    about = f"{report.model.name}, {report.method}{', per concept' if report.concepts else ''}"
    labels = "largest loss of R@1" if strengths else "keep_mass"
    axes.set_title(f"{about} on {report.measured_on.name} (n = {report.measured_on.n}); labels: {labels}", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})
