"""One small build of the demo that several test files look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from uwm_deploy.console import Reporter
from uwm_deploy.pipeline import Outcome, Request, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Request, Outcome]:
    """One small build; tests look at what it left."""
    folder = tmp_path_factory.mktemp("build")
    for name, split, limit in (("cal", "calibration", 96), ("eval", "test", 240)):
        zero_shot = 'zero_shot = ["colour"]\nzero_shot_limit = 210\n' if name == "eval" else ""
        text = f'format = 1\nname = "{name}"\nsource = "demo"\nsplit = "{split}"\nlimit = {limit}\n{zero_shot}'
        (folder / f"{name}.toml").write_text(text)
    request = Request(
        calibration=str(folder / "cal.toml"),
        evaluation=str(folder / "eval.toml"),
        policy=str(_lenient(folder)),
        out=folder / "bundle",
        work=folder / "work",
    )
    return request, run(request, until="package", reporter=Reporter(quiet=True))


def _lenient(folder: Path) -> Path:
    """The shipped policy without the limits on the edit's own effect, which so few items cannot support."""
    text = (ROOT / "ci" / "policy.toml").read_text()
    head, _, rest = text.partition("[[edit]]")
    artifact = rest[rest.index("[[artifact]]") :]
    (folder / "policy.toml").write_text(head + "edit = []\n" + artifact)
    return folder / "policy.toml"
