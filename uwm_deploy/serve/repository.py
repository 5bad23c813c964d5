"""Writes a bundle as a model repository of Triton, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from uwm_deploy.bundle.open import MANIFEST, Bundle, engine_path
from uwm_deploy.bundle.signature import SIGNATURE
from uwm_deploy.bundle.space import space_of
from uwm_deploy.errors import InputError, IntegrityError
from uwm_deploy.records.files import whole_folder
from uwm_deploy.records.graph import EngineArtifact, Target
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.records.replacing import Workplace, replacing
from uwm_deploy.runtime.decoding import check_decoding
from uwm_deploy.runtime.variants import Place as Kind
from uwm_deploy.runtime.variants import measured_where, proven_variants, reason_unproven
from uwm_deploy.serve.config import Message, Plan, ServerSettings, configs, text_of, version_of
from uwm_deploy.serve.guard import canary_file
from uwm_deploy.serve.names import DECIDE, ENCODERS, ENSEMBLES, EVIDENCE, FILES, PREPARES, RISK, ZERO_SHOT, plan_file

_MODEL = '''"""Made by `uwm-deploy triton`; the code is the installed package's."""

from uwm_deploy.serve.models import {name} as TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_CLASSES = {
    PREPARES[TowerName.IMAGE]: "Preprocess",
    PREPARES[TowerName.TEXT]: "Tokenise",
    ZERO_SHOT: "ZeroShot",
    DECIDE: "Decide",
}

_PREPARED_BY: Mapping[TowerName, Sequence[str]] = {TowerName.IMAGE: (), TowerName.TEXT: ("tokenizer.json",)}
"""Files of the bundle that preparing needs, beside the manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A repository that was written.

    Attributes:
        bundle: Digest of the bundle's manifest.
        version: Of every model.
        models: Their names.
        compute_capabilities: GPUs that there is a plan for; empty for ONNX.
    """

    repository: str
    bundle: Digest
    variant: str
    version: int
    models: tuple[str, ...]
    compute_capabilities: tuple[str, ...]


def write_repository(
    bundle: Bundle,
    path: Path,
    *,
    variant: str | None = None,
    settings: ServerSettings | None = None,
    further: Sequence[Bundle] = (),
    force: bool = False,
) -> Written:
    """Writes the models, their configuration, and what they check themselves against.

    Args:
        bundle: Opened as for serving: it has a passing verdict.
        path: Folder of the repository.
        variant: A certain variant; else the first proven one that Triton has a backend for.
        settings: The owner's choices.
        further: Bundles of the same edited model whose plans are for other GPUs.
        force: Replace a repository that is there.

    Raises:
        InputError: If `path` is there, Triton cannot serve the variant, or a further bundle does not belong to this one.
        IntegrityError: If the variant is not proven, or a file was changed.
        PrerequisiteError: If the package `tritonclient` is missing.
    """
    with replacing(path) as place:
        _check_free(path, force or place.finished)
        return _written(place, bundle, path, variant, settings, further)


def _written(
    place: Workplace,
    bundle: Bundle,
    path: Path,
    variant: str | None,
    settings: ServerSettings | None,
    further: Sequence[Bundle],
) -> Written:
    settings = settings or ServerSettings()
    chosen = variant or _best(bundle, settings)
    if reason := reason_unproven(bundle, chosen):
        raise IntegrityError(
            f"variant {chosen} is {reason}", fix="run `uwm-deploy attest` on a machine that can execute it"
        )
    check_decoding(bundle.manifest.verdict, settings.decode, bundle.path.name)
    engines = bundle.engines(chosen)
    if further and not _is_plan(engines):
        raise InputError(f"{chosen} is not for TensorRT, so no further bundle belongs to it", fix="leave --further out")
    sources = _by_capability(bundle, further, chosen) if _is_plan(engines) else {}
    plans = {tower: [_plan(source, cc, chosen, tower) for cc, source in sources.items()] for tower in engines}
    digest = bundle.digest
    made = configs(bundle.manifest, digest, chosen, settings, plans)
    version = version_of(bundle.manifest)
    with place.whole() as folder:
        _write_models(folder, made, str(version))
        for tower, engine in engines.items():
            _write_engine(folder / ENCODERS[tower] / str(version), bundle, engine, sources)
            _write_evidence(folder / ENCODERS[tower], [canary_file(tower)], bundle, sources)
            _write_evidence(folder / PREPARES[tower], [canary_file(tower), *_PREPARED_BY[tower]], bundle, sources)
        for name in {ZERO_SHOT, DECIDE} & set(made):
            _write_evidence(folder / name, [], bundle, {})
    return Written(
        repository=str(path),
        bundle=digest,
        variant=chosen,
        version=version,
        models=tuple(made),
        compute_capabilities=tuple(sources),
    )


def _write_models(folder: Path, made: Mapping[str, Message], version: str) -> None:
    """Folder, configuration and, where it runs in Python, the code of every model."""
    for name, config in made.items():
        (folder / name / version).mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(text_of(config))
        if name in _CLASSES:
            (folder / name / version / "model.py").write_text(_MODEL.format(name=_CLASSES[name]))
        if name in {*ENSEMBLES.values(), RISK}:
            # An object store knows no empty folder, and without one the ensemble has no version.
            (folder / name / version / "ensemble").write_text("of the models beside it\n")


