"""Opens a bundle: every digest is checked before anything is loaded, and what is loaded are the checked bytes."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from uwm_deploy.codec import json_from_record, record_from_json
from uwm_deploy.errors import EvidenceError, InputError, IntegrityError
from uwm_deploy.records import EngineArtifact, Manifest, Result, TowerName, Verdict
from uwm_deploy.workspace import digest_of_bytes, digest_of_file, joined_digest

MANIFEST = "manifest.json"
_RESTORE = "restore the bundle or build again"
_REPORTS = ("reports/verdict.json", "reports/verify.json", "reports/edit.json")


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: Its folder.
        manifest: What it holds; everything else was checked against it.
    """

    path: Path
    manifest: Manifest

    def read(self, name: str) -> bytes:
        """Bytes of a listed file, checked again as they are read.

        Raises:
            IntegrityError: If the file is not listed, or not what is listed.
        """
        listed = {file.path: file for file in self.manifest.files}
        if name not in listed:
            raise IntegrityError(f"{self.path.name} does not list {name}", fix=_RESTORE)
        try:
            descriptor = os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW)
            with os.fdopen(descriptor, "rb") as stream:
                data = stream.read()
        except OSError as error:
            raise IntegrityError(f"{name} cannot be read: {error.strerror}", fix=_RESTORE) from error
        if digest_of_bytes(data) != listed[name].digest:
            raise IntegrityError(f"{name} has changed: its digest is not the manifest's", fix=_RESTORE)
        return data

    def external_data(self, engine: EngineArtifact) -> dict[str, bytes]:
        """Content of an engine's further file by its name in the graph, checked as it is read."""
        return {Path(name).name: self.read(name) for name in engine_paths(engine)[1:]}

    def engines(self, variant: str) -> dict[TowerName, EngineArtifact]:
        """Both engines of a variant.

        Raises:
            InputError: If the bundle has no such variant.
        """
        found = {e.tower: e for e in self.manifest.engines if e.variant == variant}
        if set(found) != set(TowerName):
            known = sorted({e.variant for e in self.manifest.engines})
            raise InputError(f"the bundle has no variant {variant!r}", fix=f"it has {', '.join(known)}")
        return found


