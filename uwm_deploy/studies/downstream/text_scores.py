"""ROUGE-L, METEOR and BLEU of captions, each by its reference package; percent, 0 to 100."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from uwm_deploy.studies.downstream.packages import package as _package

ROUGE, METEOR, BLEU = "rouge_l", "meteor", "bleu"
SCORES = (ROUGE, METEOR, BLEU)
_PACKAGES = ("rouge-score", "nltk", "sacrebleu")

WITHOUT_WORDNET = (
    "METEOR matches words that are equal or have the same stem; its third stage, synonyms, needs the WordNet data of nltk, "
    "which is not on this machine"
)


class _NoSynonyms:
    """Stands for WordNet where its data is not there: no word has a synonym."""

    def synsets(self, *_: object) -> list[object]:
        return []


def text_scores(candidates: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """Scores of captions, each against its own reference.

    Args:
        candidates: n captions.
        references: n texts, what each caption should be.

    Returns:
        Score to (n,) float64.

    Raises:
        PrerequisiteError: If a package is not installed.
    """
    measures = (_rouge(), _meteor(), _bleu())
    pairs = list(zip(candidates, references, strict=True))
    return {
        name: np.array([100 * measure(*pair) for pair in pairs], dtype=np.float64)
        for name, measure in zip(SCORES, measures, strict=True)
    }


def corpus_bleu(candidates: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of all captions together, as `sacrebleu` defines it; the mean of single captions is another number.

    Raises:
        PrerequisiteError: If `sacrebleu` is not installed.
    """
    sacrebleu = _package("sacrebleu")
    return float(sacrebleu.corpus_bleu(list(candidates), [list(references)]).score)


def score_versions() -> Mapping[str, str]:
    """Versions of the packages that score."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def wordnet() -> Any:
    """WordNet of `nltk`; None where its data is not on this machine."""
    corpus = _package("nltk.corpus").wordnet
    try:
        corpus.ensure_loaded()
    except LookupError:
        return None
    return corpus


def _rouge() -> Callable[[str, str], float]:
    scorer = _package("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    return lambda candidate, reference: float(scorer.score(reference, candidate)["rougeL"].fmeasure)


def _meteor() -> Callable[[str, str], float]:
    single = _package("nltk.translate.meteor_score").single_meteor_score
    words = _package("nltk.tokenize").WordPunctTokenizer().tokenize  # needs no data
    synonyms = wordnet() or _NoSynonyms()
    return lambda candidate, reference: float(single(words(reference), words(candidate), wordnet=synonyms))


def _bleu() -> Callable[[str, str], float]:
    metric = _package("sacrebleu").metrics.BLEU(effective_order=True)
    return lambda candidate, reference: float(metric.sentence_score(candidate, [reference]).score) / 100
