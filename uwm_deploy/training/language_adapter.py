"""`train language-adapter`: SafeVLM's second stage. The head is frozen, and LoRA on the language model learns behind it."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uwm_deploy.bundle.head import HeadFiles, read_head
from uwm_deploy.errors import ContractError, InputError, IntegrityError, imported
from uwm_deploy.pipeline.request import Request, resolved_recipe
from uwm_deploy.pipeline.run import load_edited
from uwm_deploy.records.adapter import CONFIG, ITEMS, RECORD, WEIGHTS, LanguageAdapter
from uwm_deploy.records.codec import plain_from_record, write_record
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.files import digest_of_file, digest_of_plain, whole_folder
from uwm_deploy.records.head import LanguageTraining
from uwm_deploy.records.places import refuse_foreign
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.risk import risks_from
from uwm_deploy.runtime.versions import versions
from uwm_deploy.towers.language_model import CaptionModel
from uwm_deploy.towers.load import resolve_device
from uwm_deploy.towers.protocol import LoadedModel
from uwm_deploy.towers.safety_head import SafetyHeadModule, head_from_bytes
from uwm_deploy.training.language import LanguageSettings, Lessons, lessons_from, opened_for, own_answers, places_of
from uwm_deploy.training.passes import Kept, Passed, PassSettings, run_passes
from uwm_deploy.training.safety_head import Features
from uwm_deploy.training.safety_head_folder import features_of, set_of

STANDING = "adapter-training"
"""Folder of the run folder that keeps where a training stands."""

_LANGUAGE_MODEL = "model.language_model."
_OF_ADAPTER = ".lora_"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings(PassSettings):
    """How the adapters are made and trained; a row is a pair.

    Attributes:
        rank: Of the adapters.
        alpha: They count alpha / rank.
        dropout: Of what they read.
        decline_missed: Whether unsafe images are to be declined that the head lets through. Nothing is mixed in for them,
            so benign images that look like them are declined, too, beyond the share that the head's threshold is for.
    """

    epochs: int = 3
    batch: int = 4
    learning_rate: float = 2e-4
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    decline_missed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRequest:
    """What the user asked for.

    Attributes:
        build: The edited model that the head belongs to: the request of the build that has it.
        head: Folder of the head, trained with this language model.
        model: LLaVA checkpoint folder.
        out: Folder of the adapters.
        train_on: Set that they are trained on; the calibration set when None.
        max_new_tokens: Longest of the model's own answers, which it is to keep about safe images.
        answer_batch: Images per call when it gives them.
    """

    build: Request
    head: Path
    model: Path
    out: Path
    settings: AdapterSettings
    train_on: str | None = None
    max_new_tokens: int = 64
    answer_batch: int = 8


def train_language_adapter(request: AdapterRequest, reporter: Reporter) -> LanguageAdapter:
    """Trains adapters behind a frozen head and writes their folder; goes on where an interrupted run was.

    Args:
        request: What the user asked for.
        reporter: Progress.

    Raises:
        InputError: If the head has no safety tokens, or they are for another language model; if the folder is taken.
        IntegrityError: If the head belongs to another edited model.
        DataError: If the set has no image pairs.
        PrerequisiteError: If peft or the device is missing.
    """
    package_peft()  # a missing package is told now, and not after hours
    refuse_foreign(request.out, RECORD, "holds no adapters")
    head = read_head(request.head)
    taught = _taught(head, request.head)
    recipe = resolved_recipe(request.build)
    model = load_edited(request.build, reporter)
    _check_edit(head, model)
    asked = LanguageSettings(
        model=request.model,
        question=taught.question,
        refusal=taught.refusal,
        max_new_tokens=request.max_new_tokens,
        batch=request.answer_batch,
    )
    language = opened_for(model, asked, resolve_device(request.build.device))
    language.check_taught(taught.model_digest, taught.model, "the head's safety tokens")
    source, spec = set_of(request.train_on or recipe.data.calibration)
    work = request.build.work or Path(".uwm") / recipe.name
    features = features_of(model, source, spec, request.build, work, reporter)
    own = own_answers(language, source, features.ids, work, reporter)
    behind = _behind(head, features)
    lessons = lessons_from(features, own, taught.question, taught.refusal, behind.prompts)
    adapted = Adapted(language, request.settings)
    kept = Kept(folder=work / STANDING, key=_key(request, head, language, lessons, features))
    with reporter.stage("train", f"adapters of {language.folder.name}, {len(features)} pairs"):
        passed = _passed(adapted, language, lessons, features, behind, request.settings, reporter, kept)
    with whole_folder(request.out) as folder:
        adapted.save(folder)
        (folder / ITEMS).write_text(json.dumps(sorted(features.digests), indent=0), encoding="utf-8")
        record = _record(request, head, taught, adapted, passed, behind, source.record, folder)
        write_record(folder / RECORD, record)
    kept.file.unlink(missing_ok=True)
    return record


def _taught(head: HeadFiles, folder: Path) -> LanguageTraining:
    if head.record.language is None:
        raise InputError(
            f"the head in {folder} has no safety tokens for a language model",
            fix="run `uwm-deploy train safety-head --language-model FOLDER`",
        )
    return head.record.language


def _check_edit(head: HeadFiles, model: LoadedModel) -> None:
    if head.record.edited_weights_digest != model.ref.weights_digest:
        raise IntegrityError(
            "the safety head was trained on other weights than this edit makes",
            fix="give the options that `train safety-head` had",
        )


@dataclass(frozen=True, slots=True)
class _Behind:
    """What the frozen head gives for 2n images, the n safe ones first.

    Attributes:
        tokens: (2n, safety tokens, width) float32.
        prompts: Safety prompt of each, by its risk; empty where it and the tokens are not mixed in.
    """

    tokens: Tensor
    prompts: tuple[str, ...]

    def mixed(self, *, unsafe: bool) -> int:
        """Images of one side whose safety prompt and tokens are mixed in."""
        half = len(self.prompts) // 2
        return sum(map(bool, self.prompts[half:] if unsafe else self.prompts[:half]))


@torch.no_grad()  # not inference mode: its tensors could not be trained behind
def _behind(head: HeadFiles, features: Features, batch: int = 64) -> _Behind:
    module: SafetyHeadModule = head_from_bytes(head.weights, head.record.shape)
    parts = [
        module(torch.from_numpy(rows[start : start + batch]).float())
        for rows in (features.safe, features.unsafe)
        for start in range(0, len(rows), batch)
    ]
    tokens, logits, level = (torch.cat(part) for part in zip(*parts, strict=True))
    risks = risks_from(head.record, logits.numpy(), level.numpy())
    return _Behind(tokens, tuple(risks[row].safety_prompt for row in range(len(risks))))


def package_peft() -> Any:
    """The package that makes adapters.

    Raises:
        PrerequisiteError: If it is not installed.
    """
    return imported("peft", "package peft is not installed", fix="pip install 'uwm-deploy[train]'")


class Adapted:
    """A language model with adapters on its linear layers; making them changes the model in place.

    Attributes:
        targets: Which layers have one, as peft reads it.
        tensors: Adapters by name, (rank, in) and (out, rank) float32.
    """

    def __init__(self, model: CaptionModel, settings: AdapterSettings) -> None:
        peft = package_peft()
        inner = model.module.model.language_model
        names = sorted({n.rpartition(".")[2] for n, part in inner.named_modules() if isinstance(part, nn.Linear)})
        self.targets = rf"{re.escape(_LANGUAGE_MODEL)}.*\.({'|'.join(map(re.escape, names))})"
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=self.targets,
            bias="none",
        )
        torch.manual_seed(settings.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # see training.adapters
            self._wrapped: Any = peft.get_peft_model(model.module, config)
        config.base_model_name_or_path = model.folder.resolve().name  # never where it lay on this machine
        self.tensors = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        if not self.tensors or any(_OF_ADAPTER not in n or not n.startswith(_LANGUAGE_MODEL) for n in self.tensors):
            raise ContractError(
                "something else than adapters of the language model would be trained", fix="report this"
            )

    @property
    def count(self) -> int:
        """Number of trained parameters."""
        return sum(part.numel() for part in self.tensors.values())

    def save(self, folder: Path) -> None:
        """Writes both files of peft, from which any program with peft loads them."""
        self._wrapped.save_pretrained(folder, save_embedding_layers=False)  # else it asks the hub for the vocabulary
        (folder / "README.md").unlink(missing_ok=True)  # peft's own, with nothing filled in


def _passed(
    adapted: Adapted,
    language: CaptionModel,
    lessons: Lessons,
    features: Features,
    behind: _Behind,
    settings: AdapterSettings,
    reporter: Reporter,
    kept: Kept,
) -> Passed:
    n = len(features)
    images = np.concatenate([features.safe, features.unsafe])

    def loss_of(rows: Tensor) -> Mapping[str, Tensor]:
        places = [p for p in places_of(rows.tolist(), n) if p < n or settings.decline_missed or behind.prompts[p]]
        seen, (questions, answers) = torch.from_numpy(images[places]).float(), lessons.at(places)
        mixed = [bool(behind.prompts[place]) for place in places]
        return {"language": language.answer_loss(seen, behind.tokens[places], mixed, questions, answers).float()}

    language.module.train()
    found = run_passes(adapted.tensors, loss_of, n, settings, reporter.progress, label="adapters", kept=kept)
    language.module.eval()
    return found


def _key(request: AdapterRequest, head: HeadFiles, language: CaptionModel, lessons: Lessons, features: Features) -> str:
    """Of all that the training depends on."""
    return digest_of_plain(
        {
            "head": head.digest,
            "language model": language.digest,
            "pairs": list(features.pairs),
            "questions": list(lessons.questions),
            "answers": list(lessons.answers),
            "settings": plain_from_record(request.settings),
            "device": language.device,
            **versions(("torch", "transformers", "peft")),
        }
    )


def _record(
    request: AdapterRequest,
    head: HeadFiles,
    taught: LanguageTraining,
    adapted: Adapted,
    passed: Passed,
    behind: _Behind,
    data: CalibrationRecord,
    folder: Path,
) -> LanguageAdapter:
    return LanguageAdapter(
        model=taught.model,
        model_digest=taught.model_digest,
        head_digest=head.digest,
        edited_weights_digest=head.record.edited_weights_digest,
        weights_digest=digest_of_file(folder / WEIGHTS),
        config_digest=digest_of_file(folder / CONFIG),
        items_digest=digest_of_file(folder / ITEMS),
        question=taught.question,
        refusal=taught.refusal,
        targets=adapted.targets,
        data=data,
        pairs=len(behind.prompts) // 2,
        prompted_unsafe=behind.mixed(unsafe=True),
        prompted_safe=behind.mixed(unsafe=False),
        trainable_parameters=adapted.count,
        loss_first=passed.totals[0],
        loss_last=passed.totals[-1],
        seconds=round(passed.seconds, 3),
        **dataclasses.asdict(request.settings),
    )
