"""The same names and the same check on another server of the v2 protocol: MLServer, in a virtual environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tests.serve.conftest import VARIANT, repacked
from tests.serve.server import ROOT, free_port, needs_triton_client
from uwm_deploy.cli import cli
from uwm_deploy.data.encoded import objects
from uwm_deploy.errors import ExitCode
from uwm_deploy.pipeline.request import Request
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.serve.client import AnswerError, open_client, wait_until_ready
from uwm_deploy.serve.names import EMBEDDING, ENCODERS, ENSEMBLES, RAW

needs_triton_client()

MODELS = (*ENSEMBLES.values(), *ENCODERS.values())


@pytest.fixture(scope="module")
def address(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server of the bundle."""
    given = os.environ.get("UWM_DEPLOY_MLSERVER_VENV")
    if not given:
        pytest.skip("UWM_DEPLOY_MLSERVER_VENV names no virtual environment with mlserver (docs/how-to/triton.md)")
    folder = tmp_path_factory.mktemp("mlserver")
    http, grpc, metrics = free_port(), free_port(), free_port()
    settings = {"host": "127.0.0.1", "http_port": http, "grpc_port": grpc, "metrics_port": metrics}
    (folder / "settings.json").write_text(json.dumps(settings | {"parallel_workers": 0, "debug": False}))
    for model in MODELS:
        (folder / model).mkdir()
        body = {"name": model, "implementation": "uwm_deploy.serve.mlserver_models.SafeModel"}
        (folder / model / "model-settings.json").write_text(json.dumps(body | {"parameters": {"uri": str(bundle)}}))
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    log = folder / "log.txt"
    with log.open("wb") as stream:
        command = [str(Path(given) / "bin" / "mlserver"), "start", str(folder)]
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=variables, cwd=folder)
    try:
        client = open_client(f"127.0.0.1:{http}", "http", timeout_s=10)
        try:
            wait_until_ready(client, MODELS, 90)
            # Its models have metadata before they are loaded.
            until = time.monotonic() + 60
            while not client.parameters(MODELS[-1]) and time.monotonic() < until:
                time.sleep(0.2)
        except Exception as error:
            raise AssertionError(log.read_text()[-4000:]) from error
        yield {"http": f"127.0.0.1:{http}", "grpc": f"127.0.0.1:{grpc}"}
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_it_answers_like_the_runtime(address: dict[str, str], bundle: Path, protocol: str) -> None:
    """Images in base64 over JSON, as they are over gRPC; texts likewise."""
    client = open_client(address[protocol], protocol, timeout_s=60)
    image = (ROOT / "docs" / "images" / "demo-report.png").read_bytes()
    texts = ["a red circle", "a <|endoftext|> b", "abcd", ""]
    with SafeEncoder.open(bundle) as encoder:
        wanted = {TowerName.IMAGE: encoder.encode_image([image]), TowerName.TEXT: encoder.encode_text(texts)}
    for tower, raw in ((TowerName.IMAGE, [image]), (TowerName.TEXT, [text.encode() for text in texts])):
        found = client.infer(ENSEMBLES[tower], {RAW[tower]: objects(raw)[:, None]}, EMBEDDING)
        np.testing.assert_allclose(found, wanted[tower], atol=1e-6)
    client.close()


def test_bad_items_are_the_callers_error(address: dict[str, str]) -> None:
    """A broken image is named and answered with 400."""
    client = open_client(address["http"], "http", timeout_s=60)
    with pytest.raises(AnswerError, match=r"400 image 0: .*not a whole image"):
        client.infer("clip_image", {"IMAGE": objects([b"broken"])[:, None]}, EMBEDDING)
    client.close()


def _check(address: str, bundle: Path, policy: str) -> tuple[int, dict[str, object]]:
    arguments = ["triton", "check", address, "--protocol", "http", "--bundle", str(bundle), "--policy", policy]
    done = CliRunner().invoke(cli, [*arguments, "--workers", "0", "--json"])
    return done.exit_code, json.loads(done.stdout) if done.stdout else {"error": done.output}


def test_what_serves_the_bundle_passes(address: dict[str, str], bundle: Path, request_of_build: Request) -> None:
    """Digests from its metadata, canaries, and SafeGround over plain JSON."""
    code, found = _check(address["http"], bundle, request_of_build.policy)
    assert code == ExitCode.PASS, found
    assert str(found["server"]).startswith("mlserver")
    assert found["verdict"]["proven"] == [VARIANT]  # type: ignore[index]


def test_another_bundle_fails(address: dict[str, str], bundle: Path, request_of_build: Request, tmp_path: Path) -> None:
    """A newer bundle of the same weights is told by its digest: exit code 5."""
    newer = repacked(bundle, tmp_path / "bundle", bundle_version=3)
    assert _check(address["http"], newer, request_of_build.policy)[0] == ExitCode.INTEGRITY
