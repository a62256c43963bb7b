"""Exported folders on the Hugging Face Hub, sent by huggingface_hub."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfree_jax.errors import ConfigError, OutputError
from mmfree_jax.installed import import_optional, install_command
from mmfree_jax.outputs import MARKER

_PURPOSE = "export-hf --push-to-hub"


@dataclass(frozen=True)
class SentFile:
    """A file of a folder that is sent.

    Attributes:
      name: in the folder and in the repository.
      size: bytes.
    """

    name: str
    size: int


def check_repository(repository: str, *, sends: bool) -> None:
    """Refuses, before anything is written, what cannot be sent to.

    Args:
      repository: name or owner/name.
      sends: whether a token is needed; a dry run needs none.

    Raises:
      ConfigError: huggingface_hub is absent or broken, the name is none, or there is no token.
    """
    hub = import_optional("huggingface_hub", _PURPOSE, install_command("hub"))
    utils = import_optional("huggingface_hub.utils", _PURPOSE, install_command("hub"))
    try:
        utils.validate_repo_id(repository)
    except ValueError as e:
        reason = " ".join(str(e).split())
        raise ConfigError(
            f"--push-to-hub is {repository!r}: give the repository as owner/name ({reason})"
        ) from e
    if sends and hub.get_token() is None:
        raise ConfigError(
            f"--push-to-hub {repository} needs a token of the Hub: run `hf auth login`, or set "
            "HF_TOKEN; --dry-run needs none"
        )


def files_to_send(folder: str | os.PathLike[str]) -> list[SentFile]:
    """The files of an export, without our own mark on it, by name."""
    files = sorted(file for file in Path(folder).iterdir() if file.is_file())
    return [SentFile(f.name, f.stat().st_size) for f in files if f.name != MARKER]


def send(
    folder: str | os.PathLike[str],
    repository: str,
    files: Sequence[SentFile],
    *,
    private: bool = True,
) -> str:
    """Sends files as one commit to a model repository, which is made if it is not there.

    Args:
      folder: of the export.
      repository: name (then the token's owner has it) or owner/name.
      files: of the folder; others are not sent.
      private: a repository that is made is seen by its owner alone.

    Returns:
      The repository's address.

    Raises:
      OutputError: the Hub cannot be reached, or refuses; the folder stays as it is.
    """
    hub = import_optional("huggingface_hub", _PURPOSE, install_command("hub"))
    # Its errors are OSErrors and those of the HTTP client that it is built on.
    errors = import_optional("huggingface_hub.errors", _PURPOSE, install_command("hub"))
    try:
        api = hub.HfApi(library_name="mmfree-jax")
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message=f"Add {Path(folder).resolve().name}",
            allow_patterns=[file.name for file in files],
        )
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        raise OutputError(
            f"{repository} was not sent ({reason}): {folder} is written, send it with `hf upload "
            f"{repository} {folder}`, or repeat the command with --overwrite"
        ) from e
    return str(made)
