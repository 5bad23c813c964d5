"""The `uwm-deploy` command: one subcommand per stage, in pipeline order. Heavy imports stay inside the commands."""

from __future__ import annotations

import functools
import json
import os
import sys
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from uwm_deploy import __version__
from uwm_deploy.commands.command_line import (
    CALIBRATION,
    CHECKPOINT,
    DEVICE,
    MODEL,
    REVISION,
    WORKERS,
    ZERO_SHOT_DATA,
    PipelineGroup,
    common_options,
    edit_options,
    method_options,
    strength_options,
    with_options,
)
from uwm_deploy.commands.train import train
from uwm_deploy.data.ranks import ALONE, Ranks
from uwm_deploy.errors import ExitCode, UwmError
from uwm_deploy.records.graph import Precision
from uwm_deploy.runtime.memory import leave_at_once

if TYPE_CHECKING:
    from uwm_deploy.bundle.sign import Resigning
    from uwm_deploy.records.verdict import Verdict
    from uwm_deploy.towers.formats import Layout

F = TypeVar("F", bound=Callable[..., Any])


@click.group(cls=PipelineGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="uwm-deploy")
def cli() -> None:
    """Makes CLIP-like models safer without training, compiles them, and proves that what ships is the edited model.

    Every verdict says whether the edit is shown to make the model safer.

    Results go to stdout (--json for machines), progress and errors to stderr. Exit codes: 0 pass, 1 internal error,
    2 bad input or usage, 3 gate failed, 4 inconclusive, 5 integrity, 6 environment.
    """


