"""The programs of docs/examples, run on a real bundle: what they print is what the runtime computes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save

from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.errors import IntegrityError
from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.pipeline.request import Request
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.encoder import SafeEncoder

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def example(name: str) -> ModuleType:
    """An example as a module, to call what it consists of."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def bundle(built: tuple[Request, Outcome]) -> Path:
    assert built[0].out is not None
    return built[0].out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures, one of them broken."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(4):
        colours = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((64, 56)).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def encoder(bundle: Path) -> Any:
    with SafeEncoder.open(bundle) as opened:
        yield opened


def test_every_example_is_described_and_tested() -> None:
    """docs/how-to/ways-in.md names each file; the client of Triton is tested where its server is."""
    page = (ROOT / "docs" / "how-to" / "ways-in.md").read_text()
    for file in (entry for entry in EXAMPLES.iterdir() if entry.name != "__pycache__"):
        assert f"(../examples/{file.name}" in page, file.name


def test_faiss_search(bundle: Path, pictures: Path, encoder: SafeEncoder, tmp_path: Path) -> None:
    """Results in the order of the cosines, the broken picture left out and named, an index of another space refused."""
    pytest.importorskip("faiss", reason="needs the extra [examples]")
    index = tmp_path / "pictures.index"
    made = run("faiss_search", "index", bundle, pictures, index)
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("left out: 4: ")
    found = run("faiss_search", "search", bundle, index, "a red circle", "-k", 3)
    assert found.returncode == 0, found.stderr
    names = [f"{n}.png" for n in range(4)]
    cosines = encoder.similarity(
        encoder.encode_text(["a red circle"]), encoder.encode_image([pictures / n for n in names])
    )[0]
    wanted = [f"{cosines[n]:.4f} {names[n]}" for n in np.argsort(-cosines)[:3]]
    assert found.stdout.splitlines() == wanted
    about = json.loads(index.with_suffix(".json").read_text())
    assert about["space"] == encoder.space
    index.with_suffix(".json").write_text(json.dumps(about | {"space": "space:sha256:other"}))
    refused = run("faiss_search", "search", bundle, index, "a red circle")
    assert refused.returncode != 0
    assert "space:sha256:other" in refused.stderr
    assert encoder.space in refused.stderr


