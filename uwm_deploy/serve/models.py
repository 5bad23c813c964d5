"""Models for Triton's Python backend; they run inside the server, with the code and the sessions of the runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.errors import ContractError, DataError, InputError, IntegrityError, UwmError
from uwm_deploy.records.head import RISK_LEVEL, RISK_LOGITS
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.classifier import TEMPLATE as DEFAULT_TEMPLATE
from uwm_deploy.runtime.classifier import prompts_of, weights_from
from uwm_deploy.runtime.cores import cores
from uwm_deploy.runtime.decoding import check_decoding
from uwm_deploy.runtime.image import Decode, crop_from_image, image_from, pixels_from_image
from uwm_deploy.runtime.lengths import cut_together
from uwm_deploy.runtime.pixels import taken
from uwm_deploy.runtime.results import Embeddings
from uwm_deploy.runtime.risk import risks_from
from uwm_deploy.runtime.session import Device, Session, open_engine, provider_of
from uwm_deploy.runtime.tensorrt import compute_capability
from uwm_deploy.runtime.tokenizer import Tokenizer, without_embedding
from uwm_deploy.safeground.canaries import Canaries
from uwm_deploy.serve.guard import ModelPart, check_canaries, check_numpy, open_part
from uwm_deploy.serve.names import (
    CATEGORY,
    DECISION,
    DECODE,
    EMBEDDING,
    ENCODERS,
    ENSEMBLES,
    LABELS,
    PROBABILITY,
    RAW,
    SCORES,
    TEMPLATE,
    TOP,
)

Args = dict[str, str]
Requests = Sequence[Any]
Responses = list[Any]

_KNOWN_LABELS = 64
"""Sets of classes whose texts are kept embedded."""


class _Prepare:
    """Raw inputs to prepared rows; the first step of an ensemble.

    Before the first answer the canaries have gone through the encoder as the server runs it, whatever its backend is.
    """

    tower: TowerName

    def initialize(self, args: Args) -> None:
        """Refuses to be loaded where the repository is not the one that was written of the bundle."""
        self.part = _opened(args)
        self.part.check_engine_beside(self.tower)
        self._canaries = self.part.canaries(self.tower)
        self._refused: UwmError | None = None

    def rows(self, raw: Sequence[bytes]) -> Iterator[np.ndarray | UwmError]:
        """Prepared rows, (3, H, W) float32, (H, W, 3) uint8 or (L,) int64, of one request after the other, or the errors."""
        raise NotImplementedError

    def execute(self, requests: Requests) -> Responses:
        """Prepares all requests together; one broken item fails its own request only."""
        try:
            self._test()
        except UwmError as error:
            return [_failed(error) for _ in requests]
        raw = [_strings(request, RAW[self.tower]) for request in requests]
        rows = self.rows([one for some in raw for one in some])
        return [self._response([next(rows) for _ in some]) for some in raw]

    def _response(self, rows: Sequence[np.ndarray | UwmError]) -> Any:
        for position, row in enumerate(rows):
            if isinstance(row, UwmError):
                return _failed(DataError(f"{self.tower.value} {position}: {row.what}", fix=row.fix))
        spec = self.part.engine(self.tower).inputs[0]
        batch = cut_together(taken(np.stack(rows), spec), spec)  # type: ignore[arg-type]
        return pb_utils.InferenceResponse([pb_utils.Tensor(spec.name, batch)])

    def _test(self) -> None:
        """Once, and again only while the encoder gives no answer at all."""
        if self._refused:
            raise self._refused
        if self._canaries is None:
            return
        found = self._encoded(self._canaries)
        try:
            check_canaries(self._canaries, found, ENCODERS[self.tower])
        except UwmError as error:
            self._refused = error
            raise
        self._canaries = None

    def _encoded(self, canaries: Canaries) -> np.ndarray:
        engine = self.part.engine(self.tower)
        rows = cut_together(taken(canaries.inputs, engine.inputs[0]), engine.inputs[0])
        return _called(ENCODERS[self.tower], engine.inputs[0].name, engine.outputs[0].name, rows, engine.profile.max)


class Preprocess(_Prepare):
    """Encoded images to pixels."""

    tower = TowerName.IMAGE

    def initialize(self, args: Args) -> None:
        """See `_Prepare.initialize`."""
        super().initialize(args)
        self._pool = ThreadPoolExecutor(cores(), thread_name_prefix="uwm-prepare")
        crops = self.part.engine(self.tower).inputs[0].normalisation is not None
        self._prepared = crop_from_image if crops else pixels_from_image
        decode: Decode = "scaled" if self.part.parameters.get(DECODE) == "scaled" else "full"
        manifest = self.part.bundle.manifest
        check_decoding(manifest.verdict, decode, manifest.name)
        self._scaled_for = manifest.model.image if decode == "scaled" else None

    def rows(self, raw: Sequence[bytes]) -> Iterator[np.ndarray | UwmError]:
        """Pixels (3, H, W) float32 or crop (H, W, 3) uint8 of each image, or the error.

        In threads, since decoding leaves Python's lock.
        """
        return self._pool.map(self._pixels, raw)

    def _pixels(self, raw: bytes) -> np.ndarray | UwmError:
        try:
            return self._prepared(image_from(raw, scaled_for=self._scaled_for), self.part.bundle.manifest.model.image)
        except UwmError as error:
            return error
        except Exception as error:  # one request's image, and the others' go on
            return DataError(f"it cannot be prepared: {error}")


class Tokenise(_Prepare):
    """Texts to ids; names of special tokens inside them are ordinary letters."""

    tower = TowerName.TEXT

    def initialize(self, args: Args) -> None:
        """See `_Prepare.initialize`."""
        super().initialize(args)
        bundle = self.part.bundle
        self._tokenizer = Tokenizer(bundle.read(BundleLayout.TOKENIZER), bundle.manifest.model.text)

    def rows(self, raw: Sequence[bytes]) -> Iterator[np.ndarray | UwmError]:
        """Ids (L,) int64 of each text, or the error."""
        return map(self._ids, raw)

    def _ids(self, raw: bytes) -> np.ndarray | UwmError:
        try:
            return self._tokenizer.rows([raw.decode()])[0]
        except UnicodeDecodeError as error:
            return DataError(f"it is not UTF-8 ({error.reason})")


class Encoder:
    """The engine of one tower in the very session that was verified.

    It is what ``backends/<name>/model.py`` gives a server that has no backend of its own for `onnxruntime_onnx` or
    `tensorrt_plan`.
    """

    def initialize(self, args: Args) -> None:
        """Opens the engine from the bytes that were hashed, and puts the canaries through it."""
        self._part = part = _opened(args)
        self._tower = next(tower for tower, name in ENCODERS.items() if name == part.config["name"])
        engine = part.engine(self._tower)
        data, external = part.engine_bytes(self._tower, _file_of(part))
        places: dict[str, Device] = {"CPU": "cpu", "GPU": "cuda"}
        device = places.get(args["model_instance_kind"], "auto") if provider_of(engine) == "any" else "auto"
        self._session: Session = open_engine(engine, data, external, device=device)
        if (canaries := part.canaries(self._tower)) is not None:
            check_canaries(canaries, self._session.run(canaries.inputs), part.folder.name)

    def execute(self, requests: Requests) -> Responses:
        """Embeds the rows of all requests together; one that the engine cannot embed fails alone."""
        name = self._part.engine(self._tower).inputs[0].name
        parts = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
        wrong = [self._without_embedding(part) for part in parts]
        good = iter(self._responses([part for part, error in zip(parts, wrong, strict=True) if error is None]))
        return [next(good) if error is None else _failed(error) for error in wrong]

    def _responses(self, parts: Sequence[np.ndarray]) -> Responses:
        if not parts:
            return []
        engine = self._part.engine(self._tower)
        try:
            found = self._session.run_all(np.concatenate(parts))
        except Exception as error:  # runtimes share no base class
            if len(parts) == 1:
                return [_failed(ContractError(f"the engine cannot embed it: {error}"))]
            return [response for part in parts for response in self._responses([part])]
        ends = np.cumsum([len(part) for part in parts])[:-1]
        split = {spec.name: np.split(found[spec.name].astype(spec.dtype, copy=False), ends) for spec in engine.outputs}
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(key, rows[place]) for key, rows in split.items()])
            for place in range(len(parts))
        ]

    def _without_embedding(self, rows: np.ndarray) -> DataError | None:
        """The error of ids that a caller made himself and that the text tower knows nothing of."""
        if self._tower is TowerName.IMAGE:
            return None
        text = self._part.bundle.manifest.model.text
        if rows.ndim != 2 or not 0 < rows.shape[1] <= text.context_length:
            return DataError(f"rows of ids have 1 to {text.context_length} ids, not {rows.shape[1:]}")
        wrong = without_embedding(rows, text)
        return DataError(f"row {wrong.argmax()} has an id without an embedding") if wrong.any() else None

    def finalize(self) -> None:
        """Releases the engine."""
        self._session.close()


class Decide:
    """What a safety head gives to what its thresholds make of it, as the runtime does."""

    def initialize(self, args: Args) -> None:
        """Refuses to be loaded beside another bundle."""
        head = _opened(args).bundle.manifest.head
        if head is None:
            raise IntegrityError("the bundle has no safety head", fix="write the repository again")
        self._head = head

    def execute(self, requests: Requests) -> Responses:
        """Decides on the images of each request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        logits, level = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in (RISK_LOGITS, RISK_LEVEL)
        )
        found = risks_from(self._head, logits, level)
        parts = [found[row] for row in range(len(found))]
        columns = {
            CATEGORY: np.array([part.category.encode() for part in parts], dtype=object),
            PROBABILITY: np.array([part.probability for part in parts], dtype=np.float32),
            DECISION: np.array([part.decision.value.encode() for part in parts], dtype=object),
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, rows[:, None]) for name, rows in columns.items()])


