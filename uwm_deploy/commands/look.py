"""Commands that show what is there."""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass
from pathlib import Path

import click

from uwm_deploy.commands.fields import PATH, flag, option, repeated, takes_options
from uwm_deploy.commands.shown import Shown, prints

_THERE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command()
@click.argument("path", type=PATH)
@prints
def inspect(path: Path) -> Shown:
    """Shows what a bundle or one of its files holds.

    PATH is a bundle, a patch or one of the project's JSON files. Its digests are checked first.

    \b
    Example:
      uwm-deploy inspect dist/demo
    """
    from uwm_deploy.report.inspection import describe
    from uwm_deploy.report.plain import plain_lines

    found = describe(path)
    return Shown(data=found, text="\n".join(plain_lines(found)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PageOptions:
    """Where the page goes, and what else it shows."""

    out: Path | None = option("--out", type=PATH, help="HTML file. [default: PATH-report.html]")
    sweep: Path | None = option(
        "--sweep", type=_THERE, help="A sweep.json of the same model, for the picture of the trade-off."
    )
    bench: Path | None = option(
        "--bench", type=_THERE, help="What `bench --json` said of the same bundle, for the latencies."
    )
    compared: Path | None = option(
        "--compared", type=_THERE, help="A compare.json of the same model, for the methods side by side."
    )
    downstream: tuple[Path, ...] = repeated(
        "--downstream", type=_THERE, help="A caption.json or draw.json of the same edit; repeatable."
    )
    opened: bool = flag("--open", help="Show it in the browser.")


@click.command()
@click.argument("path", type=PATH)
@takes_options
@prints
def report(path: Path, asked: PageOptions) -> Shown:
    """Writes a web page about a bundle or a run folder.

    The page about PATH is one self-contained HTML file. This needs the base install only.

    \b
    Example:
      uwm-deploy report dist/demo --open
      uwm-deploy report .uwm/demo --sweep .uwm/demo/sweep/sweep.json --out demo.html
    """
    from uwm_deploy.records.files import write_atomic
    from uwm_deploy.report.evidence import dossier_of
    from uwm_deploy.report.findings import result_words
    from uwm_deploy.report.html import page, place_of

    target = place_of(path, asked.out)
    dossier = dossier_of(path, asked.sweep, asked.bench, asked.compared, asked.downstream)
    write_atomic(target, page(dossier))
    verdict = dossier.verdict
    if asked.opened and not webbrowser.open(target.resolve().as_uri()):
        click.echo(f"no browser here; open {target} yourself", err=True)
    words = result_words(verdict) if verdict else "not judged"
    found = (verdict.result.value, verdict.safer.shown) if verdict else ("not judged", None)
    data = {"report": str(target), "verdict": found[0], "safer": found[1]}
    return Shown(data=data, text=f"report: {target} ({words})")


@click.command()
@prints
def models() -> Shown:
    """Lists the recipes that are shipped.

    Each is shown with its parameters, its licence and the layers that are edited.

    \b
    Example:
      uwm-deploy models
    """
    from uwm_deploy.report.inspection import shipped_recipes
    from uwm_deploy.report.tables.shipped_recipes import print_recipes, recipe_rows

    rows = recipe_rows(shipped_recipes())
    return Shown(data=rows, text=lambda: print_recipes(rows))


@click.command()
@prints
def doctor() -> Shown:
    """Says what this machine can do.

    It says what a build here would run, and what it would mark "not run".

    \b
    Example:
      uwm-deploy doctor --json
    """
    from uwm_deploy.report.doctor import capabilities
    from uwm_deploy.report.tables.capabilities import capability_rows
    from uwm_deploy.report.terminal import print_rows

    rows = capability_rows(capabilities())
    return Shown(data=rows, text=lambda: print_rows(rows))
