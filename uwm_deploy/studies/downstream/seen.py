"""Which of the images that are captioned a safety head or adapters had in training, image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from uwm_deploy.bundle.head import ITEMS, PLACE, digest_of_image, digest_of_pair, items_from
from uwm_deploy.bundle.open import Bundle
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.errors import DataError
from uwm_deploy.records.adapter import LanguageAdapter
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.downstream import Seen
from uwm_deploy.records.model import ImageSpec
from uwm_deploy.records.verdict import IN_TRAINING
from uwm_deploy.runtime.image import pixels_from_image
from uwm_deploy.towers.language_model import items_of_adapter

HEAD, ADAPTERS = "safety head", "adapters"
_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedOn:
    """What something was trained on.

    Attributes:
        data: The set.
        digests: Of its images and pairs; None where they are not known, as in a bundle of an older release.
    """

    data: CalibrationRecord
    digests: frozenset[str] | None


def trained_on(
    bundle: Bundle | None, adapter: LanguageAdapter | None, adapter_folder: Path | None
) -> dict[str, TrainedOn]:
    """What the bundle's head and the adapters learned from; empty without them.

    Args:
        bundle: With the head, if it has one.
        adapter: Record of the adapters.
        adapter_folder: Where they lie.

    Raises:
        IntegrityError: If a list of digests is not the one of its record.
    """
    found = {}
    head = bundle.manifest.head if bundle else None
    if bundle is not None and head is not None:
        place = f"{PLACE}/{ITEMS}"
        listed = any(file.path == place for file in bundle.manifest.files)
        found[HEAD] = TrainedOn(
            data=head.training.data, digests=items_from(bundle.read(place), place) if listed else None
        )
    if adapter is not None and adapter_folder is not None:
        found[ADAPTERS] = TrainedOn(data=adapter.data, digests=items_of_adapter(adapter_folder, adapter))
    return found


def seen_of(
    source: QuadrupleSource,
    spec: ImageSpec,
    trained: Mapping[str, TrainedOn],
    progress: Callable[[str, int, int], None],
) -> tuple[dict[str, Seen], tuple[str, ...]]:
    """Counts the images of a set that were trained on.

    Args:
        source: The set.
        spec: How images are prepared, in training and here.
        trained: See `trained_on`.
        progress: Called after each item.

    Returns:
        What was compared, and a line on each that a reader must know of.
    """
    known = {name: part.digests for name, part in trained.items() if part.digests is not None}
    hits: dict[str, list[str]] = {name: [] for name in known}
    for item in range(len(source)) if known else ():
        digests = _digests_of(source, item, spec)
        for name, seen in known.items():
            whole = digests.pair in seen
            hits[name] += [digests.item] * sum(whole or one in seen for one in digests.images)
        progress("compared with training", item + 1, len(source))
    found = {name: Seen(images=len(items), of=2 * len(source)) for name, items in hits.items()}
    return found, tuple(_lines(trained, hits, found, source.record))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Digests:
    item: str
    images: tuple[str, ...]
    pair: str


def _digests_of(source: QuadrupleSource, item: int, spec: ImageSpec) -> _Digests:
    read = source.read(item)
    if read.safe_image is None or read.unsafe_image is None:
        raise DataError(f"item {read.id} is no pair of images", fix="use a set of image pairs")
    safe, unsafe = (pixels_from_image(image, spec) for image in (read.safe_image, read.unsafe_image))
    return _Digests(
        item=read.id, images=(digest_of_image(safe), digest_of_image(unsafe)), pair=digest_of_pair(safe, unsafe)
    )


def _lines(
    trained: Mapping[str, TrainedOn],
    hits: Mapping[str, list[str]],
    found: Mapping[str, Seen],
    measured_on: CalibrationRecord,
) -> Iterator[str]:
    for name, part in trained.items():
        if name not in found:
            same = part.data.ids_digest == measured_on.ids_digest
            told = f"is the very set that the {name} had in training" if same else f"was not compared with the {name}'s"
            yield f"{measured_on.name} {told}: no list of its training images is here; train and build it again"
        elif hits[name]:
            first, seen = ", ".join(dict.fromkeys(hits[name][: 2 * _NAMED])), found[name]
            yield (
                f"{seen.images} of {seen.of} images ({100 * seen.images / seen.of:.1f}%) were{IN_TRAINING}{name}, such as "
                f"those of {first}: no such report passes the gate; measure on a set that shares nothing with "
                f"{part.data.name}"
            )
