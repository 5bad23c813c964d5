"""Sweep of keep_mass on the demo: one scoring pass, every point measured on the calibration split and on the test split.

    python tests/benchmarks/demo_sweep.py

The demo's keep_mass is picked on the calibration split only: the point with the highest GS among those whose zero-shot mean
falls by at most 5 points. The test split is printed beside it, as it comes.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch

from uwm_deploy import resources
from uwm_deploy.console import Reporter
from uwm_deploy.datasets.embedding import PreparedSet, prepare
from uwm_deploy.datasets.source import open_source
from uwm_deploy.pipeline import Request, calibration_set_of, recipe_of, run
from uwm_deploy.records import SafetyReport
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.embedded import safety_report
from uwm_deploy.stages.load import load_model
from uwm_deploy.stages.verify import embed_model
from uwm_deploy.towers.protocol import LoadedModel

POINTS = (0.999, 0.99, 0.98, 0.97, 0.95, 0.93, 0.9, 0.85, 0.8)
ALLOWED_DROP = 5.0


def silent(label: str, done: int, total: int) -> None:
    """No progress."""


def zero_shot_mean(report: SafetyReport) -> float:
    """Mean top-1 over the zero-shot sets, percent."""
    return sum(p.value for p in report.zero_shot.values()) / len(report.zero_shot)


def row(label: str, reports: dict[str, SafetyReport]) -> str:
    """One line of the table: both splits."""
    cells = []
    for report in reports.values():
        values = [report.preference[name].value for name in ("P_ts", "P_tu", "P_vs", "P_vu", "PU", "GS")]
        cells.append(" | ".join(f"{v:.1f}" for v in [*values, zero_shot_mean(report)]))
    return f"| {label} | " + " | ".join(cells) + " |"


def measure(model: LoadedModel, sets: dict[str, PreparedSet]) -> dict[str, SafetyReport]:
    """SafeGround of one model on every set."""
    return {name: safety_report(name, embed_model(model, prepared, name, silent)) for name, prepared in sets.items()}


def main() -> None:
    """Prints the table and the picked point."""
    torch.set_num_threads(2)
    recipe, _ = recipe_of("demo")
    folder = resources.checkpoint_folder(recipe.model.repo, "")
    model = load_model(recipe, folder=folder, device="cpu")
    tokenizer = Tokenizer(model.tokenizer_json, model.ref.text)
    sets = {}
    for name in ("calibration", "test"):
        spec, _, _ = calibration_set_of("demo-test")
        source = open_source(dataclasses.replace(spec, split=name), base=None)
        sets[name] = prepare(source, model.ref.image, tokenizer, workers=2, progress=silent)
    names = "P_ts | P_tu | P_vs | P_vu | PU | GS | zero-shot"
    print(f"| keep_mass | {names} (calibration) | {names} (test) |")
    base = measure(model, sets)
    print(row("original", base))
    best = (0.0, "none")
    with tempfile.TemporaryDirectory() as work:
        for keep in POINTS:
            run(Request(keep_mass=keep, work=Path(work), device="cpu"), until="edit", reporter=Reporter(quiet=True))
            edited = load_model(recipe, folder=Path(work) / "edit" / "model", device="cpu")
            reports = measure(edited, sets)
            print(row(f"{keep}", reports), flush=True)
            drop = zero_shot_mean(base["calibration"]) - zero_shot_mean(reports["calibration"])
            best = max(
                best, (reports["calibration"].preference["GS"].value if drop <= ALLOWED_DROP else -1.0, f"{keep}")
            )
    print(f"picked on the calibration split: {best[1]}")


if __name__ == "__main__":
    main()
