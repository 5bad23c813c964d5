"""Opens zero-shot sets that are on this machine: by torchvision, or as folders of images (docs/reference/zero-shot.md).

Nothing is downloaded, ever: images and class names come from the user's folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from uwm_deploy.data.finding import is_file, is_folder, names_in, short, walked
from uwm_deploy.data.source import LabelledImage, ZeroShotSet
from uwm_deploy.data.zero_shot_table import IMAGENET, PublishedSet
from uwm_deploy.errors import DataError, PrerequisiteError, imported, is_of_machine, unreadable
from uwm_deploy.runtime.image import image_from

NAMES_FILE = "classnames.txt"
"""Lines of class key and class name, beside a set's images."""

_IMAGENET_NAMES = (NAMES_FILE, "LOC_synset_mapping.txt", "meta.bin")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
_FRAME_FOLDERS = ("UCF-101-midframes", "frames")

NameOf = Callable[[str], str]


class BrokenItemError(DataError):
    """An image of a zero-shot set that cannot be read: the set is then not measured at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSet:
    """A set of image files; read without torchvision.

    Attributes:
        files: Path per item.
        targets: Row of `labels` per item.
    """

    name: str
    labels: tuple[str, ...]
    template: str
    files: tuple[str, ...]
    targets: tuple[int, ...]

    def __len__(self) -> int:
        """Number of items."""
        return len(self.files)

    def read(self, index: int) -> LabelledImage:
        """One labelled image.

        Raises:
            BrokenItemError: Set and file are named.
        """
        try:
            # As torchvision does it; a palette cannot be resized smoothly.
            return LabelledImage(
                image_from(self.files[index], short(self.files[index])).convert("RGB"), self.targets[index]
            )
        except DataError as error:
            raise BrokenItemError(f"zero-shot set {self.name}: {error.what}", fix=error.fix) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchvisionSet:
    """One or more sets of `torchvision.datasets`, one after the other.

    Attributes:
        parts: Opened sets.
        starts: First index of each part.
    """

    name: str
    labels: tuple[str, ...]
    template: str
    parts: tuple[Any, ...]
    starts: tuple[int, ...]

    def __len__(self) -> int:
        """Number of items."""
        return self.starts[-1] + len(self.parts[-1])

    def read(self, index: int) -> LabelledImage:
        """One labelled image.

        Raises:
            BrokenItemError: Set and index are named.
        """
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        try:
            image, label = self.parts[number][index - self.starts[number]]
            image = image.convert("RGB")  # also decodes it, which one of the sets leaves for later
        except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
            if is_of_machine(error):
                raise unreadable(f"zero-shot set {self.name}, item {index}", error, fix="") from error
            raise BrokenItemError(
                f"zero-shot set {self.name}, item {index}: {_reason(error)}", fix="restore the set"
            ) from error
        return LabelledImage(image, int(label))


def _reason(error: BaseException) -> str:
    """Why an image cannot be read, without the path that the library puts into it: the words are recorded."""
    if isinstance(error, UnidentifiedImageError):
        return "of no known kind"
    return (error.strerror if isinstance(error, OSError) else "") or str(error)


def published_set(spec: PublishedSet, root: Path) -> ZeroShotSet:
    """Opens one of the paper's sets.

    Args:
        spec: Which one.
        root: Folder of all zero-shot sets.

    Raises:
        PrerequisiteError: If its folder, its class names or a package is not there.
        DataError: If what is there is not the set.
    """
    found = [root / folder for folder in spec.folders if is_folder(root / folder)]
    if not found:
        raise PrerequisiteError(
            f"folder {short(root / spec.folders[0])} is not there", fix="see docs/reference/zero-shot.md"
        )
    if spec.loader == "torchvision":
        return _torchvision_set(spec, root, found[0])
    if spec.loader == "ucf101":
        return _ucf101(spec, found[0])
    return folder_set(spec.name, spec.template, found[0], _imagenet_names(found[0], root / IMAGENET))


def folder_set(name: str, template: str, folder: Path, name_of: NameOf | None = None) -> ZeroShotSet:
    """One folder of images per class, in the order of their names.

    Args:
        name: For reports.
        template: Prompt.
        folder: Holds the folders.
        name_of: Class name of a folder; None takes `classnames.txt` in `folder`, or the folders' own names.

    Raises:
        DataError: If there is no such folder, it holds no images, or a class has no name.
    """
    if not is_folder(folder):
        raise DataError(f"folder {short(folder)} is not there", fix="check the path")
    name_of = name_of or _names_beside(folder)
    keys = _class_folders(folder)
    found = [sorted(_images_below(folder / key)) for key in keys]
    if not any(found):
        raise DataError(f"folder {short(folder)} has no folders of images", fix="one folder per class, images inside")
    return FolderSet(
        name=name,
        labels=tuple(_spaced(name_of(key)) for key in keys),
        template=template,
        files=tuple(file for files in found for file in files),
        targets=tuple(target for target, files in enumerate(found) for _ in files),
    )


def _class_folders(folder: Path) -> list[str]:
    return [name for name in names_in(folder) if not name.startswith(".") and is_folder(folder / name)]


def _images_below(folder: Path) -> list[str]:
    return [
        os.path.join(place, name)
        for place, _, names in walked(folder)
        for name in names
        if name.lower().endswith(_IMAGE_SUFFIXES)
    ]


# --- torchvision --------------------------------------------------------------------------------------------------------


def _torchvision_set(spec: PublishedSet, root: Path, folder: Path) -> ZeroShotSet:
    sets = imported("torchvision.datasets", "torchvision is not installed", fix="install the extra [build]")
    kind = getattr(sets, spec.torchvision)
    try:
        parts = tuple(kind(str(root), **arguments) for arguments in spec.arguments)
        parts[0][0]  # some sets import what they need only here
    except ImportError as error:
        raise PrerequisiteError(f"set {spec.name}: {error}", fix="install the extra [build]") from error
    except Exception as error:  # torchvision, scipy and the unpickler raise many kinds for a set that is not whole
        if is_of_machine(error):
            raise unreadable(f"folder {short(folder)}", error, fix="") from error
        if "scipy" in str(error).lower():
            raise PrerequisiteError("scipy is not installed", fix="install the extra [build]") from error
        # What torchvision says for a missing file is to download the set, which is not done here.
        reason = (
            "files are missing or changed" if isinstance(error, RuntimeError) else str(error) or type(error).__name__
        )
        raise DataError(
            f"folder {short(folder)} is not {spec.name}: {reason}", fix="see docs/reference/zero-shot.md"
        ) from error
    keys = [_classes(part) for part in parts]
    if any(other != keys[0] for other in keys):
        raise DataError(f"folder {short(folder)}: its parts have different classes", fix="restore the set")
    name_of = _names_beside(folder, spec.class_name)
    return TorchvisionSet(
        name=spec.name,
        labels=tuple(_spaced(name_of(key)) for key in keys[0]),
        template=spec.template,
        parts=parts,
        starts=(0, *accumulate(len(part) for part in parts[:-1])),
    )


def _classes(part: Any) -> list[str]:
    """Class names of a set; Caltech calls them categories."""
    return [str(name) for name in (part.classes if hasattr(part, "classes") else part.categories)]


# --- UCF101 -------------------------------------------------------------------------------------------------------------


def _ucf101(spec: PublishedSet, folder: Path) -> ZeroShotSet:
    """Middle frames as images, and the three published test lists."""
    frames = next((folder / name for name in _FRAME_FOLDERS if is_folder(folder / name)), None)
    if frames is None:
        raise PrerequisiteError(
            f"folder {short(folder / _FRAME_FOLDERS[0])} is not there", fix="see docs/reference/zero-shot.md"
        )
    videos: list[str] = []
    for number in (1, 2, 3):
        file = folder / "ucfTrainTestlist" / f"testlist0{number}.txt"
        if not is_file(file):
            raise PrerequisiteError(f"file {short(file)} is not there", fix="see docs/reference/zero-shot.md")
        videos += [line.split()[0] for line in file.read_text("utf-8").splitlines() if line.strip()]
    there = {_squeezed(name): str(frames / name) for name in names_in(frames) if is_folder(frames / name)}
    keys = sorted({video.split("/")[0] for video in videos})
    absent = next((key for key in keys if _squeezed(key) not in there), "")
    if absent or not keys:
        raise DataError(f"folder {short(frames)} has no folder for class {absent}", fix="take every class's frames")
    row, name_of = {key: number for number, key in enumerate(keys)}, _names_beside(folder)
    return FolderSet(
        name=spec.name,
        labels=tuple(_spaced(name_of(key)) for key in keys),
        template=spec.template,
        files=tuple(f"{there[_squeezed(v.split('/')[0])]}/{Path(v).stem}.jpg" for v in videos),
        targets=tuple(row[v.split("/")[0]] for v in videos),
    )


def _squeezed(name: str) -> str:
    """Frames of one class are in `ApplyEyeMakeup` or in `Apply_Eye_Makeup`."""
    return name.replace("_", "").lower()


# --- class names --------------------------------------------------------------------------------------------------------


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _names_beside(folder: Path, otherwise: NameOf = str) -> NameOf:
    """Names of a folder's `classnames.txt`, or what is usual for the set."""
    file = folder / NAMES_FILE
    return _looked_up(file, _names_in(file)) if is_file(file) else otherwise


