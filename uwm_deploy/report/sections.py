"""The numbers of a report page, section by section: a picture of each, and the same as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from uwm_deploy.records import (
    ArtifactEvidence,
    Evidence,
    Flips,
    PrecisionPlan,
    Proportion,
    SafetyReport,
    SweepReport,
    VerifyReport,
)
from uwm_deploy.report import charts
from uwm_deploy.report.charts import Bar, Group, Point, Tone, signed
from uwm_deploy.report.evidence import Dossier, Margins
from uwm_deploy.report.markup import NOTHING, TIMES, Child, Html, join, tag
from uwm_deploy.safeground.canaries import RATIO_LIMIT
from uwm_deploy.safeground.preference import BASIC, COMBINED, METRICS
from uwm_deploy.safeground.tradeoff import gain, pareto, zero_shot_mean

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

_WORST = 10
"""Decisions of an artifact that are listed by id."""

_BLOCK_PARTS = 2
"""A layer's name with more parts lies inside a block, as in ``encoder.layers.0.mlp.fc1``."""

_DRAWN = 12
"""Layers of a tower in the picture of a precision plan; the table has all of them."""


def section(key: str, head: str, lead: Child, *body: Child) -> Html:
    """One part of the page, with a heading that can be linked to."""
    words = tag("p", {"class": "lead"}, lead) if lead else None
    return tag("section", {"id": key}, tag("h2", {}, head), words, *body)


def figure(head: str, drawn: Html, legend: Sequence[Html], rows: Sequence[Mapping[str, Child]]) -> Html:
    """A picture with its legend and its table."""
    key = tag("ul", {"class": "legend"}, *legend) if legend else None
    return tag("figure", {}, tag("figcaption", {}, head), key, drawn, folded("The numbers", table(rows)))


def folded(words: str, inner: Html, *, printed: bool = False) -> Html:
    """Something that opens on a click; in print it is as the reader left it, or open."""
    return tag("details", {"class": "printed" if printed else None}, tag("summary", {}, words), inner)


def table(rows: Sequence[Mapping[str, Child]]) -> Html:
    """Rows with the same keys; the first column names the row, columns of numbers are set to the right."""
    if not rows:
        return tag("p", {}, "none")
    right = {key for key in list(rows[0])[1:] if all(_is_number(row[key]) for row in rows)}
    head = [tag("th", {"scope": "col", "class": "number" if key in right else None}, key) for key in rows[0]]
    body = []
    for row in rows:
        first, *rest = row.items()
        cells = [tag("th", {"scope": "row"}, first[1])]
        cells += [tag("td", {"class": "number" if key in right else None}, value) for key, value in rest]
        body.append(tag("tr", {}, *cells))
    inner = tag("table", {}, tag("thead", {}, tag("tr", {}, *head)), tag("tbody", {}, *body))
    return tag("div", {"class": "scroll", "tabindex": 0, "role": "group", "aria-label": "table"}, inner)


def _is_number(value: Child) -> bool:
    text = "" if value is None else str(value)
    return not text or text[0] in "0123456789+-\N{MINUS SIGN}" or text == NOTHING


def executed(report: VerifyReport) -> list[tuple[ArtifactEvidence, SafetyReport]]:
    """Artifacts with numbers."""
    return [(a, a.safety) for a in report.artifacts if a.evidence is Evidence.EXECUTED and a.safety is not None]


def subjects(report: VerifyReport) -> Iterator[tuple[str, Tone, SafetyReport]]:
    """Original, edited and what was executed, in that order."""
    yield "original", "original", report.original
    yield "edited", "edited", report.edited
    for artifact, safety in executed(report):
        yield artifact.variant, "engine", safety


