"""`mmfree generate`: continue prompts with a trained model."""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.cli.prompts import ANSWER_FIELDS, Prompt, parse_ids, read_prompts_file
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.files import check_file
from mmfree_jax.places import Place, PlaceOrUrl
from mmfree_jax.progress import Display, show_progress
from mmfree_jax.ranges import (
    AboveZero,
    Count,
    CountOrZero,
    NotNegative,
    PositiveShare,
    Seed,
    Share,
    Step,
)
from mmfree_jax.readable import printable


@dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts with a trained model."""

    model: PlaceOrUrl
    """Folder of the model, or its URL: a training run, a packed model, or a Hugging Face model."""
    step: Step | None = None
    """Checkpoint of a training run: its step, or best; None: the newest."""
    prompt: str | None = None
    """Text to continue; "" starts a new document."""
    prompt_ids: str | None = None
    """Token ids to continue, separated by commas; no tokenizer is needed."""
    prompts_file: Place | None = None
    """File of prompts: .jsonl with "prompt" (text) or "prompt_ids" (list) on each line, and if
    wanted a "seed" (any other field goes into the answer); any other file is one text prompt a
    line."""
    num_samples: Count = 1
    """Answers to each prompt."""
    max_new_tokens: CountOrZero = 128
    """Most tokens to generate for each prompt."""
    temperature: NotNegative = 1.0
    """Divides the logits; 0: always the likeliest token (greedy)."""
    top_k: Count | None = None
    """Keep only this many of the likeliest tokens; None: all."""
    top_p: PositiveShare = 1.0
    """Keep the smallest set of likeliest tokens whose probability reaches this; 1: all."""
    min_p: Share = 0.0
    """Drop tokens below this share of the likeliest token's probability; 0: none."""
    repetition_penalty: AboveZero = 1.0
    """Above 1, tokens that have occurred become less likely; 1: off."""
    seed: Seed = 0
    """Seed of the sampling. Each prompt and sample draws from a stream of its own, by its place
    among the prompts, whatever the batch size; a prompt with a "seed" of its own draws the same
    at any place."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """String that ends an answer and is not part of it; may be given several times."""
    ignore_eos: bool = False
    """Go on behind end-of-text tokens: the tokenizer's, and those that a Hugging Face folder names
    (eos_token_id of config.json and generation_config.json)."""
    batch_size: Count = 16
    """Answers that are decoded together."""
    tokenizer: PlaceOrUrl | None = None
    """Tokenizer file or folder, or its URL; None: the one in the model's folder."""
    stream: bool = False
    """Print the answer as it is generated (one prompt, or --json)."""
    print_ids: bool = False
    """Print token ids in place of text."""
    json: bool = False
    """Print one JSON object for each answer (with --stream: for each piece of one)."""
    save_state: Place | None = None
    """File to save the state in, behind the last token: `--load-state` goes on from there."""
    load_state: Place | None = None
    """File of a saved state; the prompt is appended to what it has read, and may be left out.
    A state of one row serves any number of prompts."""
    quiet: bool = False
    """Do not report the speed on standard error."""


def generate(argv: Sequence[str]) -> int:
    """Continue prompts with a trained model.

    Args:
      argv: the arguments behind `mmfree generate`.

    Returns:
      The exit code.

    Raises:
      MMFreeError: bad input; the command line prints it and exits with 2.
    """
    config = parse(GenerateConfig, argv, prog="mmfree generate")
    prompts = [
        dataclasses.replace(prompt, sample=sample)
        for prompt in _read_prompts(config)
        for sample in range(config.num_samples)
    ]
    if config.stream and len(prompts) > 1 and not config.json:
        raise ConfigError(f"--stream is set for {len(prompts)} answers: add --json, or ask for one")
    if config.save_state is not None and len(prompts) > config.batch_size:
        raise ConfigError(
            f"--save-state is set for {len(prompts)} answers: set --batch-size to as many"
        )
    if config.save_state is not None:
        # Behind eight bytes of length, see `saved/tensor_file.py`.
        session = r'.{8}\{"__metadata__": \{"format": "mmfree-session"'
        check_file(config.save_state, session, sources=_files_read(config))
    for prompt in prompts if config.json else ():
        if taken := sorted(prompt.fields.keys() & ANSWER_FIELDS):
            raise DataError(
                f"prompt {prompt.index} has a field {taken[0]!r}, which its answer has too: rename "
                "it, or leave out --json"
            )
    if "" in config.stop:
        raise ConfigError("--stop is an empty string: give at least one character")

    with show_progress("starting JAX", is_shown=not config.quiet) as show:
        # Heavy imports wait until the arguments are known to be good.
        from mmfree_jax.saved.open_model import open_model

        show.stage("reading the model")
        saved = open_model(config.model, step=config.step)
        config = dataclasses.replace(config, model=str(saved.path))  # a copy, where it is a URL
        model, params = saved.model(), saved.weights()
        tokenizer = _load_tokenizer(config, saved, needed=_needs_tokenizer(config, prompts))
        _run(config, model, params, tokenizer, prompts, show)
    return 0


