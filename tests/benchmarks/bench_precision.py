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
from collections.abc import Mapping
from dataclasses import dataclass
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
from uwm_deploy.recipes.compile_spec import AutoSpec
from uwm_deploy.recipes.resolve import calibration_set_of, recipe_of
from uwm_deploy.records.graph import OnnxArtifact, Precision
from uwm_deploy.records.model import TowerName
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.markdown_table import markdown_table
from uwm_deploy.runtime.pixels import taken
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.stages.convert.convert import ranges_of
from uwm_deploy.stages.convert.search import Layer, Mix, Search, Source, search
from uwm_deploy.towers.load import load_model

RANGE_ROWS = 128


def rows_of(prepared: PreparedSet, graph: OnnxArtifact) -> dict[str, list[np.ndarray]]:
    """Some safe and unsafe inputs of a tower, in small batches, as its graph takes them."""
    image = graph.tower is TowerName.IMAGE
    safe = prepared.safe_pixels if image else prepared.safe_ids
    unsafe = prepared.unsafe_pixels if image else prepared.unsafe_ids
    step = len(prepared.ids) // RANGE_ROWS
    pick = np.array_split(np.arange(0, RANGE_ROWS * step, step), RANGE_ROWS // 16)
    sides = {"safe": safe, "unsafe": unsafe}
    return {side: [taken(found[rows], graph.inputs[0]) for rows in pick] for side, found in sides.items()}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What plans are made of and measured on.

    Attributes:
        sources: Graph and ranges of each tower.
        rows: Inputs that the ranges are of.
        sizes: Rule to layer to the largest absolute value that it looks at.
        sets: Quadruples by name; the search sees the first.
        spec: Of the search.
        work: Folder for graphs.
    """

    sources: dict[TowerName, Source]
    rows: dict[TowerName, list[np.ndarray]]
    sizes: dict[str, dict[Layer, float]]
    sets: dict[str, PreparedSet]
    spec: AutoSpec
    work: Path


def scene_of(work: Path) -> Scene:
    """Builds the demo up to its export, and opens both sets."""
    outcome = run(Request(work=work), until="export", reporter=Reporter())
    recipe = recipe_of("demo")[0]
    model = load_model(recipe, folder=work / "edit" / "model", device="cpu")
    tokenizer = Tokenizer(model.tokenizer_json, model.ref.text)

    def prepared(name: str, items: int) -> PreparedSet:
        definition, _, base = calibration_set_of(name)
        source = some_of(open_source(definition, base=base), items)
        return prepare(source, model.ref.image, tokenizer, workers=0, progress=lambda *_: None)

    calibration = prepared(recipe.data.calibration, recipe.compile.auto.items)
    sources, sizes = {}, dict[str, dict[Layer, float]]()
    rows: dict[TowerName, list[np.ndarray]] = {}
    for graph in outcome.onnx:
        path, batches = work / "export" / graph.file, rows_of(calibration, graph)
        sources[graph.tower] = Source(graph, path, ranges_of(path, batches, work))
        rows[graph.tower] = [*batches["safe"], *batches["unsafe"]]
        for rule, values in magnitudes(path, graph.tower, rows[graph.tower], work).items():
            sizes.setdefault(rule, {}).update(values)
    sets = {"calibration": calibration, "test": prepared(recipe.data.evaluation, 10**9)}
    return Scene(sources=sources, rows=rows, sizes=sizes, sets=sets, spec=recipe.compile.auto, work=work)


def plans_of(scene: Scene) -> dict[str, frozenset[Layer]]:
    """The search's plan, and as many layers by each rule and at random."""
    plan = search(scene.sources, scene.sets["calibration"], scene.spec, (), scene.work, lambda *_: None)
    chosen = frozenset((TowerName(tower), name) for tower, names in plan.kept.items() for name in names)
    plans = {"all INT8": frozenset[Layer](), "auto": chosen}
    for rule, values in scene.sizes.items():
        plans[rule] = frozenset(sorted(values, key=lambda layer: (-values[layer], layer))[: len(chosen)])
    rng, every = np.random.default_rng(0), sorted(scene.sizes["largest outputs"])
    for turn in range(3):
        picked = rng.choice(len(every), len(chosen), replace=False)
        plans[f"random {turn + 1}"] = frozenset(every[i] for i in picked)
    return plans


def print_plans(scene: Scene, plans: Mapping[str, frozenset[Layer]]) -> None:
    """A row per plan, measured on both sets."""
    measured = {}
    for name, part in scene.sets.items():
        measuring = Search(scene.sources, part, scene.spec, (), scene.work, lambda *_: None)
        for label, kept in plans.items():
            measuring.flips(Mix(kept=kept), label)
        measured[name] = measuring.steps
    counts = ", ".join(f"{len(part.ids)} {name}" for name, part in scene.sets.items())
    print(f"Quadruples: {counts}; flips are percent of the worst metric's decisions.\n")
    rows = [
        {
            "kept in float32": one.what,
            "layers": one.kept,
            "% of multiplications in INT8": f"{100 * one.low_share:.1f}",
            "flips, calibration": f"{one.flips:.2f}",
            "flips, test": f"{other.flips:.2f}",
        }
        for one, other in zip(measured["calibration"], measured["test"], strict=True)
    ]
    print(markdown_table(rows))


def print_graphs(scene: Scene, usual: frozenset[Layer]) -> None:
    """A row per graph of modelopt, or of ours beside it, measured on both sets."""
    sources, sets, work = scene.sources, scene.sets, scene.work
    graphs: list[tuple[str, Precision, dict[TowerName, Path]]] = [
        ("fp16, AutoCast's layers kept", Precision.FP16, modelopt_rules.halved(sources, usual, work))
    ]
    kinds: tuple[EightBitType, ...] = ("int8", "fp8")
    methods: tuple[RangeMethod | None, ...] = (None, "max", "entropy")
    for kind in kinds:
        for method in methods:
            label = f"{kind}, {f'modelopt, {method}' if method else 'built-in'}"
            graphs.append((label, Precision(kind), modelopt_rules.quantised(sources, scene.rows, kind, method, work)))
    plain = {tower: source.path for tower, source in sources.items()}
    wanted = {name: modelopt_rules.decided(sources, plain, Precision.FP32, part) for name, part in sets.items()}
    rows = []
    for label, precision, paths in graphs:
        found_flips = [
            modelopt_rules.flips(modelopt_rules.decided(sources, paths, precision, part), wanted[name])
            for name, part in sets.items()
        ]
        counts_low = [achieved_precision(ir.load(path))["linear"].get(precision.value, 0) for path in paths.values()]
        numbers = (sum(counts_low), f"{found_flips[0]:.2f}", f"{found_flips[1]:.2f}")
        heads = ("linear layers in low precision", "flips, calibration", "flips, test")
        rows.append({"graphs": label, **dict(zip(heads, numbers, strict=True))})
    print(markdown_table(rows))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path(".uwm/bench-precision"))
    scene = scene_of(parser.parse_args().work)
    plans = plans_of(scene)
    if importlib.util.find_spec("modelopt") is None:
        print_plans(scene, plans)
        print("\nAutoCast and modelopt's graphs: not run, package nvidia-modelopt is not installed")
        return
    rule = modelopt_rules.autocast_rule(scene.sources, scene.rows)
    value, autocast = modelopt_rules.as_many(rule, len(plans["auto"]))
    print_plans(scene, plans | {f"AutoCast, values above {value:.3g}": autocast})
    print(f"\nKept by auto: {shown(plans['auto'])}.\n\nKept by AutoCast: {shown(autocast)}.\n")
    usual = rule(modelopt_rules.DEFAULT_DATA_MAX)
    print(f"AutoCast as it comes, values above {modelopt_rules.DEFAULT_DATA_MAX:g}: {len(usual)} linear layers kept.\n")
    print_graphs(scene, usual)


def shown(layers: frozenset[Layer]) -> str:
    """Number of layers per tower and kind."""
    counts = Counter(f"{tower.value} {name.rpartition('.')[2]}" for tower, name in layers)
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


if __name__ == "__main__":
    main()
