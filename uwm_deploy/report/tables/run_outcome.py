"""What a run of the pipeline left: its tables, or the same as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from uwm_deploy.records.codec import plain_from_record
from uwm_deploy.records.edit import EditKind, EditRecord, FitRecord, ScoreRecord
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.graph import EngineArtifact, OnnxArtifact, PrecisionPlan
from uwm_deploy.records.verdict import Verdict
from uwm_deploy.report.edit_words import method_line
from uwm_deploy.report.lines import Whole
from uwm_deploy.report.tables.precision_plan import print_plan
from uwm_deploy.report.tables.safety_numbers import print_report
from uwm_deploy.report.tables.verdict_lines import print_verdict
from uwm_deploy.report.terminal import print_line, print_rows


class RunOutcome(Protocol):
    """What a run left, as far as it went; what it did not reach is None or empty."""

    @property
    def name(self) -> str:
        """Of the recipe."""

    @property
    def work(self) -> Path:
        """The run folder."""

    @property
    def out(self) -> Path | None:
        """The bundle."""

    @property
    def reused(self) -> Sequence[str]:
        """Stages that were not run again."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """Target to the reason why it was not compiled."""

    @property
    def score(self) -> ScoreRecord | None:
        """See `ScoreRecord`."""

    @property
    def fit(self) -> FitRecord | None:
        """See `FitRecord`."""

    @property
    def edit(self) -> EditRecord | None:
        """See `EditRecord`."""

    @property
    def onnx(self) -> Sequence[OnnxArtifact]:
        """Exported graphs."""

    @property
    def engines(self) -> Sequence[EngineArtifact]:
        """Compiled variants, one record per tower."""

    @property
    def plan(self) -> PrecisionPlan | None:
        """What precision `auto` chose."""

    @property
    def report(self) -> VerifyReport | None:
        """What was measured."""

    @property
    def verdict(self) -> Verdict | None:
        """What the gate decided."""


def outcome_as_plain(outcome: RunOutcome) -> dict[str, Any]:
    """Everything a run produced, as plain data for `--json`."""
    body = {
        "name": outcome.name,
        "work": str(outcome.work),
        "bundle": str(outcome.out) if outcome.out else None,
        "reused": list(outcome.reused),
        "skipped": dict(outcome.skipped),
    }
    for key in ("score", "fit", "edit", "onnx", "engines", "plan", "report", "verdict"):
        value = getattr(outcome, key)
        if value:
            body[key] = plain_from_record(value)
    return body


def print_outcome(outcome: RunOutcome) -> None:
    """The tables a person wants after a run, ending with the verdict."""
    if outcome.report is None:
        _print_made(outcome)
    else:
        print_report(outcome.report)
    if outcome.plan is not None:
        print_plan(outcome.plan)
    for target, reason in outcome.skipped.items():
        print_line(f"not compiled: {target}: {reason}", style="yellow")
    if outcome.verdict is not None:
        print_verdict(outcome.verdict)
    if outcome.out is not None:
        print_line(Whole(f"bundle: {outcome.out}"))


def _print_made(outcome: RunOutcome) -> None:
    """What there is before anything was measured."""
    if outcome.edit is not None:
        print_rows(edit_rows(outcome.edit))
        print_line(f"method: {method_line(outcome.edit)}")
    elif outcome.fit is not None:
        print_rows(fit_rows(outcome.fit))
    elif outcome.score is not None:
        print_rows(score_rows(outcome.score))
    print_rows([_graph_row(graph) for graph in outcome.onnx])
    print_rows([_engine_row(engine) for engine in outcome.engines])
    print_line(Whole(f"files: {outcome.work}"))


def edit_rows(edit: EditRecord) -> list[dict[str, object]]:
    """One row per tensor that an edit touches."""
    return [
        {
            "tensor": tensor.name,
            "tower": tensor.tower.value if tensor.tower else "-",
            "shape": " x ".join(map(str, tensor.shape)),
            "change": tensor.kind.value,
            "edited": tensor.selected,
            "share": f"{100 * tensor.share:.2f}%",
            "factor": tensor.factor if tensor.kind is EditKind.MULTIPLIED else "-",
        }
        for tensor in edit.tensors
    ]


def score_rows(score: ScoreRecord) -> list[dict[str, object]]:
    """One row per tower that was scored."""
    return [
        {
            "tower": tower,
            "rule": score.rules[tower].value,
            "pairs": score.n_pairs[tower],
            "left out": len(score.left_out[tower]),
            "seconds": f"{score.seconds[tower]:.1f}",
        }
        for tower in score.n_pairs
    ]


def fit_rows(fit: FitRecord) -> list[dict[str, object]]:
    """One row per tower whose features were summed for a closed-form step."""
    return [
        {
            "tower": tower,
            "method": fit.method.value,
            "placement": fit.placement,
            "pairs": fit.n_pairs[tower],
            "left out": len(fit.left_out[tower]),
            "seconds": f"{fit.seconds[tower]:.1f}",
        }
        for tower in fit.n_pairs
    ]


def _graph_row(graph: OnnxArtifact) -> dict[str, object]:
    return {
        "graph": f"{graph.tower.value}.onnx",
        "opset": graph.opset,
        "input": str(graph.inputs[0].shape),
        "output": str(graph.outputs[0].shape),
        "edited layers found": graph.fingerprint.layers,
        "edited entries found": graph.fingerprint.entries,
    }


def _engine_row(engine: EngineArtifact) -> dict[str, object]:
    return {
        "variant": engine.variant,
        "tower": engine.tower.value,
        "built": engine.built_on,
        "state": "can run here" if engine.runnable else "compiled, not run",
        "seconds": f"{engine.seconds:.1f}",
    }
