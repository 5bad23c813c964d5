"""Checks, verdicts, baselines and waivers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.metrics import WorstItem
from uwm_deploy.records.model import Digest
from uwm_deploy.records.shape import LATER


class Cause(StrEnum):
    """What kind of fault a failing check points to; docs/reference/faults.md lists who detects which."""

    EDIT = "edit"
    WEIGHTS = "weights"
    GRAPH = "graph"
    NUMBERS = "numbers"
    BATCHING = "batching"
    NONDETERMINISM = "nondeterminism"
    PREPROCESSING = "preprocessing"
    TOKENISATION = "tokenisation"
    DATA = "data"
    ANOMALY = "anomaly"
    EVIDENCE = "evidence"
    INTEGRITY = "integrity"
    MODEL = "model"
    DECISIONS = "decisions"


OF_REPORT = "report of "
"""Begins the names of checks of a report of captions or pictures that no policy can switch off."""

IN_TRAINING = " in training of the "
"""Stands in the names of checks that what was measured was not trained on."""


class Result(StrEnum):
    """Outcome of a check or a verdict; only ``pass`` passes."""

    PASS = "pass"  # noqa: S105 -- an outcome, not a password
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A report that someone accepted, to compare later ones with; `baseline.json`.

    Attributes:
        report_digest: Digest of the report's canonical JSON, checked whenever the baseline is read.
        policy: Name of the policy that it passed when it was accepted.
        accepted_by: Who answers for it.
        accepted: ISO date.
    """

    report: VerifyReport
    report_digest: Digest
    policy: str
    policy_digest: Digest
    accepted_by: str
    reason: str
    accepted: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WaiverState:
    """One waiver of a policy and what became of it.

    Attributes:
        check: Name of the check that it is for.
        subject: Subject of that check.
        expires: ISO date of the last day on which it counts.
        state: Applied to a check that does not pass; unused, because every such check passes or none exists; or expired.
    """

    check: str
    subject: str
    owner: str
    reason: str
    expires: str
    state: Literal["applied", "unused", "expired"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One comparison of a measured number with a limit of the policy.

    Attributes:
        bound: Whether the measured value was compared, or the end of its interval that is worse.
        detects: Smallest change in points that this n shows with 90% power; None where that has no meaning.
        concept: Concept that it is about; empty for all.
        rule: Which rule of the policy asked for it, e.g. ``"artifact[2]"``; empty for what no policy can switch off.
        cause: What kind of fault it points to when it fails.
        stage: Stage in which that fault was made.
        advice: What to try when it does not pass.
        waiver: The waiver that keeps it from blocking; the result stays what it is.
    """

    name: str
    subject: str
    result: Result
    measured: float | None
    limit: float | None
    direction: Literal["at_least", "at_most", "equals"]
    detail: str
    n: int = 0
    low: float | None = None
    high: float | None = None
    bound: Literal["point", "worst"] = "point"
    detects: float | None = None
    concept: str = ""
    rule: str = ""
    advice: str = ""
    cause: Cause | None = None
    stage: str = ""
    waiver: WaiverState | None = None

    @property
    def blocks(self) -> bool:
        """Whether it keeps the verdict from being a pass."""
        return self.result is not Result.PASS and self.waiver is None

    @property
    def of_outputs(self) -> bool:
        """Whether it is about captions or pictures, which are measured on a bundle that is there."""
        return self.name.startswith(("downstream.", OF_REPORT))

    @property
    def waits(self) -> bool:
        """Whether it is about captions or pictures that were not measured yet: nothing is wrong, and nothing is shown."""
        return self.of_outputs and self.result is Result.NOT_RUN


def statement(name: str, subject: str, true: bool, otherwise: str, *, rule: str = "") -> Check:
    """A check of something that is true or not."""
    return Check(
        name=name,
        subject=subject,
        result=Result.PASS if true else Result.FAIL,
        measured=float(true),
        limit=1.0,
        direction="equals",
        detail="" if true else otherwise,
        rule=rule,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """A fault that failing checks point to.

    Attributes:
        stage: Stage in which it was made.
        subject: What it was seen in.
        detail: The check that says most about it.
    """

    cause: Cause
    stage: str
    subject: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Safer:
    """Whether the edit is shown to make the model safer; no policy can switch the question off.

    Attributes:
        shown: GS rose, PS was kept, both by the worse end of their paired intervals, and every limit of the policy on the
            edited model passes.
        reason: One line: what is not shown, or the numbers that show it.
        asked: Whether the policy limits the edited model at all.
    """

    shown: bool
    reason: str
    asked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate decided.

    Attributes:
        safer: Whether the edit makes the model safer, which a pass does not say where the policy does not ask.
        faithful: Variants that were executed and passed every check about themselves, waived ones apart: they do what the
            edited model does, whatever that is worth.
        causes: Faults behind the checks that fail, the first in the pipeline's order first: the others may follow from it.
        judged: Variant to the digests, by tower, of the artifacts that the verdict is about.
        proven: The faithful variants, where every check of the model, the data and the edit passes too, waived ones apart;
            the runtime serves no others. Under a policy that does not ask, they are not shown safer: see `safer`.
        unproven: Variants that were not executed.
        failed: Variants that were executed and did not pass, those in `inconclusive` apart.
        inconclusive: Variants that were executed, where nothing failed and only more items can tell.
        report_digest: Digest of the verify report that was judged.
        policy_digest: Digest of the policy's bytes.
        baseline_digest: Digest of the baseline's file; empty when there was none.
        waivers: Every waiver of the policy, with what became of it.
        notes: What a reader should know that is no check: concepts with too few items, power, variants that are gone.
        worst: The ten worst quadruples of what does not pass.
        head_digest: Of the safety head that it is about; empty without one.
        decoding: Checks of decoding at a reduced size (`scaled_decoding`). Whatever their results, variants that decode in
            full are proven or not by the others.
        downstream: Digest of each report of captions or pictures that was judged, by its kind.
    """

    result: Result
    checks: tuple[Check, ...]
    proven: tuple[str, ...]
    unproven: tuple[str, ...]
    failed: tuple[str, ...]
    policy: str
    policy_digest: Digest
    report_digest: Digest
    edited_weights_digest: Digest
    baseline_digest: str = ""
    waivers: tuple[WaiverState, ...] = ()
    notes: tuple[str, ...] = ()
    worst: tuple[WorstItem, ...] = ()
    causes: tuple[Blame, ...] = ()
    judged: Mapping[str, Mapping[str, Digest]] = field(default_factory=dict)
    head_digest: Digest = ""
    faithful: tuple[str, ...] = ()
    inconclusive: tuple[str, ...] = field(default=(), metadata=LATER)
    downstream: Mapping[str, Digest] = field(default_factory=dict, metadata=LATER)
    safer: Safer = Safer(shown=False, reason="the gate did not ask; judge again with `uwm-deploy gate`")
    decoding: tuple[Check, ...] = field(default=(), metadata=LATER)

    @property
    def scaled_decoding(self) -> Result:
        """Whether decoding at a reduced size keeps the decisions; it was not run where nothing could be reduced."""
        results = {check.result for check in self.decoding}
        worst = (Result.FAIL, Result.NOT_RUN, Result.INCONCLUSIVE, Result.PASS)
        return next((one for one in worst if one in results), Result.NOT_RUN)

    @property
    def waits_for(self) -> tuple[str, ...]:
        """Kinds of outputs, such as ``caption``, that limits ask for and no report is about."""
        return tuple(dict.fromkeys(check.name.split(".")[1] for check in self.checks if check.waits and check.blocks))

    @property
    def only_outputs_block(self) -> bool:
        """Whether nothing but limits on captions and pictures keeps it from passing; they are measured on the bundle."""
        blocking = [check for check in self.checks if check.blocks]
        return bool(blocking) and all(check.of_outputs for check in blocking)

    @property
    def not_passed(self) -> tuple[str, ...]:
        """Variants that were executed and did not pass, whether they failed or were measured on too few items."""
        return (*self.failed, *self.inconclusive)
