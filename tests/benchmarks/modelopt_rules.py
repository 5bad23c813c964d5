"""What nvidia-modelopt keeps in float32, and what its quantisation does to decisions; for bench_precision.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from uwm_deploy.data.embedding import PreparedSet, unit_rows
from uwm_deploy.graphs.layers import linear_layers
from uwm_deploy.graphs.modelopt import RangeMethod, quantised_by_modelopt
from uwm_deploy.graphs.quantise import EightBitType
from uwm_deploy.graphs.write import write_graph
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.model import TowerName
from uwm_deploy.safeground.preference import BASIC, Decisions, decisions
from uwm_deploy.stages.convert.convert import embed_with, lower
from uwm_deploy.stages.convert.search import Layer, Source

Rows = Mapping[TowerName, list[np.ndarray]]
DEFAULT_DATA_MAX = 512.0
"""Largest absolute value that AutoCast puts into half precision unless it is told otherwise."""


def autocast_rule(sources: Mapping[TowerName, Source], rows: Rows) -> Callable[[float], frozenset[Layer]]:
    """From a largest value to the linear layers that AutoCast's own classifier keeps, by the values on some inputs."""
    from modelopt.onnx.autocast import utils
    from modelopt.onnx.autocast.logging_config import logger
    from modelopt.onnx.autocast.nodeclassifier import NodeClassifier
    from modelopt.onnx.autocast.referencerunner import ReferenceRunner

    logger.setLevel(logging.ERROR)  # it tells of every node
    seen: dict[TowerName, tuple[Any, Any, dict[str, str]]] = {}
    for tower, source in sources.items():
        model = onnx.load(source.path)
        found = ReferenceRunner(model, ["cpu"]).run({model.graph.input[0].name: np.concatenate(rows[tower])})
        names = {layer.node.name or "": name for name, layer in linear_layers(ir.load(source.path)).items()}
        seen[tower] = (model, found, names)

    def kept(data_max: float) -> frozenset[Layer]:
        layers: set[Layer] = set()
        for tower, (model, found, names) in seen.items():
            _, initialisers, of_node = utils.setup_mappings(model)
            _, high = NodeClassifier(model, of_node, initialisers, data_max=data_max).run(found)
            layers |= {(tower, names[node]) for node in high if node in names}
        return frozenset(layers)

    return kept


def as_many(kept: Callable[[float], frozenset[Layer]], count: int) -> tuple[float, frozenset[Layer]]:
    """The largest value at which at least so many layers are kept."""
    low, high = 0.0, DEFAULT_DATA_MAX
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if len(kept(middle)) >= count else (low, middle)
    return low, kept(low)


def quantised(
    sources: Mapping[TowerName, Source], rows: Rows, kind: EightBitType, method: RangeMethod | None, folder: Path
) -> dict[TowerName, Path]:
    """Graphs with every layer that the quantiser takes in 8 bits; ours when no method is named."""
    paths = {}
    for tower, source in sources.items():
        if method is None:
            model, _ = lower(source.path, Precision(kind), (), (), source.ranges)
        else:
            model, _ = quantised_by_modelopt(source.path, kind, method, (), rows[tower], folder)
        paths[tower] = folder / f"{kind}-{method}-{source.path.name}"
        write_graph(model, paths[tower])
    return paths


def halved(sources: Mapping[TowerName, Source], kept: frozenset[Layer], folder: Path) -> dict[TowerName, Path]:
    """Graphs in fp16 with some layers in float32."""
    paths = {}
    for tower, source in sources.items():
        model, _ = lower(source.path, Precision.FP16, (), [name for t, name in kept if t is tower], None)
        paths[tower] = folder / f"fp16-{source.path.name}"
        write_graph(model, paths[tower])
    return paths


def decided(
    sources: Mapping[TowerName, Source], paths: Mapping[TowerName, Path], precision: Precision, prepared: PreparedSet
) -> Decisions:
    """Decisions of a pair of graphs."""
    inputs = {
        TowerName.IMAGE: (prepared.safe_pixels, prepared.unsafe_pixels),
        TowerName.TEXT: (prepared.safe_ids, prepared.unsafe_ids),
    }
    found: list[np.ndarray] = []
    for tower in (TowerName.IMAGE, TowerName.TEXT):
        for side in inputs[tower]:
            pieces = np.array_split(np.arange(len(side)), max(1, len(side) // 32))
            parts = (side[piece] for piece in pieces)
            found.append(unit_rows(embed_with(sources[tower].graph, paths[tower], precision, parts)))
    return decisions(*found)


def flips(found: Decisions, wanted: Decisions) -> float:
    """Percentage of decisions of the worst metric that differ."""
    return 100 * max(float(np.mean(found.chosen[name] != wanted.chosen[name])) for name in BASIC)
