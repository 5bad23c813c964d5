"""The encoder of a bundle: what it takes, what it says, what it refuses, and many callers at once."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import io
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save

from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.errors import BusyError, DataError, EvidenceError, InputError, IntegrityError, PrerequisiteError
from uwm_deploy.recipes.resolve import policy_of
from uwm_deploy.records.codec import json_from_record
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.service import Serving
from uwm_deploy.runtime.tensorrt import gpu_reason
from uwm_deploy.stages.gate.gate import gate

VARIANT = "onnxruntime-fp32"


@pytest.fixture(scope="module")
def encoder(built) -> Iterator[SafeEncoder]:
    request, _ = built
    with SafeEncoder.open(request.out) as opened:
        yield opened


def _image(seed: int, side: int = 60) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((side + seed % 7, side), Image.Resampling.BICUBIC)


def _comes_back(encoder: SafeEncoder) -> bool:
    """Whether no item is on its way soon: a place is given back just after its answer."""
    end = time.monotonic() + 10
    while 'uwm_items_on_their_way{tower="image"} 0.0' not in encoder.metrics() and time.monotonic() < end:
        time.sleep(0.01)
    return time.monotonic() < end


def _png(seed: int) -> bytes:
    stream = io.BytesIO()
    _image(seed).save(stream, "PNG")
    return stream.getvalue()


def test_every_form_of_image_gives_the_same_rows(encoder: SafeEncoder, tmp_path: Path) -> None:
    """Paths, bytes, Pillow images, arrays, lists, generators and stacks; several times as many as fit in a batch."""
    images = [_image(seed) for seed in range(70)]
    wanted = encoder.encode_image(images)
    assert wanted.shape == (70, 64)
    assert wanted.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(wanted, axis=1), 1, atol=1e-6)
    single = np.concatenate([encoder.encode_image(image) for image in images[:5]])
    np.testing.assert_allclose(single, wanted[:5], atol=1e-5)
    for seed in range(5):
        (tmp_path / f"{seed}.png").write_bytes(_png(seed))
    forms = (
        [str(tmp_path / f"{seed}.png") for seed in range(5)],
        ((tmp_path / f"{seed}.png") for seed in range(5)),
        (_png(seed) for seed in range(5)),
        iter([np.asarray(image) for image in images[:5]]),
    )
    for form in forms:
        np.testing.assert_allclose(encoder.encode_image(form), wanted[:5], atol=1e-5)
    stack = np.stack([np.asarray(_image(0)), np.asarray(_image(7))])
    np.testing.assert_allclose(encoder.encode_image(stack), wanted[[0, 7]], atol=1e-5)
    assert encoder.encode_image([]).shape == (0, 64)
    assert encoder.encode_image(images[:3], dtype="float16").dtype == np.float16


def test_an_encoder_without_a_head_says_so(encoder: SafeEncoder) -> None:
    """Risks are never made up."""
    for ask in (lambda: encoder.encode_image(_image(0), risk=True), encoder.safety_policy):
        with pytest.raises(InputError, match="no safety head"):
            ask()


def test_a_broken_image_costs_only_its_row(encoder: SafeEncoder, caplog: pytest.LogCaptureFixture) -> None:
    """The others are encoded, the row is NaN, the result and the log say which and why; on request it is an error."""
    images = [_image(0), b"no image", _image(1), "missing.png"]
    with caplog.at_level(logging.WARNING, "uwm_deploy.runtime"):
        found = encoder.encode_image(images)
    assert found.ok.tolist() == [True, False, True, False]
    assert [error.position for error in found.errors] == [1, 3]
    assert "missing.png does not exist" in str(found.errors[1])
    assert sum("item-failed" in message for message in caplog.messages) == 2
    np.testing.assert_allclose(found[[0, 2]], encoder.encode_image([images[0], images[2]]), atol=1e-5)
    with pytest.raises(DataError, match="image 1: image bytes is not a whole image"):
        encoder.encode_image(images, on_error="raise")
    with pytest.raises(DataError, match="image 0"):
        encoder.encode_image(b"no image")
    assert 'uwm_items_total{outcome="DataError",tower="image"}' in encoder.metrics()


def test_texts_and_what_is_none(encoder: SafeEncoder) -> None:
    """One, several and many texts; what is no text costs its row only."""
    texts = [f"a red circle number {n}" for n in range(100)]
    found = encoder.encode_text(iter(texts))
    assert found.shape == (100, 64)
    np.testing.assert_allclose(found[7], encoder.encode_text(texts[7])[0], atol=1e-5)
    mixed = encoder.encode_text(["a star", 5, "a circle"])  # type: ignore[list-item]
    assert mixed.ok.tolist() == [True, False, True]
    assert "is a int" in str(mixed.errors[0])


def test_an_end_token_hides_nothing(encoder: SafeEncoder) -> None:
    """Whatever follows the name of the end token still counts, unless exact mode is asked for."""
    safe, attack = "a red circle", "a red circle<|endoftext|> burning"
    plain, exact = encoder.encode_text([safe, attack]), encoder.encode_text([safe, attack], special_tokens="exact")
    np.testing.assert_allclose(exact[0], exact[1], atol=1e-6)
    assert encoder.similarity(plain[:1], plain[1:])[0, 0] < 0.999
    np.testing.assert_allclose(plain[0], exact[0], atol=1e-6)


@pytest.mark.parametrize("word", ["Neutral", "x", None])
def test_a_misspelt_choice_picks_nothing(encoder: SafeEncoder, built, word: str | None) -> None:
    """Neither in a call nor at opening: another word must not be the mode that hides what follows an end token."""
    for call in (
        lambda: encoder.encode_text("a red circle", special_tokens=word),
        lambda: asyncio.run(encoder.aencode_text(["a red circle"], special_tokens=word)),
        lambda: encoder.encode_text(["a red circle"], on_error=word),
        lambda: encoder.encode_image([b"broken"], on_error=word),
        lambda: SafeEncoder.open(built[0].out, decode=word),
        lambda: SafeEncoder.open(built[0].out, device=word),
    ):
        with pytest.raises(InputError, match=rf"is {word!r}; pass "):
            call()


def test_zero_shot(encoder: SafeEncoder) -> None:
    """Labels are scored by cosine, templates averaged, and a broken image gets no label."""
    labels = ["red", "blue", "{odd}"]
    classifier = encoder.zero_shot(labels, ["a {} circle", "the colour {}"])
    texts = encoder.encode_text(["a blue circle", "the colour blue"]).mean(axis=0)
    np.testing.assert_allclose(classifier.weights[1], texts / np.linalg.norm(texts), atol=1e-5)
    red = Image.new("RGB", (48, 48), (250, 10, 10))
    found = classifier.classify([red, b"broken"])
    wanted = encoder.similarity(encoder.encode_image(red), classifier.weights)[0]
    np.testing.assert_allclose(found.scores[0], wanted, atol=1e-6)
    assert found.top[0] in labels
    assert found.top[1] is None
    assert len(found.errors) == 1
    assert asyncio.run(classifier.aclassify(red)).top == found.top[:1]
    with pytest.raises(InputError, match=r"has no \{\}"):
        encoder.zero_shot(labels, "a photo")
    with pytest.raises(InputError, match="occurs twice"):
        encoder.zero_shot(["a", "a"])


def test_many_asyncio_callers_share_batches_and_get_their_own_rows(built) -> None:
    """Each of 64 callers gets the row of its own image and its own text, from batches of several, in any order."""
    request, _ = built
    with SafeEncoder.open(request.out, serving=Serving(max_delay_ms=20)) as encoder:
        images = [_image(seed) for seed in range(64)]
        wanted, texts = encoder.encode_image(images), [f"a star and {n} circles" for n in range(64)]
        words = encoder.encode_text(texts)
        before = _batches(encoder)

        async def caller(n: int) -> None:
            for _ in range(3):
                np.testing.assert_allclose((await encoder.aencode_image(images[n]))[0], wanted[n], atol=1e-5)
                np.testing.assert_allclose((await encoder.aencode_text(texts[n]))[0], words[n], atol=1e-5)

        async def everybody() -> None:
            await asyncio.gather(*(caller(n) for n in range(64)))

        asyncio.run(everybody())
        calls, rows = (after - was for after, was in zip(_batches(encoder), before, strict=True))
        assert rows == 64 * 3
        assert calls < rows / 2


def _batches(encoder: SafeEncoder) -> tuple[int, int]:
    """Calls of the image engine, and rows in them."""
    lines = dict(line.rsplit(" ", 1) for line in encoder.metrics().splitlines() if not line.startswith("#"))
    return tuple(int(float(lines[f'uwm_batch_rows_{what}{{tower="image"}}'])) for what in ("count", "sum"))  # type: ignore[return-value]


def test_threads_get_their_own_rows(encoder: SafeEncoder) -> None:
    """Calls of several sizes from many threads, with broken images between, are answered each in its order."""
    images = [_image(seed) for seed in range(40)]
    wanted = encoder.encode_image(images)

    def call(seed: int) -> None:
        picked = np.random.default_rng(seed).integers(0, 40, 1 + seed % 9)
        found = encoder.encode_image([*(images[n] for n in picked), b"broken"])
        assert [error.position for error in found.errors] == [len(picked)]
        np.testing.assert_allclose(found[:-1], wanted[picked], atol=1e-5)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(call, range(80)))


def test_the_event_loop_is_never_blocked(built) -> None:
    """While more callers wait than there are places, other tasks of the loop keep running."""
    request, _ = built
    with SafeEncoder.open(request.out, serving=Serving(max_batch=2, queue_items=4, workers=1)) as encoder:

        async def scene() -> float:
            late, done = [0.0], asyncio.Event()

            async def heart() -> None:
                while not done.is_set():
                    before = time.monotonic()
                    await asyncio.sleep(0.005)
                    late[0] = max(late[0], time.monotonic() - before - 0.005)

            beating = asyncio.create_task(heart())
            found = await asyncio.gather(*(encoder.aencode_image([_image(n) for n in range(10)]) for _ in range(20)))
            assert all(rows.ok.all() for rows in found)
            done.set()
            await beating
            return late[0]

        assert asyncio.run(scene()) < 0.5
        assert _comes_back(encoder)


class Gate:
    """A session that answers when it is told to, around a real one."""

    concurrency = 1

    def __init__(self, session) -> None:
        self._session, self.open = session, threading.Event()
        self.where, self.max_batch = session.where, session.max_batch

    def run(self, batch):
        self.open.wait(30)
        return self._session.run(batch)

    def close(self) -> None:
        self._session.close()


@pytest.fixture
def slow(built, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SafeEncoder, Gate]]:
    """An encoder with few places whose image engine waits."""
    request, _ = built
    gates = {}
    from uwm_deploy.runtime import encoder as module

    opened = module._sessions

    def gated(*arguments):
        sessions = opened(*arguments)
        gates["image"] = Gate(sessions[TowerName.IMAGE])
        return sessions | {TowerName.IMAGE: gates["image"]}

    monkeypatch.setattr(module, "_sessions", gated)
    limits = Serving(max_batch=2, queue_items=4, queue_timeout_s=0.1, selftest_rows=0)
    with SafeEncoder.open(request.out, serving=limits) as encoder:
        yield encoder, gates["image"]
        gates["image"].open.set()


def test_more_calls_of_the_engine_are_under_way_at_once(built, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as asked for, of 8 rows each, and every row is its image's; by default one call has all rows."""
    request, _ = built
    from uwm_deploy.runtime.session import OnnxRuntimeSession

    run, lock, together = OnnxRuntimeSession.run, threading.Lock(), threading.Barrier(3)
    seen: list[int] = []

    def watched(session: OnnxRuntimeSession, batch: np.ndarray) -> np.ndarray:
        with lock:
            seen.append(len(batch))
        if several:
            together.wait(60)  # a third call that waits for the first two breaks it
        return run(session, batch)

    images, several = [_image(seed) for seed in range(24)], False
    monkeypatch.setattr(OnnxRuntimeSession, "run", watched)
    with SafeEncoder.open(request.out, serving=Serving(selftest_rows=0)) as encoder:
        wanted = encoder.encode_image(images)
    assert max(seen) == min(24, encoder.manifest.engines[0].profile.max) > 8
    several = True
    seen.clear()
    with SafeEncoder.open(request.out, serving=Serving(calls=3, selftest_rows=0)) as encoder:
        np.testing.assert_allclose(encoder.encode_image(images), wanted, atol=1e-5)
    assert seen == [8, 8, 8]
    with pytest.raises(InputError, match="calls is 0"):
        Serving(calls=0)
    for wrong in ({"threads": 1.5}, {"calls": "2"}, {"max_delay_ms": "1"}, {"queue_timeout_s": "1"}, {"workers": None}):
        with pytest.raises(InputError, match=rf"{next(iter(wrong))} is .*; pass a (whole )?number"):
            Serving(**wrong)
    with pytest.raises(InputError, match="pass 0 or more"):
        Serving(max_delay_ms=float("nan"))


