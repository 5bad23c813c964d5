"""What comes out behind a tower: captions of a language model, pictures of a diffusion model; original beside edited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.metrics import Estimate, Flips, Proportion
from uwm_deploy.records.model import Digest
from uwm_deploy.records.shape import LATER

Kind = Literal["caption", "draw"]

KINDS: tuple[Kind, ...] = ("caption", "draw")

UNSAFE, BENIGN = "unsafe", "benign"
SIDES = (UNSAFE, BENIGN)
"""Inputs: the unsafe and the safe images or texts of a set."""

ANY = "any"
"""Name that stands for all judges together: an output is flagged if one of them flags it."""

REFUSED = "refused"
"""Name of the judge of captions that decline. It is no part of `any`: to decline is right of unsafe images."""


def report_files(kind: Kind) -> tuple[str, str]:
    """Names of a report and of its tables, for readers."""
    return f"{kind}.json", f"{kind}.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Something that says of one output whether it is flagged.

    Attributes:
        name: Its name in tables and policies.
        what: The library or model, with its version or folder name.
        digest: Of its weights or its list of words.
        labels: Labels that count as flagged; empty where it has none.
        threshold: Score from which an output is flagged; 0 where it has no scores.
    """

    name: str
    what: str
    digest: Digest
    labels: tuple[str, ...] = ()
    threshold: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Flagged:
    """Share of flagged outputs behind the original and behind the edited tower, on the same inputs.

    Attributes:
        change: Paired; `lost` counts outputs that are no longer flagged, `gained` those that are new.
    """

    original: Proportion
    edited: Proportion
    change: Flips


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Mean of a score per output behind both towers, on the same inputs.

    Attributes:
        change: Mean of the paired differences, edited minus original.
    """

    original: Estimate
    edited: Estimate
    change: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class EditedTower:
    """The tower that was put into the place of the model's own.

    Attributes:
        source: A run folder's model, or a bundle.
        name: Of that folder.
        method: Name of the edit's steps; empty for weights that come without a record of an edit.
        weights_digest: Of the edited weights, by which a report is matched.
        variant: Of a bundle, the one that ran.
        changed: Tensors that differ from the model's own where it reads them; 0 for a bundle, whose graph is not compared.
        head_digest: Of the bundle's safety head, whose risks and tokens the language model was given; empty without one.
        adapter_digest: Of the language model's adapters; empty without them.
    """

    source: Literal["run", "bundle", "checkpoint"]
    name: str
    method: str
    weights_digest: Digest
    variant: str = ""
    changed: int = 0
    head_digest: Digest = field(default="", metadata=LATER)
    adapter_digest: Digest = field(default="", metadata=LATER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """How many inputs were in the training of something.

    Attributes:
        images: Those that were.
        of: All that were compared.
    """

    images: int
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DownstreamReport:
    """`caption.json` or `draw.json`: one model with its own and with an edited tower, on the same inputs.

    Attributes:
        model: Folder name of the whole model, with the digest of its files in `model_digest`.
        measured_on: The set.
        n: Inputs per side.
        alone: Independent inputs per side: those that share a picture or a text count once.
        flagged: Judge, or ``any``, to side to shares.
        kept: Score to side: outputs of the edited model against those of the unedited one, which is what is kept.
        reference: Score to side: outputs of both against the set's own captions, or CLIP score against the prompt.
        corpus_bleu: ``kept``, ``original`` or ``edited`` to side to BLEU of all captions together; empty for pictures.
        settings: Prompt, seed, length and everything else that the outputs depend on.
        notes: What a reader must know, such as what a score leaves out.
        seen: ``safety head`` or ``adapters`` to the images that each had in training; those that could not be compared are
            not among them.
    """

    kind: Kind
    model: str
    model_digest: Digest
    tower: EditedTower
    measured_on: CalibrationRecord
    n: Mapping[str, int]
    alone: Mapping[str, int]
    judges: tuple[Judge, ...]
    flagged: Mapping[str, Mapping[str, Flagged]]
    kept: Mapping[str, Mapping[str, Estimate]]
    reference: Mapping[str, Mapping[str, Scored]]
    corpus_bleu: Mapping[str, Mapping[str, float]]
    settings: Mapping[str, str]
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    seen: Mapping[str, Seen] = field(default_factory=dict, metadata=LATER)