def open_bundle(path: str | Path, *, allow_failed: bool = False) -> Bundle:
    """Checks a bundle as a whole.

    Args:
        path: Bundle folder.
        allow_failed: Open it even without a passing verdict (to look at it, never to serve).

    Raises:
        InputError: If there is no bundle.
        IntegrityError: If any file is missing, added, changed or not a plain file; if the parts do not belong together;
            or if the verdict is not a pass.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{path} is not a bundle: it has no {MANIFEST}", fix="pass the folder that `build` wrote")
    if (folder / MANIFEST).is_symlink():
        raise IntegrityError(f"{MANIFEST} is a symbolic link", fix=_RESTORE)
    try:
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise InputError(f"{path}/{MANIFEST} cannot be read: {error.strerror}", fix="check its permissions") from error
    manifest = record_from_json(Manifest, text, where=MANIFEST)
    if json_from_record(manifest).encode() != text:
        raise IntegrityError(
            f"{MANIFEST} is not as this release writes it: it was changed, or another release wrote it", fix=_RESTORE
        )
    _check_files(folder, manifest)
    _check_chain(manifest)
    _check_reports(folder, manifest)
    if manifest.verdict.result is not Result.PASS and not allow_failed:
        raise IntegrityError(
            f"{folder.name} has no passing verdict: {manifest.verdict.result.value}",
            fix="see reports/verdict.json; build again",
        )
    return Bundle(folder, manifest)


def _check_files(folder: Path, manifest: Manifest) -> None:
    """The folder holds exactly the listed files, as plain files with the listed size and digest."""
    listed = {file.path: file for file in manifest.files}
    present = set()
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            full = Path(root) / name
            status = full.lstat()
            relative = full.relative_to(folder).as_posix()
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode):
                raise IntegrityError(f"{relative} is not a plain file", fix=_RESTORE)
            present.add(relative)
    present.discard(MANIFEST)
    if extra := sorted(present - set(listed)):
        raise IntegrityError(f"{extra[0]} is in the bundle but not in its manifest", fix=_RESTORE)
    if missing := sorted(set(listed) - present):
        raise IntegrityError(f"{missing[0]} is missing", fix=_RESTORE)
    for name, file in listed.items():
        if (folder / name).stat().st_size != file.size_bytes:
            raise IntegrityError(
                f"{name} has {(folder / name).stat().st_size} bytes, not {file.size_bytes}", fix=_RESTORE
            )
        if digest_of_file(folder / name) != file.digest:
            raise IntegrityError(f"{name} has changed: its digest is not the manifest's", fix=_RESTORE)


def _check_chain(manifest: Manifest) -> None:
    """Graphs and engines come from the edited weights that the patch makes and the verdict is about."""
    edited = manifest.edit.edited_weights_digest
    if manifest.edit.model.weights_digest != manifest.model.weights_digest:
        raise IntegrityError("the edit is of another model", fix=_RESTORE)
    if manifest.verdict.edited_weights_digest != edited:
        raise EvidenceError("the verdict is about other weights", fix=_RESTORE)
    digests = {file.path: file.digest for file in manifest.files}
    exported = {graph.digest for graph in manifest.onnx}
    for graph in (*manifest.onnx, *manifest.converted):
        if graph.weights_digest != edited:
            raise IntegrityError(f"the {graph.tower.value} graph is of other weights", fix=_RESTORE)
    for graph in manifest.converted:
        if graph.conversion is None or graph.conversion.source_digest not in exported:
            raise IntegrityError(f"a {graph.tower.value} graph is not made from this bundle's graphs", fix=_RESTORE)
    graphs = exported | {graph.digest for graph in manifest.converted}
    for engine in manifest.engines:
        name = engine_path(engine)
        if engine.weights_digest != edited or engine.onnx_digest not in graphs:
            raise IntegrityError(f"{name} is not made from this bundle's graphs", fix=_RESTORE)
        if joined_digest([digests.get(part, "") for part in engine_paths(engine)]) != engine.digest:
            raise IntegrityError(f"{name} is not the engine its record describes", fix=_RESTORE)
        if manifest.verdict.judged.get(engine.variant, {}).get(engine.tower.value) != engine.digest:
            raise EvidenceError(f"the verdict is about another engine than {name}", fix=_RESTORE)
    if digests.get("tokenizer.json") != manifest.model.text.tokenizer_digest:
        raise IntegrityError("tokenizer.json is of another model", fix=_RESTORE)
    if digests.get("recipe.toml") != manifest.recipe_digest:
        raise IntegrityError("recipe.toml is not the recipe of this bundle", fix=_RESTORE)


def _check_reports(folder: Path, manifest: Manifest) -> None:
    """The verdict in the manifest is the one in the reports, and judges the report that is there."""
    listed = {file.path for file in manifest.files}
    if lost := [name for name in _REPORTS if name not in listed]:
        raise IntegrityError(f"{lost[0]} is missing", fix=_RESTORE)
    text = (folder / "reports" / "verdict.json").read_bytes()
    verdict = record_from_json(Verdict, text, where="reports/verdict.json")
    if json_from_record(verdict) != json_from_record(manifest.verdict):
        raise EvidenceError("the manifest's verdict is not that of reports/verdict.json", fix=_RESTORE)
    if digest_of_file(folder / "reports" / "verify.json") != verdict.report_digest:
        raise EvidenceError("reports/verify.json is not the report that was judged", fix=_RESTORE)
    if json_from_record(manifest.edit).encode() != (folder / "reports" / "edit.json").read_bytes():
        raise EvidenceError("the manifest's edit is not that of reports/edit.json", fix=_RESTORE)


def engine_path(engine: EngineArtifact) -> str:
    """Path of an engine inside a bundle."""
    return f"engines/{engine.variant}/{engine.file}"


def engine_paths(engine: EngineArtifact) -> list[str]:
    """All files of an engine inside a bundle, the engine itself first."""
    names = [engine.file, *([engine.external_data] if engine.external_data else [])]
    return [f"engines/{engine.variant}/{name}" for name in names]
