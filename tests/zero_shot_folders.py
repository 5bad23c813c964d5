"""Tiny zero-shot sets in the layout of the real ones: flat images whose grey says which class they are of."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

STEP = 30
"""Grey levels between two classes."""

WORDNET = ("n01440764", "n01443537", "n01484850")
"""Ids of the first classes, in order."""


def grey(path: Path, label: int) -> None:
    """Writes a flat image of a class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (STEP * label + 10,) * 3).save(path)


def label_in(image: Image.Image) -> int:
    """Class that an image was drawn for."""
    return round((float(np.asarray(image.convert("L")).mean()) - 10) / STEP)


def write(path: Path, lines: list[str]) -> None:
    """Writes a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def imagenet(root: Path) -> None:
    """Validation folders, and names in the way of Kaggle's mapping file."""
    for label, key in enumerate(WORDNET):
        grey(root / "imagenet" / "val" / key / "a.JPEG", label)
    names = ["tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark, white shark"]
    write(root / "imagenet" / "LOC_synset_mapping.txt", [f"{k} {name}" for k, name in zip(WORDNET, names, strict=True)])


def imagenet_v2(root: Path) -> None:
    """Twelve numbered folders: as text, 10 and 11 come before 2."""
    imagenet(root)
    write(root / "imagenet-v2" / "classnames.txt", [f"n{number:08d} name {number}" for number in range(12)])
    for number in range(12):
        path = root / "imagenet-v2" / str(number) / "a.png"
        path.parent.mkdir()
        Image.new("L", (4, 4), number).save(path)


def imagenet_kin(name: str) -> Callable[[Path], None]:
    """Part of ImageNet's classes."""

    def make(root: Path) -> None:
        imagenet(root)
        grey(root / name / WORDNET[0] / "a.jpg", 0)
        grey(root / name / WORDNET[2] / "b.jpg", 1)
        write(root / name / "README.txt", ["not a class"])

    return make


def caltech101(root: Path) -> None:
    """Two classes and the background, which counts for nothing."""
    for label, name in enumerate(["Faces_easy", "accordion"]):
        for number in (1, 2):
            grey(root / "caltech101" / "101_ObjectCategories" / name / f"image_{number:04d}.jpg", label)
    grey(root / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google" / "image_0001.jpg", 7)


def pets(root: Path) -> None:
    """Test list with breeds."""
    folder = root / "oxford-iiit-pet"
    for label, name in enumerate(["Egyptian_Mau_7", "saint_bernard_8"]):
        grey(folder / "images" / f"{name}.jpg", label)
    write(folder / "annotations" / "test.txt", ["Egyptian_Mau_7 1 1 1", "saint_bernard_8 2 2 1"])


def food101(root: Path) -> None:
    """Test list by class."""
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "test.json").write_text(json.dumps({"baklava": ["baklava/2"], "apple_pie": ["apple_pie/1"]}))
    grey(folder / "images" / "apple_pie" / "1.jpg", 0)
    grey(folder / "images" / "baklava" / "2.jpg", 1)


def flowers102(root: Path) -> None:
    """Labels and splits in MATLAB files; the test split has images 1 and 2."""
    folder = root / "flowers-102"
    grey(folder / "jpg" / "image_00001.jpg", 1)
    grey(folder / "jpg" / "image_00002.jpg", 0)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([[2, 1, 1]])})
    splits = {"trnid": np.array([[3]]), "valid": np.array([[3]]), "tstid": np.array([[1, 2]])}
    scipy.io.savemat(folder / "setid.mat", splits)


def cifar(name: str, key: str, labels: str, parts: tuple[str, ...], meta: str) -> Callable[[Path], None]:
    """Pickled batches."""

    def make(root: Path) -> None:
        folder = root / name
        folder.mkdir(parents=True)
        pixels = np.stack([np.full(3072, STEP * label + 10, dtype=np.uint8) for label in (1, 0)])
        for part in parts:
            (folder / part).write_bytes(pickle.dumps({"data": pixels, labels: [1, 0]}))
        (folder / meta).write_bytes(pickle.dumps({key: ["aquarium_fish", "automobile"]}))

    return make


def eurosat(root: Path) -> None:
    """Folders in camel case."""
    for label, name in enumerate(["AnnualCrop", "Forest", "SeaLake"]):
        grey(root / "eurosat" / "2750" / name / f"{name}_1.jpg", label)


