"""Every shipped TOML file loads; a wrong one is refused with the nearest valid key."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.uwm_edit import STEP, with_edit
from uwm_deploy.errors import InputError, RecipeError
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.compile_spec import BuilderSpec
from uwm_deploy.recipes.data_set import calibration_set_from_toml
from uwm_deploy.recipes.edit_spec import AxisSpec, ClosedForm
from uwm_deploy.recipes.policy import policy_from_toml
from uwm_deploy.recipes.recipe import recipe_from_toml
from uwm_deploy.records.edit import Method
from uwm_deploy.records.graph import Target
from uwm_deploy.records.strength import AxisSetting

ROOT = Path(__file__).parents[2]
BATCH = "batch = { min = 1, opt = 8, max = 32 }"
DEMO, WHERE = resources.read_toml("export", "demo")


@pytest.mark.parametrize("name", resources.names("export"))
def test_every_recipe_loads_and_is_documented(name: str) -> None:
    """Each file of export/ parses, carries its own name, and stands in docs/reference/recipes.md."""
    text, where = resources.read_toml("export", name)
    recipe = recipe_from_toml(text, where=where)
    assert recipe.name == name
    assert f"`{name}`" in (ROOT / "docs" / "reference" / "recipes.md").read_text()
    for data in (recipe.data.calibration, recipe.data.evaluation):
        assert data in resources.names("calibration")


def test_settings_of_both_flavours_are_read() -> None:
    """Each has its own table; several profiles make one range of batches."""
    tables = "[compile.tensorrt]\nhardware_compatibility = 'ampere-plus'\n[compile.tensorrt_rtx]\nworkspace_mib = 512\n"
    batch = "batch = [{ min = 4, opt = 16, max = 16 }, { min = 1, opt = 1, max = 4 }]"
    spec = recipe_from_toml(DEMO.replace(BATCH, batch) + tables, where=WHERE).compile
    assert (spec.profile.min, spec.profile.opt, spec.profile.max, len(spec.profiles)) == (1, 16, 16, 2)
    assert spec.tensorrt.hardware_compatibility == "ampere-plus"
    assert spec.builder(Target.TENSORRT_RTX) == BuilderSpec(workspace_mib=512)
    assert spec.builder(Target.ONNXRUNTIME, "tensorrt-rtx") == BuilderSpec(workspace_mib=512)
    assert spec.builder(Target.ONNXRUNTIME) == BuilderSpec()
    assert spec.providers(Target.ONNXRUNTIME) == ("any",)


@pytest.mark.parametrize("name", resources.names("calibration"))
def test_every_data_set_loads_and_is_documented(name: str) -> None:
    """Each file of calibration/ parses, carries its own name, and stands in docs/reference/data.md."""
    text, where = resources.read_toml("calibration", name)
    assert calibration_set_from_toml(text, where=where).name == name
    assert f"`{name}`" in (ROOT / "docs" / "reference" / "data.md").read_text()


@pytest.mark.parametrize("name", resources.names("ci"))
def test_every_policy_loads(name: str) -> None:
    """Each file of ci/ parses as a policy that limits artifacts, and the page names it."""
    text, where = resources.read_toml("ci", name)
    assert policy_from_toml(text, where=where).artifact
    assert f"`{name}`" in (ROOT / "docs" / "reference" / "policy.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("keep_mass = 0.9", "keepmass = 0.9", "did you mean 'keep_mass'"),
        ('family = "hf-clip"', 'family = "hf-klip"', "hf-clip"),
        ("keep_mass = 0.9", "keep_mass = 1.5", "share between 0 and 1"),
        ('layers = ["*.mlp.fc2"]', "layers = []", "at least one layer pattern"),
        ("format = 1", "format = 2", "reads format = 1"),
        ("opset = 20", 'opset = "20"', r'should be a whole number, is "20"'),
        ("min = 1, opt = 8", "min = 9, opt = 8", "min <= opt <= max"),
        ('rule = "ratio"\n', "", "missing key 'rule'"),
        ("[model]", "[model", "not valid TOML"),
        (BATCH, "batch = []", "batch is empty"),
        (BATCH, "batch = [{ min = 1, opt = 1, max = 2 }, { min = 4, opt = 8, max = 8 }]", "no batch of 3"),
        (BATCH, BATCH + "\n[compile.tensorrt]\ncompute_capabilities = ['8.9']", "hardware_compatibility"),
        (BATCH, BATCH + "\n[compile.tensorrt_rtx]\nhardware_compatibility = 'ampere-plus'", "compute_capabilities"),
        (BATCH, BATCH + "\n[compile.tensorrt_rtx]\nversion_compatible = true", "one release"),
        (BATCH, BATCH + "\n[compile.tensorrt_rtx]\ncompute_capabilities = ['sm_89']", '"8.9"'),
        (BATCH, BATCH + "\n[compile.tensorrt_rtx]\ncompute_capabilities = ['8.9', 'current']", "current alone"),
        (BATCH, BATCH + "\n[compile.onnxruntime]\nproviders = ['cpu', 'cpu']", "name each once"),
        (BATCH, BATCH + "\n[compile.onnxruntime]\nproviders = ['openvino']", "tensorrt-rtx"),
        ('precision = "fp32"', "precision = []", "at least one"),
        ('precision = "fp32"', "precision = ['fp32', 'fp32']", "name each once"),
        ('targets = ["onnxruntime", "tensorrt-rtx"]', "targets = []", "at least one"),
        (BATCH, BATCH + "\n[compile.auto]\nflips = 0", "flips is 0"),
        (BATCH, BATCH + "\n[compile.auto]\nflips = -5", "between 0 and 100"),
        (BATCH, BATCH + "\n[compile.auto]\nflips = 101", "between 0 and 100"),
        (BATCH, BATCH + "\n[compile.auto]\nflips = nan", "compile.auto.flips"),
        (BATCH, BATCH + "\n[compile.auto]\nlowest = 'fp32'", "lower precision"),
        (BATCH, BATCH + "\n[compile.auto]\nitems = 0", "1 or more"),
        (BATCH, BATCH + "\n[compile.tensorrt]\noptimisation_level = 6", "0 to 5"),
        (BATCH, BATCH + "\n[compile.tensorrt]\nworkspace = 6", "did you mean 'workspace_mib'"),
    ],
)
def test_a_wrong_recipe_is_refused(old: str, new: str, message: str) -> None:
    """Each mistake is one line that says where and what would be right."""
    assert old in DEMO
    with pytest.raises(RecipeError, match=message):
        recipe_from_toml(DEMO.replace(old, new, 1), where=WHERE)


AXIS = '[[edit]]\nmethod = "safety-axis"\n'
SETTING = "[edit.axis]\nsetting = { g = 0.5, o = 0.5, kappa = 0.2, a = 1.0, tau = 0.5 }\n"


def test_an_edit_is_a_list_of_steps() -> None:
    """One step or two, the closed-form one last; what selects entries and what is solved are both found."""
    one = recipe_from_toml(with_edit(DEMO), where=WHERE)
    assert (one.method, one.closed_form, one.entries.text.keep_mass) == ("uwm", None, 0.9)
    two = recipe_from_toml(with_edit(DEMO, STEP + AXIS + SETTING), where=WHERE)
    assert (two.method, two.entries) == ("uwm+safety-axis", one.entries)
    assert two.closed_form is not None
    assert two.closed_form.axis.setting == AxisSetting(g=0.5, o=0.5, kappa=0.2, a=1.0, tau=0.5)
    alone = recipe_from_toml(with_edit(DEMO, AXIS), where=WHERE)
    assert (alone.method, alone.closed_form) == ("safety-axis", ClosedForm(method=Method.SAFETY_AXIS, axis=AxisSpec()))
    assert (alone.entries.method, alone.entries.text.layers) == (Method.SAFETY_AXIS, ())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("edit = []\n", "the steps are none"),
        (STEP + STEP, r"the steps uwm\+uwm"),
        (AXIS + STEP, r"the steps safety-axis\+uwm"),
        (AXIS + AXIS, r"the steps safety-axis\+safety-axis"),
        (STEP.partition("[edit.image]")[0], r"edit\[0\]: missing key 'image'"),
        (STEP + SETTING, r"edit\[0\]\.axis belongs to a closed-form step"),
        (AXIS + STEP.partition("\n")[2], "selects no entries"),
        (AXIS + 'towers = ["text"]\n', "edits both towers"),
        (AXIS.replace("safety-axis", "leace") + SETTING, "leace has no strength"),
        (AXIS + "[edit.axis]\nmax_retrieval_loss = -1\n", "a limit is negative"),
        (AXIS + "[edit.axis]\nplacement = 'bias'\n", r"edit\[0\]\.axis\.placement should be one of"),
        (AXIS + SETTING.replace("kappa", "kapa"), "did you mean 'kappa'"),
        (AXIS.replace("safety-axis", "safety-axe"), r"edit\[0\]\.method should be one of"),
        (STEP.replace("[[edit]]", "[edit]"), "edit is one table"),
    ],
)
def test_steps_that_make_no_edit_are_refused(edit: str, message: str) -> None:
    """Each mistake is one line with the number of the step."""
    text = with_edit(DEMO, edit)
    if edit.startswith("edit ="):
        text = edit + with_edit(DEMO, "")
    with pytest.raises(RecipeError, match=message):
        recipe_from_toml(text, where=WHERE)


def test_how_attention_is_compiled_is_said_under_compile() -> None:
    """Each of the three ways is taken; the line of an earlier release is an error that says where it belongs now."""
    for way in ("steps", "fused", "measured"):
        text = DEMO.replace("[compile]\n", f'[compile]\nattention = "{way}"\n')
        assert recipe_from_toml(text, where=WHERE).compile.attention == way
    with pytest.raises(RecipeError, match=r"compile\.attention should be one of"):
        recipe_from_toml(DEMO.replace("[compile]\n", '[compile]\nattention = "flash"\n'), where=WHERE)
    with pytest.raises(RecipeError, match=r"export\.attention is compile\.attention now.*move the line"):
        recipe_from_toml(DEMO.replace("[export]\n", '[export]\nattention = "fused"\n'), where=WHERE)


def test_only_the_flavour_that_has_null_weights_takes_them() -> None:
    """TensorRT has them for convolutions only."""
    asked = "[compile.{}]\nnull_weights = true\n"
    assert recipe_from_toml(DEMO + asked.format("tensorrt_rtx"), where=WHERE).compile.tensorrt_rtx.null_weights
    with pytest.raises(RecipeError, match=r"compile\.tensorrt has no null_weights"):
        recipe_from_toml(DEMO + asked.format("tensorrt"), where=WHERE)


def test_an_unknown_name_lists_the_nearest() -> None:
    """A mistyped recipe name is answered with the right one."""
    with pytest.raises(InputError, match="nearest: demo"):
        resources.read_toml("export", "dmo")


def test_a_policy_that_cannot_fail_is_refused() -> None:
    """Limits without direction, or none at all, are not a policy."""
    with pytest.raises(RecipeError, match="cannot fail"):
        policy_from_toml('format = 1\nname = "x"\nedit = []\nartifact = []\n', where="x")
    with pytest.raises(RecipeError, match="exactly one"):
        policy_from_toml('format = 1\nname = "x"\nedit = []\n[[artifact]]\nmetric = "parity.max_abs"\n', where="x")
