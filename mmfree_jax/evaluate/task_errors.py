"""Errors of lm-eval over what users give it: definitions of tasks, and their data.

Import this module only where lm-eval is installed (the extra `eval`).
"""

import contextlib
import errno
import traceback
from collections.abc import Iterator
from pathlib import Path

from lm_eval.api.model import TemplateLM

from mmfree_jax.errors import DataError, MMFreeError
from mmfree_jax.text_files import DEEPEST, open_file, parse_json, read_bytes

_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")


def check_is_file(file: Path) -> None:
    """Refuses a pipe or a device in the place of a task's data, which lm-eval would wait for,
    and JSON so deep that its reader would end the process.

    Raises:
      DataError: names it.
    """
    if file.suffix not in _SUFFIXES:
        return
    try:
        open_file(file).close()
        lines = read_bytes(file).split(b"\n") if file.suffix in (".jsonl", ".json") else []
    except OSError as e:
        if e.errno == errno.EINVAL:
            raise DataError(f"{file} is {e.strerror}: give a task's data as a file") from e
        return
    for number, line in enumerate(lines, 1):
        if line.count(b"[") + line.count(b"{") > DEEPEST:  # maybe in each other
            try:
                parse_json(line)
            except ValueError as e:
                raise DataError(f"{file}, line {number}: {e}: repair it") from e


@contextlib.contextmanager
def task_errors(tasks_dir: Path | None) -> Iterator[None]:
    """Turns what lm-eval raises over a task's definition or its data into a DataError.

    It reads both without a look at their types, and raises whatever comes of it; an error out of
    the model stays as it is.

    Args:
      tasks_dir: where the user's tasks are, for the message.

    Raises:
      DataError: says what lm-eval said, and the way out.
    """
    try:
        yield
    except OSError as e:
        reason = " ".join(str(e).split())[:200]
        raise DataError(
            f"a task's data cannot be read ({reason}): run `mmfree eval fetch-tasks`, or give "
            "local files with --tasks-dir"
        ) from e
    except Exception as e:
        frames = [frame for frame, _ in traceback.walk_tb(e.__traceback__)]
        from_the_model = any(isinstance(f.f_locals.get("self"), TemplateLM) for f in frames)
        if isinstance(e, (MMFreeError, MemoryError)) or from_the_model:
            raise
        cause = e.__cause__ or e
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
        where = "" if tasks_dir is None else f" in {tasks_dir}"
        raise DataError(
            f"lm-eval cannot make questions of a task's definition and data ({reason}): repair its "
            f"YAML or its rows{where}, or run `mmfree eval fetch-tasks`"
        ) from e
