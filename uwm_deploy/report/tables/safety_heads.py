"""What `train safety-head` and `train language-adapter` made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from uwm_deploy.records.adapter import LanguageAdapter
from uwm_deploy.records.head import MIXED_FROM, SafetyHead
from uwm_deploy.records.metrics import RiskReport
from uwm_deploy.report.lines import Whole
from uwm_deploy.report.markdown_table import inert, markdown_table
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
    print_lines([*trained_head_lines(head), f"safe texts: {texts}", Whole(f"head: {out}")])


def trained_head_lines(head: SafetyHead) -> Iterator[str]:
    """Temperatures, thresholds, training and categories, in lines."""
    training = head.training
    for output, found in head.calibration.items():
        errors = f"{found.ece_before:.2f} -> {found.ece_after:.2f} points (n = {found.n})"
        yield f"{output}: temperature {found.temperature:.3f}, calibration error {errors}"
    for action, limit in head.thresholds.items():
        told = "; from here on a language model gets the safety prompt" if action == MIXED_FROM else ""
        told += " and the safety tokens" if told and head.language else ""
        yield f"{action}: from level {limit:.4f} on, for {head.false_positive_rates[action]:g}% of safe images{told}"
    yield (
        f"trained on {training.pairs} pairs in {training.seconds:.1f} s, loss {training.loss_first:.3f} -> "
        f"{training.loss_last:.3f}; {training.validation_pairs} pairs for temperatures and thresholds"
    )
    if (language := head.language) is not None:
        yield (
            f"{head.shape.tokens} safety tokens of width {head.shape.language} for {language.model}, loss of its answers "
            f"{language.loss_first:.3f} -> {language.loss_last:.3f}"
        )
    yield "categories: " + ", ".join(head.categories)


def print_trained_adapter(adapter: LanguageAdapter, *, out: Path) -> None:
    """Prints how adapters were trained.

    Args:
        adapter: Their record.
        out: Their folder.
    """
    print_lines([*trained_adapter_lines(adapter), Whole(f"adapters: {out}")])


def trained_adapter_lines(adapter: LanguageAdapter) -> Iterator[str]:
    """Sizes, training and what the risks put before the questions, in lines."""
    yield f"{adapter.trainable_parameters} parameters of rank {adapter.rank} for {adapter.model}"
    yield (
        f"trained on {adapter.pairs} pairs of {adapter.data.name} in {adapter.seconds:.1f} s, {adapter.epochs} passes, loss "
        f"{adapter.loss_first:.3f} -> {adapter.loss_last:.3f}"
    )
    yield (
        f"the safety prompt and tokens were mixed in for {adapter.prompted_unsafe} unsafe and {adapter.prompted_safe} safe "
        f"images, of {adapter.pairs} each"
    )
    missed = adapter.pairs - adapter.prompted_unsafe
    yield f"{missed} unsafe images that the head lets through: {'declined' if adapter.decline_missed else 'left out'}"


def trained_adapter_markdown(adapter: LanguageAdapter) -> str:
    """The same as a file in Markdown, with the digests that it is bound to."""
    bound = {
        "language model": adapter.model_digest,
        "safety head": adapter.head_digest,
        "edited weights": adapter.edited_weights_digest,
        "adapters": adapter.weights_digest,
    }
    lines = [f"- {inert(line)}" for line in trained_adapter_lines(adapter)]
    lines += [f"- asked: {inert(adapter.question)}", f"- taught of unsafe images: {inert(adapter.refusal)}"]
    table = markdown_table([{"of": what, "digest": digest} for what, digest in bound.items()])
    return "\n\n".join(("# Adapters of a language model behind a safety head", "\n".join(lines), table)) + "\n"
