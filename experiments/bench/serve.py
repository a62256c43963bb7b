"""What serving makes of decoding: tokens a second of many streams beside the bare loop's.

Everything is measured in one process with the same weights: the compiled greedy loop that `mmfree
bench infer` times, streams through the engine, arrivals at random times, prompts that begin
alike with and without the cache, streams alone against the same in company, and streams over HTTP
through a real server. With --url they go to a server that runs elsewhere.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from mmfree_jax.cli.parse import Counts
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.bench import serve_load
from mmfree_jax.experiments.bench.infer_process import (
    decode_loop,
    model_config,
    random_weights,
    stored_form,
)
from mmfree_jax.experiments.bench.records import Row, say_each
from mmfree_jax.experiments.bench.serve_load import Drive, Load, Timed
from mmfree_jax.files import check_file, write_text
from mmfree_jax.installed import versions
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.weights import Unstacked, Weights
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.ranges import Count, CountOrZero, Range
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.serve.engine import Engine
from mmfree_jax.serve.requests import Limits, Request, RowSampling

# Of the bare loop, as `mmfree bench infer` has it by default.
_LOOP_STEPS, _LOOP_REPEATS = 64, 5
# So long that no request is refused.
_QUEUE = 10_000


@dataclasses.dataclass(frozen=True)
class Plan:
    """Measure the server: tokens a second, time to the first token, prefix cache, company."""

    out: Path
    """File that receives the record (JSON)."""
    model: PlaceOrUrl | None = None
    """Folder of a model, or its URL."""
    preset: str | None = None
    """In its place, a named size with random packed weights."""
    url: str | None = None
    """A server that serves this model, http://HOST:PORT; None: an engine in this process."""
    served_as: str = "bench"
    """Name of the model at --url."""
    http: bool = True
    """Also measure through HTTP, by a server in this process and clients in another."""
    streams: Counts = (1, 16, 64)
    """Streams at once, separated by commas."""
    prompt_tokens: Count = 32
    """Random tokens of each prompt."""
    new_tokens: Count = 200
    """Tokens of each answer."""
    repeats: Count = 3
    """Times that all streams run; the median counts."""
    loads: tuple[Annotated[float, Range(0, 10, open_low=True)], ...] = (0.5, 0.8)
    """Arrivals at random times, as shares of what the most streams finished a second."""
    arrivals: CountOrZero = 200
    """Requests of each load; 0: do not measure."""
    shared_tokens: CountOrZero = 1024
    """Tokens with which prompts begin alike, with and without the prefix cache; 0: do not
    measure."""
    company: CountOrZero = 64
    """Streams that run alone and then beside others, to count those that are equal; 0: none."""
    few_row_kernels: bool = False
    """Serve few rows by the kernels that are fastest for them; see `mmfree serve`."""


def measure(plan: Plan, about: Mapping[str, Any]) -> Iterator[Row]:
    """Every measurement of a plan as it is made, kept in the record.

    Args:
      plan: what to measure.
      about: what the record begins with (command, date and the like).

    Raises:
      ConfigError: not just one of --model and --preset.
      OutputError: the file holds what no such measurement made.
    """
    if (plan.model is None) == (plan.preset is None):
        raise ConfigError("give one of --model FOLDER and --preset NAME")
    check_file(plan.out, r'\{\s*"command"')
    record: Row = {
        **about,
        "device": jax.devices()[0].device_kind,
        "versions": versions("jax", "jaxlib", "flax"),
        "rows": [],
    }
    for row in _rows(plan, *_model(plan)):
        record["rows"].append(row)
        write_text(plan.out, json.dumps(record, indent=1) + "\n")
        yield row


def _model(plan: Plan) -> tuple[LanguageModel, Weights]:
    if plan.model is not None:
        saved = open_model(plan.model)
        return saved.model(), saved.weights()
    config = model_config(str(plan.preset), "packed")
    weights = random_weights(config, stored_form("packed"))
    assert not isinstance(weights, Unstacked)  # of dense forms
    return LanguageModel(config), weights


