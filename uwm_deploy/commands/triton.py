"""What `uwm-deploy triton` does with its options, and what it prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.pipeline.served import Request, Served, check_served
from uwm_deploy.records.codec import plain_from_record
from uwm_deploy.records.verdict import Check
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.tables.verdict_lines import print_verdict
from uwm_deploy.report.terminal import print_rows
from uwm_deploy.serve.config import Place, ServerSettings
from uwm_deploy.serve.names import FILES
from uwm_deploy.serve.repository import write_backends, write_repository


def run_write(
    bundle: Path,
    repository: Path,
    *,
    variant: str | None,
    place: Place,
    instances: int,
    preparing: int,
    max_delay_ms: float,
    further: tuple[Path, ...],
    public_key: Path | None,
    min_bundle_version: int,
    force: bool,
    as_json: bool,
) -> int:
    """Writes a repository and says what is in it."""

    def opened(path: Path) -> Any:
        return open_bundle(path, public_key=public_key, min_bundle_version=min_bundle_version)

    made = write_repository(
        opened(bundle),
        repository,
        variant=variant,
        settings=ServerSettings(place=place, instances=instances, preparing=preparing, max_delay_ms=max_delay_ms),
        further=[opened(path) for path in further],
        force=force,
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(made), indent=1))
    else:
        plans = f", plans for {', '.join(made.compute_capabilities)}" if made.compute_capabilities else ""
        click.echo(f"{made.repository}: {made.variant}{plans}, version {made.version}, bundle {made.bundle}")
        click.echo(f"models: {', '.join(made.models)}")
    return 0


def run_backends(folder: Path, *, as_json: bool) -> int:
    """Writes the backends and names them."""
    write_backends(folder)
    names = [str(folder / name) for name in FILES]
    click.echo(json.dumps({"backends": names}) if as_json else "\n".join(names))
    return 0


def run_check(url: str, *, as_json: bool, **options: Any) -> int:
    """Checks a server and prints everything that was found."""
    found = check_served(Request(url=url, **options), Reporter())
    if as_json:
        click.echo(json.dumps(plain_from_record(found) | {"exit_code": int(found.exit_code)}, indent=1, sort_keys=True))
    else:
        _print(found)
    return int(found.exit_code)


def _print(found: Served) -> None:
    click.echo(f"{found.server} at {found.url} ({found.protocol}): {found.variant or 'no known variant'}")
    print_rows([_row(check) for check in found.checks])
    if found.counts:
        print_rows(
            [
                {
                    "model": name,
                    "rows": counts.inferences,
                    "calls": counts.executions,
                    "failures": counts.failures,
                    "largest batch": max(counts.batches, default=0),
                }
                for name, counts in found.counts.items()
            ]
        )
    if found.verdict is None:
        click.echo("FAIL: it does not serve the bundle; SafeGround was not run")
        return
    print_verdict(found.verdict)
    changed = {name: count for name, count in found.differ.items() if count}
    told = ", ".join(f"{name} {count}" for name, count in changed.items()) or "none"
    click.echo(f"decisions that differ from the bundle's own evidence: {told}")


def _row(check: Check) -> dict[str, str]:
    measured = "" if check.measured is None or check.direction == "equals" else f"{check.measured:.3g}"
    return {
        "check": check.name,
        "model": check.subject,
        "result": check.result.value,
        "measured": measured,
        "detail": check.detail,
    }