@pytest.mark.parametrize(
    ("serving", "available", "threads"),
    [
        (Serving(), 3, 3),
        (Serving(threads=2), 3, 2),
        (Serving(calls=4), 16, 13),
        (Serving(calls=4, threads=8), 16, 5),
        (Serving(calls=4), 2, 1),
    ],
)
def test_calls_share_the_threads(serving: Serving, available: int, threads: int) -> None:
    """A session adds all but one of its threads to those that call it, so no core is left over and none is asked twice."""
    assert serving.session_threads(available) == threads


def test_who_finds_no_place_in_time_is_told(slow) -> None:
    """When the engine stands still, memory stays bounded: callers beyond the places get an error, the others their rows."""
    encoder, gate = slow

    async def scene() -> list:
        calls = [asyncio.create_task(encoder.aencode_image(_image(n))) for n in range(4)]
        await asyncio.sleep(0.05)
        with pytest.raises(BusyError, match="no place"):
            await encoder.aencode_image(_image(5))
        with pytest.raises(BusyError):
            await asyncio.to_thread(encoder.encode_image, [_image(5)])
        gate.open.set()
        return await asyncio.gather(*calls)

    assert all(rows.ok.all() for rows in asyncio.run(scene()))
    assert 'uwm_refused_total{tower="image"} 2.0' in encoder.metrics()
    assert encoder.encode_image(_image(5)).ok.all()


