"""What one item or caller brings never hurts another: ids without an embedding, unknown letters, rows that fail."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors

from tests.data_sets import open_manifest, pair, png
from tests.strange_bundle import TOKEN, with_a_strange_token
from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.space import spaces_of
from uwm_deploy.data.embedding import prepare
from uwm_deploy.edits.pair_stream import PairStream
from uwm_deploy.errors import ContractError, DataError
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.model import TextSpec, TowerName
from uwm_deploy.runtime.batching import HOLD, Batcher, _checked
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.tokenizer import Tokenizer, without_embedding
from uwm_deploy.serve.embed.batch import EmbedBatch

STRANGE = f"a red {TOKEN} circle"


# --- tokenizers -----------------------------------------------------------------------------------------------------


def _tokenizer(backend: Backend, *, eos: int = 1, pad: int = 1, **spec: int) -> Tokenizer:
    content = backend.to_str().encode()
    return Tokenizer(
        content,
        TextSpec(context_length=16, eos_id=eos, pad_id=pad, tokenizer_digest=digest_of_bytes(content), **spec),
    )


def _framed(backend: Backend) -> Backend:
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return backend


def _unigram(*names: str) -> Backend:
    """As SigLIP and T5 have it: the unknown token is known by its number only, and is a special one."""
    words = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")] + [("\u2581", -2.0), ("cab", -1.0)]
    words += [(letter, -3.0) for letter in "abcxyz.</s>"]
    backend = Backend(models.Unigram(words, unk_id=2))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", *names])
    return _framed(backend)


@pytest.mark.parametrize("text", ["~ q", "cab ~~ q cab", "q", "~" * 300, "水 火 cab", "q cab " * 40])
def test_unknown_letters_are_ordinary_text(text: str) -> None:
    """They are the unknown token in both modes, however many there are; what comes beside them keeps its place."""
    tokenizer = _tokenizer(_unigram())
    assert np.array_equal(tokenizer.encode([text, "cab"]), tokenizer.encode([text, "cab"], "exact"))
    assert 2 in tokenizer.encode([text])[0].tolist()


def _end_is_unknown() -> Backend:
    """As CLIP has it: letters that nobody knows are the end token."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("a", -1.0), ("\u2581", -2.0)]
    words += [(letter, -3.0) for letter in "bcxyz"]
    backend = Backend(models.Unigram(words, unk_id=1))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(["<pad>", "</s>"])
    return _framed(backend)


@pytest.mark.parametrize("text", ["~ q", "~", "a ~~ q a", "q水a", "<", "s", "a > b", "~" * 200])
def test_unknown_letters_that_are_the_end_token_are_ordinary_text(text: str) -> None:
    """Both modes have the same ids, and no letter is lost."""
    tokenizer = _tokenizer(_end_is_unknown())
    assert tokenizer.encode([text]).tolist() == tokenizer.encode([text], "exact").tolist()


@pytest.mark.parametrize("text", ["a</s>b", "a</S>b", "a\uff1c/s\uff1eb"])
def test_an_end_that_is_written_is_none_where_unknown_letters_are(text: str) -> None:
    """Its name stands in the text, as it is or as the tokenizer reads it: it is broken up, as with any other vocabulary."""
    tokenizer = _tokenizer(_end_is_unknown())
    apart = {"a</s>b": "a< /s>b", "a</S>b": "a< /s>b", "a\uff1c/s\uff1eb": "a\uff1c /s\uff1eb"}[text]
    assert tokenizer.encode([text]).tolist() == tokenizer.encode([apart], "exact").tolist()


def test_an_end_that_is_written_is_still_no_end() -> None:
    """Unknown letters beside it, and more of it than any number of tries, bring no second end."""
    tokenizer = _tokenizer(_unigram())
    for text in ("~</s>q cab", "</s>" * 200 + "cab", "cab</s>~" * 100):
        ids = tokenizer.encode([text])[0].tolist()
        assert ids.count(1) == len(ids) - ids.index(1), ids


