"""Trains the demo's byte-level BPE tokenizer, built like CLIP's own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

CONTEXT_LENGTH = 32
"""Positions of the text tower."""


def tokenizer_from_captions(texts: Iterable[str], merges: int = 500) -> CLIPTokenizer:
    """Tokenizer whose merges come from captions and whose end token has the largest id.

    The end token must have the largest id, and its true value must stand in the config: with any other arrangement the
    two pooling rules in use for CLIP (position of the largest id, position of the end token) disagree.

    Args:
        texts: Captions.
        merges: Upper bound on the number of merges.
    """
    shape = CLIPTokenizer()  # its normaliser and pre-tokenizer, which the result must share
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = shape.backend_tokenizer.normalizer
    trained.pre_tokenizer = shape.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    vocabulary, pairs = _closed_vocabulary(trained, alphabet)
    vocabulary["<|startoftext|>"] = len(vocabulary)
    vocabulary["<|endoftext|>"] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=CONTEXT_LENGTH)


def _closed_vocabulary(trained: Tokenizer, alphabet: list[str]) -> tuple[dict[str, int], Any]:
    """Every byte, alone and at a word's end, then every merged token: no text is out of vocabulary.

    The merges are pairs, which CLIPTokenizer takes but does not declare; hence no exact type for them.
    """
    pairs = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    tokens = alphabet + [f"{letter}</w>" for letter in alphabet]
    known = set(tokens)
    for left, right in pairs:
        if left + right not in known:
            known.add(left + right)
            tokens.append(left + right)
    return {token: number for number, token in enumerate(tokens)}, pairs