def _run(
    config: GenerateConfig,
    model: Any,
    params: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    show: Display,
) -> None:
    from mmfree_jax.model.unstacked import for_decoding
    from mmfree_jax.model.weights import as_weights
    from mmfree_jax.saved.session import load_session, save_session

    variables = as_weights(params, model.config)
    session = None
    if config.load_state is not None:
        session = load_session(config.load_state, variables, model.config)
    decoded = for_decoding(variables, model.config)
    count, start = 0, time.perf_counter()
    show.stage("generating, compiling first")
    for first in range(0, len(prompts), config.batch_size):
        batch = prompts[first : first + config.batch_size]
        printer = _Printer(config, batch, len(prompts) > 1, tokenizer, show)
        tokens, texts, reasons, after = _answer(
            config,
            model,
            decoded,
            tokenizer,
            batch,
            printer,
            _rows(session, batch, prompts),
        )
        printer.finish(tokens, texts, reasons)
        count += sum(map(len, tokens))
        if config.save_state is not None:
            save_session(config.save_state, after, variables, model.config)
    if not config.quiet:
        seconds = time.perf_counter() - start
        print(
            f"{count} tokens in {seconds:.2f} s, compilation included "
            f"({count / max(seconds, 1e-9):.1f} tokens/s)",
            file=sys.stderr,
        )


def _rows(session: Any, batch: list[Prompt], prompts: list[Prompt]) -> Any:
    """The rows of a loaded state that a batch goes on from: a row for each prompt, or answer."""
    from mmfree_jax.infer.decode import fork, select_rows

    if session is None:
        return None
    rows, samples = len(session.state.position_B), prompts[-1].sample + 1
    if rows == 1:
        return fork(session, len(batch))
    if rows == prompts[-1].index + 1:
        return select_rows(session, [p.index for p in batch])
    if rows != len(prompts):
        raise ConfigError(
            f"--load-state has {rows} rows for {len(prompts) // samples} prompts: give one prompt "
            "for each row"
        )
    return select_rows(session, [p.index * samples + p.sample for p in batch])


def _answer(
    config: GenerateConfig,
    model: Any,
    variables: Any,
    tokenizer: Any,
    batch: list[Prompt],
    printer: "_Printer",
    session: Any,
) -> tuple[list[list[int]], Sequence[str | None], Sequence[str], Any]:
    """Generates for one batch: ids, texts (None without a tokenizer), reasons and the session."""
    from mmfree_jax.infer.api import generate as generate_ids
    from mmfree_jax.infer.text import encode_prompt, generate_text

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    options = {name: getattr(config, name) for name in ("max_new_tokens", *names)}
    options["stop_ids"] = _stop_ids(config, model, tokenizer)
    options["seed"] = [config.seed if p.seed is None else p.seed for p in batch]
    # A prompt with a seed of its own draws the same wherever it stands.
    options["streams"] = [(p.index if p.seed is None else 0, p.sample) for p in batch]
    ids = [
        p.ids
        if p.ids is not None
        else encode_prompt(tokenizer, p.text or "", first=session is None)
        for p in batch
    ]
    if tokenizer is None or (config.print_ids and config.stream):
        # Pieces of ids; a stop string needs the text, so it is not offered with these.
        on_tokens = printer.on_tokens if config.stream else None
        out = generate_ids(model, variables, ids, on_tokens=on_tokens, session=session, **options)
        return out.tokens, [None] * len(batch), out.finish_reasons, out.session
    out = generate_text(
        model,
        variables,
        tokenizer,
        ids,
        stop=config.stop,
        stop_at_end=False,
        on_text=printer.on_text if config.stream else None,
        session=session,
        **options,
    )
    return out.tokens, out.texts, out.finish_reasons, out.session


