"""Runs stages: each is made from what it reads, once, and reused as long as nothing that it depends on changed."""

from __future__ import annotations

import contextlib
import importlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from uwm_deploy.data.ranks import ALONE, Ranks
from uwm_deploy.errors import PrerequisiteError
from uwm_deploy.pipeline.cards import card
from uwm_deploy.pipeline.closure import digest_of_sources
from uwm_deploy.pipeline.folder import begun_at, current, stamp
from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.pipeline.plan import check_first, foreseen, plan_of
from uwm_deploy.pipeline.request import Request
from uwm_deploy.records.files import digest_of_plain, locked, whole_folder
from uwm_deploy.records.model import Digest
from uwm_deploy.runtime.versions import versions
from uwm_deploy.stages.job import Job, Made, Notes, Plan, Variant
from uwm_deploy.stages.table import SOURCES, STAGES, Stage

if TYPE_CHECKING:
    from uwm_deploy.stages.models import Models
    from uwm_deploy.towers.protocol import LoadedModel


def run(
    request: Request,
    *,
    until: str,
    reporter: Notes,
    ranks: Ranks = ALONE,
    kept: Mapping[object, object] = MappingProxyType({}),
) -> Outcome:
    """Makes a stage and everything that it reads; what did not change is reused.

    Args:
        request: What the user asked for.
        until: Name of the stage.
        reporter: Progress.
        ranks: The processes that share the work, all with the same request and run folder. Only the first writes, and
            only its outcome is whole.
        kept: What stages share within a run (`Job.shared`) and this one takes over from others.

    Raises:
        UwmError: Of the kind that went wrong; finished stages are kept.
    """
    made = Run(ranks.together(lambda: plan_of(request)), reporter, ranks=ranks, kept=kept)
    made.until(until)
    return made.outcome