def _rows(plan: Plan, model: LanguageModel, weights: Weights) -> Iterator[Row]:
    bare = {}
    for streams in plan.streams:
        row = _bare(model, weights, streams)
        bare[streams] = row["tokens_per_s"]
        yield row
    if plan.url is not None:
        yield from _through(
            "http", plan, serve_load.through_http(plan.url, plan.served_as), model, bare
        )
        return
    engine, row = _started(plan, model, weights)
    yield row
    drive = serve_load.through_engine(engine)
    yield from _through("engine", plan, drive, model, bare)
    if plan.company:
        yield _company(plan, drive, model)
    if plan.shared_tokens and model.config.recurrent:
        without, _ = _started(plan, model, weights, cache_bytes=0)
        yield _shared(plan, without, model, cached=False)
        without.close()
        yield _shared(plan, engine, model, cached=True)
    if plan.http:
        from mmfree_jax.experiments.bench.serve_http import NAME, serve_engine  # the extra `serve`

        tokenizer = None if plan.model is None else open_model(plan.model).tokenizer()
        with serve_engine(engine, tokenizer) as url:
            drive = serve_load.through_http(url, NAME)
            yield from _through("http", plan, drive, model, bare)
    engine.close()


def _bare(model: LanguageModel, weights: Weights, batch: int) -> Row:
    """What `mmfree bench infer` measures at this batch."""
    steps, repeats = _LOOP_STEPS, _LOOP_REPEATS
    run = decode_loop(model.config, weights, batch=batch, steps=steps, calls=repeats + 1)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:])
    return {
        "work": "bare loop",
        "batch": batch,
        "ms_per_token": round(1e3 * seconds / steps, 4),
        "tokens_per_s": round(batch * steps / seconds, 1),
    }


