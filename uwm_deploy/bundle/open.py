"""Opens a bundle: signature and digests are checked before anything is loaded, and what is loaded are the checked bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from uwm_deploy.bundle.external_data import check_external_data
from uwm_deploy.bundle.head import ITEMS, PLACE, TEXTS, WEIGHTS, check_head, digest_of_head
from uwm_deploy.bundle.held import MEND, RESTORE, HeldFiles, ReplacedError, check_plain, read_plain
from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.signature import SIGNATURE, PublicKey, signed_digests
from uwm_deploy.bundle.space import spaces_of
from uwm_deploy.bundle.tied import check_cut, check_names, check_tied
from uwm_deploy.errors import EvidenceError, InputError, IntegrityError, UnreadableError, is_of_machine
from uwm_deploy.records.bundle import BundleFile, Manifest
from uwm_deploy.records.codec import json_from_record, plain_from_record, record_from_json, record_from_plain
from uwm_deploy.records.files import digest_of_bytes, joined_digest
from uwm_deploy.records.graph import EngineArtifact, OnnxArtifact, Target
from uwm_deploy.records.head import RISK_OUTPUTS, SAFETY_TOKENS
from uwm_deploy.records.model import Digest, ModelRef, TowerName
from uwm_deploy.records.plain_json import value_from_json
from uwm_deploy.records.replacing import displaced, workplace_of
from uwm_deploy.records.verdict import Result, Verdict

MANIFEST = BundleLayout.MANIFEST
_RESTORE = RESTORE
_REPORTS = (BundleLayout.VERDICT, BundleLayout.REPORT, BundleLayout.EDIT)
_LARGE_BYTES, _HASHED_AT_ONCE = 64 << 20, 4
_TRIES, _PAUSE_SECONDS = 50, 0.02
"""A bundle that is replaced while it is opened is opened again."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: Its folder.
        manifest: What it holds; everything else was checked against it.
        held: Its files, which stay those that were opened; without them they are read from the folder.
        text: Content of the manifest's file, where it was read.
        to_measure: Whether it was opened to measure what comes out behind its towers; see `open_bundle`.
    """

    path: Path
    manifest: Manifest
    held: HeldFiles | None = None
    text: bytes | None = None
    to_measure: bool = False

    @property
    def may_run(self) -> tuple[str, ...]:
        """Variants that the verdict proves; of a bundle that was opened to be measured, those that are faithful."""
        verdict = self.manifest.verdict
        return verdict.faithful if self.to_measure and verdict.only_outputs_block else verdict.proven

    @property
    def digest(self) -> Digest:
        """Digest of the manifest, which names the bundle: everything else follows from it."""
        return digest_of_bytes(self.manifest_text)

    @property
    def manifest_text(self) -> bytes:
        """Content of the manifest's file: one that opens is byte for byte what its record writes."""
        return json_from_record(self.manifest).encode() if self.text is None else self.text

    @property
    def signature(self) -> bytes | None:
        """Content of the signature's file, if there is one; whose it is was checked if a key was given."""
        if self.held is None:
            return read_plain(self.path, SIGNATURE) if os.path.lexists(self.path / SIGNATURE) else None
        return self.held.read(SIGNATURE) if self.held.has(SIGNATURE) else None

    def read(self, name: str) -> bytes:
        """Bytes of a listed file, checked again as they are read; a graph's external data must be beside it.

        Raises:
            IntegrityError: If the file is not listed, not what is listed, or points outside its folder.
        """
        data = b"".join(self.chunks(name))
        if name in self._graphs():
            listed = {file.path: file for file in self.manifest.files}
            folder = Path(name).parent
            beside = {Path(p).name: f.size_bytes for p, f in listed.items() if Path(p).parent == folder and p != name}
            check_external_data(data, beside, where=name)
        return data

    def chunks(self, name: str) -> Iterator[bytes]:
        """Bytes of a listed file, some at a time; they are worth nothing before the last one was given.

        Raises:
            IntegrityError: If the file is not listed, or not what is listed.
        """
        listed = {file.path: file for file in self.manifest.files}
        if name not in listed:
            raise IntegrityError(f"{self.path.name} does not list {name}", fix=_RESTORE)
        hasher = hashlib.sha256()
        for chunk in [read_plain(self.path, name)] if self.held is None else self.held.chunks(name):
            hasher.update(chunk)
            yield chunk
        if "sha256:" + hasher.hexdigest() != listed[name].digest:
            raise IntegrityError(f"{name} has changed: its digest is not the manifest's", fix=_RESTORE)

    def copy(self, name: str, target: Path) -> None:
        """Copies a listed file, checked as it is read; see `chunks`."""
        with target.open("wb") as stream:
            stream.writelines(self.chunks(name))

    def kept(self) -> dict[str, Kept]:
        """Every listed file, as a part of another bundle."""
        return {file.path: Kept(self, file.path) for file in self.manifest.files}

    def _graphs(self) -> set[str]:
        """Files that ONNX Runtime is given."""
        engines = {engine_path(e) for e in self.manifest.engines if e.target is Target.ONNXRUNTIME}
        return engines | {BundleLayout.onnx(graph.file) for graph in self.manifest.onnx}

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


