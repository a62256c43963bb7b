"""How the work of an engine is cut: rows of a decoding call, pieces of prompts, tokens a turn."""

from dataclasses import dataclass

from mmfree_jax.errors import ConfigError
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.serve.requests import Limits

# Places of an attention cache where `max_length` is not set.
_ATTENTION_LENGTH = 2048


@dataclass(frozen=True)
class Plan:
    """Sizes of compiled programs and of turns, each fixed for the life of an engine.

    Attributes:
      slots: rows of the batch.
      max_length: most tokens of a row; None: no limit.
      batch_sizes: rows of a decoding call, ascending; the last is `slots`.
      steps: tokens that a decoding call gives a row at most.
      piece_rows: tokens of a piece of a prompt -> rows that are read at once. One shape a length:
        what is computed for a prompt never depends on the other rows.
      turn_tokens: tokens of prompts read between two decoding calls, at least one piece.
      ahead: decoding calls that the device may be given before the results of the one before
        were looked at.
    """

    slots: int
    max_length: int | None
    batch_sizes: tuple[int, ...]
    steps: int
    piece_rows: dict[int, int]
    turn_tokens: int
    ahead: int

    def batch_size(self, rows: int) -> int:
        """The smallest size that holds so many rows."""
        return next(size for size in self.batch_sizes if size >= rows)

    def pieces(self, tokens: int) -> list[int]:
        """Lengths of the pieces that a prompt is read in, a function of its length alone.

        Long pieces come first and only the last may need padding, so that prompts which begin
        alike are cut alike there.
        """
        sizes = sorted(self.piece_rows, reverse=True)
        out: list[int] = []
        for size in sizes:
            while tokens >= size:
                out.append(size)
                tokens -= size
        return [*out, tokens] if tokens else out

    def padded(self, tokens: int) -> int:
        """Length of the program that reads a piece."""
        return min(size for size in self.piece_rows if size >= tokens)


def plan_for(limits: Limits, config: ModelConfig, backend: str) -> Plan:
    """The plan of an engine.

    Args:
      limits: as set.
      config: of the model.
      backend: of JAX.

    Raises:
      ConfigError: limits that do not fit each other or the model.
    """
    attention = not config.recurrent
    accelerated = backend != "cpu"
    sizes = limits.batch_sizes
    if sizes is None:
        # From 16 rows down a GPU takes about the same time, but by other kernels.
        few = (1, 2) if limits.few_row_kernels else ()
        small = few if accelerated else (1, 4)
        all_sizes = (*small, *(4**power for power in range(2, 16)))
        sizes = (*(n for n in all_sizes if n < limits.slots and not attention), limits.slots)
    if attention and sizes != (limits.slots,):
        raise ConfigError(
            f"batch_sizes is {sizes}: a model with attention decodes all slots at once; leave it "
            f"out, or set {limits.slots}"
        )
    if max(sizes, default=0) != limits.slots:
        raise ConfigError(f"batch_sizes is {sizes}: its largest must be slots ({limits.slots})")
    return Plan(
        slots=limits.slots,
        max_length=limits.max_length or (_ATTENTION_LENGTH if attention else None),
        batch_sizes=tuple(sorted(set(sizes))),
        steps=limits.steps or (8 if accelerated else 1),
        piece_rows={16: 8, 64: 4, 256: 2, 1024: 1} if accelerated else {16: 1, 64: 1},
        turn_tokens=1024 if accelerated else 64,
        ahead=1 if accelerated else 0,
    )
