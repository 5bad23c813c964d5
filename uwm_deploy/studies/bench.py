"""How fast the variants of a bundle are here: they take turns, so what disturbs the machine disturbs all of them alike.

Needs no torch: the reference in PyTorch is one more contender that a caller may hand in (`torch_reference`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle, engine_path
from uwm_deploy.errors import InputError, IntegrityError, PrerequisiteError
from uwm_deploy.records.graph import EngineArtifact, Precision, TensorSpec
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.studies import WARM_ROUNDS, BenchReport, BenchSubject, ColdStart, Latency
from uwm_deploy.records.verdict import Verdict
from uwm_deploy.runtime.machine import clocks, machine
from uwm_deploy.runtime.openvino import OpenVinoSession
from uwm_deploy.runtime.pixels import taken
from uwm_deploy.runtime.selftest import stored_canaries
from uwm_deploy.runtime.session import Session, open_engine, reason_not_executable
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.stages.gate.rows import COSINE, COSINE_8_BITS

CAPTIONS = ("a red circle on a blue ground", "two green squares", "a small yellow triangle beside a grey wall")
"""Rows of text, of usual length; their words do not matter."""

COLD_ROUNDS = 3
"""Sessions that are opened one after another to measure a cold start."""

PAUSE_SECONDS = 0.05
"""Before each turn: threads of the one before wait for work in a busy loop for a while, and would take its cores."""

CALLS_FOR = {95: 20, 99: 100}
"""A percentile of fewer calls than this would be a name for the slowest one."""

Open = Callable[[TowerName], Session]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that is measured.

    Attributes:
        subject: What it is; where it runs is filled in when it has been opened.
        open: Makes a new session of one tower, files read and checked.
    """

    subject: BenchSubject
    open: Open


def contenders_of(bundle: Bundle, variants: Sequence[str], threads: int = 0) -> tuple[list[Contender], dict[str, str]]:
    """Variants of a bundle that this machine can execute, and the reason why it cannot, for each of the others.

    Args:
        bundle: An opened bundle.
        variants: Those that are asked for; all when empty.
        threads: Of a session on the CPU; with 0 the runtime chooses the number.

    Raises:
        InputError: If the bundle has no such variant.
    """
    manifest, found, not_run = bundle.manifest, [], {}
    for name in variants or sorted({engine.variant for engine in manifest.engines}):
        parts = bundle.engines(name)
        first = parts[TowerName.IMAGE]
        if reason := reason_not_executable(first):
            not_run[name] = reason
            continue
        subject = BenchSubject(
            name=name,
            precision=Precision(first.precision),
            state=_state(name, manifest.verdict),
            digests={tower.value: engine.digest for tower, engine in parts.items()},
        )

        def opened(tower: TowerName, parts: Mapping[TowerName, EngineArtifact] = parts) -> Session:
            engine = parts[tower]
            data = bundle.external_data(engine)
            return open_engine(engine, bundle.read(engine_path(engine)), data, threads=threads)

        found.append(Contender(subject, opened))
    return found, not_run


def _state(variant: str, verdict: Verdict) -> Literal["proven", "failed", "inconclusive", "unproven"]:
    if variant in verdict.proven:
        return "proven"
    if variant in verdict.inconclusive:
        return "inconclusive"
    return "failed" if variant in verdict.failed else "unproven"


