"""`mmfree serve`: a model behind OpenAI's interface."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from mmfree_jax.cli.parse import Names, parse
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.installed import import_optional, install_command
from mmfree_jax.places import Place, PlaceOrUrl
from mmfree_jax.progress import Display, show_progress
from mmfree_jax.ranges import AboveZero, Count, CountOrZero, Range, Step
from mmfree_jax.readable import format_count, format_seconds

PURPOSE = "mmfree serve"
_PATIENCE = 2.0  # seconds that a stage lasts before a line is written of it
_PACKAGES = ("starlette", "uvicorn", "prometheus_client", "jinja2")


@dataclass(frozen=True)
class ServeConfig:
    """Serve a model to programs that speak OpenAI's interface."""

    model: PlaceOrUrl
    """Folder of the model, or its URL: a training run, a packed model, or a Hugging Face model."""
    step: Step | None = None
    """Checkpoint of a training run: its step, or best; None: the newest."""
    tokenizer: PlaceOrUrl | None = None
    """Tokenizer file or folder, or its URL; None: the one in the model's folder."""
    name: str | None = None
    """Name of the model in requests; None: its folder's."""
    host: str = "127.0.0.1"
    """Address to listen at; other machines reach 0.0.0.0 and :: (see --api-key-file)."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Port to listen at; 0: any that is free."""
    api_key_file: Place | None = None
    """File of keys, one a line; each request must bring one. None: nobody is asked for one, and
    only this machine is listened to (see --allow-open)."""
    allow_open: bool = False
    """Listen beyond this machine although there are no keys."""
    allowed_hosts: Names = ()
    """Host names by which the server may be asked where there are no keys, beside localhost, this
    machine's name and its addresses."""
    allowed_origins: Names = ()
    """Origins (https://HOST) of other sites' pages whose scripts may read answers."""
    slots: Count = 64
    """Answers that are decoded together."""
    max_queue: CountOrZero = 256
    """Answers that may wait for a slot; more are refused for a while (429)."""
    max_length: Count | None = None
    """Most tokens of a prompt, its session and answer together. None: no limit, and for attention
    2048; attention models hold room for as many in every slot."""
    max_body_bytes: Count = 2**23
    """Largest body of a request (bytes)."""
    max_prompt_tokens: Count = 2**17
    """Longest prompt (tokens)."""
    max_tokens_limit: Count = 4096
    """Largest max_tokens of a request; a chat that names none gets as many."""
    request_seconds: AboveZero = 600.0
    """Longest time of an answer, in the queue and decoded; it then ends as it is."""
    drain_seconds: AboveZero = 30.0
    """For answers to end when the server is told to stop."""
    write_seconds: AboveZero = 20.0
    """For a client that reads nothing of its answer; its connection is then closed."""
    prefix_cache_mib: CountOrZero = 1024
    """Memory of the device for the states behind prompts (MiB); 0: none are kept."""
    session_mib: CountOrZero = 4096
    """Memory of the host for named sessions (MiB)."""
    sessions: Place | None = None
    """Folder that named sessions are kept in; None: they end with the server."""
    one_batch_size: bool = False
    """Decode at one batch size, of all slots, so that an answer to a seed is the same in any
    company to the last bit; slower where few requests run."""
    few_row_kernels: bool = False
    """On a GPU, decode one or two packed answers by the kernels that are fastest for them. Their
    last bits are others, so that an answer to a seed depends on how many run beside it."""
    log_requests: bool = False
    """Write each request with its body to standard error; otherwise nothing of them is logged."""


