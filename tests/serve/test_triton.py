"""A bundle as a Triton repository: written of what is proven, served by a real tritonserver, checked on the served path."""

from __future__ import annotations

import dataclasses
import http.client
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from PIL import Image

from tests.serve.conftest import VARIANT, as_plans, repacked
from tests.serve.server import ROOT, Server, needs_triton_client, started, wait
from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.cli import cli
from uwm_deploy.data.encoded import objects
from uwm_deploy.errors import InputError, IntegrityError, PrerequisiteError, UwmError
from uwm_deploy.pipeline.request import Request
from uwm_deploy.records.graph import TOKENS, EngineArtifact, Target
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.session import open_engine
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.serve import guard
from uwm_deploy.serve.client import AnswerError, open_client
from uwm_deploy.serve.config import ServerSettings, configs
from uwm_deploy.serve.guard import ModelPart, check_canaries, check_numpy, open_part
from uwm_deploy.serve.names import (  # fmt: skip
    EMBEDDING,
    ENCODERS,
    ENSEMBLES,
    LABELS,
    PREPARES,
    RAW,
    SCORES,
    TEMPLATE,
    TOP,
    ZERO_SHOT,
)
from uwm_deploy.serve.repository import write_repository
from uwm_deploy.serve.served import _as_written, count_checks, counts_of, settled_counts

needs_triton_client()

TEXTS = ["a red circle", "a blue square and two stars", "", "ein grüner Kreis", "a <|endoftext|> b"]

# --- writing ----------------------------------------------------------------------------------------------------------