def _batch_pairs(_: click.Context, __: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither auto nor a number of pairs")
    return int(value)


def pipeline_options(command: F) -> F:
    """Options shared by every command that runs a part of the pipeline."""
    options = [
        MODEL,
        CHECKPOINT,
        REVISION,
        click.option(
            "--original",
            default=None,
            type=click.Path(path_type=Path, exists=True, file_okay=False),
            help="For the method trained: folder with the weights that the model was trained from. [default: what its "
            "training record or recipe names]",
        ),
        CALIBRATION,
        click.option("--evaluation", default=None, help="Evaluation set: name or TOML file. [default: the recipe's]"),
        click.option(
            "--target",
            "targets",
            multiple=True,
            type=click.Choice(["onnxruntime", "tensorrt-rtx", "tensorrt"]),
            help="What to compile for; repeatable. [default: the recipe's]",
        ),
        click.option(
            "--precision",
            "precisions",
            multiple=True,
            type=click.Choice([precision.value for precision in Precision]),
            help="Precision (docs/precision.md); repeatable, each is a variant of each target. [default: the recipe's]",
        ),
        click.option(
            "--budget",
            default=None,
            metavar="flips=N%",
            help="For precision auto: share of decisions that may differ. [default: the recipe's, 0.5%]",
        ),
        click.option(
            "--keep-float32",
            "float32",
            multiple=True,
            metavar="PATTERN",
            help="Layers, nodes or operators that stay in float32 in every precision, as a glob; repeatable.",
        ),
        click.option(
            "--refittable",
            is_flag=True,
            help="Engines of TensorRT that `refit` can put another edit into; built where the GPU is.",
        ),
        edit_options,
        click.option(
            "--weights",
            default="checkpoint",
            show_default=True,
            type=click.Choice(["checkpoint", "random"]),
            help="`random`: seeded weights for dry runs; never passes the gate.",
        ),
        click.option("--policy", default="policy", show_default=True, help="Policy: name or TOML file."),
        click.option(
            "--baseline",
            default=None,
            type=click.Path(path_type=Path),
            help="Accepted report to compare with: folder, bundle or file (docs/policy.md); kept in the bundle.",
        ),
        click.option(
            "--out", default=None, type=click.Path(path_type=Path), help="Bundle folder. [default: dist/MODEL]"
        ),
        click.option(
            "--bundle-version",
            default=None,
            type=click.IntRange(min=0),
            help="Release counter, so that older bundles can be refused. [default: the recipe's, 0]",
        ),
        click.option(
            "--safety-head",
            default=None,
            type=click.Path(path_type=Path),
            help="Folder that `train safety-head` wrote: a head in the image graph (docs/safety-head.md).",
        ),
        click.option(
            "--work",
            default=None,
            type=click.Path(path_type=Path),
            help="Run folder, reused by the next run. [default: .uwm/MODEL]",
        ),
        click.option(
            "--device", default="auto", show_default=True, help="Where scoring and editing run: auto, cpu, cuda."
        ),
        WORKERS,
        click.option(
            "--batch-pairs",
            default="auto",
            show_default=True,
            callback=_batch_pairs,
            metavar="auto|N",
            help="Pairs per forward pass while scoring; auto takes what memory holds.",
        ),
        click.option(
            "--score-dtype",
            default="fp32",
            show_default=True,
            type=click.Choice(["fp32", "bf16"]),
            help="Of the forward passes while scoring; with bf16 masks may differ, by how much is printed.",
        ),
    ]
    return common_options(with_options(command, options))


def min_version_option(command: F) -> F:
    """Anti-rollback."""
    return click.option(
        "--min-bundle-version",
        default=0,
        type=click.IntRange(min=0),
        help="Refuse a bundle of an older version (docs/bundle.md).",
    )(command)


def trust_options(command: F) -> F:
    """Whose signature a bundle must have, and how old it may be."""
    key = click.option(
        "--public-key",
        default=None,
        type=click.Path(path_type=Path),
        help="Key in PEM that must have signed the bundle.",
    )
    return key(min_version_option(command))


def signing_options(command: F) -> F:
    """What becomes of the signature of a bundle that is written anew."""
    file = click.Path(path_type=Path)
    options = [
        click.option("--key", default=None, type=file, help="Private key in PEM: sign what is written, if it passes."),
        click.option("--password-file", "password", default=None, type=file, help="File with the key's password."),
        click.option(
            "--public-key",
            default=None,
            type=file,
            help="Key in PEM that must have signed the bundle before. [default: that of --key, if it is signed]",
        ),
        click.option("--unsigned", is_flag=True, help="A signed bundle may become an unsigned one."),
    ]

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from uwm_deploy.bundle.sign import Resigning

        names = ("key", "password", "public_key", "unsigned")
        return command(*args, signing=Resigning(**{name: kwargs.pop(name) for name in names}), **kwargs)

    return with_options(wrapped, options)  # type: ignore[return-value]


def output_options(command: F) -> F:
    """Files and lines for CI systems, beside the table."""
    file = click.Path(path_type=Path, dir_okay=False)
    options = [
        click.option("--junit", default=None, type=file, help="Write JUnit XML: one case per check."),
        click.option("--markdown", default=None, type=file, help="Write Markdown for a pull request."),
        click.option("--sarif", default=None, type=file, help="Write SARIF 2.1.0."),
        click.option(
            "--gitlab",
            default=None,
            type=click.Path(path_type=Path, file_okay=False),
            help="Folder for GitLab's code quality and metrics reports.",
        ),
        click.option("--github", is_flag=True, help="Annotations of GitHub Actions, its step summary and outputs."),
    ]

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        names = ("junit", "markdown", "sarif", "gitlab", "github")
        return command(*args, outputs={name: kwargs.pop(name) for name in names}, **kwargs)

    return with_options(wrapped, options)  # type: ignore[return-value]


def _written(verdict: Verdict, policy: str, outputs: dict[str, Any], as_json: bool) -> None:
    """Everything `output_options` asked for."""
    if any(outputs.values()):
        from uwm_deploy.report.outputs import write_outputs

        for line in write_outputs(verdict, policy, **outputs):
            click.echo(line, err=as_json)  # the runner reads both; the result alone may be on standard output


def _join_group(device: str) -> Ranks:
    """The processes that torchrun started; torch is imported only if it did."""
    if "WORLD_SIZE" not in os.environ:
        return ALONE
    from uwm_deploy.data.torchrun import join

    return join(device)


def _run(until: str, as_json: bool, options: dict[str, Any], outputs: dict[str, Any] | None = None) -> int:
    from uwm_deploy.pipeline.request import Request
    from uwm_deploy.pipeline.run import run
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.tables.run_outcome import outcome_as_plain, print_outcome

    options["targets"] = tuple(options["targets"])
    ranks = _join_group(options["device"])
    outcome = run(Request(**options), until=until, reporter=Reporter(quiet=not ranks.first), ranks=ranks)

    def shown() -> int:
        if as_json:
            click.echo(json.dumps(outcome_as_plain(outcome), indent=1, sort_keys=True))
        else:
            print_outcome(outcome)
        if outcome.verdict:
            _written(outcome.verdict, options["policy"], outputs or {}, as_json)
        return exit_code_of(outcome.verdict.result) if outcome.verdict else 0

    return ranks.first_only(shown)


def exit_code_of(result: str) -> int:
    """Exit code of a verdict: pass 0, inconclusive 4, everything else 3."""
    return int({"pass": ExitCode.PASS, "inconclusive": ExitCode.INCONCLUSIVE}.get(str(result), ExitCode.GATE_FAILED))


@cli.command()
@pipeline_options
@output_options
def build(as_json: bool, outputs: dict[str, Any], **options: Any) -> int:
    """The whole pipeline: from a calibration set to a verified bundle.

    \b
    Example:
      uwm-deploy build --model demo
      uwm-deploy build --model demo --target onnxruntime --max-retrieval-loss 2 --out dist/demo-mild
    """
    return _run("package", as_json, options, outputs)


@cli.command()
@pipeline_options
def score(as_json: bool, **options: Any) -> int:
    """Scores the weights on the calibration set (method: Eq. 8 to 10), or sums for a closed-form step; saves the result.

    \b
    Example:
      uwm-deploy score --model demo
    """
    return _run("fit", as_json, options)


@cli.command()
@pipeline_options
def edit(as_json: bool, **options: Any) -> int:
    """Selects (Eq. 11) and multiplies weights, solves a closed-form step; writes the patch and the edited model.

    Scores and sums are reused, so another --keep-mass, --factor or --max-retrieval-loss needs no second pass over the data.

    \b
    Example:
      uwm-deploy edit --model demo --method uwm --keep-mass 0.97
      uwm-deploy edit --model demo --method safety-axis --max-retrieval-loss 2
    """
    return _run("edit", as_json, options)


@cli.command()
@pipeline_options
def export(as_json: bool, **options: Any) -> int:
    """Exports both edited towers to ONNX and checks that the edit is in the graphs.

    \b
    Example:
      uwm-deploy export --model demo
    """
    return _run("export", as_json, options)


@cli.command()
@pipeline_options
def compile(as_json: bool, **options: Any) -> int:
    """Compiles the graphs for the targets; says which of them this machine can run.

    \b
    Example:
      uwm-deploy compile --model demo --target onnxruntime --target tensorrt-rtx
    """
    return _run("compile", as_json, options)


@cli.command()
@pipeline_options
def verify(as_json: bool, **options: Any) -> int:
    """Measures original, edited and every artifact this machine can execute: numbers, SafeGround, retrieval, zero-shot.

    \b
    Example:
      uwm-deploy verify --model demo --json
    """
    return _run("verify", as_json, options)


@cli.command()
@pipeline_options
def package(as_json: bool, **options: Any) -> int:
    """Writes the bundle (the same as build).

    \b
    Example:
      uwm-deploy package --model demo --out dist/demo
    """
    return _run("package", as_json, options)


@cli.command()
@click.argument("report", type=click.Path(path_type=Path))
@click.option("--policy", default="policy", show_default=True, help="Policy: name or TOML file.")
@click.option(
    "--baseline",
    default=None,
    type=click.Path(path_type=Path),
    help="Accepted report to compare with: folder, bundle or file. [default: the bundle's own]",
)
@trust_options
@common_options
@output_options
def gate(
    report: Path,
    policy: str,
    baseline: Path | None,
    public_key: Path | None,
    min_bundle_version: int,
    as_json: bool,
    outputs: dict[str, Any],
) -> int:
    """Judges REPORT (a verify.json or a bundle) by a policy. Needs the base install only.

    \b
    Example:
      uwm-deploy gate dist/demo --policy ci/policy.toml
      uwm-deploy gate dist/demo --policy strict --baseline ci/baseline --junit gate.xml --github
      uwm-deploy gate dist/demo --public-key key.pub --min-bundle-version 3
    """
    from uwm_deploy.pipeline.judge import judge_file
    from uwm_deploy.report.tables.verdict_lines import print_verdict

    verdict = judge_file(report, policy, baseline, public_key=public_key, min_bundle_version=min_bundle_version)
    if as_json:
        from uwm_deploy.records.codec import json_from_record

        click.echo(json_from_record(verdict), nl=False)
    else:
        print_verdict(verdict)
    _written(verdict, policy, outputs, as_json)
    return exit_code_of(verdict.result)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--policy", default="policy", show_default=True, help="Policy: name or TOML file.")
@click.option("--evaluation", default=None, help="Evaluation set: name or TOML file. [default: the bundle's]")
@WORKERS
@signing_options
@common_options
@output_options
def attest(
    bundle: Path,
    policy: str,
    evaluation: str | None,
    workers: int,
    signing: Resigning,
    as_json: bool,
    outputs: dict[str, Any],
) -> int:
    """Executes the unproven variants of BUNDLE that this machine can run, and adds the evidence.

    A signed bundle is signed again with --key; without it nothing is changed, unless --unsigned is given.

    \b
    Example (on the machine with the GPU):
      uwm-deploy attest dist/demo
      uwm-deploy attest dist/demo --key key.pem
    """
    from uwm_deploy.pipeline.attest import attest_bundle
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.tables.verdict_lines import print_verdict

    verdict = attest_bundle(bundle, policy, evaluation, workers, Reporter(), signing)
    if as_json:
        from uwm_deploy.records.codec import json_from_record

        click.echo(json_from_record(verdict), nl=False)
    else:
        print_verdict(verdict)
    _written(verdict, policy, outputs, as_json)
    return exit_code_of(verdict.result)


@cli.group(cls=PipelineGroup)
def baseline() -> None:
    """Accepts a report as the one that later reports are compared with (`set`), shows it, compares with it.

    \b
    Example:
      uwm-deploy baseline set dist/demo --at ci/baseline --by "A. Name" --reason "release 1.0"
      uwm-deploy baseline compare dist/demo --baseline ci/baseline
    """


@baseline.command("set")
@click.argument("report", type=click.Path(path_type=Path))
@click.option(
    "--at", required=True, type=click.Path(path_type=Path), help="Folder, or a bundle, that the baseline is stored in."
)
@click.option("--by", required=True, help="Who accepts it.")
@click.option("--reason", required=True, help="Why.")
@click.option("--policy", default="policy", show_default=True, help="Policy that the report must pass.")
@signing_options
@common_options
def baseline_set(report: Path, at: Path, by: str, reason: str, policy: str, signing: Resigning, as_json: bool) -> int:
    """Stores REPORT (a verify.json or a bundle) as the baseline, if it passes the policy.

    The keys are for a bundle as the place: a signed one is signed again with --key.

    \b
    Example:
      uwm-deploy baseline set dist/demo --at ci/baseline --by "A. Name" --reason "release 1.0"
    """
    from uwm_deploy.pipeline.accept import accept_baseline
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.findings import verdict_line
    from uwm_deploy.report.tables.verdict_lines import print_verdict

    verdict, digest = accept_baseline(report, policy, at, by=by, reason=reason, reporter=Reporter(), signing=signing)
    if digest is None:
        print_verdict(verdict)
        click.echo("error: nothing was stored: the report does not pass", err=True)
    elif as_json:
        click.echo(json.dumps({"baseline": str(at), "digest": digest}))
    else:
        click.echo(f"baseline: {at}\ndigest: {digest}\n{verdict_line(verdict)}")
    return exit_code_of(verdict.result)


@baseline.command("show")
@click.argument("path", type=click.Path(path_type=Path))
@common_options
def baseline_show(path: Path, as_json: bool) -> int:
    """Shows the baseline at PATH (folder, bundle or file), after checking its digest.

    \b
    Example:
      uwm-deploy baseline show ci/baseline
    """
    from uwm_deploy.pipeline.baseline import read_baseline
    from uwm_deploy.records.codec import json_from_record
    from uwm_deploy.report.tables.baselines import print_baseline

    found, digest = read_baseline(path)
    if as_json:
        click.echo(json_from_record(found), nl=False)
    else:
        print_baseline(found, digest)
    return 0


@baseline.command("compare")
@click.argument("report", type=click.Path(path_type=Path))
@click.option("--baseline", "path", required=True, type=click.Path(path_type=Path), help="Folder, bundle or file.")
@common_options
def baseline_compare(report: Path, path: Path, as_json: bool) -> int:
    """Shows every metric of REPORT beside the baseline's, item by item; judges nothing.

    \b
    Example:
      uwm-deploy baseline compare dist/demo --baseline ci/baseline
    """
    from uwm_deploy.pipeline.baseline import changes, read_baseline
    from uwm_deploy.pipeline.judge import report_at
    from uwm_deploy.records.codec import plain_from_record
    from uwm_deploy.report.tables.baselines import print_changes

    found = changes(report_at(report)[0], read_baseline(path)[0])
    if as_json:
        click.echo(json.dumps([plain_from_record(change) for change in found], indent=1, sort_keys=True))
    else:
        print_changes(found)
    return 0


def strength(command: Any) -> Any:
    """Options of another strength."""
    return with_options(command, strength_options())


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--patch",
    default=None,
    type=click.Path(path_type=Path),
    help="Another edit of the same source model: a patch file with its edit.json beside it, a run folder or a bundle.",
)
@click.option("--revert", is_flag=True, help="Back to the source model's weights; such a bundle never passes.")
@click.option(
    "--keep-mass",
    default=None,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Another selection from the scores in the run folder, both towers.",
)
@strength
@click.option("--out", default=None, type=click.Path(path_type=Path), help="New bundle. [default: in place of BUNDLE]")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    help="Variant to refit; repeatable, the others are left out. [default: all that can be refitted here]",
)
@click.option(
    "--work",
    default=None,
    type=click.Path(path_type=Path),
    help="Run folder with scores and sums, for another keep-mass or strength. [default: .uwm/MODEL]",
)
@click.option(
    "--checkpoint",
    default=None,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with the source weights. [default: the recipe's]",
)
@click.option(
    "--bundle-version",
    default=None,
    type=click.IntRange(min=0),
    help="Release counter of the new bundle. [default: BUNDLE's]",
)
@click.option("--policy", default="policy", show_default=True, help="Policy: name or TOML file.")
@click.option("--evaluation", default=None, help="Evaluation set: name or TOML file. [default: the bundle's]")
@click.option("--device", default="auto", show_default=True, help="Of the reference: auto, cpu or cuda.")
@WORKERS
@signing_options
@common_options
def refit(as_json: bool, **options: Any) -> int:
    """Replaces the edit of BUNDLE in its graphs and engines instead of building again; measures and judges them anew.

    A signed bundle is replaced only with --key, which signs the new one, or with --unsigned.

    \b
    Example:
      uwm-deploy refit dist/demo --max-retrieval-loss 2 --out dist/demo-mild --key key.pem
      uwm-deploy refit dist/demo-mild --patch dist/demo
      uwm-deploy refit dist/demo --revert --out dist/demo-original
    """
    from uwm_deploy.pipeline.refit import refit as run_refit
    from uwm_deploy.pipeline.refitting import RefitRequest
    from uwm_deploy.records.codec import plain_from_record
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.tables.refitted import print_refitted

    made = run_refit(RefitRequest(**options), Reporter())
    if as_json:
        click.echo(json.dumps({**plain_from_record(made), "out": str(made.out)}, indent=1, sort_keys=True))
    else:
        print_refitted(made)
    return exit_code_of(made.verdict.result)


def _print_record(record: Any, as_json: bool) -> int:
    """A small record as it is."""
    from uwm_deploy.records.codec import plain_from_record

    return _print_body(plain_from_record(record), as_json)


def _print_body(body: Any, as_json: bool) -> int:
    """Plain data, for people or as JSON."""
    if as_json:
        click.echo(json.dumps(body, indent=1, sort_keys=True))
    else:
        _print_plain(body)
    return 0


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Private key in PEM, on a NIST curve.")
@click.option(
    "--password-file", "password", default=None, type=click.Path(path_type=Path), help="File with the key's password."
)
@common_options
def sign(bundle: Path, key: Path, password: Path | None, as_json: bool) -> int:
    """Signs BUNDLE, if it is whole and passes: writes model.sig into it, in the OpenSSF model-signing format.

    \b
    Example:
      openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem
      openssl pkey -in key.pem -pubout -out key.pub
      uwm-deploy sign dist/demo --key key.pem
    """
    from uwm_deploy.bundle.sign import sign_bundle

    return _print_record(sign_bundle(bundle, key, password=password), as_json)


@cli.command("verify-signature")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--public-key", required=True, type=click.Path(path_type=Path), help="Key in PEM that must have signed it."
)
@min_version_option
@common_options
def verify_signature(bundle: Path, public_key: Path, min_bundle_version: int, as_json: bool) -> int:
    """Checks signature, every digest, version and verdict of BUNDLE, as the runtime does; exit code 5 if one is wrong.

    \b
    Example:
      uwm-deploy verify-signature dist/demo --public-key key.pub --min-bundle-version 3
    """
    from uwm_deploy.bundle.sign import verify_bundle

    return _print_record(verify_bundle(bundle, public_key, min_bundle_version=min_bundle_version), as_json)


