"""The parts of the runtime that need no bundle: queue, batches, tokens, pixels, drift, lanes of TensorRT."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import io
import json
import logging
import math
import os
import re
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, processors

from uwm_deploy.errors import BusyError, ContractError, DataError, InputError, PrerequisiteError
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.graph import Normalisation, Profile, RowLengths, TensorSpec
from uwm_deploy.records.model import ImageSpec, TextSpec
from uwm_deploy.report.doctor import threads_of
from uwm_deploy.runtime.batching import HOLD, AdmissionQueue, Batcher
from uwm_deploy.runtime.cores import affinity, cores, fit_to_machine, quota, threads_asked
from uwm_deploy.runtime.drift import DriftMonitor, unit_mean
from uwm_deploy.runtime.engine_stream import Cuda, EngineStream
from uwm_deploy.runtime.image import _resized, crop_from_image, image_from, pixels_from_crops, pixels_from_image
from uwm_deploy.runtime.logs import JsonFormatter, event
from uwm_deploy.runtime.pixels import taken
from uwm_deploy.runtime.results import Embeddings, ItemError, Predictions, joined
from uwm_deploy.runtime.tensorrt import buckets_of
from uwm_deploy.runtime.tokenizer import MAX_CHARACTERS, Tokenizer

SPEC = ImageSpec(
    resize=56,
    crop=56,
    resample="bicubic",
    rescale=1 / 255,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)


class Counts:
    """Remembers the batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def batch(self, found, waited_s, seconds) -> None:
        self.sizes.append(len(waited_s))


def _submit(batcher: Batcher, row: np.ndarray, deadline: float = 0.0) -> Future:
    future: Future = Future()
    future.set_running_or_notify_cancel()
    batcher.submit(row, future, deadline)
    return future


def _batcher(run, counts: Counts, **changes) -> Batcher:
    return Batcher(run, **{"max_batch": 4, "threads": 1, "observer": counts, "name": "test"} | changes)


def test_held_rows_leave_as_full_batches_and_the_rest_when_flushed() -> None:
    """Rows of one call fill batches; the last, short one goes when it is told that no more come. Each answer is its own."""
    counts = Counts()
    batcher = _batcher(lambda rows: rows * 2, counts)
    rows = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    answers = [_submit(batcher, row, HOLD) for row in rows]
    for done in answers[:8]:
        done.result(10)
    assert not answers[9].done()
    batcher.flush()
    found = np.stack([answer.result(10) for answer in answers])
    np.testing.assert_allclose(found, rows / np.linalg.norm(rows, axis=1, keepdims=True), rtol=1e-6)
    assert counts.sizes == [4, 4, 2]
    batcher.close()


def test_a_deadline_is_kept_and_gathers_what_comes_before_it() -> None:
    """A row waits for others until its deadline, and no longer."""
    counts = Counts()
    batcher = _batcher(lambda rows: rows, counts)
    started = time.monotonic()
    answers = [_submit(batcher, np.ones(2), started + 0.15) for _ in range(3)]
    assert all(answer.result(5) is not None for answer in answers)
    assert 0.14 <= time.monotonic() - started < 2
    assert counts.sizes == [3]
    batcher.close()


def test_an_engine_that_fails_answers_every_caller_and_lives_on() -> None:
    """Whatever is raised reaches all callers of the batch, and the next batch is served."""
    fail = [True]

    def run(rows: np.ndarray) -> np.ndarray:
        if fail[0]:
            raise MemoryError("none left")
        return rows

    batcher = _batcher(run, Counts())
    answers = [_submit(batcher, np.ones(2), HOLD) for _ in range(4)]
    for answer in answers:
        with pytest.raises(MemoryError):
            answer.result(10)
    fail[0] = False
    assert _submit(batcher, np.ones(2)).result(10) is not None
    batcher.close()


def test_a_row_that_is_no_embedding_fails_alone() -> None:
    """NaN and zero are errors of their row; a wrong number of rows is one of all."""
    batcher = _batcher(lambda rows: rows if len(rows) > 1 else np.ones((5, 2)), Counts())
    rows = [np.array([1.0, 1.0]), np.array([np.nan, 1.0]), np.zeros(2), np.array([3.0, 4.0])]
    answers = [_submit(batcher, row, HOLD) for row in rows]
    np.testing.assert_allclose(answers[3].result(10), [0.6, 0.8])
    for broken in answers[1:3]:
        with pytest.raises(ContractError, match="not finite"):
            broken.result(10)
    with pytest.raises(ContractError, match="5 rows for 1"):
        _submit(batcher, np.ones(2)).result(10)
    batcher.close()


