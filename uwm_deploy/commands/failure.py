"""What a command says when it fails: one line on standard error, and with `--json` an object on standard output."""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
import re
import sys
from dataclasses import dataclass
from typing import TextIO

import click

from uwm_deploy.commands.printed import print_text
from uwm_deploy.data.ranks import StoppedError, speaks
from uwm_deploy.errors import LONGEST_LINE, ExitCode, UwmError, is_of_machine, visible
from uwm_deploy.records.machine import failure_of_machine

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

_LONGEST = 300
"""Characters of an unexpected error's own message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a command ended without a result; docs/reference/cli.md documents the JSON.

    Attributes:
        kind: Name of the error's type; `UsageError`, `InternalError` or `Interrupted` where it is no `UwmError`.
        what: What is wrong, and where.
        fix: How to fix it; may be empty.
        exit_code: Of the process.
    """

    kind: str
    what: str
    fix: str
    exit_code: int


def failure_of(error: BaseException) -> Failure:
    """What to say about anything that a command, or click before it, has raised.

    A failure of the machine is said as such, whatever it was taken for on the way.
    """
    if isinstance(error, Exception) and not isinstance(error, StoppedError):
        error = failure_of_machine(error) or error
    if isinstance(error, UwmError):
        kind = error.kind if isinstance(error, StoppedError) else type(error).__name__
        return Failure(kind=kind, what=error.what, fix=error.fix, exit_code=int(error.exit_code))
    if isinstance(error, click.ClickException):
        what, fix = _as_ours(error)
        return Failure(kind="UsageError", what=visible(what, LONGEST_LINE), fix=fix, exit_code=error.exit_code)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        fix = "finished stages are kept, the next run resumes after them"
        return Failure(kind="Interrupted", what="interrupted", fix=fix, exit_code=INTERRUPTED)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("uwm_deploy"):
        what = f"this command needs the package {(error.name or str(error)).partition('.')[0]}, which is not installed"
        fix = "install the extra `build`: pip install '.[build]', or a wheel with [build] behind its name"
        return Failure(kind="PrerequisiteError", what=what, fix=fix, exit_code=int(ExitCode.ENVIRONMENT))
    line = visible(" ".join(str(error).split()), _LONGEST)
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):  # of a path from outside
        what = visible(f"{os.fsdecode(error.filename or '')} cannot be used: {error.strerror}", _LONGEST)
        return Failure(kind="InputError", what=what, fix="check the path", exit_code=int(ExitCode.BAD_INPUT))
    if isinstance(error, FileNotFoundError) and _is_homeless():
        what, fix = "the folder that this command was started in is not there any more", "change to another one"
        return Failure(kind="InputError", what=what, fix=fix, exit_code=int(ExitCode.BAD_INPUT))
    if is_of_machine(error):
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            line = visible(f"{os.fsdecode(error.filename)} cannot be read or written: {error.strerror}", _LONGEST)
        fix = "mend that on this machine, and run again; finished work is kept"
        return Failure(
            kind="PrerequisiteError", what=line or "not enough memory", fix=fix, exit_code=int(ExitCode.ENVIRONMENT)
        )
    return Failure(
        kind="InternalError",
        what=f"{type(error).__name__}: {line}",
        fix="run again with --debug and report it",
        exit_code=int(ExitCode.INTERNAL),
    )


def _is_homeless() -> bool:
    """Whether the working folder was removed: what is looked up from there is not found, by an error that names no file."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


_SAID = (
    (r"[.,]? ?\(?Did you mean (?:one of: )?.*", ""),
    (r"^[Nn]o such (command|option):? ", r"no \1 "),
    (r"is not a valid (?:integer|int)(?: range)?", "is not a whole number"),
    (r"is not a valid float(?: range)?", "is not a number"),
    (r"^[Gg]ot unexpected extra arguments? \((.*)\)", r"unexpected argument '\1'"),
    (r"^Option '(.*)' requires an argument", r"option '\1' has no value"),
)
"""What click says, and what every other error of this project would say."""


def _as_ours(error: click.ClickException) -> tuple[str, str]:
    """What click says, in the form of every other error: no capital, no full stop, the nearest names in the fix."""
    what = " ".join(error.format_message().split())
    for theirs, ours in _SAID:
        what = re.sub(theirs, ours, what)
    context = getattr(error, "ctx", None)
    near = _nearest(error, context)
    fixes = [f"nearest: {', '.join(near)}"] if near else []
    if isinstance(error, click.BadOptionUsage):
        fixes.append("write it behind the option")
    if context:
        fixes.append(f"see `{context.command_path} --help`")
    return what[:1].lower() + what[1:].removesuffix("."), "; ".join(fixes)


def _nearest(error: click.ClickException, context: click.Context | None) -> list[str]:
    """Commands or options with a name like the one that there is not."""
    if isinstance(error, click.NoSuchOption):
        return difflib.get_close_matches(error.option_name, error.possibilities or (), n=3, cutoff=0.4)
    name = re.match(r"No such command '(.*?)'", error.format_message())
    if name is None or context is None or not isinstance(context.command, click.Group):
        return []
    return difflib.get_close_matches(name[1], context.command.list_commands(context), n=3, cutoff=0.5)


def say(error: BaseException, *, as_json: bool) -> int:
    """Says why a command failed, once for a group of processes.

    Args:
        error: What was raised.
        as_json: The object goes to standard output, too.

    Returns:
        The exit code.
    """
    failure = failure_of(error)
    if isinstance(error, StoppedError) and not speaks():
        return failure.exit_code
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()  # the help, which a group without a command is asked for
    else:
        start = {"Interrupted": "", "InternalError": "internal error: "}.get(failure.kind, "error: ")
        said = f"{start}{failure.what}{'; ' if failure.fix else ''}{failure.fix}"
        _say_line(said)
    if as_json and speaks():
        try:
            click.echo(json_of(failure))
        except OSError:  # what failed may be the output itself
            silence_output()
    return failure.exit_code


def _say_line(said: str) -> None:
    """On standard error, if there is one; the exit code tells the kind of the failure in any case."""
    if sys.stderr is None:
        return
    try:
        if sys.stderr.isatty():
            print_text(said, err=True)
        else:
            click.echo(said, err=True)  # a log has each error in one line
    except OSError:
        _silence(sys.stderr)


def silence_output() -> None:
    """Nothing more is written to standard output: the rest of it would fail again when the process ends."""
    _silence(sys.stdout)


def _silence(stream: TextIO) -> None:
    with contextlib.suppress(OSError):  # where a test or a notebook has put something else in its place
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def json_of(failure: Failure) -> str:
    """The object for `--json`, with one key, `error`."""
    body = {"kind": failure.kind, "what": failure.what, "fix": failure.fix, "exit_code": failure.exit_code}
    return json.dumps({"error": body}, indent=1)