@dataclass(frozen=True, slots=True)
class Kept:
    """A file of an opened bundle that goes into another one as it is: the bytes that were checked, or none."""

    bundle: Bundle
    name: str

    def chunks(self) -> Iterator[bytes]:
        """See `Bundle.chunks`."""
        return self.bundle.chunks(self.name)


def open_bundle(
    path: str | Path,
    *,
    allow_failed: bool = False,
    to_measure: bool = False,
    public_key: PublicKey | None = None,
    min_bundle_version: int = 0,
) -> Bundle:
    """Checks a bundle as a whole. What is opened stays what it is when another bundle takes its place.

    Args:
        path: Bundle folder.
        allow_failed: Open it even without a passing verdict (to look at it, never to serve).
        to_measure: Open it, too, where nothing but limits on captions and pictures keeps its verdict from passing: they
            can only be measured on the bundle itself. Never to serve.
        public_key: Whose signature it must have, checked before anything else is read: PEM, or a file with it. Without
            one a signature is not looked at.
        min_bundle_version: Refuse an older one; means something only together with `public_key`.

    Raises:
        InputError: If there is no bundle, or no key.
        IntegrityError: If any file is missing, added, changed or not a plain file; if the signature is missing, or not by
            that key; if the parts do not belong together; if it is too old; or if the verdict is not a pass.
        PrerequisiteError: If the machine failed while it was read.
    """
    folder = Path(path)
    for attempt in range(_TRIES):
        held = _held(folder)
        try:
            bundle = _checked(folder, held, public_key, min_bundle_version)
        except (ReplacedError, IntegrityError) as error:
            if isinstance(error, IntegrityError) and held.is_at(folder):
                raise
        else:
            bundle = dataclasses.replace(bundle, to_measure=to_measure)
            _check_passes(bundle, allow_failed=allow_failed)
            return bundle
        time.sleep(_PAUSE_SECONDS * (attempt > 0))
    raise IntegrityError(f"{folder.name} is replaced again and again, or files disappear from it", fix=_RESTORE)


def is_bundle(path: Path) -> bool:
    """Whether a folder is a bundle, or was one when the process was killed that was about to put another in its place."""
    return any((folder / MANIFEST).is_file() for folder in (path, displaced(path)) if folder is not None)


def _held(path: Path) -> HeldFiles:
    """The folder's files; while it is being replaced there may be none for a moment, or it lies elsewhere."""
    for _ in range(_TRIES):
        try:
            return HeldFiles(path)
        except (FileNotFoundError, NotADirectoryError):
            if (there := displaced(path)) is not None:
                return HeldFiles(there)
            if path.exists() or not workplace_of(path.resolve()).is_dir():
                break
        except OSError as error:
            if is_of_machine(error):
                raise UnreadableError(f"{path} cannot be read: {error.strerror}", fix=MEND) from error
            break
        time.sleep(_PAUSE_SECONDS)
    raise InputError(f"{path} is not a bundle: it has no {MANIFEST}", fix="pass the folder that `build` wrote")