@cli.command()
@click.option("--model", default=None, help="Recipe name, recipe file or checkpoint folder. [default: demo]")
@click.option(
    "--bundle", default=None, type=click.Path(path_type=Path), help="Measure a bundle instead, without torch."
)
@click.option(
    "--compare",
    "compared",
    multiple=True,
    metavar="[LABEL=]MODEL[:METHOD]",
    help="One row of the paper's table: recipe, checkpoint or saved edited folder, or bundle; with a method, edited "
    "first. Repeatable; all rows are measured on the same items.",
)
@click.option("--evaluation", default=None, help="Evaluation set: name or TOML file. [default: the first model's]")
@click.option(
    "--zero-shot",
    multiple=True,
    help="Zero-shot sets: all, none, names apart by commas, or imagefolder:PATH::TEMPLATE; repeatable. "
    "[default: the evaluation set's]",
)
@ZERO_SHOT_DATA
@click.option(
    "--leave-out",
    default=None,
    metavar="CONCEPTS",
    help="Concepts, apart by commas, that edits are made without; only items of these are measured: what an unseen hazard "
    "gets.",
)
@WORKERS
@click.option("--markdown", is_flag=True, help="The paper's table in Markdown.")
@trust_options
@common_options
def evaluate(
    model: str | None,
    bundle: Path | None,
    compared: tuple[str, ...],
    evaluation: str | None,
    zero_shot: tuple[str, ...],
    data: Path | None,
    leave_out: str | None,
    workers: int,
    markdown: bool,
    public_key: Path | None,
    min_bundle_version: int,
    as_json: bool,
) -> int:
    """Measures SafeGround, retrieval and zero-shot of models and bundles on an evaluation set.

    \b
    Example:
      uwm-deploy evaluate --model demo
      uwm-deploy evaluate --bundle dist/demo --evaluation demo-test
      uwm-deploy evaluate --compare CLIP=demo --compare UWM=demo:uwm --zero-shot shape,colour --markdown
      uwm-deploy evaluate --compare none=demo --compare axis=demo:safety-axis --leave-out fire,smoke
    """
    from uwm_deploy.data.zero_shot_suite import names_from
    from uwm_deploy.errors import InputError
    from uwm_deploy.pipeline.request import Request
    from uwm_deploy.records.codec import json_from_record
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.paper_table import plain_comparison
    from uwm_deploy.report.tables.evaluated import print_evaluated
    from uwm_deploy.report.tables.safety_numbers import print_measured
    from uwm_deploy.studies.evaluate import evaluate as measure
    from uwm_deploy.studies.subjects import Subject, concepts_from, subject_from, trusted, without_concepts

    if sum(map(bool, (model, bundle, compared))) > 1:
        raise InputError("--model, --bundle and --compare are given together", fix="name every row with --compare")
    single = str(bundle or model or "demo")
    without = concepts_from(leave_out) if leave_out is not None else ()
    request, ranks = Request(workers=workers, leave_out=without), _join_group("auto")
    subjects = [subject_from(text, request) for text in compared] or [
        Subject(label=single, model=single, bundle=bundle is not None, request=request)
    ]
    subjects = without_concepts(trusted(subjects, public_key, min_bundle_version))
    reports = measure(
        subjects,
        evaluation=evaluation,
        zero_shot=names_from(zero_shot) if zero_shot else None,
        data=data,
        workers=workers,
        reporter=Reporter(quiet=not ranks.first),
        ranks=ranks,
    )
    if not ranks.first:
        return 0
    labels = [subject.label for subject in subjects]
    if as_json:
        one = json_from_record(reports[0]).rstrip()
        table = plain_comparison(labels, reports) | ({"leave_out": list(without)} if without else {})
        many = json.dumps(table, indent=1, sort_keys=True, allow_nan=False)
        click.echo(many if compared else one)
    elif markdown or compared:
        print_evaluated(labels, reports, without=without, markdown=markdown)
    else:
        print_measured(reports[0])
    return 0


