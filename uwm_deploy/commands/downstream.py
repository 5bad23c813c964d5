"""Commands that measure what comes out behind an edited tower."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from uwm_deploy.commands.fields import FILE, FOLDER, PATH, SEED, flag, option, repeated, takes_options
from uwm_deploy.commands.group import InOrder
from uwm_deploy.commands.names import DATA_SETS
from uwm_deploy.commands.options import DeviceOptions, MarkdownOptions, TrustOptions
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.report.lines import Whole


@click.group(cls=InOrder)
def downstream() -> None:
    """Measures what comes out behind an edited tower.

    \b
    Example:
      uwm-deploy downstream caption --model llava-1.5-7b-hf --tower .uwm/llava-1.5-7b --on visu-test
      uwm-deploy downstream draw --model stable-diffusion-v1-4 --tower .uwm/clip-vit-l14 --prompts i2p_benchmark.csv
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
        help="Local classifier folder, with the labels that count as flagged; repeatable. For pictures also the word "
        "nudenet. [default labels: nsfw, toxic and the like]",
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
    adapter: Path | None = option(
        "--adapter",
        type=FOLDER,
        help="Adapters of the language model that `train language-adapter` made behind the bundle's safety head.",
    )
    prompt: str | None = option("--prompt", help="What the model is asked. [default: a caption in one sentence]")
    max_new_tokens: int = option(
        "--max-new-tokens", default=64, type=click.IntRange(1, 4096), help="Longest caption, in tokens."
    )
    seed: int = option("--seed", default=0, type=SEED, help="Seed. [default: 0]")
    batch: int = option("--batch", default=8, type=click.IntRange(1, 512), help="Images per call.")


@downstream.command("caption")
@takes_options
@prints
def downstream_caption(
    asked: CaptionOptions,
    behind: BehindOptions,
    judged: JudgeOptions,
    trust: TrustOptions,
    device: DeviceOptions,
    form: MarkdownOptions,
) -> Shown:
    """Captions a set's images behind both towers.

    A LLaVA checkpoint captions the unsafe and the safe images with its own vision tower and with the edited one, at
    temperature 0. Judges say which captions are flagged; ROUGE-L, METEOR and BLEU say what was kept
    (docs/how-to/downstream.md).

    \b
    Example:
      uwm-deploy downstream caption --model llava-1.5-7b-hf --tower .uwm/llava-1.5-7b --on visu-test
      uwm-deploy downstream caption --model llava-1.5-7b-hf --tower dist/llava-1.5-7b --on visu-test \\
          --judge nsfw=nsfw-text-classifier::NSFW --out captions
      uwm-deploy downstream caption --model llava-1.5-7b-hf --tower dist/llava-1.5-7b --adapter adapter --on visu-test
    """
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.study_files import write_downstream
    from uwm_deploy.report.tables.downstream import print_downstream
    from uwm_deploy.studies.downstream.caption import CaptionRequest, caption
    from uwm_deploy.studies.downstream.judges import judges_from
    from uwm_deploy.towers.language_model import PROMPT, Decoding

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
        adapter=asked.adapter,
        public_key=trust.public_key,
        min_bundle_version=trust.min_bundle_version,
        decoding=decoding,
        device=device.device,
    )
    found = caption(request, Reporter())
    write_downstream(found, out)
    return Shown(
        data=found,
        text=lambda: print_downstream(found, markdown=form.markdown),
        notes=(Whole(f"report: {out / 'caption.json'}"),),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawOptions:
    """What is drawn, and how."""

    model: Path = option(
        "--model", required=True, type=FOLDER, help="Folder of a Stable Diffusion pipeline; only read."
    )
    on: str = option("--on", default="", shell_complete=DATA_SETS, help="Set whose texts are drawn: name or TOML file.")
    prompts: Path | None = option(
        "--prompts", type=FILE, help="Instead of a set: CSV or JSON lines in the format of I2P, with its seeds."
    )
    clip: Path | None = option(
        "--clip",
        type=FOLDER,
        help="The CLIP model before the edit, for the CLIP score. [default: the recipe's, if here]",
    )
    steps: int = option("--steps", default=50, type=click.IntRange(1, 1000), help="Steps of the scheduler.")
    guidance: float = option("--guidance", default=7.5, help="Guidance scale, where a prompt has none of its own.")
    size: int | None = option(
        "--size", type=click.IntRange(8, 4096), help="Width and height in pixels. [default: the pipeline's]"
    )
    seed: int = option(
        "--seed",
        default=0,
        type=SEED,
        help="Seed of the first prompt without one; the next has one more.",
    )
    batch: int = option(
        "--batch", default=4, type=click.IntRange(1, 256), help="Pictures per call; each keeps its own seed."
    )
    shown: bool = flag("--show-flagged", help="Do not blur flagged pictures on the contact sheet.")


@downstream.command("draw")
@takes_options
@prints
def downstream_draw(
    asked: DrawOptions,
    behind: BehindOptions,
    judged: JudgeOptions,
    trust: TrustOptions,
    device: DeviceOptions,
    form: MarkdownOptions,
) -> Shown:
    """Draws prompts behind both text towers.

    A Stable Diffusion pipeline draws every prompt with its own text encoder and with the edited one, from the same seed.
    Judges say which pictures are flagged, NudeNet where none is named. The CLIP score of the unedited model says what was
    kept (docs/how-to/downstream.md).

    \b
    Example:
      uwm-deploy downstream draw --model stable-diffusion-v1-4 --tower .uwm/clip-vit-l14 --prompts i2p_benchmark.csv
      uwm-deploy downstream draw --model stable-diffusion-v1-4 --tower .uwm/clip-vit-l14 --on visu-test \\
          --judge nudenet --judge q16=q16-classifier::unsafe
    """
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.study_files import write_downstream
    from uwm_deploy.report.tables.downstream import print_downstream
    from uwm_deploy.studies.downstream.diffusion import Drawing
    from uwm_deploy.studies.downstream.draw import SHEET, DrawRequest, draw
    from uwm_deploy.studies.downstream.judges import judges_from

    named = [text for text in judged.judges if text != "nudenet"]
    out = behind.out or Path(".uwm") / "downstream" / asked.model.resolve().name
    request = DrawRequest(
        model=asked.model,
        tower=behind.tower,
        out=out,
        on=asked.on,
        prompts=asked.prompts,
        judges=judges_from(named, judged.threshold),
        nudenet=not judged.judges or "nudenet" in judged.judges,
        threshold=judged.threshold,
        clip=asked.clip,
        shown=asked.shown,
        public_key=trust.public_key,
        min_bundle_version=trust.min_bundle_version,
        drawing=Drawing(
            steps=asked.steps, guidance=asked.guidance, size=asked.size, seed=asked.seed, batch=asked.batch
        ),
        device=device.device,
    )
    found = draw(request, Reporter())
    write_downstream(found, out)
    return Shown(
        data=found,
        text=lambda: print_downstream(found, markdown=form.markdown),
        notes=(Whole(f"report: {out / 'draw.json'}"), Whole(f"contact sheet: {out / SHEET}")),
    )
