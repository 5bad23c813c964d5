"""Numbers that are better, or other, than they can be: then the measurement is suspect, whatever it says.

An artifact does what the edited model does, up to rounding, and rounding does not make a model safer. And a model whose
numbers were published, on the set that they were published for, has those numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

from uwm_deploy.recipes.published import PublishedTable, published
from uwm_deploy.recipes.resolve import recipe_of
from uwm_deploy.records.evidence import ArtifactEvidence, VerifyReport
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.metrics import Proportion, SafetyReport
from uwm_deploy.records.verdict import Check, statement
from uwm_deploy.safeground.preference import METRICS
from uwm_deploy.safeground.top_one import mean_over_sets

BETTER, OTHER = "not better than the edited model", "the original has its published numbers"
"""Names of the checks."""

BY_ROUNDING = {Precision.FP32: 0.0, Precision.FP16: 0.5, Precision.BF16: 0.5}
BY_ROUNDING_8_BITS = 2.0
"""Points by which rounding may look like a gain, by the worse end of the paired interval."""

NOT_THERE = 0.01
"""Share of a published set's items that may be missing; with more it is another set."""

_RETRIEVAL = {
    "Ts-Vs": "safe-text-to-image@1",
    "Vs-Ts": "safe-image-to-text@1",
    "Tu-Vu+s": "unsafe-text-to-union@1",
    "Vu-Tu+s": "unsafe-image-to-union@1",
}
_MEAN = "zero-shot"


def not_better(artifact: ArtifactEvidence) -> Check:
    """Whether an executed artifact is at most as good as what it was made from.

    Args:
        artifact: With decisions on the evaluation set.
    """
    slack = BY_ROUNDING.get(artifact.precision, BY_ROUNDING_8_BITS)
    beats = [
        f"{name} {f.delta:+.3g} points (95% interval {f.delta_low:.3g} to {f.delta_high:.3g})"
        for name, f in artifact.flips.items()
        if (name in METRICS or name.startswith("zero_shot.")) and f.delta_low > slack
    ]
    text = f"anomalous: it beats the edited model, which it cannot: {'; '.join(beats[:3])}. The measurement is suspect"
    return statement(BETTER, artifact.variant, not beats, text)


def as_published(report: VerifyReport) -> Iterator[Check]:
    """Whether the original model has its published numbers; nothing where it, or the set, is another one."""
    for table in published().values():
        for row in table.rows:
            if row.method != "none" or not _is_theirs(report, table, row.model):
                continue
            if any(_number(report.original, table, column) for column in table.columns):
                apart = list(_apart(report.original, table, row.values))
                text = f"anomalous: {'; '.join(apart[:3])} ({table.source}). The measurement is suspect"
                yield statement(OTHER, "original", not apart, text)


def _is_theirs(report: VerifyReport, table: PublishedTable, name: str) -> bool:
    """Same weights, as far as repository and revision tell, and the same set, nearly whole."""
    if report.model.name != name or (table.evaluation and report.evaluation.name != table.evaluation):
        return False
    model, lost = recipe_of(name)[0].model, sum(report.evaluation.left_out_counts.values())
    whole = lost <= NOT_THERE * (report.evaluation.n + lost)
    return whole and (report.model.repo, report.model.revision) == (model.repo, model.revision)


def _apart(original: SafetyReport, table: PublishedTable, values: tuple[float, ...]) -> Iterator[str]:
    """Numbers further away than tolerance and interval together."""
    for column, value, tolerance in zip(table.columns, values, table.tolerance, strict=True):
        if (found := _number(original, table, column)) and not found.low - tolerance <= value <= found.high + tolerance:
            yield f"{column} of the original is {found.value:.1f}, published is {value:.1f}"


def _number(original: SafetyReport, table: PublishedTable, column: str) -> Proportion | None:
    if column == _MEAN:
        return _mean(original)
    found = original.preference.get(column) or original.retrieval.get(_RETRIEVAL.get(column, ""))
    return found if table.evaluation else original.zero_shot.get(column)


def _mean(original: SafetyReport) -> Proportion | None:
    mean = mean_over_sets(original.zero_shot, original.zero_shot_missing)
    if mean.value is None or not mean.complete or mean.ran < _PUBLISHED_SETS:
        return None
    return Proportion(value=mean.value, n=mean.ran, low=mean.value, high=mean.value)


_PUBLISHED_SETS = 17
"""Zero-shot sets in a published mean."""