def test_a_special_token_that_ordinary_texts_have_keeps_its_id() -> None:
    """Some tokenizers pad with ``!``: to the source model every ``!`` is that token. The end token is never let through."""
    backend = _unigram("!", "and")
    tokenizer = _tokenizer(backend)
    texts = ["cab!", "!!! a", "a and b", "!"]
    assert np.array_equal(tokenizer.encode(texts), tokenizer.encode(texts, "exact"))
    assert backend.token_to_id("!") in tokenizer.encode(texts[:1])[0]
    ends = _tokenizer(backend, eos=backend.token_to_id("and"))
    assert backend.token_to_id("and") not in ends.encode(["a and b"])[0]


@pytest.mark.parametrize("word", ["waterway", "a waterway b"])
def test_a_token_without_an_embedding_costs_its_text_only(word: str) -> None:
    """A token that was added and got no row of the table is named; other texts, and other words, are encoded."""
    backend = _unigram()
    size = backend.get_vocab_size()
    backend.add_tokens(["waterway"])
    tokenizer = _tokenizer(backend, vocabulary=size)
    good, bad, last = tokenizer.rows(["cab", word, "abc"])
    assert isinstance(bad, DataError)
    assert f"'waterway', id {size}, and the model has embeddings of {size} ids only" in str(bad)
    assert np.array_equal(np.stack([good, last]), tokenizer.encode(["cab", "abc"]))
    with pytest.raises(DataError, match="text 1: it has the token 'waterway'"):
        tokenizer.encode(["cab", word])


def test_ids_that_callers_bring_are_bounded_on_both_sides() -> None:
    """A negative id is as wrong as one that is too large: an engine takes it for one from the end."""
    spec = TextSpec(context_length=3, eos_id=1, pad_id=1, tokenizer_digest="", vocabulary=10)
    rows = np.array([[0, 9, 1], [0, 10, 1], [0, -1, 1], [2**40, 0, 1]])
    assert without_embedding(rows, spec).tolist() == [False, True, True, True]
    assert without_embedding(rows, dataclasses.replace(spec, vocabulary=0)).tolist() == [False, False, True, False]


def test_a_text_that_the_backend_refuses_fails_alone() -> None:
    """A vocabulary of words without an unknown one refuses a batch for one text in it."""
    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "red": 2, "star": 3}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = _tokenizer(_framed(backend))
    good, bad = tokenizer.rows(["red star", "red circle"])
    assert good[:3].tolist() == [2, 3, 1]
    assert "tokenizer" in str(bad)


# --- calibration and evaluation -------------------------------------------------------------------------------------


def _with_a_strange_pair(folder: Path, **changes: object):
    rows = [pair(0, safe_text="abc", unsafe_text="cab"), pair(1, safe_text="abc", unsafe_text="a waterway"), pair(2)]
    return open_manifest(folder, [{**row, **changes} for row in rows])


def test_scoring_leaves_out_an_item_without_ids(tmp_path: Path) -> None:
    """It is counted with the broken ones and named; too many of them are an error about the set, never an internal one."""
    backend = _unigram()
    size = backend.get_vocab_size()
    backend.add_tokens(["waterway"])
    source = _with_a_strange_pair(tmp_path)

    def stream(share: float) -> PairStream:
        return PairStream(
            source, TowerName.TEXT, None, _tokenizer(backend, vocabulary=size), batch_pairs=2, workers=0,
            max_broken_share=share, progress=lambda *_: None,
        )  # fmt: skip

    pairs = stream(0.5)
    assert [key for batch in pairs for key in batch.ids] == ["i0", "i2"]
    assert [item.id for item in pairs.left_out] == ["i1"]
    assert "unsafe text: it has the token 'waterway'" in pairs.left_out[0].reason
    with pytest.raises(DataError, match="1 of 3 items of mine cannot be read"):
        list(stream(0.1))


