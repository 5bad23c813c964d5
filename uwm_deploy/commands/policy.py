"""Commands about the criteria themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from uwm_deploy.commands.fields import FILE, option, takes_options
from uwm_deploy.commands.group import InOrder
from uwm_deploy.commands.names import DATA_SETS
from uwm_deploy.commands.options import PolicyOptions
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.report.lines import Whole


@click.group(cls=InOrder)
def policy() -> None:
    """Writes down what will count, before it is measured.

    \b
    Example:
      uwm-deploy policy lock --policy strict --evaluation visu-test --out lock.json --by "A. Name"
      uwm-deploy gate dist/model --policy strict --lock lock.json
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class LockOptions:
    """What is locked, by whom, and where it is written."""

    out: Path = option("--out", required=True, type=FILE, help="File that the lock is written to; never replaced.")
    by: str = option("--by", required=True, help="Who answers for the criteria.")
    evaluation: str = option(
        "--evaluation", default="", shell_complete=DATA_SETS, help="Set that will be measured. [default: any]"
    )


@policy.command("lock")
@takes_options
@prints
def policy_lock(asked: LockOptions, judged_by: PolicyOptions) -> Shown:
    """Writes down a policy's digest and criteria before the run.

    Give the digest that is printed to whoever will read the verdict, or commit the file. `gate --lock FILE` refuses another
    policy, another set, and a bundle that was made before the lock.

    \b
    Example:
      uwm-deploy policy lock --policy strict --evaluation visu-test --out lock.json --by "A. Name"
    """
    from uwm_deploy.pipeline.policy_lock import lock_policy

    lock, digest = lock_policy(judged_by.policy, asked.evaluation, asked.out, by=asked.by)
    text = (
        Whole(f"lock: {asked.out}"),
        f"digest: {digest}",
        f"policy: {lock.policy}, {len(lock.criteria)} criteria",
        f"policy digest: {lock.policy_digest}",
    )
    return Shown(data={"lock": str(asked.out), "digest": digest, "policy_digest": lock.policy_digest}, text=text)