@cli.command()
@click.argument("table")
@click.option("--demo", is_flag=True, help="The same code on the demo model and its sets; nothing is published for it.")
@click.option("--calibration", default=None, help="Set that edits are made from. [default: the table's]")
@click.option("--evaluation", default=None, help="Set of quadruples. [default: the table's]")
@ZERO_SHOT_DATA
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    metavar="RECIPE=FOLDER",
    help="Folder with a recipe's weights; repeatable. [default: the hub's cache]",
)
@click.option("--download", is_flag=True, help="Fetch weights that are not on this machine.")
@click.option(
    "--work",
    default=None,
    type=click.Path(path_type=Path),
    help="Folder for the run folders of edits. [default: .uwm/methods]",
)
@DEVICE
@WORKERS
@click.option("--markdown", is_flag=True, help="The table in Markdown.")
@common_options
def reproduce(table: str, checkpoints: tuple[str, ...], markdown: bool, as_json: bool, **options: Any) -> int:
    """Measures a published TABLE (uwm-table-1, uwm-zero-shot, uwm-architectures) and shows both, with the tolerance.

    Rows without data or weights here are "not run". Exit codes: 0 all that ran agrees, 3 something does not, 6 nothing
    could run.

    \b
    Example:
      uwm-deploy reproduce uwm-table-1 --demo
      uwm-deploy reproduce uwm-zero-shot --data /data/zero-shot --download
    """
    from uwm_deploy.records.codec import json_from_record
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.tables.published_numbers import print_reproduction
    from uwm_deploy.studies.reproduce import ReproduceSettings, checkpoints_from
    from uwm_deploy.studies.reproduce import reproduce as measure

    settings = ReproduceSettings(checkpoints=checkpoints_from(checkpoints), **options)
    result = measure(table, settings, Reporter())
    if as_json:
        click.echo(json_from_record(result), nl=False)
    else:
        print_reproduction(result, markdown=markdown)
    return int(result.exit_code)