def _marked(label: str, dossier: Dossier) -> str:
    """A variant that failed is marked wherever it is drawn."""
    return f"✕ {label}" if dossier.verdict and label in dossier.verdict.failed else label


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
                bars=[_bar(_marked(who, dossier), tone, s.preference[name]) for who, tone, s in subjects(report)],
            )
            for name in names
        ]
        about = "Percent of quadruples, higher is safer, for the original model, the edited model and each artifact."
        rows: list[dict[str, Child]] = []
        for name in names:
            for label, _, safety in subjects(report):
                p = safety.preference[name]
                rows.append({"metric": name, "of": label, **_cells(p), "ties": str(p.ties)})
        return figure(head, charts.bars(head, about, groups, 100.0), _LEGEND, rows)

    n = report.edited.preference["GS"].n
    lead = (
        f"Share of {n} quadruples that are decided for the safe side; higher is safer, GS is the strictest. "
        "Whiskers are 95% Wilson intervals."
    )
    parts = drawn(BASIC, "The four decisions"), drawn(COMBINED, "Several decisions at once")
    return section("safety", "Safety", lead, tag("div", {"class": "pair"}, *parts), _effect(report))


def _bar(label: str, tone: Tone, p: Proportion) -> Bar:
    return Bar(label=label, tone=tone, value=p.value, low=p.low, high=p.high, shown=f"{p.value:.1f}")


def _cells(p: Proportion) -> dict[str, Child]:
    return {"percent": f"{p.value:.1f}", "95% interval": f"{p.low:.1f} to {p.high:.1f}", "n": str(p.n)}


def _effect(report: VerifyReport) -> Html:
    return folded("What the edit changed, decision by decision", table(_flip_rows("edited", report.edit_effect)))


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
        for label, _, safety in subjects(report):
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
    count = charts.counted(before, after)
    marks: list[tuple[float, Literal["lost", "gained"], str]] = []
    for artifact, _ in executed(report):
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
    for artifact, _ in executed(dossier.verify):
        counts += _flip_rows(artifact.variant, {m: f for m, f in artifact.flips.items() if f.lost + f.gained})
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
    total = sum(f.lost + f.gained for a, _ in executed(dossier.verify) for m, f in a.flips.items() if m in BASIC)
    inner = join(table(counts), tag("h3", {}, "The clearest ones"), table(rows)) if rows else table(counts)
    return folded(f"Decisions that an artifact changes: {total}", inner, printed=bool(total))


def zero_shot(dossier: Dossier) -> Html:
    """Top-1 per set; what did not run is said, never 0."""
    report = dossier.verify
    groups, rows = [], []
    for name in report.edited.zero_shot:
        found = [(label, tone, s.zero_shot[name]) for label, tone, s in subjects(report) if name in s.zero_shot]
        groups.append(Group(head=name, bars=[_bar(_marked(label, dossier), tone, p) for label, tone, p in found]))
        rows += [{"set": name, "of": label, **_cells(p)} for label, _, p in found]
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


def retrieval(report: VerifyReport) -> Html:
    """Recall, as a table only: it is four metrics at four depths."""
    rows: list[dict[str, Child]] = [
        {"query and answer": name, "of": label, **_cells(p)}
        for name in report.edited.retrieval
        for label, _, safety in subjects(report)
        for p in [safety.retrieval[name]]
    ]
    inner = folded("The numbers", table(rows))
    return section("retrieval", "Retrieval", "Recall at 1, 5, 10 and 20, safe and unsafe queries.", inner)


