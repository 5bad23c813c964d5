"""Triton's configuration of every model of a repository, built as the protobuf message that the server reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from uwm_deploy.bundle.space import space_of
from uwm_deploy.errors import InputError, imported
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.graph import TOKENS, EngineArtifact, Profile, Target, TensorSpec
from uwm_deploy.records.head import RISK_LEVEL, RISK_LOGITS
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.runtime.image import Decode
from uwm_deploy.runtime.session import optimisation_of, provider_of
from uwm_deploy.serve.names import (
    BUNDLE,
    BUNDLE_VERSION,
    CATEGORY,
    DECIDE,
    DECISION,
    DECODE,
    EMBEDDING,
    ENCODERS,
    ENGINE,
    ENSEMBLES,
    FILES,
    LABELS,
    PREPARES,
    PROBABILITY,
    RAW,
    RISK,
    SCORES,
    SPACE,
    TEMPLATE,
    TOOL_VERSION,
    TOP,
    VARIANT,
    WEIGHTS,
    ZERO_SHOT,
    plan_file,
)

Place = Literal["auto", "cpu", "gpu"]
"""Where encoders run. `auto` leaves it to the server: a GPU if it has one, else the CPU, in silence."""

Message = Any
"""A protobuf message; their classes are made while the program runs."""

_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "uint8": "TYPE_UINT8",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
}
_RISKS = {CATEGORY: "TYPE_STRING", PROBABILITY: "TYPE_FP32", DECISION: "TYPE_STRING"}
_GRAPH_LEVEL = {"done": "2", "basic": "-1", "extended": "1"}
"""Of Triton's ONNX Runtime backend: 2 optimises nothing, -1 is basic, 1 is extended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What the owner of a server chooses.

    Attributes:
        place: Of the encoders.
        instances: Of each encoder, per device.
        preparing: Processes that decode images, and as many that tokenise.
        max_delay_ms: Longest wait of a row for others to fill a batch with.
        decode: Whether large JPEGs are decoded at a reduced size; see `SafeEncoder.open`.
    """

    place: Place = "auto"
    instances: int = 1
    preparing: int = 2
    max_delay_ms: float = 2.0
    decode: Decode = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An engine for one kind of GPU.

    Attributes:
        compute_capability: E.g. ``"9.0"``.
        bundle: Digest of the manifest of the bundle it is from.
        digest: Of the engine.
    """

    compute_capability: str
    bundle: Digest
    digest: Digest

    @property
    def file(self) -> str:
        """Its name in the version folder."""
        return plan_file(self.compute_capability)


def backend_of(engine: EngineArtifact) -> str:
    """Triton's backend for an engine.

    Raises:
        InputError: If Triton has none.
    """
    if engine.target not in (Target.ONNXRUNTIME, Target.TENSORRT):
        raise InputError(
            f"Triton has no backend for {engine.variant}",
            fix="choose an onnxruntime or tensorrt variant with --variant",
        )
    if not engine.normalised:
        raise InputError(
            f"the embeddings of {engine.variant} are not of length 1", fix="export with normalise = true in the recipe"
        )
    return "onnxruntime" if engine.target is Target.ONNXRUNTIME else "tensorrt"


def version_of(manifest: Manifest) -> int:
    """Triton's version of every model: the bundle's, and 1 for a bundle that was given none; Triton knows no 0."""
    return max(1, manifest.bundle_version)


def configs(
    manifest: Manifest,
    digest: Digest,
    variant: str,
    settings: ServerSettings,
    plans: Mapping[TowerName, Sequence[Plan]] | None = None,
) -> dict[str, Message]:
    """Configuration of every model by its name.

    Args:
        manifest: Of the bundle.
        digest: Of the manifest's file.
        variant: What is served.
        settings: The owner's choices.
        plans: Per tower, one engine per compute capability, for a variant of TensorRT.

    Raises:
        InputError: If Triton cannot serve the variant.
        PrerequisiteError: If the package `tritonclient` is missing.
    """
    engines = {engine.tower: engine for engine in manifest.engines if engine.variant == variant}
    shared = {
        BUNDLE: digest,
        VARIANT: variant,
        WEIGHTS: manifest.edit.edited_weights_digest,
        BUNDLE_VERSION: str(manifest.bundle_version),
        TOOL_VERSION: manifest.tool_version,
        SPACE: space_of(manifest, variant),
    }
    found: dict[str, Message] = {}
    for tower, engine in engines.items():
        encoder = _encoder(engine, settings, (plans or {}).get(tower, ()))
        prepare = _python(PREPARES[tower], settings, engine.profile.max)
        _tensor(prepare.input, RAW[tower], "TYPE_STRING", [1])
        _spec(prepare.output, engine.inputs[0])
        if tower is TowerName.IMAGE and settings.decode != "full":
            prepare.parameters[DECODE].string_value = settings.decode
        _name_plans(prepare, (plans or {}).get(tower, ()))
        found |= {one.name: one for one in (encoder, prepare, _ensemble(engine))}
    found[ZERO_SHOT] = _zero_shot(settings)
    if manifest.head is not None:
        decide = _decide(engines[TowerName.IMAGE], settings)
        found |= {DECIDE: decide, RISK: _ensemble(engines[TowerName.IMAGE], decide)}
    for config in found.values():
        config.version_policy.specific.versions.append(version_of(manifest))
        for key, value in shared.items():
            config.parameters[key].string_value = value
    return found


