"""The command line: light, in pipeline order, documented, one clear line per error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from uwm_deploy.cli import cli
from uwm_deploy.errors import ExitCode
from uwm_deploy.stages.table import STAGES

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "open_clip", "onnx", "polygraphy", "onnxruntime")


def _loaded_after(code: str) -> set[str]:
    """Top-level modules a fresh interpreter holds after running some code."""
    script = f"import sys\n{code}\nprint(' '.join({{m.split('.')[0] for m in sys.modules}}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["models"], ["data", "make", "--help"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    """Help and the list of models work without the build packages."""
    code = (
        f"from click.testing import CliRunner; from uwm_deploy.cli import cli\nCliRunner().invoke(cli, {arguments!r})"
    )
    assert not _loaded_after(code) & set(HEAVY)


def test_gate_and_package_import_no_torch() -> None:
    """What judges and packages never reaches torch, transformers or onnx."""
    code = "import uwm_deploy.stages.gate.gate, uwm_deploy.bundle.write, uwm_deploy.pipeline.attest, uwm_deploy.pipeline.run"
    assert not _loaded_after(code) & {"torch", "transformers", "open_clip", "onnx", "polygraphy"}


def test_commands_stand_in_pipeline_order() -> None:
    """`--help` lists the stages in the order they run."""
    listed = [name for name in cli.commands if name in STAGES and name not in ("gate", "package")]
    assert listed == [stage for stage in STAGES if stage in listed]


@pytest.mark.parametrize("name", list(cli.commands))
def test_every_command_has_an_example_and_is_documented(name: str) -> None:
    """Help shows an example; docs/cli.md has the command."""
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert f"uwm-deploy {name}" in result.output.split("Example", 1)[1]
    assert f"`{name}`" in (ROOT / "docs" / "cli.md").read_text()


@pytest.mark.parametrize("name", [name for name, group in cli.commands.items() if isinstance(group, click.Group)])
def test_every_command_of_a_group_has_an_example_and_is_documented(name: str) -> None:
    """The same for what stands below another command."""
    for inner in cli.commands[name].commands:
        result = CliRunner().invoke(cli, [name, inner, "--help"])
        assert f"uwm-deploy {name} {inner}" in result.output.split("Example", 1)[1]
        assert f"`{name} {inner}`" in (ROOT / "docs" / "cli.md").read_text()


def test_exit_codes_are_documented() -> None:
    """Every exit code stands in docs/cli.md with its number."""
    text = (ROOT / "docs" / "cli.md").read_text()
    for code in ExitCode:
        assert f"| {int(code)} |" in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["build", "--model", "dmo"], 2, "nearest: demo"),
        (["build", "--model", "demo", "--calibration", "nope"], 2, "no calibration file"),
        (["build", "--model", "demo", "--keep-mass", "1.5"], 2, "range"),
        (["gate", "nowhere"], 2, "nowhere"),
        (["inspect", "nowhere"], 2, "nowhere"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_bad_usage_is_one_line_with_its_exit_code(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown names and paths end with exit code 2 and no traceback."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == code
    assert message in result.output
    assert "Traceback" not in result.output
