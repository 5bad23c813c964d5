"""What a refit made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.verdict import Verdict
from uwm_deploy.report.edit_words import entries_line, method_line
from uwm_deploy.report.lines import Whole
from uwm_deploy.report.tables.verdict_lines import print_verdict
from uwm_deploy.report.terminal import print_line


class RefittedBundle(Protocol):
    """A bundle with another edit."""

    @property
    def out(self) -> Path:
        """The new bundle."""

    @property
    def edit(self) -> EditRecord:
        """Its edit."""

    @property
    def layers(self) -> int:
        """Tensors whose weights changed."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """Variants that the new bundle does not have, with the reason."""

    @property
    def verdict(self) -> Verdict:
        """Of the new bundle."""


def print_refitted(made: RefittedBundle) -> None:
    """What was replaced, what could not be, and the verdict."""
    print_line(f"refitted: {made.layers} tensors changed; {entries_line(made.edit)}")
    print_line(f"method: {method_line(made.edit)}")
    for variant, reason in made.left_out.items():
        print_line(f"left out: {variant}: {reason}", style="yellow")
    print_verdict(made.verdict)
    print_line(Whole(f"bundle: {made.out}"))