def bench(
    bundle: Bundle,
    contenders: Sequence[Contender],
    not_run: Mapping[str, str],
    *,
    batches: Sequence[int],
    seconds: float,
    progress: Progress,
) -> BenchReport:
    """Measures every contender, both towers, cold and warm.

    Cold is a new session in this process up to its first answer. Warm calls are made in turns of a few calls, in random
    order. A ratio is that of the fastest calls in turns of the same round, which other work on the machine disturbs least.

    Args:
        bundle: Whose inputs they take.
        contenders: The first is what the others are compared with.
        not_run: Reasons for those that are not among them.
        batches: Rows per call; those between the smallest and the largest of the profile when empty.
        seconds: Time for each contender, tower and batch; at least one call per round is made whatever it takes.
        progress: Called as it goes on.

    Raises:
        InputError: If a batch is larger than the profile allows.
        PrerequisiteError: If nothing can be executed here.
    """
    sizes, before = _batches(bundle, batches), clocks()
    tried = _Tried(running=list(contenders), not_run=dict(not_run))
    for tower in TowerName:
        _measure_tower(tried, tower, workload_of(bundle, tower, max(sizes)), sizes, seconds, progress)
    names = [one.subject.name for one in tried.running]
    if not names:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in tried.not_run.items())
        raise PrerequisiteError(f"nothing can be measured here ({reasons})", fix="see `uwm-deploy doctor`")
    manifest = bundle.manifest
    return BenchReport(
        bundle=manifest.name,
        edited_weights_digest=manifest.edit.edited_weights_digest,
        verdict=manifest.verdict.result,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        clocks_before=before,
        clocks_after=clocks(),
        against=names[0],
        seconds=seconds,
        subjects=tuple(tried.subjects[name] for name in names),
        cold=tuple(row for row in tried.cold if row.subject in names),
        warm=tuple(row for row in tried.warm if row.subject in names),
        not_run=tried.not_run,
    )


@dataclass(slots=True, kw_only=True)
class _Tried:
    """What was measured so far.

    Attributes:
        running: Contenders that could be opened in every tower so far.
        not_run: Reasons for the others.
        subjects: By name, with where they ran.
    """

    running: list[Contender]
    not_run: dict[str, str]
    subjects: dict[str, BenchSubject] = field(default_factory=dict)
    cold: list[ColdStart] = field(default_factory=list)
    warm: list[Latency] = field(default_factory=list)


def _measure_tower(
    tried: _Tried, tower: TowerName, workload: Workload, sizes: Sequence[int], seconds: float, progress: Progress
) -> None:
    """Cold starts, then warm calls of all that started.

    Args:
        tried: Is added to.
        tower: Which tower.
        workload: At least as many rows as the largest batch.
        sizes: Batches, the smallest first.
        seconds: See `bench`.
        progress: See `bench`.
    """
    cold, failed = _cold(tried.running, tower, workload.inputs[: sizes[0]], progress)
    tried.cold += cold
    tried.not_run |= failed
    tried.running = [one for one in tried.running if one.subject.name not in failed]
    sessions: dict[str, Session] = {}
    try:
        for one in tried.running:
            session, where = _opened(one, tower)
            sessions[one.subject.name] = session
            tried.subjects[one.subject.name] = replace(one.subject, where=where)
        for size in sizes:
            least = {name: _least(tried.subjects[name]) for name in sessions}
            tried.warm += _warm(sessions, least, tower, workload.first(size), seconds, progress)
    finally:
        for session in sessions.values():
            session.close()


def _batches(bundle: Bundle, asked: Sequence[int]) -> tuple[int, ...]:
    profile = bundle.manifest.engines[0].profile
    if asked and max(asked) > profile.max:
        raise InputError(
            f"--batch {max(asked)} is above {profile.max}, the largest of this bundle's engines",
            fix=f"take one from {profile.min} to {profile.max}",
        )
    return tuple(sorted(set(asked or (profile.min, profile.opt, profile.max))))


