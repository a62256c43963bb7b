"""Typed errors for what a user can put right.

Each message is one line that names the field or file, the value found and the way
out. The command line prints that line and exits with code 2; library callers catch
`MMFreeError` or one of its kinds.
"""

import contextlib
from collections.abc import Iterator


class MMFreeError(Exception):
    """Base of every error that a user can put right."""


@contextlib.contextmanager
def naming(original: str, copy: str) -> Iterator[None]:
    """Errors of the block name `original` where they name its `copy`, which no user knows."""
    try:
        yield
    except MMFreeError as e:
        if copy not in str(e):
            raise
        raise type(e)(str(e).replace(copy, original)) from e


class ConfigError(MMFreeError):
    """A configuration field is unknown, malformed or at odds with another."""


class DataError(MMFreeError):
    """A data set, token shard or tokenizer is missing, damaged or does not fit."""


class CheckpointError(MMFreeError):
    """A checkpoint or run directory is missing, damaged or of another model."""


class TrainingError(MMFreeError):
    """Training cannot go on: for example a loss that is no longer finite."""


class OutputError(MMFreeError):
    """A file or folder cannot be written, is in use, or must not be replaced."""


class StorageError(MMFreeError):
    """A bucket is missing, refuses, or cannot be reached."""