def cars(root: Path) -> None:
    """Annotations in MATLAB files; class numbers start from 1."""
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    kinds = [("fname", "O"), ("class", "O")]
    annotations = np.array([("00001.jpg", 2), ("00002.jpg", 1)], dtype=kinds)
    scipy.io.savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": annotations})
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    grey(folder / "cars_test" / "00001.jpg", 1)
    grey(folder / "cars_test" / "00002.jpg", 0)


def aircraft(root: Path) -> None:
    """Variants, one of which has a slash and a space."""
    folder = root / "fgvc-aircraft-2013b" / "data"
    write(folder / "variants.txt", ["707-320", "F/A-18 C"])
    write(folder / "images_variant_test.txt", ["0000002 F/A-18 C", "0000001 707-320"])
    grey(folder / "images" / "0000001.jpg", 0)
    grey(folder / "images" / "0000002.jpg", 1)


def dtd(root: Path) -> None:
    """Ten test lists, the first of them with one more image."""
    folder = root / "dtd" / "dtd"
    for label, name in enumerate(["banded", "polka-dotted"]):
        for number in (1, 2):
            grey(folder / "images" / name / f"{name}_{number}.jpg", label)
    for part in range(1, 11):
        more = ["banded/banded_2.jpg"] if part == 1 else []
        write(folder / "labels" / f"test{part}.txt", ["banded/banded_1.jpg", "polka-dotted/polka-dotted_2.jpg", *more])


def sun397(root: Path) -> None:
    """Scenes, some with a qualifier."""
    names = ["a/abbey", "c/church/indoor", "a/airplane_cabin"]
    write(root / "SUN397" / "ClassName.txt", [f"/{name}" for name in names])
    for label, name in enumerate(names):
        grey(root / "SUN397" / name / "sun_a.jpg", label)


def ucf101(root: Path) -> None:
    """Middle frames in folders with underscores, and three test lists."""
    folder = root / "ucf101"
    videos = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01", "HandstandPushups/v_HandStandPushups_g01_c01"]
    videos.append("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c02")
    for number, video in enumerate(videos, 1):
        write(folder / "ucfTrainTestlist" / f"testlist0{number}.txt", [f"{video}.avi"])
    frames = folder / "UCF-101-midframes"
    grey(frames / "Apply_Eye_Makeup" / "v_ApplyEyeMakeup_g01_c01.jpg", 0)
    grey(frames / "Apply_Eye_Makeup" / "v_ApplyEyeMakeup_g08_c02.jpg", 0)
    grey(frames / "Handstand_Pushups" / "v_HandStandPushups_g01_c01.jpg", 1)


CIFAR10_PARTS = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")

MAKERS: dict[str, Callable[[Path], None]] = {
    "imagenet": imagenet,
    "imagenet-v2": imagenet_v2,
    "imagenet-r": imagenet_kin("imagenet-r"),
    "imagenet-a": imagenet_kin("imagenet-a"),
    "imagenet-sketch": imagenet_kin("imagenet-sketch/sketch"),
    "caltech101": caltech101,
    "pets": pets,
    "food101": food101,
    "flowers102": flowers102,
    "cifar10": cifar("cifar-10-batches-py", "label_names", "labels", CIFAR10_PARTS, "batches.meta"),
    "cifar100": cifar("cifar-100-python", "fine_label_names", "fine_labels", ("train", "test"), "meta"),
    "eurosat": eurosat,
    "cars": cars,
    "aircraft": aircraft,
    "dtd": dtd,
    "sun397": sun397,
    "ucf101": ucf101,
}
"""Name of a set to what makes a tiny one."""


def make(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a tiny set; torchvision's checksums of the real files are replaced by those of the tiny ones."""
    from torchvision import datasets

    MAKERS[name](root)
    if name in ("cifar10", "cifar100"):
        kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        for key in ("train_list", "test_list"):
            files = [[file, _md5(root / kind.base_folder / file)] for file, _ in getattr(kind, key)]
            monkeypatch.setattr(kind, key, files)
        meta = kind.meta | {"md5": _md5(root / kind.base_folder / kind.meta["filename"])}
        monkeypatch.setattr(kind, "meta", meta)
    if name == "flowers102":
        files: dict[str, Any] = dict(datasets.Flowers102._file_dict)
        for key in ("label", "setid"):
            files[key] = (files[key][0], _md5(root / "flowers-102" / files[key][0]))
        monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