def _looked_up(file: Path, names: dict[str, str]) -> NameOf:
    def name_of(key: str) -> str:
        if key not in names:
            raise DataError(f"{short(file)} has no name for class {key}", fix="give every class a line")
        return names[key]

    return name_of


def _names_in(file: Path) -> dict[str, str]:
    """Lines of key and name, separated by a tab, or by the first space."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(short(file), error, fix="write it as UTF-8") from error
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        key, _, name = line.strip().partition("\t" if "\t" in line.strip() else " ")
        if key and (not name.strip() or key in names):
            raise DataError(f"{short(file)} line {number}: {line[:40]!r}", fix="write class and name, each class once")
        if key:
            names[key] = name.strip()
    return names


def _imagenet_names(folder: Path, home: Path) -> NameOf:
    """Name of a folder that is a WordNet id, or a number in their order; from the user's ImageNet metadata."""
    candidates = [folder / NAMES_FILE, *(home / name for name in _IMAGENET_NAMES)]
    file = next((path for path in candidates if is_file(path)), None)
    if file is None:
        raise PrerequisiteError(f"file {short(home / NAMES_FILE)} is not there", fix="see docs/reference/zero-shot.md")
    names = _names_of_synsets(file)
    numbers = [key for key in _class_folders(folder) if key.isdecimal()]
    if not numbers:
        return _looked_up(file, names)
    # Folder 7 is the id at 7 in order, counted from 0, whatever the folders' own order is: as text, 10 comes before 2.
    if sorted(map(int, numbers)) != list(range(len(names))):
        raise DataError(
            f"folder {short(folder)} has {len(numbers)} numbered classes and {short(file)} {len(names)} names",
            fix="take the whole set, and a file with the name of each class",
        )
    in_order = sorted(names)
    return _looked_up(file, {key: names[in_order[int(key)]] for key in numbers})


def _names_of_synsets(file: Path) -> dict[str, str]:
    """WordNet id to name; of several synonyms the first."""
    if file.name == NAMES_FILE:
        return _names_in(file)
    if file.name.endswith(".txt"):
        return {key: name.split(",")[0] for key, name in _names_in(file).items()}
    fix = f"write {NAMES_FILE} beside {short(file)}"
    sets = imported("torchvision.datasets.imagenet", "torchvision is not installed", fix=fix)
    try:
        return {str(key): str(names[0]) for key, names in sets.load_meta_file(file.parent)[0].items()}
    except Exception as error:  # torch raises many kinds for a broken file
        if is_of_machine(error):
            raise unreadable(short(file), error, fix="") from error
        raise DataError(f"{short(file)} cannot be read: {error}", fix="restore it") from error