class ZeroShot:
    """Images and names of classes to cosines, through the two ensembles, so through everything that they check."""

    def initialize(self, args: Args) -> None:
        """Refuses to be loaded beside another bundle."""
        self._part = _opened(args)
        self._weights: dict[tuple[str, ...], np.ndarray] = {}

    def execute(self, requests: Requests) -> Responses:
        """Every request has its own images and classes."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            labels = _texts(request, LABELS)
            templates = _texts(request, TEMPLATE) or [DEFAULT_TEMPLATE]
            scores = self._embedded(TowerName.IMAGE, _strings(request, RAW[TowerName.IMAGE]))
            scores = scores @ self._classes(labels, templates).T
        except UwmError as error:
            return _failed(error)
        top = np.array([labels[best].encode() for best in scores.argmax(axis=1)], dtype=object)
        return pb_utils.InferenceResponse([pb_utils.Tensor(SCORES, scores), pb_utils.Tensor(TOP, top)])

    def _classes(self, labels: list[str], templates: list[str]) -> np.ndarray:
        """(classes, d); of the last sets of classes they are kept."""
        key = (*labels, "", *templates)
        if key not in self._weights:
            prompts = prompts_of(labels, templates)
            rows = self._embedded(TowerName.TEXT, [prompt.encode() for prompt in prompts])
            if len(self._weights) >= _KNOWN_LABELS:
                self._weights.pop(next(iter(self._weights)))
            self._weights[key] = weights_from(Embeddings(rows), len(labels)).astype(np.float32)
        return self._weights[key]

    def _embedded(self, tower: TowerName, raw: Sequence[bytes]) -> np.ndarray:
        if not raw:
            raise InputError(f"{RAW[tower]} is empty", fix="pass at least one")
        rows = np.array(list(raw), dtype=object)[:, None]
        most = self._part.engine(tower).profile.max
        return _called(ENSEMBLES[tower], RAW[tower], EMBEDDING, rows, most).astype(np.float32, copy=False)


def _opened(args: Args) -> ModelPart:
    check_numpy(np.__version__, os.environ.get("TRITON_SERVER_VERSION", ""))
    return open_part(args)


def _file_of(part: ModelPart) -> str:
    """Name of the engine's file for this machine."""
    files: Any = part.config.get("cc_model_filenames") or {}
    return str(files.get(compute_capability(), part.config["default_model_filename"]))


