"""The command `train language-adapter`. Heavy imports stay inside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from uwm_deploy.commands.fields import FOLDER, PATH, filled, flag, option, takes_options
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.commands.train_safety_head import (
    AnswerOptions,
    EditedModel,
    TrainingSet,
    pairs_option,
    passes_option,
    rate_option,
    seed_option,
)
from uwm_deploy.commands.until import request_of

_SOME = click.IntRange(min=1)
_ABOVE_0 = click.FloatRange(0, min_open=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFolders:
    """What the adapters are trained behind and on, and where they go."""

    head: Path = option(
        "--safety-head", required=True, type=FOLDER, help="Head that was trained with --language-model; frozen."
    )
    model_folder: Path = option(
        "--language-model",
        required=True,
        type=FOLDER,
        help="LLaVA checkpoint folder that the head was trained with; only read.",
    )
    out: Path = option("--out", required=True, type=PATH, help="Folder for the adapters.")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTrainingOptions:
    """How the adapters are made and trained."""

    rank: int = option("--rank", default=16, type=_SOME, help="Rank of the adapters.")
    alpha: float = option("--alpha", default=32.0, type=_ABOVE_0, help="Adapters count alpha / rank.")
    dropout: float = option("--dropout", default=0.05, type=click.FloatRange(0, 0.9), help="Dropout of what they read.")
    epochs: int = passes_option(3)
    batch: int = pairs_option(4)
    learning_rate: float = rate_option(2e-4)
    seed: int = seed_option()
    decline_missed: bool = flag(
        "--decline-missed",
        help="It also learns to decline unsafe images that the head lets through; it then declines more benign ones.",
    )


@click.command("language-adapter")
@takes_options
@prints
def language_adapter(
    edited: EditedModel,
    trained: TrainingSet,
    folders: AdapterFolders,
    settings: AdapterTrainingOptions,
    answers: AnswerOptions,
) -> Shown:
    """Trains adapters of a language model behind a safety head.

    The second stage of SafeVLM: the head and its safety tokens are frozen, and LoRA on the language model learns to decline
    what is unsafe and to keep its own answers about the rest (docs/how-to/safety-head.md). Options of `build` say which
    edited model. A run that was stopped goes on after its last whole pass.

    \b
    Example:
      uwm-deploy train safety-head --model llava-1.5-7b --language-model llava-1.5-7b-hf --batch 4 --out head
      uwm-deploy build --model llava-1.5-7b --safety-head head
      uwm-deploy train language-adapter --model llava-1.5-7b --safety-head head \\
          --language-model llava-1.5-7b-hf --out adapter
      uwm-deploy downstream caption --model llava-1.5-7b-hf --tower dist/llava-1.5-7b --adapter adapter --on visu-test
    """
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.study_files import write_adapter
    from uwm_deploy.report.tables.safety_heads import print_trained_adapter
    from uwm_deploy.training.language_adapter import AdapterRequest, AdapterSettings, train_language_adapter

    request = filled(
        AdapterRequest,
        trained,
        answers,
        build=request_of(edited),
        head=folders.head,
        model=folders.model_folder,
        out=folders.out,
        settings=filled(AdapterSettings, settings),
    )
    record = train_language_adapter(request, Reporter())
    write_adapter(record, folders.out)
    return Shown(data=record, text=lambda: print_trained_adapter(record, out=folders.out))