def _started(
    plan: Plan, model: LanguageModel, weights: Weights, cache_bytes: int | None = None
) -> tuple[Engine, Row]:
    """An engine whose decoding calls have the sizes that are measured, and how it started."""
    slots = max(*plan.streams, 2)
    sizes = None
    if model.config.recurrent and not plan.few_row_kernels:
        sizes = tuple(sorted({*(n for n in plan.streams if n > 1), slots}))
    limits = Limits(
        slots=slots,
        queue=_QUEUE,
        batch_sizes=sizes,
        few_row_kernels=plan.few_row_kernels,
        max_length=None if model.config.recurrent else _longest(plan),
        **({} if cache_bytes is None else {"prefix_cache_bytes": cache_bytes}),
    )
    engine = Engine(model, weights, limits)
    start = time.perf_counter()
    engine.start()
    return engine, {
        "work": "start",
        "slots": slots,
        "batch_sizes": list(engine.plan.batch_sizes),
        "steps": engine.plan.steps,
        "few_row_kernels": plan.few_row_kernels,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _longest(plan: Plan) -> int:
    return max(plan.prompt_tokens, plan.shared_tokens + plan.prompt_tokens) + plan.new_tokens


def _requests(plan: Plan, model: LanguageModel, count: int, seed: int) -> tuple[Request, ...]:
    """Greedy requests with prompts of their own."""
    drawn = np.random.default_rng(seed).integers(
        0, model.config.vocab_size, (count, plan.prompt_tokens)
    )
    return tuple(Request(tuple(row), plan.new_tokens, RowSampling(0.0)) for row in drawn.tolist())


def _through(
    way: str, plan: Plan, drive: Drive, model: LanguageModel, bare: Mapping[int, float]
) -> Iterator[Row]:
    """Streams at once, then arrivals at random."""
    whole = 0.0
    for streams in plan.streams:
        loads = [
            Load(_requests(plan, model, streams, 100 * streams + repeat))
            for repeat in range(plan.repeats + 1)
        ]
        runs = drive(loads)[1:]
        rates = [serve_load.tokens_per_s(run) for run in runs]
        row = {
            "work": "streams",
            "through": way,
            "streams": streams,
            "whole_tokens_per_s": statistics.median(rate["whole"] for rate in rates),
            **serve_load.delays_ms([answer for run in runs for answer in run]),
        }
        if all("steady" in rate for rate in rates):
            row["tokens_per_s"] = statistics.median(rate["steady"] for rate in rates)
            row["share_of_bare_loop"] = round(row["tokens_per_s"] / bare[streams], 4)
        whole = max(whole, row["whole_tokens_per_s"])
        yield row
    for load in plan.loads if plan.arrivals else ():
        rate = load * whole / plan.new_tokens
        (answers,) = drive([Load(_requests(plan, model, plan.arrivals, seed=7), rate)])
        yield {
            "work": "arrivals",
            "through": way,
            "load": load,
            "requests_per_s": round(rate, 3),
            "requests": plan.arrivals,
            **serve_load.delays_ms(answers),
        }


def _one_by_one(drive: Drive, requests: Sequence[Request]) -> list[Timed]:
    return [answer for answers in drive([Load((r,)) for r in requests]) for answer in answers]


def _company(plan: Plan, drive: Drive, model: LanguageModel) -> Row:
    """Each stream alone, then all of them at random times in a busy batch."""
    requests = _requests(plan, model, plan.company, seed=3)
    alone = _one_by_one(drive, requests)
    others = [
        dataclasses.replace(r, sampling=RowSampling(), seed=i)
        for i, r in enumerate(_requests(plan, model, plan.company, seed=4))
    ]
    mixed = tuple(r for pair in zip(requests, others, strict=True) for r in pair)
    seconds = sum(answer.came[-1][0] - answer.sent_s for answer in alone)
    busy = drive([Load(mixed, rate=20 * len(mixed) / seconds)])[0][::2]
    same = [a.tokens == b.tokens for a, b in zip(alone, busy, strict=True)]
    agreed = [_agreed(a.tokens, b.tokens) for a, b in zip(alone, busy, strict=True)]
    return {
        "work": "company",
        "streams": len(same),
        "tokens": plan.new_tokens,
        "equal": sum(same),
        "share_equal": round(statistics.fmean(same), 4),
        "share_of_tokens": round(statistics.fmean(agreed) / plan.new_tokens, 4),
        "distinct": len({a.tokens for a in alone}),
    }


def _agreed(one: Sequence[int], other: Sequence[int]) -> int:
    return [*(a == b for a, b in zip(one, other, strict=True)), False].index(False)


def _shared(plan: Plan, engine: Engine, model: LanguageModel, *, cached: bool) -> Row:
    """Prompts that begin alike, one after another."""
    rng = np.random.default_rng(11)
    beginning = tuple(rng.integers(0, model.config.vocab_size, plan.shared_tokens).tolist())
    requests = [
        dataclasses.replace(r, prompt=beginning + r.prompt, max_tokens=4)
        for r in _requests(plan, model, 20, seed=12)
    ]
    before = engine.statistics()
    answers = _one_by_one(serve_load.through_engine(engine), requests)[1:]
    counts = engine.statistics()
    return {
        "work": "prefix cache",
        "cache": cached,
        "shared_tokens": plan.shared_tokens,
        "hits": counts.prefix_hits - before.prefix_hits,
        "tokens_saved": counts.prefix_tokens_saved - before.prefix_tokens_saved,
        "cache_bytes": counts.prefix_bytes,
        **serve_load.delays_ms(answers),
    }


def describe(row: Row) -> str:
    """A line for a row."""
    values = [
        f"{name.replace('_', ' ')} {value:,.4g}" if isinstance(value, float) else
        f"{name.replace('_', ' ')} {value}"
        for name, value in row.items()
        if name != "work"
    ]  # fmt: skip
    return f"{row['work']}: " + ", ".join(values)


def run(plan: Plan, about: Mapping[str, Any]) -> Sequence[Row]:
    """Measures, and shows each row as it comes."""
    return say_each(measure(plan, about), describe)