class Run:
    """One run in one folder: stages are pulled by name, with what they read before them.

    Args:
        plan: What it is made from.
        notes: Progress.
        ranks: The processes that share the work.
        stages: Every stage that can be pulled, in order.
        kept: What stages share within a run and this one takes over from others.
    """

    def __init__(
        self,
        plan: Plan,
        notes: Notes,
        *,
        ranks: Ranks = ALONE,
        stages: Sequence[Stage] = STAGES,
        kept: Mapping[object, object] = MappingProxyType({}),
    ) -> None:
        self.plan, self.ranks = plan, ranks
        self._notes, self._stages = notes, {stage.name: stage for stage in stages}
        self._made: dict[str, tuple[Made, ...]] = {}
        self._skipped: dict[str, str] = {}
        self._kept = dict(kept)
        self._source = cache(self._source_digest)

    @property
    def outcome(self) -> Outcome:
        """What the stages left that were pulled so far."""
        return Outcome(run_plan=self.plan, made=self._made, skipped=self._skipped)

    def until(self, name: str) -> Run:
        """Makes a stage in the locked run folder, after what can be checked beforehand; the run itself.

        Raises:
            UwmError: Of the kind that went wrong; finished stages are kept.
        """
        with self.locked():
            self.check(name)
            self.get(name)
        return self

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The run folder, for this run alone."""
        with contextlib.ExitStack() as lock:
            self.ranks.first_only(lambda: lock.enter_context(locked(self.plan.folder.root)))
            yield

    def check(self, until: str) -> None:
        """Refuses what can be known to fail before the first stage runs; see `check_first`."""
        names = frozenset(self._needed(until))
        self.ranks.together(lambda: check_first(self.plan, names))
        if self.ranks.first and "gate" in names:
            for line in foreseen(self.plan):
                self._notes.line(line)

    def get(self, name: str) -> tuple[Made, ...]:
        """The folders of a stage, made or reused, after those of the stages that it reads.

        Raises:
            UwmError: Of the kind that went wrong; finished stages are kept.
        """
        if name not in self._made:
            stage = self._stages[name]
            for read in stage.reads:
                self.get(read)
            if stage.shared:
                self._made[name] = self._folders(stage)
            else:
                self._made[name] = self.ranks.first_only(lambda: self._folders(stage))
        return self._made[name]

    @property
    def models(self) -> Models:
        """The models of this run, which its stages share."""
        from uwm_deploy.stages.models import Models

        job = Job(plan=self.plan, notes=self._notes, card=card, ranks=self.ranks, kept=self._kept)
        return job.shared(Models)

    def job(self, stage: Stage, variant: Variant, key: str = "") -> Job:
        """What a stage's function is given for one of its folders."""
        return Job(
            stage=stage.name,
            plan=self.plan,
            variant=variant,
            inputs={name: self._read(name, variant) for name in stage.reads},
            key=key,
            notes=self._notes,
            card=card,
            ranks=self.ranks if stage.shared else ALONE,
            kept=self._kept,
        )

    def _needed(self, name: str) -> list[str]:
        found = [name]
        for read in self._stages[name].reads:
            found += self._needed(read)
        return found

    def _folders(self, stage: Stage) -> tuple[Made, ...]:
        for name, reason in stage.leaves_out(self.plan).items():
            self._skip(stage, name, reason)
        found = [made for variant in stage.each(self.plan) if (made := self._folder(stage, variant)) is not None]
        if stage.needs_one and not found:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self._skipped.items())
            raise PrerequisiteError(f"nothing can be compiled here ({reasons})", fix="see `uwm-deploy doctor`")
        if self.ranks.first:
            if (scratch := stage.scratch(self.plan)) is not None:
                shutil.rmtree(scratch, ignore_errors=True)
            if told := stage.warns(self.plan):
                self._notes.line(told)
        return tuple(found)

    def _folder(self, stage: Stage, variant: Variant) -> Made | None:
        """One folder of a stage; None where it is left out."""
        group = self.ranks if stage.shared else ALONE
        try:
            made = group.together(partial(self._made_or_reused, stage, variant, group))
        except stage.skips as error:
            self._skip(stage, variant.name, error.what)
            return None
        return group.first_only(lambda: made)

    def _made_or_reused(self, stage: Stage, variant: Variant, group: Ranks) -> Made:
        """A folder as it is, or made whole or not at all; processes but the first only help."""
        folder = self.plan.folder.stage(stage.name, variant.name)
        inputs = group.first_only(lambda: self._inputs(stage, variant))
        job = self.job(stage, variant, digest_of_plain(inputs))
        digest = group.first_only(lambda: self._reusable(stage, job, folder, inputs))
        reused = digest is not None
        if digest is not None:
            self._notes.line(f"{folder.name:<10} unchanged, reused")
        elif not group.first:
            function(stage.make)(job, folder)
        else:
            with self._notes.stage(folder.name, stage.says(self.plan, variant)), whole_folder(folder) as temporary:
                begun = datetime.now(UTC).isoformat(timespec="seconds")
                function(stage.make)(job, temporary)
                digest = stamp(temporary, inputs, begun)
        begun = begun_at(folder) if group.first else ""
        return Made(stage=stage.name, variant=variant, folder=folder, digest=digest or "", reused=reused, begun=begun)

    def _reusable(self, stage: Stage, job: Job, folder: Path, inputs: dict[str, str]) -> Digest | None:
        there = current(folder, inputs)
        if there is not None and stage.still_there and not function(stage.still_there)(job, folder):
            return None
        return there

    def _inputs(self, stage: Stage, variant: Variant) -> dict[str, str]:
        """Everything that a folder depends on: it is reused while all of this is the same."""
        read = {
            f"{made.stage} {made.variant.name}".rstrip(): made.digest
            for name in stage.reads
            for made in self._read(name, variant)
        }
        return {
            **{f"read: {name}": digest for name, digest in read.items()},
            **{f"source: {name}": self._source(name) for name in stage.sources},
            "settings": digest_of_plain(stage.settings(self.plan, variant)),
            "libraries": digest_of_plain(versions(stage.libraries)),
            "code": digest_of_sources(stage.module),
        }

    def _read(self, name: str, variant: Variant) -> tuple[Made, ...]:
        """Folders of a stage that a variant reads: those of its own precision, where both have one."""
        wanted = variant.precision
        return tuple(
            m
            for m in self._made.get(name, ())
            if None in (wanted, m.variant.precision) or m.variant.precision is wanted
        )

    def _source_digest(self, name: str) -> Digest:
        return digest_of_plain(SOURCES[name](self.plan))

    def _skip(self, stage: Stage, name: str, reason: str) -> None:
        self._skipped[name] = reason
        self._notes.line(f"{stage.name:<10} {name} skipped: {reason}")


def load_source(request: Request, notes: Notes) -> LoadedModel:
    """The unedited model that a request names."""
    return Run(plan_of(request), notes).models.original


def load_edited(request: Request, notes: Notes) -> LoadedModel:
    """The edited model that a request makes, with what was not made before made first.

    Raises:
        UwmError: Of the kind that went wrong.
    """
    models = Run(plan_of(request), notes).until("edit").models
    models.forget_original()
    return models.edited


def function(name: str) -> Callable[..., Any]:
    """The function of ``module:function``."""
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found
