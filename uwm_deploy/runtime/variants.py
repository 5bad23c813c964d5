"""Which variant of a bundle runs on this machine: the first proven one in a fixed order that can."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle
from uwm_deploy.errors import EvidenceError, InputError, IntegrityError, PrerequisiteError
from uwm_deploy.records.codec import record_from_plain
from uwm_deploy.records.evidence import ArtifactEvidence, Evidence
from uwm_deploy.records.graph import EngineArtifact, Precision, Provider, Target
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.plain_json import value_from_json
from uwm_deploy.runtime.choices import check_choice
from uwm_deploy.runtime.logs import event
from uwm_deploy.runtime.providers import provider_reason
from uwm_deploy.runtime.session import CPU_TARGETS, Device, provider_of, reason_not_executable, usable
from uwm_deploy.runtime.tensorrt import compute_capability, gpu_reason

Place = Literal["cuda", "cpu"]

T = TypeVar("T")

ORDER: tuple[tuple[Target, Place], ...] = (
    (Target.TENSORRT, "cuda"),
    (Target.TENSORRT_RTX, "cuda"),
    (Target.ONNXRUNTIME, "cuda"),
    (Target.OPENVINO, "cpu"),
    (Target.ONNXRUNTIME, "cpu"),
)
"""Best first; on the CPU of two in one precision, for a precision tells more there."""

PRECISIONS: Mapping[Place, tuple[Precision, ...]] = {
    "cuda": tuple(map(Precision, ("fp16", "bf16", "auto", "int8", "fp8", "fp32", "w8a16"))),
    "cpu": tuple(map(Precision, ("int8", "auto", "bf16", "fp32", "w8a16", "fp16", "fp8"))),
}
"""Of variants that are all proven, the one that is usually fastest there first (docs/reference/runtime.md)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a bundle.

    Attributes:
        variant: Name in the bundle.
        target: What it was compiled for.
        device: Where it would run.
        refused: Why it is not taken; empty for the one that is, and for those that could still be.
        note: What is to be known about it otherwise.
    """

    variant: str
    target: Target
    device: Place
    refused: str = ""
    note: str = ""

    def __str__(self) -> str:
        said = "; ".join(part for part in (self.refused, self.note) if part)
        return f"{self.variant} on {self.device}" + (f": {said}" if said else "")


@dataclass(frozen=True, slots=True)
class VariantChoice:
    """What runs, and what became of the others.

    Attributes:
        taken: The one that runs.
        candidates: All, best first, with the reason for each that was not taken.
    """

    taken: Candidate
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        others = [str(one) for one in self.candidates if one != self.taken]
        note = f" ({self.taken.note})" if self.taken.note else ""
        return "; ".join([f"{self.taken.variant} runs on {self.taken.device}{note}", *others])


def candidates(bundle: Bundle, *, variant: str | None, device: Device, allow_unsafe: bool) -> list[Candidate]:
    """Every way to run a bundle, best first, each with the reason why it cannot be taken, if there is one.

    Args:
        bundle: An opened bundle.
        variant: The only one that is wanted.
        device: Where it must run; `auto` takes any.
        allow_unsafe: Whether variants without proof may be taken.

    Raises:
        InputError: If there is no variant or device of that name, or it can never run on that device.
        IntegrityError: If the variant that is wanted is not proven.
    """
    check_choice(device, Device, "device")
    evidence = _evidence(bundle)
    if variant:
        engines = bundle.engines(variant)
        if engines[TowerName.IMAGE].target not in CPU_TARGETS and device == "cpu":
            raise InputError(f"{variant} cannot run on the CPU", fix="choose an onnxruntime or openvino variant")
        reason = _unproven(bundle, variant, evidence)
        if reason and not allow_unsafe:
            raise IntegrityError(f"variant {variant} is {reason}", fix=_fix_of(reason))
    found = []
    for target, place in ORDER:
        names = {e.variant: e.precision for e in bundle.manifest.engines if e.target is target}
        for name in sorted(names, key=lambda n: (_rank(n, place), n)):
            reasons = [
                "another one is asked for" if variant and name != variant else "",
                f"{device} is asked for" if device not in ("auto", place) else "",
                "" if allow_unsafe else _unproven(bundle, name, evidence),
                _unusable(bundle.engines(name)[TowerName.IMAGE], place),
                _made_for_another(provider_of(bundle.engines(name)[TowerName.IMAGE]), place),
                _other_gpu(target, evidence.get(name)),
            ]
            refused = "; ".join(reason for reason in reasons if reason)
            found.append(Candidate(name, target, place, refused, _note(place, evidence.get(name))))
    return sorted(found, key=lambda one: (one.device == "cpu", _rank(one.variant, "cpu") if one.device == "cpu" else 0))


def proven_variants(bundle: Bundle, target: Target, place: Place) -> list[str]:
    """Variants for a target that the bundle's verdict and evidence prove, in the order of choice, whatever can run here."""
    evidence = _evidence(bundle)
    names = {engine.variant for engine in bundle.manifest.engines if engine.target is target}
    return sorted((n for n in names if not _unproven(bundle, n, evidence)), key=lambda n: (_rank(n, place), n))