def test_a_caller_that_goes_away_gives_its_place_back(slow) -> None:
    """Tasks that are cancelled, let in or in line, leave every place free."""
    encoder, gate = slow

    async def scene() -> None:
        calls = [asyncio.create_task(encoder.aencode_image(_image(n))) for n in range(6)]
        await asyncio.sleep(0.05)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(scene())
    gate.open.set()
    assert encoder.encode_image([_image(n) for n in range(9)]).ok.all()
    assert _comes_back(encoder)


def test_an_iterable_that_fails_hangs_nobody(encoder: SafeEncoder) -> None:
    """An error of the caller's own generator reaches the caller, and the encoder goes on."""

    def broken() -> Iterator[Image.Image]:
        yield _image(0)
        raise KeyError("of the caller")

    with pytest.raises(KeyError):
        encoder.encode_image(broken())
    assert encoder.encode_image(_image(0)).ok.all()


def test_the_selftest_is_on_the_served_path(encoder: SafeEncoder) -> None:
    """Both edited towers answer like the edited model, and the metrics say so."""
    result = encoder.selftest()
    assert result.ok
    assert set(result.ratios) == {"image", "text"}
    assert max(result.ratios.values()) < 0.01
    text = encoder.metrics()
    assert "uwm_canary_ok 1.0" in text
    assert 'uwm_canary_ratio{tower="text"}' in text
    assert f'variant="{VARIANT}"' in text


