"""Commands about Triton: a bundle as its model repository, and what a running server serves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from uwm_deploy.commands.fields import PATH, filled, flag, option, repeated, takes_options
from uwm_deploy.commands.group import InOrder
from uwm_deploy.commands.options import BundleEvaluationOptions, PolicyOptions, TrustOptions, WorkerOptions
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.report.lines import Whole

if TYPE_CHECKING:
    from uwm_deploy.bundle.open import Bundle
    from uwm_deploy.runtime.image import Decode
    from uwm_deploy.serve.config import Place


class DefaultGroup(InOrder):
    """A group whose first command need not be named: `triton BUNDLE REPO` is `triton write BUNDLE REPO`."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Puts the first command before what names none."""
        known = args and (args[0] in self.commands)
        return super().resolve_command(ctx, args if known else [next(iter(self.commands)), *args])


@click.group(cls=DefaultGroup, context_settings={"ignore_unknown_options": True})
def triton() -> None:
    """Writes a bundle for Triton, or checks a running server.

    docs/how-to/triton.md explains both.

    \b
    Example:
      uwm-deploy triton dist/demo models
      uwm-deploy triton check localhost:8001 --bundle dist/demo
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryOptions:
    """What is in the repository, and how the server runs it."""

    variant: str | None = option(
        "--variant", help="Variant to serve. [default: the first proven one that Triton serves]"
    )
    place: str = option(
        "--place",
        default="auto",
        type=click.Choice(["auto", "cpu", "gpu"]),
        help="Where the encoders run; with auto the server decides, with gpu it does not start without one.",
    )
    instances: int = option(
        "--instances", default=1, type=click.IntRange(1, 64), help="Instances of each encoder per device."
    )
    preparing: int = option("--preparing", default=2, type=click.IntRange(1, 256), help="Processes that decode images.")
    max_delay_ms: float = option(
        "--max-delay-ms",
        default=2.0,
        type=click.FloatRange(0, 1000),
        help="Longest time in ms that a row waits for a batch to fill.",
    )
    further: tuple[Path, ...] = repeated(
        "--further",
        type=PATH,
        help="Bundle of the same edited model, with TensorRT plans for another compute capability; repeatable.",
    )
    decode: str = option(
        "--decode",
        default="full",
        type=click.Choice(["full", "scaled"]),
        help="Scaled decodes large JPEGs at a reduced size, where the bundle proves it.",
    )
    force: bool = flag("--force", help="Replace a repository that is there.")


@triton.command("write")
@click.argument("bundle", type=PATH)
@click.argument("repository", type=PATH)
@takes_options
@prints
def triton_write(bundle: Path, repository: Path, asked: RepositoryOptions, trust: TrustOptions) -> Shown:
    """Writes the model repository of a bundle that passes.

    REPOSITORY is the new folder, of BUNDLE. `write` need not be said.

    \b
    Example:
      uwm-deploy triton dist/demo models
      uwm-deploy triton write dist/demo models --variant onnxruntime-fp32 --place cpu --force
    """
    from uwm_deploy.bundle.open import open_bundle
    from uwm_deploy.serve.config import ServerSettings
    from uwm_deploy.serve.repository import write_repository

    def opened(path: Path) -> Bundle:
        return open_bundle(path, public_key=trust.public_key, min_bundle_version=trust.min_bundle_version)

    made = write_repository(
        opened(bundle),
        repository,
        variant=asked.variant,
        settings=ServerSettings(
            place=cast("Place", asked.place),
            instances=asked.instances,
            preparing=asked.preparing,
            max_delay_ms=asked.max_delay_ms,
            decode=cast("Decode", asked.decode),
        ),
        further=[opened(path) for path in asked.further],
        force=asked.force,
    )
    plans = f", plans for {', '.join(made.compute_capabilities)}" if made.compute_capabilities else ""
    text = f"{made.repository}: {made.variant}{plans}, version {made.version}, bundle {made.bundle}"
    return Shown(data=dataclasses.asdict(made), text=(text, f"models: {', '.join(made.models)}"))


@triton.command("backends")
@click.argument("folder", type=PATH)
@prints
def triton_backends(folder: Path) -> Shown:
    """Writes backends in Python for a server without its own.

    They go into FOLDER, in place of those for ONNX Runtime and TensorRT.

    \b
    Example:
      uwm-deploy triton backends tritonserver/backends
    """
    from uwm_deploy.serve.names import FILES
    from uwm_deploy.serve.repository import write_backends

    write_backends(folder)
    names = [str(folder / name) for name in FILES]
    return Shown(data={"backends": names}, text=[Whole(name) for name in names])


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What the server should serve, and how it is asked."""

    bundle: Path = option("--bundle", required=True, type=PATH, help="Bundle that the server should serve.")
    protocol: str = option(
        "--protocol", default="grpc", type=click.Choice(["grpc", "http"]), help="How the server is asked."
    )
    timeout_s: float = option(
        "--timeout", default=60.0, type=click.FloatRange(0.1, 3600), help="Longest time of a call in s."
    )


@triton.command("check")
@click.argument("url")
@takes_options
@prints
def triton_check(
    url: str,
    asked: ServerOptions,
    policy: PolicyOptions,
    measured_on: BundleEvaluationOptions,
    trust: TrustOptions,
    workers: WorkerOptions,
) -> Shown:
    """Checks what a running server serves, and judges it.

    What the server at URL serves is read back; canaries and SafeGround go through it, and the policy judges. Exit codes: 0
    it serves the bundle, and as safely as was proven; 3 or 4 the gate's; 5 it serves something else; 6 it cannot be
    reached.

    \b
    Example:
      uwm-deploy triton check localhost:8001 --bundle dist/demo
      uwm-deploy triton check localhost:8000 --protocol http --bundle dist/demo --json
    """
    from uwm_deploy.pipeline.served import ServedRequest, check_served
    from uwm_deploy.records.codec import plain_from_record
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.tables.served_checks import print_served

    found = check_served(filled(ServedRequest, asked, policy, measured_on, trust, workers, url=url), Reporter())
    code = int(found.exit_code)
    return Shown(data=plain_from_record(found) | {"exit_code": code}, text=lambda: print_served(found), code=code)
