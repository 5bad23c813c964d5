"""WebDataset shards as files: which ones a name stands for, and what they hold, checked to their last byte."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from uwm_deploy.errors import DataError, MissingFileError, is_of_machine, unreadable
from uwm_deploy.records.plain_json import reason_of

_MOST_SHARDS = 100_000
_LONGEST_NAME = 4096
_MOST_CHARACTERS = 20_000_000
"""Of all names together."""

_BLOCK = 512
_LARGEST_HEADER = 1 << 20
"""Bytes of a header that goes on behind its block, such as a long name; it is read into memory."""

_EXTENDED = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


def expanded(name: str) -> list[str]:
    """Every name that brace ranges (``{000..009}``) and choices (``{a,b}``) stand for.

    Raises:
        DataError: If they stand for too many, or for too long ones.
    """
    if len(name) > _LONGEST_NAME:
        raise DataError(f"shards {name[:40]!r} has {len(name)} characters", fix=f"write at most {_LONGEST_NAME}")
    names, whole = [name], False
    while not whole:
        before, names, characters = names, [], 0
        for one in before:
            part = _once_expanded(one, name)
            characters += sum(map(len, part))
            names += part
            if len(names) > _MOST_SHARDS or characters > _MOST_CHARACTERS:
                raise DataError(f"shards {name!r} stands for too many names", fix=f"name at most {_MOST_SHARDS}")
        whole = names == before
    return names


def _once_expanded(text: str, name: str) -> list[str]:
    """The names that the first innermost braces stand for; the text itself where there are none."""
    found = _RANGE.search(text) or _CHOICE.search(text)
    if found is None:
        return [text]
    if found.re is _RANGE:
        first, last = int(found[1]), int(found[2])
        if not 0 <= last - first < _MOST_SHARDS:
            raise DataError(f"shards {name!r} is a range of {last - first + 1} names", fix="write it as {first..last}")
        values = [f"{number:0{len(found[1])}d}" for number in range(first, last + 1)]
    else:
        values = found[1].split(",")
    return [text[: found.start()] + value + text[found.end() :] for value in values]


class _Header(tarfile.TarInfo):
    """A header whose size can be."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """See `tarfile.TarInfo`.

        Args:
            buf: The block.
            encoding: Of names.
            errors: What becomes of names that are not in it.

        Raises:
            ReadError: If its size is negative, or it goes on for too long.
        """
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENDED and header.size > _LARGEST_HEADER):
            raise tarfile.ReadError(f"a header claims {header.size} bytes")
        return header


def members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Headers of all members but folders, in order; contents are not read.

    Raises:
        DataError: If the shard is missing, broken, cut off or compressed; perhaps after some members.
    """
    try:
        with tarfile.open(path, "r:", tarinfo=_Header) as archive:
            whole = path.stat().st_size
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep every header
                if member.size < 0 or (member.isreg() and member.size > whole - member.offset_data):
                    raise DataError(
                        f"shard {path}: {member.name!r} claims {member.size} bytes, more than there are",
                        fix="write it again",
                    )
                if not member.isdir():
                    yield member
            end = archive.offset
        with path.open("rb") as stream:
            stream.seek(end)
            if stream.read(_BLOCK) != bytes(_BLOCK):  # tarfile takes a broken header for the end
                raise DataError(f"shard {path} is broken or cut off at byte {end}", fix="write it again")
            while rest := stream.read(1 << 20):  # a second archive behind the first would be passed over in silence
                if rest.count(0) != len(rest):
                    raise DataError(
                        f"shard {path} goes on after its end at byte {end}",
                        fix="keep joined shards as files of their own",
                    )
    except FileNotFoundError as error:
        raise MissingFileError(f"shard {path} does not exist", fix="check `shards` and `folder`") from error
    except (tarfile.TarError, OSError, ValueError, EOFError, MemoryError, ArithmeticError, RecursionError) as error:
        if is_of_machine(error):
            raise unreadable(f"shard {path}", error, fix="") from error
        raise DataError(
            f"shard {path} is no whole tar file: {reason_of(error)}", fix="write it again, without compression"
        ) from error


def key_and_ending(name: str) -> tuple[str, str]:
    """Of a member; a key is a path up to the first dot of its last part, and empty where a member has none."""
    folder, _, last = name.removeprefix("./").rpartition("/")
    key, _, ending = last.partition(".")
    if not key:
        return "", ending.lower()
    return (f"{folder}/{key}" if folder else key), ending.lower()