@dataclass(frozen=True, slots=True)
class Workload:
    """What is embedded again and again.

    Attributes:
        inputs: (n, ...), rows for a tower in the dtype of its input.
        wanted: (n, d) float32, their embeddings by the edited model, of any length; None where the bundle does not know.
    """

    inputs: np.ndarray
    wanted: np.ndarray | None

    def first(self, rows: int) -> Workload:
        """The first rows."""
        return Workload(self.inputs[:rows], None if self.wanted is None else self.wanted[:rows])

    def least_cosine(self, found: np.ndarray) -> float:
        """Smallest cosine of a row with what it must be.

        Args:
            found: (n, d) float32, what was given.
        """
        if self.wanted is None:
            return 1.0 if np.isfinite(found).all() else -1.0
        with np.errstate(invalid="ignore", divide="ignore"):
            lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(self.wanted, axis=1)
            cosines = np.einsum("nd,nd->n", found, self.wanted) / lengths
        return float(np.nan_to_num(cosines, nan=-1.0).min())


def _least(subject: BenchSubject) -> float:
    """Smallest cosine with the edited model; none is asked of what is known to be wrong, or to be another model."""
    return -1.0 if subject.state in ("failed", "reference") else COSINE.get(subject.precision, COSINE_8_BITS)


def workload_of(bundle: Bundle, tower: TowerName, rows: int) -> Workload:
    """The bundle's canaries of a tower, as often as it takes: what is timed is also known.

    A tower without canaries gets what `inputs_of` gives, and only finite numbers are asked of it.
    """
    canaries = stored_canaries(bundle).get(tower)
    if canaries is None or not len(canaries.inputs):
        return Workload(inputs_of(bundle, tower, rows), None)
    order = np.resize(np.arange(len(canaries.inputs)), rows)
    return Workload(taken(canaries.inputs[order], _given(bundle, tower)), canaries.edited[order])


def inputs_of(bundle: Bundle, tower: TowerName, rows: int) -> np.ndarray:
    """Rows for a tower in the dtype of its input.

    They are noise, pixels (rows, 3, height, width) or crops (rows, height, width, 3), or ids of captions (rows, positions).
    The time does not depend on what they show or say, but on how long captions are: these are of usual length.
    """
    spec = _given(bundle, tower)
    if tower is TowerName.IMAGE:
        size, random = (rows, *(int(d) for d in spec.shape[1:])), np.random.default_rng(0)
        if spec.normalisation is not None:
            return random.integers(0, 256, size, dtype=np.uint8)
        return random.normal(size=size).astype(spec.dtype)
    tokenizer = Tokenizer(bundle.read(BundleLayout.TOKENIZER), bundle.manifest.model.text)
    return tokenizer.encode([CAPTIONS[row % len(CAPTIONS)] for row in range(rows)]).astype(spec.dtype)


def _given(bundle: Bundle, tower: TowerName) -> TensorSpec:
    return next(engine.inputs[0] for engine in bundle.manifest.engines if engine.tower is tower)


def _opened(one: Contender, tower: TowerName) -> tuple[Session, dict[str, str]]:
    """A session, and where it runs, with what no setting of ours says: threads on the CPU, and what OpenVINO multiplies."""
    before = _threads()
    session = one.open(tower)
    where = dict(session.where)
    if where["provider"] == "CPUExecutionProvider":
        where["threads"] = str(1 + _threads() - before)
    elif isinstance(session, OpenVinoSession):
        where |= session.conditions()
        # A hint: it says f32 for a model that multiplies in 8 bits, too.
        del where["computes_in"]
    return session, where


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def _cold(
    contenders: Sequence[Contender], tower: TowerName, batch: np.ndarray, progress: Progress
) -> tuple[list[ColdStart], dict[str, str]]:
    """Cold starts of all, and why those that do not start do not."""
    times: dict[str, list[tuple[float, float]]] = {one.subject.name: [] for one in contenders}
    failed: dict[str, str] = {}
    for turn in range(COLD_ROUNDS):
        for one in contenders:
            name = one.subject.name
            if name in failed:
                continue
            started = time.perf_counter()
            try:
                session = one.open(tower)
            except PrerequisiteError as error:
                failed[name] = error.what
                continue
            opened = time.perf_counter()
            try:
                session.run(batch)
                times[name].append((opened - started, time.perf_counter() - opened))
            finally:
                session.close()
        progress(f"{tower.value}, cold", turn + 1, COLD_ROUNDS)
    rows = []
    for name, pairs in times.items():
        if name not in failed:
            opening, first = np.median(np.array(pairs), axis=0) * 1e3
            rows.append(
                ColdStart(
                    subject=name, tower=tower, batch=len(batch), open_ms=float(opening), first_call_ms=float(first),
                    rounds=len(pairs),
                )
            )  # fmt: skip
    return rows, failed


