"""Honest rebuilds, which must all pass.

The same pipeline with other edits, seeds, threads, batches and workers, other operator sets, another time of optimisation,
and other ranges of 8-bit numbers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.records.studies import Rebuild
from uwm_deploy.records.verdict import Result, Verdict
from uwm_deploy.report.console import Reporter
from uwm_deploy.stages.verify.anew import Trace, kept_traces, tracer
from uwm_deploy.studies.selftest.honest_builds import FOLDED, MAPPED, PAIRS_SCORED, QUADRUPLES, UWM, MadeBy, data_file
from uwm_deploy.towers.threads import threads

PER_EDIT = 5
"""Rebuilds that share scores, edit and export, and are compiled and verified anew."""

MANY = 640
"""Quadruples for 8-bit numbers, which do change decisions: four of 160 may differ by chance, and the policy allows 2%."""

_EDITS = (UWM, FOLDED, MAPPED)
_BATCHES = (32, 1, 5, 16, 8)
_BATCH_PAIRS = (8, 1, 32, 3)
_OPSETS = (20, 18, 21, 23)
_THREADS = (1, 2, 4)
_LOWER = (("", "", "fp16", "", "auto"), ("", "", "fp16", "", ""))
"""By edit and turn; `auto` searches for longer than all the rest takes, so every other edit goes without."""


@dataclass(frozen=True, slots=True)
class Variation:
    """What one rebuild does differently.

    Attributes:
        made_by: How the edit is made.
        seed: Of the calibration sample.
        batch_pairs: Pairs per pass while scoring.
        opset: Of the exported graphs.
        ids: Element type of their ids.
        threads: Of PyTorch.
        workers: Decoding processes.
        max_batch: Largest batch of the engines.
        items: Seed of the evaluation sample.
        lower: Precision of further engines; empty for none.
        provider: What engines are made for, which is also when and how far they are optimised.
    """

    made_by: MadeBy
    seed: int
    batch_pairs: int
    opset: int
    ids: str
    threads: int
    workers: int
    max_batch: int
    items: int
    lower: str
    provider: str

    def words(self) -> str:
        """What a table says of it."""
        placed = f" in the {self.made_by.placement.value}" if self.made_by.placement else ""
        lower = f", {self.lower} too" if self.lower else ""
        return (
            f"{self.made_by.method}{placed}, seed {self.seed}, {self.batch_pairs} pairs per pass, {self.threads} threads, "
            f"{self.workers} workers, opset {self.opset}, {self.ids} ids, for {self.provider}, batch up to "
            f"{self.max_batch}, sample {self.items}{lower}"
        )


def variations(count: int) -> list[Variation]:
    """Different rebuilds, those with the same edit one after the other."""
    found = []
    for number in range(count):
        edit, turn = divmod(number, PER_EDIT)
        found.append(
            Variation(
                made_by=_EDITS[edit % len(_EDITS)],
                seed=edit,
                batch_pairs=_BATCH_PAIRS[edit % len(_BATCH_PAIRS)],
                opset=_OPSETS[edit % len(_OPSETS)],
                ids=("int64", "int32")[edit // 2 % 2],
                threads=_THREADS[(edit + turn) % len(_THREADS)],
                workers=(0, 2)[turn % 2],
                max_batch=_BATCHES[turn],
                items=number,
                lower=_LOWER[edit % 2][turn],
                provider=("any", "cpu")[(edit + turn) % 2],
            )
        )
    return found


def rebuild_all(
    folder: Path, chosen: Sequence[Variation], progress: Callable[[str, int, int], None]
) -> Iterator[Rebuild]:
    """Builds, verifies and judges again and again.

    Args:
        folder: Where run folders go.
        chosen: What to build.
        progress: Called as it goes on.
    """
    seed, trace = -1, kept_traces()
    for number, variation in enumerate(chosen):
        if variation.seed != seed:  # graphs of one edit at a time
            seed, trace = variation.seed, kept_traces()
        with threads(variation.threads):
            rebuild = _rebuilt(variation, folder, trace)
        yield rebuild
        progress("honest rebuilds", number + 1, len(chosen))


def _rebuilt(variation: Variation, folder: Path, trace: Trace) -> Rebuild:
    own = folder / f"edit-{variation.seed}"
    own.mkdir(parents=True, exist_ok=True)
    request = dataclasses.replace(
        variation.made_by.request(
            own,
            data_file(own, "calibration", "calibration", PAIRS_SCORED, variation.seed),
            data_file(own, "test", "test", MANY if variation.lower == "auto" else QUADRUPLES, variation.items),
        ),
        model=_recipe(own, variation),
        precisions=("fp32", variation.lower) if variation.lower else ("fp32",),
        workers=variation.workers,
        batch_pairs=variation.batch_pairs,
    )
    verdict = run(request, until="gate", reporter=Reporter(quiet=True), kept={tracer: trace}).left(Verdict)
    failing = tuple(f"{c.subject}: {c.name}" for c in verdict.checks if c.result is not Result.PASS)
    return Rebuild(what=variation.words(), result=verdict.result, failing=failing)


def _recipe(folder: Path, variation: Variation) -> str:
    """The demo's recipe with other graphs and engines."""
    text, _ = resources.read_toml("export", "demo")
    most, made_for = variation.max_batch, f'onnxruntime = {{ providers = ["{variation.provider}"] }}'
    for key, value in (
        ("opset", f"{variation.opset}"),
        ("ids_dtype", f'"{variation.ids}"'),
        ("batch", f"{{ min = 1, opt = {min(8, most)}, max = {most} }}\n{made_for}"),
    ):
        text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", text, count=1)
    path = folder / "demo.toml"  # a recipe is called as its file
    path.write_text(text, encoding="utf-8")
    return str(path)
