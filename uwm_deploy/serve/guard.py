"""What a model in a server checks as it is loaded: that it serves the bundle that was proven, from the bytes that were."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uwm_deploy.bundle.external_data import check_external_data
from uwm_deploy.bundle.held import read_plain
from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import MANIFEST, Bundle, engine_paths
from uwm_deploy.bundle.signature import SIGNATURE, signed_digests
from uwm_deploy.bundle.space import space_of
from uwm_deploy.bundle.tensors import arrays_from
from uwm_deploy.errors import IntegrityError, PrerequisiteError
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.files import digest_of_bytes, digest_of_file, joined_digest
from uwm_deploy.records.graph import EngineArtifact
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.records.verdict import Result
from uwm_deploy.runtime.tensorrt import compute_capability
from uwm_deploy.safeground.canaries import RATIO_LIMIT, Canaries
from uwm_deploy.serve.names import BUNDLE, ENCODERS, ENGINE, EVIDENCE, FILES, SPACE, VARIANT, plan_file

PUBLIC_KEY = "UWM_DEPLOY_PUBLIC_KEY"
"""Environment variable of the server: file with the key that must have signed the bundle. Who can change a repository can
change its digests too; a key that lies elsewhere is what such a person has not got."""

_AGAIN = "write the repository again with `uwm-deploy triton`"
_FIRST_FIXED = (2, 52)
"""Triton 24.11; before it, the Python backend sends no bytes of arrays of numpy 2."""


@dataclass(frozen=True, slots=True)
class ModelPart:
    """One model of a repository, with the part of the bundle that lies beside it.

    Attributes:
        bundle: The files of the bundle that this model carries; every read is checked against the manifest.
        variant: What is served.
        folder: Of the model.
        version: Of the model, as Triton names it.
        config: Triton's configuration.
    """

    bundle: Bundle
    variant: str
    folder: Path
    version: str
    config: Mapping[str, Any]

    @property
    def parameters(self) -> dict[str, str]:
        """What its configuration says of it by name."""
        return _parameters(self.config)

    def engine(self, tower: TowerName) -> EngineArtifact:
        """The engine that is served."""
        return self.bundle.engines(self.variant)[tower]

    def canaries(self, tower: TowerName) -> Canaries | None:
        """Canaries of a tower; None where the edit left it as it was.

        Raises:
            IntegrityError: If they are missing, changed or broken.
        """
        if not any(tensor.changed for tensor in self.bundle.manifest.edit.of(tower)):
            return None
        name = canary_file(tower)
        return Canaries.from_tensors(arrays_from(self.bundle.read(name), name, fix=_AGAIN), name)

    def engine_bytes(self, tower: TowerName, file: str) -> tuple[bytes, dict[str, bytes]]:
        """The engine's file and its further one, as they were proven.

        Args:
            tower: Which engine.
            file: Its name in the version folder.

        Raises:
            IntegrityError: If they are missing or others.
        """
        engine = self.engine(tower)
        data = read_plain(self.folder / self.version, file)
        beside = [engine.external_data] if engine.external_data else []
        external = {name: read_plain(self.folder / self.version, name) for name in beside}
        digest = joined_digest([digest_of_bytes(data), *(digest_of_bytes(part) for part in external.values())])
        if digest != engine.digest:
            raise IntegrityError(
                f"{self.folder.name}/{self.version}/{file} is not the engine of the bundle", fix=_AGAIN
            )
        if file.endswith(".onnx"):
            check_external_data(data, {name: len(part) for name, part in external.items()}, where=file)
        return data, external

    def check_engine_beside(self, tower: TowerName) -> None:
        """The encoder that this model prepares for has the engine of the bundle, where its folder can be seen from here.

        A server that fetches every model from an object store into a folder of its own hides it: then the canaries, before
        the first answer, are what tells.

        Raises:
            IntegrityError: If it has another one.
        """
        folder = self.folder.parent / ENCODERS[tower] / self.version
        if not folder.is_dir():
            return
        wanted = self._engine_files(tower)
        # Whatever else lies there could be what is loaded, if the configuration is changed as well.
        if {path.name for path in folder.iterdir()} != set(wanted) or any(
            digest_of_file(folder / name) != digest for name, digest in wanted.items()
        ):
            raise IntegrityError(f"{ENCODERS[tower]} has not the engine of the bundle, or more than it", fix=_AGAIN)

    def _engine_files(self, tower: TowerName) -> dict[str, Digest]:
        """Files of the encoder's version folder."""
        start, engine = f"{ENGINE}_", self.engine(tower)
        parameters = _parameters(self.config)
        if plans := {key.removeprefix(start): one for key, one in parameters.items() if key.startswith(start)}:
            return {plan_file(capability): digest for capability, digest in plans.items()}
        listed = {file.path: file.digest for file in self.bundle.manifest.files}
        digests = [listed[name] for name in engine_paths(engine)]
        names = [FILES["onnxruntime"], *([engine.external_data] if engine.external_data else [])]
        return dict(zip(names, digests, strict=True))


