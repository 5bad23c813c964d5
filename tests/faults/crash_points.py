"""Kills a command before each of its file operations, or lets the operation fail; a program, since audit hooks stay.

Reads jobs as JSON from standard input and writes what it found as JSON. The process imports everything once and then forks
for every run, so that a run costs what the command itself costs. `every_point.py` takes all operations of a command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from tests.faults.trees import Trees, digest_of

FAULTS = ("EIO", "EMFILE", "ENOSPC", "EFBIG", "ENOMEM")
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_armed: Callable[[str], None] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    """Calls what is armed before each operation that changes something on the disk."""
    if _armed is None:
        return
    if event in _CHANGES or event == "fcntl.flock":
        _armed(f"{event} {arguments[0]}")
    elif event == "open" and isinstance(arguments[2], int):
        _armed(f"{'open' if arguments[2] & _WRITES else 'read'} {arguments[0]}")
    elif event in ("os.listdir", "os.scandir"):
        _armed(f"read {arguments[0]}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One command on copies of the same folder.

    Attributes:
        name: For the table.
        template: What the folder holds at the beginning.
        folder: Where the command finds it; made anew for every kill.
        words: The command line, or the name of one of the functions below and what it is given.
        shown: The bundle that must open after every kill, or a folder that must be as before or as after.
        every: Kill before each n-th operation only.
        ends: Its exit code.
        rows: How many are embedded in the end.
        most: At most so many kills.
        faults: Operations fail with these errors in turn instead of a kill, and what is read counts as an operation too.
        without_exchange: The file system cannot exchange two names.
        whole: Every operation, and each of the errors in each, as `every_point.py` does it.
    """

    name: str
    template: str
    folder: str
    words: list[str]
    shown: str
    every: int = 1
    most: int = 0
    ends: int = 0
    rows: int = 0
    faults: bool = False
    without_exchange: bool = False
    whole: bool = False


def main() -> None:
    """Runs the jobs."""
    jobs = [Job(**job) for job in json.load(sys.stdin)]
    _import_all(jobs)
    sys.addaudithook(_hook)
    found = [_every_point(job) if job.whole else ran(job) for job in jobs]
    json.dump(found, sys.stdout)


def _import_all(jobs: list[Job]) -> None:
    """Modules of the commands, so that no kill falls into an import."""
    names = ["commands.ship", "pipeline.accept", "bundle.sign", "serve.embed.migrate"]
    if any(job.words[0] in COMMANDS for job in jobs):
        names += [
            "commands.baseline", "commands.build", "commands.embed", "commands.migrate", "commands.prove", "commands.triton",
            "pipeline.attest", "pipeline.refit", "pipeline.run", "runtime.encoder", "serve.embed.job", "serve.repository",
            "stages.package", "stages.export", "stages.compile", "stages.verify.make", "stages.score.score",
            "stages.canaries", "report.tables.verdict_lines", "report.tables.refitted", "towers.hf_clip",
        ]  # fmt: skip
        importlib.import_module("pyarrow.parquet")
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"uwm_deploy.{name}")
    importlib.import_module("tests.unit.test_migrate")
    if any(job.words[0] == "build" for job in jobs):
        closure = importlib.import_module("uwm_deploy.pipeline.closure")
        closure.sources_of("uwm_deploy.pipeline.run")  # read once for all runs


COMMANDS = ("baseline", "attest", "refit", "build", "embed", "triton")


def _every_point(job: Job) -> dict[str, Any]:
    from tests.faults.every_point import every_point

    return every_point(job)


