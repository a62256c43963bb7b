"""The batch on the device: every slot, and the programs that read and write them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.infer import decode
from mmfree_jax.model import Session
from mmfree_jax.model.state import with_places
from mmfree_jax.model.weights import Weights
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.serve import programs
from mmfree_jax.serve.plan import Plan
from mmfree_jax.serve.programs import Given, Pool
from mmfree_jax.serve.requests import Request
from mmfree_jax.serve.row_sampling import DRAWS, Draw, settings_of

OnProgram = Callable[[int, int, str], object]
"""Is told of a program that is compiled next: how many are, of how many, and its name."""


@dataclass(frozen=True)
class Piece:
    """A part of a prompt.

    Attributes:
      slot: whose.
      tokens: ids, as many as a program takes or fewer.
      following: the id behind the last, if there is one; read by `Batch.score` only.
    """

    slot: int
    tokens: Sequence[int]
    following: int | None = None


class Batch:
    """Owned by one thread. What a method returns may still be on its way from the device.

    Attributes:
      fresh: a session of one row that has read nothing.
    """

    def __init__(
        self, weights: Weights, config: ModelConfig, plan: Plan, *, few_rows: bool = False
    ) -> None:
        """Makes the slots.

        Args:
          weights: of the model.
          config: of the model.
          plan: sizes.
          few_rows: see `programs.decode_rows`.
        """
        self._weights, self._config, self._plan = weights, config, plan
        self._few_rows = few_rows
        self.fresh = decode.init_session(config, 1, plan.max_length)
        self.reset()

    def reset(self) -> None:
        """All slots empty; also after a call of the device has failed."""
        config, slots = self._config, self._plan.slots
        nobody = settings_of([Request((0,), 0)] * slots, config.vocab_size)
        self._pool = Pool(
            decode.init_session(config, slots, self._plan.max_length),
            jnp.zeros((slots, config.vocab_size), jnp.int32),
            jnp.zeros(slots, jnp.int32),
            jax.tree.map(jnp.asarray, nobody),
        )

    def clear(self, slot: int) -> None:
        """A slot that has read nothing."""
        self.put(slot, self.fresh)

    def sized(self, session: Session) -> Session:
        """A session as a slot holds it: an attention cache with all its places."""
        if self._plan.max_length is None:
            return session
        layers = with_places(session.state.layers, self._config, self._plan.max_length)
        return replace(session, state=replace(session.state, layers=layers))

    def put(self, slot: int, session: Session) -> None:
        """Puts a session of one row into a slot."""
        self._pool = programs.put_row(self._pool, np.int32(slot), session)

    def take(self, slot: int) -> Session:
        """A copy of a slot's session."""
        return programs.take_row(self._pool, np.int32(slot))

    def begin(self, slot: int, request: Request) -> None:
        """Lets a slot answer, its prompt read."""
        settings = settings_of([request], self._config.vocab_size)
        self._pool = programs.begin_row(
            self._pool, np.int32(slot), np.int32(request.max_tokens), settings
        )

    def read(self, pieces: Sequence[Piece]) -> None:
        """Reads pieces of one padded length, of different slots."""
        length = self._plan.padded(len(pieces[0].tokens))
        rows = self._plan.piece_rows[length]
        slot_P = np.full(rows, self._plan.slots, np.int32)
        tokens_PT = np.zeros((rows, length), np.int32)
        length_P = np.zeros(rows, np.int32)
        for place, piece in enumerate(pieces):
            slot_P[place], length_P[place] = piece.slot, len(piece.tokens)
            tokens_PT[place, : len(piece.tokens)] = piece.tokens
        self._pool = programs.read_pieces(
            self._weights, self._pool, slot_P, tokens_PT, length_P, config=self._config
        )

    def score(self, piece: Piece) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Reads a piece; returns the scores of what follows each token (`row_sampling.scores`).

        Behind a last token that nothing follows they are of token 0.
        """
        count, length = len(piece.tokens), self._plan.padded(len(piece.tokens))
        tokens_1T = np.zeros((1, length), np.int32)
        target_T = np.zeros(length, np.int32)
        tokens_1T[0, :count] = piece.tokens
        target_T[: count - 1] = piece.tokens[1:]
        target_T[count - 1] = 0 if piece.following is None else piece.following
        self._pool, found = programs.score_piece(
            self._weights,
            self._pool,
            np.array([piece.slot], np.int32),
            tokens_1T,
            target_T,
            np.array([count], np.int32),
            config=self._config,
        )
        return found

    def decode(self, slots: Sequence[int], draw: Draw) -> tuple[Given, list[int]]:
        """Gives rows their next tokens.

        Args:
          slots: that have begun, at least one.
          draw: what the sampling contains.

        Returns:
          What came, and the place of each of the slots in it.
        """
        size = self._plan.batch_size(len(slots))
        places = list(range(len(slots)))
        slot_b = np.full(size, self._plan.slots, np.int32)
        if size == self._plan.slots:
            slot_b, places = np.arange(size, dtype=np.int32), list(slots)
        else:
            slot_b[: len(slots)] = slots
        live_b = np.zeros(size, bool)
        live_b[places] = True
        self._pool, given = programs.decode_rows(
            self._weights,
            self._pool,
            slot_b,
            live_b,
            config=self._config,
            draw=draw,
            steps=self._plan.steps,
            few_rows=self._few_rows,
        )
        for array in jax.tree.leaves(given):
            array.copy_to_host_async()
        return given, places

    def wait(self) -> None:
        """Returns when the device has done all that it was given."""
        jax.block_until_ready(self._pool.left_B)

    def warm_up(self, on_program: OnProgram | None = None) -> None:
        """Compiles every program but that of scored prompts, and empties the slots.

        Args:
          on_program: called before each.
        """
        steps: list[tuple[str, Callable[[], object]]] = [("slots", self._move_rows)]
        for length in self._plan.piece_rows:
            pieces = [Piece(0, [0] * length)]
            steps.append((f"reading {length} tokens", functools.partial(self.read, pieces)))
        for draw in DRAWS:
            for size in self._plan.batch_sizes:
                decode = functools.partial(self.decode, range(size), draw)
                steps.append((f"decoding a batch of {size} ({draw})", decode))
        for done, (name, run) in enumerate(steps):
            if on_program is not None:
                on_program(done, len(steps), name)
            run()
        self.wait()
        self.reset()

    def _move_rows(self) -> None:
        """Runs what puts a row into a slot and takes one out."""
        self.clear(0)
        self.begin(0, Request((0,), 0))
        self.take(0)
