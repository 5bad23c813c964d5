"""Draws the pictures of README and docs with Chromium and matplotlib.

`python docs/pictures.py dist/demo` draws those of pages, on a build of the demo. With the records of the commands on their
pages it draws the other two as well: `--sweep .uwm/demo/sweep/sweep.json --compare .uwm/demo/compare/report/compare.json`.
Beside them it writes two digests for each: of the code that drew it, and of the picture. A test compares both with what is
there today.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from uwm_deploy.pipeline.closure import sources_of
from uwm_deploy.records.codec import record_from_json
from uwm_deploy.records.studies import MethodComparison, SweepReport
from uwm_deploy.report.drawings import draw_comparison, draw_sweep

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
MADE = IMAGES / "made.json"
DRAWS = {
    "look.png": "uwm_deploy.report.search_page",
    "demo-report.png": "uwm_deploy.report.html",
    "demo-sweep.png": "uwm_deploy.report.drawings",
    "demo-compare.png": "uwm_deploy.report.drawings",
    "pipeline.png": "",
}
"""Picture to the module that draws it; one is drawn by this file."""

STEPS = (
    ("score, fit", "which weights matter for unsafe items"),
    ("edit", "change them, without training"),
    ("export", "two ONNX graphs"),
    ("canaries", "inputs that tell both models apart"),
    ("convert, compile", "engines for each target"),
    ("verify", "run, and count decisions"),
    ("gate", "judge by a policy"),
    ("package", "a bundle with its proof"),
)


def sources_of_picture(name: str) -> list[Path]:
    """What draws a picture: all that its module imports from the room `report`, and the style sheets that these name.

    What lies below gives numbers, and tests of the demo's build compare those with README and docs.
    """
    if not DRAWS[name]:
        return [Path(__file__).resolve()]
    room = ROOT / "uwm_deploy" / "report"
    modules = [path for path in sources_of(DRAWS[name]) if path.is_relative_to(room)]
    text = "".join(path.read_text(encoding="utf-8") for path in modules)
    return modules + [style for style in sorted(room.glob("*.css")) if f'"{style.name}"' in text]


def digests_of(name: str) -> dict[str, str]:
    """Digests of what draws a picture, and of the picture that is there."""
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sources_of_picture(name)))
    return {"code": code.hexdigest(), "picture": hashlib.sha256((IMAGES / name).read_bytes()).hexdigest()}


def pipeline_page() -> str:
    """The architecture as a page: the stages in two rows, and where the bundle goes."""
    boxes = "".join(f"<li><b>{name}</b><span>{what}</span></li>" for name, what in STEPS)
    style = (
        "body{margin:0;padding:24px;width:1116px;font:19px/1.35 sans-serif;background:#fbfaf7;color:#1b1f24}"
        "ol{list-style:none;margin:0;padding:0;display:grid;grid-template-columns:repeat(4,1fr);gap:14px 34px}"
        "li{position:relative;background:#e6f1f8;border-left:6px solid #0f5f8c;border-radius:10px;padding:12px 14px}"
        "li:not(:last-child)::after{content:'\\2192';position:absolute;right:-29px;top:18px;font-size:24px}"
        "b,span{display:block}span{font-size:16px;color:#5a6370}p{margin:18px 0 0}"
    )
    return (
        f"<!doctype html><style>{style}</style><ol>{boxes}</ol><p>Then: <b style='display:inline'>serve</b> with no torch, "
        "<b style='display:inline'>attest</b> on another machine, <b style='display:inline'>gate</b> in CI.</p>"
    )


def shoot(address: str, to: Path, width: int, height: int) -> None:
    """A screenshot by headless Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "chromium is not there"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}"]
    subprocess.run([chromium, *options, f"--screenshot={to}", address], check=True, capture_output=True)


def draw_pages(bundle: Path) -> None:
    """Pictures of pages, by Chromium."""
    tool = str(Path(sys.executable).with_name("uwm-deploy"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pipeline.html").write_text(pipeline_page(), encoding="utf-8")
        shoot((folder / "pipeline.html").as_uri(), IMAGES / "pipeline.png", 1200, 290)
        subprocess.run([tool, "report", str(bundle), "--out", str(folder / "report.html")], check=True)
        shoot((folder / "report.html").as_uri(), IMAGES / "demo-report.png", 1200, 1180)
    with subprocess.Popen([tool, "look", str(bundle), "--port", "0"], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        found = re.match(r"(http://\S+)", server.stderr.readline())
        assert found, "look did not start"
        time.sleep(1)
        shoot(found[1], IMAGES / "look.png", 1200, 1130)
        server.terminate()


def main() -> None:
    """Draws what there is something to draw from, and notes the digests of that."""
    parser = argparse.ArgumentParser(description="Draws the pictures of README and docs.")
    parser.add_argument("bundle", type=Path, nargs="?", help="a build of the demo")
    parser.add_argument("--sweep", type=Path, help="sweep.json of docs/background/demo.md")
    parser.add_argument("--compare", type=Path, help="compare.json of docs/how-to/compare-methods.md")
    given, drawn = parser.parse_args(), []
    if given.bundle:
        draw_pages(given.bundle)
        drawn += ["look.png", "demo-report.png", "pipeline.png"]
    if given.sweep:
        draw_sweep(record_from_json(SweepReport, given.sweep.read_bytes(), where="sweep"), IMAGES / "demo-sweep.png")
        drawn += ["demo-sweep.png"]
    if given.compare:
        record = record_from_json(MethodComparison, given.compare.read_bytes(), where="compare")
        draw_comparison(record, IMAGES / "demo-compare.png")
        drawn += ["demo-compare.png"]
    made = json.loads(MADE.read_text()) | {name: digests_of(name) for name in drawn}
    MADE.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