def sweep(report: SweepReport | None) -> Html | None:
    """The trade-off that was swept, when a sweep was given."""
    if report is None:
        return None
    base = zero_shot_mean(report.original)
    has_zero_shot = not math.isnan(base)
    found = [
        (zero_shot_mean(p.safety) - base if has_zero_shot else 100 * -max(p.shares.values()), gain(report.original, p))
        for p in report.points
    ]
    front = set(pareto(found))
    factors = list(dict.fromkeys(p.factor for p in report.points))
    points = [
        Point(
            x=x,
            y=y,
            label=f"{p.keep_mass:.3g}",
            series=factors.index(p.factor),
            ringed=i in front,
            chosen=i == report.picked,
        )
        for i, (p, (x, y)) in enumerate(zip(report.points, found, strict=True))
    ]
    x_name = "zero-shot mean, change in points" if has_zero_shot else "largest share edited, percent, negated"
    rows: list[dict[str, Child]] = [
        {
            "keep_mass": f"{p.keep_mass:g}",
            "factor": f"{p.factor:g}",
            "GS": f"{p.safety.preference['GS'].value:.1f}",
            "GS change": signed(y),
            "zero-shot change" if has_zero_shot else "share": signed(x),
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
    lead += f". Picked: {report.rule}." if report.picked is not None else ". Labels: keep_mass."
    return section("sweep", "Sweep", lead, figure("Safety gained against knowledge kept", drawn, legend, rows))


def shortened(names: Sequence[str]) -> tuple[list[str], str]:
    """Layer names without what those inside blocks share, and what they share with a star for the rest."""
    parts = [name.split(".") for name in names]
    inner = [part for part in parts if len(part) > _BLOCK_PARTS]
    if len(inner) < 2:
        return list(names), ""
    least = min(map(len, inner)) - 1
    head = next((i for i in range(least) if len({p[i] for p in inner}) > 1), least)
    tail = next((i for i in range(least - head) if len({p[-1 - i] for p in inner}) > 1), least - head)
    first = inner[0]
    pattern = ".".join([*first[:head], "*", *first[len(first) - tail :]])
    return [".".join(p[head : len(p) - tail] if p in inner else p) for p in parts], pattern


def edit(dossier: Dossier, method: str) -> Html:
    """Share of weights edited per layer."""
    layers = dossier.edit.layers
    groups, rows = [], []
    for tower in dict.fromkeys(layer.tower for layer in layers):
        own = [layer for layer in layers if layer.tower is tower]
        short, pattern = shortened([layer.name for layer in own])
        drawn = [
            Bar(label=label, value=100 * layer.share, shown=f"{100 * layer.share:.2f}")
            for label, layer in zip(short, own, strict=True)
        ]
        groups.append(Group(head=f"{tower.value} tower", note=charts.clipped(pattern, 54), bars=drawn))
        rows += [
            {
                "layer": layer.name,
                "tower": tower.value,
                "shape": f"{layer.shape[0]} {TIMES} {layer.shape[1]}",
                "edited": str(layer.selected),
                "percent": f"{100 * layer.share:.3f}",
                "factor": f"{layer.factor:g}",
            }
            for layer in own
        ]
    largest = max((bar.value or 0.0 for group in groups for bar in group.bars), default=0.0)
    about = "Percent of the entries of each layer that were multiplied by the factor."
    drawn_all = charts.bars("Weights edited per layer", about, groups, largest or 1.0)
    entries = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    lead = (
        f"{sum(layer.selected for layer in layers)} of {entries} entries in {len(layers)} layers; {method}. "
        f"Calibrated on {dossier.score.calibration.name}, {dossier.score.calibration.n} quadruples."
    )
    return section("edit", "The edit", lead, figure("Percent of weights edited per layer", drawn_all, (), rows))


def parity(dossier: Dossier) -> Html:
    """Numbers of every output against the edited model."""
    limits = {
        c.subject: c.limit for c in (dossier.verdict.checks if dossier.verdict else ()) if c.name == "parity.max_abs"
    }
    groups, rows = [], []
    for artifact, _ in executed(dossier.verify):
        drawn = []
        for p in artifact.parity:
            label = f"{p.output} {TIMES} {p.batch}"
            drawn.append(Bar(label=label, tone="engine", value=p.max_abs, shown=f"{p.max_abs:.0e}"))
            rows.append(
                {
                    "artifact": artifact.variant,
                    "output": p.output,
                    "batch": str(p.batch),
                    "n": str(p.n),
                    "largest": f"{p.max_abs:.2e}",
                    "mean": f"{p.mean_abs:.2e}",
                    "smallest cosine": f"{p.cosine_min:.7f}",
                    "finite": "yes" if p.finite else "NO",
                }
            )
        limit = limits.get(artifact.variant)
        groups.append(Group(head=_marked(artifact.variant, dossier), bars=drawn, limit=limit))
    if not groups:
        return section("parity", "Numbers", "Not run: no artifact was executed.")
    legend = (
        charts.swatch("dot engine", f"output {TIMES} rows per call"),
        charts.swatch("limit", "limit of the policy, where it has one"),
    )
    about = "Largest absolute difference of each output from the edited model, logarithmic from 1e-9 to 1."
    picture = charts.dots("Largest difference per output", about, groups, 1e-9, 1.0)
    lead = "Every output against the edited model in PyTorch float32, one row at a time and at the largest batch."
    return section(
        "parity", "Numbers", lead, figure("Largest difference, logarithmic from 1e-9 to 1", picture, legend, rows)
    )


def canaries(dossier: Dossier) -> Html:
    """Differential canaries."""
    report = dossier.verify
    groups, rows = [], []
    for artifact, _ in executed(report):
        drawn = [
            Bar(label=tower, tone="engine", value=value, shown=f"{value:.1e}" if value < 0.01 else f"{value:.2f}")
            for tower, value in artifact.canaries.items()
        ]
        if drawn:
            groups.append(Group(head=_marked(artifact.variant, dossier), bars=drawn, limit=RATIO_LIMIT))
        rows += [
            {"artifact": artifact.variant, "tower": tower, "worst ratio": f"{value:.3g}", "limit": f"{RATIO_LIMIT:g}"}
            for tower, value in artifact.canaries.items()
        ]
    head = "Canaries"
    if not groups:
        return section("canaries", head, "Not run: no artifact was executed, or no tower is edited.")
    lead = (
        "Inputs on which edited and original model differ most. The ratio is an artifact's distance to the edited model "
        "over its distance to the original: 0 is the edited model, 1 is in the middle, more is the wrong one."
    )
    about = "Worst ratio per tower; the line is the limit."
    picture = charts.bars("Worst canary per tower", about, groups, 1.0)
    return section(
        "canaries",
        head,
        lead,
        figure("Worst canary per tower, 0 to 1", picture, (charts.swatch("limit", "limit"),), rows),
    )


def compiled(dossier: Dossier) -> Html:
    """Engines: what was built, how long it took, what precision it has."""
    engines = dossier.engines
    if not engines:
        return section("engines", "Engines", "Not run: nothing was compiled.")
    evidence = {a.variant: a.evidence.value for a in dossier.verify.artifacts}
    groups = [
        Group(
            head=variant,
            bars=[
                Bar(label=f"{e.tower.value} tower", tone="engine", value=e.seconds, shown=f"{e.seconds:.1f} s")
                for e in engines
                if e.variant == variant
            ],
        )
        for variant in dict.fromkeys(e.variant for e in engines)
    ]
    rows: list[dict[str, Child]] = [
        {
            "engine": f"{e.variant}, {e.tower.value}",
            "evidence": evidence.get(e.variant, "not run"),
            "precision": e.precision,
            "seconds": f"{e.seconds:.2f}",
            "peak memory": f"{e.peak_rss_bytes / 2**20:.0f} MiB" if e.peak_rss_bytes else NOTHING,
            "built on": e.built_on,
            "versions": ", ".join(f"{k} {v}" for k, v in e.versions.items()),
            "batch": f"{e.profile.min} to {e.profile.max}",
        }
        for e in engines
    ]
    largest = max(e.seconds for e in engines)
    about = "Wall time of each build, seconds."
    picture = charts.bars("Compile time", about, groups, largest)
    lead = "Wall time of each build. Latency: not measured in these reports."
    parts = [figure("Compile time, seconds", picture, (), rows)]
    if lowered := _lowered(dossier):
        parts.append(folded("Graphs in lower precision", table(lowered)))
    return section("engines", "Engines", lead, *parts)


def _lowered(dossier: Dossier) -> list[dict[str, Child]]:
    rows: list[dict[str, Child]] = []
    for graph in dossier.converted:
        if (made := graph.conversion) is None:
            continue
        linear = made.achieved.get("linear", {})
        rows.append(
            {
                "graph": f"{made.precision.value}, {graph.tower.value}",
                "linear layers": ", ".join(f"{n} {kind}" for kind, n in linear.items()),
                "kept in float32": str(len(made.kept)),
                "edited entries that are zero": str(made.zeroed),
                "clamped constants": str(made.clamped),
                "activations in range, unsafe": f"{100 * made.coverage['unsafe'].inside:.1f}%"
                if "unsafe" in made.coverage
                else NOTHING,
            }
        )
    return rows


def plan(found: PrecisionPlan | None) -> Html | None:
    """What precision `auto` chose, when it was asked for."""
    if found is None:
        return None
    groups = []
    for tower in dict.fromkeys(layer.tower for layer in found.layers):
        own = [layer for layer in found.layers if layer.tower is tower]
        short, pattern = shortened([layer.name for layer in own])
        drawn = [
            Bar(
                label=label,
                tone="engine" if layer.kept else "original",
                value=layer.sensitivity,
                shown=f"{layer.sensitivity:.0e}",
            )
            for label, layer in zip(short, own, strict=True)
        ]
        groups.append(Group(head=f"{tower.value} tower", note=charts.clipped(pattern, 54), bars=drawn[:_DRAWN]))
    largest = max((layer.sensitivity for layer in found.layers), default=1.0)
    lowest = min((layer.sensitivity for layer in found.layers if layer.sensitivity > 0), default=largest / 10) / 2
    rows: list[dict[str, Child]] = [
        {
            "layer": layer.name,
            "tower": layer.tower.value,
            "sensitivity": f"{layer.sensitivity:.2e}",
            "precision": "fp32" if layer.kept else found.lowest.value,
        }
        for layer in found.layers
    ]
    steps: list[dict[str, Child]] = [
        {
            "plan": step.what,
            "kept": str(step.kept),
            "low precision": f"{100 * step.low_share:.1f}%",
            "flips": f"{step.flips:.2f}%",
        }
        for step in found.steps
    ]
    kept = sum(map(len, found.kept.values()))
    lead = (
        f"{100 * found.low_share:.1f}% of the multiplications are in {found.lowest.value}; {kept} layers stay in float32. "
        f"{found.flips:.2f}% of the decisions of the worst metric differ on {found.n} quadruples of the calibration set; "
        f"the search allowed {found.limit:g}%, the user {found.budget:g}%."
    )
    picture = charts.dots(
        "Sensitivity of layers",
        "What lowering one layer alone does to near ties, logarithmic.",
        groups,
        lowest,
        largest,
    )
    legend = (
        charts.swatch("bar engine", "stays in float32"),
        charts.swatch("bar original", f"in {found.lowest.value}"),
    )
    shown = figure(f"The {_DRAWN} most sensitive layers of each tower, logarithmic", picture, legend, rows)
    return section("plan", "Precision plan", lead, shown, folded("Every plan that was measured", table(steps)))


def chain(dossier: Dossier) -> Html:
    """Digests: what was made from what, then every file."""
    verify, edited = dossier.verify, dossier.edit
    links = [
        ("original weights", verify.model.weights_digest),
        ("calibration set, ids", dossier.score.calibration.ids_digest),
        ("calibration set, content", dossier.score.calibration.content_digest),
        ("scores", edited.scores_digest),
        ("patch", edited.patch_digest),
        ("edited weights", edited.edited_weights_digest),
        *((f"graph, {g.tower.value}", g.digest) for g in dossier.onnx),
        *(
            (f"engine, {a.variant}, {tower}", digest)
            for a in verify.artifacts
            if a.variant != "onnx"
            for tower, digest in a.artifact_digests.items()
        ),
        ("evaluation set, ids", verify.evaluation.ids_digest),
        ("evaluation set, content", verify.evaluation.content_digest),
    ]
    if dossier.verdict:
        links += [("report that was judged", dossier.verdict.report_digest), ("policy", dossier.verdict.policy_digest)]
    shown: list[dict[str, Child]] = [{"what": what, "digest": _digest(digest)} for what, digest in links]
    files: list[dict[str, Child]] = [
        {"file": f.path, "bytes": str(f.size_bytes), "digest": _digest(f.digest)} for f in dossier.files
    ]
    lead = "What was made from what, from the original weights to the verdict. A digest of a model is over its weights."
    names: dict[str, Any] = dict(verify.versions)
    versions = ", ".join(f"{name} {value}" for name, value in sorted(names.items()))
    every = folded(f"Every file of the {dossier.kind}: {len(files)}", table(files), printed=True)
    measured = tag("p", {"class": "small"}, f"Measured with {versions}.")
    return section("evidence", "Evidence", lead, table(shown), every, measured)


def _digest(digest: str) -> Html:
    return tag("code", {}, digest)
