"""Weights that processes share: packed once for this processor, kept in the user's cache, mapped by every process.

ONNX Runtime rearranges weights for its kernels as it opens a graph, in memory of the process. Here the graph is opened once,
and what was rearranged is written into a file. Every process maps that file, so its pages are in memory once.

An entry is used if its own record is of this engine, this processor and this ONNX Runtime, and its files have the digests
that the record gives. Anything else is made again from the bundle's checked bytes. ONNX Runtime looks for a rearranged
weight by a hash of its content: one that was rearranged for another processor is never found, and so never used.

A mapped file can be changed by who may write it. So the cache is the user's alone, and nobody else may write to it: who
has the user's account has the process, too.

A cache only saves memory and time. Where it fails, because its disk is full or it is deleted meanwhile, the process takes a
copy of its own: the same numbers. Only a folder that others could write to, or that is no folder, is an error.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from uwm_deploy.bundle.held import HeldFiles, ReplacedError
from uwm_deploy.errors import InputError, IntegrityError, PrerequisiteError, UwmError, first_line, is_of_machine
from uwm_deploy.records.cache_folder import VARIABLE, cache_folder
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.files import digest_of_plain
from uwm_deploy.records.graph import EngineArtifact
from uwm_deploy.records.locks import hold, release
from uwm_deploy.records.machine import disk_errors
from uwm_deploy.records.model import Digest
from uwm_deploy.records.replacing import remove, sync_folder
from uwm_deploy.runtime.cores import cores
from uwm_deploy.runtime.logs import event
from uwm_deploy.runtime.memory import give_back
from uwm_deploy.runtime.session import Contents, OnnxRuntimeSession, Session, open_engine, open_packed, pack

GRAPH, WEIGHTS, RECORD = "graph.onnx", "weights.bin", "entry.json"
"""Files of an entry."""

_FORMAT = 1
_PART_BYTES = 64 << 20
_ROOM = 2.2
"""Times the size of an engine: its weights as they are, and rearranged."""

_CPUS = Path("/proc/cpuinfo")
_TELLING = frozenset(
    ["vendor_id", "cpu family", "model", "model name", "stepping", "flags", "CPU implementer", "CPU architecture",
     "CPU variant", "CPU part", "CPU revision", "Features"]
)  # fmt: skip
"""What the system says of a processor that kernels are chosen by."""

Read = Callable[[], Contents]
"""Gives the checked bytes of an engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What an entry of the cache holds.

    Attributes:
        key: What the weights were rearranged for; see `key_of`.
        graph: Digest of the graph.
        weights: Digest of each part of the weights.
    """

    key: Mapping[str, str]
    graph: Digest
    weights: tuple[Digest, ...]


def key_of(engine: EngineArtifact, cpus: Path = _CPUS) -> dict[str, str]:
    """What rearranged weights depend on: the engine, the processor, and ONNX Runtime.

    Args:
        engine: A graph for ONNX Runtime.
        cpus: What the system says of its processors.
    """
    import onnxruntime as ort

    lines = cpus.read_text(errors="replace").splitlines() if cpus.is_file() else [platform.processor()]
    told = {line for line in lines if line.partition(":")[0].strip() in _TELLING}
    return {
        "format": str(_FORMAT),
        "engine": engine.digest,
        "onnxruntime": f"{ort.__version__} {ort.get_build_info()}",
        "processor": f"{platform.machine()} {digest_of_plain(sorted(told))}",
    }


@dataclass(frozen=True, slots=True)
class WeightCache:
    """Entries for the engines of bundles, one folder each.

    Attributes:
        folder: Of the cache; what is below it belongs to the user alone.
    """

    folder: Path = field(default_factory=lambda: cache_folder() / "weights")

    def open(self, engine: EngineArtifact, read: Read, *, threads: int = 0) -> Session:
        """Opens an engine with weights that other processes share; the first one to come makes the entry.

        Where the cache fails, the engine is opened with weights of its own, and a log line says why. So what is raised for
        want of something here is about the engine, never about the cache.

        Args:
            engine: A graph for ONNX Runtime that was optimised when it was compiled.
            read: Gives its checked bytes; called only if there is no entry, or it cannot be used.
            threads: Of ONNX Runtime; 0 leaves the number to it.

        Raises:
            InputError: If the folder cannot be written, or is not the user's alone.
            PrerequisiteError: If this machine cannot run the graph.
        """
        try:
            with disk_errors(self.folder):
                try:
                    return self._shared(engine, read, threads)
                except (FileNotFoundError, IntegrityError, ReplacedError):  # deleted or changed meanwhile
                    with contextlib.suppress(FileNotFoundError):
                        return self._shared(engine, read, threads)
            reason = f"{self.folder} was deleted while it was used"
        except (PrerequisiteError, IntegrityError, ReplacedError, OSError) as error:
            reason = first_line(error)
        event(logging.WARNING, "weights-not-shared", variant=engine.variant, tower=engine.tower, reason=reason)
        return open_engine(engine, *read(), device="cpu", threads=threads)

    def _shared(self, engine: EngineArtifact, read: Read, threads: int) -> OnnxRuntimeSession:
        key = key_of(engine)
        with _own_folder(self.folder) as base, _real_names(base, self.folder):
            place = _Place(base, digest_of_plain(key).partition(":")[2][:32], key)
            if (session := place.opened(engine, threads)) is not None:
                return session
            with place.alone():
                if (session := place.opened(engine, threads)) is not None:  # another process has made it meanwhile
                    return session
                place.make(engine, read)
                if (session := place.opened(engine, threads)) is not None:
                    return session
        raise IntegrityError(f"{self.folder} does not hold what was written to it", fix="check the disk")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one entry is, or will be.

    Attributes:
        base: Open folder of the cache.
        name: Of the entry.
        key: See `key_of`.
    """

    base: int
    name: str
    key: Mapping[str, str]

    def opened(self, engine: EngineArtifact, threads: int) -> OnnxRuntimeSession | None:
        """A session on the entry's files, if there is an entry, and it is whole."""
        try:
            descriptor = os.open(
                self.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.base
            )
        except OSError as error:
            if is_of_machine(error):
                raise
            return None
        try:
            held = HeldFiles(_inside(descriptor))
            before, graph = held.status(WEIGHTS), self._checked(held)
            if graph is None:
                return None
            session = open_packed(engine, graph, _inside(descriptor), threads=threads)
            give_back()
            now = os.stat(WEIGHTS, dir_fd=descriptor, follow_symlinks=False)
            if _changed(before, held.status(WEIGHTS)) or _changed(before, now):
                session.close()  # it may have mapped something else than what was checked
                return None
            return session
        except (IntegrityError, InputError, ReplacedError, FileNotFoundError):
            return None
        except PrerequisiteError:
            if set(os.listdir(descriptor)) >= {GRAPH, WEIGHTS, RECORD}:
                raise
            return None  # it was deleted meanwhile, which ONNX Runtime says in words of its own
        finally:
            os.close(descriptor)

    def _checked(self, held: HeldFiles) -> bytes | None:
        """The graph of an entry that is whole."""
        files, folders = held.listing()
        if folders - {"."} or set(files) != {GRAPH, WEIGHTS, RECORD}:
            return None
        entry = record_from_json(Entry, held.read(RECORD), where=RECORD)
        if dict(entry.key) != dict(self.key) or held.digest(GRAPH) != entry.graph:
            return None
        whole = held.digests(WEIGHTS, _PART_BYTES, cores()) == entry.weights
        return held.read(GRAPH) if whole else None

    def make(self, engine: EngineArtifact, read: Read) -> None:
        """Writes the entry; it appears whole or not at all."""
        name, target = f".tmp-{self.name}", _inside(self.base, self.name)
        temporary = _inside(self.base, name)
        remove(temporary)
        contents = read()
        size = len(contents[0]) + sum(map(len, contents[1].values()))
        if (free := shutil.disk_usage(_inside(self.base)).free) < _ROOM * size:
            raise PrerequisiteError(
                f"the cache needs {_ROOM * size / 2**20:.0f} MiB, and there are {free / 2**20:.0f}",
                fix=f"free space, or set ${VARIABLE} to another folder",
            )
        temporary.mkdir(mode=0o700)
        try:
            pack(engine, contents, temporary / GRAPH, WEIGHTS)
            del contents
            (temporary / WEIGHTS).touch()  # a graph of small weights has them all inside
            give_back()
            held = HeldFiles(temporary)
            entry = Entry(key=self.key, graph=held.digest(GRAPH), weights=held.digests(WEIGHTS, _PART_BYTES, cores()))
            (temporary / RECORD).write_text(json_from_record(entry))
            for path in temporary.iterdir():
                _made_durable(path)
            remove(target)
            temporary.rename(target)
            sync_folder(_inside(self.base))
        except BaseException as error:
            if isinstance(error, PrerequisiteError) and not temporary.is_dir():  # see `opened`
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(temporary)) from error
            remove(temporary)
            raise

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While no other process makes this entry."""
        lock = None
        while lock is None:
            lock = hold(_inside(self.base, f"{self.name}.lock"), "", "", wait=True)
        try:
            yield
        finally:
            release(lock)


@contextlib.contextmanager
def _own_folder(path: Path) -> Iterator[int]:
    """An open folder that nobody but the user may write to; it is made if there is none.

    Raises:
        InputError: If it is somebody else's, or others may write to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
            raise InputError(
                f"{path} is not this user's alone: what is mapped from it could be changed by others",
                fix=f"set ${VARIABLE} to a folder of your own, with mode 700",
            )
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _real_names(folder: int, path: Path) -> Iterator[None]:
    """Errors name what is in an open folder by the path that the user knows."""
    inside = f"{_inside(folder)}/"
    try:
        yield
    except UwmError as error:
        if inside not in error.what:
            raise
        raise type(error)(error.what.replace(inside, f"{path}/"), fix=error.fix) from error
    except OSError as error:
        if isinstance(error.filename, str):
            error.filename = error.filename.replace(inside, f"{path}/")
        raise


def _inside(folder: int, name: str = "") -> Path:
    """A path that leads into an open folder, whatever its own path leads to by now."""
    return Path(f"/proc/self/fd/{folder}", name)


def _changed(before: os.stat_result, after: os.stat_result) -> bool:
    names = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
    return any(getattr(before, name) != getattr(after, name) for name in names)


def _made_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fchmod(descriptor, 0o400)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