def _parsed(path: Path) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse((path / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_every_model_is_written_with_its_version_and_the_digest(bundle: Path, repository: Path) -> None:
    """Seven models, each with version policy `specific`, the bundle's digest, and a folder of that version."""
    arguments = ["triton", str(bundle), str(repository), "--force", "--json"]
    digest = json.loads(CliRunner().invoke(cli, arguments).stdout)["bundle"]
    found = {path.name: _parsed(path) for path in repository.iterdir()}
    assert set(found) == {*ENCODERS.values(), *PREPARES.values(), *ENSEMBLES.values(), ZERO_SHOT}
    for name, config in found.items():
        assert config.name == name
        assert list(config.version_policy.specific.versions) == [1]
        assert any((repository / name / "1").iterdir())
        assert config.parameters["uwm_bundle_sha256"].string_value == digest
        assert config.parameters["uwm_space"].string_value == open_bundle(bundle).manifest.spaces[VARIANT]


def test_encoders_have_a_warm_up_per_profile_batch_and_the_engines_shapes(bundle: Path, repository: Path) -> None:
    """One warm-up for each batch of the profile; inputs, outputs and batch are the engine's."""
    for tower, engine in open_bundle(bundle).engines(VARIANT).items():
        config = _parsed(repository / ENCODERS[tower])
        assert [warm.batch_size for warm in config.model_warmup] == [1, engine.profile.opt, engine.profile.max]
        assert config.max_batch_size == engine.profile.max
        assert config.input[0].name == engine.inputs[0].name
        assert list(config.input[0].dims) == [-1 if size == TOKENS else size for size in engine.inputs[0].shape[1:]]
        assert list(config.output[0].dims) == list(engine.outputs[0].shape[1:])
        assert config.platform == "onnxruntime_onnx"


def test_plans_are_one_per_compute_capability_and_need_a_gpu(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bundles of two GPUs in one repository; each machine takes its own plan and checks it against that plan's bundle."""
    first = as_plans(bundle, tmp_path / "first", "8.9")
    second = as_plans(bundle, tmp_path / "second", "9.0", bundle_version=2)
    arguments = ["triton", str(first), str(tmp_path / "models"), "--further", str(second), "--json"]
    made = json.loads(CliRunner().invoke(cli, arguments).stdout)
    assert made["compute_capabilities"] == ["8.9", "9.0"]
    config = _parsed(tmp_path / "models" / ENCODERS[TowerName.IMAGE])
    assert config.platform == "tensorrt_plan"
    assert dict(config.cc_model_filenames) == {"8.9": "8.9.plan", "9.0": "9.0.plan"}
    assert list(config.instance_group[0].profile) == ["0"]
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    for capability, version in (("", 0), ("8.9", 0), ("9.0", 2)):
        monkeypatch.setattr(guard, "compute_capability", lambda capability=capability: capability)
        for tower in TowerName:
            part = open_part(_args(tmp_path / "models", ENCODERS[tower]))
            assert part.bundle.manifest.bundle_version == version
            assert part.engine_bytes(tower, f"{capability or '8.9'}.plan")
            open_part(_args(tmp_path / "models", PREPARES[tower])).check_engine_beside(tower)
    _flip(tmp_path / "models" / ENCODERS[TowerName.TEXT] / "1" / "9.0.plan")
    with pytest.raises(IntegrityError):
        open_part(_args(tmp_path / "models", PREPARES[TowerName.TEXT])).check_engine_beside(TowerName.TEXT)


def test_plans_that_do_not_belong_together_are_refused(bundle: Path, tmp_path: Path) -> None:
    """Two for the same GPU, other weights, and a place where plans cannot run: bad input, and nothing is written."""
    first = as_plans(bundle, tmp_path / "first", "8.9")
    same = as_plans(bundle, tmp_path / "same", "8.9", bundle_version=1)
    for options in (["--further", str(same)], ["--further", str(bundle)], ["--place", "cpu"]):
        done = CliRunner().invoke(cli, ["triton", str(first), str(tmp_path / "models"), *options])
        assert done.exit_code in (2, 5), done.output
        assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": Target.TENSORRT_RTX}, "Triton has no backend"),
        ({"normalised": False}, "not of length 1"),
    ],
)
def test_what_triton_cannot_serve_is_refused(bundle: Path, change: dict[str, Any], message: str) -> None:
    """A target without a backend, and embeddings that the ensemble would pass on at any length."""
    manifest = open_bundle(bundle).manifest
    engines: tuple[EngineArtifact, ...] = tuple(dataclasses.replace(e, **change) for e in manifest.engines)
    with pytest.raises(InputError, match=message):
        configs(dataclasses.replace(manifest, engines=engines), "d", VARIANT, ServerSettings())


def test_a_server_of_another_space_is_named(bundle: Path) -> None:
    """The check of what is served has both ids in its answer."""
    manifest = open_bundle(bundle).manifest
    wanted = configs(manifest, "d", VARIANT, ServerSettings())["clip_image"]
    served = type(wanted)()
    served.CopyFrom(wanted)
    served.parameters["uwm_space"].string_value = "space:sha256:other"
    assert not _as_written("clip_image", wanted, wanted, "d").blocks
    found = _as_written("clip_image", served, wanted, "d")
    assert found.blocks
    assert f"of space space:sha256:other, not {manifest.spaces[VARIANT]}" in found.detail


def test_only_a_bundle_that_passes_is_written(failed: Path, tmp_path: Path) -> None:
    """Without a passing verdict it is refused with exit code 5, and nothing is left behind."""
    done = CliRunner().invoke(cli, ["triton", str(failed), str(tmp_path / "models")])
    assert done.exit_code == 5
    assert "no passing verdict" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_changed_bundle_is_not_written(bundle: Path, tmp_path: Path) -> None:
    """One flipped bit of an engine: exit code 5."""
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    _flip(copy / "engines" / VARIANT / "image.onnx")
    assert CliRunner().invoke(cli, ["triton", str(copy), str(tmp_path / "models")]).exit_code == 5


def test_what_is_there_stays_unless_forced_and_ours(bundle: Path, tmp_path: Path) -> None:
    """A repository is replaced with --force only; any other folder never is."""
    path, arguments = tmp_path / "models", ["triton", "write", str(bundle), str(tmp_path / "models")]
    path.mkdir()
    (path / "precious").write_text("x")
    assert CliRunner().invoke(cli, arguments).exit_code == 2
    assert CliRunner().invoke(cli, [*arguments, "--force"]).exit_code == 2
    assert [one.name for one in path.iterdir()] == ["precious"]
    shutil.rmtree(path)
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    assert CliRunner().invoke(cli, arguments).exit_code == 2
    assert CliRunner().invoke(cli, [*arguments, "--force"]).exit_code == 0


def test_further_bundles_are_for_plans_only(bundle: Path, tmp_path: Path) -> None:
    """Another bundle beside one whose engines know no compute capability is bad input, not something left out."""
    arguments = ["triton", str(bundle), str(tmp_path / "models"), "--further", str(bundle)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2
    assert "TensorRT" in done.stderr


# --- what models check as they are loaded --------------------------------------------------------------------------------


def _args(repository: Path, model: str) -> dict[str, str]:
    """What Triton passes to a model."""
    from google.protobuf import json_format

    config = json_format.MessageToDict(_parsed(repository / model), preserving_proto_field_name=True)
    return {"model_config": json.dumps(config), "model_repository": str(repository / model), "model_version": "1"}


def _load(repository: Path) -> None:
    """Everything that the models of a repository check before they serve, but for the canaries in the engine."""
    for tower in TowerName:
        for model in (ENCODERS[tower], PREPARES[tower]):
            part = open_part(_args(repository, model))
            part.canaries(tower)
            part.check_engine_beside(tower)
        open_part(_args(repository, ENCODERS[tower])).engine_bytes(tower, "model.onnx")
        if tower is TowerName.TEXT:
            open_part(_args(repository, PREPARES[tower])).bundle.read("tokenizer.json")
    open_part(_args(repository, ZERO_SHOT))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def _changes() -> dict[str, Callable[[Path], object]]:
    files = [f"{ENCODERS[tower]}/1/model.onnx" for tower in TowerName]
    files += [f"{PREPARES[tower]}/bundle/evidence/canaries-{tower.value}.safetensors" for tower in TowerName]
    files += [f"{model}/bundle/manifest.json" for model in (*ENCODERS.values(), *PREPARES.values(), ZERO_SHOT)]
    files += ["clip_tokenize/bundle/tokenizer.json"]
    changes: dict[str, Callable[[Path], object]] = {
        f"flipped {name}": lambda repo, name=name: _flip(repo / name)
        for name in files  # type: ignore[misc]
    }
    changes |= {f"removed {name}": lambda repo, name=name: (repo / name).unlink() for name in files}  # type: ignore[misc]
    changes["a second file"] = lambda repo: (repo / f"{ENCODERS[TowerName.TEXT]}/1/other.onnx").write_bytes(b"x")
    changes["linked engine"] = lambda repo: os.link(repo / files[0], repo.parent / "other name")
    changes["another space"] = lambda repo: _replace(repo / "clip_tokenize" / "config.pbtxt", "space:sha256:", "space:")
    changes["engines swapped"] = lambda repo: shutil.copy(repo / files[0], repo / files[1])
    return changes


def test_an_unchanged_repository_is_loaded(repository: Path) -> None:
    """What the following changes are compared with."""
    _load(repository)


@pytest.mark.parametrize("name", _changes())
def test_a_changed_repository_is_not_loaded(repository: Path, tmp_path: Path, name: str) -> None:
    """Every file that is used: flipped, removed, linked, exchanged."""
    copy = shutil.copytree(repository, tmp_path / "models")
    _changes()[name](copy)
    with pytest.raises(IntegrityError):
        _load(copy)


@pytest.mark.parametrize("tower", TowerName)
def test_encoder_and_preparation_each_refuse_another_engine(repository: Path, tmp_path: Path, tower: TowerName) -> None:
    """Neither relies on the other: a server may have a backend of its own, or keep its models apart."""
    copy = shutil.copytree(repository, tmp_path / "models")
    _flip(copy / ENCODERS[tower] / "1" / "model.onnx")
    with pytest.raises(IntegrityError, match="is not the engine of the bundle"):
        open_part(_args(copy, ENCODERS[tower])).engine_bytes(tower, "model.onnx")
    with pytest.raises(IntegrityError):
        open_part(_args(copy, PREPARES[tower])).check_engine_beside(tower)


def test_a_repository_of_an_unsigned_bundle_is_not_loaded_where_a_key_is_given(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who can change files can change digests: with a key in the environment only a signature counts."""
    (tmp_path / "key.pub").write_text("no matter")
    monkeypatch.setenv("UWM_DEPLOY_PUBLIC_KEY", str(tmp_path / "key.pub"))
    with pytest.raises(IntegrityError, match="not signed"):
        _load(repository)


def _write_key(folder: Path, name: str) -> None:
    key = generate_private_key(SECP256R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / f"{name}.pem").write_bytes(private)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)


def test_signed_repositories_are_loaded_with_the_right_key_only(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signature travels into the repository; another key's is refused."""
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    for name in ("ours", "theirs"):
        _write_key(tmp_path, name)
    assert CliRunner().invoke(cli, ["sign", str(copy), "--key", str(tmp_path / "ours.pem")]).exit_code == 0
    write_repository(open_bundle(copy), tmp_path / "models")
    monkeypatch.setenv("UWM_DEPLOY_PUBLIC_KEY", str(tmp_path / "ours.pub"))
    _load(tmp_path / "models")
    monkeypatch.setenv("UWM_DEPLOY_PUBLIC_KEY", str(tmp_path / "theirs.pub"))
    with pytest.raises(IntegrityError, match="another key"):
        _load(tmp_path / "models")


def test_canaries_tell_the_unedited_engine(repository: Path, unedited: Path) -> None:
    """Embeddings of the model without the edit are refused, whatever served them."""
    part: ModelPart = open_part(_args(repository, ENCODERS[TowerName.IMAGE]))
    canaries = part.canaries(TowerName.IMAGE)
    assert canaries is not None
    check_canaries(canaries, canaries.edited, "encoder")
    session = open_engine(part.engine(TowerName.IMAGE), unedited.read_bytes(), {}, device="cpu")
    found = session.run(canaries.inputs)
    with pytest.raises(IntegrityError, match="does not answer like the edited model"):
        check_canaries(canaries, found, "encoder")


@pytest.mark.parametrize(
    ("numpy", "server", "right"),
    [("1.26.4", "", True), ("2.1.0", "", False), ("2.1.0", "2.51.0", False), ("2.1.0", "2.52.0", True)],
)
def test_numpy_2_is_refused_where_triton_would_send_empty_arrays(numpy: str, server: str, right: bool) -> None:
    """The fault is silent, so it is asserted: the shape is right and there are no bytes."""
    if right:
        check_numpy(numpy, server)
    else:
        with pytest.raises(PrerequisiteError, match="empty arrays"):
            check_numpy(numpy, server)


def test_serving_needs_no_torch() -> None:
    """What runs in the server and what checks it reach neither torch nor onnx."""
    code = (
        "import sys, uwm_deploy.serve.repository, uwm_deploy.serve.served, uwm_deploy.serve.guard; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "onnx", "open_clip"} & {name.split(".")[0] for name in done.stdout.split()}


# --- a real server --------------------------------------------------------------------------------------------------------


def _image(seed: int) -> bytes:
    colours = np.random.default_rng(seed).integers(0, 256, (40 + seed % 30, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(colours).save(stream, ("PNG", "JPEG", "WEBP")[seed % 3])
    return stream.getvalue()


def _rows(items: list[bytes]) -> np.ndarray:
    return objects(items)[:, None]


def _embedded(client: Any, tower: TowerName, items: list[bytes]) -> np.ndarray:
    return client.infer(ENSEMBLES[tower], {RAW[tower]: _rows(items)}, EMBEDDING)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_ensembles_answer_like_the_runtime(server: Server, bundle: Path, protocol: str) -> None:
    """Image bytes and strings in, the runtime's own embeddings out, over both protocols."""
    images, client = [_image(seed) for seed in range(9)], server.client(protocol)
    with SafeEncoder.open(bundle) as encoder:
        wanted_images, wanted_texts = encoder.encode_image(images), encoder.encode_text(TEXTS)
    np.testing.assert_allclose(_embedded(client, TowerName.IMAGE, images), wanted_images, atol=1e-6)
    found = _embedded(client, TowerName.TEXT, [text.encode() for text in TEXTS])
    np.testing.assert_allclose(found, wanted_texts, atol=1e-6)
    client.close()


def test_names_of_special_tokens_are_neutralised(server: Server, bundle: Path) -> None:
    """What follows the name of the end token still counts, unlike in the source model."""
    client = server.client("grpc")
    hidden = _embedded(client, TowerName.TEXT, [b"a circle <|endoftext|> and a star"])
    with SafeEncoder.open(bundle) as encoder:
        exact = encoder.encode_text("a circle <|endoftext|> and a star", special_tokens="exact")
        neutral = encoder.encode_text("a circle <|endoftext|> and a star")
    np.testing.assert_allclose(hidden, neutral, atol=1e-6)
    assert np.abs(hidden - exact).max() > 1e-3
    client.close()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_zero_shot_answers_like_the_runtime(server: Server, bundle: Path, protocol: str) -> None:
    """Images and classes in, cosines and the best class out; with and without a template."""
    images, labels, client = [_image(seed) for seed in range(5)], ["circle", "square", "star"], server.client(protocol)
    inputs = {RAW[TowerName.IMAGE]: objects(images), LABELS: objects([label.encode() for label in labels])}
    with SafeEncoder.open(bundle) as encoder:
        for template, further in (("a photo of a {}.", {}), ("the {}", {TEMPLATE: objects([b"the {}"])})):
            wanted = encoder.zero_shot(labels, template).classify(images)
            np.testing.assert_allclose(client.infer(ZERO_SHOT, inputs | further, SCORES), wanted.scores, atol=1e-6)
            found = client.infer(ZERO_SHOT, inputs | further, TOP)
            assert [one.decode() if isinstance(one, bytes) else one for one in found] == wanted.top
    client.close()


@pytest.mark.parametrize(
    ("labels", "template", "message"),
    [
        ([b"circle", b"circle"], b"a {}", "occurs twice"),
        ([b"circle"], b"no place", "has no {}"),
        ([b"\xff"], b"a {}", "LABELS is not UTF-8"),
    ],
)
def test_bad_classes_are_the_callers_error(server: Server, labels: list[bytes], template: bytes, message: str) -> None:
    """As in the runtime, in the runtime's words."""
    client = server.client("grpc")
    inputs = {RAW[TowerName.IMAGE]: objects([_image(1)]), LABELS: objects(labels), TEMPLATE: objects([template])}
    with pytest.raises(AnswerError, match=message):
        client.infer(ZERO_SHOT, inputs, SCORES)
    client.close()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_many_callers_each_get_their_own_rows_and_share_batches(server: Server, bundle: Path, protocol: str) -> None:
    """Every answer is compared with its own input's; the server counts fewer calls than rows."""
    client = server.client(protocol)
    images = [_image(seed) for seed in range(24)]
    texts = [f"a circle and {n} stars" for n in range(24)]
    with SafeEncoder.open(bundle) as encoder:
        wanted = {TowerName.IMAGE: encoder.encode_image(images), TowerName.TEXT: encoder.encode_text(texts)}
    raw = {TowerName.IMAGE: images, TowerName.TEXT: [text.encode() for text in texts]}
    before, encoder_name = counts_of(client), ENCODERS[TowerName.IMAGE]

    def ask(turn: int) -> float:
        tower = list(TowerName)[turn % 2]
        start, count = turn * 7 % 20, 1 + turn % 4
        found = _embedded(client, tower, raw[tower][start : start + count])
        return float(np.abs(found - wanted[tower][start : start + count]).max())

    with ThreadPoolExecutor(16) as pool:
        assert max(pool.map(ask, range(200))) < 1e-6
    sent = {encoder_name: sum(1 + turn % 4 for turn in range(0, 200, 2))}
    after = settled_counts(client, before, sent)
    assert not any(check.blocks for check in count_checks(before, after, sent))
    assert after[encoder_name].executions - before[encoder_name].executions < 100
    client.close()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize(
    ("tower", "items", "message"),
    [
        (TowerName.IMAGE, [b"\xff\xd8 not an image"], "image 0: .*not a whole image"),
        (TowerName.IMAGE, [_image(1), b""], "image 1: .*not a whole image"),
        (TowerName.TEXT, [b"\xff\xfe"], "text 0: it is not UTF-8"),
        (TowerName.TEXT, [b"x"] * 33, "batch-size must be <= 32"),
    ],
)
def test_bad_items_are_the_callers_error_and_named(
    server: Server, protocol: str, tower: TowerName, items: list[bytes], message: str
) -> None:
    """A broken item fails its request with its position; the server goes on."""
    client = server.client(protocol)
    with pytest.raises(AnswerError, match=message):
        _embedded(client, tower, items)
    assert _embedded(client, TowerName.TEXT, [b"a star"]).shape == (1, 64)
    client.close()


def test_a_broken_image_does_not_fail_others_in_its_batch(server: Server, bundle: Path) -> None:
    """Requests of several callers are prepared together, and answered apart."""
    client, good = server.client("grpc"), _image(4)
    with SafeEncoder.open(bundle) as encoder:
        wanted = encoder.encode_image([good])

    def ask(turn: int) -> bool:
        try:
            found = _embedded(client, TowerName.IMAGE, [b"broken" if turn % 3 == 0 else good])
        except AnswerError:
            return turn % 3 == 0
        return turn % 3 != 0 and bool(np.abs(found - wanted).max() < 1e-6)

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(60)))
    client.close()


def test_rows_of_ids_that_are_too_long_are_the_callers_error(server: Server, bundle: Path) -> None:
    """A graph for rows of any length has positions for so many ids only; the server itself lets any number through."""
    engine, client = open_bundle(bundle).engines(VARIANT)[TowerName.TEXT], server.client("grpc")
    ids = np.ones((1, 400), dtype=engine.inputs[0].dtype)
    with pytest.raises(AnswerError, match="rows of ids have 1 to"):
        client.infer(ENCODERS[TowerName.TEXT], {engine.inputs[0].name: ids}, engine.outputs[0].name)
    client.close()


@pytest.mark.parametrize("wrong", [10**6, -1])
def test_ids_without_an_embedding_fail_their_request_only(server: Server, bundle: Path, wrong: int) -> None:
    """Whoever sends ids to the encoder itself shares its batches; an id beyond the table, or below it, is his own error."""
    opened = open_bundle(bundle)
    engine, client = opened.engines(VARIANT)[TowerName.TEXT], server.client("grpc")
    good = Tokenizer(opened.read("tokenizer.json"), opened.manifest.model.text).encode(["a red star"])
    good = good.astype(engine.inputs[0].dtype)
    bad = good.copy()
    bad[0, 1] = wrong

    def embedded(ids: np.ndarray) -> np.ndarray:
        return client.infer(ENCODERS[TowerName.TEXT], {engine.inputs[0].name: ids}, engine.outputs[0].name)

    wanted = embedded(good)

    def ask(turn: int) -> bool:
        if turn % 4:
            return bool(np.abs(embedded(good) - wanted).max() < 1e-6)
        with pytest.raises(AnswerError, match="row 0 has an id without an embedding"):
            embedded(bad)
        return True

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(60)))
    client.close()


def test_the_launch_command_keeps_models_and_shared_memory_from_users(server: Server) -> None:
    """What docs/how-to/triton.md starts the server with: no list of models, no shared memory, without the key."""
    for path in ("/v2/repository/index", "/v2/systemsharedmemory/region/x/register"):
        connection = http.client.HTTPConnection(server.http, timeout=10)
        connection.request("POST", path, b"{}")
        assert connection.getresponse().status == 403
        connection.close()


# --- the check of the served path -------------------------------------------------------------------------------


def _check(server: Server, bundle: Path, policy: str, *options: str, protocol: str = "grpc") -> Result:
    address = getattr(server, protocol)
    arguments = ["triton", "check", address, "--protocol", protocol, "--bundle", str(bundle), "--policy", policy]
    return CliRunner().invoke(cli, [*arguments, "--workers", "0", "--json", *options])


def _failing(done: Result) -> set[str]:
    return {check["name"] for check in json.loads(done.stdout)["checks"] if check["result"] != "pass"}


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_what_serves_the_bundle_passes(server: Server, bundle: Path, request_of_build: Request, protocol: str) -> None:
    """Exit code 0: configuration, canaries, statistics, and a verdict on the served path equal to the bundle's evidence."""
    done = _check(server, bundle, request_of_build.policy, protocol=protocol)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["server"] == "triton 2.51.0"
    assert found["verdict"]["proven"] == [VARIANT]
    assert set(found["differ"].values()) == {0}
    assert found["evidence"]["where"] == {"server": "triton 2.51.0", "device": "cpu", "provider": "unknown, by Triton"}
    assert {"statistics", "canaries", "served as written"} <= {check["name"] for check in found["checks"]}


def test_another_bundle_than_the_one_that_is_served_fails(
    server: Server, bundle: Path, request_of_build: Request, tmp_path: Path
) -> None:
    """A newer bundle of the same weights is told by its version and digest, before anything is sent: exit code 5."""
    newer = repacked(bundle, tmp_path / "bundle", bundle_version=3)
    done = _check(server, newer, request_of_build.policy)
    assert done.exit_code == 5
    assert {"served version", "served as written"} <= _failing(done)
    assert json.loads(done.stdout)["verdict"] is None


def test_the_wrong_protocol_is_exit_code_6(server: Server, bundle: Path) -> None:
    """HTTP sent to the port of gRPC and the other way round: one readable line."""
    for address, protocol in ((server.grpc, "http"), (server.http, "grpc")):
        done = CliRunner().invoke(cli, ["triton", "check", address, "--protocol", protocol, "--bundle", str(bundle)])
        assert done.exit_code == 6, done.output
        assert "gives no answer" in done.stderr
        assert done.stderr.replace("\n", "").isprintable()


def test_no_server_is_exit_code_6(bundle: Path) -> None:
    """Nothing listens there; over both protocols, and an address that is none is bad input."""
    for protocol in ("grpc", "http"):
        arguments = ["triton", "check", "127.0.0.1:9", "--protocol", protocol, "--bundle", str(bundle)]
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 6, done.output
        assert "gives no answer" in done.stderr
    assert CliRunner().invoke(cli, ["triton", "check", "nowhere", "--bundle", str(bundle)]).exit_code == 2


PLAIN_BACKEND = '''
import numpy as np, onnxruntime, triton_python_backend_utils as pb
class TritonPythonModel:
    """Runs the graph that lies there and checks nothing, as a server's own backend does."""
    def initialize(self, args):
        path = f"{args['model_repository']}/{args['model_version']}/model.onnx"
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    def execute(self, requests):
        into, out = self.session.get_inputs()[0].name, self.session.get_outputs()[0].name
        answers = []
        for request in requests:
            rows = pb.get_input_tensor_by_name(request, into).as_numpy()
            answers.append(pb.InferenceResponse([pb.Tensor(out, self.session.run([out], {into: rows})[0])]))
        return answers
'''


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Backends that check nothing."""
    folder = tmp_path / "backends" / "onnxruntime"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(PLAIN_BACKEND)
    return folder.parent


def test_a_running_server_of_something_else_fails(
    repository: Path, bundle: Path, unedited: Path, plain: Path, request_of_build: Request, tmp_path: Path
) -> None:
    """Other preprocessing fails the gate; then a model file that is swapped behind the server fails its canaries.

    The right engine behind images whose colours are reversed: canaries pass, SafeGround on the served path does not. A
    server that loads files again when they change serves the unedited model: only its canaries tell, exit code 5.
    """
    copy = shutil.copytree(repository, tmp_path / "models")
    with (copy / "clip_preprocess" / "1" / "model.py").open("a") as stream:
        stream.write(
            "\nclass TritonPythonModel(TritonPythonModel):\n"
            "    def _pixels(self, raw):\n        return super()._pixels(raw)[::-1]\n"
        )
    with started(tmp_path / "server", copy, backends=plain, control="poll") as server:
        client = wait(server).client("grpc")
        reversed_colours = _check(server, bundle, request_of_build.policy)
        before = _embedded(client, TowerName.IMAGE, [_image(3)])
        swapped = copy / ENCODERS[TowerName.IMAGE] / "1" / "model.onnx"
        shutil.copy(unedited, tmp_path / "new")
        (tmp_path / "new").replace(swapped)
        until = time.monotonic() + 30
        while time.monotonic() < until and np.array_equal(_embedded(client, TowerName.IMAGE, [_image(3)]), before):
            time.sleep(0.3)
        client.close()
        done = _check(server, bundle, request_of_build.policy)
    assert reversed_colours.exit_code == 3, reversed_colours.output
    assert not _failing(reversed_colours)
    assert json.loads(reversed_colours.stdout)["verdict"]["failed"] == [VARIANT]
    assert done.exit_code == 5, done.output
    assert _failing(done) == {"canaries"}


def test_a_server_does_not_start_with_a_swapped_model_file_nor_without_the_gpu_that_is_asked_for(
    bundle: Path, unedited: Path, plain: Path, tmp_path: Path
) -> None:
    """Whatever the encoder's backend is, preprocessing refuses another engine beside it; `--place gpu` is never the CPU."""
    models = tmp_path / "models"
    write_repository(open_bundle(bundle), models, settings=ServerSettings(place="gpu"))
    shutil.copy(unedited, models / ENCODERS[TowerName.IMAGE] / "1" / "model.onnx")
    with started(tmp_path / "server", models, backends=plain, settings={"CUDA_VISIBLE_DEVICES": ""}) as server:
        assert server.process.wait(60) == 1
        assert "clip_image_encoder has not the engine of the bundle" in server.said()
        assert "KIND_GPU but no GPUs are available" in server.said()


def test_nothing_is_answered_while_the_canaries_fail(
    repository: Path, bundle: Path, unedited: Path, plain: Path, request_of_build: Request, tmp_path: Path
) -> None:
    """Models in folders that cannot see each other: the swapped encoder is loaded, and its ensemble refuses to answer."""
    rest = shutil.copytree(repository, tmp_path / "models")
    encoder = tmp_path / "elsewhere" / ENCODERS[TowerName.IMAGE]
    shutil.move(rest / ENCODERS[TowerName.IMAGE], encoder)
    shutil.copy(unedited, encoder / "1" / "model.onnx")
    with started(tmp_path / "server", rest, encoder.parent, backends=plain) as server:
        client = wait(server).client("http")
        for _ in range(2):
            with pytest.raises(AnswerError, match="does not answer like the edited model"):
                _embedded(client, TowerName.IMAGE, [_image(3)])
        assert _embedded(client, TowerName.TEXT, [b"a star"]).shape == (1, 64)
        client.close()
        assert _check(server, bundle, request_of_build.policy).exit_code == 5


def test_an_address_is_for_one_protocol() -> None:
    """`http://` with gRPC, a path, or no port is an error before anything is sent."""
    for url in ("http://localhost:8000", "localhost", "localhost:x", "localhost:1/v2"):
        with pytest.raises(UwmError):
            open_client(url, "grpc", timeout_s=1)


def test_the_documents_compose_file_and_service_are_whole() -> None:
    """docs/how-to/triton.md: YAML that can be read, hardened, and with the flags that the tests start the server with."""
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "docs" / "how-to" / "triton.md").read_text()
    compose, service = (yaml.safe_load(part.split("```")[0]) for part in text.split("```yaml\n")[1:])
    container = compose["services"]["clip"]
    assert container["read_only"] is True
    assert container["cap_drop"] == ["ALL"]
    assert all(volume.endswith(":ro") for volume in container["volumes"])
    model = service["spec"]["predictor"]["model"]
    for flag in ("--exit-on-error=true", "--disable-auto-complete-config", "--model-control-mode=none"):
        assert flag in container["command"].split()
        assert flag in model["args"]
    assert model["protocolVersion"] == "v2"
