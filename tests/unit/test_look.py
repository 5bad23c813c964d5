"""`uwm-deploy look`: the page, the server, and what a browser makes of it; and the report page in a browser."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from tests.browser import browse, needs_axe, needs_chromium, said_by, violations
from tests.data_sets import png
from tests.small_build import build_small
from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.commands.look import _local_page
from uwm_deploy.pipeline.original import original_sessions
from uwm_deploy.pipeline.search import SHOWN, Search
from uwm_deploy.pipeline.stored import reference_of
from uwm_deploy.records.model import TowerName
from uwm_deploy.report.evidence import dossier_of
from uwm_deploy.report.html import page as report_page
from uwm_deploy.report.search_page import Found, Searched, search_page
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.serve.local_page import local_server

WIDTHS = (390, pytest.param(1280, marks=pytest.mark.slow))
"""Phones; the wide one is one more case of the same kind."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    request, _ = build_small(tmp_path_factory)
    assert request.out is not None
    return request.out


@pytest.fixture(scope="module")
def search(bundle: Path) -> Iterator[Search]:
    with SafeEncoder.open(bundle) as encoder:
        yield Search(open_bundle(bundle), encoder, str(bundle.parent / "eval.toml"))


@pytest.fixture(scope="module")
def address(search: Search) -> Iterator[str]:
    with local_server(_local_page(search), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def _get(address: str, **headers: str) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as answer:
            return answer.status, answer.headers["Content-Security-Policy"], answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, "", ""


def _unsafe_in(page: str, head: str) -> int:
    """Items of a column that are marked unsafe."""
    return page[page.index(f'id="{head}"') :].split("</ol>")[0].count('<li class="unsafe">')


def test_the_model_before_the_edit_is_the_original(search: Search, bundle: Path) -> None:
    """Captions of the set get the embeddings that the original model in PyTorch had, and not the edited one's."""
    kept = open_bundle(bundle)
    original, edited = reference_of(kept, "original"), reference_of(kept)
    assert set(original_sessions(kept)) == set(TowerName)
    for i in range(3):
        texts = search.source.read_texts(i)
        assert texts is not None
        row = search._by_original(TowerName.TEXT, texts[1])
        assert np.abs(row - original.unsafe_text[i]).max() < 1e-5
        assert np.abs(edited.unsafe_text[i] - original.unsafe_text[i]).max() > 1e-3


def test_a_caption_is_ranked_by_both_models(search: Search, bundle: Path) -> None:
    """Both rankings are those of the stored embeddings, and each margin is that of its quadruple."""
    texts = search.source.read_texts(0)
    assert texts is not None
    found = search.by_caption(texts[1])
    for whose, ranking in (("original", found.before), ("edited", found.after)):
        stored = reference_of(open_bundle(bundle), whose)
        safe, unsafe = stored.safe_image @ stored.unsafe_text[0], stored.unsafe_image @ stored.unsafe_text[0]
        both = np.concatenate([safe, unsafe])
        assert len(ranking) == SHOWN
        for item, best in zip(ranking, np.sort(both)[::-1], strict=False):
            assert item.cosine == pytest.approx(best, abs=1e-4)
            assert item.margin == pytest.approx(safe[item.index] - unsafe[item.index], abs=1e-4)


def test_the_page_is_served_to_this_machine_only(address: str) -> None:
    """No script, nothing from elsewhere, no other name of this machine, and no place but its own."""
    status, policy, body = _get(f"{address}?q={quote('a <b>circle</b>')}")
    assert status == 200
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "<script" not in body
    assert "http" not in body
    assert "a &lt;b&gt;circle&lt;/b&gt;" in body
    assert _get(address, Host="evil.example")[0] == 403
    for place in ("picture/999999/safe.png", "picture/0/both.png", "picture/-1/safe.png", "etc/passwd"):
        assert _get(address + place)[0] == 404, place


def test_a_picture_finds_captions_and_a_text_file_a_reason(address: str) -> None:
    """As a form sends them."""
    answers = []
    for content in (png(3), b"not an image"):
        body = (
            b'--x\r\nContent-Disposition: form-data; name="picture"; filename="a.png"\r\n\r\n'
            + content
            + b"\r\n--x--\r\n"
        )
        request = urllib.request.Request(address, body, {"Content-Type": "multipart/form-data; boundary=x"})
        with urllib.request.urlopen(request) as answer:
            answers.append(answer.read().decode())
    assert f"Unsafe among the first {SHOWN} captions for “a.png”" in answers[0]
    assert 'role="alert"' in answers[1]
    assert 'class="sum"' not in answers[1]


@needs_chromium
def test_chromium_draws_the_rankings(address: str, search: Search) -> None:
    """The unsafe items that are marked are those that the search found; every picture has loaded."""
    texts = search.source.read_texts(1)
    assert texts is not None
    found = search.by_caption(texts[1])
    page = browse(f"{address}?q={quote(texts[1])}", 390)
    for head, ranking in (("before", found.before), ("after", found.after)):
        assert _unsafe_in(page, head) == sum(item.side == "unsafe" for item in ranking)
    assert page.count("<img ") == 2 * SHOWN


def _look() -> str:
    """A page with a result and a problem."""
    items = tuple(
        Found(index=i, id=f"item-{i}", concept="fire", side=side, caption="a room", cosine=0.5, margin=0.1 - i)
        for i, side in enumerate(("safe", "unsafe"))
    )
    searched = Searched(query="a room", kind="caption", before=items, after=items[::-1])
    return search_page("demo", "onnxruntime-fp32", ("a room on fire",), searched, "a problem")


@needs_chromium
@needs_axe
@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_nothing_wrong(width: int, bundle: Path, tmp_path: Path) -> None:
    """The page of `look` and the report, with all that is folded open."""
    for name, page in (("look", _look()), ("report", report_page(dossier_of(bundle)))):
        assert violations(page, width, tmp_path) == [], name


@needs_chromium
def test_words_of_a_picture_neither_touch_nor_leave_it_on_a_phone(bundle: Path, tmp_path: Path) -> None:
    """Names, notes and numbers of every chart, by the boxes that a browser draws them in."""
    script = (
        "const found = []; let count = 0;"
        "document.querySelectorAll('svg.chart').forEach(svg => {"
        " const frame = svg.getBoundingClientRect();"
        " const all = [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);"
        " count += all.length;"
        " all.forEach(([a, r], i) => {"
        "  if (r.left < frame.left - 1 || r.right > frame.right + 1) found.push(`${a} leaves the picture`);"
        "  all.slice(i + 1).forEach(([b, s]) => {"
        "   const wide = Math.min(r.right, s.right) - Math.max(r.left, s.left);"
        "   const high = Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top);"
        "   if (wide > 1 && high > 4) found.push(`${a} on ${b}`); }); }); });"
        "done([count, found]);"
    )
    count, found = said_by(script, report_page(dossier_of(bundle)), 390, tmp_path)
    assert count > 100
    assert found == []


@needs_chromium
def test_headings_of_the_heat_map_do_not_touch_on_a_phone(bundle: Path, tmp_path: Path) -> None:
    """A gap between neighbours at 390 pixels, and the page is no wider than the window."""
    script = (
        "const heads = [...document.querySelectorAll('.cell-head')].map(e => e.getBoundingClientRect());"
        "const gaps = heads.slice(1).map((b, i) => b.left > heads[i].left ? b.left - heads[i].right : 99);"
        "done([heads.length, Math.min(...gaps), document.documentElement.scrollWidth]);"
    )
    count, gap, wide = said_by(script, report_page(dossier_of(bundle)), 390, tmp_path)
    assert count >= 9
    assert gap >= 1.5
    assert wide <= 390
