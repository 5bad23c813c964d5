"""What scoring costs by method, on the demo model: seconds of both towers divided by those of their bare forward pass.

    python tests/benchmarks/bench_methods.py --pairs 512

Pairs are drawn and tokenised before anything is timed, so that the ratios are of the methods alone. Methods and the bare
pass take turns; the median of the rounds counts. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from uwm_deploy.data.demo.source import DemoSource
from uwm_deploy.data.source import PairBatch
from uwm_deploy.edits.methods import needs_gradients, selects, with_method
from uwm_deploy.edits.pair_stream import PairStream
from uwm_deploy.edits.pairs import scoring_order
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.edit_spec import EditSpecs
from uwm_deploy.recipes.resolve import calibration_set_of, recipe_of
from uwm_deploy.records.data import LeftOut
from uwm_deploy.records.edit import Method
from uwm_deploy.records.model import TowerName
from uwm_deploy.report.markdown_table import markdown_table
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.stages.score.score import score_to_folder
from uwm_deploy.towers.load import load_model
from uwm_deploy.towers.protocol import LoadedModel

METHODS = [*(m for m in Method if selects(m))]
BATCH = {TowerName.IMAGE: 16, TowerName.TEXT: 64}


class Ready:
    """A stream whose pairs are in memory."""

    def __init__(self, batches: list[PairBatch]) -> None:
        self.batches, self.left_out = batches, list[LeftOut]()

    def __iter__(self) -> Iterator[PairBatch]:
        return iter(self.batches)


def ready(model: LoadedModel, source: DemoSource, edits: EditSpecs) -> dict[TowerName, Ready]:
    """Both towers' pairs in the order of a method."""
    ordered = scoring_order(source, edits, 0)
    tokenizer = Tokenizer(model.tokenizer_json, model.ref.text)
    return {
        tower: Ready(
            list(
                PairStream(
                    ordered, tower, model.ref.image, tokenizer, batch_pairs=BATCH[tower], workers=0, max_broken_share=0,
                    progress=lambda *_: None, sort_by_length=not (edits.per_concept or needs_gradients(edits.method)),
                )
            )
        )
        for tower in TowerName
    }  # fmt: skip


@torch.inference_mode()
def forward(model: LoadedModel, streams: dict[TowerName, Ready]) -> None:
    """Both sides of every pair through their tower."""
    for tower, stream in streams.items():
        for batch in stream:
            model.tower(tower).embed(torch.from_numpy(np.concatenate([batch.safe, batch.unsafe])))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    recipe, _ = recipe_of("demo")
    model = load_model(recipe, folder=resources.checkpoint_folder("shipped:demo", ""), device="cpu")
    source = DemoSource(calibration_set_of("demo")[0])
    for values in (source.ids, source.concepts, source.indices):
        del values[arguments.pairs :]
    concepts = dict(zip(source.ids, source.concepts, strict=True))
    specs = {m.value: with_method(recipe.entries, method=m) for m in METHODS}
    specs["uwm, per concept"] = with_method(recipe.entries, per_concept=True)
    plain = ready(model, source, recipe.entries)
    streams = {
        name: ready(model, source, edits) if edits.per_concept or needs_gradients(edits.method) else plain
        for name, edits in specs.items()
    }

    def scoring(name: str) -> Callable[[], None]:
        def run() -> None:
            with tempfile.TemporaryDirectory() as folder:
                score_to_folder(model, source.record, streams[name].__getitem__, specs[name], Path(folder), concepts)

        return run

    runs: dict[str, Callable[[], None]] = {"forward": lambda: forward(model, plain)} | {n: scoring(n) for n in specs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    bare = statistics.median(seconds.pop("forward"))
    print(f"{len(source)} pairs, {torch.get_num_threads()} threads, median of {arguments.rounds}; forward {bare:.2f} s")
    ratios = {name: statistics.median(values) / bare for name, values in seconds.items()}
    print(markdown_table([{"method": name, "scoring / bare forward": f"{r:.2f}"} for name, r in ratios.items()]))


if __name__ == "__main__":
    main()
