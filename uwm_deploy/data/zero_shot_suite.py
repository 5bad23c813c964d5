"""Which zero-shot sets were asked for, and which of them are here."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from uwm_deploy.data.source import ROOT_VARIABLE, LabelledImage, QuadrupleSource, ZeroShotSet
from uwm_deploy.data.zero_shot_readers import folder_set, published_set
from uwm_deploy.data.zero_shot_table import NAMES, PHOTO, PUBLISHED
from uwm_deploy.errors import InputError, PrerequisiteError, UnreadableError, UwmError
from uwm_deploy.records.files import digest_of_plain
from uwm_deploy.records.model import Digest

DEMO_SETS = ("shape", "colour", "background")
"""The drawn world's sets."""

FOLDER_PREFIX = "imagefolder:"
"""`imagefolder:PATH` or `imagefolder:PATH::TEMPLATE` is any folder with one folder of images per class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """The zero-shot sets that were asked for.

    Attributes:
        sets: Those that are here.
        missing: Name of each other one to the reason why it cannot run.
    """

    sets: Mapping[str, ZeroShotSet]
    missing: Mapping[str, str]


def zero_shot_root(data: Path | None = None) -> Path | None:
    """Folder of the sets: the one that is given, or `zero-shot` in `$UWM_DEPLOY_DATA`; None when neither is said."""
    value = os.environ.get(ROOT_VARIABLE, "")
    return data or (Path(value) / "zero-shot" if value else None)


def names_from(texts: Sequence[str]) -> tuple[str, ...]:
    """Set names of the command line: separated by commas; `all` is the paper's 17, `none` is none, a folder stands alone.

    Raises:
        InputError: For an unknown name.
    """
    found: list[str] = []
    for text in texts:
        for name in [text] if text.startswith(FOLDER_PREFIX) else re.split(r",\s*", text.strip()):
            found += NAMES if name == "all" else [] if name == "none" else [name]
    for name in found:
        _check(name)
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class SomeItems:
    """Evenly spaced items of a set, every class in its share where the set is sorted by class.

    Attributes:
        whole: The set.
        count: How many items; fewer than it has.
    """

    whole: ZeroShotSet
    count: int

    @property
    def name(self) -> str:
        """See `ZeroShotSet.name`."""
        return self.whole.name

    @property
    def labels(self) -> tuple[str, ...]:
        """See `ZeroShotSet.labels`."""
        return self.whole.labels

    @property
    def template(self) -> str:
        """See `ZeroShotSet.template`."""
        return self.whole.template

    def __len__(self) -> int:
        """See `ZeroShotSet.__len__`."""
        return self.count

    def read(self, index: int) -> LabelledImage:
        """See `ZeroShotSet.read`."""
        return self.whole.read(index * len(self.whole) // self.count)


def open_suite(
    names: Sequence[str],
    *,
    data: Path | None = None,
    base: Path | None = None,
    demo_split: str = "test",
    limit: int = 0,
) -> Suite:
    """Opens every set that is here, and says why the others are not.

    Args:
        names: Of the paper's sets, `DEMO_SETS`, or image folders.
        data: Folder of the sets; None takes `$UWM_DEPLOY_DATA/zero-shot`.
        base: Folder that relative image folders start from.
        demo_split: Which images of the drawn world.
        limit: Largest number of items of each set; 0 takes all.

    Raises:
        InputError: For an unknown name, or two image folders of one name.
        UwmError: For an image folder that cannot be used: a path is the user's own input, not a set that may be absent.
    """
    sets: dict[str, ZeroShotSet] = {}
    missing: dict[str, str] = {}
    for text in dict.fromkeys(names):
        _check(text)
        name = _public_name(text)
        if name in sets or name in missing:
            raise InputError(f"two zero-shot sets are called {name}", fix="rename one of the folders")
        try:
            whole = _open(text, zero_shot_root(data), base or Path(), demo_split)
            sets[name] = SomeItems(whole, limit) if 0 < limit < len(whole) else whole
        except UwmError as error:
            if text.startswith(FOLDER_PREFIX) or isinstance(error, UnreadableError):
                raise
            missing[name] = error.what
    return Suite(sets=sets, missing=missing)


def fingerprint_of(part: ZeroShotSet) -> list[object]:
    """Plain data that changes when the prompts or the number of items change; image bytes are not read."""
    return [part.name, part.template, list(part.labels), len(part)]


def zero_shot_digests(source: QuadrupleSource) -> dict[str, Digest]:
    """Digest of the prompts and labels of every zero-shot set that a source has, by name."""
    return {name: digest_of_plain(fingerprint_of(source.zero_shot(name))) for name in source.zero_shot_names}


def _check(name: str) -> None:
    known = (*NAMES, *DEMO_SETS)
    if name.startswith(FOLDER_PREFIX):
        _folder_and_template(name)
    elif name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
        raise InputError(
            f"no zero-shot set is named {name!r}", fix=f"nearest: {', '.join(near)}; or imagefolder:PATH::TEMPLATE"
        )


def _public_name(text: str) -> str:
    """Name in reports; where a user's folder is, is nobody's business."""
    return f"{FOLDER_PREFIX}{_folder_and_template(text)[0].name}" if text.startswith(FOLDER_PREFIX) else text


def _folder_and_template(text: str) -> tuple[Path, str]:
    path, _, template = text.removeprefix(FOLDER_PREFIX).partition("::")
    template = template or PHOTO
    if not path:
        raise InputError(f"zero-shot set {text!r} names no folder", fix="write imagefolder:PATH::TEMPLATE")
    if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
        raise InputError(f"zero-shot template {template!r}", fix="hold {} once, for the class name")
    return Path(path), template


def _open(text: str, root: Path | None, base: Path, demo_split: str) -> ZeroShotSet:
    if text in DEMO_SETS:
        from uwm_deploy.data.demo.labelled import demo_zero_shot

        return demo_zero_shot(text, demo_split)
    if text.startswith(FOLDER_PREFIX):
        path, template = _folder_and_template(text)
        return folder_set(_public_name(text), template, base / path)
    if root is None:
        raise PrerequisiteError(
            f"no folder of zero-shot sets: {ROOT_VARIABLE} is not set and no --data is given",
            fix="see docs/reference/zero-shot.md",
        )
    return published_set(next(part for part in PUBLISHED if part.name == text), root)
