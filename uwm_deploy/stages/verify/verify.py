"""Stage `verify`: measures, never judges. The sessions measured here are the ones that serve."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from uwm_deploy.data.embedding import Encode, EncodeAll, Inputs, PreparedSet, embed, risks, with_groups
from uwm_deploy.data.ranks import ALONE, Ranks
from uwm_deploy.data.reading import Progress
from uwm_deploy.records.evidence import ArtifactEvidence, Evidence, GraphAudit, OutputParity
from uwm_deploy.records.graph import Precision, RowLengths, TensorSpec
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.runtime.session import Session
from uwm_deploy.safeground.canaries import Canaries
from uwm_deploy.safeground.embedded import EmbeddedSet, Yardstick, parity
from uwm_deploy.safeground.risk import RiskSet
from uwm_deploy.stages.verify.captions import WholeRows
from uwm_deploy.stages.verify.executed import RiskReference, executed_evidence
from uwm_deploy.towers.protocol import LoadedModel, Tower

SINGLE_ROWS = 8
"""Rows compared one at a time."""

BATCH_CALLS = 2
"""Calls compared at the largest batch."""

EMBED_BATCH = 16
"""Rows per forward pass of a model in PyTorch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactSubject:
    """One thing to measure.

    Attributes:
        variant: Its name in the report.
        precision: What its linear layers compute in.
        digests: Digest per tower of the bytes the sessions were opened from.
        sessions: Opened sessions; None when this machine cannot execute it.
        reason: Why not.
        outputs: Outputs of each tower; the embedding is the first.
        normalised: Whether its embeddings have length 1 already.
        max_batch: Largest batch of its profile.
        opt_batch: The batch that the profile is tuned for.
        audit: Reads the weights that lie in it, by tower; towers whose format cannot be read are left out.
    """

    variant: str
    precision: Precision
    digests: Mapping[str, Digest]
    sessions: Mapping[TowerName, Session] | None
    reason: str
    outputs: Mapping[TowerName, tuple[TensorSpec, ...]]
    normalised: bool
    max_batch: int
    opt_batch: int = 1
    audit: Callable[[], Mapping[str, GraphAudit]] = dict
    lengths: RowLengths | None = None


def encode_with(tower: Tower) -> Encode:
    """The tower in PyTorch float32 as a function of arrays.

    Returns:
        From inputs (b, 3, H, W) float32 or (b, L) int64 to embeddings (b, d) float32, not normalised.
    """
    device = next(tower.graph_module().parameters()).device

    @torch.inference_mode()
    def encode(inputs: np.ndarray) -> np.ndarray:
        rows: np.ndarray = tower.embed(torch.from_numpy(np.ascontiguousarray(inputs)).to(device)).float().cpu().numpy()
        return rows

    return encode


def embed_model(
    model: LoadedModel, prepared: PreparedSet, label: str, progress: Progress, ranks: Ranks = ALONE
) -> EmbeddedSet:
    """Embeds the evaluation set with a model in PyTorch; several processes share the work, the first has all of the set."""
    encoders = encode_with(model.image), encode_with(model.text)
    found = embed(prepared, *encoders, label=label, batch=EMBED_BATCH, progress=progress, ranks=ranks)
    return with_groups(found, prepared, batch=EMBED_BATCH, ranks=ranks)


def risks_of_model(model: LoadedModel, prepared: PreparedSet, progress: Progress) -> RiskSet:
    """What the head of a model says of the evaluation set, in PyTorch."""
    run = _all_outputs(model.image, normalised=False)
    return risks(prepared, run, label="risks, edited", batch=EMBED_BATCH, progress=progress)


def evidence_of(
    subject: ArtifactSubject,
    edited: LoadedModel,
    reference: EmbeddedSet,
    prepared: PreparedSet,
    canaries: Mapping[TowerName, Canaries],
    progress: Progress,
    risk: RiskReference | None = None,
    yardstick: Yardstick | None = None,
) -> ArtifactEvidence:
    """Executes one artifact; see `executed_evidence`.

    Args:
        subject: What to measure.
        edited: The reference model, PyTorch float32.
        reference: Its embeddings.
        prepared: The evaluation set.
        canaries: Of each edited tower.
        progress: Called as it goes on.
        risk: The safety head and its outputs on the reference model; None without one.
        yardstick: Of the original model.
    """
    if subject.sessions is None:
        return _known_of(subject, Evidence.NOT_RUN, {})
    sessions = subject.sessions
    rows: dict[TowerName, Inputs] = {TowerName.IMAGE: prepared.unsafe_pixels, TowerName.TEXT: prepared.unsafe_ids}

    def measured() -> list[OutputParity]:
        return [
            part
            for name in TowerName
            for batch in sorted({1, subject.max_batch})
            for part in _parity(subject, name, edited.tower(name), sessions[name], rows[name], batch)
        ]

    evidence = dataclasses.replace(
        _known_of(subject, Evidence.EXECUTED, sessions[TowerName.IMAGE].where), audit=dict(subject.audit())
    )
    sizes, whole = (subject.opt_batch, subject.max_batch), None
    if subject.lengths is not None:
        whole = WholeRows(lengths=subject.lengths, ids=prepared.unsafe_ids, encode=encode_with(edited.text))
    return executed_evidence(
        evidence,
        sessions,
        reference,
        prepared,
        canaries,
        measured,
        sizes=sizes,
        normalised=subject.normalised,
        progress=progress,
        risk=risk,
        yardstick=yardstick,
        whole=whole,
    )


