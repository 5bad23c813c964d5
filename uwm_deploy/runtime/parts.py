"""Rows of any number as calls of one length and at most a session's largest batch; the same for every runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from uwm_deploy.errors import ContractError
from uwm_deploy.records.graph import Profile, TensorSpec
from uwm_deploy.runtime.fork import Home
from uwm_deploy.runtime.lengths import parts_of
from uwm_deploy.runtime.pixels import taken


class InParts(ABC):
    """A session that a runtime executes; see `Session`.

    Args:
        profile: Batches that it accepts.
        inputs: Its inputs; exactly one.
        outputs: Its outputs; the embedding is the first.

    Attributes:
        vocabulary: Rows of the model's table of embeddings, for a text tower; 0 where that is not known.
    """

    vocabulary = 0

    def __init__(self, profile: Profile, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.max_batch, self._input, self._outputs = profile.max, inputs[0], outputs
        self._home = Home()

    @abstractmethod
    def _call(self, rows: np.ndarray, outputs: tuple[TensorSpec, ...]) -> list[np.ndarray]:
        """Arrays of the outputs of at most `max_batch` rows."""

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Embeds inputs; see `Session.run`.

        Args:
            batch: (n, ...), n >= 1: (n, 3, H, W) float32 pixels, (n, H, W, 3) uint8 crops, or (n, L) integer ids.

        Returns:
            (n, d) float32.

        Raises:
            ContractError: If there is no row, or the graph does not take such rows.
        """
        return self._run(batch, self._outputs[:1])[self._outputs[0].name]

    def run_all(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """Computes every output; see `Session.run_all`.

        Args:
            batch: (n, ...), n >= 1: (n, 3, H, W) float32 pixels, (n, H, W, 3) uint8 crops, or (n, L) integer ids.

        Returns:
            Outputs by name, (n, ...) float32; the embedding is the first.
        """
        return self._run(batch, self._outputs)

    def _run(self, batch: np.ndarray, outputs: tuple[TensorSpec, ...]) -> dict[str, np.ndarray]:
        self._home.check()
        rows = taken(batch, self._input, self.vocabulary)
        if not len(rows):
            raise ContractError("there are no rows to embed", fix="pass at least one")
        parts = list(parts_of(rows, self._input, self.max_batch))
        columns = zip(outputs, zip(*(self._call(part, outputs) for _, part in parts), strict=True), strict=True)
        back = np.argsort(np.concatenate([places for places, _ in parts]), kind="stable")
        in_order = len(parts) == 1 or self._input.lengths is None
        found = {spec.name: np.concatenate(some).astype(np.float32, copy=False) for spec, some in columns}
        return found if in_order else {name: values[back] for name, values in found.items()}
