"""Outcomes of a fit on held-out items: decisions, retrieval, zero-shot (docs/background/safety-axis.md section 5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from uwm_deploy.edits.features import KeptFeatures
from uwm_deploy.edits.fold_fit import EditedRows, FittedRows, FoldFit, ranks
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting

_IMAGE, _TEXT = TowerName.IMAGE, TowerName.TEXT


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SettingOutcomes:
    """Outcomes of one setting on the items of a fold, or of all folds together.

    Attributes:
        chosen: (n, 4) bool, whether the safe member is chosen in the decisions P_ts, P_tu, P_vs, P_vu.
        ranks: (n, 2) int64, rank of the right safe item, text to image and image to text; 0 is the first place.
        recognised: (z,) bool, whether a zero-shot item gets its class; the sets follow each other.
    """

    chosen: np.ndarray
    ranks: np.ndarray
    recognised: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ZeroShotSlice:
    """Items of one zero-shot set that are measured by one fold.

    Attributes:
        images: Rows of the z images.
        labels: (z,) int64, rows of `classes`.
        classes: Rows of the c classes.
    """

    images: FittedRows
    labels: np.ndarray
    classes: FittedRows


class HeldOut:
    """One fold, and the fit that its items were held out of.

    Args:
        fit: Fit of the items outside the fold.
        kept: All items; safe items outside the fold are candidates of a retrieval, too.
        held: (h,) int64, rows of the items that the fold holds out.
        zero_shot_rows: (z,) int64 by name of the zero-shot set, rows of the images that this fold measures.
    """

    def __init__(
        self, fit: FoldFit, kept: KeptFeatures, held: np.ndarray, zero_shot_rows: Mapping[str, np.ndarray]
    ) -> None:
        self.held = held
        self.safe = {tower: _seen(fit, tower, part.safe) for tower, part in kept.towers.items()}
        self.unsafe = {tower: _seen(fit, tower, part.unsafe[held]) for tower, part in kept.towers.items()}
        self.zero_shot = [
            ZeroShotSlice(
                images=_seen(fit, _IMAGE, part.images[zero_shot_rows[name]]),
                labels=part.labels[zero_shot_rows[name]],
                classes=_seen(fit, _TEXT, part.classes),
            )
            for name, part in kept.zero_shot.items()
        ]
        here = {tower: (rows.content[held], _part(rows.moved, held)) for tower, rows in self.safe.items()}
        away = {tower: (rows.content, rows.moved) for tower, rows in self.unsafe.items()}
        self._pairs = {
            (i, t): _products(image, text)
            for i, image in (("s", here[_IMAGE]), ("u", away[_IMAGE]))
            for t, text in (("s", here[_TEXT]), ("u", away[_TEXT]))
        }

    def measured(self, settings: Sequence[AxisSetting]) -> Iterator[tuple[int, SettingOutcomes]]:
        """Outcomes of each setting, with its position; settings of one tau come together, since they share a matrix."""
        for tau in sorted({setting.tau for setting in settings}):
            content = self.safe[_IMAGE].content_at(tau)
            to_image = _inner(self.safe[_TEXT].content[self.held], content)
            to_text = _inner(content[self.held], self.safe[_TEXT].content)
            classes = [_inner(part.images.content_at(tau), part.classes.content) for part in self.zero_shot]
            for position, setting in enumerate(settings):
                if setting.tau == tau:
                    yield position, self._measured(setting, to_image, to_text, classes)

    def _measured(
        self, setting: AxisSetting, to_image: np.ndarray, to_text: np.ndarray, classes: list[np.ndarray]
    ) -> SettingOutcomes:
        image, text = self.safe[_IMAGE].edited(setting), self.safe[_TEXT].edited(setting)
        images, texts = image.columns(_IMAGE), text.columns(_TEXT)
        both = [
            ranks(to_image, texts[self.held], images, image.length, self.held),
            ranks(to_text, images[self.held], texts, text.length, self.held),
        ]
        recognised = [_recognised(part, base, setting) for part, base in zip(self.zero_shot, classes, strict=True)]
        return SettingOutcomes(
            chosen=self._chosen(setting, image.at(self.held), text.at(self.held)),
            ranks=np.stack(both, axis=1),
            recognised=np.concatenate([*recognised, np.zeros(0, dtype=bool)]),
        )

    def _chosen(self, setting: AxisSetting, safe_image: EditedRows, safe_text: EditedRows) -> np.ndarray:
        images = {"s": safe_image, "u": self.unsafe[_IMAGE].edited(setting)}
        texts = {"s": safe_text, "u": self.unsafe[_TEXT].edited(setting)}
        cosine = {}
        for (i, t), (plain, moved) in self._pairs.items():
            added = (images[i].columns(_IMAGE) * texts[t].columns(_TEXT)).sum(axis=1)
            cosine[i, t] = (plain + setting.tau * moved + added) / images[i].length / texts[t].length
        return np.stack(
            [
                cosine["s", "s"] > cosine["u", "s"],
                cosine["s", "u"] > cosine["u", "u"],
                cosine["s", "s"] > cosine["s", "u"],
                cosine["u", "s"] > cosine["u", "u"],
            ],
            axis=1,
        )


def _seen(fit: FoldFit, tower: TowerName, features: np.ndarray) -> FittedRows:
    rows = features.astype(np.float64)
    return FittedRows(fit, tower, rows, rows @ fit.weights[tower].T)


def _part(moved: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if moved is None else moved[rows]


def _products(
    image: tuple[np.ndarray, np.ndarray | None], text: tuple[np.ndarray, np.ndarray | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Row by row: content of image and text, and what the redirect adds at tau = 1."""
    assert image[1] is not None
    return (image[0] * text[0]).sum(axis=1), (image[1] * text[0]).sum(axis=1)


def _inner(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    result: np.ndarray = left.astype(np.float32) @ right.astype(np.float32).T
    return result


def _recognised(part: ZeroShotSlice, base: np.ndarray, setting: AxisSetting) -> np.ndarray:
    """(z,) bool: the right class is alone on top."""
    image, text = part.images.edited(setting), part.classes.edited(setting)
    found = ranks(base, image.columns(_IMAGE), text.columns(_TEXT), text.length, part.labels)
    result: np.ndarray = found == 0
    return result