def _known_of(subject: ArtifactSubject, evidence: Evidence, where: Mapping[str, str]) -> ArtifactEvidence:
    """What is known of an artifact before anything is measured."""
    return ArtifactEvidence(
        variant=subject.variant,
        precision=subject.precision,
        evidence=evidence,
        reason=subject.reason,
        where=dict(where),
        artifact_digests=dict(subject.digests),
    )


def _parity(
    subject: ArtifactSubject, name: TowerName, tower: Tower, session: Session, rows: Inputs, batch: int
) -> list[OutputParity]:
    """Runs the same inputs through both Polygraphy runners and compares every output row by row."""
    outputs = [spec.name for spec in subject.outputs[name]]
    calls = SINGLE_ROWS if batch == 1 else BATCH_CALLS
    total = min(len(rows), calls * batch) if batch > 1 else min(len(rows), calls)
    feeds = [{tower.input_name: rows[i : i + batch]} for i in range(0, total, batch)]
    runners = [
        EncoderRunner("edited, PyTorch float32", _all_outputs(tower, subject.normalised), tower.input_name, rows),
        EncoderRunner(subject.variant, session.run_all, tower.input_name, rows),
    ]
    with _quiet():
        results = Comparator.run(runners, data_loader=feeds, warm_up=0)
    measured = []
    for output in outputs:
        left, right = (
            np.concatenate([iteration[output] for iteration in iterations]) for _, iterations in results.items()
        )
        flat = (left.reshape(len(left), -1), right.reshape(len(right), -1))
        measured.append(parity(name, output, batch, *flat))
    return measured


def _all_outputs(tower: Tower, normalised: bool) -> EncodeAll:
    """The tower in PyTorch float32 with the outputs of its graph."""
    device = next(tower.graph_module().parameters()).device

    @torch.inference_mode()
    def run(inputs: np.ndarray) -> dict[str, np.ndarray]:
        embeds, *further = tower.outputs(torch.from_numpy(np.ascontiguousarray(inputs)).to(device))
        first = embeds / embeds.norm(dim=1, keepdim=True) if normalised else embeds
        rows = [part.float().cpu().numpy() for part in (first, *further)]
        return dict(zip(tower.output_names, rows, strict=True))

    return run


class EncoderRunner(BaseRunner):  # type: ignore[misc]
    """A Polygraphy runner around any function from a batch to outputs by name.

    Args:
        name: Name of the runner.
        encode: From inputs (b, 3, H, W) float32 or (b, L) int64 to outputs by name, (b, ...) float32.
        input_name: Name of the input.
        sample: Inputs of which the metadata is read, (n, 3, H, W) float32 or (n, L) int64.
    """

    def __init__(self, name: str, encode: EncodeAll, input_name: str, sample: Inputs) -> None:
        super().__init__(name=name)
        self._encode, self._input, self._sample = encode, input_name, sample

    def activate_impl(self) -> None:
        """Nothing to do: sessions are opened and closed by their owner."""

    def deactivate_impl(self) -> None:
        """Nothing to do."""

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Name, type and shape of the one input."""
        return TensorMetadata().add(self._input, self._sample.dtype, (-1, *self._sample.shape[1:]))

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        """Runs one batch.

        Args:
            feed_dict: The input by its name, (b, 3, H, W) float32 or (b, L) int64.

        Returns:
            Outputs by name, (b, ...) float32.
        """
        self.inference_time = 0.0
        return OrderedDict(self._encode(feed_dict[self._input]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Polygraphy logs every run; our own progress says what a user needs."""
    before = G_LOGGER.module_severity
    G_LOGGER.module_severity = G_LOGGER.ERROR
    try:
        yield
    finally:
        G_LOGGER.module_severity = before
