"""What `train safety-head` made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from uwm_deploy.records.head import SafetyHead
from uwm_deploy.records.metrics import RiskReport
from uwm_deploy.report.tables.safety_numbers import risk_rows
from uwm_deploy.report.terminal import print_lines, print_rows


def print_trained_head(head: SafetyHead, validation: RiskReport, *, texts: int, out: Path) -> None:
    """Prints what a head makes of its validation pairs, and how it was trained.

    Args:
        head: Its record.
        validation: On the pairs that temperatures and thresholds are from.
        texts: Number of safe texts.
        out: Its folder.
    """
    print_rows(risk_rows([("validation", validation)]))
    print_lines([*trained_head_lines(head), f"safe texts: {texts}", f"head: {out}"])


def trained_head_lines(head: SafetyHead) -> Iterator[str]:
    """Temperatures, thresholds, training and categories, in lines."""
    training = head.training
    for output, found in head.calibration.items():
        errors = f"{found.ece_before:.2f} -> {found.ece_after:.2f} points (n = {found.n})"
        yield f"{output}: temperature {found.temperature:.3f}, calibration error {errors}"
    for action, limit in head.thresholds.items():
        yield f"{action}: from level {limit:.4f} on, for {head.false_positive_rates[action]:g}% of safe images"
    yield (
        f"trained on {training.pairs} pairs in {training.seconds:.1f} s, loss {training.loss_first:.3f} -> "
        f"{training.loss_last:.3f}; {training.validation_pairs} pairs for temperatures and thresholds"
    )
    yield "categories: " + ", ".join(head.categories)
