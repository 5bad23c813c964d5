"""What a folder holds at one moment, to the last byte: kept, laid out again, and put back under a process that goes on."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

_SETTLED_NS = 50_000_000
"""A file that was changed so shortly before it was read may be changed again with the same time."""

_SMALL_BYTES = 1 << 16
"""Smaller files are read each time."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A file, folder or link.

    Attributes:
        kind: `file`, `folder`, `link`, or `number`: a file that holds the number by which the disk knows a folder.
        mode: Its permissions.
        content: Digest of a file, target of a link, or path of the folder whose number it is.
        mtime_ns: Time of its last change.
    """

    kind: str
    mode: int
    content: str
    mtime_ns: int


Tree = Mapping[str, Entry]


def digest_of(tree: Tree) -> str:
    """Digest of names, permissions and bytes, without times."""
    rows = sorted((name, entry.kind, entry.mode, entry.content) for name, entry in tree.items())
    return hashlib.sha256(repr(rows).encode()).hexdigest()


class Trees:
    """States of one folder.

    Args:
        root: The folder.
        store: Where contents are kept, by digest.
    """

    def __init__(self, root: Path, store: Path) -> None:
        self.root, self.store = root, store
        self._known: dict[tuple[int, ...], str] = {}
        store.mkdir(parents=True, exist_ok=True)

    def now(self) -> Tree:
        """What the folder holds."""
        found = dict(self._walk(str(self.root), ""))
        numbers = {at.st_ino: name for name, (_, at) in found.items()}
        return {name: self._entry(path, at, numbers) for name, (path, at) in found.items()}

    def lay_out(self, tree: Tree) -> None:
        """Makes the folder anew."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        self.put_back(tree)
        for name, entry in tree.items():
            if entry.kind == "file":  # nobody else has it yet
                self._remember((self.root / name).lstat(), entry.content)

    def put_back(self, tree: Tree) -> None:
        """Changes what differs, and leaves in place what does not."""
        there = self.now()
        for name in sorted(there, reverse=True):
            if name not in tree or tree[name].kind != there[name].kind:
                path = self.root / name
                path.rmdir() if there[name].kind == "folder" else path.unlink()
        for name in sorted(tree):
            before = there.get(name)
            if before is None or (before.kind, before.content) != (tree[name].kind, tree[name].content):
                self._make(name, tree[name])
        for name in (name for name in tree if tree[name].kind == "number"):
            folder = tree[name].content
            number = (self.root / folder).stat().st_ino if folder in tree else 1  # 1 is no folder's
            (self.root / name).write_text(str(number))
        for name in sorted(tree, reverse=True):
            _dress(self.root / name, tree[name])

    def numbers(self) -> dict[str, int]:
        """By which the disk knows each file and folder now."""
        return {name: at.st_ino for name, (_, at) in self._walk(str(self.root), "")}

    def stand_for(self, numbers: Mapping[str, int]) -> None:
        """What was put back counts as the file or folder that had its name, for a process that compares them.

        Args:
            numbers: As they were.
        """
        for name, number in self.numbers().items():
            if (before := numbers[name]) != number:
                _FIRST[number] = _FIRST.get(before, before)
        os.path.samestat = _is_same

    def _walk(self, path: str, below: str) -> Iterator[tuple[str, tuple[str, os.stat_result]]]:
        with os.scandir(path) as entries:
            for entry in list(entries):
                at = entry.stat(follow_symlinks=False)
                yield below + entry.name, (entry.path, at)
                if stat.S_ISDIR(at.st_mode):
                    yield from self._walk(entry.path, f"{below}{entry.name}/")

    def _entry(self, path: str, at: os.stat_result, numbers: Mapping[int, str]) -> Entry:
        mode, changed = stat.S_IMODE(at.st_mode), at.st_mtime_ns
        if stat.S_ISDIR(at.st_mode):
            return Entry("folder", mode, "", changed)
        if stat.S_ISLNK(at.st_mode):
            return Entry("link", mode, os.readlink(path), changed)
        if os.path.basename(path) == "replaces" and (text := Path(path).read_text()) not in ("", "0"):
            return Entry("number", mode, numbers.get(int(text), "-"), changed)
        return Entry("file", mode, self._kept(path, at), changed)

    def _kept(self, path: str, at: os.stat_result) -> str:
        if known := self._known.get(_key(at)):
            return known
        begun = time.time_ns()
        data = Path(path).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        kept = self.store / digest
        if not kept.exists():
            (made := kept.with_suffix(f".{os.getpid()}")).write_bytes(data)
            made.replace(kept)
        if begun - at.st_ctime_ns > _SETTLED_NS:
            self._remember(at, digest)
        return digest

    def _remember(self, at: os.stat_result, digest: str) -> None:
        if at.st_size > _SMALL_BYTES:
            self._known[_key(at)] = digest

    def _make(self, name: str, entry: Entry) -> None:
        path = self.root / name
        if entry.kind == "folder":
            path.mkdir()
        elif entry.kind == "link":
            path.unlink(missing_ok=True)
            path.symlink_to(entry.content)
        elif entry.kind == "file":
            path.write_bytes((self.store / entry.content).read_bytes())


_FIRST: dict[int, int] = {}
"""Number of a file that was put back, and of the first that had its name."""


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    numbers = [_FIRST.get(at.st_ino, at.st_ino) for at in (one, other)]
    return numbers[0] == numbers[1] and one.st_dev == other.st_dev


def _key(at: os.stat_result) -> tuple[int, ...]:
    return at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns


def _dress(path: Path, entry: Entry) -> None:
    at = path.lstat()
    if entry.kind != "link" and stat.S_IMODE(at.st_mode) != entry.mode:
        path.chmod(entry.mode)
    if at.st_mtime_ns != entry.mtime_ns:
        os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)


@dataclasses.dataclass(frozen=True, slots=True)
class OpenFile:
    """A descriptor of this process.

    Attributes:
        number: The descriptor.
        path: Of its file.
        flags: Which it was opened with.
        position: Where the next byte is read or written.
    """

    number: int
    path: str
    flags: int
    position: int


def open_files(root: Path) -> list[OpenFile]:
    """Those of this process below a folder."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # that of the listing
            continue
        if path.startswith(f"{root}/") and not path.endswith(" (deleted)"):
            told = dict(line.split(":\t", 1) for line in Path(f"/proc/self/fdinfo/{name}").read_text().splitlines()[:2])
            found.append(OpenFile(int(name), path, int(told["flags"], 8), int(told["pos"])))
    return found


def point_back(files: list[OpenFile], locks: set[int]) -> None:
    """Descriptors mean the files of these names again, after others wrote through copies of them or replaced the files.

    Args:
        files: As they were.
        locks: Descriptors that hold a lock.
    """
    for file in files:
        held = os.fstat(file.number)
        if held.st_ino != os.stat(file.path).st_ino:
            made = os.open(file.path, file.flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC))
            os.dup2(made, file.number, inheritable=False)
            os.close(made)
            if file.number in locks:
                fcntl.flock(file.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not stat.S_ISDIR(held.st_mode):
            os.lseek(file.number, file.position, os.SEEK_SET)
