"""A word that means a choice is one of those there are: a misspelt one never picks the other."""

from __future__ import annotations

from typing import Any, get_args

from uwm_deploy.errors import InputError


def check_choice(value: object, kind: Any, name: str) -> None:
    """Refuses a word that is no choice.

    Args:
        value: What was passed.
        kind: The `Literal` of all choices.
        name: Of the argument.

    Raises:
        InputError: If it is none of them.
    """
    choices = get_args(kind)
    if value not in choices:
        raise InputError(f"{name} is {value!r}", fix="pass " + " or ".join(f'"{choice}"' for choice in choices))