def test_a_closed_batcher_finishes_and_then_refuses() -> None:
    """What was in line is answered, what comes later is not lost in silence."""
    batcher = _batcher(lambda rows: rows, Counts())
    waiting = _submit(batcher, np.ones(2), HOLD)
    batcher.close()
    assert waiting.result(0) is not None
    with pytest.raises(InputError, match="closed"):
        _submit(batcher, np.ones(2)).result(0)


def test_places_are_bounded_fair_and_never_lost() -> None:
    """Who comes first is served first, all its places at once; who leaves or is too late takes none with it."""
    places = AdmissionQueue(4)
    places.take(3, None)
    large, small = places.ask(3), places.ask(1)
    assert not large.done()
    assert not small.done(), "it would overtake"
    assert places.waiting == 4
    with pytest.raises(BusyError, match="4 items"):
        places.take(1, 0.01)
    places.leave(3, large)
    assert small.done(), "who was behind the one that left"
    places.give_back(3)
    places.give_back(1)
    assert (places.taken, places.waiting) == (0, 0)
    granted = places.ask(4)
    places.leave(4, granted)
    assert places.taken == 0


def test_places_under_many_threads() -> None:
    """No more than the capacity is ever inside, and all are free at the end."""
    places, inside, most, lock = AdmissionQueue(8), [0], [0], threading.Lock()

    def work(count: int) -> None:
        for _ in range(50):
            places.take(count, None)
            with lock:
                inside[0] += count
                most[0] = max(most[0], inside[0])
            with lock:
                inside[0] -= count
            places.give_back(count)

    threads = [threading.Thread(target=work, args=(1 + n % 5,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most[0] <= 8
    assert places.taken == 0


def test_a_cancelled_wait_takes_no_place() -> None:
    """A task that is cancelled in line leaves it, and the next one comes in."""

    async def scene() -> None:
        places = AdmissionQueue(1)
        places.take(1, None)
        ticket = places.ask(1)
        waiting = asyncio.wrap_future(ticket)
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
        places.leave(1, ticket)
        behind = places.ask(1)
        places.give_back(1)
        assert behind.done()
        assert places.taken == 1

    asyncio.run(scene())


def _tokenizer(backend: Backend, eos: int) -> Tokenizer:
    content = backend.to_str().encode()
    spec = TextSpec(context_length=24, eos_id=eos, pad_id=eos, tokenizer_digest=digest_of_bytes(content))
    return Tokenizer(content, spec)


def _clip_like() -> Tokenizer:
    from uwm_deploy.data.demo import tokenizer as demo

    content = (Path(demo.__file__).parent / "model" / "tokenizer.json").read_bytes()
    eos = Backend.from_str(content.decode()).token_to_id("<|endoftext|>")
    return _tokenizer(Backend.from_str(content.decode()), eos)


ATTACKS = [
    "a red <|endoftext|> circle",
    "<|startoftext|><|endoftext|>",
    "<|endof<|endoftext|>text|> star",
    "<|EndOfText|> star",
    "<|endoftext|>" * 5,
]


@pytest.mark.parametrize("text", ATTACKS)
def test_special_tokens_of_users_are_letters(text: str) -> None:
    """In neutral mode a caption has exactly one start and one end, whatever is written in it; in exact mode it is cut."""
    tokenizer = _clip_like()
    eos = tokenizer.spec.eos_id
    ids = tokenizer.encode([text], "neutral")[0].tolist()
    end = ids.index(eos)
    assert set(ids[end:]) == {eos}
    assert end >= 5, "the letters of the name are there"
    assert ids.count(eos - 1) == 1, "the start token"


def test_neutral_changes_no_ordinary_text_and_is_the_default() -> None:
    """Texts without such names get the ids of the source model in both modes."""
    tokenizer = _clip_like()
    texts = ["", "a red circle", "fire 🔥 and 水", "< | endoftext | >", "x" * 300, "</s> <pad> [CLS]"]
    assert np.array_equal(tokenizer.encode(texts), tokenizer.encode(texts, "exact"))
    cut = tokenizer.encode([ATTACKS[0]], "exact")[0].tolist()
    assert cut.index(tokenizer.spec.eos_id) < tokenizer.encode([ATTACKS[0]])[0].tolist().index(tokenizer.spec.eos_id)


@pytest.mark.parametrize("text", ["a</s>b", "a\uff1c/s\uff1eb", "</s></s>a", "</s>"])
def test_a_name_that_is_also_a_word_is_broken_up(text: str) -> None:
    """A vocabulary that has the end token as a word of its own, or a normaliser that makes one, is no way around either."""
    words = [("<unk>", 0.0), ("</s>", -1.0), *((letter, -3.0) for letter in "ab </s>")]
    backend = Backend(models.Unigram(words, unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens(["</s>"])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = _tokenizer(backend, 1)
    ids = tokenizer.encode([text], "neutral")[0].tolist()
    end = ids.index(1)
    assert end >= 4
    assert set(ids[end:]) == {1}


@pytest.mark.parametrize(
    ("text", "told"), [(7, "is a int"), ("\ud800", "Unicode"), ("x" * (MAX_CHARACTERS + 1), "char")]
)
def test_what_is_no_caption_is_named(text: object, told: str) -> None:
    """Numbers, broken Unicode and books are errors with their position."""
    with pytest.raises(DataError, match=rf"text 1: .*{told}"):
        _clip_like().encode(["a star", text])  # type: ignore[list-item]


def _photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * height)
    small = rng.integers(0, 256, (max(2, height // 6), max(2, width // 6), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize(
    "size", [(640, 480), (641, 427), (300, 60), (60, 300), (57, 56), (1000, 61), (40, 30), (480, 640)]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "1"])
def test_only_what_is_shown_is_resized_with_the_same_result(size: tuple[int, int], mode: str) -> None:
    """Resizing the part that the crop shows gives what resizing the whole and cropping gives, to one grey level."""
    image = _photo(*size, mode)
    for spec in (SPEC, dataclasses.replace(SPEC, alpha="drop", crop_offset="round", crop=48)):
        whole = image.convert("RGB") if spec.alpha == "white" else image
        resized = whole.resize(_resized(whole.size, spec), Image.Resampling.BICUBIC)
        spare = [(length - spec.crop) / 2 for length in resized.size]
        left, top = (round(s) if spec.crop_offset == "round" else int(s) for s in spare)
        wanted = resized.crop((left, top, left + spec.crop, top + spec.crop)).convert("RGB")
        difference = np.abs(np.asarray(wanted).astype(int) - crop_from_image(image, spec))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.005


def test_looking_up_grey_levels_is_the_arithmetic() -> None:
    """Normalised values are bit for bit those of the formula."""
    crops = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    mean, std = (np.asarray(v, dtype=np.float32) for v in (SPEC.mean, SPEC.std))
    wanted = np.moveaxis((crops.astype(np.float32) * np.float32(SPEC.rescale) - mean) / std, -1, -3)
    assert np.array_equal(pixels_from_crops(crops, SPEC), wanted)
    assert np.array_equal(pixels_from_crops(crops[0], SPEC), wanted[0])


def test_a_strip_of_a_million_pixels_needs_no_memory() -> None:
    """An image whose resized whole would have 800 million pixels is cropped first."""
    assert pixels_from_image(Image.new("RGB", (2_000_000, 1)), SPEC).shape == (3, 56, 56)


def test_what_an_image_may_be(tmp_path: Path) -> None:
    """Paths, bytes of all kinds, Pillow images and arrays are the same image; other things are errors."""
    image = _photo(70, 60)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    forms = [str(tmp_path / "a.png"), tmp_path / "a.png", data, bytearray(data), memoryview(data), np.asarray(image)]
    for form in forms:
        assert np.array_equal(np.asarray(image_from(form)), np.asarray(image))
    for wrong in (7, None, np.zeros((4, 4)), np.zeros((4, 4, 7), np.uint8), b"", io.BytesIO(data), tmp_path, "\0"):
        with pytest.raises(DataError):
            image_from(wrong)  # type: ignore[arg-type]


def test_embeddings_say_what_is_missing() -> None:
    """A broken row is NaN and named; slices and arithmetic are no longer tied to positions."""
    found = joined([np.ones(2), DataError("bad"), np.ones(2)], 2, "float16")
    assert found.dtype == np.float16
    assert isinstance(found, np.ndarray)
    assert found.ok.tolist() == [True, False, True]
    assert [error.position for error in found.errors] == [1]
    assert np.isnan(found[1]).all()
    assert found[:1].errors == ()
    assert type(found @ found.T) is np.ndarray
    assert joined([], 3, "float32").shape == (0, 3)


def test_predictions_have_no_label_for_what_has_no_embedding() -> None:
    """An image that could not be encoded is not given the first class."""
    errors = (ItemError(1, DataError("bad")),)
    found = Predictions(("a", "b"), np.array([[0.1, 0.3], [np.nan, np.nan]]), errors)
    assert found.top == ["b", None]
    assert found.probabilities()[0].sum() == pytest.approx(1)
    assert found.probabilities()[0, 1] > 0.99


def test_drift_is_seen_and_calm_is_not() -> None:
    """Rows like the evidence's raise no alert, other rows and rows that are all the same do, but not before a window."""
    rng = np.random.default_rng(0)

    def rows(n: int, centre: float) -> np.ndarray:
        drawn = rng.normal(size=(n, 16)) + np.eye(16)[0] * centre
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    mean = unit_mean(rows(4000, 3.0))
    calm, moved, frozen = (DriftMonitor(16, window=500) for _ in range(3))
    for _ in range(40):
        calm.add(rows(25, 3.0))
        frozen.add(np.repeat(rows(1, 40.0), 25, axis=0))
    assert calm.state(mean).shift < 0.15
    assert calm.state(mean).spread == pytest.approx(1, abs=0.1)
    assert not calm.state(mean).alert
    assert frozen.state(mean).alert
    moved.add(rows(400, -3.0))
    assert moved.state(mean).shift > 1
    assert not moved.state(mean).alert, "too few rows"
    moved.add(rows(400, -3.0))
    assert moved.state(mean).alert
    for _ in range(100):
        moved.add(rows(50, 3.0))
    assert not moved.state(mean).alert, "what is over is forgotten"


def test_log_lines_are_json() -> None:
    """An event is one line with its fields, newlines and all."""
    record = logging.LogRecord("uwm_deploy.runtime", logging.WARNING, "", 0, "%s %s", ("x", "y"), None)
    record.uwm = {"event": "x", "text": "two\nlines"}
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["text"] == "two\nlines"


def test_events_reach_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    """Handlers of other libraries see a readable line."""
    with caplog.at_level(logging.INFO, "uwm_deploy.runtime"):
        event(logging.INFO, "opened", variant="v")
    assert caplog.messages == ["opened variant=v"]


def grouped(folder: Path, lines: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Control groups as the system shows them, and the file that names a process's own."""
    for name, text in {"own": lines, **{f"groups/{name}": text for name, text in files.items()}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "groups", folder / "own"


V1 = "4:memory:/m\n3:cpu,cpuacct:/a/b\n0::/\n"
LIMITS: dict[str, tuple[str, dict[str, str], float | None]] = {
    "container": ("0::/\n", {"cpu.max": "100000 100000\n"}, 1.0),
    "fraction": ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
    "no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    "empty": ("0::/\n", {"cpu.max": ""}, None),
    "no period": ("0::/\n", {"cpu.max": "1 0\n"}, None),
    "no file": ("", {"other": ""}, None),
    "service": ("0::/a/b.service\n", {"a/b.service/cpu.max": "50000 100000\n", "a/cpu.max": "max 100000\n"}, 0.5),
    "slice": ("0::/a/b.service\n", {"a/b.service/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
    "smallest": ("0::/a\n", {"a/cpu.max": "90000 100000\n", "cpu.max": "50000 100000\n"}, 0.5),
    "of the host": ("0::/gone/x\n", {"cpu.max": "50000 100000\n"}, 0.5),
    "outside": ("0::/../x\n", {"cpu.max": "50000 100000\n"}, 0.5),
    "hybrid": ("0::/x\n", {"unified/x/cpu.max": "50000 100000\n"}, 0.5),
    "version 1": (
        V1,
        {"cpu,cpuacct/a/b/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n"},
        0.5,
    ),
    "its parent": (V1, {"cpu/a/cpu.cfs_quota_us": "150000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 1.5),
    "its top": (V1, {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
    "-1": (V1, {"cpu/a/b/cpu.cfs_quota_us": "-1\n", "cpu/a/b/cpu.cfs_period_us": "100000\n"}, None),
    "of another": (V1, {"cpu/c/cpu.cfs_quota_us": "50000\n", "cpu/c/cpu.cfs_period_us": "100000\n"}, None),
}


@pytest.mark.parametrize("name", LIMITS)
def test_cores_keep_the_quota_of_a_container(tmp_path: Path, name: str) -> None:
    """A process with one core's time is not given the threads of its host, whatever made its control group."""
    lines, files, wanted = LIMITS[name]
    groups = grouped(tmp_path, lines, files)
    assert quota(*groups) == wanted
    assert cores(*groups) == (affinity() if wanted is None else max(1, min(affinity(), math.ceil(wanted))))
    assert quota(tmp_path / "missing", tmp_path / "missing") is None


@pytest.mark.parametrize(("given", "found"), [({}, None), ({"OMP_NUM_THREADS": "3"}, 3)])
def test_threads_keep_the_quota_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], found: int | None
) -> None:
    """Half a core is one thread of PyTorch; who said another number has it. What was set here is nobody's own number."""
    monkeypatch.setattr("uwm_deploy.runtime.cores.affinity", lambda: 2)
    monkeypatch.setattr(os, "environ", given)
    for _ in range(2):  # again in a process that a command starts
        fit_to_machine(*grouped(tmp_path, "0::/\n", {"cpu.max": "50000 100000"}))
        assert given["OMP_NUM_THREADS"] == str(found or 1)
        assert threads_asked() == found
    assert given["GOMP_SPINCOUNT"] == "1000"
    given["OMP_NUM_THREADS"] = "2"
    assert threads_asked() == 2


def test_doctor_warns_of_a_quota() -> None:
    """Half a core is told, with what helps; none is no word."""
    half, none = threads_of(0.5), threads_of(None)
    assert (half.ok, "quota of 0.5 cores" in half.detail) == (False, True)
    assert (none.ok, "quota" in none.detail) == (True, False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "PyTorch 2 of 2 usable cores, 1 for a small model; ONNX Runtime and OpenVINO 2"),
        ("1", "PyTorch 1 of 2 usable cores (OMP_NUM_THREADS=1); ONNX Runtime and OpenVINO 2"),
        ("1000", "PyTorch 2 of 2 usable cores (OMP_NUM_THREADS=1000); ONNX Runtime and OpenVINO 2"),
        (" 1, 2", "PyTorch 1 of 2 usable cores (OMP_NUM_THREADS=1); ONNX Runtime and OpenVINO 2"),
        *((given, f"small model; ONNX Runtime and OpenVINO 2; OMP_NUM_THREADS is '{given}', which no library takes: set")
          for given in ("0", "-1", "abc", "", "2x")),
    ],
)  # fmt: skip
def test_doctor_says_what_threads_are_used(monkeypatch: pytest.MonkeyPatch, given: str | None, said: str) -> None:
    """Not what the variable says: PyTorch has no use for more than the cores, and the others do not read it."""
    for module in ("report.doctor", "runtime.cores"):
        monkeypatch.setattr(f"uwm_deploy.{module}.affinity", lambda: 2)
    monkeypatch.setattr("uwm_deploy.runtime.cores.quota", lambda *_: None)
    monkeypatch.setattr(os, "environ", {} if given is None else {"OMP_NUM_THREADS": given})
    found = threads_of(None)
    assert said in found.detail
    assert found.ok == ("no library" not in found.detail)


CROPS = TensorSpec(
    name="pixels", dtype="uint8", shape=("batch", 4, 5, 3),
    normalisation=Normalisation(rescale=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
)  # fmt: skip
PIXELS = TensorSpec(name="pixels", dtype="float32", shape=("batch", 3, 4, 5))
IDS = TensorSpec(name="ids", dtype="int32", shape=("batch", "tokens"), lengths=RowLengths(longest=9, end_id=7, step=4))
EITHER = "takes (n, 4, 5, 3) uint8 or (n, 3, 4, 5) float32, not "
NO_ROWS: list[tuple[TensorSpec, object, str]] = [
    (CROPS, np.zeros((2, 3, 4, 5), np.uint8), f"{EITHER}(2, 3, 4, 5) uint8"),
    (CROPS, np.zeros((2, 4, 5, 4), np.uint8), f"{EITHER}(2, 4, 5, 4) uint8"),
    (CROPS, np.zeros((4, 5, 3), np.uint8), f"{EITHER}(4, 5, 3) uint8"),
    (CROPS, np.zeros((2, 4, 5, 3), np.float32), f"{EITHER}(2, 4, 5, 3) float32"),
    (CROPS, np.zeros((2, 4, 5, 3), np.int64), f"{EITHER}(2, 4, 5, 3) int64"),
    (CROPS, np.full((2, 3, 4, 5), np.nan, np.float32), "a pixel is not finite"),
    (CROPS, [[1, 2], [3]], "takes an array of (n, 4, 5, 3) uint8 or (n, 3, 4, 5) float32, not a list"),
    (PIXELS, np.zeros((2, 4, 5, 3), np.uint8), "takes (n, 3, 4, 5) float32, not (2, 4, 5, 3) uint8"),
    (PIXELS, np.zeros((2, 3, 4, 5), np.uint8), "takes (n, 3, 4, 5) float32, not (2, 3, 4, 5) uint8"),
    (PIXELS, np.full((2, 3, 4, 5), -np.inf, np.float32), "a pixel is not finite"),
    (PIXELS, np.full((2, 3, 4, 5), 1e300), "a pixel is not finite"),
    (IDS, np.array([1, 2]), "takes (n, 1 to 9) int32, not (2,) int64"),
    (IDS, np.array([[1.0, 2.0]]), "takes (n, 1 to 9) int32, not (1, 2) float64"),
    (IDS, np.array([[True, False]]), "takes (n, 1 to 9) int32, not (1, 2) bool"),
    (IDS, np.array([["a"]]), "takes (n, 1 to 9) int32, not (1, 1) <U1"),
    (IDS, np.array([[5, -1]]), "the ids 0 to 99, not of -1"),
    (IDS, np.array([[5, 100]]), "the ids 0 to 99, not of 100"),
    (IDS, np.array([[5, 2**40]]), f"the ids 0 to 99, not of {2**40}"),
]


@pytest.mark.parametrize(("spec", "rows", "said"), NO_ROWS)
def test_rows_that_a_graph_does_not_take_are_refused(spec: TensorSpec, rows: object, said: str) -> None:
    """Before any runtime has them; each says it in its own words, or computes with them."""
    with pytest.raises(ContractError, match=re.escape(said)):
        taken(rows, spec, vocabulary=100)  # type: ignore[arg-type]


def test_rows_that_a_graph_takes_are_let_pass() -> None:
    """The last id of the table, no row at all, and finite numbers whose sum is not; without a record ids of 32 bits."""
    assert taken(np.array([[0, 99]]), IDS, vocabulary=100).tolist() == [[0, 99]]
    assert taken(np.array([[2**31 - 1]], np.uint64), IDS).tolist() == [[2**31 - 1]]
    assert taken(np.zeros((0, 2), np.int64), IDS).shape == (0, 2)
    large = np.full((2, 3, 4, 5), 3e38, np.float32)
    assert np.array_equal(taken(large, PIXELS), large)
    with pytest.raises(ContractError, match=f"not of {2**31}"):
        taken(np.array([[2**31]]), IDS)


@pytest.mark.parametrize("shape", [(0, 48, 3), (48, 0, 3), (0, 0)])
def test_an_image_without_pixels_is_refused(shape: tuple[int, ...]) -> None:
    """As an array or as an image of Pillow: nothing can be resized from it."""
    array = np.zeros(shape, np.uint8)
    for source in (array, Image.new("RGB", (shape[1], shape[0]))):
        with pytest.raises(DataError, match=f"image of {shape[1]} x {shape[0]} pixels is empty"):
            image_from(source)


def test_buckets_are_powers_of_two_and_the_profile() -> None:
    """Every batch of a profile fits in one."""
    assert buckets_of([Profile(min=1, opt=8, max=32)]) == (1, 2, 4, 8, 16, 32)
    assert buckets_of([Profile(min=2, opt=6, max=24)]) == (2, 4, 6, 8, 16, 24)
    assert buckets_of([Profile(min=1, opt=1, max=1)]) == (1,)
    assert buckets_of([Profile(min=1, opt=1, max=2), Profile(min=3, opt=5, max=9)]) == (1, 2, 3, 4, 5, 8, 9)


class HostCuda:
    """The CUDA runtime's calls on host memory: what is not under test here is NVIDIA's own. Streams run at once."""

    cudaStreamNonBlocking, cudaHostAllocDefault = 1, 0  # noqa: N815 -- NVIDIA's names
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self) -> None:
        self.memory: dict[int, object] = {}
        self.recording: list | None = None
        self.launches = 0

    def _allocate(self, size: int):
        block = (ctypes.c_uint8 * size)()
        self.memory[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def _free(self, address: int):
        del self.memory[address]
        return (0,)

    def do(self, work):
        (work() if self.recording is None else self.recording.append(work))

    def __getattr__(self, name: str):
        return {
            "cudaStreamCreateWithFlags": lambda flags: (0, 7),
            "cudaMalloc": self._allocate,
            "cudaHostAlloc": lambda size, flags: self._allocate(size),
            "cudaFree": self._free,
            "cudaFreeHost": self._free,
            "cudaStreamSynchronize": lambda stream: (0,),
            "cudaStreamDestroy": lambda stream: (0,),
            "cudaStreamBeginCapture": lambda stream, mode: (setattr(self, "recording", []), (0,))[1],
            "cudaStreamEndCapture": lambda stream: (0, self._end()),
            "cudaGraphInstantiate": lambda graph, flags: (0, graph),
            "cudaGraphDestroy": lambda graph: (0,),
            "cudaGraphExecDestroy": lambda graph: (0,),
            "cudaGraphLaunch": self._launch,
            "cudaMemcpyAsync": self._copy,
        }[name]

    def _end(self) -> list:
        recorded, self.recording = self.recording, None
        return recorded

    def _launch(self, graph: list, stream: int):
        self.launches += 1
        for work in graph:
            work()
        return (0,)

    def _copy(self, to: int, source: int, size: int, kind: int, stream: int):
        self.do(lambda: ctypes.memmove(to, source, size))
        return (0,)


class HostEngine:
    """Sums each row of its input, on host memory."""

    device_memory_size_v2 = 0

    def __init__(self, cuda: HostCuda, width: int, capturable: bool) -> None:
        self.cuda, self.width, self.capturable = cuda, width, capturable

    def create_execution_context(self, strategy):
        shape, addresses = [0], {}

        def execute(stream: int) -> bool:
            def work() -> None:
                count = shape[0] * self.width
                rows = np.ctypeslib.as_array((ctypes.c_float * count).from_address(addresses["x"])).reshape(
                    shape[0], -1
                )
                out = np.ctypeslib.as_array((ctypes.c_float * shape[0]).from_address(addresses["y"]))
                out[:] = rows.sum(axis=1)

            self.cuda.do(work)
            return True

        return SimpleNamespace(
            set_device_memory=lambda address, size: None,
            set_input_shape=lambda name, wanted: (shape.__setitem__(0, wanted[0]), True)[1],
            set_tensor_address=lambda name, address: (addresses.__setitem__(name, address), True)[1],
            is_stream_capturable=lambda stream: self.capturable,
            execute_async_v3=execute,
        )


@pytest.mark.parametrize("capturable", [True, False])
def test_a_lane_fills_up_batches_and_records_graphs(capturable: bool) -> None:
    """Every batch size gives its own rows; from the second call of a size on, a recorded graph runs, where it can be."""
    api = HostCuda()
    source = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
    target = TensorSpec(name="y", dtype="float32", shape=("batch", 1))
    lane = EngineStream(Cuda(api), HostEngine(api, 3, capturable), None, source, (target,), (1, 2, 4), lambda _: 0)
    rng = np.random.default_rng(0)
    for _ in range(4):
        for size in (1, 3, 2, 4):
            rows = rng.normal(size=(size, 3)).astype(np.float32)
            [found] = lane.run(rows, (target,))
            np.testing.assert_allclose(found, rows.sum(axis=1, keepdims=True), rtol=1e-5)
    assert api.launches == (13 if capturable else 0)
    lane.close()
    assert not api.memory, "everything was released"


def test_a_failing_cuda_call_is_an_error() -> None:
    """A status other than success stops the call."""
    with pytest.raises(PrerequisiteError, match="failed with 2"):
        Cuda(None)((2,))


def test_embeddings_survive_views() -> None:
    """A view of another array starts without errors."""
    assert np.ones((2, 2)).view(Embeddings).errors == ()
