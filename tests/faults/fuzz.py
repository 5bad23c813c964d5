"""Breaks the files of one reader and looks at what it says: `python -m tests.faults.fuzz FOLDER CASES READER`.

Coverage-guided by atheris where it is installed; without it, the same mutations without guidance. What is found is printed
as JSON, one line each; a crash, an abort or a hang ends the process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.faults.fuzz_reader import Reader

try:
    import atheris
except ImportError:  # there is no wheel for every Python
    atheris = None

SECONDS = 20
"""A case that takes longer is a hang."""

MEMORY_MB = 1000


def main(folder: Path, cases: int, name: str) -> None:
    """Breaks one reader's files as often as told."""
    watched = atheris.instrument_imports(include=["uwm_deploy", "tarfile"]) if atheris else contextlib.nullcontext()
    with watched:
        from tests.faults.fuzz_reader import TORCH
        from tests.faults.mutations import mutated

        place = "fuzz_checkpoints" if name in TORCH else "fuzz_readers"
        (work := folder / "work").mkdir()
        reader: Reader = importlib.import_module(f"tests.faults.{place}").READERS[name](work)
        for seed in reader.seeds:
            reader.read(seed)  # a whole file is read
    logging.disable()
    seen: set[str] = set()

    def tried(data: bytes) -> None:
        if (found := said_of(reader.read, data)) and found[0] not in seen:
            seen.add(found[0])
            kept = folder / f"found-{len(seen)}"
            kept.write_bytes(data)
            print(json.dumps([name, *found, str(kept)]), flush=True)

    if atheris is None:
        chance = random.Random(0)
        for number in range(cases):
            signal.alarm(SECONDS)  # ends the process
            tried(mutated(chance.choice(reader.seeds), reader.form, number))
        return
    _guided(folder, cases, [*reader.seeds], tried, lambda data, seed: mutated(data, reader.form, seed))


def _guided(
    folder: Path, cases: int, seeds: list[bytes], tried: Callable[[bytes], None], change: Callable[[bytes, int], bytes]
) -> None:
    """Ends the process."""
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed{number}").write_bytes(seed)
    longest = max(4096, 2 * max(map(len, seeds)))

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        if seed % 3 == 0:
            return bytes(atheris.Mutate(data, most))
        return change(data or seeds[seed % len(seeds)], seed)[:most]

    options = [
        f"-runs={cases}", "-seed=1", f"-max_len={longest}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEMORY_MB}",
        f"-artifact_prefix={folder}/", "-len_control=0", "-verbosity=0",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(corpus)], tried, custom_mutator=mutator)
    atheris.Fuzz()


def said_of(read: Callable[[bytes], object], data: bytes) -> tuple[str, str] | None:
    """What is wrong with how a reader refuses a file: where it failed, and what it said; None if all is well."""
    from uwm_deploy.commands.failure import failure_of

    try:
        read(data)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        failure = failure_of(error)
        if failure.exit_code in (2, 3, 5) and "\n" not in failure.what:
            return None
        frames = [f"{os.path.basename(f.filename)}:{f.name}" for f in traceback.extract_tb(error.__traceback__)]
        ours = [
            frame
            for frame, full in zip(frames, traceback.extract_tb(error.__traceback__), strict=True)
            if "uwm_deploy" in full.filename
        ]
        return f"{type(error).__name__} in {(ours or frames)[-1]}", f"{failure.exit_code}: {failure.what[:200]}"
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
