"""A page for this machine only: a small server on the loopback address, without cookies, scripts or files."""

from __future__ import annotations

import email
import email.policy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from uwm_deploy.errors import UwmError
from uwm_deploy.runtime.image import MAX_BYTES

HOST = "127.0.0.1"
_NAMES = (HOST, "localhost")
_FORM_BYTES = 64 * 1024
"""What a form has beside the picture in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPage:
    """What the server shows.

    Attributes:
        by_caption: The page for a caption; the first page for None.
        by_picture: The page for an encoded picture and its name.
        picture: A PNG file by row and side; raises LookupError when there is none.
        content_policy: What a browser may load.
    """

    by_caption: Callable[[str | None], str]
    by_picture: Callable[[bytes, str], str]
    picture: Callable[[int, str], bytes]
    content_policy: str


def local_server(page: LocalPage, port: int) -> ThreadingHTTPServer:
    """The server; `serve_forever` runs it.

    Args:
        page: What it shows.
        port: 0 takes a free one.

    Raises:
        OSError: If the port is taken.
    """

    class Handler(_Handler):
        shown = page
        one_at_a_time = threading.Lock()

    return ThreadingHTTPServer((HOST, port), Handler)


class _Handler(BaseHTTPRequestHandler):
    shown: LocalPage
    one_at_a_time: threading.Lock
    server_version = "uwm-deploy"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:
        """The page, or one of its pictures."""
        if not self._asked_here():
            return
        place = urlsplit(self.path)
        match place.path.split("/"):
            case ["", ""]:
                query = parse_qs(place.query).get("q", [""])[0].strip()
                self._page(lambda: self.shown.by_caption(query or None))
            case ["", "picture", row, side] if row.isascii() and row.isdigit() and len(row) < 10:
                self._picture(int(row), side.removesuffix(".png"))
            case _:
                self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        """The page for a picture."""
        if not self._asked_here():
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            self.send_error(HTTPStatus.LENGTH_REQUIRED)
        elif int(length) > MAX_BYTES + _FORM_BYTES:
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        elif (found := _file_in(self.headers.get("Content-Type", ""), self.rfile.read(int(length)))) is None:
            self.send_error(HTTPStatus.BAD_REQUEST, "no picture in the form")
        else:
            self._page(lambda: self.shown.by_picture(*found))

    def _asked_here(self) -> bool:
        """Whether the request names this machine: another page must not read this one under a name of its own."""
        name = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        if name not in _NAMES:
            self.send_error(HTTPStatus.FORBIDDEN)
        return name in _NAMES

    def _page(self, make: Callable[[], str]) -> None:
        with self.one_at_a_time:
            body = make().encode()
        self._send("text/html; charset=utf-8", body)

    def _picture(self, row: int, side: str) -> None:
        try:
            with self.one_at_a_time:
                body = self.shown.picture(row, side)
        except (LookupError, UwmError):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self._send("image/png", body)

    def _send(self, kind: str, body: bytes) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", self.shown.content_policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Queries are nobody's business, so none is logged."""


def _file_in(kind: str, body: bytes) -> tuple[bytes, str] | None:
    """Content and name of the file in a form; None without one."""
    message = email.message_from_bytes(
        b"Content-Type: " + kind.encode("latin-1") + b"\r\n\r\n" + body, policy=email.policy.HTTP
    )
    for part in message.iter_parts() if message.is_multipart() else ():
        content = part.get_payload(decode=True)
        if part.get_filename() is not None and isinstance(content, bytes) and content:
            return content, part.get_filename() or "picture"
    return None
