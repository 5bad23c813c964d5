"""The client of the v2 protocol against servers that answer nonsense, late, or not at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tests.serve.server import needs_triton_client
from uwm_deploy.errors import InputError, PrerequisiteError
from uwm_deploy.serve.client import AnswerError, Client, open_client


class _Handler(BaseHTTPRequestHandler):
    body = b""
    header: str | None = None
    extensions: tuple[str, ...] = ()

    def do_GET(self) -> None:
        about = json.dumps({"name": "x", "version": "1", "extensions": self.extensions}).encode()
        self._answer(about if self.path == "/v2" else type(self).body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(type(self).body)

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        if type(self).header is not None:
            self.send_header("Inference-Header-Content-Length", type(self).header)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _Handler.body, _Handler.header, _Handler.extensions = b"", None, ()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    found = open_client(address, "http", timeout_s=5)
    yield found
    found.close()


def _answer(**changed: object) -> bytes:
    part = {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}
    return json.dumps({"outputs": [part | changed]}).encode()


@pytest.mark.parametrize(
    "rows", [np.zeros((1, 2), np.float32), np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 4), np.int64)]
)
def test_a_plain_answer_is_read(client: Client, rows: np.ndarray) -> None:
    """Pixels, crops and ids can be sent; numbers in JSON become an array of the type and shape that stand there."""
    _Handler.body = _answer()
    found = client.infer("m", {"x": rows}, "y")
    np.testing.assert_array_equal(found, np.array([[1, 2]], np.float32))
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (b"", None),
        (b"no JSON", None),
        (b"[]", None),
        (b'{"outputs": 3}', None),
        (b'{"outputs": [{}]}', None),
        (_answer(shape=[3]), None),
        (_answer(datatype="FP5"), None),
        (_answer(data=["a", "b"]), None),
        (_answer(name="other"), None),
        (_answer(parameters={"binary_data_size": "8"}), "3"),
        (
            _answer(parameters={"binary_data_size": 7}) + b"1234567",
            str(len(_answer(parameters={"binary_data_size": 7}))),
        ),
        (
            _answer(datatype="BYTES", parameters={"binary_data_size": 3}) + b"\x09\0\0",
            str(len(_answer(datatype="BYTES", parameters={"binary_data_size": 3}))),
        ),
        (_answer(), "x"),
        (_answer(data=[], shape=[]), None),
    ],
)
def test_nonsense_is_the_servers_error(client: Client, body: bytes, header: str | None) -> None:
    """Never an exception of another kind, never an array that is not what was asked for."""
    _Handler.body, _Handler.header = body, header
    with pytest.raises(AnswerError):
        client.infer("m", {"x": np.zeros((1, 2), np.float32)}, "y")


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"max_batch_size": "x"}', b'{"input": 3}'])
def test_a_nonsensical_configuration_is_the_servers_error(client: Client, body: bytes) -> None:
    """It is not believed either."""
    needs_triton_client()
    _Handler.extensions, _Handler.body = ("model_configuration",), body
    with pytest.raises(AnswerError):
        client.config("m")


@pytest.mark.parametrize("body", [b"[]", b'{"model_stats": 3}', b'{"model_stats": [{"inference_count": "x"}]}'])
def test_nonsensical_statistics_are_the_servers_error(client: Client, body: bytes) -> None:
    """Nor are they."""
    _Handler.extensions, _Handler.body = ("statistics",), body
    with pytest.raises(AnswerError):
        client.counts("m")


def test_no_answer_is_the_environments_error() -> None:
    """Nothing listens there."""
    client = open_client("127.0.0.1:9", "http", timeout_s=1)
    with pytest.raises(PrerequisiteError, match="gives no answer"):
        client.server()


@pytest.mark.parametrize(
    "url", ["", "localhost", "localhost:x", "localhost:1/v2", "ftp://localhost:1", "grpc://localhost:1"]
)
def test_an_address_that_is_none_is_bad_input(url: str) -> None:
    """Before anything is sent; also one for the other protocol."""
    with pytest.raises(InputError):
        open_client(url, "http", timeout_s=1)
