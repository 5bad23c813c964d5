"""Where everything lies: in a bundle, and in the run folder that a bundle is made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from uwm_deploy.records.graph import Precision
from uwm_deploy.records.model import TowerName


class BundleLayout:
    """Paths inside a bundle, relative to its folder."""

    MANIFEST = "manifest.json"
    RECIPE = "recipe.toml"
    EVALUATION = "evaluation.toml"
    TOKENIZER = "tokenizer.json"
    PATCH = "patch.safetensors"
    CARD = "README.md"
    BASELINE = "baseline.json"
    SCORE = "reports/score.json"
    EDIT = "reports/edit.json"
    EVALUATION_PLACE = "reports/evaluation.json"
    REPORT = "reports/verify.json"
    VERDICT = "reports/verdict.json"
    PLAN = "reports/plan.json"
    TRAINING = "reports/training.json"
    REFERENCE = "evidence/reference.safetensors"
    RISKS = "evidence/risks.safetensors"

    @staticmethod
    def downstream(kind: str) -> str:
        """A report of what came out behind the edited towers, captions or pictures."""
        return f"reports/{kind}.json"

    @staticmethod
    def onnx(name: str) -> str:
        """A file of an exported graph."""
        return f"onnx/{name}"

    @staticmethod
    def canaries(tower: TowerName) -> str:
        """Canaries of a tower."""
        return f"evidence/canaries-{tower.value}.safetensors"

    @staticmethod
    def raw_canaries(tower: TowerName) -> str:
        """Canaries of a tower as users send them: encoded images, or texts."""
        return f"evidence/raw-canaries-{tower.value}.safetensors"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of a run: one folder per stage and variant, and what each holds.

    Attributes:
        root: The folder.
    """

    root: Path

    def stage(self, name: str, variant: str = "") -> Path:
        """Folder of a stage, or of one of its variants."""
        return self.root / (f"{name}-{variant}" if variant else name)

    @property
    def scoring(self) -> Path:
        """Totals of a scoring pass that is under way."""
        return self.root / ".scoring"

    @property
    def fitting(self) -> Path:
        """Totals of a fit that is under way."""
        return self.root / ".fitting"

    @property
    def score_record(self) -> Path:
        """Record of the scores."""
        return self.stage("score") / "score.json"

    @property
    def scores(self) -> Path:
        """The scores; those of single concepts lie beside them."""
        return self.stage("score") / "scores.safetensors"

    @property
    def fit(self) -> Path:
        """Sums of a closed-form step."""
        return self.stage("fit")

    @property
    def fit_record(self) -> Path:
        """Record of the sums."""
        return self.fit / "fit.json"

    @property
    def edit_record(self) -> Path:
        """Record of the edit."""
        return self.stage("edit") / "edit.json"

    @property
    def patch(self) -> Path:
        """The edit as a patch."""
        return self.stage("edit") / "patch.safetensors"

    @property
    def edited_model(self) -> Path:
        """The edited model in the layout of its own library."""
        return self.stage("edit") / "model"

    @property
    def export(self) -> Path:
        """Exported graphs, each beside its record."""
        return self.stage("export")

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that belongs to the text graph."""
        return self.export / "tokenizer.json"

    @property
    def canaries(self) -> Path:
        """Inputs where edited and original differ most."""
        return self.stage("canaries")

    def graphs(self, precision: Precision) -> Path:
        """Graphs in a precision, each beside its record."""
        return self.export if precision is Precision.FP32 else self.stage("convert", precision.value)

    @property
    def precision_plan(self) -> Path:
        """What precision `auto` chose."""
        return self.graphs(Precision.AUTO) / "plan.json"

    def engines(self, variant: str) -> Path:
        """Engines of a variant, each beside its record."""
        return self.stage("compile", variant)

    def compiled(self) -> list[Path]:
        """Folders of engines that are there, whichever build made them."""
        return sorted(path for path in self.root.glob("compile-*") if path.is_dir())

    @property
    def report(self) -> Path:
        """What was measured."""
        return self.stage("verify") / "verify.json"

    @property
    def reference(self) -> Path:
        """Embeddings of the evaluation set by the original and the edited model."""
        return self.stage("verify") / "reference.safetensors"

    @property
    def risks(self) -> Path:
        """What a safety head says of the evaluation set on the edited model."""
        return self.stage("verify") / "risks.safetensors"

    @property
    def verdict(self) -> Path:
        """What the gate said."""
        return self.stage("gate") / "verdict.json"

    @property
    def packaged(self) -> Path:
        """Manifest of the bundle that was written last."""
        return self.stage("package") / "manifest.json"


def tower_record(folder: Path, tower: TowerName) -> Path:
    """Record of a tower's graph or engine."""
    return folder / f"{tower.value}.json"
