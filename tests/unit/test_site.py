"""The site of docs/ in a browser: what axe-core finds wrong on its pages, on a phone and on a desk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import needs_axe, needs_chromium, violations
from tests.made_once import made_once

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for page in (ROOT / "docs").rglob("*.md")
)
FULL = "reference/recipes.html"
"""Has long code, wide tables, and links in text and in cells."""

pytestmark = [needs_chromium, needs_axe]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install 'uwm-deploy[docs]'")

    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True, timeout=120)

    return made_once(tmp_path_factory, "site", make)


def _copy(site: Path, page: str, folder: Path) -> tuple[str, Path]:
    """A page's text, and a folder beside which everything that it links lies as it does on the site."""
    for name in ("assets", "theme", "images", "search"):
        (folder / name).symlink_to(site / name)
    place = folder / Path(page).parent
    place.mkdir(exist_ok=True)
    return (site / page).read_text(encoding="utf-8"), place


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(
    "page", [page if page == FULL else pytest.param(page, marks=pytest.mark.slow) for page in PAGES]
)
def test_axe_finds_nothing_wrong_on_a_page(page: str, width: int, site: Path, tmp_path: Path) -> None:
    """Links in text are more than a colour, letters are dark enough, and what scrolls can be reached by keys.

    Slow for all pages but the one that has everything.
    """
    text, place = _copy(site, page, tmp_path)
    assert violations(text, width, place) == []


def test_the_theme_is_what_mends_them(site: Path, tmp_path: Path) -> None:
    """Without its files axe-core finds three kinds of fault, so a page is drawn here as a reader sees it."""
    text, place = _copy(site, FULL, tmp_path)
    assert "theme/site.css" in text
    assert "theme/site.js" in text
    plain = text.replace("theme/site.", "theme/none.")
    rules = {line.split(":")[0] for line in violations(plain, 1280, place)}
    assert {"link-in-text-block", "color-contrast", "scrollable-region-focusable"} <= rules
