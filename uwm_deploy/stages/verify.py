"""Stage `verify`: measures, never judges. The sessions measured here are the ones that serve."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from uwm_deploy.datasets.embedding import Encode, Inputs, PreparedSet, embed
from uwm_deploy.datasets.reading import Progress
from uwm_deploy.ranks import ALONE, Ranks
from uwm_deploy.records import (
    ArtifactEvidence,
    Digest,
    Evidence,
    OutputParity,
    TensorSpec,
    TowerName,
)
from uwm_deploy.runtime.session import Session
from uwm_deploy.safeground.embedded import EmbeddedSet, flips_between, parity, safety_report
from uwm_deploy.towers.protocol import LoadedModel, Tower

SINGLE_ROWS = 8
"""Rows compared one at a time."""

BATCH_CALLS = 2
"""Calls compared at the largest batch."""

EMBED_BATCH = 16
"""Rows per forward pass of a model in PyTorch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One thing to measure.

    Attributes:
        variant: Its name in the report.
        digests: Digest per tower of the bytes the sessions were opened from.
        sessions: Opened sessions; None when this machine cannot execute it.
        reason: Why not.
        outputs: Output of each tower.
        normalised: Whether its outputs have length 1 already.
        max_batch: Largest batch of its profile.
    """

    variant: str
    digests: Mapping[str, Digest]
    sessions: Mapping[TowerName, Session] | None
    reason: str
    outputs: Mapping[TowerName, TensorSpec]
    normalised: bool
    max_batch: int


def encode_with(tower: Tower) -> Encode:
    """The tower in PyTorch float32 as a function of arrays."""
    device = next(tower.graph_module().parameters()).device

    @torch.inference_mode()
    def encode(inputs: np.ndarray) -> np.ndarray:
        rows: np.ndarray = tower.embed(torch.from_numpy(np.ascontiguousarray(inputs)).to(device)).float().cpu().numpy()
        return rows

    return encode


def embed_model(
    model: LoadedModel, prepared: PreparedSet, label: str, progress: Progress, ranks: Ranks = ALONE
) -> EmbeddedSet:
    """Embeds the evaluation set with a model in PyTorch; several processes share the work."""
    encoders = encode_with(model.image), encode_with(model.text)
    return embed(prepared, *encoders, label=label, batch=EMBED_BATCH, progress=progress, ranks=ranks)


def evidence_of(
    subject: Subject, edited: LoadedModel, reference: EmbeddedSet, prepared: PreparedSet, progress: Progress
) -> ArtifactEvidence:
    """Executes one artifact: parity at batch 1 and at its largest batch, then the whole evaluation set.

    Args:
        subject: What to measure.
        edited: The reference model, PyTorch float32.
        reference: Its embeddings.
        prepared: The evaluation set.
        progress: Called as it goes on.
    """
    if subject.sessions is None:
        return ArtifactEvidence(
            variant=subject.variant,
            evidence=Evidence.NOT_RUN,
            reason=subject.reason,
            where={},
            artifact_digests=dict(subject.digests),
        )
    sessions = subject.sessions
    rows: dict[TowerName, Inputs] = {TowerName.IMAGE: prepared.unsafe_pixels, TowerName.TEXT: prepared.unsafe_ids}
    measured = [
        _parity(subject, name, edited.tower(name), sessions[name], rows[name], batch)
        for name in TowerName
        for batch in sorted({1, subject.max_batch})
    ]
    embedded = embed(
        prepared,
        sessions[TowerName.IMAGE].run,
        sessions[TowerName.TEXT].run,
        label=f"evaluation, {subject.variant}",
        batch=subject.max_batch,
        progress=progress,
    )
    return ArtifactEvidence(
        variant=subject.variant,
        evidence=Evidence.EXECUTED,
        reason="",
        where=dict(sessions[TowerName.IMAGE].where),
        artifact_digests=dict(subject.digests),
        parity=tuple(measured),
        safety=safety_report(subject.variant, embedded),
        flips=flips_between(reference, embedded),
    )


def _parity(
    subject: Subject, name: TowerName, tower: Tower, session: Session, rows: Inputs, batch: int
) -> OutputParity:
    """Runs the same inputs through both Polygraphy runners and compares row by row."""
    output = subject.outputs[name]
    calls = SINGLE_ROWS if batch == 1 else BATCH_CALLS
    total = min(len(rows), calls * batch) if batch > 1 else min(len(rows), calls)
    feeds = [{tower.input_name: rows[i : i + batch]} for i in range(0, total, batch)]
    reference = encode_with(tower)

    def edited(inputs: np.ndarray) -> np.ndarray:
        embeds = reference(inputs)
        return embeds / np.linalg.norm(embeds, axis=1, keepdims=True) if subject.normalised else embeds

    runners = [
        EncoderRunner("edited, PyTorch float32", edited, tower.input_name, output, rows),
        EncoderRunner(subject.variant, session.run, tower.input_name, output, rows),
    ]
    with _quiet():
        results = Comparator.run(runners, data_loader=feeds, warm_up=0)
    left, right = (
        np.concatenate([iteration[output.name] for iteration in iterations]) for _, iterations in results.items()
    )
    return parity(name, output.name, batch, left, right)


class EncoderRunner(BaseRunner):  # type: ignore[misc]
    """A Polygraphy runner around any function from a batch to embeddings."""

    def __init__(self, name: str, encode: Encode, input_name: str, output: TensorSpec, sample: Inputs) -> None:
        super().__init__(name=name)
        self._encode, self._input, self._output, self._sample = encode, input_name, output, sample

    def activate_impl(self) -> None:
        """Nothing to do: sessions are opened and closed by their owner."""

    def deactivate_impl(self) -> None:
        """Nothing to do."""

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Name, type and shape of the one input."""
        return TensorMetadata().add(self._input, self._sample.dtype, (-1, *self._sample.shape[1:]))

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        """Runs one batch."""
        self.inference_time = 0.0
        return OrderedDict([(self._output.name, self._encode(feed_dict[self._input]))])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Polygraphy logs every run; our own progress says what a user needs."""
    before = G_LOGGER.module_severity
    G_LOGGER.module_severity = G_LOGGER.ERROR
    try:
        yield
    finally:
        G_LOGGER.module_severity = before
