"""Results of studies: sweeps, comparisons of methods, the self-test, benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.edit import Selection
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.metrics import Flips, SafetyReport
from uwm_deploy.records.model import Digest, ModelRef, TowerName
from uwm_deploy.records.strength import AxisSetting
from uwm_deploy.records.verdict import Cause, Result


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """One edit of a sweep.

    Attributes:
        keep_mass: Of an edit that selects entries; likewise `factor`.
        shares: Edited entries divided by all entries of the edited layers, per tower.
        safety: Measured with this edit.
        max_retrieval_loss: Points that the choice of a closed-form step's strength was allowed; None for other edits.
        setting: What was chosen.
    """

    keep_mass: float
    factor: float
    shares: Mapping[str, float]
    safety: SafetyReport
    max_retrieval_loss: float | None = None
    setting: AxisSetting | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepReport:
    """Every point of a sweep, and which one a rule picked.

    Attributes:
        measured_on: The set that every point was measured on.
        method: Name of the steps.
        selection: Of every point, per tower.
        concepts: Concepts whose selections were united; empty when all pairs make one score.
        rule: The rule of the pick in words; empty when nothing was to be picked.
        picked: Position in `points`; None when nothing was to be picked, or no point keeps the rule's limit.
    """

    model: ModelRef
    measured_on: CalibrationRecord
    scores_digest: Digest
    original: SafetyReport
    points: tuple[SweepPoint, ...]
    rule: str
    picked: int | None
    method: str = "uwm"
    selection: Mapping[str, Selection] = field(default_factory=dict)
    concepts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodCost:
    """What it took to make a model by a method: the whole command, in a process of its own.

    Attributes:
        seconds: Wall time.
        cpu_seconds: Time on processors, decoding processes included.
        peak_rss_bytes: Most memory of the process.
        gpu_seconds: Wall time of training on a GPU; 0 without one.
        peak_gpu_bytes: Most GPU memory that was in use while training; 0 without one.
        trainable_parameters: 0 for a method that trains nothing.
        data_seen: Quadruples that went through, repetitions counted.
        includes: The method whose cost is part of this one's, for an edit on top of trained weights.
    """

    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    gpu_seconds: float
    peak_gpu_bytes: int
    trainable_parameters: int
    data_seen: int
    includes: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedMethod:
    """One row of a comparison; without `safety` it was not run.

    Attributes:
        weights_digest: Of the model that was measured.
        change: Against the first row on the same items, per SafeGround metric, retrieval and zero-shot set; empty in that
            row.
        cost: None for a model that was not made here.
        reason: Why it was not run.
    """

    label: str
    weights_digest: Digest
    safety: SafetyReport | None
    change: Mapping[str, Flips]
    cost: MethodCost | None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodComparison:
    """Methods side by side on one set.

    Attributes:
        model: The model that all are made from.
        calibration: Name of the set that all are made on.
        measured_on: Name of the set that all are measured on, with its number of quadruples in `n`.
        machine: Where the cost was measured.
    """

    model: ModelRef
    calibration: str
    measured_on: str
    n: int
    rows: tuple[ComparedMethod, ...]
    machine: Mapping[str, str]
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultResult:
    """One planted fault and what the gate said of it.

    Attributes:
        text: What is wrong.
        cause: What the gate must name first.
        stage: Where it must say that the fault was made.
        found_cause: What it named first; None when it let the fault pass, or refused without a cause.
        named: Whether both are right, and nothing else is named that was not planted.
        detectors: Checks that failed, or the refusal.
        peers: Other tool's check to whether it says that something is wrong; empty where there is nothing to check.
        further: What else was named.
    """

    name: str
    text: str
    cause: Cause
    stage: str
    found_cause: Cause | None
    found_stage: str
    named: bool
    detectors: tuple[str, ...]
    peers: Mapping[str, bool] = field(default_factory=dict)
    further: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild:
    """One honest rebuild and its verdict.

    Attributes:
        what: What was varied.
        result: The verdict.
        failing: Checks that do not pass.
    """

    what: str
    result: Result
    failing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SelftestReport:
    """`uwm-deploy selftest`: faults that must fail, honest rebuilds that must pass.

    Attributes:
        policy: What everything was judged by.
        seconds: Wall time.
    """

    policy: str
    faults: tuple[FaultResult, ...]
    rebuilds: tuple[Rebuild, ...]
    seconds: float
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSubject:
    """Something whose speed was measured.

    Attributes:
        name: Variant of a bundle, or ``"torch"``.
        precision: What its linear layers compute in.
        state: What the bundle's verdict says of it; the model in PyTorch is the reference.
        digests: Digest per tower of the engine, or of the reference's weights.
        where: Provider, device, versions, threads.
    """

    name: str
    precision: Precision
    state: Literal["proven", "unproven", "inconclusive", "failed", "reference"]
    digests: Mapping[str, Digest]
    where: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """A new session up to its first answer; medians over the rounds.

    Attributes:
        open_ms: Reading and checking the files, and opening the session.
        first_call_ms: First call after that.
    """

    subject: str
    tower: TowerName
    batch: int
    open_ms: float
    first_call_ms: float
    rounds: int


WARM_ROUNDS = 5
"""Turns of every subject in the warm calls; a ratio is a median over them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Warm calls of one tower at one batch.

    Attributes:
        batch: Rows per call.
        calls: Number of calls; a percentile that needs more of them is None.
        throughput_per_s: Rows per second.
        ratio: Its fastest call divided by the first subject's fastest call in the same round; the median over the rounds.
        ratio_low: Of the rounds, the lowest; `ratio_high` the highest.
        cosine_min: Of all answers of the timed calls with the edited model's; 1 where those are not known.
    """

    subject: str
    tower: TowerName
    batch: int
    calls: int
    latency_ms_p50: float
    latency_ms_p95: float | None
    latency_ms_p99: float | None
    throughput_per_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    cosine_min: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """Speed of a bundle's variants on one machine, from one run.

    Attributes:
        verdict: The bundle's.
        machine: Processor, cores, versions, GPU.
        clocks_before: Clock rates and load when it began; `clocks_after` when it ended.
        against: Subject that ratios are to.
        seconds: Asked for, per subject, tower and batch.
        not_run: Variant, or ``"torch"``, to the reason.
    """

    bundle: str
    edited_weights_digest: Digest
    verdict: Result
    created: str
    machine: Mapping[str, str]
    clocks_before: Mapping[str, str]
    clocks_after: Mapping[str, str]
    against: str
    seconds: float
    subjects: tuple[BenchSubject, ...]
    cold: tuple[ColdStart, ...]
    warm: tuple[Latency, ...]
    not_run: Mapping[str, str]