@cli.command()
@click.option(
    "--methods",
    default="none,uwm,safety-axis,safety-axis@embedding,uwm+safety-axis,leace,gradient-unsafe,gradient-safe-clip,"
    "safe-clip,safer-clip,uwm+safe-clip",
    show_default=True,
    help="Rows, apart by commas: a --method of build, a command of train, an edit on top of that (uwm+safe-clip), or "
    "LABEL=MODEL[:METHOD] as in evaluate. The others are compared with the first.",
)
@MODEL
@CHECKPOINT
@REVISION
@click.option("--calibration", default=None, help="Set that all are made on: name or TOML. [default: the recipe's]")
@click.option("--evaluation", default=None, help="Set that all are measured on. [default: the recipe's]")
@click.option("--zero-shot", multiple=True, help="Zero-shot sets, as in evaluate. [default: the evaluation set's]")
@ZERO_SHOT_DATA
@click.option(
    "--train-option",
    "train_options",
    multiple=True,
    metavar="--NAME=VALUE",
    help="Passed on to every train command, such as --epochs=3; repeatable.",
)
@click.option("--work", default=None, type=click.Path(path_type=Path), help="Models. [default: .uwm/MODEL/compare]")
@click.option("--out", default=None, type=click.Path(path_type=Path), help="Tables, picture. [default: WORK/report]")
@DEVICE
@WORKERS
@common_options
def compare(methods: str, as_json: bool, work: Path | None, out: Path | None, **options: Any) -> int:
    """Every safety method on one model: made, measured on the same items, with intervals and cost (docs/compare-methods.md).

    What was made is reused by the next run. Exit code 6 when a row could not run.

    \b
    Example:
      uwm-deploy compare --model demo
      uwm-deploy compare --methods none,uwm,published=safe-clip-vit-l14 --model clip-vit-l14
    """
    from uwm_deploy.data.zero_shot_suite import names_from
    from uwm_deploy.pipeline.request import Request, resolved_recipe
    from uwm_deploy.records.codec import json_from_record
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.tables.compared_methods import print_compared
    from uwm_deploy.studies.compare import compare as measure
    from uwm_deploy.studies.compare import exit_code_of_comparison
    from uwm_deploy.studies.comparison_rows import CompareRequest, rows_from

    options["zero_shot"] = names_from(options["zero_shot"]) if options["zero_shot"] else None
    work = work or Path(".uwm") / resolved_recipe(Request(model=options["model"])).name / "compare"
    folder = out or work / "report"
    result = measure(CompareRequest(rows=rows_from(methods), work=work, out=folder, **options), Reporter())
    if as_json:
        click.echo(json_from_record(result), nl=False)
    else:
        print_compared(result, folder)
    return exit_code_of_comparison(result)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--variant", "variants", multiple=True, help="Variant to measure; repeatable. [default: all]")
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(min=1),
    help="Rows per call; repeatable. [default: smallest, best and largest of the profile]",
)
@click.option(
    "--seconds",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0, 3600, min_open=True),
    help="For each variant, tower and batch.",
)
@click.option(
    "--torch",
    "reference",
    default="auto",
    show_default=True,
    metavar="auto|none|MODEL",
    help="Reference in PyTorch float32: the bundle's own model if its weights are here, none, or a recipe or folder.",
)
@click.option(
    "--threads",
    default=0,
    type=click.IntRange(min=0),
    help="Of each on the CPU, PyTorch too. [default: what each takes, which may differ; shown]",
)
@click.option("--csv", "table", default=None, type=click.Path(path_type=Path), help="Write the numbers here as CSV.")
@click.option("--picture", default=None, type=click.Path(path_type=Path), help="Write a picture here (PNG).")
@trust_options
@common_options
def bench(
    bundle: Path,
    variants: tuple[str, ...],
    batches: tuple[int, ...],
    seconds: float,
    reference: str,
    threads: int,
    table: Path | None,
    picture: Path | None,
    public_key: Path | None,
    min_bundle_version: int,
    as_json: bool,
) -> int:
    """Latency and throughput of every variant of BUNDLE that this machine can execute, cold and warm, in turns.

    Variants without proof are measured and labelled; what cannot run is "not run". Exit code 6 when nothing can.

    \b
    Example:
      uwm-deploy bench dist/demo
      uwm-deploy bench dist/demo --variant onnxruntime-int8 --batch 1 --batch 32 --csv bench.csv --picture bench.png
    """
    from uwm_deploy.bundle.open import open_bundle
    from uwm_deploy.records.codec import json_from_record
    from uwm_deploy.records.files import write_atomic
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.drawings import draw_bench
    from uwm_deploy.report.tables.latencies import bench_csv, print_bench
    from uwm_deploy.studies import bench as engine_bench

    opened = open_bundle(bundle, allow_failed=True, public_key=public_key, min_bundle_version=min_bundle_version)
    contenders, not_run = engine_bench.contenders_of(opened, variants, threads)
    if reference != "none":
        from uwm_deploy.studies.bench_torch import NAME, torch_contender

        try:
            contenders.insert(0, torch_contender(opened, None if reference == "auto" else reference, threads))
        except UwmError as error:
            if reference != "auto":
                raise
            not_run[NAME] = error.what
    reporter = Reporter()
    with reporter.stage("bench", str(bundle)):
        report = engine_bench.bench(
            opened, contenders, not_run, batches=batches, seconds=seconds, progress=reporter.progress
        )
    if table is not None:
        write_atomic(table, bench_csv(report))
    if picture is not None:
        draw_bench(report, picture)
    if as_json:
        click.echo(json_from_record(report), nl=False)
    else:
        print_bench(report)
    return 0


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--as",
    "layout",
    required=True,
    type=click.Choice(["transformers", "open-clip", "sentence-transformers", "diffusers-text-encoder"]),
    help="Library that is to load it.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New folder.")
@common_options
def save(run: Path, layout: Layout, out: Path, as_json: bool) -> int:
    """Writes the edited model of a RUN folder for another library, after checking that its weights are the edited ones.

    \b
    Example:
      uwm-deploy save .uwm/demo --as open-clip --out demo-open-clip
    """
    from uwm_deploy.pipeline.save import save_as

    return _print_record(save_as(run, layout, out), as_json)


