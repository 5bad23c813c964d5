"""Pictures by a diffusion model behind its own and behind an edited text tower; judged and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import CLIPModel

from uwm_deploy.data.open import open_source
from uwm_deploy.data.source import check_own_pairs
from uwm_deploy.data.stored_rows import Row, StoredRows
from uwm_deploy.errors import DataError, InputError, unreadable
from uwm_deploy.pipeline.reach import check_reaches_diffusion
from uwm_deploy.pipeline.save import checked_model
from uwm_deploy.recipes.resolve import calibration_set_of, recipe_of
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.downstream import DownstreamReport, EditedTower, report_files
from uwm_deploy.records.files import whole_file
from uwm_deploy.records.places import check_place
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.versions import versions
from uwm_deploy.studies.downstream.clip_score import clip_scores, original_model
from uwm_deploy.studies.downstream.diffusion import Drawing, DrawModel
from uwm_deploy.studies.downstream.edited import EditedAt, edited_tower_at
from uwm_deploy.studies.downstream.judges import JudgeSpec, OpenJudge, classifier_judge
from uwm_deploy.studies.downstream.nude import nude_judge
from uwm_deploy.studies.downstream.prompts import Prompt, prompts_of_file, prompts_of_set
from uwm_deploy.studies.downstream.shares import Inputs, flagged_shares, paired_means
from uwm_deploy.studies.downstream.sheet import write_sheet
from uwm_deploy.towers.load import load_model, resolve_device
from uwm_deploy.towers.protocol import LoadedModel

ORIGINAL, EDITED = "original", "edited"
SHEET = "sheet.png"
CLIP_SCORE = "clip_score"
_PACKAGES = ("torch", "transformers", "diffusers", "pillow", "nudenet")
_NO_SCORE = "the CLIP score was not run: the model before the edit is not on this machine; pass its folder with --clip"


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawRequest:
    """What is asked for.

    Attributes:
        model: Folder of a Stable Diffusion pipeline.
        tower: Run folder, bundle or checkpoint with the edited text tower.
        on: Set whose texts are drawn; empty with `prompts`.
        prompts: File in the format of I2P, instead of a set.
        out: Folder of the pictures and the report.
        judges: Classifiers.
        nudenet: Let NudeNet judge, too.
        threshold: Of NudeNet.
        clip: Folder of the model before the edit, for the CLIP score; None looks for the recipe's.
        shown: Do not blur flagged pictures on the contact sheet.
        public_key: Whose signature a bundle must have.
        min_bundle_version: Oldest version a bundle may have.
    """

    model: Path
    tower: Path
    out: Path
    on: str = ""
    prompts: Path | None = None
    judges: tuple[JudgeSpec, ...] = ()
    nudenet: bool = True
    threshold: float = 0.5
    clip: Path | None = None
    shown: bool = False
    public_key: Path | None = None
    min_bundle_version: int = 0
    drawing: Drawing = field(default_factory=Drawing)
    device: str = "auto"


def draw(request: DrawRequest, reporter: Reporter) -> DownstreamReport:
    """Draws every prompt twice, judges the pictures, and compares; goes on where a killed run was.

    Args:
        request: What is asked for.
        reporter: Progress.

    Raises:
        InputError: If the edit does not reach the pipeline, or one of the folders does not fit.
        DataError: If there are no prompts.
        PrerequisiteError: If a package or the device is missing.
    """
    check_place(request.out, (*report_files("draw"), SHEET))
    edited = _reaching(request)
    prompts, measured_on = _prompts_of(request)
    device = resolve_device(request.device)
    judges = [classifier_judge(spec, "image-classification", device) for spec in request.judges]
    judges += [nude_judge(request.threshold)] if request.nudenet else []
    if not judges:
        raise InputError("no judge is named", fix="name one with --judge")
    before = original_model(edited.record, request.clip, device)
    model = DrawModel(request.model, device=request.device, drawing=request.drawing)
    with model.restored():  # what does not fit is told now, and not after the pictures of the own encoder
        _put(edited, model)
    work = _Work(request, model, prompts, measured_on, reporter)
    pictures = {ORIGINAL: work.pictures(ORIGINAL, "")}
    tower = _put(edited, model)
    pictures[EDITED] = work.pictures(EDITED, tower.weights_digest)
    flags = {name: _flags(judges, files) for name, files in pictures.items()}
    scores = {name: _scores(before, files, prompts) for name, files in pictures.items()} if before else {}
    _write_sheet(request, prompts, pictures, flags)
    return _report(request, tower, measured_on, judges, (prompts, flags, scores), model)


_Measured = tuple[Sequence[Prompt], Mapping[str, Mapping[str, np.ndarray]], Mapping[str, Mapping[str, np.ndarray]]]


def _report(
    request: DrawRequest,
    tower: EditedTower,
    measured_on: CalibrationRecord,
    judges: Sequence[OpenJudge],
    measured: _Measured,
    model: DrawModel,
) -> DownstreamReport:
    prompts, flags, scores = measured
    inputs = Inputs(
        tuple(prompt.id for prompt in prompts),
        tuple(prompt.side for prompt in prompts),
        tuple(prompt.content for prompt in prompts),
    )
    return DownstreamReport(
        kind="draw",
        model=request.model.resolve().name,
        model_digest=model.digest,
        tower=tower,
        measured_on=measured_on,
        n={side: len(inputs.rows(side)) for side in inputs.present},
        alone={side: inputs.alone(side) for side in inputs.present},
        judges=tuple(judge.record for judge in judges),
        flagged=flagged_shares(inputs, flags[ORIGINAL], flags[EDITED]),
        kept={},
        reference=paired_means(inputs, scores[ORIGINAL], scores[EDITED]) if scores else {},
        corpus_bleu={},
        settings=settings_of(request, model),
        versions=versions(_PACKAGES),
        notes=() if scores else (_NO_SCORE,),
    )


def _write_sheet(
    request: DrawRequest,
    prompts: Sequence[Prompt],
    pictures: Mapping[str, Sequence[Path]],
    flags: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    before, after = (np.any(np.stack(list(flags[name].values())), axis=0) for name in (ORIGINAL, EDITED))
    names = [f"{prompt.id} {prompt.side}" for prompt in prompts]
    write_sheet(request.out / SHEET, names, pictures[ORIGINAL], pictures[EDITED], (before, after), shown=request.shown)


def _reaching(request: DrawRequest) -> EditedAt:
    """The edited tower, if a diffusion model reads what it changed."""
    edited = edited_tower_at(
        request.tower, public_key=request.public_key, min_bundle_version=request.min_bundle_version
    )
    if edited.record is not None:
        check_reaches_diffusion(edited.record)
    return edited


def _put(edited: EditedAt, model: DrawModel) -> EditedTower:
    """Puts the edited text tower into the pipeline; that of a bundle is its patch on the pipeline's own weights.

    The bundle's text graph gives embeddings, and diffusion reads the hidden states before them.
    """
    if edited.patch is not None:
        assert edited.record is not None
        changed = model.put_patched(edited.record, edited.patch, edited.path.resolve().name)
        return dataclasses.replace(edited.told(changed=changed), head_digest="")  # it judges images, none is given here
    clip, tower = _text_tower(edited)
    return dataclasses.replace(tower, changed=model.put_edited(clip, tower.name, edited.record))


def _text_tower(edited: EditedAt) -> tuple[CLIPModel, EditedTower]:
    folder = edited.model
    assert folder is not None
    if edited.record is not None:
        model = checked_model(folder, edited.record)
    else:
        model = load_model(recipe_of(str(folder))[0], folder=folder, device="cpu")
    if not isinstance(model.source, CLIPModel) or model.maps:
        raise InputError(f"{folder.name} is no CLIP model of transformers", fix="use a model of family hf-clip")
    return model.source, edited.told()


def _prompts_of(request: DrawRequest) -> tuple[list[Prompt], CalibrationRecord]:
    if bool(request.on) == (request.prompts is not None):
        raise InputError("either a set or a file of prompts is drawn", fix="give one of --on and --prompts")
    if request.prompts is not None:
        return prompts_of_file(request.prompts, request.drawing.seed)
    spec, _, base = calibration_set_of(request.on)
    check_own_pairs(spec)
    source = open_source(dataclasses.replace(spec, zero_shot=()), base=base)
    return prompts_of_set(source, request.drawing.seed), source.record


class _Work:
    """Pictures of one list of prompts by one pipeline, kept on disk."""

    def __init__(
        self,
        request: DrawRequest,
        model: DrawModel,
        prompts: Sequence[Prompt],
        measured_on: CalibrationRecord,
        reporter: Reporter,
    ) -> None:
        self.request, self.model, self.prompts, self.reporter = request, model, prompts, reporter
        self.depends: Mapping[str, str] = {
            "model": model.digest,
            "items": measured_on.ids_digest,
            "content": measured_on.content_digest,
            **settings_of(request, model),
            **versions(("torch", "transformers", "diffusers")),
        }

    def pictures(self, subject: str, tower: str) -> list[Path]:
        """Every picture behind one tower; those that are on disk are not drawn again."""
        stored = StoredRows(self.request.out, subject, {**self.depends, "tower": tower})
        folder = stored.file.with_suffix("")
        keys: list[Row] = [{"id": p.id, "side": p.side, "input": p.content} for p in self.prompts]
        batch = self.request.drawing.batch
        rows = stored.read(keys, batch)
        if gone := [i for i, row in enumerate(rows) if not (folder / row["output"]).is_file()]:
            rows = rows[: gone[0] // batch * batch]
        stored.keep(rows)
        with self.reporter.stage("draw", f"{subject}, {len(keys)} pictures"):
            for start in range(len(rows), len(keys), batch):
                made: list[Row] = []
                for number, picture in enumerate(self.model.pictures(self.prompts[start : start + batch]), start):
                    name = f"{number:06d}.png"
                    with whole_file(folder / name) as stream:
                        picture.save(stream, "PNG")
                    made.append({**keys[number], "output": name})
                stored.append(made)
                rows += made
                self.reporter.progress(subject, len(rows), len(keys))
        return [folder / row["output"] for row in rows]


def settings_of(request: DrawRequest, model: DrawModel) -> dict[str, str]:
    """What a reader of the report wants to know of how pictures were made."""
    drawing = request.drawing
    return {
        "steps": str(drawing.steps),
        "guidance": repr(drawing.guidance).removesuffix(".0"),
        "size": str(drawing.size or "the pipeline's"),
        "seed": str(drawing.seed),
        "batch": str(drawing.batch),
        "device": model.device.partition(":")[0],
    }


def _flags(judges: Sequence[OpenJudge], files: Sequence[Path]) -> dict[str, np.ndarray]:
    return {
        judge.record.name: np.concatenate([judge.flags(_opened(files[rows])) for rows in _batches(len(files))])
        for judge in judges
    }


def _scores(model: LoadedModel, files: Sequence[Path], prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    texts = [prompt.text for prompt in prompts]
    parts = [clip_scores(model, _opened(files[rows]), texts[rows]) for rows in _batches(len(files))]
    return {CLIP_SCORE: np.concatenate(parts)}


def _batches(n: int) -> list[slice]:
    """Few enough pictures for the memory of any machine."""
    return [slice(start, start + 32) for start in range(0, n, 32)]


def _opened(files: Sequence[Path]) -> list[Image.Image]:
    found = []
    for file in files:
        try:
            with Image.open(file) as opened:
                found.append(opened.convert("RGB"))
        except OSError as error:
            raise unreadable(str(file), error, fix="remove it, and run again", kind=DataError) from error
    return found
