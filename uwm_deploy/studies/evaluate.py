"""Measures models, saved folders and bundles on one set: SafeGround, retrieval and zero-shot.

Quadruples are preprocessed once for all models with the same preprocessing; zero-shot images pass through in batches, so
that sets of any size can be measured.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from uwm_deploy.data.embedding import PreparedSet, embed, prepare, with_groups
from uwm_deploy.data.ranks import ALONE, Ranks, StoppedError
from uwm_deploy.data.recognition import recognise
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.data.zero_shot_readers import BrokenItemError
from uwm_deploy.errors import InputError
from uwm_deploy.records.metrics import SafetyReport
from uwm_deploy.records.model import ImageSpec, TextSpec
from uwm_deploy.report.console import Reporter
from uwm_deploy.safeground.embedded import EmbeddedSet, Yardstick, safety_report, yardstick_of
from uwm_deploy.safeground.outcomes import bits_of
from uwm_deploy.safeground.top_one import TopOne
from uwm_deploy.studies.encoders import Encoders, open_encoders
from uwm_deploy.studies.evaluation_sets import EvaluationSets, open_evaluation_sets
from uwm_deploy.studies.subjects import Subject


class Evaluator:
    """Measures one subject after the other on the same items; several processes share the work.

    The first one is taken for the original model: *hard safe* items come from it, and neighbours and spread are compared
    with its own.
    """

    def __init__(
        self, sets: EvaluationSets, *, workers: int, reporter: Reporter, ranks: Ranks = ALONE, with_items: bool = False
    ) -> None:
        self.sets, self.workers, self.reporter, self.ranks = sets, workers, reporter, ranks
        self.with_items = with_items  # keeps the outcome of every item, so that two reports can be paired
        self._yardstick: Yardstick | None = None
        self._prepared: tuple[tuple[ImageSpec, TextSpec, int], PreparedSet] | None = None

    def measure(self, encoders: Encoders) -> SafetyReport:
        """SafeGround, retrieval and every zero-shot set that is here; the others are listed as missing.

        Raises:
            DataError: If a quadruple cannot be read, or an embedding is not finite.
        """
        sets, progress = self.sets, self.reporter.progress
        with self.reporter.stage("evaluate", f"{encoders.name} on {sets.name}"):
            report = SafetyReport(subject=encoders.name, preference={}, per_concept={}, retrieval={}, zero_shot={})
            if sets.source is not None:
                prepared = self._inputs(sets.source, encoders)
                embedded = embed(
                    prepared,
                    encoders.encode_image,
                    encoders.encode_text,
                    label=encoders.name,
                    batch=encoders.batch,
                    progress=progress,
                    ranks=self.ranks,
                )
                grouped = with_groups(embedded, prepared, batch=encoders.batch, ranks=self.ranks)
                report = self.ranks.first_only(lambda: self._report(encoders.name, grouped))
            zero_shot, missing = self._zero_shot(encoders)
        items = report.items
        if items is not None:
            items = dataclasses.replace(items, zero_shot={name: bits_of(part.hits) for name, part in zero_shot.items()})
        shares = {name: part.proportion() for name, part in zero_shot.items()}
        return dataclasses.replace(report, zero_shot=shares, zero_shot_missing=missing, items=items)

    def _report(self, name: str, embedded: EmbeddedSet) -> SafetyReport:
        if self._yardstick is None:
            self._yardstick = yardstick_of(embedded)
        return safety_report(name, embedded, with_items=self.with_items, yardstick=self._yardstick)

    def _inputs(self, source: QuadrupleSource, encoders: Encoders) -> PreparedSet:
        key = (encoders.image, encoders.text, encoders.batch if self.ranks.world > 1 else 0)  # a batch has one owner
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = None  # its memory, before the next one takes some
            prepared = prepare(
                source,
                encoders.image,
                encoders.tokenizer,
                workers=self.workers,
                progress=self.reporter.progress,
                batch=encoders.batch,
                ranks=self.ranks,
            )
            self._prepared = key, prepared
        return self._prepared[1]

    def _zero_shot(self, encoders: Encoders) -> tuple[dict[str, TopOne], dict[str, str]]:
        found, missing = {}, dict(self.sets.suite.missing)
        for name, part in self.sets.suite.sets.items():
            try:
                found[name] = recognise(
                    part,
                    encoders.image,
                    encoders.tokenizer,
                    encoders.encode_image,
                    encoders.encode_text,
                    batch=encoders.batch,
                    workers=self.workers,
                    progress=self.reporter.progress,
                    ranks=self.ranks,
                )
            except (BrokenItemError, StoppedError) as error:
                if isinstance(error, StoppedError) and error.kind != BrokenItemError.__name__:
                    raise
                missing[name] = error.what
        return found, missing


def evaluate(
    subjects: Sequence[Subject],
    *,
    evaluation: str | None,
    zero_shot: Sequence[str] | None,
    data: Path | None,
    workers: int,
    reporter: Reporter,
    ranks: Ranks = ALONE,
) -> list[SafetyReport]:
    """Reports in the order of the subjects, all on the same items.

    Args:
        subjects: At least one.
        evaluation: See `open_evaluation_sets`.
        zero_shot: See `open_evaluation_sets`.
        data: See `open_evaluation_sets`.
        workers: Decoding processes.
        reporter: Progress.
        ranks: The processes that share the work, all with the same arguments.

    Raises:
        InputError: If two subjects have one label.
        UwmError: Of the kind that went wrong.
    """

    def measured() -> list[SafetyReport]:
        twice = [label for label, count in Counter(subject.label for subject in subjects).items() if count > 1]
        if twice:
            raise InputError(
                f"two rows are called {twice[0]!r}", fix="write LABEL=MODEL:METHOD with a label of its own"
            )
        sets = open_evaluation_sets(
            evaluation, zero_shot, data=data, default=subjects[0], concepts=subjects[0].request.leave_out
        )
        evaluator = Evaluator(sets, workers=workers, reporter=reporter, ranks=ranks)
        return [evaluator.measure(open_encoders(subject, reporter, ranks)) for subject in subjects]

    return ranks.together(measured)
