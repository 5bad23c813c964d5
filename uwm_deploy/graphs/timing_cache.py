"""Timing caches of TensorRT builders, kept for the next build; one file per flavour, version and device.

Kernels are chosen by their measured times, so engines of one recipe differ between machines and moments. A cache makes
builds faster and alike. Builds may run at the same time: a cache file is only replaced as a whole, by one that includes it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uwm_deploy.errors import UwmError
from uwm_deploy.graphs.builder_log import BuildFailed, last_of
from uwm_deploy.records.cache_folder import cache_folder
from uwm_deploy.records.files import digest_of_bytes, write_atomic
from uwm_deploy.records.locks import hold, release


def cache_file(module: str, version: str, device: str) -> Path:
    """Cache file of one flavour, version and device."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{module} {version} {device}").strip("-")
    return cache_folder() / "timing" / f"{name}.cache"


def attach(config: Any, file: Path, messages: list[str]) -> dict[str, str]:
    """Gives a builder the times that earlier builds measured.

    Args:
        config: `IBuilderConfig`.
        file: See `cache_file`; need not exist.
        messages: Messages of the logger; a file that does not fit gives an empty cache and a message.

    Returns:
        State for the record: ``new``, ``reused``, or ``refused`` with a new one begun; and the digest of the file.
    """
    try:
        known = file.read_bytes()
    except FileNotFoundError:
        known = b""
    heard = len(messages)
    cache = config.create_timing_cache(known)
    taken = cache is not None and config.set_timing_cache(cache, False)
    fits = taken and not any("timing cache" in message.lower() for message in messages[heard:])
    if not taken:
        cache = config.create_timing_cache(b"")
        if cache is None or not config.set_timing_cache(cache, False):
            raise BuildFailed(f"no timing cache: {last_of(messages)}")
    state = "new" if not known else "reused" if fits else "refused, begun anew"
    return {"timing_cache": state, "timing_cache_before": digest_of_bytes(known) if known else "none"}


def keep(config: Any, file: Path, messages: list[str]) -> dict[str, str]:
    """Adds the times of a build to the file, and keeps those that other builds have added meanwhile.

    Returns:
        The digest of the file for the record, or the reason why the times were not kept; a build does not fail for that.
    """
    cache = config.get_timing_cache()
    if cache is None:
        return {"timing_cache_after": f"not kept: {last_of(messages)}"}
    try:
        with _alone(file):
            if file.is_file() and (others := config.create_timing_cache(file.read_bytes())) is not None:
                cache.combine(others, False)  # False for a file that does not fit, which is then replaced
            content = cache.serialize()
            if content is None:
                return {"timing_cache_after": f"not kept: {last_of(messages)}"}
            write_atomic(file, bytes(content))
            return {"timing_cache_after": digest_of_bytes(bytes(content))}
    except (UwmError, OSError) as error:
        return {"timing_cache_after": f"not kept: {error}"}


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Locks the file against other processes; the lock ends with its process."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = None
    while lock is None:
        lock = hold(file.with_suffix(".lock"), "", "", mode=0o666, wait=True)
    try:
        yield
    finally:
        release(lock)
