"""Stage `gate`: compares measured numbers with a policy. Only pass passes; what was not run never does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, date, datetime

from uwm_deploy.errors import InputError, IntegrityError
from uwm_deploy.recipes.policy import Limit, Policy, name_of
from uwm_deploy.records.downstream import DownstreamReport
from uwm_deploy.records.evidence import ArtifactEvidence, Evidence, VerifyReport
from uwm_deploy.records.metrics import RiskReport, SafetyReport, WorstItem
from uwm_deploy.records.model import Digest
from uwm_deploy.records.verdict import Baseline, Check, Result, Verdict, statement
from uwm_deploy.safeground.risk import STOPS
from uwm_deploy.stages.gate.advice import advice_for
from uwm_deploy.stages.gate.anomalies import as_published, not_better
from uwm_deploy.stages.gate.binding import Beside, belongs
from uwm_deploy.stages.gate.causes import blames, with_causes
from uwm_deploy.stages.gate.decoding import decoding_checks, decoding_note
from uwm_deploy.stages.gate.downstream import digests_of, downstream_checks, language_notes, sound_outputs
from uwm_deploy.stages.gate.evidence import is_for, missing, ran_where, required
from uwm_deploy.stages.gate.limits import check, check_value, power_note
from uwm_deploy.stages.gate.measured import (
    Measured,
    Metrics,
    artifact_metrics,
    baseline_metrics,
    category_metrics,
    concept_metrics,
    edit_metrics,
    risk_metrics,
)
from uwm_deploy.stages.gate.safer import EDITED, safer_of
from uwm_deploy.stages.gate.soundness import absent_concepts, sound_artifact, sound_report
from uwm_deploy.stages.gate.states import any_blocks, variant_states
from uwm_deploy.stages.gate.waivers import states_of, waiver_of

_WORST = 10


def _head_was_measured(report: VerifyReport) -> Iterator[Check]:
    """A safety head that is in the graph must have been measured."""
    if report.head_digest:
        told = report.risk is not None
        yield statement("the safety head was measured", EDITED, told, "the report has no risks; verify again")


def _executed(report: VerifyReport) -> set[str]:
    return {a.variant for a in report.artifacts if a.evidence is Evidence.EXECUTED}


def _notes_on(report: VerifyReport, policy: Policy) -> Iterator[str]:
    if report.data and (absent := sorted(absent_concepts(report.data, report))):
        yield f"data: calibrated concepts that no item measures: {', '.join(absent)}"
    yield from decoding_note(report.scaled, decoding_checks(report.scaled, policy.artifact))


def gate(
    report: VerifyReport,
    policy: Policy,
    *,
    policy_digest: Digest,
    report_digest: Digest,
    baseline: Baseline | None = None,
    baseline_digest: Digest = "",
    earlier: Verdict | None = None,
    today: date | None = None,
    beside: Beside | None = None,
    downstream: Sequence[DownstreamReport] = (),
) -> Verdict:
    """Judges a report.

    Args:
        report, policy: What was measured, and the limits.
        policy_digest, report_digest: Of the policy's text and of the report's file, recorded.
        baseline, baseline_digest: The accepted report, without which limits since it are "not run"; recorded as well.
        earlier: The bundle's own verdict. It is named where another policy of this name let pass what this one does not.
        today: Day that waivers are judged on; the present day in UTC when None.
        beside: What the report lies beside, and must be about; None for a report that lies alone.
        downstream: What came out behind the edited towers; limits on what is not among them are "not run".

    Raises:
        RecipeError: If the policy limits a metric that does not exist.
        InputError, IntegrityError: If the baseline was measured on something else, or is not the one that the policy pins.
    """
    judge = _Judge(report, policy, baseline, baseline_digest, today or datetime.now(UTC).date())
    sound, limited = sound_report(report), [*judge.edited(), *judge.downstream(downstream)]
    general = [*sound, *as_published(report), *belongs(report, beside), *limited, *_head_was_measured(report)]
    variants, executed = {a.variant: judge.artifact(a) for a in report.artifacts}, _executed(report)
    states, required = variant_states(variants, executed), judge.required()
    checks = [*general, *(c for found in variants.values() for c in found), *required]
    checks += [_enough(len(states.faithful), states.undecided, len(variants), policy.min_proven)]
    checks += [_loosened(policy)] if earlier and _contradicts(earlier, policy, policy_digest, checks) else []
    checks = _advised(with_causes(checks, report), report.model.name, states.unproven)
    return Verdict(
        result=_overall(checks),
        checks=tuple(checks),
        proven=() if any_blocks([*general, *required]) else states.faithful,  # it may equal a model that does not pass
        unproven=states.unproven,
        failed=states.failed,
        inconclusive=states.inconclusive,
        policy=policy.name,
        policy_digest=policy_digest,
        report_digest=report_digest,
        edited_weights_digest=report.edited_weights_digest,
        baseline_digest=baseline_digest,
        waivers=states_of(policy.waiver, checks, judge.today),
        notes=(*judge.notes, *_notes_on(report, policy), *language_notes(downstream)),
        worst=_worst(report, checks),
        causes=blames(checks),
        judged={a.variant: dict(a.artifact_digests) for a in report.artifacts},
        head_digest=report.head_digest,
        downstream=digests_of(downstream),
        faithful=states.faithful,
        safer=safer_of(report, sound, limited),
        decoding=decoding_checks(report.scaled, policy.artifact),
    )


def comparable(report: VerifyReport, baseline: Baseline) -> None:
    """Checks that two reports are of the same items, prepared in the same way.

    Raises:
        InputError: If not, with the command that measures again.
    """
    accepted = baseline.report
    for what, left, right in (
        ("items", accepted.evaluation.ids_digest, report.evaluation.ids_digest),
        ("content of the items", accepted.evaluation.content_digest, report.evaluation.content_digest),
        ("zero-shot sets", dict(accepted.zero_shot_digests), dict(report.zero_shot_digests)),
        ("image preprocessing", accepted.model.image, report.model.image),
        ("tokenisation", accepted.model.text, report.model.text),
    ):
        if left != right:
            raise InputError(
                f"the baseline of {accepted.model.name} on {accepted.evaluation.name} cannot be compared: other {what}",
                fix=f"measure the accepted model again with `uwm-deploy verify --model {accepted.model.name} "
                f"--evaluation {report.evaluation.name}`, then `uwm-deploy baseline set`",
            )
    for safety in (accepted.edited, report.edited):
        if safety.items is None:
            raise InputError(
                "a report has no outcomes per item, so it cannot be paired",
                fix=f"measure again with `uwm-deploy verify --model {report.model.name}`",
            )


class _Judge:
    """One report under one policy; collects notes on the way."""

    def __init__(
        self, report: VerifyReport, policy: Policy, baseline: Baseline | None, digest: Digest, today: date
    ) -> None:
        self.report, self.policy, self.today = report, policy, today
        self.notes: list[str] = []
        if baseline is not None and policy.baseline_digest and digest != policy.baseline_digest:
            raise IntegrityError(
                "the baseline is not the one that the policy pins",
                fix="restore it, or put the digest of `uwm-deploy baseline show` into the policy",
            )
        self.accepted: VerifyReport | None = baseline.report if baseline is not None else None
        if baseline is not None:
            comparable(report, baseline)
            self._note_lost_variants(baseline.report)

    def _note_lost_variants(self, accepted: VerifyReport) -> None:
        here = {a.variant for a in self.report.artifacts if a.evidence is Evidence.EXECUTED}
        for artifact in accepted.artifacts:
            if artifact.evidence is Evidence.EXECUTED and artifact.variant not in here:
                self.notes.append(f"{artifact.variant} was executed in the baseline and is not here")

    # --- the checks -------------------------------------------------------------------------------------------------

    def edited(self) -> list[Check]:
        """Of the edited model."""
        report, policy = self.report, self.policy
        found = self._limits("edit", policy.edit, EDITED, edit_metrics(report))
        if rules := [(i, limit) for i, limit in enumerate(policy.concept) if limit.of != "artifact"]:
            found += self._concepts(EDITED, concept_metrics(report.original, report.edited), rules)
        found += self._risk(EDITED, report.risk, None)
        return self._waived(
            [*found, *self._since_baseline(EDITED, report.edited, _numbered(policy.baseline, not_of="artifact"))]
        )

    def downstream(self, found: Sequence[DownstreamReport]) -> list[Check]:
        """Of captions and pictures behind the edited towers."""
        report, limits = self.report, self.policy.downstream
        return [*sound_outputs(found), *self._waived(downstream_checks(found, limits, report))]

    def artifact(self, artifact: ArtifactEvidence) -> list[Check]:
        """Of one artifact; none when it was not executed."""
        safety, name = artifact.safety, artifact.variant
        if artifact.evidence is not Evidence.EXECUTED:
            return []
        sound = sound_artifact(artifact, self.report.edited)
        if safety is None:
            whole = statement("the evaluation set was embedded", name, False, artifact.broken or "see the other checks")
            return [*sound, whole]
        policy = self.policy
        limits = self._limits("artifact", policy.artifact, name, artifact_metrics(artifact, safety), artifact)
        found = [
            *limits,
            *self._evidence(artifact),
            *self._since_baseline(
                name, safety, [r for r in _numbered(policy.baseline, not_of="edit") if _is_for(r[1], artifact)]
            ),
        ]
        rules = [r for r in _numbered(policy.concept, not_of="edit") if _is_for(r[1], artifact)]
        if rules:
            found += self._concepts(name, concept_metrics(self.report.edited, safety), rules)
        if self.report.head_digest:
            told = artifact.risk is not None and artifact.risk_flips is not None
            sound.append(statement("the safety head was measured", name, told, "the report has no risks; verify again"))
        found += self._risk(name, artifact.risk, artifact)
        return [
            *sound,
            not_better(artifact),
            # Otherwise a precision that nobody thought of would be proven by passing nothing.
            *([] if limits else [statement("limits apply", name, False, "no limit is for this variant")]),
            *self._waived(found),
        ]

    def required(self) -> list[Check]:
        """Variants that must have been executed, and evidence of those that were not executed, or not built."""
        artifacts = self.report.artifacts
        found = [required(name, artifacts) for name in self.policy.required]
        return self._waived([*found, *missing(self.policy.evidence, artifacts)])

    # --- parts ------------------------------------------------------------------------------------------------------

    def _limits(
        self,
        section: str,
        limits: Sequence[Limit],
        subject: str,
        metrics: Metrics,
        artifact: ArtifactEvidence | None = None,
    ) -> list[Check]:
        found = []
        for number, limit in enumerate(limits):
            if artifact is None or _is_for(limit, artifact):
                found.append(check(subject, metrics, limit, rule=f"{section}[{number}]"))
                self._note_power(found[-1], metrics, limit)
        return found

    def _note_power(self, found: Check, metrics: Metrics, limit: Limit) -> None:
        if found.result is Result.PASS:
            note = power_note(found.subject, found.name, metrics[limit.metric](), limit)
            self.notes += [note] if note else []

    def _concepts(
        self, subject: str, metrics: dict[str, Metrics], rules: Iterable[tuple[int, Limit]], section: str = "concept"
    ) -> list[Check]:
        """One check per concept with enough items; a rule that no concept has enough items for is inconclusive."""
        found = []
        for number, limit in rules:
            checks = [
                check(subject, metrics[concept], limit, rule=f"{section}[{number}]", concept=concept)
                for concept in metrics
            ]
            large = [c for c in checks if c.n >= limit.min_n]
            small = [f"{c.concept} ({c.n})" for c in checks if c.n < limit.min_n]
            if small and large:
                words = ", ".join(small)
                self.notes.append(f"{subject}: {limit.metric}: concepts with fewer than {limit.min_n} items: {words}")
            found += large or checks
        return found

    def _risk(self, subject: str, risk: RiskReport | None, artifact: ArtifactEvidence | None) -> list[Check]:
        """Limits on the safety head; none without one."""
        if risk is None:
            return []
        rules = _numbered(self.policy.risk, not_of="edit" if artifact else "artifact")
        rules = [(number, limit) for number, limit in rules if artifact is None or _is_for(limit, artifact)]
        metrics, categories = risk_metrics(risk, artifact), category_metrics(risk)
        found: list[Check] = []
        if not categories:
            text = "the evaluation set has no image of a concept that the head knows"
            found.append(statement("categories of the safety head", subject, False, text))
        for number, limit in rules:
            if limit.metric.startswith("risk.category."):
                found += self._concepts(subject, categories, [(number, limit)], section="risk")
            elif limit.metric == "risk.benign_zero_shot_stopped" and limit.metric not in metrics:
                self.notes.append(f"{subject}: {limit.metric}: the evaluation set has no zero-shot set")
            else:
                found.append(check(subject, metrics, limit, rule=f"risk[{number}]"))
                self._note_power(found[-1], metrics, limit)
        stops, costs = risk.recall[STOPS.value], risk.benign[STOPS.value]
        self.notes.append(
            f"{subject}: the safety head stops {stops.value:.1f}% of unsafe images and {costs.value:.1f}% of safe ones"
        )
        return found

    def _since_baseline(self, subject: str, now: SafetyReport, rules: Iterable[tuple[int, Limit]]) -> list[Check]:
        rules = list(rules)
        if not rules:
            return []
        if self.accepted is None:
            return [
                Check(
                    name=name_of("baseline", limit),
                    subject=subject,
                    result=Result.NOT_RUN,
                    measured=None,
                    limit=limit.at_least if limit.at_least is not None else limit.at_most,
                    direction="at_least" if limit.at_least is not None else "at_most",
                    detail="no baseline was given: --baseline PATH, after `uwm-deploy baseline set`",
                    rule=f"baseline[{number}]",
                )
                for number, limit in rules
            ]
        metrics = baseline_metrics(self._accepted_safety(self.accepted, subject), now)
        return [
            check(subject, metrics, limit, name=name_of("baseline", limit), rule=f"baseline[{number}]")
            for number, limit in rules
        ]

    def _accepted_safety(self, accepted: VerifyReport, subject: str) -> SafetyReport:
        """The same subject in the baseline; a variant that it lacks is compared with its edited model."""
        for artifact in accepted.artifacts:
            if artifact.variant == subject and artifact.safety is not None:
                return artifact.safety
        if subject != EDITED:
            self.notes.append(f"{subject} is not in the baseline; it is compared with the baseline's edited model")
        return accepted.edited

    def _evidence(self, artifact: ArtifactEvidence) -> list[Check]:
        """Where an executed variant ran, against the rules for its target."""
        return [
            ran_where(artifact, rule, f"evidence[{number}]")
            for number, rule in enumerate(self.policy.evidence)
            if is_for(rule, artifact)
        ]

    def _waived(self, checks: Iterable[Check]) -> list[Check]:
        """Checks of the policy's own rules, with the waivers that are still good."""
        return [dataclasses.replace(c, waiver=waiver_of(c, self.policy.waiver, self.today)) for c in checks]


