"""Headless Chromium, and axe-core in it: what a page is once a browser has drawn it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
AXE = Path(sys.prefix) / "axe" / "node_modules" / "axe-core" / "axe.min.js"
"""Where `.ci/run` puts it."""

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not there: apt-get install chromium")
needs_axe = pytest.mark.skipif(
    not AXE.is_file(), reason="axe-core is not there: npm install --prefix .venv/axe axe-core@4"
)


def browse(address: str, width: int, *more: str) -> str:
    """What Chromium prints of a page.

    Args:
        address: Of the page.
        width: Of the window, pixels.
        more: Options, by default those that print the document once its scripts have run.
    """
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},1000",
    ]
    done = subprocess.run(
        [*command, *(more or ("--virtual-time-budget=20000", "--dump-dom")), address],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


def said_by(script: str, page: str, width: int, folder: Path, *libraries: Path) -> Any:
    """What a script, which calls `done(value)`, finds on a page; all that is folded is open.

    The page's own policy would forbid the script, so it is left out of the copy that is drawn. It is drawn in a frame,
    because Chromium has no window of less than 500 pixels.
    """
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    scripts = "".join(f"<script>{library.read_text(encoding='utf-8')}</script>" for library in libraries)
    script = (
        "document.querySelectorAll('details').forEach(d => d.open = true);"
        "const done = value => parent.postMessage(JSON.stringify([innerWidth, value]), '*');"
        f"window.addEventListener('load', () => {{ {script} }});"
    )
    (copy := folder / "page.html").write_text(page.replace("</body>", f"{scripts}<script>{script}</script></body>"))
    (frame := folder / "frame.html").write_text(
        "<!doctype html><body style='margin:0'><pre id=said></pre><script>addEventListener('message', message => {"
        " document.getElementById('said').textContent = message.data; });</script>"
        f"<iframe src='{copy.as_uri()}' style='border:0;width:{width}px;height:1000px'></iframe>"
    )
    found = re.search(r'<pre id="said">(.+?)</pre>', browse(frame.as_uri(), max(width, 500)), re.DOTALL)
    assert found is not None, "the script did not end"
    drawn, value = json.loads(html.unescape(found[1]))
    assert drawn == width
    return value


def violations(page: str, width: int, folder: Path) -> list[str]:
    """What axe-core finds wrong, a line per rule and place."""
    script = (
        "axe.run(document, {resultTypes: ['violations']}).then(found => done(found.violations.flatMap("
        "v => v.nodes.map(n => v.id + ': ' + n.target.join(' ')))));"
    )
    lines: list[str] = said_by(script, page, width, folder, AXE)
    return lines
