"""Where this program keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "UWM_DEPLOY_CACHE"
"""Environment variable with the folder for caches, in place of the user's usual one."""


def cache_folder() -> Path:
    """The folder for caches; it need not exist."""
    given, usual = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else (Path(usual) if usual else Path.home() / ".cache") / "uwm-deploy"
