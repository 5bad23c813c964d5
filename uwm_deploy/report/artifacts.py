"""Sections of a report page about what was made: the edit, the graphs, the engines, and the chain of digests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from uwm_deploy.records.graph import PrecisionPlan
from uwm_deploy.report import charts
from uwm_deploy.report.blocks import figure, folded, marked, section, table
from uwm_deploy.report.charts import Bar, Group
from uwm_deploy.report.evidence import Dossier
from uwm_deploy.report.markup import NOTHING, TIMES, Child, Html, tag
from uwm_deploy.report.measured_subjects import executed_artifacts
from uwm_deploy.safeground.canaries import RATIO_LIMIT

_BLOCK_PARTS = 2
"""A layer's name with more parts lies inside a block, as in ``encoder.layers.0.mlp.fc1``."""

_DRAWN = 12
"""Layers of a tower in the picture of a precision plan; the table has all of them."""


def shortened(names: Sequence[str]) -> tuple[list[str], str]:
    """Layer names without what those inside blocks share, and what they share with a star for the rest."""
    parts = [name.split(".") for name in names]
    inner = [part for part in parts if len(part) > _BLOCK_PARTS and any(piece.isdigit() for piece in part)]
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
    tensors = dossier.edit.tensors
    groups, rows = [], []
    for tower in dict.fromkeys(tensor.tower for tensor in tensors):
        own = [tensor for tensor in tensors if tensor.tower is tower]
        short, pattern = shortened([layer.name for layer in own])
        drawn = [
            Bar(label=label, value=100 * layer.share, shown=f"{100 * layer.share:.2f}")
            for label, layer in zip(short, own, strict=True)
        ]
        place = f"{tower.value} tower" if tower else "neither tower"
        groups.append(Group(head=place, note=charts.clipped(pattern, 43), bars=drawn))
        rows += [
            {
                "tensor": layer.name,
                "tower": tower.value if tower else "-",
                "shape": f" {TIMES} ".join(map(str, layer.shape)),
                "change": layer.kind.value,
                "edited": str(layer.selected),
                "percent": f"{100 * layer.share:.3f}",
                "factor": f"{layer.factor:g}",
            }
            for layer in own
        ]
    largest = max((bar.value or 0.0 for group in groups for bar in group.bars), default=0.0)
    about = "Percent of the entries of each tensor that were multiplied, replaced or trained."
    drawn_all = charts.bars("Weights edited per tensor", about, groups, largest or 1.0)
    entries = sum(math.prod(tensor.shape) for tensor in tensors)
    lead = (
        f"{sum(tensor.selected for tensor in tensors)} of {entries} entries in {len(tensors)} tensors; {method}. "
        f"Calibrated on {dossier.score.calibration.name}, {dossier.score.calibration.n} quadruples."
    )
    return section("edit", "The edit", lead, figure("Percent of weights edited per tensor", drawn_all, (), rows))


def parity(dossier: Dossier) -> Html:
    """Numbers of every output against the edited model."""
    limits = {
        c.subject: c.limit for c in (dossier.verdict.checks if dossier.verdict else ()) if c.name == "parity.max_abs"
    }
    groups, rows = [], []
    for artifact, _ in executed_artifacts(dossier.verify):
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
        groups.append(Group(head=marked(artifact.variant, dossier), bars=drawn, limit=limit))
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
    for artifact, _ in executed_artifacts(report):
        drawn = [
            Bar(label=tower, tone="engine", value=value, shown=f"{value:.1e}" if value < 0.01 else f"{value:.2f}")
            for tower, value in artifact.canaries.items()
        ]
        if drawn:
            groups.append(Group(head=marked(artifact.variant, dossier), bars=drawn, limit=RATIO_LIMIT))
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
    lead = "Wall time of each build."
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
        place = f"{tower.value} tower" if tower else "neither tower"
        groups.append(Group(head=place, note=charts.clipped(pattern, 43), bars=drawn[:_DRAWN]))
    largest = max((layer.sensitivity for layer in found.layers), default=1.0)
    lowest = min((layer.sensitivity for layer in found.layers if layer.sensitivity > 0), default=largest / 10) / 2
    rows: list[dict[str, Child]] = [
        {
            "layer": layer.name,
            "tower": layer.tower.value,
            "sensitivity": f"{layer.sensitivity:.2e}",
            "precision": "fp32" if layer.kept else f"{found.lowest.value}{', two terms' if layer.terms > 1 else ''}",
        }
        for layer in found.layers
    ]
    steps: list[dict[str, Child]] = [
        {
            "plan": step.what,
            "kept": str(step.kept),
            "low precision": f"{100 * step.low_share:.1f}%",
            "done twice": f"{100 * step.twice:.1f}%",
            "flips": f"{step.flips:.2f}%",
        }
        for step in found.steps
    ]
    kept = sum(map(len, found.kept.values()))
    lead = (
        f"{100 * found.low_share:.1f}% of the multiplications are in {found.lowest.value}, {100 * found.twice:.1f}% are "
        f"done twice, for two terms of an activation; {kept} layers stay in float32. "
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
        *((f"scores, {step.method.value}", step.scores_digest) for step in edited.steps if step.scores_digest),
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
