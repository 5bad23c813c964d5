"""`uwm-deploy triton check`: measures a running server as a variant of its bundle, and judges it by the same gate."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from uwm_deploy.bundle.open import Bundle, open_bundle
from uwm_deploy.data.embedding import PreparedSet, encoded
from uwm_deploy.data.evaluation import check_measured_on
from uwm_deploy.errors import ExitCode
from uwm_deploy.pipeline.attest import whole_rows
from uwm_deploy.pipeline.judge import Judge, judge_of_bundle, report_of_bundle
from uwm_deploy.pipeline.shipping import evaluation_source_of
from uwm_deploy.pipeline.stored import Running, known_of_files, measured_against, stored_in
from uwm_deploy.records.codec import json_from_record
from uwm_deploy.records.evidence import ArtifactEvidence, OutputParity
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.head import RISK_LEVEL, RISK_LOGITS
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.records.verdict import Check, Result, Verdict
from uwm_deploy.report.console import Reporter
from uwm_deploy.safeground.embedded import parity
from uwm_deploy.serve.client import Client, Counts, open_client
from uwm_deploy.serve.names import EMBEDDING
from uwm_deploy.serve.served import (
    Identity,
    ServedTower,
    canary_checks,
    count_checks,
    counts_of,
    identity_of,
    models_of,
    settled_counts,
)
from uwm_deploy.stages.verify.executed import RiskReference


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRequest:
    """What is to be checked.

    Attributes:
        url: Of the server.
        bundle: What it should serve.
        protocol: ``"grpc"`` or ``"http"``.
        policy: Name or file.
        evaluation: Another set than the bundle's own; of the same items.
        public_key: Whose signature the bundle must have.
        timeout_s: For each call.
        workers: Processes that read the evaluation set.
    """

    url: str
    bundle: Path
    protocol: str = "grpc"
    policy: str = "default"
    evaluation: str | None = None
    public_key: Path | None = None
    min_bundle_version: int = 0
    timeout_s: float = 60.0
    workers: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What was found.

    Attributes:
        server: Its name and version.
        checks: Whether it serves the bundle: configuration, versions, digests, canaries, statistics.
        verdict: The gate's on the served path; None when it was not measured, because it does not serve the bundle.
        evidence: What was measured on the served path.
        differ: Preference metric to the number of decisions that differ from those in the bundle's own evidence.
        counts: What the server has counted of each model at the end.
    """

    url: str
    protocol: str
    server: str
    bundle: Digest
    variant: str
    checks: tuple[Check, ...]
    verdict: Verdict | None = None
    evidence: ArtifactEvidence | None = None
    differ: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, Counts] = field(default_factory=dict)

    @property
    def exit_code(self) -> ExitCode:
        """5 when it is not the bundle that is served, else what the gate says of how it is served."""
        if any(check.blocks for check in self.checks):
            return ExitCode.INTEGRITY
        if self.verdict is None or self.verdict.result is Result.FAIL:
            return ExitCode.GATE_FAILED
        if self.verdict.result is not Result.PASS:
            return ExitCode.INCONCLUSIVE
        return ExitCode.PASS if self.variant in self.verdict.proven else ExitCode.GATE_FAILED


def check_served(request: ServedRequest, reporter: Reporter) -> Served:
    """Identity first, then canaries, then the bundle's evaluation set, as users would send it.

    Raises:
        InputError: If the address, the policy or the evaluation set is none that will do.
        IntegrityError: If the bundle itself was changed.
        AnswerError: If the server answers with an error while it is measured.
        PrerequisiteError: If the server cannot be reached.
    """
    bundle = open_bundle(request.bundle, public_key=request.public_key, min_bundle_version=request.min_bundle_version)
    judge = judge_of_bundle(bundle, request.policy)
    with reporter.stage("check", request.url):
        found, identity = _identified(bundle, request)
        if _blocked(found.checks):
            return found
        # No connection is open while the set is read: its processes are forked, and gRPC has threads.
        prepared = _prepared(bundle, request, reporter)
        return _measured(found, identity, bundle, prepared, judge, request, reporter)


@contextlib.contextmanager
def _connected(request: ServedRequest) -> Iterator[Client]:
    client = open_client(request.url, request.protocol, timeout_s=request.timeout_s)
    try:
        yield client
    finally:
        client.close()