def _stop_ids(config: GenerateConfig, model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those that the model's folder names."""
    from mmfree_jax.saved.end_tokens import end_ids

    if config.ignore_eos:
        return []
    ids = dict.fromkeys(end_ids(config.model))
    if tokenizer is not None and tokenizer.eos_id is not None:
        ids[tokenizer.eos_id] = None
    return [i for i in ids if i < model.config.vocab_size]  # others cannot occur


class _Printer:
    """Writes answers to standard output, whole or as they come."""

    def __init__(
        self,
        config: GenerateConfig,
        batch: list[Prompt],
        titled: bool,
        tokenizer: Any,
        show: Display,
    ) -> None:
        self._show = show  # makes way for the first answer
        self._readable = printable if sys.stdout.isatty() else str
        self._config, self._batch, self._titled = config, batch, titled
        self._headed = False
        self._tokenizer = tokenizer

    def on_text(self, row: int, text: str) -> None:
        self._show.close()
        if self._config.json:
            self._write_json(self._name(row) | {"text": text})
        else:
            self._head()
            sys.stdout.write(self._readable(text))
            sys.stdout.flush()

    def on_tokens(self, row: int, tokens: list[int]) -> None:
        self._show.close()
        if self._config.json:
            self._write_json(self._name(row) | {"tokens": tokens})
        else:
            sys.stdout.write(("," if self._headed else "") + ",".join(map(str, tokens)))
            sys.stdout.flush()
            self._headed = True

    def _name(self, row: int) -> dict[str, Any]:
        """Which answer a row is, and what came with its prompt."""
        prompt = self._batch[row]
        sample = {"sample": prompt.sample} if self._config.num_samples > 1 else {}
        seed = {} if prompt.seed is None else {"seed": prompt.seed}
        return {"index": prompt.index, **sample, **prompt.fields, **seed}

    def _head(self) -> None:
        """The prompt, before the first piece of its answer."""
        if not self._headed:
            self._headed = True
            sys.stdout.write(self._prompt_text(self._batch[0]))

    def _prompt_text(self, prompt: Prompt) -> str:
        text = self._tokenizer.decode(prompt.ids) if prompt.text is None else prompt.text
        return self._readable(text)

    def finish(
        self, tokens: list[list[int]], texts: Sequence[str | None], reasons: Sequence[str]
    ) -> None:
        self._show.close()
        config = self._config
        for row, (prompt, text) in enumerate(zip(self._batch, texts, strict=True)):
            if config.json:
                answer = {
                    **self._name(row),
                    **({"prompt": prompt.text} if prompt.text is not None else {}),
                    **({"prompt_ids": prompt.ids} if prompt.ids is not None else {}),
                    **({"text": text} if text is not None else {}),
                    "tokens": tokens[row],
                    "finish_reason": reasons[row],
                }
                self._write_json(
                    self._name(row) | {"finish_reason": reasons[row]} if config.stream else answer
                )
            elif config.stream:
                if text is not None:
                    self._head()
                sys.stdout.write("\n")
            elif text is None or config.print_ids:
                print(",".join(map(str, tokens[row])))
            else:
                if self._titled:
                    sample = f", sample {prompt.sample}" if config.num_samples > 1 else ""
                    print(f"--- prompt {prompt.index}{sample}")
                print(self._prompt_text(prompt) + self._readable(text))
        sys.stdout.flush()

    @staticmethod
    def _write_json(value: dict[str, Any]) -> None:
        line = json.dumps(value, ensure_ascii=False)
        try:
            line.encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair, in a field of the prompts file
            line = json.dumps(value)
        print(line, flush=True)


def _files_read(config: GenerateConfig) -> list[str]:
    given = [config.prompts_file, config.tokenizer]
    return [name for name in given if name is not None]


def _needs_tokenizer(config: GenerateConfig, prompts: list[Prompt]) -> bool:
    return bool(config.stop) or any(p.text is not None for p in prompts)


def _load_tokenizer(config: GenerateConfig, saved: Any, *, needed: bool) -> Any:
    """The tokenizer, or None where there is none and none is needed."""
    from mmfree_jax.data.tokenizer import load_tokenizer
    from mmfree_jax.infer.text import check_tokenizer

    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else saved.tokenizer()
    if tokenizer is not None:
        check_tokenizer(saved.config, tokenizer)
    elif needed:
        raise DataError(
            f"model {config.model} has no tokenizer: give --tokenizer, or --prompt-ids without "
            "--stop"
        )
    return tokenizer


def _read_prompts(config: GenerateConfig) -> list[Prompt]:
    given = [
        name
        for name in ("prompt", "prompt_ids", "prompts_file")
        if getattr(config, name) is not None
    ]
    if not given and config.load_state is not None:
        return [Prompt(0, None, [])]
    flags = ["--" + name.replace("_", "-") for name in given]
    if len(given) != 1:
        raise ConfigError(
            f"{' and '.join(flags) or 'no prompt'} given: give one of --prompt, --prompt-ids and "
            "--prompts-file"
        )
    if config.prompt is not None:
        return [Prompt(0, config.prompt)]
    if config.prompt_ids is not None:
        return [Prompt(0, None, parse_ids(config.prompt_ids))]
    assert config.prompts_file is not None
    return read_prompts_file(Path(config.prompts_file))
