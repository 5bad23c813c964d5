"""Stages that take milliseconds, for tests of how stages are run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from uwm_deploy.errors import PrerequisiteError
from uwm_deploy.pipeline.plan import plan_of
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import Run
from uwm_deploy.records.graph import Precision
from uwm_deploy.stages.job import Job, Plan, Variant
from uwm_deploy.stages.table import Stage

WORDS: dict[str, str] = {}
"""What each toy stage writes, by its name; a test changes it."""

FAILS: dict[str, type[BaseException]] = {}
"""Stage or variant to the error that it ends with."""

PRECISIONS = (Precision.FP32, Precision.FP16)


@dataclass
class Log:
    """Keeps what is said."""

    lines: list[str] = field(default_factory=list)

    def line(self, text: str) -> None:
        self.lines.append(text)

    def stage(self, name: str, text: str) -> AbstractContextManager[None]:
        self.lines.append(f"made {name}")
        return nullcontext()

    def progress(self, label: str, done: int, total: int) -> None:
        """Nothing: a toy stage has no steps."""


def make(job: Job, out: Path) -> None:
    """Writes what the stage is told to, and what it read."""
    name = "-".join(filter(None, (job.stage, job.variant.name)))
    if error := FAILS.get(name):
        (out / "half").write_text("", encoding="utf-8")
        raise error(name)
    if os.environ.get("TOY_DIES_IN") == name:
        (out / "half").write_text("", encoding="utf-8")
        os.kill(os.getpid(), 9)
    read = {made.folder.name: (made.folder / "word").read_text() for parts in job.inputs.values() for made in parts}
    (out / "word").write_text(WORDS.get(job.stage, "word"), encoding="utf-8")
    (out / "read.json").write_text(json.dumps(sorted(read)), encoding="utf-8")


def is_there(job: Job, folder: Path) -> bool:
    """Whether the file that the last stage leaves outside its folder is there."""
    return job.plan.out.exists()


def make_outside(job: Job, out: Path) -> None:
    """Leaves a file outside its folder."""
    make(job, out)
    job.plan.out.write_text("shipped", encoding="utf-8")


def stages(settings: Callable[[str], object] = lambda _: None) -> tuple[Stage, ...]:
    """Five stages in the shape of the real ones.

    Args:
        settings: Stage to its settings.
    """

    def stage(name: str, reads: Sequence[str] = (), **more: object) -> Stage:
        return Stage(
            **{
                "name": name,
                "does": "Writes a word.",
                "make": "tests.toy_stages:make",
                "reads": tuple(reads),
                "settings": lambda *_: settings(name),
                "says": lambda *_: "a word",
                **more,
            }
        )

    return (
        stage("score"),
        stage("edit", ["score"]),
        stage("convert", ["edit"], each=_lower),
        stage("compile", ["edit", "convert"], each=_each, skips=(PrerequisiteError,), needs_one=True),
        stage("gate", ["compile"]),
        stage(
            "package", ["edit", "gate"], make="tests.toy_stages:make_outside", still_there="tests.toy_stages:is_there"
        ),
    )


def _lower(_: Plan) -> list[Variant]:
    return [Variant(name=p.value, precision=p) for p in PRECISIONS if p is not Precision.FP32]


def _each(_: Plan) -> list[Variant]:
    return [Variant(name=f"ort-{p.value}", precision=p) for p in PRECISIONS]


def run(folder: Path, until: str = "package", settings: Callable[[str], object] = lambda _: None) -> list[str]:
    """Runs the toy stages; which folders were made, in order."""
    log = Log()
    plan = plan_of(Request(work=folder / "work", out=folder / "shipped"))
    toy = Run(plan, log, stages=stages(settings))
    with toy.locked():
        toy.get(until)
    return [line.removeprefix("made ") for line in log.lines if line.startswith("made ")]