def _encoder(engine: EngineArtifact, settings: ServerSettings, plans: Sequence[Plan]) -> Message:
    pb = protobuf()
    backend = backend_of(engine)
    config = pb.ModelConfig(
        name=ENCODERS[engine.tower],
        platform="onnxruntime_onnx" if backend == "onnxruntime" else "tensorrt_plan",
        backend=backend,
        max_batch_size=engine.profile.max,
        default_model_filename=plans[0].file if plans else FILES[backend],
    )
    config.parameters[ENGINE].string_value = engine.digest
    for plan in plans:
        config.cc_model_filenames[plan.compute_capability] = plan.file
    _name_plans(config, plans)
    _spec(config.input, engine.inputs[0])
    for spec in engine.outputs:
        _spec(config.output, spec)
    _batching(config, settings, engine.profile)
    _instances(config, engine, settings)
    _warm_up(config, engine)
    if backend == "tensorrt":
        config.optimization.cuda.graphs = True
    else:
        config.optimization.graph.level = int(_GRAPH_LEVEL[optimisation_of(engine)])
    return config


def _name_plans(config: Message, plans: Sequence[Plan]) -> None:
    """What each plan is and whose, for what checks it before it is loaded."""
    for plan in plans:
        config.parameters[f"{BUNDLE}_{plan.compute_capability}"].string_value = plan.bundle
        config.parameters[f"{ENGINE}_{plan.compute_capability}"].string_value = plan.digest


def _batching(config: Message, settings: ServerSettings, profile: Profile) -> None:
    config.dynamic_batching.max_queue_delay_microseconds = round(settings.max_delay_ms * 1000)
    config.dynamic_batching.preferred_batch_size.extend(sorted({profile.opt, profile.max}))


def _instances(config: Message, engine: EngineArtifact, settings: ServerSettings) -> None:
    """How many, and where: what can run in one place only says so, so that the server refuses any other."""
    group = config.instance_group.add(count=settings.instances)
    made_for = provider_of(engine)
    needs_gpu = engine.target is Target.TENSORRT or made_for not in ("any", "cpu")
    if needs_gpu and settings.place == "cpu":
        raise InputError(f"{engine.variant} cannot run on the CPU", fix="choose another --variant")
    if made_for == "cpu" and settings.place == "gpu":
        raise InputError(f"{engine.variant} was made for the CPU", fix="choose another --variant")
    place = "gpu" if needs_gpu else "cpu" if made_for == "cpu" else settings.place
    group.kind = group.Kind.Value(f"KIND_{place.upper()}")
    if engine.target is Target.TENSORRT:
        group.profile.append("0")


def _warm_up(config: Message, engine: EngineArtifact) -> None:
    """One call per batch size of the profile, before the model counts as ready."""
    for rows in sorted({engine.profile.min, engine.profile.opt, engine.profile.max}):
        warm = config.model_warmup.add(name=f"batch {rows}", batch_size=rows)
        spec = engine.inputs[0]
        warm.inputs[spec.name].data_type = _type(spec)
        warm.inputs[spec.name].dims.extend(size.opt for size in spec.row_sizes)
        warm.inputs[spec.name].zero_data = True


def _python(name: str, settings: ServerSettings, max_batch: int) -> Message:
    pb = protobuf()
    config = pb.ModelConfig(name=name, backend="python", max_batch_size=max_batch, default_model_filename="model.py")
    config.instance_group.add(count=settings.preparing, kind=pb.ModelInstanceGroup.KIND_CPU)
    if max_batch:  # requests of several callers are prepared together, in as many threads as there are cores
        config.dynamic_batching.SetInParent()
    return config


