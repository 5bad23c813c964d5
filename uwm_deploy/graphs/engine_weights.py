"""Weights that an engine of TensorRT holds are replaced by others, or by the ones it was built without. Needs a GPU."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from uwm_deploy.errors import RecipeError
from uwm_deploy.graphs.builder_log import BuildFailed, last_of, logger_of

Give = Callable[[str, str], np.ndarray]
"""The values of a weight, in one piece, from its name and its element type as TensorRT names it."""


def plan_with_weights(trt: Any, plan: bytes, names: Collection[str], give: Give) -> bytes:
    """The engine with other weights, still refittable.

    Args:
        trt: Module of the flavour.
        plan: The engine.
        names: Weights to replace, by their names in the graph.
        give: Their values, of any shape and the dtype that is asked for.

    Raises:
        BuildFailed: If it is not refittable here, does not know a weight, or needs more of them.
    """
    messages: list[str] = []
    logger = logger_of(trt, messages)
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildFailed(f"the engine cannot be opened here: {last_of(messages)}")
    if not engine.refittable:
        raise BuildFailed("the engine was not built refittable")
    refitter = trt.Refitter(engine, logger)
    known = set(refitter.get_all_weights())
    if unknown := sorted(set(names) - known):
        raise BuildFailed(f"the engine has no refittable weights {unknown[0]}")
    held = []  # the refitter keeps addresses only
    for name in names:
        kind = refitter.get_weights_prototype(name).dtype
        held.append(give(name, str(kind).rsplit(".", 1)[-1]))
        if not refitter.set_named_weights(name, trt.Weights(kind, held[-1].ctypes.data, held[-1].size)):
            raise BuildFailed(f"the engine refuses the weights {name}: {last_of(messages)}")
    if missing := refitter.get_missing_weights():
        raise BuildFailed(f"the engine merged weights, and needs {len(missing)} more, first {missing[0]}")
    if not refitter.refit_cuda_engine():
        raise BuildFailed(f"the refit failed: {last_of(messages)}")
    config = engine.create_serialization_config()
    config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    serialised = engine.serialize_with_config(config)
    if serialised is None:
        raise BuildFailed(f"the refitted engine cannot be written: {last_of(messages)}")
    return bytes(serialised)


def take_weights_out(trt: Any, network: Any, names: Collection[str], messages: list[str]) -> int:
    """Puts a place without values where a network has weights that a refit can replace; the builder then never holds them.

    Args:
        trt: Module of the flavour.
        network: Parsed; the weights are constants with their names in the graph.
        names: Of the weights. One that is no constant, such as a bias inside a layer, stays.
        messages: Messages of the logger.

    Returns:
        Number of weights that are out.

    Raises:
        RecipeError: If this release of the flavour builds with all weights only.
        BuildFailed: If the network does not take a place.
    """
    lacks = [name for name in ("IWeightsManager", "SerializationFlag") if not hasattr(trt, name)]
    if lacks or not hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):
        raise RecipeError(
            f"{trt.__name__} {trt.__version__} does not build without weights", fix="leave null_weights out"
        )
    out = 0
    for layer in [network.get_layer(i) for i in range(network.num_layers)]:
        if layer.type != trt.LayerType.CONSTANT or layer.name not in names:
            continue
        name, layer.__class__ = layer.name, trt.IConstantLayer
        kind, count = layer.get_output(0).dtype, int(np.prod(tuple(layer.shape), dtype=np.int64))
        layer.weights = trt.Weights(kind, 0, count)
        if not network.set_weights_name(layer.weights, name):
            raise BuildFailed(f"the network takes no place for the weights {name}: {messages[-3:]}")
        out += 1
    return out