def test_fastapi_endpoint(bundle: Path, pictures: Path, encoder: SafeEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings over HTTP, a status per kind of error, health that turns, metrics that a scraper can read."""
    pytest.importorskip("fastapi", reason="needs the extra [examples]")
    from fastapi.testclient import TestClient

    monkeypatch.setenv("UWM_BUNDLE", str(bundle))
    module = example("fastapi_endpoint")
    app = module.create_app()
    with TestClient(app) as client:
        data = (pictures / "0.png").read_bytes()
        image = client.post("/embed/image", content=data)
        assert image.status_code == 200, image.text
        np.testing.assert_allclose(image.json()["embedding"], encoder.encode_image(data)[0], atol=1e-5)
        texts = ["a red circle", "a blue square"]
        answer = client.post("/embed/text", json={"texts": texts})
        np.testing.assert_allclose(answer.json()["embeddings"], encoder.encode_text(texts), atol=1e-5)
        broken = client.post("/embed/image", content=(pictures / "broken.png").read_bytes())
        assert (broken.status_code, "0" in broken.json()["detail"]) == (422, True)
        assert client.post("/embed/text", json={"texts": []}).status_code == 422
        assert client.post("/embed/image", content=b"x" * (module.MAX_IMAGE_BYTES + 1)).status_code == 413
        health = client.get("/health")
        assert (health.status_code, health.json()["ok"], set(health.json()["ratios"])) == (200, True, {"image", "text"})
        metrics = client.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "uwm_canary_ok 1" in metrics.text
        app.state.encoder.close()  # nothing answers any more, which is no answer like the edited model's
        gone = client.get("/health")
        assert (gone.status_code, gone.json()["ok"]) == (503, False)


def test_fastapi_endpoint_does_not_start_on_a_changed_bundle(bundle: Path, tmp_path: Path) -> None:
    """The error is at the start, not at the first request."""
    pytest.importorskip("fastapi", reason="needs the extra [examples]")
    from fastapi.testclient import TestClient

    shutil.copytree(bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "tokenizer.json").write_text("{}")
    app = example("fastapi_endpoint").create_app(tmp_path / "bundle")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"), TestClient(app):
        pass


def test_asyncio_worker(bundle: Path, pictures: Path, encoder: SafeEncoder) -> None:
    """Every job gets one answer, broken ones too; what was read before SIGTERM is answered, and it ends well."""
    command = [sys.executable, str(EXAMPLES / "asyncio_worker.py"), str(bundle), "--limit", "8"]
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, bufsize=1
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    jobs = [{"id": n, "text": f"a circle and {n} stars"} for n in range(40)]
    jobs += [{"id": f"i{n}", "image": str(pictures / f"{n}.png")} for n in range(4)]
    jobs += [{"id": "broken", "image": str(pictures / "broken.png")}, {"id": "none", "image": "nowhere.png"}]
    jobs += [{"id": "both", "text": "a", "image": "b"}, {"id": "neither"}, {"id": "number", "text": 3}]
    lines = [json.dumps(job) for job in jobs] + ["{", "[1]"]
    for line in lines:
        worker.stdin.write(line + "\n")
    worker.stdin.flush()
    answers = [json.loads(worker.stdout.readline()) for _ in lines]
    worker.send_signal(signal.SIGTERM)  # the stream is still open
    assert worker.wait(timeout=60) == 0
    worker.stdin.close()
    worker.stdout.close()
    found = {answer["id"]: answer for answer in answers if answer["id"] is not None}
    assert len(found) == len(jobs)
    texts = encoder.encode_text([job["text"] for job in jobs[:40]])
    np.testing.assert_allclose([found[n]["embedding"] for n in range(40)], texts, atol=1e-5)
    images = encoder.encode_image([pictures / f"{n}.png" for n in range(4)])
    np.testing.assert_allclose([found[f"i{n}"]["embedding"] for n in range(4)], images, atol=1e-5)
    for name in ("broken", "none", "both", "neither", "number"):
        assert "embedding" not in found[name]
        assert found[name]["error"]
    assert len([answer for answer in answers if answer["id"] is None]) == 2


def compiler() -> str:
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("not run: this machine has no C++ compiler")
    return found


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ example, against the library in the Python wheel."""
    import onnxruntime

    libraries = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("not run: this build of onnxruntime has no library of its own")
    folder = tmp_path_factory.mktemp("cpp")
    library = folder / "libonnxruntime.so.1"  # the name by which programs look for it
    library.symlink_to(libraries[0])
    source = EXAMPLES / "cpp" / "embed.cpp"
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-Wl,-rpath,{folder}"]
    subprocess.run([compiler(), *options, str(source), str(library), "-o", str(folder / "embed")], check=True)
    return folder / "embed"


def embed(program: Path, bundle: Path, digest: str, tower: str, rows: np.ndarray) -> subprocess.CompletedProcess[bytes]:
    command = [str(program), str(bundle), digest, tower]
    return subprocess.run(command, input=np.ascontiguousarray(rows).tobytes(), capture_output=True)


def manifest_digest(bundle: Path) -> str:
    return hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("tower", list(TowerName))
def test_cpp_program(program: Path, bundle: Path, encoder: SafeEncoder, tower: TowerName) -> None:
    """Prepared rows, more than one batch of them, give the runtime's embeddings."""
    canaries = load_file(bundle / f"evidence/canaries-{tower.value}.safetensors")["inputs"]
    rows = np.concatenate([canaries] * 5)
    done = embed(program, bundle, manifest_digest(bundle), tower.value, rows)
    assert done.returncode == 0, done.stderr
    assert b"onnxruntime-fp32, canaries " in done.stderr
    found = np.frombuffer(done.stdout, dtype=np.float32).reshape(len(rows), -1)
    np.testing.assert_allclose(found, encoder.session(tower).run_all(rows)[f"{tower.value}_embeds"], atol=1e-5)


def test_cpp_program_refuses(program: Path, bundle: Path, tmp_path: Path) -> None:
    """Another manifest, a changed graph, canaries of another model: exit code 5 and the file; nothing on stdout."""
    rows = load_file(bundle / "evidence/canaries-text.safetensors")["inputs"]
    digest = manifest_digest(bundle)
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)

    def refused(message: str, digest: str = digest) -> None:
        done = embed(program, copy, digest, "text", rows)
        assert (done.returncode, done.stdout) == (5, b""), done.stderr
        assert message in done.stderr.decode()

    refused("manifest.json has changed", "0" * 64)
    for name in ("engines/onnxruntime-fp32/text.onnx", "evidence/canaries-text.safetensors", "manifest.json"):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        refused(f"{name} has changed")
        (copy / name).unlink()
        refused(f"{name} cannot be read")
        (copy / name).write_bytes(whole)
    canaries = load_file(bundle / "evidence/canaries-text.safetensors")
    swapped = save(canaries | {"original": canaries["edited"], "edited": canaries["original"]})
    opened = open_bundle(bundle)
    parts: dict[str, Path | bytes] = {file.path: bundle / file.path for file in opened.manifest.files}
    bundle_from_parts(copy, opened.manifest, parts | {"evidence/canaries-text.safetensors": swapped})
    refused("does not answer like the edited model", manifest_digest(copy))
    assert embed(program, bundle, digest, "text", rows.ravel()[:-1]).returncode == 1
    assert subprocess.run([str(program)], capture_output=True).returncode == 2


def test_cpp_sha256(tmp_path: Path) -> None:
    """The digest of every length around the borders of blocks."""
    (tmp_path / "all.cpp").write_text(
        '#include <iostream>\n#include "sha256.h"\n'
        'int main() { for (int n = 0; n < 200; ++n) std::cout << sha256::hex(std::string(n, char(n))) << "\\n"; }\n'
    )
    command = [
        compiler(),
        "-std=c++17",
        f"-I{EXAMPLES / 'cpp'}",
        str(tmp_path / "all.cpp"),
        "-o",
        str(tmp_path / "all"),
    ]
    subprocess.run(command, check=True)
    found = subprocess.run([str(tmp_path / "all")], capture_output=True, text=True, check=True).stdout.split()
    assert found == [hashlib.sha256(bytes([n]) * n).hexdigest() for n in range(200)]
