"""Prints what a command found, as text or with `--json` as data, and ends the process with its exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from uwm_deploy.commands.failure import say, silence_output
from uwm_deploy.commands.help_width import within_80_columns
from uwm_deploy.commands.printed import print_text
from uwm_deploy.data.ranks import StoppedError
from uwm_deploy.errors import UwmError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a command says, and the exit code it ends with.

    Attributes:
        data: For `--json`: a record, or plain data; None prints nothing.
        text: The same for people: a line, several lines, or what prints it on standard output. A line break inside a line is
            shown as a character, so no value begins a line of its own. A line that is too long goes on further in.
        notes: Lines after either; beside data they go to standard error, so that the data is all of standard output.
        code: Exit code.
    """

    data: Any = None
    text: str | Sequence[str] | Callable[[], None] = ""
    notes: tuple[str, ...] = ()
    code: int = 0


def prints(command: Callable[..., Shown]) -> Callable[..., NoReturn]:
    """`--json`, `--quiet` and `--debug`: prints the result of a command, or why there is none."""

    @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
    @click.option("--quiet", is_flag=True, help="Show no progress; results and errors only.")
    @click.option("--debug", is_flag=True, help="Show tracebacks.")
    @functools.wraps(command)
    def printed(*, as_json: bool, quiet: bool, debug: bool, **asked: Any) -> NoReturn:
        try:
            with _progress(shown=not quiet), _no_line_per_item():
                shown = command(**asked)
            _print_while_read(shown, as_json)
        except KeyboardInterrupt as error:
            sys.exit(say(error, as_json=as_json))
        except Exception as error:
            if debug:
                traceback.print_exc()
            code = say(error, as_json=as_json)
            if isinstance(error, UwmError):
                _leave_group(in_order=isinstance(error, StoppedError))
            sys.exit(code)
        _leave_group(in_order=True)
        sys.exit(int(shown.code))

    printed.__doc__ = within_80_columns(printed.__doc__, margin=4)
    return printed


def _progress(*, shown: bool) -> contextlib.AbstractContextManager[None]:
    """Shows progress on standard error, or none of it."""
    if shown:
        return contextlib.nullcontext()
    from uwm_deploy.report.console import without_progress

    return without_progress()


@contextlib.contextmanager
def _no_line_per_item() -> Iterator[None]:
    """The runtime logs every item that fails, for services; a command says itself what failed."""
    log = logging.getLogger("uwm_deploy.runtime")

    def is_of_more(record: logging.LogRecord) -> bool:
        return getattr(record, "uwm", {}).get("event") != "item-failed"

    log.addFilter(is_of_more)
    try:
        yield
    finally:
        log.removeFilter(is_of_more)


def _print_while_read(shown: Shown, as_json: bool) -> None:
    """Prints until whoever reads has read enough; the exit code still says what was found."""
    try:
        _print(shown, as_json)
    except (BrokenPipeError, SystemExit):  # the second is how rich ends a process then
        silence_output()


def _print(shown: Shown, as_json: bool) -> None:
    if not as_json and callable(shown.text):
        shown.text()
    elif not as_json and not callable(shown.text):
        for line in [shown.text] if isinstance(shown.text, str) else shown.text:
            if line:
                print_text(line)
    elif as_json and shown.data is not None:
        click.echo(_json(shown.data), nl=False)
    for line in shown.notes:
        print_text(line, err=as_json)


def _json(data: Any) -> str:
    if dataclasses.is_dataclass(data):
        from uwm_deploy.records.codec import json_from_record

        return json_from_record(data)
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _leave_group(*, in_order: bool) -> None:
    """Ends the group of processes, if this process joined one."""
    if group := sys.modules.get("uwm_deploy.data.torchrun"):
        sys.stdout.flush()  # torchrun ends the others as soon as one has ended with an error
        group.leave(in_order=in_order)
