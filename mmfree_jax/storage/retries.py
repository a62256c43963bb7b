"""What may pass is tried again."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from mmfree_jax.errors import ConfigError, StorageError
from mmfree_jax.storage.failures import fail, is_refused, passes, reason
from mmfree_jax.storage.file_systems import forget_file_systems, open_file_system
from mmfree_jax.storage.urls import Url

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How often what may pass is tried, and how long is waited in between.

    Before try n + 1 it waits between a half and all of `first * 2 ** (n - 1)` seconds, `longest`
    at most.
    """

    tries: int = 6
    first: float = 0.5
    longest: float = 30.0
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = random.random
    """A number in [0, 1)."""

    def wait(self, failed: int) -> None:
        """Waits after try number `failed`."""
        limit = min(self.longest, self.first * 2 ** (failed - 1))
        self.sleep(limit * (0.5 + 0.5 * self.draw()))


PATIENT = Patience()


def ask(url: Url, act: str, call: Callable[[Any], T], patience: Patience) -> T:
    """What `call` makes of the file system, tried again while the failure may pass.

    Raises:
      MissingError, ChangedError, StorageError: as the last try failed.
    """
    renewed, error = False, Exception()
    for number in range(1, patience.tries + 1):
        try:
            return call(open_file_system(url))
        except ConfigError:
            raise
        except Exception as e:  # of half a dozen packages
            error = e
        if is_refused(error) and not renewed:
            renewed = True
            forget_file_systems()
        elif not passes(error):
            fail(url, act, error)
        if number < patience.tries:
            patience.wait(number)
    if is_refused(error):
        fail(url, act, error)
    raise StorageError(
        f"{url} cannot be {act}: try {patience.tries} of {patience.tries} failed "
        f"({reason(error)}): see that the store can be reached, then run the command again"
    ) from error
