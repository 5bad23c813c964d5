"""Precision auto beside a magnitude rule, on the demo, with equally many layers in float32: flips of both from one run.

    python tests/benchmarks/bench_precision.py --work .uwm/precision

The rule keeps in float32 the layers that reach the largest values: outputs, inputs or weights. That is how tools choose that
look at overflow alone. Every plan is INT8 elsewhere, with the same ranges, executed in ONNX Runtime and compared with the
float32 graphs, on the calibration quadruples that the search used and on the test set that it never saw. Prints Markdown.

Where nvidia-modelopt is installed, the rule of its AutoCast is applied by its own code, and its graphs are measured too.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections import Counter
from pathlib import Path

import modelopt_rules
import numpy as np
import onnx_ir as ir

from uwm_deploy.data.embedding import PreparedSet, prepare
from uwm_deploy.data.open import open_source
from uwm_deploy.data.order import some_of
from uwm_deploy.graphs.achieved_precision import achieved_precision
from uwm_deploy.graphs.layers import linear_layers
from uwm_deploy.graphs.modelopt import RangeMethod
from uwm_deploy.graphs.quantise import EightBitType
from uwm_deploy.graphs.ranges import activation_maxima
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes.resolve import calibration_set_of, recipe_of
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.model import TowerName
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.markdown_table import markdown_table
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.stages.convert.convert import ranges_of
from uwm_deploy.stages.convert.search import Layer, Mix, Search, Source, search
from uwm_deploy.towers.load import load_model

RANGE_ROWS = 128


def rows_of(prepared: PreparedSet, tower: TowerName) -> dict[str, list[np.ndarray]]:
    """Some safe and unsafe inputs of a tower, in small batches."""
    image = tower is TowerName.IMAGE
    safe = prepared.safe_pixels if image else prepared.safe_ids
    unsafe = prepared.unsafe_pixels if image else prepared.unsafe_ids
    step = len(prepared.ids) // RANGE_ROWS
    pick = np.array_split(np.arange(0, RANGE_ROWS * step, step), RANGE_ROWS // 16)
    return {"safe": [safe[rows] for rows in pick], "unsafe": [unsafe[rows] for rows in pick]}


def magnitudes(source: Path, tower: TowerName, rows: list[np.ndarray], folder: Path) -> dict[str, dict[Layer, float]]:
    """Rule to layer to the largest absolute value it looks at."""
    layers = linear_layers(ir.load(source))
    outputs = {name: layer.node.outputs[0].name or "" for name, layer in layers.items()}
    inputs = {name: layer.node.inputs[0].name or "" for name, layer in layers.items()}  # type: ignore[union-attr]
    maxima = activation_maxima(source, [*outputs.values(), *inputs.values()], rows, folder)
    weights = {name: float(np.abs(layer.weight.const_value.numpy()).max()) for name, layer in layers.items()}  # type: ignore[union-attr]
    return {
        "largest outputs": {(tower, name): float(maxima[value].max()) for name, value in outputs.items()},
        "largest inputs": {(tower, name): float(maxima[value].max()) for name, value in inputs.items()},
        "largest weights": {(tower, name): value for name, value in weights.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path(".uwm/bench-precision"))
    work: Path = parser.parse_args().work
    outcome = run(Request(work=work), until="export", reporter=Reporter())
    recipe, spec = recipe_of("demo")[0], recipe_of("demo")[0].compile.auto
    model = load_model(recipe, folder=work / "edit" / "model", device="cpu")
    tokenizer = Tokenizer(model.tokenizer_json, model.ref.text)

    def prepared(name: str, items: int) -> PreparedSet:
        definition, _, base = calibration_set_of(name)
        source = some_of(open_source(definition, base=base), items)
        return prepare(source, model.ref.image, tokenizer, workers=0, progress=lambda *_: None)

    calibration = prepared(recipe.data.calibration, spec.items)
    sources, sizes = {}, dict[str, dict[Layer, float]]()
    rows: dict[TowerName, list[np.ndarray]] = {}
    for graph in outcome.onnx:
        path, batches = work / "export" / graph.file, rows_of(calibration, graph.tower)
        sources[graph.tower] = Source(graph, path, ranges_of(path, batches, work))
        rows[graph.tower] = [*batches["safe"], *batches["unsafe"]]
        found = magnitudes(path, graph.tower, rows[graph.tower], work)
        for rule, values in found.items():
            sizes.setdefault(rule, {}).update(values)
    plan = search(sources, calibration, spec, (), work, lambda *_: None)
    chosen = frozenset((TowerName(tower), name) for tower, names in plan.kept.items() for name in names)
    plans = {"all INT8": frozenset[Layer](), "auto": chosen}
    for rule, values in sizes.items():
        plans[rule] = frozenset(sorted(values, key=lambda layer: (-values[layer], layer))[: len(chosen)])
    rng = np.random.default_rng(0)
    every = sorted(sizes["largest outputs"])
    for turn in range(3):
        picked = rng.choice(len(every), len(chosen), replace=False)
        plans[f"random {turn + 1}"] = frozenset(every[i] for i in picked)
    modelopt = importlib.util.find_spec("modelopt") is not None
    rule = None
    if modelopt:
        rule = modelopt_rules.autocast_rule(sources, rows)
        value, autocast = modelopt_rules.as_many(rule, len(chosen))
        plans[f"AutoCast, values above {value:.3g}"] = autocast
    test = prepared(recipe.data.evaluation, 10**9)
    sets = {"calibration": calibration, "test": test}
    measured = {}
    for name, part in sets.items():
        measuring = Search(sources, part, spec, (), work, lambda *_: None)
        for label, kept in plans.items():
            measuring.flips(Mix(kept=kept), label)
        measured[name] = measuring.steps
    counts = ", ".join(f"{len(part.ids)} {name}" for name, part in sets.items())
    print(f"Quadruples: {counts}; flips are percent of the worst metric's decisions.\n")
    rows_of_plans = [
        {
            "kept in float32": one.what,
            "layers": one.kept,
            "% of multiplications in INT8": f"{100 * one.low_share:.1f}",
            "flips, calibration": f"{one.flips:.2f}",
            "flips, test": f"{other.flips:.2f}",
        }
        for one, other in zip(measured["calibration"], measured["test"], strict=True)
    ]
    print(markdown_table(rows_of_plans))
    if rule is None:
        print("\nAutoCast and modelopt's graphs: not run, package nvidia-modelopt is not installed")
        return
    print(f"\nKept by auto: {shown(chosen)}.\n\nKept by AutoCast: {shown(autocast)}.\n")
    usual = rule(modelopt_rules.DEFAULT_DATA_MAX)
    print(f"AutoCast as it comes, values above {modelopt_rules.DEFAULT_DATA_MAX:g}: {len(usual)} linear layers kept.\n")
    graphs: list[tuple[str, Precision, dict[TowerName, Path]]] = [
        ("fp16, AutoCast's layers kept", Precision.FP16, modelopt_rules.halved(sources, usual, work))
    ]
    kinds: tuple[EightBitType, ...] = ("int8", "fp8")
    methods: tuple[RangeMethod | None, ...] = (None, "max", "entropy")
    for kind in kinds:
        for method in methods:
            label = f"{kind}, {f'modelopt, {method}' if method else 'built-in'}"
            graphs.append((label, Precision(kind), modelopt_rules.quantised(sources, rows, kind, method, work)))
    plain = {tower: source.path for tower, source in sources.items()}
    wanted = {name: modelopt_rules.decided(sources, plain, Precision.FP32, part) for name, part in sets.items()}
    rows_of_graphs = []
    for label, precision, paths in graphs:
        found_flips = [
            modelopt_rules.flips(modelopt_rules.decided(sources, paths, precision, part), wanted[name])
            for name, part in sets.items()
        ]
        counts_low = [achieved_precision(ir.load(path))["linear"].get(precision.value, 0) for path in paths.values()]
        numbers = (sum(counts_low), f"{found_flips[0]:.2f}", f"{found_flips[1]:.2f}")
        heads = ("linear layers in low precision", "flips, calibration", "flips, test")
        rows_of_graphs.append({"graphs": label, **dict(zip(heads, numbers, strict=True))})
    print(markdown_table(rows_of_graphs))


def shown(layers: frozenset[Layer]) -> str:
    """Number of layers per tower and kind."""
    counts = Counter(f"{tower.value} {name.rpartition('.')[2]}" for tower, name in layers)
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


if __name__ == "__main__":
    main()
