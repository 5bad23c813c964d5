"""What executing an artifact shows, beside its distance to a reference. Needs no torch, so that `attest` has it too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from uwm_deploy.data.embedding import Inputs, PreparedSet, embed, risks
from uwm_deploy.data.reading import Progress
from uwm_deploy.errors import first_line
from uwm_deploy.records.evidence import ArtifactEvidence, BatchCheck, OutputParity, RepeatCheck
from uwm_deploy.records.head import RISK_OUTPUTS, SafetyHead
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.session import Session
from uwm_deploy.safeground.canaries import FAR, Canaries
from uwm_deploy.safeground.embedded import EmbeddedSet, Yardstick, flips_between, safety_report, worst_items
from uwm_deploy.safeground.fidelity import Lengths, row_parity
from uwm_deploy.safeground.geometry import geometry
from uwm_deploy.safeground.health import anisotropy_change
from uwm_deploy.safeground.risk import RiskSet, decision_flips, risk_report
from uwm_deploy.stages.verify.captions import WholeRows, check_lengths

Sessions = Mapping[TowerName, Session]


@dataclass(frozen=True, slots=True)
class RiskReference:
    """What every artifact's risks are compared with.

    Attributes:
        head: Its thresholds decide.
        found: The evaluation set on the edited model in PyTorch.
    """

    head: SafetyHead
    found: RiskSet


ROWS = 8
"""Rows that are looked for again in larger batches."""


def executed_evidence(
    evidence: ArtifactEvidence,
    sessions: Sessions,
    reference: EmbeddedSet,
    prepared: PreparedSet,
    canaries: Mapping[TowerName, Canaries],
    measure: Callable[[], Iterable[OutputParity]],
    *,
    sizes: Iterable[int],
    normalised: bool,
    progress: Progress,
    risk: RiskReference | None = None,
    yardstick: Yardstick | None = None,
    whole: WholeRows | None = None,
) -> ArtifactEvidence:
    """Executes an artifact: single rows and batches, equal rows twice, parity, canaries, then the whole evaluation set.

    One that refuses a batch of its profile, or whose embeddings are of another size or not finite, is evidence too: it
    has what was measured until then, and no safety.

    Args:
        evidence: What is known before.
        sessions: The artifact.
        reference: Embeddings of the edited model.
        prepared: The evaluation set.
        canaries: Of each edited tower.
        measure: Parity of every output.
        sizes: Rows per call, the largest last.
        normalised: Whether its embeddings have length 1 already.
        progress: Called as it goes on.
        risk: The safety head, and what it says on the edited model; None without one.
        yardstick: Of the original model.
        whole: The edited model on whole rows, where the text graph cuts them; None where it does not.
    """
    rows: dict[TowerName, Inputs] = {TowerName.IMAGE: prepared.unsafe_pixels, TowerName.TEXT: prepared.unsafe_ids}
    sizes = sorted({1, *sizes})
    checks = [part for name in TowerName for part in check_batches(name, sessions[name], rows[name], sizes)]
    evidence = dataclasses.replace(evidence, batches=tuple(checks))
    if any(part.error for part in checks):
        return evidence
    for name in TowerName:
        width, wanted = sessions[name].run(rows[name][:1]).shape[1:], getattr(reference, f"safe_{name.value}").shape[1:]
        if width != wanted:
            text = f"the {name.value} tower gives embeddings of shape {width}, not {wanted}"
            return dataclasses.replace(evidence, broken=text)
    measured = list(measure())
    evidence = dataclasses.replace(
        evidence,
        parity=tuple(part for part in measured if part.output not in RISK_OUTPUTS),
        risk_parity=tuple(part for part in measured if part.output in RISK_OUTPUTS),
        canaries={name.value: part.worst(sessions[name].run(part.inputs)) for name, part in canaries.items()},
        repeats=tuple(check_repeats(name, sessions[name], rows[name], sizes[-1]) for name in TowerName),
        text_lengths=tuple(check_lengths(sessions[TowerName.TEXT], whole)) if whole else (),
    )
    return _on_the_set(evidence, sessions, reference, prepared, sizes[-1], normalised, progress, risk, yardstick)


def _on_the_set(
    evidence: ArtifactEvidence,
    sessions: Sessions,
    reference: EmbeddedSet,
    prepared: PreparedSet,
    batch: int,
    normalised: bool,
    progress: Progress,
    risk: RiskReference | None,
    yardstick: Yardstick | None,
) -> ArtifactEvidence:
    """The evidence with decisions and risks on the whole evaluation set."""
    lengths = {name: Lengths() for name in TowerName}
    embedded = embed(
        prepared,
        lengths[TowerName.IMAGE].of(sessions[TowerName.IMAGE].run),
        lengths[TowerName.TEXT].of(sessions[TowerName.TEXT].run),
        label=f"evaluation, {evidence.variant}",
        batch=batch,
        progress=progress,
    )
    if not embedded.is_finite():
        return dataclasses.replace(evidence, broken="embeddings of the evaluation set hold NaN or infinity")
    if risk is not None:
        label = f"risks, {evidence.variant}"
        run = sessions[TowerName.IMAGE].run_all
        found = risks(prepared, run, label=label, batch=batch, progress=progress)
        if not found.is_finite():
            return dataclasses.replace(evidence, broken="risks of the evaluation set hold NaN or infinity")
        evidence = dataclasses.replace(
            evidence,
            risk=risk_report(risk.head, found),
            risk_flips=decision_flips(risk.head, risk.found, found),
        )
    return dataclasses.replace(
        evidence,
        anisotropy=anisotropy_change(reference, embedded),
        rows=row_parity(reference, embedded, yardstick.original if yardstick else None),
        geometry=geometry(reference.shape(), embedded.shape()),
        lengths={name.value: part.largest for name, part in lengths.items()} if normalised else {},
        safety=safety_report(evidence.variant, embedded, with_items=True, yardstick=yardstick),
        flips=flips_between(reference, embedded, yardstick),
        worst=worst_items(evidence.variant, reference, embedded),
    )


def check_batches(tower: TowerName, session: Session, inputs: Inputs, sizes: Iterable[int]) -> list[BatchCheck]:
    """Embeds some rows alone, then within batches: with other neighbours, at other places.

    Args:
        tower: Which tower.
        session: The artifact's.
        inputs: (n, 3, H, W) float32 or (n, L) int64, rows to take from.
        sizes: Rows per call.

    Returns:
        One check per size; where the artifact refuses a size, with its words and nothing measured.
    """
    found: list[BatchCheck] = []
    alone: np.ndarray | None = None
    count = min(ROWS, len(inputs))
    for size in sorted({1, *sizes}):
        try:
            if alone is None:
                alone = np.concatenate([session.run(inputs[i : i + 1]) for i in range(count)])
                cosine = 1.0
            else:
                cosine = _least_cosine(alone, _among_others(session, inputs, count, size))
        except Exception as error:  # runtimes share no base class; whatever it is, the artifact cannot do this
            found.append(BatchCheck(tower=tower, batch=size, n=0, cosine_min=-1.0, error=first_line(error)))
            continue
        found.append(BatchCheck(tower=tower, batch=size, n=count, cosine_min=cosine))
    return found


def check_repeats(tower: TowerName, session: Session, inputs: Inputs, largest: int) -> RepeatCheck:
    """Embeds the same batch in two calls, in which every row is there twice.

    Args:
        tower: Which tower.
        session: The artifact's.
        inputs: (n, 3, H, W) float32 or (n, L) int64, rows to take from.
        largest: Rows per call that it takes.
    """
    count = max(1, min(ROWS, len(inputs), largest // 2))
    rows = inputs[0:count]
    batch = np.concatenate([rows, rows]) if largest >= 2 * count else rows
    first, second = session.run(batch), session.run(batch)
    twice = len(batch) > count
    return RepeatCheck(
        tower=tower,
        n=count,
        calls=_largest_difference(first, second),
        batch=_largest_difference(first[:count], first[count:]) if twice else None,
    )


def _largest_difference(left: np.ndarray, right: np.ndarray) -> float:
    """Of an entry, as a share of its row's length; `FAR` where one is not a number."""
    with np.errstate(invalid="ignore", divide="ignore"):
        lengths = np.linalg.norm(left.astype(np.float64), axis=1, keepdims=True)
        apart = np.abs(left.astype(np.float64) - right.astype(np.float64)) / lengths
    return min(float(np.nan_to_num(apart, nan=FAR, posinf=FAR).max()), FAR)


def _among_others(session: Session, inputs: Inputs, count: int, size: int) -> np.ndarray:
    """The first rows, each found in some batch of the size, in places and company that they do not have in the set."""
    rows = np.random.default_rng(size).permutation(len(inputs))
    # Every wanted row once, the rest of each batch filled with what comes; a short set gives its rows twice.
    order = np.concatenate([np.arange(count)[::-1], np.resize(rows, -count % size)])
    whole = np.random.default_rng(0).permutation(len(order))
    parts = []
    for start in range(0, len(order), size):
        batch = order[whole[start : start + size]]
        parts.append(session.run(np.concatenate([inputs[i : i + 1] for i in batch])))
    embeds = np.concatenate(parts)
    back = np.argsort(whole)[:count][::-1]
    result: np.ndarray = embeds[back]
    return result


def _least_cosine(left: np.ndarray, right: np.ndarray) -> float:
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.einsum("nd,nd->n", left.astype(np.float64), right.astype(np.float64)) / (
            np.linalg.norm(left.astype(np.float64), axis=1) * np.linalg.norm(right.astype(np.float64), axis=1)
        )
    return float(np.clip(np.nan_to_num(cosine, nan=-1.0), -1, 1).min())
