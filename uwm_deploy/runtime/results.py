"""What encoding gives back: an array of embeddings that says which of its rows could not be made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from uwm_deploy.errors import UwmError
from uwm_deploy.records.head import MIXED_IN, Action

Kind = Literal["float32", "float16"]
"""Element type of what is given back."""


@dataclass(frozen=True, slots=True)
class ItemError:
    """One item that has no embedding.

    Attributes:
        position: Of the item among those of the call.
        error: What is wrong with it, as it would have been raised for this item alone.
    """

    position: int
    error: Exception

    def __str__(self) -> str:
        return f"{self.position}: {self.error}"


class Embeddings(np.ndarray[Any, np.dtype[Any]]):
    """(n, d) embeddings of length 1, an ordinary numpy array but for three attributes.

    A row that could not be made is NaN, never zeros and never left out: positions stay those of the items, NaN reaches no
    threshold, and an index that is given it complains.

    Attributes:
        errors: One for each such row, in order; empty in slices and copies.
        risk: What the bundle's safety head says of each row, where it was asked for; None in slices and copies.
    """

    errors: tuple[ItemError, ...]
    risk: Risks | None

    def __new__(cls, rows: np.ndarray, errors: Iterable[ItemError] = (), risk: Risks | None = None) -> Embeddings:
        """Takes over the rows; see the class."""
        made = np.asarray(rows).view(cls)
        made.errors, made.risk = tuple(errors), risk
        return made

    def __array_finalize__(self, parent: object) -> None:
        # Positions of a part are others than those of the whole.
        self.errors, self.risk = (), None

    def __array_wrap__(self, array: np.ndarray, context: Any = None, return_scalar: bool = False) -> Any:
        """Results of arithmetic are plain arrays: cosines are no embeddings."""
        return array[()] if return_scalar else np.asarray(array)

    @property
    def ok(self) -> np.ndarray:
        """(n,) bool: rows that are embeddings."""
        found: np.ndarray = np.isfinite(np.asarray(self)).all(axis=-1)
        return found


@dataclass(frozen=True, slots=True)
class Predictions:
    """Zero-shot classification of some images.

    Attributes:
        labels: The classes.
        scores: (n, classes) float32, cosines; NaN for an image that could not be encoded.
        errors: Images that could not be encoded, with the reasons.
    """

    labels: tuple[str, ...]
    scores: np.ndarray
    errors: tuple[ItemError, ...] = ()

    @property
    def top(self) -> list[str | None]:
        """The best label of each image; None where there is no embedding."""
        return [None if np.isnan(row).any() else self.labels[int(row.argmax())] for row in self.scores]

    def probabilities(self, scale: float = 100.0) -> np.ndarray:
        """Softmax of the scores times a scale; CLIP's training clips its own at 100.

        Args:
            scale: Factor of the scores.

        Returns:
            (n, classes) float32, rows add up to 1; NaN for an image that could not be encoded.
        """
        logits = self.scores * scale
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
        return shares


def joined(rows: Sequence[np.ndarray | Exception], width: int, dtype: Kind) -> Embeddings:
    """Rows and failures in order, as one array.

    Args:
        rows: Per item an embedding (d,), any floating dtype, or the reason why there is none.
        width: d, for the case that no item has an embedding.
        dtype: Element type of the result.

    Returns:
        (n, d) in that dtype; NaN where an item has no embedding.
    """
    found = np.full((len(rows), width), np.nan, dtype=dtype)
    errors = []
    for position, row in enumerate(rows):
        if isinstance(row, Exception):
            errors.append(ItemError(position, row))
        else:
            found[position] = row
    return Embeddings(found, errors)


@dataclass(frozen=True, slots=True)
class Risk:
    """What is said of one image.

    Attributes:
        category: ``"safe"`` where it is allowed, else its most probable concept; empty for an image that cannot be read.
        probability: Of that category.
        level: Probability that the image is unsafe.
        decision: What the level asks for.
        told: What the bundle's head has for a language model about this category; empty takes the usual words.
    """

    category: str
    probability: float
    level: float
    decision: Action
    told: str = ""

    @property
    def mixed_in(self) -> bool:
        """Whether a language model behind the tower gets the safety prompt and the safety tokens."""
        return self.decision in MIXED_IN

    @property
    def safety_prompt(self) -> str:
        """What a language model behind the tower is told before the question; empty where nothing is mixed in."""
        if not self.mixed_in:
            return ""
        may = f"The image may show this: {self.category}." if self.category else "The image could not be checked."
        may = self.told or may
        if self.decision is Action.BLOCK:
            return f"{may} Decline to describe it, and say why."
        return f"{may} Answer without repeating what is unsafe in it."


@dataclass(frozen=True, slots=True)
class Risks:
    """Risks of some images.

    Attributes:
        names: The categories.
        probabilities: (n, categories) float64, rows add up to 1; NaN for an image that cannot be read.
        levels: (n,) float32 or float64, risk levels from 0 to 1; NaN for an image that cannot be read.
        categories: (n,) int64, positions in `names`; -1 for an image that cannot be read.
        decisions: Action per image; one that cannot be read is blocked.
        prompts: Category to what a language model is told about it, see `SafetyHead.prompts`.
    """

    names: tuple[str, ...]
    probabilities: np.ndarray
    levels: np.ndarray
    categories: np.ndarray
    decisions: tuple[Action, ...]
    prompts: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.decisions)

    def __getitem__(self, row: int) -> Risk:
        """Of one image."""
        at = int(self.categories[row])
        known = at >= 0
        category = self.names[at] if known else ""
        return Risk(
            category=category,
            probability=float(self.probabilities[row, at]) if known else float("nan"),
            level=float(self.levels[row]),
            decision=self.decisions[row],
            told=self.prompts.get(category, ""),
        )


def raise_first(found: Embeddings, what: str) -> None:
    """Raises the error of the first item that has no embedding, with its position.

    Args:
        found: (n, d), any floating dtype; nothing happens where all items have an embedding.
        what: What the items are, such as ``"image"``.
    """
    if not found.errors:
        return
    first = found.errors[0]
    if not isinstance(first.error, UwmError):
        raise first.error
    raise type(first.error)(f"{what} {first.position}: {first.error.what}", fix=first.error.fix)