def ran(job: Job) -> dict[str, Any]:
    """A kill before some operations, or a fault: what was there then, and what the same command did about it."""
    trees = trees_of(job)
    wanted = undisturbed(job)
    operations = wanted.operations
    found: dict[str, Any] = row_of(job, wanted)
    chosen = range(0, len(operations), job.every)
    if job.most and len(chosen) > job.most:
        chosen = range(0, len(operations), -(-len(operations) // job.most))
    for number, place in enumerate(chosen):
        begin(job)
        fault = FAULTS[number % len(FAULTS)] if job.faults else ""
        stop = Stop(trees, place, fault)
        stopped = run(job, stop)
        if job.faults and (wrong := unclear(stopped.code, stopped.said, job.ends)):
            found["wrong"].append([operations[place], f"{fault}: {wrong}"])
        assert job.faults or stopped.code == -signal.SIGKILL, (job.name, place, stopped)
        if not job.faults and stopped.found != digest_of(trees.now()):
            found["wrong"].append([operations[place], "SIGKILL left another tree than there was"])
        state, wrongs = judged(job, wanted, ended=stopped.code == job.ends)
        found["new" if state == wanted.after else "old"] += 1
        found["wrong"] += [[operations[place], wrong] for wrong in wrongs]
    found["stopped"] = len(chosen)
    return found


def row_of(job: Job, wanted: Wanted) -> dict[str, Any]:
    """What is told of a job; nothing was stopped yet."""
    return {
        "name": job.name, "code": wanted.code, "ends": job.ends, "operations": wanted.operations, "output": wanted.said,
        "old": 0, "new": 0, "wrong": [],
    }  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What is in a folder.

    Attributes:
        state: What a reader finds.
        content: Digest of the bytes that are the same in every run.
        names: Of all files and folders.
    """

    state: str
    content: str
    names: list[str]


def left_by(job: Job) -> Left:
    """What a run left."""
    return Left(state=_state(job), content=_steady(job), names=_names(job))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What an undisturbed run does, and what is there before and after it.

    Attributes:
        before: What a reader finds.
        after: The same.
        left: Of the whole folder.
        again: Exit code of the same command where it did its work already.
        code: Exit code.
        operations: What it did.
        said: Its output.
    """

    before: str
    after: str
    left: Left
    again: int
    code: int
    operations: list[str]
    said: str


def undisturbed(job: Job) -> Wanted:
    """Runs the command, and nothing happens to it."""
    begin(job)
    before = _state(job)
    done = run(job)
    left = left_by(job)
    again = run(job).code
    return Wanted(
        before=before,
        after=left.state,
        left=left,
        again=again,
        code=done.code,
        operations=done.operations,
        said=done.said,
    )


def judged(job: Job, wanted: Wanted, watch: Watch | None = None, *, ended: bool = False) -> tuple[str, list[str]]:
    """What is in the folder now, and what is wrong with it or with the same command in it.

    Args:
        job: The command.
        wanted: What an undisturbed run gives.
        watch: Of the run; what it found counts if it ended the run with `JOINED`.
        ended: The run that left this said that it did its work, so the same command may find nothing to do.
    """
    wrong = []
    state = _state(job)
    if state not in (wanted.before, wanted.after) and not (job.rows and state.endswith("rows")):
        wrong.append(f"neither old nor new: {state}")
    again = run(job, watch)
    if again.code == JOINED:
        return state, wrong
    if again.code != wanted.code and not (ended and state == wanted.after and again.code == wanted.again):
        wrong.append(f"exit code {again.code} afterwards: {again.said[-300:]}")
    left = left_by(job)
    if (left.state, left.content) != (wanted.after, wanted.left.content):
        wrong.append("the same command gave something else afterwards")
    if left.names != wanted.left.names:
        wrong.append(f"left: {sorted(set(left.names) ^ set(wanted.left.names))}")
    if watch is not None and not wrong:
        watch.ended_well(again.found)
    return state, wrong


JOINED = 77
"""Exit code of a run that stands where another stood that ended well."""


def trees_of(job: Job) -> Trees:
    """States of its folder."""
    return Trees(Path(job.folder), Path(job.folder).with_name("contents"))


def begin(job: Job) -> None:
    """The folder as it is at the beginning; of bundles only those that the command names."""
    shutil.rmtree(job.folder, ignore_errors=True)
    Path(job.folder).mkdir(parents=True)
    for path in Path(job.template).iterdir():
        if not path.is_dir():
            shutil.copy2(path, job.folder)
        elif path.name in {*job.words, job.shown.partition("/")[0]}:
            shutil.copytree(path, Path(job.folder) / path.name, symlinks=True)


class Watch(Protocol):
    """Is asked before each operation of a run, in its process."""

    def __call__(self, number: int, operation: str, name: str) -> None:
        """May end the process or raise an error.

        Args:
            number: Of the operation.
            operation: What it does, without what differs from run to run.
            name: What it does it to.
        """

    def told(self) -> Any:
        """What it found, for the process that started the run."""

    def ended_well(self, found: Any) -> None:
        """Hears, in that process, of a run after which everything was as it should be."""


@dataclasses.dataclass(slots=True)
class Stop:
    """Kills the process before one operation, or lets it fail."""

    trees: Trees
    at: int
    fault: str
    found: str = ""

    def __call__(self, number: int, operation: str, name: str) -> None:
        if number != self.at:
            return
        if self.fault:
            raise fault_of(self.fault, name)
        tell([[], "", digest_of(self.trees.now())])
        os.kill(os.getpid(), signal.SIGKILL)

    def told(self) -> None:
        """Nothing: the process did not stop."""

    def ended_well(self, found: Any) -> None:
        """Nothing to remember."""


def fault_of(fault: str, name: str) -> OSError:
    """The error that the system would raise."""
    number = getattr(errno, fault)
    return OSError(number, os.strerror(number), name)


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """A run in a process of its own.

    Attributes:
        code: Exit code or signal.
        operations: What it did.
        said: Its output.
        found: What the watch found.
    """

    code: int
    operations: list[str]
    said: str
    found: Any


_pipe = -1
"""Where a forked process tells what it did."""

_here = -1
"""The process whose operations count, not those that it starts."""

_watch: Watch | None = None
"""Who is asked before its operations."""


def tell(what: list[Any]) -> None:
    """Tells it to the process that started this one."""
    with os.fdopen(_pipe, "w") as stream:
        json.dump(what, stream)


def run(job: Job, watch: Watch | None = None) -> Done:
    """Runs the command in a forked process."""

    def command(operations: list[str]) -> int:
        return _called(job, operations)

    return forked(command, watch)


def forked(command: Callable[[list[str]], int], watch: Watch | None) -> Done:
    """Runs a function in a forked process; it returns its exit code and lists its operations."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        go_on(watch, writing)
        said = io.StringIO()
        operations: list[str] = []
        code = 99
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = command(operations)
        except BaseException as error:
            said.write(repr(error))
        tell([operations, said.getvalue()[-4000:], _watch.told() if _watch else None])
        os._exit(code)
    os.close(writing)
    return heard(pid, reading)


def heard(pid: int, reading: int) -> Done:
    """Waits for a forked process, and for what it tells."""
    with os.fdopen(reading) as stream:
        text = stream.read()
    _, status = os.waitpid(pid, 0)
    return Done(os.waitstatus_to_exitcode(status), *(json.loads(text) if text else ([], "", None)))


def arm(hook: Callable[[str], None] | None) -> None:
    """Calls this before each operation from now on."""
    global _armed
    _armed = hook


def go_on(watch: Watch | None, pipe: int) -> None:
    """A copy of a process is watched by another, and tells what it does through a pipe of its own."""
    global _here, _pipe, _watch
    _here, _pipe, _watch = os.getpid(), pipe, watch


def unclear(code: int, told: str, ends: int) -> str:
    """What is wrong with how a fault was told: it is one line and exit code 6, if anything failed at all."""
    errors = [line for line in told.splitlines() if line.startswith(("error:", "internal error:"))]
    if code == ends and not errors:
        return ""  # it was of no consequence: what comes out is compared next
    if code != 6 or len(errors) != 1 or "Traceback" in told:
        return f"exit code {code}: {told[-300:]}"
    return ""


def _called(job: Job, operations: list[str]) -> int:
    from uwm_deploy.commands.failure import say
    from uwm_deploy.records import replacing

    if job.without_exchange:
        replacing._RENAME_EXCHANGE = 1 << 20  # a flag that no file system knows

    def before(operation: str) -> None:
        reads, name = operation.startswith("read "), operation.partition(" ")[2]
        if (
            os.getpid() != _here
            or (reads and not job.faults)
            or (os.path.isabs(name) and not name.startswith(job.folder))
        ):
            return
        operations.append(operation.replace(job.folder, "").replace(str(_here), "PID"))
        if _watch is not None:
            arm(None)  # it looks at files itself
            try:
                _watch(len(operations) - 1, operations[-1], name)
            finally:
                arm(before)

    os.chdir(job.folder)
    arm(before)
    try:
        if function := _FUNCTIONS.get(job.words[0]):
            try:
                function(*map(Path, job.words[1:]))
            except Exception as error:
                return say(error, as_json=False)
            return 0
        from uwm_deploy.cli import cli

        cli.main(args=job.words, prog_name="uwm-deploy")
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        arm(None)
    return 0


def _migrate_store(stored: Path, out: Path) -> None:
    from tests.unit.test_migrate import _run as migrate

    migrate(stored, out, chunk=4)


def _accept(bundle: Path, at: Path) -> None:
    """What `baseline set` does with a report that passes, for one that does not."""
    from uwm_deploy.bundle.open import is_bundle, open_bundle
    from uwm_deploy.bundle.write import rewriting
    from uwm_deploy.pipeline.baseline import accepted, write_baseline, write_baseline_into
    from uwm_deploy.pipeline.judge import report_of_bundle

    opened = open_bundle(bundle, allow_failed=True)
    baseline = accepted(report_of_bundle(opened)[0], opened.manifest.verdict, by="jo", reason="1.0")
    if not is_bundle(at):
        write_baseline(at, baseline)
        return
    with rewriting(at) as place:
        write_baseline_into(place, open_bundle(place.path, allow_failed=True), baseline, sign=None)


_FUNCTIONS: dict[str, Callable[..., None]] = {"migrate-store": _migrate_store, "accept": _accept}


def _state(job: Job) -> str:
    """What a reader finds: the bundle's content but for what differs in every run, or that of a plain folder."""
    from uwm_deploy.bundle.layout import BundleLayout
    from uwm_deploy.bundle.open import open_bundle
    from uwm_deploy.errors import UwmError

    shown = Path(job.folder) / job.shown
    if not shown.exists() and not list(shown.parent.glob(".tmp-*/old")):
        return "absent"
    if parts := sorted(shown.glob("part-*.parquet")):
        from pyarrow import parquet

        keys = [key for part in parts for key in parquet.read_table(part)["key"].to_pylist()]
        return "whole" if sorted(set(keys)) == sorted(keys) and len(keys) == job.rows else f"{len(keys)} rows"
    if shown.is_file():
        return _digest([(shown, shown.parent)])
    if shown.is_dir() and not (shown / BundleLayout.MANIFEST).exists() and not list(shown.parent.glob(".tmp-*/old")):
        return _digest((path, shown) for path in _files(shown)) if any(_files(shown)) else "absent"
    try:
        bundle = open_bundle(shown, allow_failed=True)
    except UwmError as error:
        return f"lost: {error}"
    signed = bundle.signature is not None
    return (
        f"{bundle.manifest.edit.edited_weights_digest} {bundle.manifest.verdict} {len(bundle.manifest.files)} {signed}"
    )


def _steady(job: Job) -> str:
    """Content of all files but those with times, durations or random numbers in them."""
    changing = (
        "manifest.json", "statement.json", "bom.cdx.json", "model.sig", ".lock", "stage.json", "score.json", "edit.json",
        "verify.json", "verdict.json", "README.md", "bundle.json",
    )  # fmt: skip
    root = Path(job.folder)
    return _digest(
        (p, root)
        for p in _files(root)
        if p.name not in changing
        and not p.name.endswith((".result.json", ".log"))
        and "compile" not in str(p)
        and p.suffix != ".parquet"
    )


def _names(job: Job) -> list[str]:
    """Every file and folder, whatever it is called."""
    root = Path(job.folder)
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.name.startswith("part-"))


def _files(folder: Path) -> Iterable[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock" and not p.name.startswith(".tmp-"))


def _digest(files: Iterable[tuple[Path, Path]]) -> str:
    from uwm_deploy.records.files import digest_of_file, digest_of_plain

    return digest_of_plain({str(path.relative_to(root)): digest_of_file(path) for path, root in files})


if __name__ == "__main__":
    importlib.import_module("tests.faults.crash_points").main()  # as the module that `every_point` imports