def test_what_is_measured_is_what_is_served(built, tmp_path: Path) -> None:
    """The evaluation set's texts have the ids of the mode that serves; a text without ids is named by its item."""
    request, outcome = built
    model = outcome.manifest.model
    served = Tokenizer((request.out / BundleLayout.TOKENIZER).read_bytes(), model.text)
    texts = [f"a {colour} <|endoftext|> star" for colour in ("red", "blue")]
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    rows = [
        pair(n, safe_text=text, unsafe_text=text, safe_image=f"{n}.png", unsafe_image=f"{n}.png")
        for n, text in enumerate(texts)
    ]
    source = open_manifest(tmp_path, rows)
    found = prepare(source, model.image, served, workers=0, progress=lambda *_: None)
    assert np.array_equal(found.safe_ids, served.encode(texts, "neutral"))
    assert not np.array_equal(found.safe_ids, served.encode(texts, "exact"))
    smaller = Tokenizer(served._content, dataclasses.replace(model.text, vocabulary=5))
    with pytest.raises(DataError, match="item i0: its text cannot be used: it has the token"):
        prepare(source, model.image, smaller, workers=0, progress=lambda *_: None)


# --- batches --------------------------------------------------------------------------------------------------------


class Counts:
    """Remembers the batches, and which failed."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.failed = 0

    def batch(self, found, waited_s, seconds) -> None:
        self.sizes.append(len(waited_s))
        self.failed += found is None


def _answers(run: Callable[[np.ndarray], np.ndarray], rows: list[np.ndarray]) -> tuple[list, Counts]:
    counts = Counts()
    batcher = Batcher(run, max_batch=8, threads=1, observer=counts, name="test")
    futures: list[Future] = [Future() for _ in rows]
    for row, future in zip(rows, futures, strict=True):
        future.set_running_or_notify_cancel()
        batcher.submit(row, future, HOLD)
    batcher.flush()
    found = [future.exception(20) or future.result() for future in futures]
    batcher.close()
    return found, counts


def _engine_that_refuses(bad: Callable[[np.ndarray], bool], error: BaseException) -> Callable[[np.ndarray], np.ndarray]:
    def run(rows: np.ndarray) -> np.ndarray:
        if any(bad(row) for row in rows):
            raise error
        return rows

    return run


@pytest.mark.parametrize("places", [{0}, {7}, {2, 3}, {0, 3, 6}, set(range(7))])
@pytest.mark.parametrize("error", [RuntimeError("index out of range\nat Gather"), SystemExit(3)])
def test_a_row_that_the_engine_refuses_fails_alone(places: set[int], error: BaseException) -> None:
    """All other rows of the shared batch have their own embedding; the error says what the engine said."""
    rows = [np.array([-1.0 if n in places else 1.0, n]) for n in range(8)]
    found, counts = _answers(_engine_that_refuses(lambda row: row[0] < 0, error), rows)
    for n, answer in enumerate(found):
        if n in places:
            assert isinstance(answer, ContractError)
        else:
            np.testing.assert_allclose(answer, rows[n] / np.linalg.norm(rows[n]))
    if isinstance(error, RuntimeError):
        assert "cannot embed this item: index out of range" in str(found[min(places)])
    assert counts.failed == 1, "one failure is told, not one for each try"


@pytest.mark.parametrize("error", [MemoryError("none left"), DataError("this item is empty")])
def test_what_is_known_about_a_row_is_told_as_it_is(error: Exception) -> None:
    """A machine without memory is no fact about the item: its caller may try again. Errors with words of ours keep them."""
    rows = [np.array([-1.0 if n == 3 else 1.0, n]) for n in range(8)]
    found, _ = _answers(_engine_that_refuses(lambda row: row[0] < 0, error), rows)
    assert found[3] is error
    assert sum(isinstance(answer, Exception) for answer in found) == 1


def test_an_engine_that_answers_nothing_gives_its_own_error() -> None:
    """Then nobody is to blame: each row has what the engine raised, after a bounded number of calls."""
    calls = []

    def run(rows: np.ndarray) -> np.ndarray:
        calls.append(len(rows))
        raise OSError("device lost")

    found, _ = _answers(run, [np.ones(2)] * 8)
    assert all(isinstance(answer, OSError) for answer in found)
    assert len(calls) == 15


@pytest.mark.parametrize(
    "error",
    [RuntimeException("RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer"), MemoryError("none")],
)
def test_a_failure_of_the_machine_is_no_fact_about_a_row(error: Exception) -> None:
    """A row that met it keeps that error, which a job does not write down, though its neighbours were answered."""
    rows = [np.array([-1.0 if n == 2 else 1.0, n]) for n in range(8)]
    found, _ = _answers(_engine_that_refuses(lambda row: row[0] < 0, error), rows)
    assert [answer is error for answer in found] == [n == 2 for n in range(8)]


def test_a_row_that_spoils_the_numbers_of_all_fails_alone() -> None:
    """An engine that says nothing and gives NaN for a whole batch is asked for its halves, too."""
    rows = [np.array([-1.0 if n == 5 else 1.0, n]) for n in range(8)]
    found, _ = _answers(lambda batch: batch * (np.nan if (batch[:, 0] < 0).any() else 1.0), rows)
    assert [isinstance(answer, ContractError) for answer in found] == [n == 5 for n in range(8)]


def test_numbers_behind_the_embedding_have_to_be_finite() -> None:
    """Risks of a safety head stand behind it in the same row."""
    found = _checked(np.array([[3.0, 4.0, 0.5], [3.0, 4.0, np.inf]]), 2, 2)
    np.testing.assert_allclose(found[0], [0.6, 0.8, 0.5])
    assert isinstance(found[1], ContractError)


def test_a_batch_that_is_too_large_is_cut() -> None:
    """An engine without memory for eight rows answers four at a time."""

    def run(rows: np.ndarray) -> np.ndarray:
        if len(rows) > 4:
            raise MemoryError("none left")
        return rows

    found, counts = _answers(run, [np.array([1.0, n]) for n in range(8)])
    assert not any(isinstance(answer, Exception) for answer in found)
    assert counts.sizes == [8, 4, 4]


def test_rows_of_another_shape_cost_nobody_else() -> None:
    """Rows that cannot be put together with the others do not end the thread that serves them."""
    found, _ = _answers(lambda rows: rows, [np.ones(2), np.ones(2), np.ones(3), np.ones(2)])
    assert [len(answer) for answer in found] == [2, 2, 3, 2]


# --- bundles --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["known", "older"])
def strange(built, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with a token that has no embedding; as it is written now, and as older releases wrote it."""
    asked, _ = built
    older = request.param == "older"
    out = with_a_strange_token(asked.out, tmp_path_factory.mktemp("strange") / "bundle", older=older)
    text = json.loads((out / BundleLayout.MANIFEST).read_text())["model"]["text"]
    assert ("vocabulary" in text) == (not older)
    return out


