"""What every request needs: the model behind its engine, its texts, and the limits."""

from dataclasses import dataclass

from mmfree_jax.data.tokenizer import Tokenizer
from mmfree_jax.ranges import AboveZero, Count, check_numbers
from mmfree_jax.serve.chat_template import ChatFormat
from mmfree_jax.serve.engine import Engine
from mmfree_jax.serve.metrics import Metrics
from mmfree_jax.serve.request_errors import RequestError


@dataclass(frozen=True)
class ServiceLimits:
    """What one request may ask for.

    Raises:
      ConfigError: a number outside its range.
    """

    body_bytes: Count = 2**23
    """Of a request's body."""
    prompt_tokens: Count = 2**17
    """Of one prompt."""
    max_tokens: Count = 4096
    """Largest max_tokens; also that of a chat that names none."""
    choices: Count = 320
    """Answers to one request: prompts times n."""
    body_seconds: AboveZero = 30.0
    """For a request's body to come."""

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass
class Service:
    """A model that is served.

    Attributes:
      name: of the model, as clients know it.
      engine: that runs it.
      tokenizer: of the model.
      chat: how conversations become prompts.
      end_ids: token ids that end an answer.
      limits: of one request.
      metrics: what is counted.
      created: when the server started (seconds since the epoch).
      log_requests: whether requests and their answers' statuses are written to standard error.
      is_stopping: whether new requests are refused.
      active: requests that are being answered.
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    chat: ChatFormat
    end_ids: tuple[int, ...]
    limits: ServiceLimits
    metrics: Metrics
    created: int
    log_requests: bool = False
    is_stopping: bool = False
    active: int = 0

    def check_model(self, name: str) -> None:
        """Refuses another model's name.

        Raises:
          RequestError: 404.
        """
        if name != self.name:
            raise RequestError(
                f"model is {name[:200]!r}: this server has {self.name!r} alone",
                status=404,
                param="model",
                code="model_not_found",
            )
