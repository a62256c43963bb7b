"""One measurement of inference in its own process: `python -m ...bench.infer_process`.

Weights are random, of the right distribution, made on the device layer by layer in the form in
which they are used: a 13B model never exists in a larger form, and the process's peak memory is
the measured program's. The task is a line of JSON on stdin, so that the imports of one
measurement can go on during another; the result is one on stdout.

A time is the host's clock around one compiled program, the device synchronised before and
after, behind one call that compiles and warms up. Decoding: the greedy loop of `generate` over
`steps` tokens, with embedding, layers, head and the choice of each token. Prefill: the prompt
in, the state and the last token's logits out.
"""

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.experiments.bench.edge_process import summary
from mmfree_jax.experiments.bench.energy import measure_energy
from mmfree_jax.infer import decode
from mmfree_jax.infer.sample import Sampling, row_keys
from mmfree_jax.installed import versions
from mmfree_jax.model import init_state
from mmfree_jax.model.packing import packed_from_tree
from mmfree_jax.model.parameters import param_shapes
from mmfree_jax.model.weights import DecodingWeights, Master, Params, Ternary, Unstacked, is_ternary
from mmfree_jax.model_config import LinearConfig, ModelConfig
from mmfree_jax.pallas_kernels.decode.api import multiprocessors
from mmfree_jax.pallas_kernels.packed_matmul.api import from_words, plane_columns, unpack
from mmfree_jax.presets import preset


def model_config(size: str, form: str) -> ModelConfig:
    """The preset's model in one of `infer.FORMS`; the bfloat16 forms have dense products.

    "trits", the packed model's weights unpacked to int8, is for comparisons.
    """
    if form == "transformer-bf16":
        config = preset(f"{size}-transformer").model
    else:
        config = preset(size).model
    if form == "matmulfree-bf16":
        dense = LinearConfig(ternary_weights=False, int8_activations=False, input_norm=True)
        config = dataclasses.replace(
            config, mixer_linear=dense, glu_linear=dense, head_linear=dense
        )
    return dataclasses.replace(config, remat="none", param_dtype="bfloat16")


def task_config(task: dict[str, Any]) -> ModelConfig:
    """The model of a task: `layers` and `vocab_size` take the place of the preset's."""
    config = model_config(task["size"], task["form"])
    return dataclasses.replace(
        config,
        num_layers=task.get("layers", config.num_layers),
        vocab_size=task.get("vocab_size", config.vocab_size),
    )


