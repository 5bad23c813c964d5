"""Graphs for ONNX Runtime: optimised for a provider, or compiled by one into EPContext nodes; in the builder's process."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from uwm_deploy.errors import PrerequisiteError
from uwm_deploy.graphs.builder_log import BuildFailed
from uwm_deploy.graphs.cpu_integers import add_biases, fit_for_cpu
from uwm_deploy.graphs.weight_blocks import in_one_block
from uwm_deploy.recipes.compile_spec import BuilderSpec
from uwm_deploy.records.graph import FUSED, STEPS, Profile, Provider, TensorSpec
from uwm_deploy.runtime.node_order import weights_before_use
from uwm_deploy.runtime.providers import COMPILING, FLOAT32, NAMES, add_provider

_UNWRITTEN = "Protobuf serialization failed"
"""What ONNX Runtime says, without a reason, when the file it writes cannot grow."""

_PREFIX: dict[Provider, str] = {"tensorrt": "trt", "tensorrt-rtx": "nv"}
"""Prefix of the names of a provider's own settings."""


def optimised(spec: dict[str, Any]) -> dict[str, Any]:
    """Writes the graph with the optimisations of a provider applied.

    Args:
        spec: ``onnx`` and ``engine`` (paths), ``external_data`` (file name or empty), ``provider``, its ``options``, and
            ``fit_for_cpu``: whether it is an INT8 graph for the CPU; ``weights_only``: whether its weights alone are in 8
            bits; ``attention``: ``"fused"`` where each attention is to be one node.

    Raises:
        PrerequisiteError: If the provider does not work here, or the graph cannot be written.
        BuildFailed: If ONNX Runtime refuses the graph, or takes another provider.
    """
    import onnxruntime as ort

    options = _options(ort)
    # EXTENDED, not ALL: the layout optimisations of ALL are specific to the machine, and crash on some fp16 graphs.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = spec["engine"]
    if spec["external_data"]:
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", spec["external_data"]
        )
    provider: Provider = "cpu" if spec["provider"] == "any" else spec["provider"]
    add_provider(ort, options, provider, spec["options"])
    started = time.perf_counter()
    source, attention = _source(spec, options)
    # It would round the activations of a layer whose weight alone is in 8 bits.
    disabled = ["QDQSelectorActionTransformer"] if spec["weights_only"] else []
    try:
        session = ort.InferenceSession(source, options, disabled_optimizers=disabled, enable_fallback=0)
    except Exception as error:  # its errors share no base class
        if _UNWRITTEN in str(error):
            what = f"ONNX Runtime could not write {spec['engine']}"
            raise PrerequisiteError(what, fix="free space, or raise the limit of a file's size") from error
        raise BuildFailed(str(error)) from error
    if (taken := session.get_providers()[0]) != NAMES[provider]:
        raise BuildFailed(f"ONNX Runtime took {taken} instead of {NAMES[provider]}")
    if spec["fit_for_cpu"] or (spec["weights_only"] and provider == "cpu"):
        model = onnx.load(spec["engine"], load_external_data=False)
        (in_one_block if spec["weights_only"] else add_biases)(model)
        content = model.SerializeToString()
        Path(spec["engine"]).write_bytes(weights_before_use(content) if spec["weights_only"] else content)
    return {
        "versions": {"onnxruntime": ort.__version__},
        "settings": {"optimisation": "extended", "attention": attention}
        | ({"integers": "unsigned activations, 7-bit weights"} if spec["fit_for_cpu"] else {})
        | _recorded(spec),
        "seconds": time.perf_counter() - started,
    }