def test_the_size_of_the_table_is_no_part_of_the_space(built) -> None:
    """Embeddings of a bundle that does not say it may be compared with those of one that does."""
    manifest = built[1].manifest
    text = dataclasses.replace(manifest.model.text, vocabulary=0)
    older = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, text=text))
    assert spaces_of(older) == spaces_of(manifest)


def test_one_caller_with_a_strange_token_hurts_no_other(strange: Path) -> None:
    """Many callers share batches with one that sends it: its row has the error, all others their embedding."""
    with SafeEncoder.open(strange) as encoder:
        texts = [f"a star and {n} circles" for n in range(40)]
        wanted = encoder.encode_text(texts)
        found = encoder.encode_text([*texts[:20], STRANGE, *texts[20:]])
        assert [error.position for error in found.errors] == [20]
        assert isinstance(found.errors[0].error, DataError | ContractError)
        np.testing.assert_allclose(np.delete(found, 20, axis=0), wanted, atol=1e-5)
        wrong: list[str] = []

        def caller(seed: int) -> None:
            for n in np.random.default_rng(seed).integers(0, 40, 12):
                row = encoder.encode_text([texts[n], *([STRANGE] if seed < 2 else [])])
                if not (row.ok[0] and np.abs(row[0] - wanted[n]).max() < 1e-5):
                    wrong.append(f"{seed}: {row.errors}")

        threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert wrong == []
        assert encoder.selftest().ok


def test_an_embedding_job_goes_on_behind_a_strange_token(strange: Path) -> None:
    """The row is written with its error, and is not what the job stops at."""
    batch = EmbedBatch(strange, kind="texts")
    found = batch({"key": ["a", "b", "c"], "text": ["a red star", STRANGE, "a blue star"]})
    assert [bool(error) for error in found["error"]] == [False, True, False]
    assert np.isfinite(found["embedding"][[0, 2]]).all()
    batch.encoder().close()
