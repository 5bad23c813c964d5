"""What a language model behind the image tower is given: patch features, safety tokens and safety prompts; numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from uwm_deploy.errors import ContractError, InputError
from uwm_deploy.records.head import RISK_LEVEL, RISK_LOGITS, SAFETY_TOKENS, SafetyHead
from uwm_deploy.runtime.results import Risks
from uwm_deploy.runtime.risk import risks_from
from uwm_deploy.runtime.session import Session

PATCH_FEATURES = "patch_features"
"""Output of the image graph of family llava."""


@dataclass(frozen=True, slots=True)
class LanguageInputs:
    """What a language model is given for n images, all from one run of one graph.

    Attributes:
        features: (n, patches, width) float32, for the language model's own projector.
        safety_tokens: (n, tokens, language width) float32, which join its input after the projected patches; None where the
            bundle's head has none.
        risk: Risks of the images, and with them the safety prompt of each; None without a safety head.
    """

    features: np.ndarray
    safety_tokens: np.ndarray | None
    risk: Risks | None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.features)

    @property
    def safety_prompts(self) -> tuple[str, ...]:
        """What comes before the question about each image; empty where it is allowed, or there is no safety head."""
        if self.risk is None:
            return ("",) * len(self)
        return tuple(self.risk[row].safety_prompt for row in range(len(self)))


def language_inputs_of(session: Session, head: SafetyHead | None, pixels: np.ndarray, name: str) -> LanguageInputs:
    """Runs an image graph on images that are preprocessed already.

    Args:
        session: Runs the image tower.
        head: The bundle's safety head.
        pixels: (n, 3, H, W) float32.
        name: Of the bundle, for messages.

    Raises:
        InputError: If the graph gives no patch features.
        ContractError: If it lacks an output of the head.
    """
    most = session.max_batch
    parts = [session.run_all(pixels[start : start + most]) for start in range(0, len(pixels), most)]
    if any(PATCH_FEATURES not in part for part in parts):
        raise InputError(
            f"{name} gives no {PATCH_FEATURES}, which a language model reads",
            fix="use a bundle of family llava, made from the language model's own checkpoint",
        )
    try:
        found = {key: np.concatenate([part[key] for part in parts]) for key in _wanted(head)}
    except KeyError as error:
        raise ContractError(f"{name} does not give the head's output {error}", fix="build the bundle again") from error
    return LanguageInputs(
        features=found[PATCH_FEATURES],
        safety_tokens=found.get(SAFETY_TOKENS),
        risk=risks_from(head, found[RISK_LOGITS], found[RISK_LEVEL]) if head is not None else None,
    )


def _wanted(head: SafetyHead | None) -> tuple[str, ...]:
    return (PATCH_FEATURES, *(head.shape.outputs if head is not None else ()))
