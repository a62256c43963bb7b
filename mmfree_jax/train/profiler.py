"""The profiler's trace of the steps that `log.profile_steps` asks for."""

from collections.abc import Callable
from pathlib import Path

import jax


class Profiler:
    """Traces a span of steps, once."""

    def __init__(
        self, steps: tuple[int, int] | None, folder: Path, settle: Callable[[], None]
    ) -> None:
        """Prepares the trace.

        Args:
          steps: first and last to trace; None: none.
          folder: for the trace.
          settle: waits for the steps dispatched before, which are not to be in it, or in it whole.
        """
        self._steps, self._folder, self._settle = steps, folder, settle
        self._running = False

    def before(self, step: int) -> None:
        """Starts or ends the trace where this step is the first in it or after it."""
        if self._steps is None:
            return
        if step == self._steps[0] and not self._running:
            self._settle()
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step > self._steps[1]:
            self.stop()

    def stop(self) -> None:
        """Ends the trace, if one runs."""
        if self._running:
            self._settle()
            jax.profiler.stop_trace()
            self._running = False
