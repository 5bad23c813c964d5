"""Stored embeddings in a flat index of FAISS, which keeps the vectors themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from uwm_deploy.errors import DataError, InputError, imported
from uwm_deploy.records.files import whole_file, write_atomic
from uwm_deploy.runtime.embedding_map import Mapper
from uwm_deploy.serve.embed.stored import (
    Keys,
    Known,
    Knows,
    Label,
    Moved,
    Progress,
    bad_row,
    beside,
    is_finished,
    said_beside,
    source_of,
    tower_beside,
)


def faiss_module(path: Path) -> Any:
    """The library.

    Args:
        path: What it is needed for.

    Raises:
        PrerequisiteError: If it is not installed.
    """
    return imported("faiss", f"{path} is an index of FAISS, which is not installed", fix="pip install faiss-cpu")


class FlatIndex:
    """IndexFlatIP or IndexFlatL2, perhaps with ids of its own around it; see `Stored`.

    FAISS holds an index in memory as a whole; its vectors are mapped where they lie, so that it is there once.

    Args:
        path: The file.
        keys: File with one key per line.

    Raises:
        PrerequisiteError: If FAISS is not installed.
        DataError: If it cannot be read.
        InputError: If it is of a kind that does not keep the vectors, or was built for the old ones.
    """

    def __init__(self, path: Path, keys: Path | None = None) -> None:
        self.path, self._faiss = path, faiss_module(path)
        try:
            self._index = self._faiss.read_index(str(path))
        except RuntimeError as error:
            raise DataError(f"{path} is no index that FAISS can read: {str(error)[-200:]}", fix="check it") from error
        self._flat, ids = self._kept(self._faiss.downcast_index(self._index))
        self.rows, self.dim = int(self._flat.ntotal), int(self._flat.d)
        if not self.rows:
            raise DataError(f"{path} is an index without vectors", fix="check it")
        said = said_beside(path)
        self.tower, self.space = tower_beside(path, said), str(said.get("space", ""))
        self._keys = Keys(path, self.rows, keys, said.get("names", ids))
        self._said = said
        self.keyed = self._keys.there

    def known(self, knows: Knows) -> Iterator[Known]:
        """Items whose key is wanted; see `Stored.known`.

        Args:
            knows: Whether a key is wanted.

        Yields:
            Key and embedding, (d,) float32 or float16, of each wanted item that has an embedding.
        """
        for place, key in self._keys.places(knows):
            yield key, np.array(self._vectors()[place])

    def migrate(self, out: Path, mapper: Mapper, label: Label, progress: Progress) -> Moved:
        """See `Stored.migrate`; a killed run starts again."""
        made = label.plain() | {"rows": self.rows, "source": source_of(self.path)}
        if is_finished(out, made):
            return Moved(finished_before=self.rows)
        vectors = self._vectors()
        for start in range(0, self.rows, mapper.chunk):
            some = vectors[start : start + mapper.chunk]
            if (bad := mapper(some, some)) is not None:
                raise bad_row(self.path, start + bad, self._keys.at(start + bad), some[bad])
            progress("rows", start, self.rows)
        names = {"names": self._said["names"]} if "names" in self._said else {}
        write_atomic(beside(out), json.dumps(made | names, indent=1))
        with whole_file(out) as stream:
            self._faiss.write_index(self._index, self._faiss.PyCallbackIOWriter(stream.write))
        return Moved(rows=self.rows, parts=1)

    def _kept(self, index: Any) -> tuple[Any, list[str] | None]:
        """The flat index inside, and the ids around it as keys."""
        ids = None
        if isinstance(index, self._faiss.IndexIDMap):  # IndexIDMap2 is one too
            ids = [str(one) for one in self._faiss.vector_to_array(index.id_map)]
            index = self._faiss.downcast_index(index.index)
        if type(index).__name__ not in ("IndexFlat", "IndexFlatIP", "IndexFlatL2"):
            raise InputError(
                f"{self.path} is a {type(index).__name__}: it keeps vectors with a loss, or a structure that was built "
                "for the old ones",
                fix="migrate the embeddings that it was built from, and build it again",
            )
        return index, ids

    def _vectors(self) -> np.ndarray:
        """(n, d) float32, the index's own memory."""
        memory: np.ndarray = self._faiss.rev_swig_ptr(self._flat.get_xb(), self.rows * self.dim)
        return memory.reshape(self.rows, self.dim)
