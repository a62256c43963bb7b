"""What the command line says of an error: one line, whatever the error is.

Nothing here imports JAX.
"""

import errno
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence

from mmfree_jax.errors import MMFreeError
from mmfree_jax.files import is_disk_error
from mmfree_jax.installed import own_version
from mmfree_jax.pallas_kernels.errors import KernelError

DEBUG = "MMFREE_DEBUG"
"""Environment variable that asks for tracebacks, as `--debug` does; processes inherit it."""
UNEXPECTED = "mmfree: unexpected error"
"""How the line about a fault of ours begins; that about a user's begins "mmfree: error: "."""

_LONGEST = 1000  # characters; an alias bomb once made a message of 254 MB
_PATH_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP)


def say(error: BaseException, argv: Sequence[str], *, debug: bool = False) -> None:
    """Prints the line about an error that ends a command; its traceback first, if asked for.

    Args:
      error: what ended it.
      argv: the command's arguments.
      debug: print the traceback; $MMFREE_DEBUG does too.
    """
    if debug or os.environ.get(DEBUG, "0") not in ("", "0"):
        traceback.print_exception(error)
    print(error_line(error, argv), file=sys.stderr, flush=True)


def error_line(error: BaseException, argv: Sequence[str]) -> str:
    """One line about an error: what to put right, or for a fault of ours how to report it."""
    if isinstance(error, (MMFreeError, KernelError)):
        return f"mmfree: error: {one_line(str(error))}"
    if isinstance(error, OSError) and is_disk_error(error):
        where = error.filename or "a file that this command writes or reads"
        text = f"{where}: {error.strerror}: make room or choose another place"
        return f"mmfree: error: {one_line(text)}"
    if isinstance(error, OSError) and error.errno in _PATH_ERRORS and error.filename:
        text = f"{error.filename}: {error.strerror}: give another path"
        return f"mmfree: error: {one_line(text)}"
    command = one_line(shlex.join(["mmfree", *argv]), 300)
    what = one_line(f"{type(error).__name__}: {error}".rstrip(": "), 500)
    if _is_out_of_memory(error):
        return (
            f"mmfree: error: `{command}` needs more memory than there is ({what}): lower its "
            "sizes, or take a larger machine"
        )
    return (
        f"{UNEXPECTED} in `{command}`: {what}: this is a fault of mmfree {own_version()}: please "
        f"report this line with the traceback, which --debug shows{_keep_traceback(error)}"
    )


def _keep_traceback(error: BaseException) -> str:
    """Writes the traceback to a file, for what cannot be run again; says where."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="mmfree-", suffix=".txt", delete=False, errors="backslashreplace"
        ) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return ""
    return f" and {file.name} keeps"


def one_line(text: str, longest: int = _LONGEST) -> str:
    """A text as one line of printable characters, its middle left out where it is long."""
    if len(text) > 2 * longest:
        text = text[:longest] + text[-longest:]
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in " ".join(text.split())
    )
    if len(text) <= longest:
        return text
    end = longest // 3  # where the way out stands
    return f"{text[: longest - end - 5]} ... {text[-end:]}"


def _is_out_of_memory(error: BaseException) -> bool:
    # JAX's error has no kinds of its own; to compare its class JAX would have to be imported.
    by_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return isinstance(error, MemoryError) or (by_jax and "RESOURCE_EXHAUSTED" in str(error))
