"""`mmfree generate`: continue prompts with a trained model."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.ranges import AboveZero, Count, CountOrZero, NotNegative, PositiveShare, Seed, Share
from mmfree_jax.text_files import parse_json, read_text


@dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts with a trained model."""

    model: str
    """Folder of the model: a training run, a packed model, or a Hugging Face model."""
    prompt: str | None = None
    """Text to continue; "" starts a new document."""
    prompt_ids: str | None = None
    """Token ids to continue, separated by commas; no tokenizer is needed."""
    prompts_file: str | None = None
    """File of prompts: .jsonl with "prompt" (text) or "prompt_ids" (list) on each line; any
    other file is one text prompt a line."""
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
    """Seed of the sampling. A prompt's answer does not depend on the others in the batch."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """String that ends an answer and is not part of it; may be given several times."""
    ignore_eos: bool = False
    """Go on behind the tokenizer's end-of-text token."""
    batch_size: Count = 16
    """Prompts of a file that are decoded together."""
    tokenizer: str | None = None
    """Tokenizer file or folder; None: the one in the model's folder."""
    stream: bool = False
    """Print the answer as it is generated (one prompt, or --json)."""
    print_ids: bool = False
    """Print token ids in place of text."""
    json: bool = False
    """Print one JSON object for each answer (with --stream: for each piece of one)."""
    save_state: str | None = None
    """File to save the state in, behind the last token: `--load-state` goes on from there."""
    load_state: str | None = None
    """File of a saved state; the prompt is appended to what it has read, and may be left out.
    A state of one row serves any number of prompts."""
    quiet: bool = False
    """Do not report the speed on standard error."""


@dataclass(frozen=True)
class _Prompt:
    text: str | None
    ids: list[int] | None


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
    prompts = _read_prompts(config)
    if config.stream and len(prompts) > 1 and not config.json:
        raise ConfigError(f"--stream is set for {len(prompts)} prompts: add --json, or give one")
    if config.save_state is not None and len(prompts) > config.batch_size:
        raise ConfigError(
            f"--save-state is set for {len(prompts)} prompts: set --batch-size to as many"
        )
    if "" in config.stop:
        raise ConfigError("--stop is an empty string: give at least one character")

    # Heavy imports wait until the arguments are known to be good.
    from mmfree_jax.saved.load import load_model

    model, params = load_model(config.model)
    tokenizer = _load_tokenizer(config, model, needed=_needs_tokenizer(config, prompts))
    _run(config, model, params, tokenizer, prompts)
    return 0


