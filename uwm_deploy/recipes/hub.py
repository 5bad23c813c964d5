"""Checkpoints from the Hugging Face hub: from its cache where they are whole there, else over the network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from uwm_deploy.errors import (
    LONGEST_LINE,
    InputError,
    PrerequisiteError,
    UwmError,
    first_line,
    is_of_machine,
    unreadable,
)
from uwm_deploy.recipes.recipe import Family
from uwm_deploy.records.plain_json import value_from_json

_FILES = ["*.json", "*.safetensors", "*.txt"]
_ASKED_S = 10.0
"""Seconds that the hub may take to say whether a revision is there."""
_NOT_THERE = ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError", "HFValidationError")
"""The hub's own errors that a retry does not mend."""


_TOKENIZER = "no tokenizer.json"
_TOKENIZERS = f"{_TOKENIZER}, and no vocab.json with merges.txt"
_IMAGES = {"no preprocessor_config.json": (("preprocessor_config.json",), ("processor_config.json",))}
_NEEDED: Mapping[Family | None, Mapping[str, tuple[tuple[str, ...], ...]]] = {
    None: {"no config": (("config.json",), ("open_clip_config.json",))},
    "open-clip": {"no open_clip_config.json": (("open_clip_config.json",),)},
    "hf-clip": {
        "no config.json": (("config.json",),),
        _TOKENIZERS: (("tokenizer.json",), ("vocab.json", "merges.txt")),
        **_IMAGES,
    },
    "siglip": {"no config.json": (("config.json",),), _TOKENIZER: (("tokenizer.json",),), **_IMAGES},
    "llava": {"no config.json": (("config.json",),)},
}
"""What is said where it is missing, to the sets of files of which one must be there."""


def hub_checkpoint(repo: str, revision: str, *, family: Family | None = None, local_only: bool = False) -> Path:
    """Folder of a pinned revision.

    The hub is asked once, without retries, before anything is fetched: who has no network learns it at once. It is not asked
    where the cache has all that the model needs; other programs leave parts of a checkpoint there.

    Args:
        repo: Hugging Face id.
        revision: Commit.
        family: See `missing_of`.
        local_only: Take what is on this machine; download nothing.

    Raises:
        InputError: If there is no such repository or revision, or no access to it.
        PrerequisiteError: If the hub cannot be reached, or does not answer as it should.
    """
    from huggingface_hub import HfApi, snapshot_download

    missing = ""
    try:
        folder = _cached(repo, revision)
        missing = missing_of(folder, family) if folder else ""
        if folder and not missing:
            return folder
        if not local_only:
            HfApi().repo_info(repo, revision=revision, timeout=_ASKED_S)
            return Path(snapshot_download(repo, revision=revision, allow_patterns=_FILES))
    except Exception as error:  # the hub client has many error types
        raise _refusal(repo, revision, error, missing) from error
    here = f"is not whole on this machine: {missing}" if missing else "is not on this machine"
    raise PrerequisiteError(f"{repo}@{revision[:12]} {here}", fix=f"download it, or {_FOLDER}")


def _cached(repo: str, revision: str) -> Path | None:
    """Folder of a revision in the cache, whole or not; None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Asked for no file, the client gives back the folder of a part, too.
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[], local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def missing_of(folder: Path, family: Family | None) -> str:
    """What a folder lacks to be a whole checkpoint; empty where it lacks nothing.

    Args:
        folder: A revision in the cache, where a file that was not fetched to its end is a link to nothing.
        family: Of the model; None asks for weights and a config.
    """
    found = [
        said
        for said, choices in _NEEDED[family].items()
        if not any(all((folder / name).is_file() for name in names) for names in choices)
    ]
    lacking = [name for name in _shards(folder) if not (folder / name).is_file()]
    if lacking:
        found.append(f"no {lacking[0]}" + (f" and {len(lacking) - 1} more weights" if lacking[1:] else ""))
    elif not any(file.is_file() for file in folder.glob("*.safetensors")):
        found.append("no weights (*.safetensors)")
    return "; ".join(found)


def _shards(folder: Path) -> list[str]:
    """Names of the files that the weights are spread over, as the index of the weights says."""
    index = folder / "model.safetensors.index.json"
    try:
        body = value_from_json(index.read_bytes())
    except (OSError, ValueError) as error:  # of a broken one, the loader says what is wrong
        if is_of_machine(error):
            raise unreadable(str(index), error, fix="") from error
        return []
    named = body.get("weight_map") if isinstance(body, dict) else None
    return sorted({name for name in named.values() if isinstance(name, str)}) if isinstance(named, dict) else []


_FOLDER = "pass --checkpoint FOLDER with its files"


def _refusal(repo: str, revision: str, error: Exception, missing: str) -> UwmError:
    here = f"is not whole on this machine ({missing}), and " if missing else ""
    what = f"{repo}@{revision[:12]} {here}cannot be fetched: {first_line(error, LONGEST_LINE)}"
    if any(kind.__name__ in _NOT_THERE for kind in type(error).__mro__):
        return InputError(what, fix=f"check name, revision and access, or {_FOLDER}")
    return PrerequisiteError(what, fix=f"{_FOLDER}, or try again where the hub can be reached")
