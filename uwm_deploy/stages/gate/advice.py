"""What to try when a check does not pass: one line per kind of check, a command wherever there is one."""

from __future__ import annotations

from collections.abc import Sequence

from uwm_deploy.recipes import shipped
from uwm_deploy.records.verdict import IN_TRAINING, Check, Result

_EXACT = {
    "calibration items in the evaluation set": "take the shared items out of one set; "
    "`uwm-deploy data check CALIBRATION --against EVALUATION` names them",
    "items of the safety head in the evaluation set": "train the head on another set, or measure on another one",
    "weights come from a checkpoint": "build without --weights random",
    "the edit changes the weights": "use another --factor than 1, a smaller --keep-mass, and a method other than none",
    "outputs are finite": "keep the layers that overflow in float32: --keep-float32 PATTERN, or use --precision bf16",
    "limits apply": "add a limit for this precision to the policy",
}

_MORE_ITEMS = "measure on more items: a larger `limit` in the evaluation set, or --evaluation with a larger set"

_NO_ZERO_SHOT = (
    'name zero-shot sets that are here, such as `zero_shot = ["imagefolder:PATH"]`, in the evaluation set\'s TOML file '
    "(docs/reference/zero-shot.md); `uwm-deploy data check SET --for build` says which are missing"
)

_SAFETY = ("GS", "PS", "PU", "P_", "Txt_s", "Img_s", "safe", "hard", "unsafe")
"""Starts of the metrics that say whether an edit makes a model safer without harm to safe queries."""


def advice_for(check: Check, model: str, unproven: Sequence[str] = ()) -> str:
    """What to try; empty for a check that passes.

    Args:
        check: A check.
        model: Name of the model's recipe, for commands.
        unproven: Variants that were built and not executed; only they can gain evidence on another machine.
    """
    if check.result is Result.PASS:
        return ""
    if model not in shipped.names("export"):  # a name, and commands take the path of a recipe or of a checkpoint
        model = "MODEL"
    if check.name in _EXACT:
        return _EXACT[check.name]
    if check.name == "faithful variants":
        return f"see the checks of the variants above{f'; {_attested(unproven)}' if unproven else ''}"
    if check.name == "required evidence":
        return _of_evidence(check, unproven)
    if check.name.endswith("since the baseline") and check.result is Result.NOT_RUN:
        return "store an accepted report with `uwm-deploy baseline set` and pass it with --baseline"
    if check.name.endswith("since the baseline") and check.result is Result.FAIL:
        return (
            "`uwm-deploy baseline compare REPORT --baseline PATH` shows every difference; "
            "if the change is wanted, accept it with `uwm-deploy baseline set`"
        )
    if check.of_outputs and IN_TRAINING in check.name:
        return "measure on a set that shares no image with the training; the note in the report names some of them"
    if check.of_outputs and check.name.endswith(": numbers agree"):
        return "the report was changed: run `uwm-deploy downstream` again"
    if check.waits:
        kind = check.name.split(".")[1]
        return (
            f"measure it with `uwm-deploy downstream {kind}`, and give {kind}.json to --downstream of `build` or `gate`"
        )
    if check.name.startswith("zero_shot") and not check.n and check.result is not Result.FAIL:
        return _NO_ZERO_SHOT
    if check.result is Result.INCONCLUSIVE and check.of_outputs:
        return f"measure more of them: `uwm-deploy downstream {check.name.split('.')[1]}` with a larger set for --on"
    if check.result is Result.INCONCLUSIVE:
        return f"{_MORE_ITEMS}; or {_other_method(model)}" if _is_about_safety(check) else _MORE_ITEMS
    return _of_metric(check, model)


def _attested(variants: Sequence[str]) -> str:
    return f"run `uwm-deploy attest BUNDLE` on a machine that can execute {' or '.join(variants)}"


def _of_evidence(check: Check, unproven: Sequence[str]) -> str:
    """What was built can be executed elsewhere; what was not built, or ran in the wrong place, must be built."""
    if check.subject in unproven:
        return _attested([check.subject])
    if check.result is Result.FAIL:
        return f"build {check.subject} where the policy wants it to run"
    return f"build it: `uwm-deploy build` with {check.subject} among its --target and --precision"


def _of_metric(check: Check, model: str) -> str:
    if check.subject == "edited" and check.name.startswith("risk."):
        return (
            "another head: `uwm-deploy train safety-head` with more pairs (--train-on), another --validation set, or other "
            "rates (--flag, --redirect, --block)"
        )
    if check.name.startswith("canaries"):
        return (
            "the artifact may be of the unedited model: `uwm-deploy diagnose BUNDLE` names the first layer that differs"
        )
    if check.subject == "edited":
        if check.name.startswith("zero_shot"):
            return f"edit less: `uwm-deploy sweep --model {model} --pick 11.4` finds a --keep-mass that keeps knowledge"
        if _is_about_safety(check):
            return _other_method(model)
        return f"another edit: `uwm-deploy sweep --model {model}` measures many; or --method, or other calibration data"
    if check.name.startswith("parity."):
        return "keep sensitive layers in float32 (--keep-float32 PATTERN), or build without this --precision"
    return (
        "keep layers in float32 (--keep-float32 PATTERN, or --precision auto with a smaller --budget), or build without "
        "this --precision"
    )


def _is_about_safety(check: Check) -> bool:
    return check.subject == "edited" and check.name.startswith(_SAFETY) and "since the baseline" not in check.name


def _other_method(model: str) -> str:
    return (
        f"another method: `uwm-deploy build --model {model} --method safety-axis`, or --method uwm+safety-axis; "
        f"`uwm-deploy compare --model {model} --calibration SET --evaluation SET` measures all of them on your own pairs"
    )