def _source(spec: dict[str, Any], options: Any) -> tuple[str | bytes, str]:
    """The graph's file, or its content where it is changed before ONNX Runtime reads it; and what became of attention."""
    path, attention = Path(spec["onnx"]), STEPS
    fused, fit = spec.get("attention") == FUSED, spec.get("fit_for_cpu", False)
    if not fused and not fit:
        return spec["onnx"], attention
    if fused:
        from uwm_deploy.graphs.attention import fused_file  # its libraries take memory that other builds need not

        model, found = fused_file(path)
        attention = str(found)
    else:
        model = onnx.load(path, load_external_data=False)
    if fit and (wide := fit_for_cpu(model, path.parent)):
        raise BuildFailed(f"sums of {wide[0]} could overflow: it, or its scale, is read more than once")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return model.SerializeToString(), attention


def compiled(spec: dict[str, Any]) -> dict[str, Any]:
    """Writes a graph whose nodes are embedded engines of a provider.

    Args:
        spec: Settings as for `optimised`, without external data, and ``tf32``.

    Raises:
        PrerequisiteError: If the provider does not work here.
        BuildFailed: If it compiles nothing.
    """
    if not spec["tf32"]:
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # read by NVIDIA's libraries when they are loaded
    import onnxruntime as ort

    options = _options(ort)
    add_provider(ort, options, spec["provider"], spec["options"])
    # Without the flag, a graph in which nothing was compiled would be written without an error.
    path = Path(spec["engine"])
    temporary = path.with_name(f".tmp-{path.name}")
    started = time.perf_counter()
    source, attention = _source(spec, options)
    try:
        ort.ModelCompiler(
            options,
            source,
            embed_compiled_data_into_model=True,
            flags=ort.OrtCompileApiFlags.ERROR_IF_NO_NODES_COMPILED,
            graph_optimization_level=ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        ).compile_to_file(str(temporary))
    except Exception as error:  # its errors share no base class
        raise BuildFailed(f"{NAMES[spec['provider']]}: {error}") from error
    seconds = time.perf_counter() - started
    nodes = [node.op_type for node in onnx.load(temporary, load_external_data=False).graph.node]
    if "EPContext" not in nodes:
        raise BuildFailed(f"{NAMES[spec['provider']]} compiled none of {len(nodes)} nodes")
    temporary.replace(path)
    return {
        "versions": {"onnxruntime": ort.__version__},
        "settings": {
            "optimisation": "compiled",
            "attention": attention,
            "compiled_nodes": str(nodes.count("EPContext")),
            "other_nodes": str(len(nodes) - nodes.count("EPContext")),
            "tf32": "by the recipe" if spec["tf32"] else "false (NVIDIA_TF32_OVERRIDE=0)",
        }
        | _recorded(spec),
        "seconds": seconds,
    }


def provider_options(
    provider: Provider, given: TensorSpec, profiles: Sequence[Profile], builder: BuilderSpec
) -> dict[str, str]:
    """Settings of a recipe, as options of a provider.

    Args:
        provider: The provider.
        given: The graph's input.
        profiles: Batch sizes.
        builder: Settings of the flavour of TensorRT that the provider uses.
    """
    if provider == "cuda":
        return dict(FLOAT32)
    if provider not in COMPILING:
        return {}
    prefix = _PREFIX[provider]
    found = {
        f"{prefix}_profile_{size}_shapes": ",".join(
            f"{given.name}:{'x'.join(str(getattr(n, size)) for n in (part, *given.row_sizes))}" for part in profiles
        )
        for size in ("min", "opt", "max")
    }
    if builder.workspace_mib:
        found[f"{prefix}_max_workspace_size"] = str(builder.workspace_mib << 20)
    if provider == "tensorrt":
        found["trt_builder_optimization_level"] = str(builder.optimisation_level)
    elif len(profiles) > 1:
        found["nv_multi_profile_enable"] = "1"
    return found


def _options(ort: Any) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return options


def _recorded(spec: dict[str, Any]) -> dict[str, str]:
    named = ", ".join(f"{key}={value}" for key, value in sorted(spec["options"].items()))
    return {"provider": spec["provider"]} | ({"provider_options": named} if named else {})