def _warm(
    sessions: Mapping[str, Session],
    least: Mapping[str, float],
    tower: TowerName,
    batch: Workload,
    seconds: float,
    progress: Progress,
) -> list[Latency]:
    """Some calls of one after some calls of the other, in random order, several times; every answer is checked."""
    names, order, size = list(sessions), np.random.default_rng(0), len(batch.inputs)
    taken: dict[str, list[list[float]]] = {name: [] for name in names}
    cosines = dict.fromkeys(names, 1.0)
    for turn in range(WARM_ROUNDS):
        for position in order.permutation(len(names)):
            name = names[position]
            part, cosine = _block(sessions[name], batch, seconds / WARM_ROUNDS)
            taken[name].append(part)
            cosines[name] = min(cosines[name], cosine)
            _refuse_other_answers(name, tower, size, cosine, least[name])
        progress(f"{tower.value}, batch {size}", turn + 1, WARM_ROUNDS)
    rows = [latency_of(name, tower, size, taken[name], taken[names[0]]) for name in names]
    return [replace(row, cosine_min=cosines[row.subject]) for row in rows]


def _block(session: Session, batch: Workload, seconds: float) -> tuple[list[float], float]:
    """Seconds per call of a few calls in a row, and the smallest cosine of an answer; comparing is not timed."""
    time.sleep(PAUSE_SECONDS)
    session.run(batch.inputs)  # not counted: what the others left in the caches is gone after it
    taken: list[float] = []
    cosine, end = 1.0, time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        started = time.perf_counter()
        found = session.run(batch.inputs)
        taken.append(time.perf_counter() - started)
        cosine = min(cosine, batch.least_cosine(found))
    return taken, cosine


def _refuse_other_answers(name: str, tower: TowerName, size: int, cosine: float, least: float) -> None:
    """A time for wrong answers is no result.

    Raises:
        IntegrityError: If an answer is not the edited model's.
    """
    if cosine < least:
        raise IntegrityError(
            f"{name} gave other embeddings than the edited model's while it was timed ({tower.value}, batch {size}: cosine "
            f"{cosine:.6g}, must be at least {least:g})",
            fix="see `uwm-deploy gate BUNDLE --execute`, and build again",
        )


def latency_of(
    subject: str,
    tower: TowerName,
    batch: int,
    taken_s: Sequence[Sequence[float]],
    reference_s: Sequence[Sequence[float]],
) -> Latency:
    """One row of the table from the times of single calls.

    Args:
        subject: Whose they are.
        tower: Which tower.
        batch: Rows per call.
        taken_s: Per round, seconds of every call.
        reference_s: The same of the first contender in the same rounds.
    """
    calls = np.concatenate([np.asarray(part) for part in taken_s])
    high = {q: float(1e3 * np.percentile(calls, q)) if len(calls) >= least else None for q, least in CALLS_FOR.items()}
    ratios = [min(mine) / min(other) for mine, other in zip(taken_s, reference_s, strict=True)]
    return Latency(
        subject=subject,
        tower=tower,
        batch=batch,
        calls=len(calls),
        latency_ms_p50=float(1e3 * np.median(calls)),
        latency_ms_p95=high[95],
        latency_ms_p99=high[99],
        throughput_per_s=float(batch * len(calls) / calls.sum()),
        ratio=float(np.median(ratios)),
        ratio_low=float(min(ratios)),
        ratio_high=float(max(ratios)),
    )