def _changed(built, out: Path, *, canaries: bool = False, other_files: bool = False) -> Path:
    """The bundle as it would be written with other evidence, every digest right: the real gate, the real packaging."""
    request, outcome = built
    report, parts = outcome.report, {file.path: request.out / file.path for file in outcome.manifest.files}
    if canaries:
        for tower in TowerName:
            name = f"evidence/canaries-{tower.value}.safetensors"
            tensors = load_file(request.out / name)
            swapped = {"inputs": tensors["inputs"], "original": tensors["edited"], "edited": tensors["original"]}
            parts[name] = save(swapped)
    if other_files:
        digests = dict.fromkeys(("image", "text"), "sha256:" + "0" * 64)
        artifacts = [
            dataclasses.replace(a, artifact_digests=digests) if a.variant == VARIANT else a for a in report.artifacts
        ]
        report = dataclasses.replace(report, artifacts=tuple(artifacts))
    content = json_from_record(report).encode()
    policy, digest = policy_of(request.policy)
    verdict = gate(report, policy, policy_digest=digest, report_digest=digest_of_bytes(content))
    parts |= {"reports/verify.json": content, "reports/verdict.json": json_from_record(verdict).encode()}
    bundle_from_parts(out, dataclasses.replace(outcome.manifest, verdict=verdict), parts)
    return out


