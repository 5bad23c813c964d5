"""The command `train safety-head`. Heavy imports stay inside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uwm_deploy.commands.fields import FILE, FOLDER, PATH, SEED, filled, option, takes_options
from uwm_deploy.commands.names import DATA_SETS
from uwm_deploy.commands.options import (
    DataOptions,
    DeviceOptions,
    EntryOptions,
    MethodOptions,
    ModelOptions,
    SelectionOptions,
    StrengthOptions,
    TowerOptions,
    WorkerOptions,
    WorkOptions,
)
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.commands.until import request_of

if TYPE_CHECKING:
    from uwm_deploy.training.language import LanguageSettings

_RATE = click.FloatRange(0, 50, min_open=True)
_SOME = click.IntRange(min=1)


def passes_option(default: int) -> Any:
    """How often a training goes over its pairs."""
    return option("--epochs", default=default, type=_SOME, help="Passes over the pairs.")


def pairs_option(default: int) -> Any:
    """Size of a step."""
    return option("--batch", default=default, type=_SOME, help="Pairs per step.")


def rate_option(default: float) -> Any:
    """Learning rate."""
    above_0 = click.FloatRange(0, min_open=True)
    return option("--rate", default=default, type=above_0, help="Learning rate of AdamW at its peak.")


def seed_option() -> Any:
    """Seed of a training."""
    told = "Seed of all that is drawn at random."
    return option("--seed", default=0, show_default=True, type=SEED, help=told)


@dataclass(frozen=True, slots=True, kw_only=True)
class EditedModel:
    """Which edited model the head is for: what `build` takes, too."""

    model: ModelOptions
    data: DataOptions
    method: MethodOptions
    selection: SelectionOptions
    towers: TowerOptions
    entries: EntryOptions
    strength: StrengthOptions
    work: WorkOptions
    device: DeviceOptions
    workers: WorkerOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """What is trained on."""

    train_on: str | None = option(
        "--train-on", shell_complete=DATA_SETS, help="Set to train on. [default: the calibration set]"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadData:
    """What the head is calibrated on, and where it goes."""

    out: Path = option("--out", required=True, type=PATH, help="Folder for the head.")
    validation: str | None = option(
        "--validation",
        shell_complete=DATA_SETS,
        help="Set that temperatures and thresholds are from. [default: every fifth pair of the other one]",
    )
    texts: Path | None = option(
        "--safe-texts",
        type=FILE,
        help="Texts to redirect to, one a line; they go into the bundle. [default: safe captions of the set]",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRates:
    """Percent of safe images that each action is for."""

    flag: float = option("--flag", default=10.0, type=_RATE, help="Percent of safe images to flag.")
    redirect: float = option(
        "--redirect",
        default=5.0,
        type=_RATE,
        help="Percent of safe images to redirect; of as many a language model gets the safety prompt and tokens.",
    )
    block: float = option("--block", default=1.0, type=_RATE, help="Percent of safe images to block.")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTrainingOptions:
    """How the head is made and trained."""

    epochs: int = passes_option(20)
    batch: int = pairs_option(64)
    learning_rate: float = rate_option(2e-3)
    width: int = option("--width", default=64, type=_SOME, help="Width of the safety projector.")
    tokens: int = option("--tokens", default=8, type=_SOME, help="Learned safety tokens.")
    heads: int = option("--heads", default=4, type=_SOME, help="Heads of the attention.")
    seed: int = seed_option()


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageOptions:
    """The language model behind the tower."""

    language_model: Path | None = option(
        "--language-model",
        type=FOLDER,
        help="LLaVA checkpoint folder, only read and frozen: the head gets safety tokens for its input.",
    )
    question: str | None = option(
        "--question", help="What it is asked about every image. [default: a caption in one sentence]"
    )
    refusal: str | None = option(
        "--refusal", help="What it answers about an unsafe image; {category} is its concept. [default: it declines]"
    )
    weight: float = option(
        "--language-weight",
        default=1.0,
        type=click.FloatRange(0, min_open=True),
        help="Weight of the loss of its answers, beside that of the head.",
    )
    prompts: Path | None = option(
        "--safety-prompts",
        type=FILE,
        help="TOML with what a language model is told about a category, instead of the usual words.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """The language model's own answers about safe images, which it keeps."""

    max_new_tokens: int = option(
        "--max-new-tokens", default=64, type=click.IntRange(1, 4096), help="Its longest own answer, in tokens."
    )
    answer_batch: int = option("--answer-batch", default=8, type=_SOME, help="Images per call for its own answers.")


@click.command("safety-head")
@takes_options
@prints
def safety_head(
    edited: EditedModel,
    trained: TrainingSet,
    data: HeadData,
    rates: HeadRates,
    settings: HeadTrainingOptions,
    language: LanguageOptions,
    answers: AnswerOptions,
) -> Shown:
    """Trains a safety head on the edited image tower.

    The tower stays as it is (docs/how-to/safety-head.md). Options of `build` say which edited model: give both the
    same ones. Tokens are kept in the run folder, so another run takes seconds; one that
    was interrupted begins again after them. With --language-model it goes on after the last whole pass.

    \b
    Example:
      uwm-deploy train safety-head --model demo --calibration demo --out head
      uwm-deploy build --model demo --safety-head head
      uwm-deploy train safety-head --model llava-1.5-7b --language-model llava-1.5-7b-hf --batch 4 --out head
    """
    from uwm_deploy.records.codec import plain_from_record
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.tables.safety_heads import print_trained_head
    from uwm_deploy.safeground.risk import rates_of
    from uwm_deploy.training.safety_head import HeadSettings
    from uwm_deploy.training.safety_head_folder import HeadRequest, train_safety_head

    request = filled(
        HeadRequest,
        trained,
        data,
        build=request_of(edited),
        settings=filled(HeadSettings, settings),
        rates=rates_of(*(percent / 100 for percent in (rates.flag, rates.redirect, rates.block))),
        language=_language_of(language, answers),
        prompts=language.prompts,
    )
    made = train_safety_head(request, Reporter())
    found = {name: plain_from_record(getattr(made, name)) for name in ("head", "validation")}
    return Shown(
        data=found | {"out": str(made.out)},
        text=lambda: print_trained_head(made.head, made.validation, texts=made.texts, out=made.out),
    )


def _language_of(asked: LanguageOptions, answers: AnswerOptions) -> LanguageSettings | None:
    """The language model that was asked for.

    Raises:
        InputError: If an option has no effect without one.
    """
    from uwm_deploy.errors import InputError
    from uwm_deploy.towers.language_model import PROMPT
    from uwm_deploy.training.language import REFUSAL, LanguageSettings

    if asked.language_model is None:
        if asked.question or asked.refusal:
            raise InputError("--question and --refusal have no effect without a language model", fix="--language-model")
        return None
    return LanguageSettings(
        model=asked.language_model,
        question=PROMPT if asked.question is None else asked.question,
        refusal=REFUSAL if asked.refusal is None else asked.refusal,
        weight=asked.weight,
        max_new_tokens=answers.max_new_tokens,
        batch=answers.answer_batch,
    )