def _numbered(limits: Sequence[Limit], *, not_of: str) -> list[tuple[int, Limit]]:
    return [(number, limit) for number, limit in enumerate(limits) if limit.of != not_of]


def _is_for(limit: Limit, artifact: ArtifactEvidence) -> bool:
    return not limit.precision or artifact.precision in limit.precision


def _contradicts(earlier: Verdict, policy: Policy, digest: Digest, checks: Sequence[Check]) -> bool:
    same = earlier.policy == policy.name and earlier.policy_digest != digest
    return same and earlier.result is Result.PASS and _overall(checks) is Result.FAIL


def _loosened(policy: Policy) -> Check:
    text = f"it passed by another policy of the name {policy.name}, and fails by this one: limits were changed between"
    return statement("verdict of the bundle", "build", False, text)


def _advised(checks: Iterable[Check], model: str, unproven: Sequence[str]) -> list[Check]:
    return [dataclasses.replace(check, advice=advice_for(check, model, unproven)) for check in checks]


def _enough(faithful: int, undecided: int, variants: int, wanted: int) -> Check:
    """Whether enough variants are faithful; inconclusive when those with too little data could make up for the rest."""
    limit = Limit(metric="", at_least=wanted)
    found = check_value("faithful variants", "build", Measured(faithful, variants), limit, rule="min_proven")
    if found.result is Result.FAIL and faithful + undecided >= wanted:
        detail = f"{faithful} faithful, {undecided} with too little data, must be at least {wanted}"
        return dataclasses.replace(found, result=Result.INCONCLUSIVE, detail=detail)
    return found


