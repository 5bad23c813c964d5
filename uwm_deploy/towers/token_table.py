"""Whether a tokenizer's ids have rows in the table of embeddings: an id without one stops the text tower."""

from __future__ import annotations

import dataclasses

from tokenizers import Tokenizer
from torch import nn

from uwm_deploy.errors import InputError
from uwm_deploy.records.model import TextSpec
from uwm_deploy.towers.protocol import LoadedParts


def with_vocabulary(parts: LoadedParts, name: str) -> TextSpec:
    """The text spec with the number of rows, against which every caption's ids are checked before they reach a tower.

    A token that somebody added and gave no row is let pass: it is in no ordinary caption, and one that has it is an error by
    itself.

    Args:
        parts: A checkpoint, as its adapter loads it.
        name: Of the model, for the message.

    Raises:
        InputError: If a word of the tokenizer's own vocabulary, or what frames and pads every caption, has no row.
    """
    rows = _rows_of(parts.text_tower.graph_module())
    if not rows:
        return parts.text
    tokenizer = Tokenizer.from_str(parts.tokenizer_json.decode())
    framing = {parts.text.eos_id, parts.text.pad_id, *tokenizer.encode("").ids}
    added = set(tokenizer.get_added_tokens_decoder()) - framing
    used = framing | (set(tokenizer.get_vocab(with_added_tokens=False).values()) - added)
    beyond = sorted(number for number in used if number >= rows)
    if beyond:
        raise InputError(
            f"{name}: the text tower has {rows} embeddings, and the tokenizer {len(beyond)} tokens beyond them, first "
            f"{tokenizer.id_to_token(beyond[0])!r} with id {beyond[0]}",
            fix="use the tokenizer that belongs to the checkpoint",
        )
    return dataclasses.replace(parts.text, vocabulary=rows)


def _rows_of(graph: nn.Module) -> int:
    """Rows of the table that ids are looked up in; 0 where there is none of the usual name."""
    tables = (part for name, part in graph.named_modules() if name.split(".")[-1] == "token_embedding")
    return next((int(table.num_embeddings) for table in tables if isinstance(table, nn.Embedding)), 0)
