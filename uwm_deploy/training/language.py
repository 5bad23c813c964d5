"""What a language model is taught about images: to decline what is unsafe, and to say of the rest what it always said."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.data.stored_rows import Row, StoredRows
from uwm_deploy.errors import DataError, InputError, RecipeError
from uwm_deploy.recipes.strict_toml import record_from_toml
from uwm_deploy.records.files import digest_of_plain
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.versions import versions
from uwm_deploy.towers.language_model import PROMPT, CaptionModel, Decoding
from uwm_deploy.towers.llava import check_same_features
from uwm_deploy.towers.protocol import LoadedModel
from uwm_deploy.training.safety_head import Features

REFUSAL = "I will not describe this image, because it may show {category}."
CATEGORY = "{category}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageSettings:
    """The language model, and what it is asked and taught.

    Attributes:
        model: LLaVA checkpoint folder.
        question: What it is asked about every image.
        refusal: What it is taught to answer about an unsafe image, with ``{category}`` for the concept.
        weight: Of its loss, beside those of category and level.
        max_new_tokens: Longest of its own answers, which it is to keep about safe images.
        batch: Images per call when it gives them.
    """

    model: Path
    question: str = PROMPT
    refusal: str = REFUSAL
    weight: float = 1.0
    max_new_tokens: int = 64
    batch: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyPrompts:
    """A file of safety prompts.

    Attributes:
        prompts: Category to what a language model is told about it before the question.
    """

    format: int
    prompts: Mapping[str, str]


def prompts_from(file: Path, concepts: Collection[str]) -> dict[str, str]:
    """Reads a file of safety prompts.

    Args:
        file: TOML.
        concepts: Categories that a head of this set will know.

    Raises:
        InputError: If it cannot be read.
        RecipeError: If it is not of that form, or a prompt is empty or for no concept of the set.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as text: {error}", fix="give a TOML file in UTF-8") from error
    found = record_from_toml(SafetyPrompts, text, file.name, docs="docs/how-to/safety-head.md").prompts
    for category, prompt in found.items():
        if category not in concepts:
            known = ", ".join(sorted(concepts))
            raise RecipeError(f"{file.name}: the set has no concept {category!r}", fix=f"it has {known}")
        if not prompt.strip():
            raise RecipeError(f"{file.name}: the prompt of {category!r} is empty", fix="give a text, or leave it out")
    return dict(found)


def opened_for(model: LoadedModel, settings: LanguageSettings, device: str) -> CaptionModel:
    """The language model with its weights frozen.

    Raises:
        InputError: If it does not read the features of this model's image tower, or the texts cannot be used.
    """
    if not settings.question.strip() or not settings.refusal.strip():
        raise InputError("the question or the refusal is empty", fix="give a text")
    check_same_features(model, settings.model)
    decoding = Decoding(prompt=settings.question, max_new_tokens=settings.max_new_tokens, batch=settings.batch)
    found = CaptionModel.open(settings.model, device=device, decoding=decoding)
    found.check_texts([settings.refusal])
    found.module.requires_grad_(False)
    return found


def own_answers(
    model: CaptionModel, source: QuadrupleSource, ids: Sequence[str], work: Path, reporter: Reporter
) -> dict[str, str]:
    """What the language model says of the safe images behind its own tower; those that are on disk are not made again.

    Args:
        model: As it comes, without adapters and safety tokens.
        source: The set.
        ids: Every item that can be read, each with a safe image.
        work: Run folder, which keeps them.
        reporter: Progress.

    Returns:
        Item to answer.

    Raises:
        DataError: If an answer is empty for every image: there is nothing to keep.
    """
    decoding, record = model.decoding, source.record
    depends = {
        "model": model.digest,
        "items": record.ids_digest,
        "read": digest_of_plain(list(ids)),
        "content": record.content_digest,
        "question": decoding.prompt,
        "length": str(decoding.max_new_tokens),
        "dtype": model.dtype,
        "images": model.images,
        **versions(("torch", "transformers")),
    }
    stored, keys = StoredRows(work, "own-answers", depends, ("answer",)), [{"id": item} for item in ids]
    rows, place = stored.read(keys, decoding.batch), {item: row for row, item in enumerate(source.ids)}
    stored.keep(rows)
    with reporter.stage("answers", f"{model.folder.name} about {len(keys)} safe images"):
        for start in range(len(rows), len(keys), decoding.batch):
            part = keys[start : start + decoding.batch]
            images = [source.read(place[key["id"]]).safe_image for key in part]
            said = model.captions([image for image in images if image is not None])
            made: list[Row] = [{**key, "answer": found.text} for key, found in zip(part, said, strict=True)]
            stored.append(made)
            rows += made
            reporter.progress("answers", len(rows), len(keys))
    answers = {row["id"]: row["answer"] for row in rows}
    if not any(answers.values()):
        raise DataError(f"{model.folder.name} says nothing about any safe image", fix="ask another --question")
    return answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """What is to be answered about the images of some pairs.

    Attributes:
        questions: 2n questions, of the n safe and then of the n unsafe images.
        answers: 2n answers, in the same order.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]

    def at(self, places: Sequence[int]) -> tuple[list[str], list[str]]:
        """Questions and answers at some places."""
        return [self.questions[place] for place in places], [self.answers[place] for place in places]


def places_of(rows: Sequence[int], n: int) -> list[int]:
    """Places of the safe and then of the unsafe images of some pairs, among those of n pairs."""
    return [*rows, *(n + row for row in rows)]


def lessons_from(
    features: Features, own: Mapping[str, str], question: str, refusal: str, prompts: Sequence[str] | None = None
) -> Lessons:
    """Safe images keep their own answers, unsafe ones are declined with their concept.

    Args:
        features: n pairs.
        own: Item to what is to be said of its safe image.
        question: What is asked about every image.
        refusal: Of the unsafe images, with ``{category}`` for the concept.
        prompts: 2n safety prompts, those of the safe images first; none before any question when None.
    """
    before = prompts or [""] * (2 * len(features))
    declined = [refusal.replace(CATEGORY, concept) for concept in features.concepts]
    return Lessons(
        questions=tuple(f"{prompt} {question}".strip() for prompt in before),
        answers=(*(own[item] for item in features.ids), *declined),
    )


class FrozenTeacher:
    """A frozen language model from whose answers a head learns its safety tokens; see `Teacher`."""

    def __init__(self, model: CaptionModel, lessons: Lessons, weight: float) -> None:
        self.width = model.width
        self._model, self._lessons, self._weight = model, lessons, weight

    def loss(self, tokens: Tensor, safety: Tensor, rows: Tensor) -> Tensor:
        """See `Teacher.loss`.

        Args:
            tokens: (2b, T, features) float32.
            safety: (2b, m, width) float32, m safety tokens.
            rows: (b,) int64.

        Returns:
            () float32.
        """
        n = len(self._lessons.questions) // 2
        questions, answers = self._lessons.at(places_of(rows.tolist(), n))
        mixed = [True] * len(
            questions
        )  # which images get them is decided by thresholds, which come after this training
        return self._weight * self._model.answer_loss(tokens, safety, mixed, questions, answers).float()
