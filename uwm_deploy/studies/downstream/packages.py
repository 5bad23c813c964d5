"""The packages of the extra `downstream`, imported when they are needed."""

from __future__ import annotations

from typing import Any

from uwm_deploy.errors import imported

_EXTRA = "pip install 'uwm-deploy[downstream]'"


def package(module: str, *, fix: str = _EXTRA) -> Any:
    """A module of one of the packages.

    Args:
        module: Its full name.
        fix: How to install it.

    Raises:
        PrerequisiteError: If it is not installed.
    """
    return imported(module, f"package {module.partition('.')[0]} is not installed", fix=fix)