def _checked(folder: Path, held: HeldFiles, public_key: PublicKey | None, min_bundle_version: int) -> Bundle:
    """One attempt at opening a bundle; see `open_bundle`."""
    if not held.has(MANIFEST):
        if any(held.has(name) for name in (SIGNATURE, *_REPORTS)) or not held.is_at(folder):
            raise IntegrityError(f"{MANIFEST} is missing", fix=_RESTORE)
        raise InputError(f"{folder} is not a bundle: it has no {MANIFEST}", fix="pass the folder that `build` wrote")
    text = held.read(MANIFEST)
    signed = _signed(held, text, public_key) if public_key is not None else None
    manifest = record_from_json(Manifest, text, where=MANIFEST)
    if json_from_record(manifest).encode() != text:
        raise IntegrityError(
            f"{MANIFEST} is not as this release writes it: it was changed, or another release wrote it", fix=_RESTORE
        )
    if signed is not None:
        _check_signed(signed, {file.path: file.digest for file in manifest.files} | {MANIFEST: digest_of_bytes(text)})
    if manifest.bundle_version < min_bundle_version:
        raise IntegrityError(
            f"{MANIFEST} has bundle version {manifest.bundle_version}, at least {min_bundle_version} is required",
            fix="deploy the current release",
        )
    check_names(manifest)
    bundle = Bundle(folder, manifest, held, text)
    _check_files(held, manifest)
    _check_chain(manifest)
    _check_reports(bundle)
    return bundle


def _check_passes(bundle: Bundle, *, allow_failed: bool) -> None:
    folder, verdict = bundle.path, bundle.manifest.verdict
    if verdict.result is Result.PASS or allow_failed or (bundle.to_measure and verdict.only_outputs_block):
        return
    raise IntegrityError(
        f"{folder.name} has no passing verdict: {verdict.result.value}",
        fix=f"`uwm-deploy gate {folder}` says what it does not pass and what to try",
    )


def _signed(held: HeldFiles, manifest: bytes, public_key: PublicKey) -> dict[str, Digest]:
    """What the signature vouches for; the manifest, which everything else follows from, is as it was signed."""
    if not held.has(SIGNATURE):
        raise IntegrityError(f"{SIGNATURE} is missing: the bundle is not signed", fix="sign it with `uwm-deploy sign`")
    signed = signed_digests(held.read(SIGNATURE), public_key)
    if signed.get(MANIFEST) != digest_of_bytes(manifest):
        raise IntegrityError(f"{MANIFEST} is not the one that was signed", fix=_RESTORE)
    return signed


def _check_signed(signed: Mapping[str, Digest], listed: Mapping[str, Digest]) -> None:
    """The signature and the manifest speak of the same files."""
    for name in sorted(signed.keys() | listed.keys()):
        if name not in listed:
            raise IntegrityError(f"{name} is signed and not in the manifest", fix=_RESTORE)
        if signed.get(name) != listed[name]:
            raise IntegrityError(f"{name} is not the one that was signed", fix=_RESTORE)


