"""One small build of the demo, for the test files that look at what it left."""

from __future__ import annotations

from pathlib import Path

from uwm_deploy.console import Reporter
from uwm_deploy.pipeline import Outcome, Request, run

ROOT = Path(__file__).parents[1]


def build_small(folder: Path) -> tuple[Request, Outcome]:
    """Builds into a folder: 96 quadruples to calibrate, 240 and 210 images to measure."""
    for name, split, limit in (("cal", "calibration", 96), ("eval", "test", 240)):
        zero_shot = 'zero_shot = ["colour"]\nzero_shot_limit = 210\n' if name == "eval" else ""
        text = f'format = 1\nname = "{name}"\nsource = "demo"\nsplit = "{split}"\nlimit = {limit}\n{zero_shot}'
        (folder / f"{name}.toml").write_text(text)
    request = Request(
        calibration=str(folder / "cal.toml"),
        evaluation=str(folder / "eval.toml"),
        policy=str(lenient_policy(folder)),
        out=folder / "bundle",
        work=folder / "work",
    )
    return request, run(request, until="package", reporter=Reporter(quiet=True))


def lenient_policy(folder: Path) -> Path:
    """The shipped policy without the limits on the edit's own effect, which so few items cannot support."""
    text = (ROOT / "ci" / "policy.toml").read_text()
    head, _, rest = text.partition("[[edit]]")
    artifact = rest[rest.index("[[artifact]]") :]
    (folder / "policy.toml").write_text(head + "edit = []\n" + artifact)
    return folder / "policy.toml"
