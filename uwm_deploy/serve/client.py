"""Two small clients of the v2 (Open Inference) protocol: gRPC through `tritonclient`, and plain HTTP."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import struct
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from uwm_deploy.errors import ExitCode, InputError, PrerequisiteError, UwmError
from uwm_deploy.records.plain_json import value_from_json
from uwm_deploy.serve.config import Message, protobuf

_NUMPY = {"FP32": np.float32, "FP16": np.float16, "INT64": np.int64, "INT32": np.int32, "UINT8": np.uint8}
_NAMES = {np.dtype(kind): name for name, kind in _NUMPY.items()}


class AnswerError(UwmError):
    """The server was reached, and answered with an error."""

    exit_code = ExitCode.GATE_FAILED


@dataclass(frozen=True, slots=True)
class Counts:
    """What a server counted of one model.

    Attributes:
        inferences: Rows that were answered.
        executions: Calls of the model; fewer than inferences where rows shared batches.
        failures: Requests that ended with an error.
        batches: Rows per call to the number of such calls.
    """

    inferences: int
    executions: int
    failures: int
    batches: Mapping[int, int]


class Client(Protocol):
    """A connection to a server; any thread may call."""

    url: str
    protocol: str

    def server(self) -> tuple[str, str]:
        """Name and version of the server.

        Raises:
            PrerequisiteError: If it cannot be reached; so do the other calls.
        """

    def versions(self, model: str) -> list[str]:
        """Versions of a model that are served.

        Raises:
            AnswerError: If there is no such model; so do the other calls.
        """

    def parameters(self, model: str) -> dict[str, str]:
        """What a model's metadata says beside its inputs and outputs; nothing where the protocol has no place for it."""

    def config(self, model: str) -> Message | None:
        """Configuration as the server uses it; None where a server has no such thing."""

    def counts(self, model: str) -> Counts | None:
        """What was counted until now; None where a server counts nothing."""

    def infer(self, model: str, inputs: Mapping[str, np.ndarray], output: str) -> np.ndarray:
        """One output of a model.

        Args:
            model: Its name.
            inputs: Name to (n, ...), of the dtypes that the model's metadata names; bytes are (n,) object.
            output: Name of the output.

        Returns:
            (n, ...), of the output's dtype; bytes are (n,) object.
        """
        return self.infer_all(model, inputs, [output])[output]

    def infer_all(self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Several outputs of one call.

        Args:
            model: Name of the model.
            inputs: Name to (n, ...), of the dtypes that the model's metadata names; bytes are (n,) object.
            outputs: Names of the outputs.

        Returns:
            Name to (n, ...), of the output's dtype; bytes are (n,) object.
        """

    def close(self) -> None:
        """Closes connections."""


def open_client(url: str, protocol: str, *, timeout_s: float) -> Client:
    """A client for a server; nothing is sent yet.

    Args:
        url: ``host:port``, with ``http://`` or ``grpc://`` before it or not.
        protocol: ``"grpc"`` or ``"http"``.
        timeout_s: For each call.

    Raises:
        InputError: If the URL is none.
        PrerequisiteError: If the package `tritonclient` is missing.
    """
    parts = urlsplit(url if "//" in url else f"//{url}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme not in ("", "http", "grpc") or parts.path.strip("/"):
        raise InputError(f"{url!r} is not the address of a server", fix="write it like localhost:8001")
    if parts.scheme not in ("", protocol):
        raise InputError(f"{url} is not for {protocol}", fix=f"pass --protocol {parts.scheme}")
    if protocol == "grpc":
        return GrpcClient(f"{host}:{port}", timeout_s)
    return HttpClient(host, port, timeout_s)


class GrpcClient(Client):
    """See `Client`."""

    protocol = "grpc"

    def __init__(self, url: str, timeout_s: float) -> None:
        protobuf()
        import tritonclient.grpc as module

        self.url, self._timeout, self._module = url, timeout_s, module
        self._client = module.InferenceServerClient(url)

    def server(self) -> tuple[str, str]:
        """See `Client.server`."""
        with self._errors():
            found = self._client.get_server_metadata(client_timeout=self._timeout)
        return found.name, found.version

    def versions(self, model: str) -> list[str]:
        """See `Client.versions`."""
        with self._errors():
            return list(self._client.get_model_metadata(model, client_timeout=self._timeout).versions)

    def parameters(self, model: str) -> dict[str, str]:  # noqa: ARG002  these messages have no place for any
        """See `Client.parameters`."""
        return {}

    def config(self, model: str) -> Message | None:
        """See `Client.config`."""
        with self._errors():
            try:
                return self._client.get_model_config(model, client_timeout=self._timeout).config
            except self._module.InferenceServerException as error:
                if "UNIMPLEMENTED" in str(error.status()):
                    return None
                raise

    def counts(self, model: str) -> Counts | None:
        """See `Client.counts`."""
        with self._errors():
            try:
                found = self._client.get_inference_statistics(model, client_timeout=self._timeout)
            except self._module.InferenceServerException as error:
                if "UNIMPLEMENTED" in str(error.status()):
                    return None
                raise
        from google.protobuf import json_format

        return _counts(json_format.MessageToDict(found, preserving_proto_field_name=True))

    def infer_all(self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Calls a model for several outputs at once; see `Client.infer_all`.

        Args:
            model: Name of the model.
            inputs: Inputs by name, (n, ...) of any dtype of the protocol; bytes are (n, ...) object.
            outputs: Names of the outputs.

        Returns:
            Outputs by name, (n, ...) in their dtype; bytes are (n, ...) object.
        """
        sent = []
        for name, rows in inputs.items():
            sent.append(self._module.InferInput(name, list(rows.shape), _type_of(rows)))
            sent[-1].set_data_from_numpy(rows)
        with self._errors():
            answer = self._client.infer(
                model,
                sent,
                outputs=[self._module.InferRequestedOutput(output) for output in outputs],
                request_id=uuid.uuid4().hex,
                client_timeout=self._timeout,
            )
        return {output: _there(answer.as_numpy(output), model, output) for output in outputs}

    def close(self) -> None:
        """See `Client.close`."""
        self._client.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._module.InferenceServerException as error:
            status = str(error.status())
            if "UNAVAILABLE" in status or "DEADLINE" in status:
                raise _unreachable(self.url, error.message()) from error
            raise AnswerError(f"{self.url}: {error.message()}") from error


class HttpClient(Client):
    """See `Client`; one connection per thread.

    Tensors are bytes after the JSON where a server says that it reads that, else numbers and base64 in it.
    """

    protocol = "http"

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        self.url = f"{host}:{port}"
        self._host, self._port, self._timeout = host, port, timeout_s
        self._extensions: frozenset[str] | None = None
        self._local = threading.local()
        self._open: list[http.client.HTTPConnection] = []

    def server(self) -> tuple[str, str]:
        """See `Client.server`."""
        found = self._json("GET", "/v2")
        return str(found.get("name", "")), str(found.get("version", ""))

    def versions(self, model: str) -> list[str]:
        """See `Client.versions`."""
        found = self._json("GET", f"/v2/models/{model}").get("versions") or ()
        return [str(one) for one in found] if isinstance(found, list) else []

    def parameters(self, model: str) -> dict[str, str]:
        """See `Client.parameters`."""
        found = self._json("GET", f"/v2/models/{model}").get("parameters")
        if not isinstance(found, dict):
            return {}
        return {str(key): str(value) for key, value in found.items() if isinstance(value, (str, int, float))}

    def config(self, model: str) -> Message | None:
        """See `Client.config`."""
        if not self._extension("model_configuration"):
            return None
        from google.protobuf import json_format

        found = self._json("GET", f"/v2/models/{model}/config")
        with self._wellformed(model):
            return json_format.ParseDict(found, protobuf().ModelConfig(), ignore_unknown_fields=True)

    def counts(self, model: str) -> Counts | None:
        """See `Client.counts`."""
        if not self._extension("statistics"):
            return None
        found = self._json("GET", f"/v2/models/{model}/stats")
        with self._wellformed(model):
            return _counts(found)

    def infer_all(self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Calls a model for several outputs at once; see `Client.infer_all`.

        Args:
            model: Name of the model.
            inputs: Inputs by name, (n, ...) of any dtype of the protocol; bytes are (n, ...) object.
            outputs: Names of the outputs.

        Returns:
            Outputs by name, (n, ...) in their dtype; bytes are (n, ...) object.
        """
        binary = self._extension("binary_tensor_data")
        described, tail = [], b""
        for name, rows in inputs.items():
            part: dict[str, Any] = {"name": name, "shape": list(rows.shape), "datatype": _type_of(rows)}
            if binary:
                raw = _raw(rows)
                part["parameters"] = {"binary_data_size": len(raw)}
                tail += raw
            elif rows.dtype == object:
                part["parameters"] = {"content_type": "base64"}
                part["data"] = [base64.b64encode(one).decode() for one in rows.reshape(-1)]
            else:
                part["data"] = rows.reshape(-1).tolist()
            described.append(part)
        asked = {"parameters": {"binary_data": True}} if binary else {}
        wanted = [{"name": output} | asked for output in outputs]
        body = json.dumps({"id": uuid.uuid4().hex, "inputs": described, "outputs": wanted}).encode()
        headers = {"Content-Type": "application/json"}
        if binary:
            headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(body))}
        answer, length = self._request("POST", f"/v2/models/{model}/infer", body + tail, headers)
        with self._wellformed(model):
            head = value_from_json(answer[:length])
            tail = answer[length:] if length is not None else b""
            found = {output: _output(head, tail, output) for output in outputs}
        return {output: _there(rows, model, output) for output, rows in found.items()}

    def close(self) -> None:
        """See `Client.close`."""
        for connection in self._open:
            connection.close()

    @contextlib.contextmanager
    def _wellformed(self, model: str) -> Iterator[None]:
        """Whatever a server answers, what is wrong with it is the server's."""
        from google.protobuf.json_format import ParseError

        try:
            yield
        except (ValueError, TypeError, KeyError, AttributeError, struct.error, ParseError) as error:
            raise AnswerError(f"{self.url}: the answer of {model} is not as the protocol has it: {error!r}") from error

    def _extension(self, name: str) -> bool:
        if self._extensions is None:
            self._extensions = frozenset(map(str, self._json("GET", "/v2").get("extensions") or ()))
        return name in self._extensions

    def _json(self, method: str, path: str) -> dict[str, Any]:
        answer, _ = self._request(method, path, None, {})
        try:
            found = value_from_json(answer)
        except ValueError as error:
            raise AnswerError(f"{self.url}{path}: the answer is no JSON") from error
        if not isinstance(found, dict):
            raise AnswerError(f"{self.url}{path}: the answer is no JSON object")
        return found

    def _request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[bytes, int | None]:
        """The answer, and how much of it is JSON; None if all of it is."""
        for again in (True, False):
            connection = self._connection()
            try:
                connection.request(method, path, body, dict(headers))
                response = connection.getresponse()
                answer = response.read()
                break
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                # A server may close a connection that nobody used for a while.
                if not (again and isinstance(error, (http.client.RemoteDisconnected, BrokenPipeError))):
                    raise _unreachable(self.url, _reason(error)) from error
        if response.status != 200:
            raise AnswerError(f"{self.url}{path}: {response.status} {_error_text(answer)}")
        length = response.getheader("Inference-Header-Content-Length")
        if length is not None and not length.isdecimal():
            raise AnswerError(f"{self.url}{path}: the length of its JSON is {length[:20]!r}")
        return answer, int(length) if length is not None else None

    def _connection(self) -> http.client.HTTPConnection:
        if not hasattr(self._local, "connection"):
            self._local.connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
            self._open.append(self._local.connection)
        found: http.client.HTTPConnection = self._local.connection
        return found


def wait_until_ready(client: Client, models: tuple[str, ...], seconds: float) -> None:
    """Waits for a server that is being started.

    Raises:
        PrerequisiteError: If it is not there in time.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            client.server()
            for model in models:
                client.versions(model)
        except (PrerequisiteError, AnswerError):
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
        else:
            return


def _unreachable(url: str, why: str) -> PrerequisiteError:
    return PrerequisiteError(f"{url} gives no answer: {why}", fix="check that the server runs, and the address")


def _reason(error: Exception) -> str:
    """What is wrong; a server of another protocol is quoted byte by byte, which no terminal should see."""
    text = str(error)
    return (
        text if text and text.isascii() and text.isprintable() else f"{type(error).__name__}, is it another protocol?"
    )


def _error_text(answer: bytes) -> str:
    try:
        return str(value_from_json(answer)["error"])
    except (ValueError, KeyError, TypeError):
        return ascii(answer.decode(errors="replace")[:200])


def _there(found: np.ndarray | None, model: str, output: str) -> np.ndarray:
    if found is None or (found.size == 0 and 0 not in found.shape):
        raise AnswerError(f"{model} gave no {output}")
    return found


def _type_of(rows: np.ndarray) -> str:
    return "BYTES" if rows.dtype == object else _NAMES[rows.dtype]


def _raw(rows: np.ndarray) -> bytes:
    if rows.dtype != object:
        return rows.tobytes()
    return b"".join(struct.pack("<I", len(one)) + one for one in rows.reshape(-1))


def _output(head: Mapping[str, Any], tail: bytes, wanted: str) -> np.ndarray | None:
    start = 0
    for part in head.get("outputs") or ():
        size = (part.get("parameters") or {}).get("binary_data_size")
        raw = tail[start : start + size] if size is not None else None
        start += size or 0
        if part["name"] == wanted:
            return _array(part, raw).reshape(part["shape"])
    return None


def _array(part: Mapping[str, Any], raw: bytes | None) -> np.ndarray:
    if part["datatype"] != "BYTES":
        kind = _NUMPY[part["datatype"]]
        return np.array(part["data"], dtype=kind) if raw is None else np.frombuffer(raw, dtype=kind)
    if raw is None:
        return np.array([one.encode() for one in part["data"]], dtype=object)
    found, start = [], 0
    while start < len(raw):
        (size,) = struct.unpack_from("<I", raw, start)
        found.append(raw[start + 4 : start + 4 + size])
        start += 4 + size
    return np.array(found, dtype=object)


def _counts(body: Mapping[str, Any]) -> Counts:
    """The sum over versions."""
    inferences = executions = failures = 0
    batches: dict[int, int] = {}
    for model in body.get("model_stats") or ():
        inferences += int(model.get("inference_count", 0))
        executions += int(model.get("execution_count", 0))
        failures += int(model.get("inference_stats", {}).get("fail", {}).get("count", 0))
        for batch in model.get("batch_stats") or ():
            size = int(batch.get("batch_size", 0))
            batches[size] = batches.get(size, 0) + int(batch.get("compute_infer", {}).get("count", 0))
    return Counts(inferences, executions, failures, batches)