@cli.command()
@click.option(
    "--model", required=True, type=click.Path(path_type=Path), help="Edited model: `edit/model` of a run folder."
)
@click.option("--into", required=True, type=click.Path(path_type=Path), help="LLaVA checkpoint folder; only read.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New folder for the whole checkpoint.")
@common_options
def swap(model: Path, into: Path, out: Path, as_json: bool) -> int:
    """Puts an edited vision tower back into its LLaVA checkpoint; all other tensors stay bit-equal.

    \b
    Example:
      uwm-deploy swap --model .uwm/llava-1.5-7b/edit/model --into llava-1.5-7b-hf --out llava-1.5-7b-safe
    """
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.towers.llava import swap_vision_tower

    reporter = Reporter()
    with reporter.stage("swap", str(out)):
        changed = swap_vision_tower(model, into, out, reporter.progress)
    text = f"{out}: {changed} tensors of the vision tower changed, everything else is as it was"
    click.echo(json.dumps({"out": str(out), "changed_tensors": changed}) if as_json else text)
    return 0


@cli.command()
@MODEL
@CHECKPOINT
@REVISION
@CALIBRATION
@method_options
@click.option("--on", default=None, help="Set that every point is measured on. [default: the calibration set]")
@click.option(
    "--keep-mass",
    "keep_masses",
    default=None,
    help="LOW:HIGH, LOW:HIGH:POINTS, or a list 0.95,0.98. [default: 0.9:0.995]",
)
@click.option(
    "--factor",
    "factors",
    default=None,
    help="List of multipliers, e.g. -1,0,0.5. [default: the recipe's or the method's]",
)
@click.option(
    "--max-retrieval-loss",
    "losses",
    default=None,
    help="For an edit with a safety axis: points of safe R@1 that each choice of the strength may lose. "
    "[default: 1,2,4,8,16]",
)
@click.option(
    "--pick",
    "max_drop",
    default=None,
    type=click.FloatRange(min=0),
    help="Pick the highest GS among the points that lose at most this many points of zero-shot mean.",
)
@click.option("--out", default=None, type=click.Path(path_type=Path), help="Folder. [default: .uwm/MODEL/sweep]")
@click.option("--work", default=None, type=click.Path(path_type=Path), help="Run folder. [default: .uwm/MODEL]")
@DEVICE
@WORKERS
@common_options
def sweep(
    keep_masses: str | None,
    factors: str | None,
    losses: str | None,
    on: str | None,
    max_drop: float | None,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Measures many edits from one scoring pass; writes a table and a picture of safety gained against knowledge kept.

    Points are measured, and one may be picked, on the calibration set or the set of --on, never on the evaluation set.

    \b
    Example:
      uwm-deploy sweep --model demo --method safety-axis --max-retrieval-loss 1,2,4,8
      uwm-deploy sweep --model demo --method uwm --keep-mass 0.9:0.995 --factor -1,0,0.5 --pick 3
      uwm-deploy sweep --model demo --method gradient-unsafe --keep-mass 0.9,0.965
    """
    from uwm_deploy.pipeline.request import Request, resolved_recipe
    from uwm_deploy.records.codec import json_from_record
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.tables.sweep_points import print_sweep
    from uwm_deploy.studies.sweep import sweep as run_sweep
    from uwm_deploy.studies.sweep_values import factors_of, keep_masses_of, losses_of

    request = Request(**options)
    folder = out or (request.work or Path(".uwm") / resolved_recipe(request).name) / "sweep"
    report = run_sweep(
        request,
        keep_masses=keep_masses_of(keep_masses) if keep_masses is not None else None,
        factors=factors_of(factors) if factors is not None else None,
        on=on,
        max_drop=max_drop,
        out=folder,
        reporter=Reporter(),
        losses=losses_of(losses) if losses is not None else None,
    )
    if as_json:
        click.echo(json_from_record(report), nl=False)
    else:
        print_sweep(report, folder)
    return 0


cli.add_command(train)


@cli.group(cls=PipelineGroup)
def data() -> None:
    """Looks through a data set (`check`), or writes a manifest from folders (`make`).

    \b
    Example:
      uwm-deploy data make pictures --out pictures/pairs.jsonl
      uwm-deploy data check pictures/pairs.jsonl --against demo-test
    """


@data.command("check")
@click.argument("name")
@click.option("--against", multiple=True, help="Set that must share no item with it; repeatable.")
@WORKERS
@common_options
def data_check(name: str, against: tuple[str, ...], workers: int, as_json: bool) -> int:
    """Reads every item of the set NAME: a shipped set, a TOML file, or a manifest (.jsonl, .parquet).

    Exit codes: 0 clean; 2 more broken items than the set allows, an id that occurs twice, or an item that a set of
    --against has too.

    \b
    Example:
      uwm-deploy data check visu --against visu-test --workers 8
      uwm-deploy data check pairs.parquet --json
    """
    from uwm_deploy.data.check import Checked, check, opened
    from uwm_deploy.data.table import is_manifest, set_of_manifest
    from uwm_deploy.recipes.resolve import calibration_set_of
    from uwm_deploy.records.codec import json_from_record
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.tables.data_sets import print_data_report

    def set_of(text: str) -> Checked:
        if is_manifest(text):
            return opened(set_of_manifest(Path(text)), base=Path(text).parent)
        spec, _, base = calibration_set_of(text)
        return opened(spec, base=base)

    reporter = Reporter()
    checked, others = set_of(name), [set_of(text) for text in against]
    with reporter.stage("check", name):
        report = check(checked, others, workers=workers, progress=reporter.progress)
    if as_json:
        click.echo(json_from_record(report), nl=False)
    else:
        print_data_report(report)
    return int(ExitCode.BAD_INPUT if report.problems else ExitCode.PASS)


@data.command("make")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Manifest: .jsonl or .parquet; in FOLDER or a folder above it.",
)
@click.option("--embed", is_flag=True, help="Put the images into the Parquet file, which may then lie anywhere.")
@click.option("--drop-unpaired", is_flag=True, help="Leave out items without a counterpart, instead of refusing them.")
@click.option("--force", is_flag=True, help="Replace the manifest if it is there.")
@common_options
def data_make(folder: Path, out: Path, embed: bool, drop_unpaired: bool, force: bool, as_json: bool) -> int:
    """Writes a manifest from FOLDER/CONCEPT/{safe,unsafe}/NAME.jpg with captions beside them in NAME.txt.

    Images alone and captions alone will do; without folders for concepts, FOLDER/{safe,unsafe} is one concept.

    \b
    Example:
      uwm-deploy data make pictures --out pictures/pairs.jsonl
      uwm-deploy data make pictures --out pairs.parquet --embed
    """
    from uwm_deploy.data.make import make_manifest
    from uwm_deploy.records.codec import json_from_record
    from uwm_deploy.report.tables.data_sets import print_made_manifest

    made = make_manifest(folder, out, embed=embed, drop_unpaired=drop_unpaired, force=force)
    if as_json:
        click.echo(json_from_record(made), nl=False)
    else:
        print_made_manifest(made, out)
    return 0


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("source")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder of Parquet parts.")
@click.option("--kind", default="images", show_default=True, type=click.Choice(["images", "texts"]), help="Of SOURCE.")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "float16"]))
@click.option("--key", default="key", show_default=True, help="Column of a table with the items' keys.")
@click.option("--column", default="", help="Column of a table with images or texts. [default: image or text]")
@click.option("--batch", default=256, show_default=True, type=click.IntRange(1, 65536), help="Items at a time.")
@click.option(
    "--part-rows",
    default=8192,
    show_default=True,
    type=click.IntRange(1, 1 << 20),
    help="Rows per part; a killed run loses at most these.",
)
@click.option("--variant", default=None, help="A certain variant. [default: the best one for this machine]")
@click.option(
    "--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]), help="Where it must run."
)
@trust_options
@common_options
def embed(bundle: Path, source: str, as_json: bool, **options: Any) -> int:
    """Embeds SOURCE with a BUNDLE into Parquet parts; the same command goes on after it was stopped.

    SOURCE is a folder, WebDataset shards (a .tar, wildcards or a brace range), or a .parquet or .jsonl table. Broken items
    are rows with an error. Exit code 2 when a whole shard or table is broken: the others are embedded all the same.

    \b
    Example:
      uwm-deploy embed dist/demo pictures --out embeddings
      uwm-deploy embed dist/demo 'shards/{00000..00099}.tar' --out embeddings --dtype float16
      uwm-deploy embed dist/demo captions.parquet --kind texts --key id --column caption --out captions
    """
    from uwm_deploy.commands.embed import run_embed

    return run_embed(bundle, source, as_json=as_json, **options)


@cli.command()
@click.argument("stored", type=click.Path(path_type=Path))
@click.option("--bundle", required=True, type=click.Path(path_type=Path), help="Whose embeddings they are to become.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New store, of the same kind as STORED.")
@click.option(
    "--tower",
    default=None,
    type=click.Choice(["image", "text"]),
    help="Whose embeddings they are, where STORED does not say it.",
)
@click.option(
    "--variant", default=None, help="Whose embeddings they are to lie beside. [default: a proven one in float32]"
)
@click.option(
    "--keys",
    default=None,
    type=click.Path(path_type=Path),
    help="Text file with the key of each row, one per line; those that the bundle's evidence has are compared.",
)
@trust_options
@common_options
def migrate(stored: Path, as_json: bool, **options: Any) -> int:
    """Turns STORED embeddings of the unedited model into those of a bundle, without embedding anything again.

    For bundles that were built with --placement embedding (docs/migrate.md). STORED is the folder that `embed` wrote, a .npy
    file, or a flat index of FAISS. The same command goes on after it was stopped.

    \b
    Example:
      uwm-deploy migrate embeddings --bundle dist/demo --out safe-embeddings
      uwm-deploy migrate images.npy --tower image --keys images.txt --bundle dist/demo --out safe-images.npy
      uwm-deploy migrate images.index --tower image --bundle dist/demo --out safe-images.index
    """
    from uwm_deploy.commands.migrate import run_migrate

    return run_migrate(stored, as_json=as_json, **options)


class DefaultGroup(PipelineGroup):
    """A group whose first command need not be named: `triton BUNDLE REPO` is `triton write BUNDLE REPO`."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Puts the first command before what names none."""
        known = args and (args[0] in self.commands)
        return super().resolve_command(ctx, args if known else [next(iter(self.commands)), *args])


@cli.group(cls=DefaultGroup, context_settings={"ignore_unknown_options": True})
def triton() -> None:
    """Writes a BUNDLE as a model repository for Triton, or checks a running server against it (docs/triton.md).

    \b
    Example:
      uwm-deploy triton dist/demo models
      uwm-deploy triton check localhost:8001 --bundle dist/demo
    """


@triton.command("write")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("repository", type=click.Path(path_type=Path))
@click.option("--variant", default=None, help="A certain variant. [default: the first proven one that Triton serves]")
@click.option(
    "--place",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "gpu"]),
    help="Of the encoders; auto leaves it to the server, gpu makes it refuse to start without one.",
)
@click.option(
    "--instances", default=1, show_default=True, type=click.IntRange(1, 64), help="Of each encoder, per device."
)
@click.option(
    "--preparing", default=2, show_default=True, type=click.IntRange(1, 256), help="Processes that decode images."
)
@click.option(
    "--max-delay-ms",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0, 1000),
    help="Longest wait of a row for others to fill a batch with.",
)
@click.option(
    "--further",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Bundle of the same edited model, with TensorRT plans for another compute capability; repeatable.",
)
@click.option(
    "--public-key", default=None, type=click.Path(path_type=Path), help="Key in PEM that must have signed the bundle."
)
@min_version_option
@click.option("--force", is_flag=True, help="Replace a repository that is there.")
@common_options
def triton_write(bundle: Path, repository: Path, as_json: bool, **options: Any) -> int:
    """Writes the model repository REPOSITORY of a BUNDLE that passes; `write` need not be said.

    \b
    Example:
      uwm-deploy triton dist/demo models
      uwm-deploy triton write dist/demo models --variant onnxruntime-fp32 --place cpu --force
    """
    from uwm_deploy.commands.triton import run_write

    return run_write(bundle, repository, as_json=as_json, **options)


