"""Checkpoints from the Hugging Face hub: from its cache where they are whole there, else over the network."""

from __future__ import annotations

from pathlib import Path

from uwm_deploy.errors import InputError, PrerequisiteError, UwmError

_FILES = ["*.json", "*.safetensors", "*.txt"]
_ASKED_S = 10.0
"""Seconds that the hub may take to say whether a revision is there."""
_NOT_THERE = ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError", "HFValidationError")
"""The hub's own errors that a retry does not mend."""


def hub_checkpoint(repo: str, revision: str, *, local_only: bool = False) -> Path:
    """Folder of a pinned revision.

    The hub is asked once, without retries, before anything is fetched: who has no network learns it at once.

    Args:
        repo: Hugging Face id.
        revision: Commit.
        local_only: Take what is on this machine; download nothing.

    Raises:
        InputError: If there is no such repository or revision, or no access to it.
        PrerequisiteError: If the hub cannot be reached, or does not answer as it should.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        try:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=_FILES, local_files_only=True))
        except LocalEntryNotFoundError:
            if local_only:
                raise
        HfApi().repo_info(repo, revision=revision, timeout=_ASKED_S)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_FILES))
    except Exception as error:  # the hub client has many error types
        raise _refusal(repo, revision, error, local_only) from error


def _refusal(repo: str, revision: str, error: Exception, local_only: bool) -> UwmError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    what = f"{repo}@{revision[:12]} cannot be fetched: {lines[0]}"
    folder = "pass --checkpoint FOLDER with its files"
    if any(kind.__name__ in _NOT_THERE for kind in type(error).__mro__):
        return InputError(what, fix=f"check name, revision and access, or {folder}")
    if local_only:
        return PrerequisiteError(f"{repo}@{revision[:12]} is not on this machine", fix=f"download it, or {folder}")
    return PrerequisiteError(what, fix=f"{folder}, or try again where the hub can be reached")
