"""What commands that end in a verdict share: how it is shown, what CI systems get, and the exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uwm_deploy.commands.options import OutputOptions, SigningOptions
from uwm_deploy.commands.shown import Shown
from uwm_deploy.errors import ExitCode

if TYPE_CHECKING:
    from uwm_deploy.bundle.sign import Resigning
    from uwm_deploy.records.verdict import Verdict


def exit_code_of(verdict: Verdict) -> int:
    """Exit code of a verdict: pass 0, inconclusive 4, everything else 3."""
    codes = {"pass": ExitCode.PASS, "inconclusive": ExitCode.INCONCLUSIVE}
    return int(codes.get(verdict.result.value, ExitCode.GATE_FAILED))


def ci_lines(verdict: Verdict, policy: str, outputs: OutputOptions | None) -> tuple[str, ...]:
    """Writes what CI systems read, if anything is asked for; the lines that are for the log."""
    if outputs is None or outputs == OutputOptions():
        return ()
    from uwm_deploy.report.outputs import write_outputs

    return tuple(
        write_outputs(
            verdict,
            policy,
            junit=outputs.junit,
            markdown=outputs.markdown,
            sarif=outputs.sarif,
            in_toto=outputs.in_toto,
            oscal=outputs.oscal,
            gitlab=outputs.gitlab,
            github=outputs.github,
        )
    )


def shown_verdict(verdict: Verdict, policy: str, outputs: OutputOptions) -> Shown:
    """A verdict as the result of a command."""
    from uwm_deploy.report.tables.verdict_lines import print_verdict

    lines = ci_lines(verdict, policy, outputs)
    return Shown(data=verdict, text=lambda: print_verdict(verdict), notes=lines, code=exit_code_of(verdict))


def resigning(signing: SigningOptions) -> Resigning:
    """What is to become of a bundle's signature."""
    from uwm_deploy.bundle.sign import Resigning
    from uwm_deploy.commands.fields import filled

    return filled(Resigning, signing)
