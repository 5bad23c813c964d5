"""The one place where what a library raises while it loads a checkpoint becomes an error of ours."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from uwm_deploy.errors import InputError, PrerequisiteError, UwmError, is_of_machine
from uwm_deploy.runtime.memory import out_of_memory

MEND = "correct that entry, or fetch the checkpoint again"


@contextlib.contextmanager
def refusals(what: str, *, fix: str = MEND, entries: Callable[[], Mapping[str, Any]] | None = None) -> Iterator[None]:
    """Turns whatever is raised inside the block into an error of one line; errors of ours pass as they are.

    Libraries raise every type for a value that they did not expect, so nothing narrower would do.

    Args:
        what: What is wrong then, and where: the file's name is in it.
        fix: How to mend it.
        entries: Gives the entries that the block reads. A library that looks a value up and does not find it names neither
            entry nor table: then the entry with that value is named.

    Raises:
        InputError: With the library's own reason.
        PrerequisiteError: If the machine failed, and not the files.
    """
    try:
        yield
    except UwmError:
        raise
    except Exception as error:
        raise _refusal(what, fix, error, _named(error, entries)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of tokenizers, which derives it from no Exception
            raise
        raise _refusal(what, fix, error) from error


def _refusal(what: str, fix: str, error: BaseException, named: str = "") -> UwmError:
    line = named or reason(error)
    if isinstance(error, Exception) and out_of_memory(error):
        return PrerequisiteError(f"{what}: memory does not hold it ({line})", fix="free memory, or check its sizes")
    if isinstance(error, OSError) and is_of_machine(error):
        return PrerequisiteError(f"{what}: {line}", fix="mend the machine and try again; the files may be whole")
    return InputError(f"{what}: {line}", fix=fix)


def _named(error: Exception, entries: Callable[[], Mapping[str, Any]] | None) -> str:
    """The entries with the value that a library looked up in vain; empty where that is not what happened."""
    if not (isinstance(error, KeyError) and len(error.args) == 1 and isinstance(error.args[0], str) and entries):
        return ""
    value = error.args[0]
    keys = [key for key, held in _flat(entries()) if held == value]
    return f"{' and '.join(keys)} is {json.dumps(value)}, which the library does not know"[:_LONGEST] if keys else ""


def _flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Every entry of nested tables, by the names on the way to it."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


_LONGEST = 200


def reason(error: BaseException) -> str:
    """What an error says, in one short line; its type, or the line that raised it, where it would mean nothing."""
    line = " ".join(str(error).split())
    if type(error).__name__.startswith("StrictDataclass"):  # of Hugging Face: names of its own types come first
        return line.rpartition("Error: ")[2][:_LONGEST]
    if not line and (raised := traceback.extract_tb(error.__traceback__)[-1:]):
        line = raised[0].line or ""
    said = isinstance(error, (OSError, RuntimeError, ValueError)) and bool(str(error))
    return line[:_LONGEST] if said else f"{type(error).__name__}: {line[:_LONGEST]}"