def _strings(request: Any, name: str) -> list[bytes]:
    """The rows of an input of bytes; none where it was left out."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return [] if tensor is None else [bytes(one) for one in tensor.as_numpy().reshape(-1)]


def _texts(request: Any, name: str) -> list[str]:
    try:
        return [one.decode() for one in _strings(request, name)]
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 ({error.reason})") from error


def _called(model: str, input_name: str, output: str, rows: np.ndarray, most: int) -> np.ndarray:
    """Rows through another model of this server, so many at a time at most.

    Raises:
        InputError: With what the model answered instead.
    """
    found = []
    for start in range(0, len(rows), most):
        request = pb_utils.InferenceRequest(
            model_name=model,
            requested_output_names=[output],
            inputs=[pb_utils.Tensor(input_name, rows[start : start + most])],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU),
        )
        response = request.exec()
        if response.has_error():
            raise InputError(f"{model}: {response.error().message()}")
        found.append(pb_utils.get_output_tensor_by_name(response, output).as_numpy())
    return np.concatenate(found)


def _failed(error: UwmError) -> Any:
    """An answer without rows; only what the caller did wrong is the caller's error."""
    code = pb_utils.TritonError.INVALID_ARG if isinstance(error, InputError) else pb_utils.TritonError.INTERNAL
    return pb_utils.InferenceResponse([], pb_utils.TritonError(str(error), code))
