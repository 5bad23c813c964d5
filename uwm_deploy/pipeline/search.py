"""One query against the evaluation set, by the model before the edit and by what the bundle serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle
from uwm_deploy.data.embedding import unit_rows
from uwm_deploy.data.files import SIDES
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.errors import DataError, UwmError
from uwm_deploy.pipeline.original import original_sessions
from uwm_deploy.pipeline.shipping import evaluation_source_of
from uwm_deploy.pipeline.stored import reference_of
from uwm_deploy.records.model import TowerName
from uwm_deploy.report.search_page import Found, Searched
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.preprocessing import Preprocessing
from uwm_deploy.safeground.embedded import EmbeddedSet

SHOWN = 12
"""Items of a ranking that are shown."""

_EXAMPLES = 4


class Search:
    """Answers queries; any thread may ask.

    Args:
        bundle: An open bundle.
        encoder: What serves it.
        evaluation: Another place of its evaluation set.
    """

    def __init__(self, bundle: Bundle, encoder: SafeEncoder, evaluation: str | None = None) -> None:
        self.name = bundle.manifest.name
        self.variant = encoder.variant
        self.source: QuadrupleSource = evaluation_source_of(bundle, evaluation)
        self._encoder = encoder
        self._before = reference_of(bundle, "original")
        self._after = reference_of(bundle)
        if list(self._after.ids) != list(self.source.ids):
            raise DataError(
                f"data set {self.source.record.name} is not the one the bundle was measured on",
                fix="pass that one with --evaluation",
            )
        self._original = original_sessions(bundle)
        self._preprocessing = Preprocessing(bundle.manifest.model, bundle.read(BundleLayout.TOKENIZER))

    def by_caption(self, caption: str) -> Searched:
        """Pictures of the evaluation set, nearest to a caption first.

        Args:
            caption: Any text.

        Raises:
            DataError: If it cannot be encoded.
        """
        after = self._encoder.encode_text(caption)[0]
        before = self._by_original(TowerName.TEXT, caption)
        return self._searched(caption, "image", before, after)

    def by_picture(self, content: bytes, name: str) -> Searched:
        """Captions of the evaluation set, nearest to a picture first.

        Args:
            content: An encoded image.
            name: What the page calls it.

        Raises:
            DataError: If it is no image.
        """
        after = self._encoder.encode_image(content)[0]
        before = self._by_original(TowerName.IMAGE, content)
        return self._searched(name, "text", before, after)

    @cached_property
    def examples(self) -> Sequence[str]:
        """Unsafe captions of the set whose decision the edit changed most."""
        sets: Mapping[str, EmbeddedSet] = {"before": self._before, "after": self._after}
        before, after = (
            (part.unsafe_text * (part.safe_image - part.unsafe_image)).sum(axis=1) for part in sets.values()
        )
        gained = np.where((before < 0) & (after > 0), after - before, -np.inf)
        best = [int(i) for i in np.argsort(-gained, kind="stable")[:_EXAMPLES]]
        texts = [self.source.read_texts(i) for i in best]
        return tuple(text[1] for text in texts if text is not None)

    def _by_original(self, tower: TowerName, query: str | bytes) -> np.ndarray:
        """(d,) float32 of length 1, by the model before the edit."""
        if isinstance(query, str):
            (row,) = self._preprocessing.ids("neutral")([query])
        else:
            (row,) = self._preprocessing.pixels([query])
        if isinstance(row, UwmError):
            raise row
        embedded: np.ndarray = unit_rows(self._original[tower].run(np.asarray(row)[None]))[0]
        return embedded

    def _searched(self, query: str, kind: str, before: np.ndarray, after: np.ndarray) -> Searched:
        return Searched(
            query=query,
            kind="picture" if kind == "image" else "caption",
            before=self._ranked(self._before, kind, before),
            after=self._ranked(self._after, kind, after),
        )

    def _ranked(self, embedded: EmbeddedSet, kind: str, query: np.ndarray) -> tuple[Found, ...]:
        """The nearest items of both sides, each with the margin of its quadruple."""
        safe, unsafe = (getattr(embedded, f"{side}_{kind}") @ query for side in SIDES)
        both = np.concatenate([safe, unsafe])
        n = len(safe)
        found = []
        for row in np.argsort(-both, kind="stable")[:SHOWN]:
            index, side = int(row) % n, SIDES[int(row) // n]
            texts = self.source.read_texts(index)
            found.append(
                Found(
                    index=index,
                    id=embedded.ids[index],
                    concept=embedded.concepts[index],
                    side=side,
                    caption=texts[SIDES.index(side)] if texts else "",
                    cosine=float(both[row]),
                    margin=float(safe[index] - unsafe[index]),
                )
            )
        return tuple(found)
