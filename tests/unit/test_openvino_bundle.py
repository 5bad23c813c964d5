"""A bundle with OpenVINO's models: built, judged, chosen on the CPU, and served from checked bytes."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests.made_once import copy_of
from uwm_deploy.bundle.open import engine_path, open_bundle
from uwm_deploy.errors import ContractError, InputError, IntegrityError, PrerequisiteError
from uwm_deploy.pipeline.refit_graphs import reason_against
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.records.graph import Precision, Target
from uwm_deploy.records.model import TowerName
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.doctor import capabilities
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.openvino import reason_not_usable
from uwm_deploy.runtime.service import Serving
from uwm_deploy.serve.config import backend_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("openvino") is None, reason="not run: package openvino is not installed"
    ),
]
VARIANT, OTHER = "openvino-fp32", "onnxruntime-fp32"


@pytest.fixture(scope="module")
def bundle(built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small build with one target more: everything up to its graphs is taken over."""
    request, _ = built
    folder = tmp_path_factory.mktemp("openvino")
    copy_of(request.work, folder / "work")
    asked: Request = dataclasses.replace(
        request, targets=("onnxruntime", "openvino"), out=folder / "bundle", work=folder / "work"
    )
    outcome = run(asked, until="package", reporter=Reporter(quiet=True))
    assert outcome.verdict is not None
    assert {VARIANT, OTHER} <= set(outcome.verdict.proven)
    return folder / "bundle"


def crops(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 40, 48, 3), dtype=np.uint8)


def test_it_is_chosen_on_the_cpu_and_gives_the_same_rows(bundle: Path) -> None:
    """Of one precision it comes first; the other target's rows are in the same space."""
    with SafeEncoder.open(bundle, device="cpu") as encoder, SafeEncoder.open(bundle, variant=OTHER) as other:
        assert encoder.variant == VARIANT
        assert f"{OTHER} on cpu: {VARIANT} on cpu comes first" in encoder.why
        assert encoder.space == other.space
        words = ["a red square", "two stars on a wall"]
        for found, wanted in (
            (encoder.encode_image(crops(5)), other.encode_image(crops(5))),
            (encoder.encode_text(words), other.encode_text(words)),
        ):
            assert np.abs(found - wanted).max() < 1e-5
        assert encoder.selftest().ok


@pytest.mark.parametrize("serving", [Serving(calls=2, threads=2), Serving(weights="shared"), Serving(threads=1)])
def test_it_serves_with_every_setting(bundle: Path, serving: Serving) -> None:
    """Several calls, threads, and weights that it cannot share."""
    with SafeEncoder.open(bundle, variant=VARIANT, serving=serving) as encoder:
        rows = encoder.encode_image(crops(9))
        assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() < 1e-3
        assert np.abs(rows[:1] - encoder.encode_image(crops(1))).max() < 1e-5


@pytest.mark.parametrize("part", [0, 1])
def test_changed_files_are_not_opened(bundle: Path, tmp_path: Path, part: int) -> None:
    """One byte of the topology or of the constants."""
    engine = open_bundle(bundle).engines(VARIANT)[TowerName.TEXT]
    copy_of(bundle, tmp_path / "copy")
    path = tmp_path / "copy" / Path(engine_path(engine)).with_name((engine.file, engine.external_data)[part])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="has changed"):
        SafeEncoder.open(tmp_path / "copy", variant=VARIANT)


def test_what_it_cannot_do_is_said(bundle: Path) -> None:
    """No GPU, no Triton backend, no refit; and doctor tells each precision."""
    with pytest.raises(PrerequisiteError, match="no proven variant runs here"):
        SafeEncoder.open(bundle, variant=VARIANT, device="cuda")
    engine = open_bundle(bundle).engines(VARIANT)[TowerName.IMAGE]
    with pytest.raises(InputError, match="Triton has no backend for openvino-fp32"):
        backend_of(engine)
    assert "build" in reason_against(engine)
    told = {one.what: one for one in capabilities()}
    assert told["target openvino"].ok
    assert told["openvino int8"].ok
    assert not told["openvino fp16"].ok
    assert told["openvino bf16"].ok == (not reason_not_usable(Precision.BF16))
    assert engine.target is Target.OPENVINO


@pytest.mark.parametrize("variant", [VARIANT, OTHER])
def test_rows_that_a_graph_does_not_take_are_refused(bundle: Path, variant: str) -> None:
    """In the same words by either runtime, of which one took ids that are not in the table, and the other negative ones."""
    with SafeEncoder.open(bundle, variant=variant, serving=Serving(selftest_rows=0)) as encoder:
        image, text, model = encoder.session(TowerName.IMAGE), encoder.session(TowerName.TEXT), encoder.manifest.model
        size, last = model.image.crop, model.text.vocabulary - 1
        takes = rf"takes \(n, {size}, {size}, 3\) uint8 or \(n, 3, {size}, {size}\) float32"
        for wrong in (np.zeros((2, 3, size, size), np.uint8), np.zeros((2, size, size, 3), np.float32)):
            with pytest.raises(ContractError, match=takes):
                image.run(wrong)
        ids = np.zeros((1, 7), np.int64)
        assert np.isfinite(text.run(np.append(ids, [[last]], axis=1))).all()
        for wrong_id in (last + 1, 2**40, -1):
            with pytest.raises(ContractError, match=f"ids 0 to {last}, not of {wrong_id}"):
                text.run(np.append(ids, [[wrong_id]], axis=1))
