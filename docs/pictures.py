"""Draws the pictures of README and docs: `python docs/pictures.py dist/demo`, on a build of the demo, with Chromium.

Beside them it writes the digest of the code that drew each. A test compares it with the code of today.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
MADE = IMAGES / "made.json"
SOURCES = {
    "look.png": ("uwm_deploy/report/search_page.py", "uwm_deploy/report/search.css", "uwm_deploy/report/page.css"),
    "demo-report.png": ("uwm_deploy/report/html.py", "uwm_deploy/report/page.css", "uwm_deploy/report/charts.py"),
    "pipeline.png": ("docs/pictures.py",),
}
"""Picture to what draws it."""

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


def digest_of_sources(name: str) -> str:
    """Digest of what draws a picture."""
    return hashlib.sha256(b"".join((ROOT / source).read_bytes() for source in SOURCES[name])).hexdigest()


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


def main(bundle: Path) -> None:
    """Draws all of them."""
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
    MADE.write_text(json.dumps({name: digest_of_sources(name) for name in SOURCES}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
