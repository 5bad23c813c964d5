"""Sections of a report page about what was measured on quadruples and images: a picture of each, and its table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.metrics import Flips, Geometry, RankChange
from uwm_deploy.records.studies import SweepReport
from uwm_deploy.report import charts
from uwm_deploy.report.blocks import figure, folded, marked, section, share_bar, share_cells, table
from uwm_deploy.report.charts import Bar, Group, Point, signed
from uwm_deploy.report.edit_words import axis_words
from uwm_deploy.report.evidence import Dossier, Margins
from uwm_deploy.report.markup import NOTHING, Child, Html, join, tag
from uwm_deploy.report.measured_subjects import executed_artifacts, measured_subjects
from uwm_deploy.report.tables.sweep_points import point_label
from uwm_deploy.safeground.geometry import NEIGHBOURS, SPREADS
from uwm_deploy.safeground.preference import BASIC, COMBINED, METRICS
from uwm_deploy.safeground.retrieval import HARD, PAIRED
from uwm_deploy.safeground.tradeoff import gain, mean_recall, pareto, zero_shot_mean

MEANING = {
    "P_ts": "safe caption picks the safe image",
    "P_tu": "unsafe caption picks the safe image",
    "P_vs": "safe image picks the safe caption",
    "P_vu": "unsafe image picks the safe caption",
    "Txt_s": "both images pick the safe caption",
    "Img_s": "both captions pick the safe image",
    "PS": "both safe queries pick the safe answer",
    "PU": "both unsafe queries pick the safe answer",
    "GS": "all four pick the safe answer",
}
"""What each SafeGround metric asks of a quadruple."""

RETRIEVAL = {
    "safe-text-to-image@1": ("safe text @1", "finds its image first"),
    "safe-image-to-text@1": ("safe image @1", "finds its caption first"),
    "hard-safe-text-to-image@10": ("hard text @10", "looks unsafe, finds its image in ten"),
    "hard-safe-image-to-text@10": ("hard image @10", "looks unsafe, finds its caption in ten"),
    "unsafe-first-text": ("unsafe text @1", "finds an unsafe image; less is better"),
    "unsafe-first-image": ("unsafe image @1", "finds an unsafe caption; less is better"),
}
"""What is drawn of retrieval, its heading and what it asks of a query."""

_WORST = 10
"""Decisions of an artifact that are listed by id."""

_LEGEND = (
    charts.swatch("bar original", "original model"),
    charts.swatch("bar edited", "edited model, PyTorch float32"),
    charts.swatch("bar engine", "artifact, executed"),
    charts.swatch("whisker", "95% interval"),
)


def safeground(dossier: Dossier) -> Html:
    """The nine metrics of every subject."""
    report = dossier.verify

    def drawn(names: Iterable[str], head: str) -> Html:
        groups = [
            Group(
                head=name,
                note=MEANING[name],
                bars=[
                    share_bar(marked(who, dossier), tone, s.preference[name])
                    for who, tone, s in measured_subjects(report)
                ],
            )
            for name in names
        ]
        about = "Percent of quadruples, higher is safer, for the original model, the edited model and each artifact."
        rows: list[dict[str, Child]] = []
        for name in names:
            for label, _, safety in measured_subjects(report):
                p = safety.preference[name]
                rows.append({"metric": name, "of": label, **share_cells(p), "ties": str(p.ties)})
        return figure(head, charts.bars(head, about, groups, 100.0), _LEGEND, rows)

    n = report.edited.preference["GS"].n
    lead = (
        f"Share of {n} quadruples that are decided for the safe side; higher is safer, GS is the strictest. "
        "Whiskers are 95% Wilson intervals."
    )
    parts = drawn(BASIC, "The four decisions"), drawn(COMBINED, "Several decisions at once")
    return section("safety", "Safety", lead, tag("div", {"class": "pair"}, *parts), _effect(report))


def _effect(report: VerifyReport) -> Html:
    effect = {name: f for name, f in report.edit_effect.items() if name not in PAIRED}
    return folded("What the edit changed, decision by decision", table(_flip_rows("edited", effect)))


def _flip_rows(label: str, found: Mapping[str, Flips]) -> list[dict[str, Child]]:
    return [
        {
            "metric": name,
            "of": label,
            "change": signed(f.delta),
            "95% interval": f"{signed(f.delta_low)} to {signed(f.delta_high)}",
            "lost": str(f.lost),
            "gained": str(f.gained),
            "n": str(f.n),
            "McNemar p": f"{f.p_value:.2g}",
        }
        for name, f in found.items()
    ]


def concepts(report: VerifyReport) -> Html:
    """Change per concept and metric, as a heat map."""
    before, after = report.original.per_concept, report.edited.per_concept
    names = sorted(set(before) & set(after))
    values = [[after[c][m].value - before[c][m].value for m in METRICS] for c in names]
    head = "Edited minus original, percentage points"
    rows: list[dict[str, Child]] = []
    for concept in names:
        for label, _, safety in measured_subjects(report):
            found = safety.per_concept.get(concept, {})
            cells: dict[str, Child] = {m: f"{found[m].value:.1f}" if m in found else "not run" for m in METRICS}
            rows.append({"concept": concept, "of": label, "n": str(after[concept]["GS"].n), **cells})
    legend = (
        charts.swatch("cell up solid", "safer than before"),
        charts.swatch("cell down solid", "less safe than before"),
    )
    drawn = charts.heat_map(head, "One row per concept, one column per metric.", names, METRICS, values)
    sizes = [after[c]["GS"].n for c in names]
    lead = "Where the edit helps and where it costs."
    if sizes:
        lead += f" With {min(sizes)} to {max(sizes)} quadruples each, a change of a few points may be chance."
    return section("concepts", "Per concept", lead, figure(head, drawn, legend, rows))


def margins(dossier: Dossier) -> Html:
    """Histograms of the four margins, with what flips."""
    head, found = "Margins", dossier.margins
    if found is None:
        return section("margins", head, "Not run: the reference embeddings are not in the evidence.")
    where = {item: i for i, item in enumerate(found.ids)}
    drawn = [_margin(name, found, where, dossier.verify) for name in BASIC]
    lead = (
        "How far each decision is from a tie: similarity to the safe candidate minus similarity to the unsafe one. "
        "Left of 0 the unsafe candidate wins."
    )
    legend = (
        charts.swatch("outline", "original model"),
        charts.swatch("stack same", "edited model, decides alike"),
        charts.swatch("stack gained", "safe because of the edit"),
        charts.swatch("stack lost", "unsafe because of the edit"),
        charts.swatch("flip lost", "an artifact turns it unsafe"),
        charts.swatch("flip gained", "an artifact turns it safe"),
    )
    key = tag("ul", {"class": "legend"}, *legend)
    return section("margins", head, lead, key, tag("div", {"class": "pair"}, *drawn), _flipped(dossier, found, where))


def _margin(name: str, found: Margins, where: Mapping[str, int], report: VerifyReport) -> Html:
    before, after = found.original.margins[name], found.edited.margins[name]
    count = charts.histogram_of(before, after)
    marks: list[tuple[float, Literal["lost", "gained"], str]] = []
    for artifact, _ in executed_artifacts(report):
        flips = artifact.flips.get(name)
        kinds: tuple[tuple[Literal["lost", "gained"], tuple[str, ...]], ...] = (
            ("lost", flips.lost_ids if flips else ()),
            ("gained", flips.gained_ids if flips else ()),
        )
        marks += [
            (float(after[where[item]]), kind, f"{item}, {artifact.variant}, margin {after[where[item]]:.4f}")
            for kind, ids in kinds
            for item in ids
            if item in where
        ]
    rows: list[dict[str, Child]] = [
        {
            "margin": f"{count.edges[i]:.3f} to {count.edges[i + 1]:.3f}",
            "original": str(count.original[i]),
            "edited, alike": str(count.same[i]),
            "edited, now safe": str(count.gained[i]),
            "edited, now unsafe": str(count.lost[i]),
        }
        for i in range(len(count.same))
    ]
    about = (
        f"{int(count.gained.sum())} decisions become safe by the edit, {int(count.lost.sum())} unsafe; artifacts change "
        f"{len(marks)} of the edited model's."
    )
    drawn = charts.histogram(f"Margins of {name}", about, count, marks)
    return figure(f"{name}: {MEANING[name]}", drawn, (), rows)


def _flipped(dossier: Dossier, found: Margins, where: Mapping[str, int]) -> Html:
    """Decisions that artifacts change, by id, the clearest ones first: near a tie a flip is rounding."""
    rows: list[dict[str, Child]] = []
    counts: list[dict[str, Child]] = []
    for artifact, _ in executed_artifacts(dossier.verify):
        counts += _flip_rows(
            artifact.variant, {m: f for m, f in artifact.flips.items() if m not in PAIRED and f.lost + f.gained}
        )
        clear = []
        for name in BASIC:
            if flips := artifact.flips.get(name):
                for kind, ids in (("lost", flips.lost_ids), ("gained", flips.gained_ids)):
                    clear += [(float(found.edited.margins[name][where[i]]), i, name, kind) for i in ids if i in where]
        clear.sort(key=lambda part: -abs(part[0]))
        rows += [
            {"quadruple": item, "of": artifact.variant, "metric": name, "kind": kind, "margin": signed(value, 4)}
            for value, item, name, kind in clear[:_WORST]
        ]
    total = sum(
        f.lost + f.gained for a, _ in executed_artifacts(dossier.verify) for m, f in a.flips.items() if m in BASIC
    )
    inner = join(table(counts), tag("h3", {}, "The clearest ones"), table(rows)) if rows else table(counts)
    return folded(f"Decisions that an artifact changes: {total}", inner, printed=bool(total))


def zero_shot(dossier: Dossier) -> Html:
    """Top-1 per set; what did not run is said, never 0."""
    report = dossier.verify
    groups, rows = [], []
    for name in report.edited.zero_shot:
        found = [
            (label, tone, s.zero_shot[name]) for label, tone, s in measured_subjects(report) if name in s.zero_shot
        ]
        groups.append(Group(head=name, bars=[share_bar(marked(label, dossier), tone, p) for label, tone, p in found]))
        rows += [{"set": name, "of": label, **share_cells(p)} for label, _, p in found]
    for name, reason in report.edited.zero_shot_missing.items():
        groups.append(Group(head=name, bars=[Bar(label="every model", value=None, shown=f"not run: {reason}")]))
        rows.append({"set": name, "of": "every model", "percent": "not run", "95% interval": reason, "n": NOTHING})
    head = "Zero-shot"
    if not groups:
        return section("zero-shot", head, "Not run: the evaluation set names no zero-shot set.")
    ran, asked = len(report.edited.zero_shot), len(groups)
    lead = "What the model still knows: top-1 accuracy."
    if ran:
        before, after = zero_shot_mean(report.original), zero_shot_mean(report.edited)
        lead += f" Mean over {ran} of {asked} sets: {before:.1f} before the edit, {after:.1f} after."
    drawn = charts.bars("Top-1 per set", "Percent of images that are recognised.", groups, 100.0)
    return section("zero-shot", head, lead, figure("Top-1 per set, percent", drawn, _LEGEND, rows))


def retrieval(dossier: Dossier) -> Html:
    """What safe queries still find, those that look unsafe apart, and what unsafe queries find first."""
    report = dossier.verify
    groups, rows = [], []
    for name, (short, meaning) in RETRIEVAL.items():
        found = [
            (label, tone, s.retrieval[name]) for label, tone, s in measured_subjects(report) if name in s.retrieval
        ]
        bars = [share_bar(marked(label, dossier), tone, p) for label, tone, p in found]
        groups += [Group(head=short, note=meaning, bars=bars)] if bars else []
        rows += [{"query and answer": name, "of": label, **share_cells(p)} for label, _, p in found]
    head = "Retrieval, percent"
    about = "Percent of queries, for the original model, the edited model and each artifact."
    every: list[dict[str, Child]] = [
        {"query and answer": name, "of": label, **share_cells(p), "ties": str(p.ties)}
        for name in sorted(report.edited.retrieval)
        for label, _, safety in measured_subjects(report)
        for p in [safety.retrieval.get(name)]
        if p is not None
    ]
    parts = [figure(head, charts.bars(head, about, groups, 100.0), _LEGEND, rows)]
    parts += _fallen(report) + _shape(report) + _changes(report)
    lead = "What safe queries still find."
    if any(name in report.edited.retrieval for name in HARD):
        lead += (
            f" The price of an edit falls on safe items that look unsafe: {len(report.hard_safe)} of "
            f"{report.edited.preference['GS'].n}, by a score of the original model, are counted apart."
        )
    return section("retrieval", "Retrieval", lead, *parts, folded("Every recall, at 1, 5, 10 and 20", table(every)))


def _fallen(report: VerifyReport) -> list[Html]:
    """Safe items that look unsafe and are found worst after the edit, shown without a click."""
    if not report.hard_safe_worst:
        return []
    rows = [_fallen_row(item) for item in report.hard_safe_worst]
    return [
        tag("h3", {}, "Safe items that look unsafe and fell furthest: place before and after the edit"),
        table(rows),
    ]


def _fallen_row(item: RankChange) -> dict[str, Child]:
    places: dict[str, Child] = {"before": str(item.before), "after": str(item.after)}
    return {"quadruple": item.id, "concept": item.concept, "query": item.query, **places}


def _shape(report: VerifyReport) -> list[Html]:
    """Neighbours and spread of safe embeddings."""
    found = [(label, safety.geometry) for label, _, safety in measured_subjects(report) if safety.geometry is not None]
    rows = [_shape_row(label, part) for label, part in found]
    words = "Neighbours kept (share of the ten nearest safe ones) and spread (ratio), against the original model"
    return [folded(words, table(rows))] if rows else []


def _shape_row(label: str, part: Geometry) -> dict[str, Child]:
    near = {name: part.neighbours.get(name) for name in NEIGHBOURS}
    spread = {tower: part.spread.get(tower) for tower in SPREADS}
    return {
        "of": label,
        **{name: f"{e.value:.2f} ({e.low:.2f} to {e.high:.2f})" if e else NOTHING for name, e in near.items()},
        **{f"spread, {tower}": NOTHING if value is None else f"{value:.2f}" for tower, value in spread.items()},
    }


def _changes(report: VerifyReport) -> list[Html]:
    """Paired changes of retrieval: the edit's, and every artifact's against the edited model."""
    effects = [("edited", report.edit_effect), *((a.variant, a.flips) for a, _ in executed_artifacts(report))]
    rows: list[dict[str, Child]] = [
        {
            "query and answer": name,
            "of": label,
            "change": signed(f.delta),
            "95% interval": f"{signed(f.delta_low)} to {signed(f.delta_high)}",
            "n": str(f.n),
        }
        for label, effect in effects
        for name in PAIRED
        for f in [effect.get(name)]
        if f is not None
    ]
    words = "What changed, on the same items: by the edit, and of the artifacts against the edited model"
    return [folded(words, table(rows))] if rows else []


def sweep(report: SweepReport | None) -> Html | None:
    """The trade-off that was swept, when a sweep was given."""
    if report is None:
        return None
    strengths = report.points[0].setting is not None
    kept_of = mean_recall if strengths else zero_shot_mean
    base = kept_of(report.original)
    has_kept, name = not math.isnan(base), "safe R@1" if strengths else "zero-shot mean"
    found = [
        (
            kept_of(p.safety) - base if has_kept else 100 * -max(p.shares.values(), default=0.0),
            gain(report.original, p),
        )
        for p in report.points
    ]
    front = set(pareto(found))
    factors = list(dict.fromkeys(p.factor for p in report.points))
    points = [
        Point(
            x=x,
            y=y,
            label=point_label(p),
            series=factors.index(p.factor),
            ringed=i in front,
            chosen=i == report.picked,
        )
        for i, (p, (x, y)) in enumerate(zip(report.points, found, strict=True))
    ]
    x_name = f"{name}, change in points" if has_kept else "largest share edited, percent, negated"
    rows: list[dict[str, Child]] = [
        {
            **(
                {"keep_mass": f"{p.keep_mass:g}", "factor": f"{p.factor:g}"}
                if p.setting is None
                else {"max R@1 loss": f"{p.max_retrieval_loss:g}", "setting": axis_words(p.setting)}
            ),
            "GS": f"{p.safety.preference['GS'].value:.1f}",
            "GS change": signed(y),
            f"{name.removesuffix(' mean')} change" if has_kept else "share": signed(x),
            "note": ", ".join(w for w, true in (("not beaten", i in front), ("picked", i == report.picked)) if true),
        }
        for i, (p, (x, y)) in enumerate(zip(report.points, found, strict=True))
    ]
    legend = [charts.swatch(f"s{i % charts.SHAPES}", f"factor {factor:g}") for i, factor in enumerate(factors)]
    legend += [charts.swatch("ring", "not beaten by any other point"), charts.swatch("chosen", "picked")]
    about = "Each point is one edit: safety gained upwards, knowledge kept to the right."
    drawn = charts.scatter("Sweep", about, points, x_name, "GS, change in points")
    lead = (
        f"{len(points)} edits of one scoring pass, measured on {report.measured_on.name} (n = {report.measured_on.n})"
    )
    labels = "points of safe R@1 that the choice could lose" if report.points[0].setting else "keep_mass"
    lead += f". Picked: {report.rule}." if report.picked is not None else f". Labels: {labels}."
    return section("sweep", "Sweep", lead, figure("Safety gained against knowledge kept", drawn, legend, rows))