def _check_files(held: HeldFiles, manifest: Manifest) -> None:
    """The folder holds exactly the listed files and maybe a signature, as plain files with the listed size and digest."""
    listed = {file.path: file for file in manifest.files}
    if len(listed) != len(manifest.files) or {MANIFEST, SIGNATURE} & set(listed):
        raise IntegrityError(f"{MANIFEST} lists a file twice, itself or the signature", fix=_RESTORE)
    parents = {parent.as_posix() for name in listed for parent in Path(name).parents}
    found, folders = held.listing()
    for name, status in found.items():
        check_plain(name, status)
    present = set(found) - {MANIFEST, SIGNATURE}
    if extra := sorted(present - set(listed)):
        raise IntegrityError(f"{extra[0]} is in the bundle but not in its manifest", fix=_RESTORE)
    if foreign := folders - parents:
        raise IntegrityError(f"folder {min(foreign)} is in the bundle but not in its manifest", fix=_RESTORE)
    if missing := sorted(set(listed) - present):
        raise IntegrityError(f"{missing[0]} is missing", fix=_RESTORE)
    for name, file in listed.items():
        if held.size(name) != file.size_bytes:
            raise IntegrityError(f"{name} has {held.size(name)} bytes, not {file.size_bytes}", fix=_RESTORE)
    for name, digest in _digests(held, listed):
        if digest != listed[name].digest:
            raise IntegrityError(f"{name} has changed: its digest is not the manifest's", fix=_RESTORE)


def _digests(held: HeldFiles, listed: Mapping[str, BundleFile]) -> Iterator[tuple[str, Digest]]:
    """Digest of every listed file; of a large bundle it takes seconds, so several files are read at a time."""
    largest_first = sorted(listed, key=lambda name: -listed[name].size_bytes)
    if sum(file.size_bytes for file in listed.values()) < _LARGE_BYTES:  # threads would take more memory than time
        yield from ((name, held.digest(name)) for name in largest_first)
        return
    with ThreadPoolExecutor(min(_HASHED_AT_ONCE, len(os.sched_getaffinity(0)))) as pool:
        yield from zip(largest_first, pool.map(held.digest, largest_first), strict=True)


def _check_chain(manifest: Manifest) -> None:
    """Graphs and engines come from the edited weights that the patch makes and the verdict is about."""
    edited = manifest.edit.edited_weights_digest
    if manifest.edit.model.weights_digest != manifest.model.weights_digest:
        raise IntegrityError("the edit is of another model", fix=_RESTORE)
    _check_model(manifest.model, manifest.edit.model, "the edit")
    if manifest.verdict.edited_weights_digest != edited:
        raise EvidenceError("the verdict is about other weights", fix=_RESTORE)
    digests = {file.path: file.digest for file in manifest.files}
    check_tied(manifest, digests)
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
    _check_head(manifest, digests)
    if digests.get("tokenizer.json") != manifest.model.text.tokenizer_digest:
        raise IntegrityError("tokenizer.json is of another model", fix=_RESTORE)
    if digests.get("recipe.toml") != manifest.recipe_digest:
        raise IntegrityError("recipe.toml is not the recipe of this bundle", fix=_RESTORE)
    if dict(manifest.spaces) != spaces_of(manifest):
        raise IntegrityError(f"{MANIFEST} names other embedding spaces than its variants have", fix=_RESTORE)


def _check_head(manifest: Manifest, digests: Mapping[str, Digest]) -> None:
    """The safety head that is served is the one that was judged, and was trained on these very weights."""
    head = manifest.head
    wanted, outputs = (digest_of_head(head), set(head.shape.outputs)) if head is not None else ("", set())
    made: list[OnnxArtifact | EngineArtifact] = [*manifest.onnx, *manifest.converted, *manifest.engines]
    for item in made:
        of_image = item.tower is TowerName.IMAGE
        names = {spec.name for spec in item.outputs}
        own = {*RISK_OUTPUTS, SAFETY_TOKENS} & names
        if item.head_digest != (wanted if of_image else "") or own != (outputs if of_image else set()):
            raise IntegrityError(f"{item.file} holds another safety head than the manifest's", fix=_RESTORE)
    if manifest.verdict.head_digest != wanted:
        raise EvidenceError("the verdict is about another safety head", fix=_RESTORE)
    if head is None:
        return
    check_head(head)
    if head.edited_weights_digest != manifest.edit.edited_weights_digest:
        raise IntegrityError("the safety head was trained on other weights", fix=_RESTORE)
    for name, digest in ((WEIGHTS, head.weights_digest), (TEXTS, head.texts_digest)):
        if digests.get(f"{PLACE}/{name}") != digest:
            raise IntegrityError(f"{PLACE}/{name} is not of the manifest's safety head", fix=_RESTORE)
    if digests.get(f"{PLACE}/{ITEMS}", head.items_digest) != head.items_digest:  # older bundles have none
        raise IntegrityError(f"{PLACE}/{ITEMS} is not of the manifest's safety head", fix=_RESTORE)