def _decide(engine: EngineArtifact, settings: ServerSettings) -> Message:
    """What the head gives, and what its thresholds make of it."""
    config = _python(DECIDE, settings, engine.profile.max)
    for spec in _risk_specs(engine):
        _spec(config.input, spec)
    for name, kind in _RISKS.items():
        _tensor(config.output, name, kind, [1])
    return config


def _ensemble(engine: EngineArtifact, decide: Message | None = None) -> Message:
    """Raw inputs to embeddings; with the risks of images too."""
    pb = protobuf()
    tower = engine.tower
    name = RISK if decide else ENSEMBLES[tower]
    config = pb.ModelConfig(name=name, platform="ensemble", max_batch_size=engine.profile.max)
    _tensor(config.input, RAW[tower], "TYPE_STRING", [1])
    output = engine.outputs[0]
    _tensor(config.output, EMBEDDING, _type_name(output), _dims(output))
    rows = engine.inputs[0].name
    first = config.ensemble_scheduling.step.add(model_name=PREPARES[tower], model_version=-1)
    first.input_map[RAW[tower]] = RAW[tower]
    first.output_map[rows] = "prepared"
    second = config.ensemble_scheduling.step.add(model_name=ENCODERS[tower], model_version=-1)
    second.input_map[rows] = "prepared"
    second.output_map[output.name] = EMBEDDING
    if decide:
        third = config.ensemble_scheduling.step.add(model_name=DECIDE, model_version=-1)
        for spec in _risk_specs(engine):
            second.output_map[spec.name] = spec.name
            third.input_map[spec.name] = spec.name
            _spec(config.output, spec)
        for made in decide.output:
            third.output_map[made.name] = made.name
            config.output.add().CopyFrom(made)
    return config


def _risk_specs(engine: EngineArtifact) -> list[TensorSpec]:
    return [spec for spec in engine.outputs if spec.name in (RISK_LOGITS, RISK_LEVEL)]


def _zero_shot(settings: ServerSettings) -> Message:
    """Images and classes have sizes of their own, so there is no batch dimension."""
    config = _python(ZERO_SHOT, settings, 0)
    _tensor(config.input, RAW[TowerName.IMAGE], "TYPE_STRING", [-1])
    _tensor(config.input, LABELS, "TYPE_STRING", [-1])
    _tensor(config.input, TEMPLATE, "TYPE_STRING", [-1])
    config.input[2].optional = True
    _tensor(config.output, SCORES, "TYPE_FP32", [-1, -1])
    _tensor(config.output, TOP, "TYPE_STRING", [-1])
    return config


def _spec(into: Message, spec: TensorSpec) -> None:
    _tensor(into, spec.name, _type_name(spec), _dims(spec))


def _tensor(into: Message, name: str, kind: str, dims: Sequence[int]) -> None:
    tensor = into.add(name=name, data_type=protobuf().DataType.Value(kind))
    tensor.dims.extend(dims)


def _type(spec: TensorSpec) -> int:
    number: int = protobuf().DataType.Value(_type_name(spec))
    return number


def _type_name(spec: TensorSpec) -> str:
    if spec.dtype not in _TYPES:
        raise InputError(f"Triton has no element type {spec.dtype}, of {spec.name}", fix="choose another --variant")
    return _TYPES[spec.dtype]


def _dims(spec: TensorSpec) -> list[int]:
    """Shape without the batch; only the batch may be open, and the number of ids where rows are cut."""
    sizes = [-1 if size == TOKENS and spec.lengths else size for size in spec.shape[1:]]
    fixed = [size for size in sizes if isinstance(size, int)]
    if len(fixed) != len(sizes):
        raise InputError(f"{spec.name} has an open size beside the batch", fix="export it again")
    return fixed


def protobuf() -> Message:
    """The module with Triton's messages.

    Raises:
        PrerequisiteError: If it is not installed.
    """
    missing, fix = "package tritonclient is missing or incomplete", "pip install 'uwm-deploy[triton]'"
    return imported("tritonclient.grpc.model_config_pb2", missing, fix=fix)


def text_of(config: Message) -> str:
    """A config.pbtxt."""
    from google.protobuf import text_format

    text: str = text_format.MessageToString(config)
    return text