def open_part(args: Mapping[str, str]) -> ModelPart:
    """Checks what lies beside a model, before anything of it is used.

    Args:
        args: What Triton passes to ``initialize``.

    Raises:
        IntegrityError: If the manifest is not the one that the configuration names, not signed by the key of the
            environment, has no passing verdict, or does not prove the variant.
    """
    config = json.loads(args["model_config"])
    parameters = _parameters(config)
    folder, variant = Path(args["model_repository"]), parameters[VARIANT]
    here = compute_capability()
    own = here and f"{BUNDLE}_{here}" in parameters and (folder / f"{EVIDENCE}-{here}").is_dir()
    kept = folder / (f"{EVIDENCE}-{here}" if own else EVIDENCE)
    text = read_plain(kept, MANIFEST)
    if digest_of_bytes(text) != parameters[f"{BUNDLE}_{here}" if own else BUNDLE]:
        raise IntegrityError(f"{folder.name}: {MANIFEST} is not the one that config.pbtxt names", fix=_AGAIN)
    manifest = record_from_json(Manifest, text, where=MANIFEST)
    if json_from_record(manifest).encode() != text:
        raise IntegrityError(f"{folder.name}: {MANIFEST} was written by another release", fix=_AGAIN)
    if key := os.environ.get(PUBLIC_KEY):
        _check_signed(kept, digest_of_bytes(text), Path(key))
    if manifest.verdict.result is not Result.PASS or variant not in manifest.verdict.proven:
        raise IntegrityError(f"{folder.name}: {variant} has no passing verdict", fix="build again")
    if parameters.get(SPACE) != space_of(manifest, variant):
        raise IntegrityError(f"{folder.name}: config.pbtxt names another embedding space", fix=_AGAIN)
    return ModelPart(Bundle(kept, manifest), variant, folder, args["model_version"], config)


def _parameters(config: Mapping[str, Any]) -> dict[str, str]:
    return {key: value["string_value"] for key, value in config["parameters"].items()}


def _check_signed(folder: Path, digest: Digest, key: Path) -> None:
    if not (folder / SIGNATURE).exists():
        raise IntegrityError(f"{folder.parent.name}: the bundle is not signed", fix="sign it with `uwm-deploy sign`")
    if signed_digests(read_plain(folder, SIGNATURE), key).get(MANIFEST) != digest:
        raise IntegrityError(f"{folder.parent.name}: {MANIFEST} is not the one that was signed", fix=_AGAIN)


def canary_file(tower: TowerName) -> str:
    """Name of a tower's canaries in a bundle."""
    return BundleLayout.canaries(tower)


def check_canaries(canaries: Canaries, found: np.ndarray, what: str) -> None:
    """Checks that embeddings of the canaries are those of the edited model.

    Args:
        canaries: Of the tower.
        found: (n, d) float32 embeddings of its inputs.
        what: Names what gave them, for the message.

    Raises:
        IntegrityError: If one is not.
    """
    ratio = canaries.worst(found)
    if not ratio <= RATIO_LIMIT:
        raise IntegrityError(
            f"{what} does not answer like the edited model (canaries: {ratio:.3g}; limit {RATIO_LIMIT})",
            fix="do not serve it; " + _AGAIN,
        )


def check_numpy(version: str, server: str) -> None:
    """Whether this Triton can send what this numpy makes.

    Args:
        version: Of numpy.
        server: Of Triton, as its images say in ``TRITON_SERVER_VERSION``; empty where nothing says it.

    Raises:
        PrerequisiteError: If not; it would answer with empty tensors.
    """
    if int(version.split(".")[0]) < 2:
        return
    found = tuple(int(part) for part in server.split(".")[:2] if part.isdecimal())
    if found < _FIRST_FIXED:
        raise PrerequisiteError(
            f"numpy {version} with Triton {server or 'of unknown version'}: before 2.52 (24.11) its Python backend sends "
            "empty arrays of numpy 2",
            fix="install numpy < 2 for the server, or set TRITON_SERVER_VERSION if it is newer",
        )