@triton.command("backends")
@click.argument("folder", type=click.Path(path_type=Path))
@common_options
def triton_backends(folder: Path, as_json: bool) -> int:
    """Writes Python-based backends for a server without its own for ONNX Runtime or TensorRT, into FOLDER.

    \b
    Example:
      uwm-deploy triton backends tritonserver/backends
    """
    from uwm_deploy.commands.triton import run_backends

    return run_backends(folder, as_json=as_json)


@triton.command("check")
@click.argument("url")
@click.option("--bundle", required=True, type=click.Path(path_type=Path), help="What it should serve.")
@click.option("--protocol", default="grpc", show_default=True, type=click.Choice(["grpc", "http"]))
@click.option("--policy", default="policy", show_default=True, help="Policy: name or TOML file.")
@click.option("--evaluation", default=None, help="Evaluation set: name or TOML file. [default: the bundle's]")
@click.option(
    "--public-key", default=None, type=click.Path(path_type=Path), help="Key in PEM that must have signed the bundle."
)
@min_version_option
@click.option(
    "--timeout", "timeout_s", default=60.0, show_default=True, type=click.FloatRange(0.1, 3600), help="Of a call, in s."
)
@WORKERS
@common_options
def triton_check(url: str, as_json: bool, **options: Any) -> int:
    """Reads back what the server at URL serves, puts canaries and SafeGround through it, and judges it by the policy.

    Exit codes: 0 it serves the bundle, and as safely as was proven; 3 or 4 the gate's; 5 it serves something else; 6 it
    cannot be reached.

    \b
    Example:
      uwm-deploy triton check localhost:8001 --bundle dist/demo
      uwm-deploy triton check localhost:8000 --protocol http --bundle dist/demo --json
    """
    from uwm_deploy.commands.triton import run_check

    return run_check(url, as_json=as_json, **options)


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", default=None, type=click.Path(path_type=Path), help="HTML file. [default: PATH-report.html]")
@click.option(
    "--sweep",
    "swept",
    default=None,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A sweep.json of the same model, for the picture of the trade-off.",
)
@click.option(
    "--bench",
    "benched",
    default=None,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="What `bench --json` said of the same bundle, for the latencies.",
)
@click.option(
    "--compared",
    default=None,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A compare.json of the same model, for the methods side by side.",
)
@click.option("--open", "opened", is_flag=True, help="Show it in the browser.")
@common_options
def report(
    path: Path,
    out: Path | None,
    swept: Path | None,
    benched: Path | None,
    compared: Path | None,
    opened: bool,
    as_json: bool,
) -> int:
    """Writes one self-contained HTML page about a bundle or a run folder PATH; needs the base install only.

    \b
    Example:
      uwm-deploy report dist/demo --open
      uwm-deploy report .uwm/demo --sweep .uwm/demo/sweep/sweep.json --out demo.html
    """
    from uwm_deploy.records.files import write_atomic
    from uwm_deploy.report.evidence import dossier_of
    from uwm_deploy.report.findings import result_words
    from uwm_deploy.report.html import page, place_of

    target = place_of(path, out)
    dossier = dossier_of(path, swept, benched, compared)
    write_atomic(target, page(dossier))
    verdict = dossier.verdict.result.value if dossier.verdict else "not judged"
    if as_json:
        safer = dossier.verdict.safer.shown if dossier.verdict else None
        click.echo(json.dumps({"report": str(target), "verdict": verdict, "safer": safer}))
    else:
        click.echo(f"report: {target} ({result_words(dossier.verdict) if dossier.verdict else verdict})")
    if opened and not webbrowser.open(target.resolve().as_uri()):
        click.echo(f"no browser here; open {target} yourself", err=True)
    return 0


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--variant", default=None, help="Only this one. [default: those that failed, or all when none did]")
@common_options
def diagnose(path: Path, variant: str | None, as_json: bool) -> int:
    """Names the first layer where an artifact of a bundle or a run folder PATH leaves the exported graph.

    \b
    Example:
      uwm-deploy diagnose .uwm/demo --variant onnxruntime-int8
    """
    from uwm_deploy.records.codec import json_from_record
    from uwm_deploy.report.tables.diagnoses import print_diagnosis
    from uwm_deploy.studies.diagnose import diagnose as look

    found = look(path, variant)
    if as_json:
        click.echo(json_from_record(found), nl=False)
    else:
        print_diagnosis(found)
    return 0