def random_weights(config: ModelConfig, form: str, seed: int = 0) -> DecodingWeights:
    """Random weights.

    Args:
      config: of the model.
      form: "packed" (2 bits, the layout of the kernels), "trits" (int8), or another: the
        parameters in bfloat16, layer by layer.
      seed: of the weights.
    """
    keys = iter(jax.random.split(jax.random.key(seed), 256))
    params: Params = {}
    ternary: Params = {}
    blocks: list[Params] = [{} for _ in range(config.num_layers)]

    def put(tree: Params, path: tuple[str, ...], value: jax.Array) -> None:
        for name in path[:-1]:
            tree = tree.setdefault(name, {})
        tree[path[-1]] = value

    for name, leaf in param_shapes(config).items():
        path, shape = tuple(name.split("/")), leaf.shape
        if is_ternary(config, path):
            words = _random_words(next(keys), (*shape[:-1], plane_columns(shape[-1]) // 4))
            tree = params if form == "packed" else ternary
            if form == "packed":
                put(tree, (*path[:-1], "packed"), words)
            else:
                put(tree, (*path[:-1], "trits"), _unpack(words, shape[-1]))
            put(tree, (*path[:-1], "scale"), jnp.full((*shape[:-2], 1, 1), 0.02))
        elif path[0] == "blocks" and form not in ("packed", "trits"):
            for block, key in zip(blocks, jax.random.split(next(keys), len(blocks)), strict=True):
                put(block, path[1:], _random_leaf(key, path, shape[1:]))
        else:
            put(params, path, _random_leaf(next(keys), path, shape))
    if form == "packed":
        return packed_from_tree(params, config, layout="words")
    if form == "trits":
        return Ternary(params, ternary)
    return Unstacked(Master(params), tuple(map(Master, blocks)))


def _random_leaf(key: jax.Array, path: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
    """A parameter that is not ternary."""
    if path[-1] == "weight":
        return _random_normal(key, shape)
    if path[-1] == "lower_bounds":
        return jnp.zeros(shape, jnp.float32)
    return jnp.ones(shape, jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=1)
def _unpack(words: jax.Array, columns: int) -> jax.Array:
    return unpack(from_words(words), columns)


def _by_layer(make: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`make(key, shape)` for one matrix at a time, so that its scratch is one matrix's."""

    def stacked(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if len(shape) == 2:
            return make(key, shape)
        return jax.lax.map(lambda k: make(k, shape[1:]), jax.random.split(key, shape[0]))

    return jax.jit(stacked, static_argnums=1)


@_by_layer
def _random_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # The sum of two random bits is 0, 1 or 2 with weights 1, 2, 1: a trit plus one.
    bits = jax.random.bits(key, shape, jnp.uint32)
    codes = (bits & 0x55555555) + ((bits >> 1) & 0x55555555)
    return jax.lax.bitcast_convert_type(codes, jnp.int32)


@_by_layer
def _random_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)


def stored_form(form: str) -> str:
    """The form in which this backend holds a packed model: int8 trits on the CPU."""
    return "trits" if form == "packed" and jax.default_backend() == "cpu" else form


def decode_loop(
    config: ModelConfig,
    weights: DecodingWeights,
    *,
    batch: int,
    steps: int,
    calls: int,
    context: int = 0,
) -> Callable[[], jax.Array]:
    """A function that decodes `steps` more tokens a row behind `context` and returns them."""
    sampling = Sampling(temperature=0)
    session = decode.init_session(config, batch, context + steps * calls)
    state = session.state.replace(position_B=jnp.full(batch, context, jnp.int32))
    held = {"session": session.replace(state=state)}
    # Made once: making them is the host's work, not the program's.
    settings = (
        jnp.zeros(batch, bool),
        jnp.full(batch, steps, jnp.int32),
        row_keys(jnp.zeros(batch, jnp.uint32), jnp.zeros((batch, 2), jnp.uint32)),
        jnp.array([-1], jnp.int32),
        sampling.numbers(),
    )

    def run() -> jax.Array:
        held["session"], tokens, _ = decode.generate_chunk(
            weights,
            held["session"],
            *settings,
            config=config,
            filters=sampling.filters(),
            steps=steps,
            early_exit=False,
        )
        return tokens

    return run


def measure_decode(task: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds a token of the greedy loop, and with `energy_s` the energy of each token.

    With `context`, behind so many tokens: an attention cache is filled to there with zeros.
    """
    batch, steps, repeats = task["batch"], task["steps"], task["repeats"]
    config = task_config(task)
    weights = random_weights(config, stored_form(task["form"]))
    run = decode_loop(
        config,
        weights,
        batch=batch,
        steps=steps,
        calls=repeats + 1,
        context=task.get("context", 0),
    )
    first_s, times = _times(run, repeats)
    return {
        "first_call_s": round(first_s, 2),
        "ms_per_token": summary([1e3 * t / steps for t in times], 4),
        "tokens_per_s": round(batch * steps / statistics.median(times), 1),
        **_memory(weights),
        **_energy(task, run, batch * steps),
    }


def measure_prefill(task: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds to read a prompt of `tokens` tokens a row, with `energy_s` its energy too."""
    batch, tokens = task["batch"], task["tokens"]
    config = task_config(task)
    weights = random_weights(config, stored_form(task["form"]))
    prompt = jnp.ones((batch, tokens), jnp.int32)
    length = jnp.full(batch, tokens, jnp.int32)

    def run() -> jax.Array:
        session = decode.init_session(config, batch, tokens)
        fresh = not config.recurrent  # as `infer.prefill` has it
        session = decode.prefill(weights, session, prompt, length, config=config, fresh=fresh)
        return session.logits_BV

    first_s, times = _times(run, task["repeats"])
    return {
        "first_call_s": round(first_s, 2),
        "ms": summary([1e3 * t for t in times], 4),
        **_memory(weights),
        **_energy(task, run, batch * tokens),
    }


def decode_step(config: ModelConfig) -> Callable[..., Any]:
    """A jitted (weights, token_B, state) -> (logits_BV, state)."""

    @jax.jit
    def step(weights: DecodingWeights, token_B: jax.Array, state: Any) -> Any:
        return decode.forward(weights, config, token_B[:, None], state, None)

    return step


def measure_agreement(task: dict[str, Any]) -> dict[str, Any]:
    """How far three programs are from the float32 model on the same trits and tokens.

    They are the packed kernels in float32, and in bfloat16 the packed kernels and the unpacked
    model. KL is that of each from the float32 model's distribution, in nats, its mean over
    rows and tokens.
    """
    size, batch, tokens = task["size"], task["batch"], task["tokens"]
    narrow = dataclasses.replace(
        model_config(size, "packed"), compute_dtype="bfloat16", residual_dtype="bfloat16"
    )
    wide = dataclasses.replace(narrow, compute_dtype="float32", residual_dtype="float32")
    packed = random_weights(narrow, "packed")
    trits = random_weights(narrow, "trits")
    programs = {
        "unpacked float32": (trits, wide),
        "packed float32": (packed, wide),
        "packed bfloat16": (packed, narrow),
        "unpacked bfloat16": (trits, narrow),
    }
    logits: dict[str, list[jax.Array]] = {}
    for name, (weights, config) in programs.items():
        step = decode_step(config)
        state, logits[name] = init_state(config, batch), []
        for index in range(tokens):
            token_B = (jnp.arange(batch, dtype=jnp.int32) * 31 + 977 * index) % config.vocab_size
            found, state = step(weights, token_B, state)
            logits[name].append(found)
    expected = jnp.stack(logits.pop("unpacked float32"))
    row = {}
    for name, values in logits.items():
        found = jnp.stack(values)
        p, q = jax.nn.log_softmax(expected), jax.nn.log_softmax(found)
        same = jnp.argmax(expected, -1) == jnp.argmax(found, -1)
        row[name] = {
            "kl_nats": float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))),
            "same_top_1": float(jnp.mean(same & jnp.isfinite(found + expected).all(-1))),
            "largest_difference": float(jnp.max(jnp.abs(expected - found))),
        }
    row["largest_logit"] = float(jnp.max(jnp.abs(expected)))
    return {"from": "unpacked float32", **row}


def _times(run: Callable[[], jax.Array], repeats: int) -> tuple[float, list[float]]:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return times[0], times[1:]


def _memory(weights: Any) -> dict[str, float]:
    """Weights, and the most that the process has held on the device (10^9 bytes)."""
    row = {"weights_gb": sum(x.nbytes for x in jax.tree.leaves(weights)) / 1e9}
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        row["peak_gb"] = stats["peak_bytes_in_use"] / 1e9
    return {name: round(value, 4) for name, value in row.items()}


def _energy(task: dict[str, Any], run: Callable[[], jax.Array], tokens: int) -> dict[str, Any]:
    """Energy a token where the task asks for it; `tokens` are those of one call."""
    if not task.get("energy_s"):
        return {}
    return measure_energy(
        lambda: jax.block_until_ready(run()),
        seconds=task["energy_s"],
        tokens=tokens,
        device=jax.local_devices()[0].local_hardware_id or 0,
    )


WORKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "decode": measure_decode,
    "prefill": measure_prefill,
    "agreement": measure_agreement,
}


def run_task(
    task: dict[str, Any], works: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = WORKS
) -> dict[str, Any]:
    """Runs one task; its row says what it was, where it ran and what came out."""
    row = {
        **task,
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "multiprocessors": multiprocessors(),
        "versions": versions("jax", "jaxlib"),
    }
    return row | works[task["work"]](task)


if __name__ == "__main__":
    print(json.dumps(run_task(json.loads(sys.stdin.readline()))), flush=True)