def serve(argv: Sequence[str]) -> int:
    """Serve a model to programs that speak OpenAI's interface.

    Args:
      argv: the arguments behind `mmfree serve`.

    Returns:
      The exit code: 0 after a signal to stop.

    Raises:
      MMFreeError: bad input; the command line prints it and exits with 2.
    """
    config = parse(ServeConfig, argv, prog="mmfree serve")
    for package in _PACKAGES:
        import_optional(package, PURPOSE, install_command("serve"))
    # Heavy imports wait until the arguments are known to be good.
    from mmfree_jax.serve import gate, server

    gate.check_allowed(config.allowed_hosts, config.allowed_origins)
    keys = () if config.api_key_file is None else gate.read_keys(Path(config.api_key_file))
    if not keys and not config.allow_open and not gate.is_loopback(config.host):
        raise ConfigError(
            f"--host is {config.host!r}, which others reach, and there are no keys: give "
            "--api-key-file, or --allow-open to let everybody in"
        )
    begun = time.monotonic()
    with server.bind(config.host, config.port) as listening:
        with show_progress("starting JAX") as show:
            given = _look_at_model(config, show)
        # What was asked for is good: from here on a line in a file comes before no error of that.
        with show_progress("", patience=_PATIENCE) as show:
            service = _open(config, given, show)
        from mmfree_jax.serve.app import make_app

        app = make_app(
            service,
            keys=keys,
            allowed_hosts=config.allowed_hosts,
            allowed_origins=config.allowed_origins,
        )
        patience = server.Patience(
            write_seconds=config.write_seconds, drain_seconds=config.drain_seconds
        )
        address = server.address_of(listening)

        def say_ready() -> None:
            # Programs wait for this line on standard output; the other is for a log of errors.
            print(f"serving {service.name} at {address}/v1, page at {address}/", flush=True)
            took = format_seconds(time.monotonic() - begun)
            print(f"mmfree serve: ready at {address} after {took}", file=sys.stderr, flush=True)

        server.Running(app, service, patience).run(listening, say_ready)
    print("mmfree serve: stopped", file=sys.stderr)
    return 0


class _Model(NamedTuple):
    """A model whose weights were not read yet, and what its texts are made with."""

    saved: Any
    tokenizer: Any
    chat: Any
    end_ids: tuple[int, ...]


def _look_at_model(config: ServeConfig, show: Display) -> _Model:
    from mmfree_jax.data.tokenizer import load_tokenizer, tokenizer_copy
    from mmfree_jax.infer.text import check_tokenizer
    from mmfree_jax.saved.end_tokens import end_ids
    from mmfree_jax.saved.open_model import open_model
    from mmfree_jax.serve.chat_template import find_chat_format

    show.stage("reading the model")
    saved = open_model(config.model, step=config.step)
    place = saved.tokenizer_path if config.tokenizer is None else tokenizer_copy(config.tokenizer)
    if place is None:
        raise DataError(f"model {config.model} has no tokenizer: give --tokenizer")
    tokenizer = load_tokenizer(place)
    check_tokenizer(saved.config, tokenizer)
    chat = find_chat_format(tokenizer, place)
    ends = dict.fromkeys(end_ids(saved.path))
    if tokenizer.eos_id is not None:
        ends[tokenizer.eos_id] = None
    possible = tuple(i for i in ends if i < saved.config.vocab_size)  # others cannot occur
    return _Model(saved, tokenizer, chat, possible)


def _open(config: ServeConfig, given: _Model, show: Display) -> Any:
    """The service: the weights read, its engine started."""
    from mmfree_jax.model.parameters import param_count
    from mmfree_jax.serve.engine import Engine
    from mmfree_jax.serve.metrics import Metrics
    from mmfree_jax.serve.requests import Limits
    from mmfree_jax.serve.service import Service, ServiceLimits

    saved = given.saved
    name = config.name or saved.path.resolve().name
    size = format_count(param_count(saved.config))
    show.stage(f"reading the weights of {config.model}, {size} parameters")
    limits = Limits(
        slots=config.slots,
        queue=config.max_queue,
        max_length=config.max_length,
        batch_sizes=(config.slots,) if config.one_batch_size else None,
        few_row_kernels=config.few_row_kernels,
        prefix_cache_bytes=config.prefix_cache_mib * 2**20,
        session_bytes=config.session_mib * 2**20,
        time_limit_s=config.request_seconds,
    )
    folder = None if config.sessions is None else Path(config.sessions)
    engine = Engine(saved.model(), saved.weights(), limits, sessions=folder)
    show.stage(f"compiling programs for {name}")
    engine.start(
        on_program=lambda done, of, what: show.update(done, of, what, count=f"{done}/{of}")
    )
    return Service(
        name=name,
        engine=engine,
        tokenizer=given.tokenizer,
        chat=given.chat,
        end_ids=given.end_ids,
        limits=ServiceLimits(
            body_bytes=config.max_body_bytes,
            prompt_tokens=config.max_prompt_tokens,
            max_tokens=config.max_tokens_limit,
            choices=config.slots + config.max_queue,
        ),
        metrics=Metrics(engine),
        created=int(time.time()),
        log_requests=config.log_requests,
    )