@cli.command()
@click.option(
    "--fault", "names", multiple=True, metavar="NAME", help="Plant only this one; may be repeated. [default: all]"
)
@click.option("--rebuilds", type=click.IntRange(min=0), default=50, show_default=True, help="Honest rebuilds.")
@click.option(
    "--peers/--no-peers", default=True, show_default=True, help="Put the artifacts through other tools' checks."
)
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write the table to this file.")
@common_options
def selftest(names: tuple[str, ...], rebuilds: int, peers: bool, markdown: Path | None, as_json: bool) -> int:
    """Tests the gate: planted faults must fail with the right cause, honest rebuilds of the demo must pass.

    \b
    Example:
      uwm-deploy selftest
      uwm-deploy selftest --fault stale-engine --rebuilds 0
    """
    import tempfile

    from uwm_deploy.records.codec import json_from_record
    from uwm_deploy.records.files import write_atomic
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.terminal import print_rows
    from uwm_deploy.studies.selftest import run

    with tempfile.TemporaryDirectory(prefix="uwm-deploy-") as folder:
        found = run.selftest(Path(folder), names, rebuilds, peers=peers, progress=Reporter().progress)
    if markdown:
        write_atomic(markdown, run.markdown_of(found))
    if as_json:
        click.echo(json_from_record(found), nl=False)
    else:
        print_rows(run.fault_rows(found))
        click.echo("\n".join(run.summary_lines(found)))
    return ExitCode.PASS if run.passed(found) else ExitCode.GATE_FAILED


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@common_options
def inspect(path: Path, as_json: bool) -> int:
    """Shows what a bundle, a patch or one of the project's JSON files holds, after checking its digests.

    \b
    Example:
      uwm-deploy inspect dist/demo
    """
    from uwm_deploy.report.inspection import describe

    return _print_body(describe(path), as_json)


@cli.command()
@common_options
def models(as_json: bool) -> int:
    """Lists the shipped recipes: parameters, licence, edited layers.

    \b
    Example:
      uwm-deploy models
    """
    from uwm_deploy.report.inspection import shipped_recipes
    from uwm_deploy.report.tables.shipped_recipes import recipe_rows
    from uwm_deploy.report.terminal import print_rows

    rows = recipe_rows(shipped_recipes())
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        print_rows(rows)
    return 0


@cli.command()
@common_options
def doctor(as_json: bool) -> int:
    """Says what this machine can do, and what a build here would run or mark "not run".

    \b
    Example:
      uwm-deploy doctor --json
    """
    from uwm_deploy.report.doctor import capabilities
    from uwm_deploy.report.tables.capabilities import capability_rows
    from uwm_deploy.report.terminal import print_rows

    rows = capability_rows(capabilities())
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        print_rows(rows)
    return 0


def _print_plain(body: Any, indent: str = "") -> None:
    for key, value in body.items():
        if isinstance(value, dict):
            click.echo(f"{indent}{key}")
            _print_plain(value, indent + "  ")
        elif isinstance(value, list):
            click.echo(f"{indent}{key}")
            for item in value:
                click.echo(f"{indent}  {item}")
        else:
            click.echo(f"{indent}{key:<24} {value}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; the process ends here."""
    try:
        cli.main(args=list(arguments) if arguments is not None else None, prog_name="uwm-deploy")
    except SystemExit as ended:
        if sys.modules.get("torch") and isinstance(ended.code, int):
            leave_at_once(ended.code)
        raise


if __name__ == "__main__":
    main()