def _identified(bundle: Bundle, request: ServedRequest) -> tuple[Served, Identity]:
    """What the server says of itself, and whether its encoders are the edited model."""
    digest = bundle.digest
    with _connected(request) as client:
        identity = identity_of(client, bundle, digest)
        checks = list(identity.checks)
        if not _blocked(checks):
            checks += canary_checks(_towers(client, bundle, identity), bundle)
        found = Served(
            url=client.url,
            protocol=client.protocol,
            server=identity.server,
            bundle=digest,
            variant=identity.variant,
            checks=tuple(checks),
        )
    return found, identity


def _prepared(bundle: Bundle, request: ServedRequest, reporter: Reporter) -> PreparedSet:
    source, measured_on = evaluation_source_of(bundle, request.evaluation), report_of_bundle(bundle)[0].evaluation
    check_measured_on(source, measured_on)
    return encoded(source, workers=request.workers, progress=reporter.progress)


def _measured(
    found: Served,
    identity: Identity,
    bundle: Bundle,
    prepared: PreparedSet,
    judge: Judge,
    request: ServedRequest,
    reporter: Reporter,
) -> Served:
    """SafeGround on the served path, judged in place of what the build measured."""
    report, _ = report_of_bundle(bundle)
    with _connected(request) as client:
        before, towers = counts_of(client, models_of(bundle.manifest)), _towers(client, bundle, identity)
        evidence = _evidence(bundle, towers, identity, prepared, reporter)
        sent = {model: rows for part in towers.values() for model, rows in part.expected().items()}
        after = settled_counts(client, before, sent)
    kept = tuple(evidence if a.variant == identity.variant else a for a in report.artifacts)
    updated = dataclasses.replace(report, artifacts=kept)
    own = next(a for a in report.artifacts if a.variant == identity.variant)
    return dataclasses.replace(
        found,
        checks=(*found.checks, *count_checks(before, after, sent)),
        verdict=judge(updated, digest_of_bytes(json_from_record(updated).encode())),
        evidence=evidence,
        differ=_differ(own, evidence),
        counts=after,
    )


def _towers(client: Client, bundle: Bundle, identity: Identity) -> dict[TowerName, ServedTower]:
    return {tower: ServedTower(client, bundle, tower, identity) for tower in TowerName}


def _blocked(checks: Iterable[Check]) -> bool:
    return any(check.blocks for check in checks)


def _evidence(
    bundle: Bundle,
    towers: Mapping[TowerName, ServedTower],
    identity: Identity,
    prepared: PreparedSet,
    reporter: Reporter,
) -> ArtifactEvidence:
    """The served path measured as `attest` measures an engine, on what users send instead of prepared rows."""
    stored, engines = stored_in(bundle), bundle.engines(identity.variant)
    built = engines[TowerName.IMAGE]
    running = Running(
        variant=identity.variant,
        precision=Precision(built.precision),
        profile=built.profile,
        sessions=towers,
        outputs=dict.fromkeys(TowerName, EMBEDDING),
        digests={tower: engine.digest for tower, engine in engines.items()},
        where=dict(identity.where),
        normalised=built.normalised,
        audit=known_of_files(bundle, identity.variant),
        further=lambda: _risk_parity(stored.risk, towers[TowerName.IMAGE], prepared) if stored.risk else [],
        whole=whole_rows(bundle, identity.variant, prepared.unsafe_ids),
    )
    return measured_against(running, stored, prepared, reporter.progress)


def _risk_parity(risk: RiskReference, served: ServedTower, prepared: PreparedSet) -> list[OutputParity]:
    """The head's outputs against the stored ones of the edited model."""
    n = min(served.max_batch, len(prepared.safe_pixels))
    found, wanted = served.run_all(prepared.safe_pixels[:n]), risk.found.safe
    pairs = {RISK_LOGITS: wanted.logits[:n], RISK_LEVEL: wanted.level[:n, None]}
    return [parity(TowerName.IMAGE, name, n, rows, found[name].reshape(n, -1)) for name, rows in pairs.items()]


def _differ(own: ArtifactEvidence, served: ArtifactEvidence) -> dict[str, int]:
    """Decisions, by metric, that differ between the bundle's evidence and the served path; the items are the same."""
    if not (own.safety and own.safety.items and served.safety and served.safety.items):
        return {}
    before, after = own.safety.items, served.safety.items
    pairs = {name: (bits, after.preference.get(name, "")) for name, bits in before.preference.items()}
    pairs |= {f"zero_shot.{name}": (bits, after.zero_shot.get(name, "")) for name, bits in before.zero_shot.items()}
    return {name: (int(left or "0", 16) ^ int(right or "0", 16)).bit_count() for name, (left, right) in pairs.items()}
