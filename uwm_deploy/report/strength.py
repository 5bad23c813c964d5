"""Section of a report page about the strength of a closed-form step: what was tried, what each costs, what was chosen."""

from __future__ import annotations

from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.strength import FoldKind, StrengthCandidate, StrengthChoice, StrengthMetrics
from uwm_deploy.report import charts
from uwm_deploy.report.blocks import figure, folded, section, table
from uwm_deploy.report.charts import Point
from uwm_deploy.report.edit_words import axis_words
from uwm_deploy.report.markup import NOTHING, Child, Html
from uwm_deploy.safeground.tradeoff import pareto

_NAMES = {FoldKind.RANDOM: "unseen items", FoldKind.CONCEPTS: "unseen concepts"}
_SHOWN = 25
"""Settings in the table: the chosen one and those with the highest GS."""


def strength(edit: EditRecord) -> Html | None:
    """How strong the edit is and why; None where no strength was chosen."""
    step = edit.closed_form
    if step is None or step.axis is None or step.axis.choice is None:
        return None
    choice = step.axis.choice
    assert choice.chosen is not None
    limits, kept = choice.limits, sum(candidate.keeps for candidate in choice.candidates)
    lead = (
        f"{len(choice.candidates)} settings were measured on {choice.n} calibration items, each item by a fit that did not "
        f"see it. {kept} of them lose at most {limits.retrieval_loss:g} points of safe R@1, {limits.hard_safe_loss:g} of "
        f"R@10 among the safe items that look most unsafe, {limits.zero_shot_loss:g} of the zero-shot mean and nothing of "
        f"PS, with {limits.margin:g} standard errors to spare. Chosen: "
        f"{axis_words(choice.candidates[choice.chosen].setting).replace(',', ', ')}."
    )
    legend = (
        charts.swatch("s0", "keeps the limits"),
        charts.swatch("s1", "breaks one"),
        charts.swatch("ring", "keeps them, and no other that does beats it"),
    )
    numbers = [_row(kind, choice) for kind in FoldKind if kind.value in choice.original]
    picture = figure("GS gained against safe retrieval lost", _picture(choice), legend, numbers)
    order = sorted(range(len(choice.candidates)), key=lambda i: -_measured(choice.candidates[i]).gs)
    shown = [i for i in order if i == choice.chosen or i in order[:_SHOWN]]
    tried = folded(f"{len(shown)} of the settings that were tried", table([_tried(i, choice) for i in shown]))
    return section("strength", "Strength", lead, picture, tried)


def _measured(candidate: StrengthCandidate) -> StrengthMetrics:
    return candidate.measured[FoldKind.RANDOM.value]


def _picture(choice: StrengthChoice) -> Html:
    base = choice.original[FoldKind.RANDOM.value]
    places = [
        (_measured(candidate).recall_at_1 - base.recall_at_1, _measured(candidate).gs - base.gs)
        for candidate in choice.candidates
    ]
    keeping = [i for i, candidate in enumerate(choice.candidates) if candidate.keeps]
    front = {keeping[i] for i in pareto([places[i] for i in keeping])}
    points = [
        Point(
            x=x,
            y=y,
            label="chosen" if i == choice.chosen else "",
            series=0 if choice.candidates[i].keeps else 1,
            ringed=i in front,
            chosen=i == choice.chosen,
        )
        for i, (x, y) in enumerate(places)
    ]
    about = "Each point is one setting: GS gained upwards, safe retrieval kept to the right; squares break a limit."
    return charts.scatter("Strength", about, points, "safe R@1, change in points", "GS, change in points", joined=False)


def _row(kind: FoldKind, choice: StrengthChoice) -> dict[str, Child]:
    """The chosen setting on one kind of items, with the original model before the arrow."""
    assert choice.chosen is not None
    before, after = choice.original[kind.value], choice.candidates[choice.chosen].measured[kind.value]
    cells = {
        "GS": (before.gs, after.gs),
        "PS": (before.ps, after.ps),
        "safe R@1": (before.recall_at_1, after.recall_at_1),
        "hard safe R@10": (before.hard_safe_recall_at_10, after.hard_safe_recall_at_10),
        "zero-shot": (before.zero_shot, after.zero_shot),
    }
    return {"measured on": _NAMES[kind], **{name: _arrow(*pair) for name, pair in cells.items()}}


def _arrow(before: float | None, after: float | None) -> str:
    return NOTHING if before is None or after is None else f"{before:.1f} \u2192 {after:.1f}"


def _tried(place: int, choice: StrengthChoice) -> dict[str, Child]:
    candidate = choice.candidates[place]
    found, unseen = _measured(candidate), candidate.measured.get(FoldKind.CONCEPTS.value)
    return {
        "setting": axis_words(candidate.setting).removeprefix("axis "),
        "GS": f"{found.gs:.1f}",
        "GS, unseen concepts": f"{unseen.gs:.1f}" if unseen else NOTHING,
        "PS": f"{found.ps:.1f}",
        "safe R@1": f"{found.recall_at_1:.1f}",
        "hard safe R@10": NOTHING if found.hard_safe_recall_at_10 is None else f"{found.hard_safe_recall_at_10:.1f}",
        "zero-shot": NOTHING if found.zero_shot is None else f"{found.zero_shot:.1f}",
        "limits": "chosen" if place == choice.chosen else "kept" if candidate.keeps else f"breaks {candidate.broken}",
    }
