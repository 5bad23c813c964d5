"""What every command of the command line shares: order, `--json`, `--debug`, and errors as one line with an exit code."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from uwm_deploy.data.ranks import StoppedError, speaks
from uwm_deploy.errors import ExitCode, UwmError
from uwm_deploy.records.edit import Method, Selection
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting

F = TypeVar("F", bound=Callable[..., Any])

INTERRUPTED = 130


class PipelineGroup(click.Group):
    """Lists commands in the order they were written, which is the order of the pipeline."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
        """Names in pipeline order."""
        return list(self.commands)


def common_options(command: F) -> F:
    """`--json` and `--debug`, and errors as one line with the exit code of their kind."""

    @click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout.")
    @click.option("--debug", is_flag=True, help="Show tracebacks.")
    @functools.wraps(command)
    def wrapped(*args: Any, debug: bool, **kwargs: Any) -> Any:
        try:
            code = command(*args, **kwargs)
        except UwmError as error:
            if debug:
                raise
            if speaks() or not isinstance(error, StoppedError):
                click.echo(f"error: {error}", err=True)
            _leave_group(in_order=isinstance(error, StoppedError))
            sys.exit(int(error.exit_code))
        except BrokenPipeError:  # whoever read has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except KeyboardInterrupt:
            click.echo("interrupted; finished stages are kept, the next run resumes after them", err=True)
            sys.exit(INTERRUPTED)
        except Exception as error:
            if debug:
                raise
            line = " ".join(str(error).split())[:300]
            click.echo(
                f"internal error: {type(error).__name__}: {line}; run again with --debug and report it", err=True
            )
            sys.exit(int(ExitCode.INTERNAL))
        _leave_group(in_order=True)
        sys.exit(int(code or 0))

    return wrapped  # type: ignore[return-value]


MODEL = click.option(
    "--model", default="demo", show_default=True, help="Recipe name, recipe file or checkpoint folder."
)
CHECKPOINT = click.option(
    "--checkpoint",
    default=None,
    type=click.Path(path_type=Path),
    help="Folder with the recipe's weights, instead of the hub.",
)
REVISION = click.option(
    "--revision", default=None, help="Commit of the recipe's hub repository. [default: the recipe's]"
)
CALIBRATION = click.option(
    "--calibration", default=None, help="Calibration set: name or TOML file. [default: the recipe's]"
)
ZERO_SHOT_DATA = click.option(
    "--data",
    default=None,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of the zero-shot sets. [default: $UWM_DEPLOY_DATA/zero-shot]",
)
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
WORKERS = click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(0, 64), help="Decoding processes."
)


def with_options(command: F, options: Sequence[Callable[[F], F]]) -> F:
    """A command with options, in the order in which its help lists them."""
    for option in reversed(options):
        command = option(command)
    return command


def method_options(command: F) -> F:
    """Options that say how entries are found."""
    options = [
        click.option(
            "--method",
            default=None,
            metavar="METHOD[+METHOD]",
            help=f"How the model is edited (docs/methods.md): {', '.join(Method)}; or two steps, such as "
            "uwm+safety-axis. Another method than the recipe's brings its own settings. [default: the recipe's]",
        ),
        click.option(
            "--selection",
            default=None,
            type=click.Choice([selection.value for selection in Selection]),
            help="Top of the score mass, or top share of the entries. [default: the recipe's or the method's]",
        ),
        click.option(
            "--per-concept", is_flag=True, help="One score per concept of the calibration set, selections united."
        ),
    ]
    return with_options(command, options)


def edit_options(command: F) -> F:
    """Options that say which edit is made."""
    options = [
        method_options,
        click.option(
            "--tower",
            "towers",
            multiple=True,
            type=click.Choice([tower.value for tower in TowerName]),
            help="Edit this tower only, as a set of texts or of images alone asks for; repeatable. "
            "[default: the recipe's]",
        ),
        click.option(
            "--keep-mass",
            default=None,
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            help="Share of each layer's score mass (hard selection: of its entries) left as it is, both towers. "
            "[default: the recipe's or the method's]",
        ),
        click.option(
            "--factor",
            default=None,
            type=float,
            help="Multiplier of selected entries. [default: the recipe's or the method's]",
        ),
        click.option(
            "--placement",
            default=None,
            type=click.Choice(["auto", "weights", "embedding"]),
            help="Where a closed-form step goes: into the last linear maps, or as a map behind the embeddings. "
            "[default: the recipe's, else weights where the family can]",
        ),
        *strength_options(),
    ]
    return with_options(command, options)


def strength_options() -> list[Callable[[F], F]]:
    """Options that say how strong a safety axis is."""
    return [
        click.option(
            "--max-retrieval-loss",
            default=None,
            type=click.FloatRange(0, 100),
            metavar="POINTS",
            help="Most points of safe retrieval (R@1) that the choice of the strength may lose. [default: the recipe's, "
            "else 4]",
        ),
        click.option(
            "--axis",
            default=None,
            callback=_axis,
            metavar="SETTING",
            help="Strength of the safety axis instead of a choice, e.g. g=0.7,o=0.5,kappa=0.4,a=1,tau=0.",
        ),
    ]


def _axis(_: click.Context, __: click.Parameter, value: str | None) -> AxisSetting | None:
    from uwm_deploy.edits.methods import axis_from_text

    try:
        return axis_from_text(value) if value is not None else None
    except UwmError as error:
        raise click.BadParameter(str(error)) from error


def _leave_group(*, in_order: bool) -> None:
    """Ends the group, if this process joined one."""
    if group := sys.modules.get("uwm_deploy.data.torchrun"):
        sys.stdout.flush()  # torchrun ends the others as soon as one has ended with an error
        group.leave(in_order=in_order)