def _run(
    config: GenerateConfig,
    model: Any,
    params: dict[str, Any],
    tokenizer: Any,
    prompts: list[_Prompt],
) -> None:
    from mmfree_jax.infer.api import as_variables
    from mmfree_jax.saved.session import load_session, save_session

    variables = as_variables(params, model.config)
    session = None
    if config.load_state is not None:
        session = load_session(config.load_state, variables, model.config)
    count, start = 0, time.perf_counter()
    for first in range(0, len(prompts), config.batch_size):
        batch = prompts[first : first + config.batch_size]
        printer = _Printer(config, batch, first, tokenizer)
        tokens, texts, reasons, after = _answer(
            config,
            model,
            variables,
            tokenizer,
            batch,
            printer,
            _rows(session, first, batch, len(prompts)),
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


def _rows(session: Any, first: int, batch: list[_Prompt], total: int) -> Any:
    """The rows of a loaded state that a batch goes on from."""
    from mmfree_jax.infer.decode import fork, select_rows

    if session is None:
        return None
    rows = len(session.state.position_B)
    if rows == 1:
        return fork(session, len(batch))
    if rows != total:
        raise ConfigError(
            f"--load-state has {rows} rows for {total} prompts: give one prompt for each row"
        )
    return select_rows(session, list(range(first, first + len(batch))))


def _answer(config, model, variables, tokenizer, batch, printer, session):
    """Generates for one batch: ids, texts (None without a tokenizer), reasons and the session."""
    from mmfree_jax.infer.api import generate as generate_ids
    from mmfree_jax.infer.text import encode_prompt, generate_text

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    options = {name: getattr(config, name) for name in ("max_new_tokens", *names)}
    if tokenizer is None:
        out = generate_ids(
            model,
            variables,
            [prompt.ids for prompt in batch],
            on_tokens=printer.on_tokens if config.stream else None,
            session=session,
            **options,
        )
        return out.tokens, [None] * len(batch), out.finish_reasons, out.session
    ids = [
        p.ids if p.ids is not None else encode_prompt(tokenizer, p.text, first=session is None)
        for p in batch
    ]
    if config.print_ids and config.stream:
        # Pieces of ids; a stop string needs the text, so it is not offered with these.
        eos = [] if config.ignore_eos or tokenizer.eos_id is None else [tokenizer.eos_id]
        out = generate_ids(
            model,
            variables,
            ids,
            stop_ids=eos,
            on_tokens=printer.on_tokens,
            session=session,
            **options,
        )
        return out.tokens, [None] * len(batch), out.finish_reasons, out.session
    out = generate_text(
        model,
        variables,
        tokenizer,
        ids,
        stop=config.stop,
        stop_at_end=not config.ignore_eos,
        on_text=printer.on_text if config.stream else None,
        session=session,
        **options,
    )
    return out.tokens, out.texts, out.finish_reasons, out.session


class _Printer:
    """Writes answers to standard output, whole or as they come."""

    def __init__(self, config: GenerateConfig, batch: list[_Prompt], first: int, tokenizer: Any):
        self._config, self._batch, self._first = config, batch, first
        self._headed = False
        self._tokenizer = tokenizer

    def on_text(self, row: int, text: str) -> None:
        if self._config.json:
            self._write_json({"index": self._first + row, "text": text})
        else:
            self._head()
            sys.stdout.write(text)
            sys.stdout.flush()

    def on_tokens(self, row: int, tokens: list[int]) -> None:
        if self._config.json:
            self._write_json({"index": self._first + row, "tokens": tokens})
        else:
            sys.stdout.write(("," if self._headed else "") + ",".join(map(str, tokens)))
            sys.stdout.flush()
            self._headed = True

    def _head(self) -> None:
        """The prompt, before the first piece of its answer."""
        if not self._headed:
            self._headed = True
            sys.stdout.write(self._prompt_text(self._batch[0]))

    def _prompt_text(self, prompt: _Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.ids)

    def finish(self, tokens, texts, reasons) -> None:
        config = self._config
        for row, prompt in enumerate(self._batch):
            if config.json:
                answer = {
                    "index": self._first + row,
                    **({"prompt": prompt.text} if prompt.text is not None else {}),
                    **({"prompt_ids": prompt.ids} if prompt.ids is not None else {}),
                    **({"text": texts[row]} if texts[row] is not None else {}),
                    "tokens": tokens[row],
                    "finish_reason": reasons[row],
                }
                self._write_json(
                    {"index": self._first + row, "finish_reason": reasons[row]}
                    if config.stream
                    else answer
                )
            elif config.stream:
                if texts[row] is not None:
                    self._head()
                sys.stdout.write("\n")
            elif texts[row] is None or config.print_ids:
                print(",".join(map(str, tokens[row])))
            else:
                if self._first or len(self._batch) > 1:
                    print(f"--- prompt {self._first + row}")
                print(self._prompt_text(prompt) + texts[row])
        sys.stdout.flush()

    @staticmethod
    def _write_json(value: dict[str, Any]) -> None:
        print(json.dumps(value, ensure_ascii=False), flush=True)


def _needs_tokenizer(config: GenerateConfig, prompts: list[_Prompt]) -> bool:
    return bool(config.stop) or any(p.text is not None for p in prompts)


def _load_tokenizer(config: GenerateConfig, model: Any, *, needed: bool) -> Any:
    """The tokenizer, or None where there is none and none is needed."""
    from mmfree_jax.infer.text import check_tokenizer
    from mmfree_jax.saved.load import find_tokenizer

    path = Path(config.tokenizer) if config.tokenizer else find_tokenizer(config.model)
    if path is None:
        if needed:
            raise DataError(
                f"model {config.model} has no tokenizer: give --tokenizer, or --prompt-ids "
                "without --stop"
            )
        return None
    from mmfree_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    check_tokenizer(model, tokenizer)
    return tokenizer


def _read_prompts(config: GenerateConfig) -> list[_Prompt]:
    given = [
        name
        for name in ("prompt", "prompt_ids", "prompts_file")
        if getattr(config, name) is not None
    ]
    if not given and config.load_state is not None:
        return [_Prompt(None, [])]
    flags = ["--" + name.replace("_", "-") for name in given]
    if len(given) != 1:
        raise ConfigError(
            f"{' and '.join(flags) or 'no prompt'} given: give one of --prompt, --prompt-ids and "
            "--prompts-file"
        )
    if config.prompt is not None:
        return [_Prompt(config.prompt, None)]
    if config.prompt_ids is not None:
        return [_Prompt(None, _parse_ids(config.prompt_ids))]
    assert config.prompts_file is not None
    return _read_prompts_file(Path(config.prompts_file))


def _parse_ids(text: str) -> list[int]:
    try:
        ids = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise DataError(
            f"--prompt-ids is {text!r}: give whole numbers separated by commas"
        ) from None
    if not ids:
        raise DataError("--prompt-ids is empty: give at least one token id")
    return ids


def _read_prompts_file(path: Path) -> list[_Prompt]:
    try:
        lines = read_text(path).split("\n")
    except OSError as e:
        raise DataError(f"prompts file {path}: {e.strerror}; give a readable file") from e
    except UnicodeDecodeError as e:
        raise DataError(f"prompts file {path} is not UTF-8 at byte {e.start}: convert it") from e
    lines = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise DataError(f"prompts file {path} is empty: give at least one prompt")
    if path.suffix != ".jsonl":
        return [_Prompt(line, None) for _, line in lines]
    return [_parse_json_prompt(path, number, line) for number, line in lines]


def _parse_json_prompt(path: Path, number: int, line: str) -> _Prompt:
    try:
        value = parse_json(line)
    except ValueError as e:
        raise DataError(f"{path}, line {number} is not JSON: {e}") from e
    if isinstance(value, dict):
        ids = value.get("prompt_ids")
        if isinstance(value.get("prompt"), str) and ids is None:
            return _Prompt(value["prompt"], None)
        whole = isinstance(ids, list) and all(type(i) is int for i in ids)
        if whole and ids and "prompt" not in value:
            return _Prompt(None, ids)
    raise DataError(
        f'{path}, line {number}: give an object with "prompt" (text) or "prompt_ids" (a list of '
        "whole numbers that is not empty)"
    )
