"""The paper's 17 zero-shot sets: prompt, reader and quirk of each, as the official evaluation has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

IMAGENET = "imagenet"
"""The set whose class names its kin share."""

PHOTO = "a photo of a {}."
"""The usual prompt."""

_EUROSAT = {
    "AnnualCrop": "Annual Crop Land",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}
"""Folders whose class is called otherwise in the official evaluation's prompts."""


def _eurosat(key: str) -> str:
    return _EUROSAT.get(key, key)


def _qualifier_first(key: str) -> str:
    """`church/indoor` is read as "indoor church"."""
    place, _, qualifier = key.partition("/")
    return f"{qualifier} {place}".strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedSet:
    """One of the paper's sets.

    Attributes:
        name: What a user writes.
        column: The paper's column.
        size: Items when it is whole; another number is never compared with a published one.
        template: Prompt with `{}` for the class name.
        folders: Where its images are below the root; the first that is there is used.
        loader: `torchvision` reads it, or `folders` (one folder of images per class), or `ucf101` (frames and lists).
        torchvision: Class in `torchvision.datasets`.
        arguments: Its arguments besides root; several are read one after the other.
        class_name: From what torchvision calls a class to what the prompt calls it; underscores become spaces afterwards.
        quirk: How the official evaluation differs from the usual one.
    """

    name: str
    column: str
    size: int
    template: str = PHOTO
    folders: tuple[str, ...]
    loader: Literal["torchvision", "folders", "ucf101"] = "torchvision"
    torchvision: str = ""
    arguments: tuple[Mapping[str, object], ...] = field(default=({},))
    class_name: Callable[[str], str] = str
    quirk: str = ""


PUBLISHED: tuple[PublishedSet, ...] = (
    PublishedSet(
        name=IMAGENET,
        column="IN",
        size=50_000,
        folders=("imagenet/val",),
        loader="folders",
        quirk="validation images; class names from a file of the user's",
    ),
    PublishedSet(
        name="imagenet-v2",
        column="V2",
        size=10_000,
        folders=("imagenet-v2", "imagenetv2-matched-frequency-format-val"),
        loader="folders",
        quirk="folders are class numbers; sorted as text 10 comes before 2, so numbers are mapped back",
    ),
    PublishedSet(
        name="imagenet-r", column="R", size=30_000, folders=("imagenet-r",), loader="folders", quirk="200 classes"
    ),
    PublishedSet(
        name="imagenet-a", column="A", size=7_500, folders=("imagenet-a",), loader="folders", quirk="200 classes"
    ),
    PublishedSet(
        name="imagenet-sketch",
        column="Sk",
        size=50_889,
        folders=("imagenet-sketch/sketch", "imagenet-sketch"),
        loader="folders",
    ),
    PublishedSet(
        name="caltech101",
        column="CAL",
        size=8_677,
        folders=("caltech101",),
        torchvision="Caltech101",
        quirk="the whole set, no split; the background class is left out",
    ),
    PublishedSet(
        name="pets",
        column="PETS",
        size=3_669,
        template="a photo of a {}, a type of pet.",
        folders=("oxford-iiit-pet",),
        torchvision="OxfordIIITPet",
        arguments=({"split": "test"},),
    ),
    PublishedSet(
        name="food101",
        column="FOOD",
        size=25_250,
        template="a photo of {}, a type of food.",
        folders=("food-101",),
        torchvision="Food101",
        arguments=({"split": "test"},),
        quirk="no article in the prompt",
    ),
    PublishedSet(
        name="flowers102",
        column="FLWR",
        size=6_149,
        template="a photo of a {}, a type of flower.",
        folders=("flowers-102",),
        torchvision="Flowers102",
        arguments=({"split": "test"},),
    ),
    PublishedSet(
        name="cifar10",
        column="C10",
        size=10_000,
        folders=("cifar-10-batches-py",),
        torchvision="CIFAR10",
        arguments=({"train": False},),
    ),
    PublishedSet(
        name="cifar100",
        column="C100",
        size=10_000,
        folders=("cifar-100-python",),
        torchvision="CIFAR100",
        arguments=({"train": False},),
    ),
    PublishedSet(
        name="eurosat",
        column="ESAT",
        size=27_000,
        template="a centered satellite photo of {}.",
        folders=("eurosat",),
        torchvision="EuroSAT",
        class_name=_eurosat,
        quirk="all images, no split; no article in the prompt; eight classes are renamed",
    ),
    PublishedSet(
        name="cars",
        column="CARS",
        size=8_041,
        folders=("stanford_cars",),
        torchvision="StanfordCars",
        arguments=({"split": "test"},),
        quirk="the official run reads a mirror of the set",
    ),
    PublishedSet(
        name="aircraft",
        column="AIR",
        size=3_333,
        template="a photo of a {}, a type of aircraft.",
        folders=("fgvc-aircraft-2013b",),
        torchvision="FGVCAircraft",
        arguments=({"split": "test", "annotation_level": "variant"},),
    ),
    PublishedSet(
        name="dtd",
        column="DTD",
        size=18_800,
        template="a photo of a {} texture.",
        folders=("dtd",),
        torchvision="DTD",
        arguments=tuple({"split": "test", "partition": number} for number in range(1, 11)),
        quirk="test lists of all 10 partitions one after the other, so images count more than once",
    ),
    PublishedSet(
        name="sun397",
        column="SUN",
        size=108_754,
        folders=("SUN397",),
        torchvision="SUN397",
        class_name=_qualifier_first,
        quirk="the whole set, no split; `church/indoor` is called indoor church",
    ),
    PublishedSet(
        name="ucf101",
        column="UCF",
        size=11_213,
        template="a video of {}.",
        folders=("ucf101",),
        loader="ucf101",
        quirk="middle frame of each video; all three test lists; class names stay in CamelCase",
    ),
)
"""In the order of the paper's columns; one prompt per class, underscores of class names become spaces."""

NAMES = tuple(part.name for part in PUBLISHED)
"""What a user may write."""