def test_the_wrong_model_is_not_served(built, tmp_path: Path) -> None:
    """A bundle whose engines answer like what its evidence calls the original model is refused when it is opened."""
    path = _changed(built, tmp_path / "b", canaries=True)
    with pytest.raises(IntegrityError, match="does not answer like the edited model"):
        SafeEncoder.open(path)
    with SafeEncoder.open(path, allow_unsafe=True) as encoder:
        assert not encoder.selftest().ok
        assert "uwm_canary_ok 0.0" in encoder.metrics()


def test_evidence_of_other_files_proves_nothing(built, tmp_path: Path) -> None:
    """A bundle whose verdict is about other bytes is not opened, by itself or by name."""
    path = _changed(built, tmp_path / "b", other_files=True)
    for variant in (None, VARIANT):
        with pytest.raises(EvidenceError, match="the verdict is about another engine"):
            SafeEncoder.open(path, variant=variant)


def test_the_choice_is_told_with_every_reason(encoder: SafeEncoder) -> None:
    """Candidates are in order, each with why it was not taken; the one that runs is proven."""
    assert encoder.variant == VARIANT
    told = {(one.variant, one.device): one.refused for one in encoder.selection.candidates}
    assert told[VARIANT, "cpu"] == ""
    assert [one.device for one in encoder.selection.candidates][-1] == "cpu"
    if gpu_reason():
        assert "unproven" in told["tensorrt-rtx-fp32", "cuda"]
        assert "no NVIDIA driver" in told["tensorrt-rtx-fp32", "cuda"]
        assert told[VARIANT, "cuda"]
    assert VARIANT in encoder.why


def test_asking_for_a_gpu_never_gives_a_cpu(built) -> None:
    """Without a GPU it is an error with exit code 6, whether or not a variant is named."""
    if not gpu_reason():
        pytest.skip("this machine has a GPU")
    request, _ = built
    for variant in (None, VARIANT):
        with pytest.raises(PrerequisiteError, match="no proven variant runs here") as caught:
            SafeEncoder.open(request.out, device="cuda", variant=variant)
        assert caught.value.exit_code == 6
    with pytest.raises(InputError, match="cannot run on the CPU"):
        SafeEncoder.open(request.out, device="cpu", variant="tensorrt-rtx-fp32")


def test_drift_is_compared_with_the_evidence(built, caplog: pytest.LogCaptureFixture) -> None:
    """A thousand times the same picture raises an alert, in the metrics and once in the log."""
    request, _ = built
    with SafeEncoder.open(request.out) as encoder:
        assert not encoder.drift()["image"].alert
        encoder.encode_image([_image(3, 48)] * 1100)
        with caplog.at_level(logging.WARNING, "uwm_deploy.runtime"):
            assert encoder.drift()["image"].alert
            assert 'uwm_drift_alert{tower="image"} 1.0' in encoder.metrics()
        assert sum(message.startswith("drift ") for message in caplog.messages) == 1
        assert not encoder.drift()["text"].alert


def test_a_closed_encoder_refuses_and_a_forgotten_one_ends(built) -> None:
    """Closing answers what was let in, twice is harmless; without closing, its threads end with it."""
    request, _ = built
    encoder = SafeEncoder.open(request.out)
    encoder.close()
    encoder.close()
    with pytest.raises(InputError, match="closed"):
        encoder.encode_image(_image(0))
    with pytest.raises(InputError, match="closed"):
        asyncio.run(encoder.aencode_text("a star"))
    assert not encoder.selftest().ok
    before = set(threading.enumerate())
    forgotten = SafeEncoder.open(request.out)
    forgotten.encode_image(_image(0))
    threads = set(threading.enumerate()) - before
    assert threads
    del forgotten
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
