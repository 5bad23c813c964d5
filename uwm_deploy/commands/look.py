"""Commands that show what is there."""

from __future__ import annotations

import io
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from uwm_deploy.commands.fields import PATH, flag, option, repeated, takes_options
from uwm_deploy.commands.names import DATA_SETS
from uwm_deploy.commands.printed import print_text
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.report.lines import Whole

if TYPE_CHECKING:
    from uwm_deploy.pipeline.search import Search
    from uwm_deploy.serve.local_page import LocalPage

_THERE = click.Path(path_type=Path, exists=True, dir_okay=False, readable=False)


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
    return Shown(data=found, text=plain_lines(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class PageOptions:
    """Where the page goes, and what else it shows."""

    out: Path | None = option("--out", type=PATH, help="HTML file. [default: PATH-report.html]")
    sweep: Path | None = option(
        "--sweep", type=_THERE, help="A sweep.json of the same model, for the picture of the trade-off."
    )
    bench: Path | None = option(
        "--bench", type=_THERE, help="Output of `bench --json` for the same bundle, for the latencies."
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
    from uwm_deploy.records.files import write_output
    from uwm_deploy.report.evidence import dossier_of
    from uwm_deploy.report.findings import result_words
    from uwm_deploy.report.html import page, place_of

    target = place_of(path, asked.out)
    dossier = dossier_of(path, asked.sweep, asked.bench, asked.compared, asked.downstream)
    write_output(target, page(dossier))
    verdict = dossier.verdict
    if asked.opened and not webbrowser.open(target.resolve().as_uri()):
        print_text(f"no browser here; open {target} yourself", err=True)
    words = result_words(verdict) if verdict else "not judged"
    found = (verdict.result.value, verdict.safer.shown) if verdict else ("not judged", None)
    data = {"report": str(target), "verdict": found[0], "safer": found[1]}
    return Shown(data=data, text=Whole(f"report: {target} ({words})"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """Where the page of a search is served."""

    port: int = option("--port", type=click.IntRange(0, 65535), default=8765, help="Port; 0 takes a free one.")
    evaluation: str | None = option(
        "--evaluation", shell_complete=DATA_SETS, help="The bundle's evaluation set, if it lies elsewhere."
    )
    opened: bool = flag("--open", help="Show it in the browser.")


@click.command()
@click.argument("bundle", type=PATH)
@takes_options
@prints
def look(bundle: Path, asked: SearchOptions) -> Shown:
    """Serves a page to search with a bundle, before and after.

    Type a caption or drop a picture. The page ranks the evaluation set by the model before the edit and by the bundle, and
    marks unsafe items. It is served to this machine only, until Ctrl-C.

    \b
    Example:
      uwm-deploy look dist/demo --open
    """
    from uwm_deploy.bundle.open import open_bundle
    from uwm_deploy.errors import InputError
    from uwm_deploy.pipeline.search import Search
    from uwm_deploy.runtime.encoder import SafeEncoder
    from uwm_deploy.serve.local_page import HOST, local_server

    with SafeEncoder.open(bundle) as encoder:
        page = _local_page(Search(open_bundle(bundle), encoder, asked.evaluation))
        try:
            server = local_server(page, asked.port)
        except OSError as error:
            raise InputError(
                f"port {asked.port} cannot be used: {error.strerror}", fix="pass another --port"
            ) from error
        place = f"http://{HOST}:{server.server_address[1]}/"
        print_text(f"{place}  (Ctrl-C ends it)", err=True)
        if asked.opened and not webbrowser.open(place):
            print_text(f"no browser here; open {place} yourself", err=True)
        with server:
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                return Shown(data={"page": place}, text="ended")
    return Shown(data={"page": place})


def _local_page(search: Search) -> LocalPage:
    from functools import partial

    from uwm_deploy.data.files import SIDES
    from uwm_deploy.errors import DataError
    from uwm_deploy.report.search_page import content_policy, search_page
    from uwm_deploy.serve.local_page import LocalPage

    shown = partial(search_page, search.name, search.variant, search.examples)

    def by_caption(caption: str | None) -> str:
        wanted = caption or next(iter(search.examples), None)
        try:
            return shown(search.by_caption(wanted) if wanted else None)
        except DataError as error:
            return shown(problem=error.what)

    def by_picture(content: bytes, name: str) -> str:
        try:
            return shown(search.by_picture(content, name))
        except DataError as error:
            return shown(problem=error.what)

    def picture(index: int, side: str) -> bytes:
        if side not in SIDES or index >= len(search.source):
            raise LookupError(index)
        quadruple = search.source.read(index)
        image = quadruple.safe_image if side == "safe" else quadruple.unsafe_image
        if image is None:
            raise LookupError(index)
        image.save(stream := io.BytesIO(), "PNG")
        return stream.getvalue()

    return LocalPage(by_caption=by_caption, by_picture=by_picture, picture=picture, content_policy=content_policy())


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
