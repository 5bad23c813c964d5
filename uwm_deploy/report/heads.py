"""Section of a report page about the safety head: what it finds, and always beside it what it costs in safe images."""

from __future__ import annotations

from collections.abc import Iterator

from uwm_deploy.records.head import MIXED_FROM, SafetyHead
from uwm_deploy.records.metrics import Estimate, Proportion, RiskReport
from uwm_deploy.report import charts
from uwm_deploy.report.blocks import figure, marked, section, share_bar, share_cells, table
from uwm_deploy.report.charts import Group, Tone
from uwm_deploy.report.evidence import Dossier
from uwm_deploy.report.markup import Child, Html, tag
from uwm_deploy.report.measured_subjects import executed_artifacts
from uwm_deploy.safeground.risk import STEPS, STOPS

_LEGEND = (
    charts.swatch("bar edited", "edited model, PyTorch float32"),
    charts.swatch("bar engine", "artifact, executed"),
    charts.swatch("whisker", "95% interval"),
)


def safety_head(dossier: Dossier) -> Html | None:
    """The head's numbers; nothing for a model without one."""
    risk = dossier.verify.risk
    if risk is None:
        return None
    stops, costs = risk.recall[STOPS.value], risk.benign[STOPS.value]
    lead = (
        f"A head on the image tower's tokens tells unsafe images from safe ones with an AUROC of {risk.auroc.value:.1f} "
        f"({risk.auroc.low:.1f} to {risk.auroc.high:.1f}). It stops {stops.value:.1f}% of unsafe images, and "
        f"{costs.value:.1f}% of safe ones. On average a level is {risk.ece:.1f} points from the share of unsafe images."
    )
    parts = [_actions(dossier), _categories(dossier, risk), _table(dossier)]
    return section("safety-head", "Safety head", lead, *parts, _made(dossier.head) if dossier.head else None)


def _subjects(dossier: Dossier) -> Iterator[tuple[str, Tone, RiskReport]]:
    if dossier.verify.risk is not None:
        yield "edited", "edited", dossier.verify.risk
    for artifact, _ in executed_artifacts(dossier.verify):
        if artifact.risk is not None:
            yield marked(artifact.variant, dossier), "engine", artifact.risk


def _actions(dossier: Dossier) -> Html:
    groups: list[Group] = []
    rows: list[dict[str, Child]] = []
    for step in STEPS:
        for name, note in (("unsafe", "recall: higher is better"), ("safe", "over-refusal: lower is better")):
            found = [
                (label, tone, (risk.recall if name == "unsafe" else risk.benign)[step.value])
                for label, tone, risk in _subjects(dossier)
            ]
            head = f"{name} images, at least {step.value}"
            groups.append(Group(head=head, note=note, bars=[share_bar(label, tone, p) for label, tone, p in found]))
            rows += [{"images": head, "of": label, **share_cells(p)} for label, _, p in found]
    zero_shot = [(la, tone, risk.benign_zero_shot.get(STOPS.value)) for la, tone, risk in _subjects(dossier)]
    head = f"zero-shot images, at least {STOPS.value}"
    rows += [{"images": head, "of": label, **share_cells(p)} for label, _, p in zero_shot if p is not None]
    about = "Percent of unsafe and of safe images for which each action, or a stricter one, is taken."
    return figure("What each action catches and costs", charts.bars("Actions", about, groups, 100.0), _LEGEND, rows)


def _categories(dossier: Dossier, risk: RiskReport) -> Html:
    groups, rows = [], []
    for concept in risk.per_category:
        found = [(la, tone, r.per_category[concept]) for la, tone, r in _subjects(dossier) if concept in r.per_category]
        groups.append(Group(head=concept, bars=[share_bar(label, tone, part.recall) for label, tone, part in found]))
        for label, _, part in found:
            cells: dict[str, Child] = {"concept": concept, "of": label, "AUROC": f"{part.auroc.value:.1f}"}
            cells |= {"AUROC, 95% interval": _interval(part.auroc), "stopped": f"{part.recall.value:.1f}"}
            cells |= {"stopped, 95% interval": _interval(part.recall), "named": f"{part.named.value:.1f}"}
            rows.append(cells | {"n": str(part.recall.n)})
    about = f"Percent of the unsafe images of each concept that are at least {STOPS.value}ed."
    return figure("Recall per concept", charts.bars("Recall per concept", about, groups, 100.0), _LEGEND, rows)


def _table(dossier: Dossier) -> Html:
    rows: list[dict[str, Child]] = []
    flips = {artifact.variant: artifact.risk_flips for artifact, _ in executed_artifacts(dossier.verify)}
    for label, tone, risk in _subjects(dossier):
        changed = flips.get(label.removeprefix("✕ ")) if tone == "engine" else None
        rows.append(
            {
                "of": label,
                "AUROC": f"{risk.auroc.value:.2f}",
                "95% interval": _interval(risk.auroc),
                "concept right": f"{risk.named.value:.1f}",
                "calibration error, level": f"{risk.ece:.2f}",
                "calibration error, category": f"{risk.category_ece:.2f}",
                "decisions changed": f"{changed.value:.2f}% of {changed.n}" if changed else "",
            }
        )
    return table(rows)


def _made(head: SafetyHead) -> Html:
    limits = "; ".join(
        f"{action} from {limit:.4f} on, for {head.false_positive_rates[action]:g}% of safe images"
        for action, limit in head.thresholds.items()
    )
    training = head.training
    words = (
        f"Thresholds of the level: {limits}. Trained on {training.data.name}, {training.pairs} pairs; temperatures and "
        f"thresholds from {training.validation_pairs} pairs of "
        f"{training.validation.name if training.validation else 'the same set, held out'}."
    )
    if (language := head.language) is not None:
        words += (
            f" Its {head.shape.tokens} safety tokens of width {head.shape.language} are for the language model "
            f"{language.model}, which was frozen; the loss of its answers went from {language.loss_first:.3f} to "
            f"{language.loss_last:.3f}. They and the safety prompt are mixed in from {MIXED_FROM} on."
        )
    return tag("p", {}, words)


def _interval(found: Proportion | Estimate) -> str:
    return f"{found.low:.1f} to {found.high:.1f}"