def write_backends(path: Path) -> None:
    """Writes Python-based backends for a server that has none of its own for ONNX Runtime or TensorRT.

    Raises:
        InputError: If one of them is there.
    """
    for name in FILES:
        if (path / name).exists():
            raise InputError(f"{path / name} is there already", fix="a backend of the server itself is to be preferred")
        with whole_folder(path / name) as folder:
            (folder / "model.py").write_text(_MODEL.format(name="Encoder"))


def _check_free(path: Path, force: bool) -> None:
    if not path.exists() and not path.is_symlink():
        return
    ours = path.is_dir() and not path.is_symlink() and (path / ZERO_SHOT / "config.pbtxt").is_file()
    if not force:
        raise InputError(
            f"{path} is there already", fix="pass --force to replace a repository, or choose another folder"
        )
    if not ours:
        raise InputError(f"{path} is no repository of this command", fix="choose another folder")


def _best(bundle: Bundle, settings: ServerSettings) -> str:
    """Of what is proven, the first in the runtime's order that Triton can serve in that place."""
    orders: list[tuple[Target, Kind]] = []
    if settings.place != "cpu":
        orders.append((Target.TENSORRT, "cuda"))
    orders.append((Target.ONNXRUNTIME, "cuda" if settings.place == "gpu" else "cpu"))
    found = [name for target, place in orders for name in proven_variants(bundle, target, place)]
    if not found:
        raise IntegrityError(
            f"{bundle.path.name} has no proven variant that Triton serves{' on the CPU' if settings.place == 'cpu' else ''}",
            fix="build one for onnxruntime or tensorrt",
        )
    return found[0]


def _is_plan(engines: Mapping[TowerName, EngineArtifact]) -> bool:
    return engines[TowerName.IMAGE].target is Target.TENSORRT


def _by_capability(bundle: Bundle, further: Sequence[Bundle], variant: str) -> dict[str, Bundle]:
    """Bundles by the compute capability that their plans were measured on, the first one first."""
    found: dict[str, Bundle] = {}
    for one in (bundle, *further):
        reason = _reason_apart(bundle, one, variant)
        if reason:
            raise InputError(f"{one.path.name} does not belong to {bundle.path.name}: {reason}", fix="leave it out")
        capability = measured_where(one, variant).get("compute_capability", "")
        if not capability or capability in found:
            raise InputError(
                f"{one.path.name}: its plans are for compute capability {capability or 'unknown'}, like another's",
                fix="give one bundle per compute capability",
            )
        found[capability] = one
    return found


def _reason_apart(bundle: Bundle, other: Bundle, variant: str) -> str:
    """Empty when two bundles hold the same variant of the same edited model."""
    if other.manifest.edit.edited_weights_digest != bundle.manifest.edit.edited_weights_digest:
        return "its weights are others"
    if other.manifest.model != bundle.manifest.model:
        return "its preprocessing is another"
    if all(engine.variant != variant for engine in other.manifest.engines):
        return f"it has no variant {variant}"
    if reason := reason_unproven(other, variant):
        return f"its {variant} is {reason}"
    if space_of(other.manifest, variant) != space_of(bundle.manifest, variant):
        return "its embeddings are of another space"
    for tower, engine in bundle.engines(variant).items():
        theirs = other.engines(variant)[tower]
        if (theirs.inputs, theirs.outputs, theirs.profile) != (engine.inputs, engine.outputs, engine.profile):
            return f"inputs, outputs or batches of its {tower.value} engine are others"
    return ""


def _plan(bundle: Bundle, capability: str, variant: str, tower: TowerName) -> Plan:
    engine = bundle.engines(variant)[tower]
    return Plan(compute_capability=capability, bundle=bundle.digest, digest=engine.digest)


def _write_engine(folder: Path, bundle: Bundle, engine: EngineArtifact, sources: Mapping[str, Bundle]) -> None:
    """The bytes that were checked as they were read."""
    for capability, source in sources.items():
        theirs = source.engines(engine.variant)[engine.tower]
        (folder / plan_file(capability)).write_bytes(source.read(engine_path(theirs)))
    if not sources:
        (folder / FILES["onnxruntime"]).write_bytes(bundle.read(engine_path(engine)))
        for name, data in bundle.external_data(engine).items():
            (folder / name).write_bytes(data)


def _write_evidence(folder: Path, names: Sequence[str], bundle: Bundle, sources: Mapping[str, Bundle]) -> None:
    """What a model checks itself against, of every bundle that is served; a tower that is not edited has no canaries."""
    kept = {EVIDENCE: bundle} | {f"{EVIDENCE}-{capability}": source for capability, source in sources.items()}
    for place, source in kept.items():
        listed = {file.path for file in source.manifest.files}
        parts = {name: source.read(name) for name in names if name in listed}
        parts[MANIFEST] = source.manifest_text
        if (signature := source.signature) is not None:
            parts[SIGNATURE] = signature
        for name, data in parts.items():
            target = folder / place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
