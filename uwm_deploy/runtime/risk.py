"""Risks of images by a safety head, and the actions that a policy takes; numpy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from uwm_deploy.errors import ContractError, InputError
from uwm_deploy.records.head import RISK_LEVEL, RISK_LOGITS, Action, SafetyHead
from uwm_deploy.runtime.results import Embeddings, Risk, Risks, joined
from uwm_deploy.runtime.session import Session
from uwm_deploy.safeground.risk import ACTIONS, STEPS, categories_of, ranks_of, softmax


def risks_from(head: SafetyHead, logits: np.ndarray, level: np.ndarray) -> Risks:
    """Decides by a head's thresholds.

    Args:
        head: The bundle's safety head.
        logits: (n, categories), any floating dtype; NaN for an image that cannot be read.
        level: (n,) or (n, 1), any floating dtype, risk levels from 0 to 1; NaN for an image that cannot be read.
    """
    level = level.reshape(-1)
    known = np.isfinite(level) & np.isfinite(logits).all(axis=1)
    level = np.where(known, level, np.nan)
    ranks = ranks_of(level, head.thresholds)
    shares = np.full(logits.shape, np.nan)
    categories = np.full(len(level), -1, dtype=np.int64)
    if known.any():
        shares[known] = softmax(logits[known])
        categories[known] = categories_of(logits[known], ranks[known])
    return Risks(head.categories, shares, level, categories, tuple(ACTIONS[rank] for rank in ranks), head.prompts)


def risks_beside(head: SafetyHead, answers: Sequence[np.ndarray | Exception], width: int) -> Risks:
    """Decides on rows of `run_with_risk`.

    Args:
        head: Of the bundle.
        answers: Per image (d + categories + 1,) float32, or why there is none.
        width: d.
    """
    beside = [row if isinstance(row, Exception) else row[width:] for row in answers]
    rows = np.asarray(joined(beside, len(head.categories) + 1, "float32"))
    return risks_from(head, rows[:, :-1], rows[:, -1])


def run_with_risk(session: Session, batch: np.ndarray) -> np.ndarray:
    """Embedding, risk logits and risk level of each row, side by side.

    Args:
        session: Runs the image tower with its safety head.
        batch: (n, 3, H, W) float32.

    Returns:
        (n, d + categories + 1) float32.

    Raises:
        ContractError: If the engine lacks the head's outputs.
    """
    found = session.run_all(batch)
    embeds = next(iter(found.values()))
    try:
        return np.concatenate([embeds, found[RISK_LOGITS], found[RISK_LEVEL]], axis=1)
    except (KeyError, ValueError) as error:
        raise ContractError("the engine does not give the head's outputs", fix="build the bundle again") from error


@dataclass(frozen=True, slots=True)
class PolicyOutcome:
    """What a policy gives for one image.

    Attributes:
        decision: The action.
        embedding: (d,) float32 or float16, of the image when it is allowed or flagged, of the nearest safe text when it is
            redirected; None when it is blocked.
        text: The text that the image was redirected to; empty otherwise.
        risk: The risk that the decision rests on.
    """

    decision: Action
    embedding: np.ndarray | None
    text: str
    risk: Risk


class SafetyPolicy:
    """Decides by risks which embeddings may be used; see `SafeEncoder.safety_policy`.

    Args:
        head: The bundle's safety head.
        texts: Safe texts to redirect to.
        embed: Embeds texts, (m, d) float32, rows of length 1; called when an image is redirected for the first time.
        thresholds: Thresholds of the actions, instead of the head's.

    Raises:
        InputError: If a threshold is missing or out of order, or there is no text.
    """

    def __init__(
        self,
        head: SafetyHead,
        texts: Sequence[str],
        embed: Callable[[Sequence[str]], np.ndarray],
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        self.thresholds = dict(head.thresholds if thresholds is None else thresholds)
        names = [step.value for step in STEPS]
        limits = [self.thresholds.get(name, float("nan")) for name in names]
        if set(self.thresholds) != set(names) or not all(a <= b for a, b in pairwise(limits)):
            raise InputError(
                f"thresholds {self.thresholds} are not usable", fix=f"give {', '.join(names)}, none above the next"
            )
        if not texts:
            raise InputError("a policy needs a safe text to redirect to", fix="pass texts")
        self.texts, self._embed = tuple(texts), embed
        self._embeds: np.ndarray | None = None

    def apply(self, found: Embeddings) -> list[PolicyOutcome]:
        """Outcome of each image of ``encode_image(..., risk=True)``.

        Args:
            found: (n, d) float32 or float16, rows of length 1, with risks.

        Raises:
            InputError: If the embeddings have no risks.
        """
        if found.risk is None:
            raise InputError(
                "these embeddings have no risks", fix="call encode_image(..., risk=True); slices lose them"
            )
        rows, risks = np.asarray(found), found.risk
        ranks = ranks_of(risks.levels, self.thresholds)
        return [self._outcome(ACTIONS[int(rank)], rows[i], risks[i]) for i, rank in enumerate(ranks)]

    def _outcome(self, decision: Action, row: np.ndarray, risk: Risk) -> PolicyOutcome:
        if decision is Action.BLOCK:
            return PolicyOutcome(decision, None, "", risk)
        if decision is Action.REDIRECT:
            at, embeds = self.nearest(row)
            return PolicyOutcome(decision, embeds, self.texts[at], risk)
        return PolicyOutcome(decision, row, "", risk)

    def nearest(self, row: np.ndarray) -> tuple[int, np.ndarray]:
        """The safe text that is nearest to an embedding.

        Args:
            row: (d,), any floating dtype, length 1.

        Returns:
            Position of the text, and its embedding (d,) float32, length 1.
        """
        if self._embeds is None:
            self._embeds = np.asarray(self._embed(self.texts))
        at = int((self._embeds.astype(np.float32) @ row.astype(np.float32)).argmax())
        return at, self._embeds[at]