def _overall(checks: Iterable[Check]) -> Result:
    """What was not run fails, but for captions and pictures: they are measured on what is judged, so they come later."""
    results = {Result.INCONCLUSIVE if found.waits else found.result for found in checks if found.blocks}
    for worst in (Result.FAIL, Result.NOT_RUN, Result.INCONCLUSIVE):
        if worst in results:
            return Result.FAIL if worst is Result.NOT_RUN else worst
    return Result.PASS


_OF_NUMBERS = (Result.FAIL, Result.INCONCLUSIVE)
"""Results that a quadruple can explain; what was not run is no quadruple's doing."""


def _changed(item: WorstItem) -> bool:
    """Whether a decision was lost, or its margin shrank by more than is printed."""
    return item.lost or item.reference_margin - item.margin >= 1e-4


def _worst(report: VerifyReport, checks: Iterable[Check]) -> tuple[WorstItem, ...]:
    """The worst quadruples of the subjects whose numbers do not keep a limit, of those that changed."""
    parts = [report.edit_worst, *(a.worst for a in report.artifacts)]
    known = {item.subject for part in parts for item in part if _changed(item)}
    failed = {found.subject for found in checks if found.blocks and found.result is Result.FAIL}
    subjects = failed & known or {found.subject for found in checks if found.result in _OF_NUMBERS}
    found: list[WorstItem] = [i for part in parts for i in part if i.subject in subjects and _changed(i)]
    return tuple(sorted(found, key=lambda item: (not item.lost, item.margin - item.reference_margin))[:_WORST])