def reason_unproven(bundle: Bundle, variant: str) -> str:
    """Empty when the bundle's verdict and evidence prove a variant."""
    return _unproven(bundle, variant, _evidence(bundle))


def measured_where(bundle: Bundle, variant: str) -> Mapping[str, str]:
    """Machine that a variant's evidence is from; empty without evidence."""
    found = _evidence(bundle).get(variant)
    return found.where if found else {}


def take(found: Sequence[Candidate], attempt: Callable[[Candidate], T], *, asked: bool) -> tuple[VariantChoice, T]:
    """Opens the first candidate that can be opened.

    Args:
        found: Candidates, best first.
        attempt: Opens one, or raises `PrerequisiteError`.
        asked: Whether a variant or device was asked for: then a failure is an error, never a reason to take another.

    Raises:
        PrerequisiteError: If none can be opened; with the reason of each.
    """
    failed: dict[Candidate, str] = {}
    for one in found:
        if one.refused:
            continue
        try:
            opened = attempt(one)
        except PrerequisiteError as error:
            if asked:
                raise
            failed[one] = f"it could not be opened: {error.what}"
            event(logging.WARNING, "variant-not-opened", variant=one.variant, device=one.device, reason=error.what)
        else:
            return _choice(found, one, failed), opened
    reasons = "; ".join(str(replace(one, refused=failed.get(one, one.refused))) for one in found) or "it has none"
    raise PrerequisiteError(f"no proven variant runs here ({reasons})", fix="see `uwm-deploy doctor`")


def _choice(found: Iterable[Candidate], taken: Candidate, failed: Mapping[Candidate, str]) -> VariantChoice:
    """The record of a choice; of those after the one taken, the reason is that they come after it."""
    said, after = [], False
    for one in found:
        after = after or one == taken
        reason = failed.get(one, one.refused)
        if after and one != taken and not reason:
            reason = f"{taken.variant} on {taken.device} comes first"
        said.append(replace(one, refused=reason))
    return VariantChoice(taken, tuple(said))


def _evidence(bundle: Bundle) -> dict[str, ArtifactEvidence]:
    """Of each variant, where what was executed; what was measured is the gate's business, and much to read."""
    where = BundleLayout.REPORT
    unread: dict[str, object] = {"parity": [], "safety": None, "flips": {}, "worst": [], "batches": [], "audit": {}}
    unread |= {"risk": None, "risk_flips": None, "risk_parity": []}
    try:
        artifacts = [{**artifact, **unread} for artifact in value_from_json(bundle.read(where))["artifacts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise EvidenceError(f"{where} does not say what was executed", fix="build again") from error
    found = [record_from_plain(ArtifactEvidence, artifact, where=where) for artifact in artifacts]
    return {artifact.variant: artifact for artifact in found}


def _unproven(bundle: Bundle, variant: str, evidence: Mapping[str, ArtifactEvidence]) -> str:
    """Empty when the verdict proves a variant; that it is about these very files was checked as the bundle was opened."""
    verdict, found = bundle.manifest.verdict, evidence.get(variant)
    if variant in verdict.failed:
        return "refused by the gate: it was measured and did not pass"
    if variant in verdict.inconclusive:
        return "inconclusive: it was measured on too few items"
    if variant not in bundle.may_run or found is None or found.evidence is not Evidence.EXECUTED:
        return "unproven: it was never executed and measured"
    return ""


def _fix_of(reason: str) -> str:
    """What helps: executing a variant on another machine proves none that was executed and measured already."""
    if reason.startswith("unproven"):
        return "run `uwm-deploy attest` on a machine that can execute it"
    return "see reports/verdict.json for what it did not pass"


def _rank(variant: str, place: Place) -> int:
    names = [precision.value for precision in PRECISIONS[place]]
    asked = variant.rpartition("-")[2]
    return names.index(asked) if asked in names else len(names)


def _unusable(engine: EngineArtifact, place: Place) -> str:
    if engine.target is Target.OPENVINO:
        return reason_not_executable(engine)
    if (reason := usable(engine.target)) or engine.target is not Target.ONNXRUNTIME:
        return reason
    if place == "cpu":
        return ""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this ONNX Runtime has no CUDA provider"
    return gpu_reason()


def _made_for_another(provider: Provider, place: Place) -> str:
    """Graphs that were made for one provider of ONNX Runtime run with no other."""
    if provider == "any":
        return ""
    return provider_reason(provider) if (provider == "cpu") == (place == "cpu") else f"it was made for {provider}"


def _other_gpu(target: Target, found: ArtifactEvidence | None) -> str:
    """Engines of TensorRT are for one compute capability; those of TensorRT-RTX are finished where they run."""
    measured = found.where.get("compute_capability", "") if found else ""
    if target is not Target.TENSORRT or not measured or gpu_reason() or measured == compute_capability():
        return ""
    return f"it is for compute capability {measured}, this GPU has {compute_capability()}"


def _note(place: Place, found: ArtifactEvidence | None) -> str:
    """Where it was measured, if that is not where it would run."""
    if found is None or found.evidence is not Evidence.EXECUTED:
        return ""
    where = found.where.get("device", "cpu")
    if (where == "cpu") == (place == "cpu"):
        return ""
    return f"it was measured on {where}; its canaries are checked here"
