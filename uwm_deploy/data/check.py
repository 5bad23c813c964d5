"""Looks at every item of a set: what is broken, what occurs twice, and what another set has too."""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from uwm_deploy.data.embedding import content_digest
from uwm_deploy.data.files import NAMED_LEFT_OUT
from uwm_deploy.data.open import open_source
from uwm_deploy.data.reading import Progress, read_all
from uwm_deploy.data.source import QuadrupleSource, ZeroShotSet
from uwm_deploy.errors import DataError
from uwm_deploy.recipes.data_set import CalibrationSet
from uwm_deploy.records.data import DataReport, LeftOut, Overlap, SameContent

_NAMED_IN_A_LINE = 3
_BROKEN = "broken items"
_FEW, _TIMES, _ALIKE = 30, 10, 0.8
"""A concept looks misspelt with fewer items than that, so many times less than another, and a name so alike."""

Kind = Literal["whole", "images", "texts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A set that is looked at.

    Attributes:
        spec: Its definition.
        source: Its items; ids may occur more than once.
    """

    spec: CalibrationSet
    source: QuadrupleSource


def opened(spec: CalibrationSet, *, base: Path | None, zero_shot: bool = False) -> Checked:
    """Opens a set to be looked at; see `open_source`. Its zero-shot sets play no part unless they are asked for."""
    spec = spec if zero_shot else dataclasses.replace(spec, zero_shot=())
    return Checked(spec=spec, source=open_source(spec, base=base, allow_twice=True))


def check(checked: Checked, against: Sequence[Checked] = (), *, workers: int, progress: Progress) -> DataReport:
    """Reads and decodes every item of a set, and of those it is compared with.

    Some three hundred bytes are kept per item, however large it is.

    Args:
        checked: The set.
        against: Sets that must not share items with it.
        workers: Decoding processes; 0 decodes here.
        progress: Called as it goes on.
    """
    spec, source = checked.spec, checked.source
    content = _content_of(checked, workers, progress)
    twice = [item for item, times in Counter(source.ids).items() if times > 1]
    same_count, same = _same_within(content, source.ids)
    overlaps = tuple(_overlap(checked, content, other, workers, progress) for other in against)
    problems = []
    if content.broken_count > spec.max_broken_share * len(source) or content.broken_count == len(source):
        problems.append(
            f"{_BROKEN}: {content.broken_count} of {len(source)} "
            f"({_some([item.id for item in content.broken])}), and max_broken_share is {spec.max_broken_share:g}"
        )
    if twice:
        problems.append(f"ids that occur more than once: {len(twice)} ({_some(twice)})")
    if same_count > spec.max_broken_share * len(source):
        problems.append(
            f"items with the content of an earlier one: {same_count} of {len(source)} ({_some([item.id for item in same])})"
        )
    for overlap in overlaps:
        if overlap.count:
            names = _some([item.id for item in overlap.items])
            problems.append(f"items that are in {overlap.name} too: {overlap.count} ({names})")
    return DataReport(
        data=source.record,
        image_pairs=int((content.images != b"").sum()),
        text_pairs=int((content.texts != b"").sum()),
        broken_count=content.broken_count,
        broken=tuple(content.broken),
        empty_texts=content.empty_texts,
        twice_count=len(twice),
        twice=tuple(twice[:NAMED_LEFT_OUT]),
        same_count=same_count,
        same=same,
        overlaps=overlaps,
        problems=tuple(problems),
        misspelt=misspelt(source.record.concepts),
        unused_names=source.unused_names,
    )


def problems_of_an_evaluation(
    checked: Checked, report: DataReport, *, workers: int, progress: Progress
) -> Iterator[str]:
    """Why a build would refuse a set, or stop at it, that is clean as it is: an evaluation leaves nothing out.

    Args:
        checked: The set, with its zero-shot sets, whose images are all read here.
        report: What is known of it.
        workers: Decoding processes; 0 decodes here.
        progress: Called as it goes on.
    """
    source = checked.source
    if not (source.has_images and source.has_texts):
        yield f"no {'texts' if source.has_images else 'images'}: an evaluation needs whole quadruples"
    if report.broken_count and not any(problem.startswith(_BROKEN) for problem in report.problems):
        names = _some([item.id for item in report.broken])
        yield f"{_BROKEN}: {report.broken_count} of {len(source)} ({names}), and an evaluation leaves nothing out"
    for name in source.zero_shot_names:
        part = source.zero_shot(name)
        found = read_all(partial(_labelled, part), len(part), workers, f"zero-shot {name}", progress)
        if broken := [reason for reason in found if reason]:
            yield f"broken images: {len(broken)} of {len(part)} ({broken[0]})"


def _labelled(part: ZeroShotSet, index: int) -> str:
    """Why one image cannot be read; empty if it can."""
    try:
        part.read(index)
    except DataError as error:
        return error.what
    return ""


def misspelt(concepts: Mapping[str, int]) -> dict[str, str]:
    """Concepts with few items whose names are almost those of concepts with many.

    Args:
        concepts: Items per concept.
    """
    found = {}
    for concept, n in concepts.items():
        larger = [other for other, m in concepts.items() if n < _FEW and m >= _TIMES * n]
        if near := difflib.get_close_matches(concept, larger, n=1, cutoff=_ALIKE):
            found[concept] = near[0]
    return found


@dataclass(slots=True, kw_only=True)
class _Content:
    """What is kept of a set.

    Attributes:
        whole: (n,) digests of the items; empty for a broken one.
        images: (n,) digests of the image pairs; empty where there is none.
        texts: (n,) the same of the texts.
        broken: The first broken items.
    """

    whole: np.ndarray
    images: np.ndarray
    texts: np.ndarray
    broken: list[LeftOut] = field(default_factory=list)
    broken_count: int = 0
    empty_texts: int = 0


class _Item(NamedTuple):
    """What a worker process says of one item."""

    reason: str = ""
    whole: bytes = b""
    images: bytes = b""
    texts: bytes = b""
    empty_text: bool = False


def _content_of(checked: Checked, workers: int, progress: Progress) -> _Content:
    source = checked.source
    whole, images, texts = (np.zeros(len(source), dtype="S32") for _ in range(3))
    content = _Content(whole=whole, images=images, texts=texts)
    items = read_all(partial(_read, source), len(source), workers, f"items of {checked.spec.name}", progress)
    for index, item in enumerate(items):
        content.whole[index], content.images[index], content.texts[index] = item.whole, item.images, item.texts
        content.empty_texts += item.empty_text
        if item.reason:
            content.broken_count += 1
            if len(content.broken) < NAMED_LEFT_OUT:
                content.broken.append(LeftOut(id=source.ids[index], reason=item.reason))
    return content


def _read(source: QuadrupleSource, index: int) -> _Item:
    try:
        item = source.read(index)
    except DataError as error:
        return _Item(reason=error.what.removeprefix(f"item {source.ids[index]}").lstrip(",: "))
    texts = [text for text in (item.safe_text, item.unsafe_text) if text is not None]
    has_images = item.safe_image is not None and item.unsafe_image is not None
    has_texts = len(texts) == len(("safe", "unsafe"))
    if (source.has_images and not has_images) or (source.has_texts and not has_texts) or not (has_images or has_texts):
        return _Item(reason=f"no {'image' if source.has_images and not has_images else 'text'} pair")
    only_images = dataclasses.replace(item, safe_text=None, unsafe_text=None)
    only_texts = dataclasses.replace(item, safe_image=None, unsafe_image=None)
    return _Item(
        whole=_raw(content_digest(item)),
        images=_raw(content_digest(only_images)) if has_images else b"",
        texts=_raw(content_digest(only_texts)) if has_texts else b"",
        empty_text=not all(text.strip() for text in texts),
    )


def _raw(digest: str) -> bytes:
    return bytes.fromhex(digest.removeprefix("sha256:"))


def _same_within(content: _Content, ids: Sequence[str]) -> tuple[int, tuple[SameContent, ...]]:
    """Items whose content an earlier item has."""
    order = np.argsort(content.whole, kind="stable")
    digests = content.whole[order]
    repeats = np.flatnonzero((digests[1:] == digests[:-1]) & (digests[1:] != b""))
    named = sorted((int(order[i + 1]), int(order[i])) for i in repeats)[:NAMED_LEFT_OUT]
    return len(repeats), tuple(SameContent(id=ids[later], other=ids[earlier]) for later, earlier in named)


def _overlap(checked: Checked, content: _Content, other: Checked, workers: int, progress: Progress) -> Overlap:
    """Compares what both sets have: a set of texts alone overlaps with one that has the same texts and images besides."""
    theirs = _content_of(other, workers, progress)
    images = checked.source.has_images and other.source.has_images
    texts = checked.source.has_texts and other.source.has_texts
    kind: Kind = "whole" if images and texts else "images" if images else "texts"
    mine, wanted = getattr(content, kind), getattr(theirs, kind)
    order = np.argsort(wanted, kind="stable")
    places = np.minimum(np.searchsorted(wanted, mine, sorter=order), len(wanted) - 1)
    found = np.flatnonzero((wanted[order[places]] == mine) & (mine != b"")) if images or texts else np.array([], int)
    return Overlap(
        name=other.spec.name,
        n=len(other.source),
        unread=theirs.broken_count,
        compared="images and texts" if images and texts else "images" if images else "texts" if texts else "nothing",
        count=len(found),
        items=tuple(
            SameContent(id=checked.source.ids[i], other=other.source.ids[order[places[i]]])
            for i in found[:NAMED_LEFT_OUT]
        ),
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED_IN_A_LINE]) + (", ..." if len(names) > _NAMED_IN_A_LINE else "")
