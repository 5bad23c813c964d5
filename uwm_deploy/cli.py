"""The `uwm-deploy` command: a group that imports a command when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import click

from uwm_deploy import __version__
from uwm_deploy.commands.failure import say, silence_output
from uwm_deploy.commands.help_width import HelpContext
from uwm_deploy.runtime.cores import fit_to_machine
from uwm_deploy.runtime.memory import leave_at_once

SECTIONS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "Start": {
        "init": ("start", "Writes a small project that builds as it stands."),
        "data": ("data", "Makes a data set of your own, or checks one."),
    },
    "Build": {
        "build": ("build", "Makes a proven bundle of a model: the whole pipeline."),
        "score": ("build", "Scores the weights on the calibration set."),
        "fit": ("build", "Sums up what a closed-form step is solved from."),
        "edit": ("build", "Edits the model, and writes the edited model and a patch."),
        "export": ("build", "Exports both towers to ONNX, and checks the edit there."),
        "compile": ("build", "Compiles the graphs for the targets."),
        "verify": ("build", "Measures the original, the edited model and every engine."),
    },
    "Prove": {
        "gate": ("prove", "Judges a report or a bundle by a policy."),
        "attest": ("prove", "Executes what is unproven in a bundle, and adds evidence."),
        "verify-signature": ("prove", "Checks the signature of a bundle, and all its digests."),
        "policy": ("policy", "Writes down what will count, before it is measured."),
        "baseline": ("baseline", "Keeps the accepted report that others are compared with."),
        "selftest": ("prove", "Tests the gate with planted faults and honest rebuilds."),
        "diagnose": ("prove", "Finds the first layer where an artifact goes wrong."),
    },
    "Ship": {
        "package": ("ship", "Writes the bundle, as `build` does."),
        "sign": ("ship", "Signs a bundle that is whole and passes."),
        "refit": ("ship", "Replaces the edit of a bundle without a new build."),
        "save": ("ship", "Saves an edited model for another library."),
        "swap": ("ship", "Puts an edited vision tower back into LLaVA."),
        "triton": ("triton", "Writes a bundle for Triton, or checks a running server."),
        "embed": ("embed", "Embeds images or texts with a bundle."),
        "migrate": ("migrate", "Turns stored embeddings into those of a bundle."),
    },
    "Study": {
        "sweep": ("study", "Measures many edits from one scoring pass."),
        "compare": ("study", "Compares every safety method on one model."),
        "evaluate": ("evaluate", "Measures models and bundles on an evaluation set."),
        "downstream": ("downstream", "Measures what comes out behind an edited tower."),
        "reproduce": ("study", "Measures a published table again, and shows both."),
        "bench": ("bench", "Measures the speed of every variant of a bundle."),
        "train": ("train", "Trains other systems of the field, or safety modules."),
    },
    "Look": {
        "look": ("look", "Serves a page to search with a bundle, before and after."),
        "inspect": ("look", "Shows what a bundle or one of its files holds."),
        "report": ("look", "Writes a web page about a bundle or a run folder."),
        "models": ("look", "Lists the recipes that are shipped."),
        "doctor": ("look", "Says what this machine can do."),
    },
}
"""Section to the commands in it: the module in `commands` that has it, and the first line of its help."""

COMMANDS = {name: place for section in SECTIONS.values() for name, place in section.items()}


class Commands(click.Group):
    """The commands by section; a command's module is imported when the command is asked for."""

    context_class = HelpContext

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
        """Names in the order of the sections."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 -- click's signature
        """The command of a name."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"uwm_deploy.commands.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        command.context_class = HelpContext
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 -- click's
        """One table per section, without importing a command."""
        width = max(map(len, COMMANDS))
        for section, commands in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(width), line) for name, (_, line) in commands.items()])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs a command; what click refuses is said as every other failure is."""
        words = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(words, prog_name, complete_var, standalone_mode=False, **extra)
        except (click.ClickException, click.Abort, OSError) as error:
            if not standalone_mode:
                raise
            if isinstance(error, OSError):
                silence_output()
            sys.exit(say(error, as_json="--json" in words))
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="uwm-deploy")
def cli() -> None:
    """Makes CLIP-like models safer without training.

    It compiles them, and proves that what ships is the edited model. Every verdict says whether the edit is shown to make
    the model safer.

    Results go to stdout (--json for machines), progress and errors to stderr. Exit codes: 0 pass, 1 internal error,
    2 bad input or usage, 3 gate failed, 4 inconclusive, 5 integrity, 6 environment.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; the process ends here."""
    fit_to_machine()
    try:
        cli.main(args=list(arguments) if arguments is not None else None, prog_name="uwm-deploy")
    except SystemExit as ended:
        if sys.modules.get("torch") and isinstance(ended.code, int):
            leave_at_once(ended.code)
        raise


if __name__ == "__main__":
    main()