def _check_reports(bundle: Bundle) -> None:
    """The verdict in the manifest is the one in the reports, and judges the report that is there."""
    manifest = bundle.manifest
    listed = {file.path: file.digest for file in manifest.files}
    if lost := [name for name in _REPORTS if name not in listed]:
        raise IntegrityError(f"{lost[0]} is missing", fix=_RESTORE)
    verdict = record_from_json(Verdict, bundle.read(BundleLayout.VERDICT), where=BundleLayout.VERDICT)
    if verdict != manifest.verdict:
        raise EvidenceError("the manifest's verdict is not that of reports/verdict.json", fix=_RESTORE)
    if listed[BundleLayout.REPORT] != verdict.report_digest:
        raise EvidenceError("reports/verify.json is not the report that was judged", fix=_RESTORE)
    for kind, digest in verdict.downstream.items():
        if listed.get(BundleLayout.downstream(kind)) != digest:
            raise EvidenceError(f"{BundleLayout.downstream(kind)} is not the report that was judged", fix=_RESTORE)
    measured, lengths = _measured_in(bundle.read(BundleLayout.REPORT))
    _check_model(manifest.model, measured, "reports/verify.json")
    check_cut(manifest, lengths)
    if json_from_record(manifest.edit).encode() != bundle.read(BundleLayout.EDIT):
        raise EvidenceError("the manifest's edit is not that of reports/edit.json", fix=_RESTORE)


def _check_model(model: ModelRef, other: ModelRef, whose: str) -> None:
    """How images and texts are prepared belongs to what was judged: another way is another model."""
    parts = {"image": "images", "text": "texts", "family": "weights", "embed_dim": "embeddings"}
    if model.weights_digest != other.weights_digest:
        raise EvidenceError(f"{whose} is about another model than the manifest's", fix=_RESTORE)
    for name, what in parts.items():
        if getattr(model, name) != getattr(other, name):
            text = f"{MANIFEST} says of {what} something else than {whose}: {_first_difference(model, other, name)}"
            raise EvidenceError(text, fix=_RESTORE)


def _first_difference(model: ModelRef, other: ModelRef, name: str) -> str:
    left, right = (plain_from_record(getattr(part, name)) for part in (model, other))
    if not isinstance(left, dict):
        return f"{left}, not {right}"
    names = sorted(left.keys() | right)  # a field that older releases lack may be in one only
    return next(f"{key} {left.get(key)}, not {right.get(key)}" for key in names if left.get(key) != right.get(key))


def _measured_in(report: bytes) -> tuple[ModelRef, dict[str, tuple[int, ...]]]:
    """The model that a report is about, and lengths of captions by variant; to open a bundle the rest is not needed."""
    try:
        body = value_from_json(report)
        model, executed = body["model"], [part for part in body["artifacts"] if part.get("safety") is not None]
        lengths = {part["variant"]: tuple(one["tokens"] for one in part.get("text_lengths", ())) for part in executed}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvidenceError(f"{BundleLayout.REPORT} does not say what it is about", fix=_RESTORE) from error
    return record_from_plain(ModelRef, model, where=f"{BundleLayout.REPORT}.model"), lengths


def engine_path(engine: EngineArtifact) -> str:
    """Path of an engine inside a bundle."""
    return f"engines/{engine.variant}/{engine.file}"


def engine_paths(engine: EngineArtifact) -> list[str]:
    """All files of an engine inside a bundle, the engine itself first."""
    names = [engine.file, *([engine.external_data] if engine.external_data else [])]
    return [f"engines/{engine.variant}/{name}" for name in names]
