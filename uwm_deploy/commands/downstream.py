"""Commands that measure what comes out behind an edited tower."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from uwm_deploy.commands.fields import FILE, FOLDER, PATH, option, repeated, takes_options
from uwm_deploy.commands.group import InOrder
from uwm_deploy.commands.names import DATA_SETS
from uwm_deploy.commands.options import DeviceOptions, MarkdownOptions
from uwm_deploy.commands.shown import Shown, prints


@click.group(cls=InOrder)
def downstream() -> None:
    """Measures what comes out behind an edited tower.

    \b
    Example:
      uwm-deploy downstream caption --model llava-1.5-7b-hf --tower .uwm/llava-1.5-7b --on visu-test
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class BehindOptions:
    """Which tower is put into which model, and where the outputs go."""

    tower: Path = option(
        "--tower",
        required=True,
        type=PATH,
        help="Edited tower: run folder, bundle, or a checkpoint such as Safe-CLIP's.",
    )
    out: Path | None = option(
        "--out", type=PATH, help="Folder of outputs and report; a second run goes on. [default: .uwm/downstream/MODEL]"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeOptions:
    """What judges the outputs."""

    judges: tuple[str, ...] = repeated(
        "--judge",
        metavar="NAME=FOLDER[::LABELS]",
        help="Local classifier folder, with the labels that count as flagged; repeatable. [default labels: nsfw, toxic "
        "and the like]",
    )
    threshold: float = option(
        "--threshold", default=0.5, type=click.FloatRange(0, 1), help="Score from which a classifier flags."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionOptions:
    """What is captioned, and how."""

    model: Path = option("--model", required=True, type=FOLDER, help="LLaVA checkpoint folder; only read.")
    on: str = option("--on", required=True, shell_complete=DATA_SETS, help="Set of image pairs: name or TOML file.")
    words: Path | None = option(
        "--words", type=FILE, help="Words that flag a caption, one per line. [default: the list of better-profanity]"
    )
    prompt: str | None = option("--prompt", help="What the model is asked. [default: a caption in one sentence]")
    max_new_tokens: int = option(
        "--max-new-tokens", default=64, type=click.IntRange(1, 4096), help="Longest caption, in tokens."
    )
    seed: int = option("--seed", default=0, help="Seed. [default: 0]")
    batch: int = option("--batch", default=8, type=click.IntRange(1, 512), help="Images per call.")


@downstream.command("caption")
@takes_options
@prints
def downstream_caption(
    asked: CaptionOptions, behind: BehindOptions, judged: JudgeOptions, device: DeviceOptions, form: MarkdownOptions
) -> Shown:
    """Captions a set's images behind both towers.

    A LLaVA checkpoint captions the unsafe and the safe images with its own vision tower and with the edited one, at
    temperature 0. Judges say which captions are flagged; ROUGE-L, METEOR and BLEU say what was kept (docs/downstream.md).

    \b
    Example:
      uwm-deploy downstream caption --model llava-1.5-7b-hf --tower .uwm/llava-1.5-7b --on visu-test
      uwm-deploy downstream caption --model llava-1.5-7b-hf --tower dist/llava-1.5-7b --on visu-test \\
          --judge nsfw=nsfw-text-classifier::NSFW --out captions
    """
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.study_files import write_downstream
    from uwm_deploy.report.tables.downstream import print_downstream
    from uwm_deploy.studies.downstream.caption import CaptionRequest, caption
    from uwm_deploy.studies.downstream.judges import judges_from
    from uwm_deploy.studies.downstream.language_model import PROMPT, Decoding

    out = behind.out or Path(".uwm") / "downstream" / asked.model.resolve().name
    decoding = Decoding(
        prompt=PROMPT if asked.prompt is None else asked.prompt,
        max_new_tokens=asked.max_new_tokens,
        seed=asked.seed,
        batch=asked.batch,
    )
    request = CaptionRequest(
        model=asked.model,
        tower=behind.tower,
        on=asked.on,
        out=out,
        judges=judges_from(judged.judges, judged.threshold),
        words=asked.words,
        decoding=decoding,
        device=device.device,
    )
    found = caption(request, Reporter())
    write_downstream(found, out)
    return Shown(
        data=found,
        text=lambda: print_downstream(found, markdown=form.markdown),
        notes=(f"report: {out / 'caption.json'}",),
    )
