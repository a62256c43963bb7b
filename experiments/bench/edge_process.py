"""One measurement of a model on a CPU in its own process: `python -I edge_process.py`.

It imports numpy and the runtime that it measures and nothing else, so that the peak memory is
that runtime's; run with the peer's interpreter it measures llama.cpp. The loop is the same for
all: greedy, one row, the likeliest token chosen and fed back, from Python. (The JAX path decodes
in a compiled loop of its own, `generate`.) The task is a line of JSON on stdin, the result one
on stdout.

Memory is the kernel's account of the process: resident pages, of which those of mapped files
(llama.cpp maps its weights) are counted as soon as they are touched.
"""

import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

COPIED = 512  # tokens that fill a cache are read up to here and copied beyond

Row = dict[str, Any]


class Engine(NamedTuple):
    """A loaded model and its state.

    Attributes:
      read: takes in tokens after those read so far; returns the likeliest next one.
      generate: (token, steps) feeds back the likeliest token so many times; returns them.
      fill: puts an empty state behind a prompt, as `read` or by a way of the same effect on speed
        and memory.
      mark: remembers the state as it is now.
      rewind: goes back to it.
      save: writes the state to a file.
      restore: replaces the state by one that was saved.
      versions: of the runtime.
    """

    read: Callable[[Sequence[int]], int]
    generate: Callable[[int, int], list[int]]
    fill: Callable[[Sequence[int]], object]
    mark: Callable[[], object]
    rewind: Callable[[], object]
    save: Callable[[Path], object]
    restore: Callable[[Path], object]
    versions: dict[str, str]


def pieces(tokens: Sequence[int], size: int) -> list[Sequence[int]]:
    """A prompt in pieces of at most `size` tokens, which are read at once."""
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def loop(read: Callable[[Sequence[int]], int]) -> Callable[[int, int], list[int]]:
    """The greedy loop over a `read`."""

    def generate(token: int, steps: int) -> list[int]:
        out = []
        for _ in range(steps):
            token = read([token])
            out.append(token)
        return out

    return generate


def open_onnx(task: Row) -> Engine:
    """An exported folder (or a graph of its inputs and outputs) in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task["threads"]
    options.inter_op_num_threads = 1
    for name, value in task.get("session", {}).items():
        options.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(
        str(Path(task["path"]) / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    shapes = {value.name: value.shape for value in session.get_inputs()}
    shape = [size if isinstance(size, int) else 1 for size in shapes["state"]]
    held: dict[str, Any] = {"state": np.zeros(shape, np.float32)}

    def read(tokens: Sequence[int]) -> int:
        logits_BV: Any = None
        for piece in pieces(tokens, task["piece"]):
            feed = {"tokens": np.array([piece], np.int64), "state": held["state"]}
            logits_BV, held["state"] = session.run(["logits", "next_state"], feed)
        return int(logits_BV[0].argmax())

    def mark() -> None:
        held["mark"] = held["state"]

    def rewind() -> None:
        held["state"] = held["mark"]

    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, held["state"])

    def restore(path: Path) -> None:
        held["state"] = np.load(path)

    versions = {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__}
    return Engine(read, loop(read), read, mark, rewind, save, restore, versions)


def open_jax(task: Row) -> Engine:
    """A packed model in our own CPU path, as `mmfree generate` runs it."""
    import jax

    from mmfree_jax import infer

    model, params = infer.load_model(task["path"])
    weights = infer.as_weights(params, model.config)
    held: dict[str, Any] = {"session": None}

    def read(tokens: Sequence[int]) -> int:
        session = infer.prefill(model, weights, [list(tokens)], session=held["session"])
        held["session"] = session
        return int(np.asarray(session.logits_BV)[0].argmax())

    def generate(token: int, steps: int) -> list[int]:
        # The session holds the logits that `token` was chosen from.
        del token
        out = infer.generate(
            model, weights, [[]], session=held["session"], max_new_tokens=steps, temperature=0
        )
        held["session"] = out.session
        return out.tokens[0]

    def mark() -> None:
        held["mark"] = held["session"]

    def rewind() -> None:
        held["session"] = held["mark"]

    def save(path: Path) -> None:
        infer.save_session(path, held["session"], weights, model.config)

    def restore(path: Path) -> None:
        held["session"] = infer.load_session(path, weights, model.config)

    versions = {"jax": jax.__version__, "numpy": np.__version__}
    return Engine(read, generate, read, mark, rewind, save, restore, versions)


def open_llama(task: Row) -> Engine:
    """A GGUF file in llama.cpp, through its C interface."""
    import llama_cpp as llama  # pyright: ignore[reportMissingImports]

    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(
        str(task["path"]).encode(), llama.llama_model_default_params()
    )
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {task['path']}")
    options = llama.llama_context_default_params()
    options.n_ctx = task["places"]
    options.n_threads = options.n_threads_batch = task["threads"]
    options.n_batch = options.n_ubatch = task["piece"]
    options.no_perf = True
    # Off, as llama-cpp-python's own class has it; on a CPU with AVX2 it was also the faster.
    options.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if task["work"] == "context":  # a second sequence in the same cache, for `fill`
        options.n_seq_max, options.kv_unified = 2, True
    context = llama.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError(f"llama.cpp cannot make a context of {task['places']} tokens")
    memory = llama.llama_get_memory(context)
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    held: dict[str, Any] = {"read": 0, "silent": silent}

    def read(tokens: Sequence[int]) -> int:
        for piece in pieces(tokens, task["piece"]):
            ids = (llama.llama_token * len(piece))(*piece)
            code = llama.llama_decode(context, llama.llama_batch_get_one(ids, len(piece)))
            if code:
                raise RuntimeError(f"llama_decode gave {code} after {held['read']} tokens")
            held["read"] += len(piece)
        logits = llama.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (size,)).argmax())

    def fill(tokens: Sequence[int]) -> None:
        # Keys and values of the first tokens again and again, moved to their places: reading all
        # takes long, and neither speed nor memory depends on the content.
        read(tokens[:COPIED])
        size = llama.llama_state_seq_get_size(context, 0)
        data = (ctypes.c_uint8 * size)()
        llama.llama_state_seq_get_data(context, data, size, 0)
        for start in range(COPIED, len(tokens), COPIED):
            if not llama.llama_state_seq_set_data(context, data, size, 1):
                raise RuntimeError(f"llama.cpp cannot copy its cache to token {start}")
            llama.llama_memory_seq_add(memory, 1, 0, -1, start)
            llama.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            llama.llama_memory_seq_rm(memory, 1, -1, -1)
        llama.llama_memory_seq_rm(memory, 0, len(tokens) - 1, -1)
        held["read"] = len(tokens) - 1
        read(tokens[-1:])  # moves the keys

    def mark() -> None:
        held["mark"] = held["read"]

    def rewind() -> None:
        if not llama.llama_memory_seq_rm(memory, 0, held["mark"], -1):
            raise RuntimeError(f"llama.cpp cannot go back to token {held['mark']}")
        held["read"] = held["mark"]

    def save(path: Path) -> None:
        ids = (llama.llama_token * held["read"])()
        if not llama.llama_state_save_file(context, str(path).encode(), ids, held["read"]):
            raise RuntimeError(f"llama.cpp cannot write {path}")

    def restore(path: Path) -> None:
        ids, count = (llama.llama_token * task["places"])(), ctypes.c_size_t(0)
        if not llama.llama_state_load_file(
            context, str(path).encode(), ids, task["places"], ctypes.byref(count)
        ):
            raise RuntimeError(f"llama.cpp cannot read {path}")
        held["read"] = count.value

    versions = {
        "llama-cpp-python": llama.__version__,
        "system": llama.llama_print_system_info().decode().strip(),
    }
    return Engine(read, loop(read), fill, mark, rewind, save, restore, versions)


OPEN = {"onnx": open_onnx, "jax": open_jax, "llama": open_llama}


def prompt(count: int, vocab_size: int) -> list[int]:
    """A prompt of so many tokens, the same for every runtime."""
    return [(31 * place + 977) % vocab_size for place in range(count)]


def memory() -> dict[str, float]:
    """Resident memory of this process now, its parts, and its peak (10^6 bytes)."""
    names = {"VmRSS": "rss", "RssAnon": "anonymous", "RssFile": "file_backed", "VmHWM": "peak"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in names:
            found[names[name] + "_mb"] = round(int(value.split()[0]) * 1024 / 1e6, 1)
    return found


def busy_seconds() -> tuple[float, float]:
    """Seconds of work of all the machine's cores since it started, and of this process."""
    ticks = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    idle, waiting = int(ticks[3]), int(ticks[4])
    times = os.times()
    busy = (sum(map(int, ticks)) - idle - waiting) / os.sysconf("SC_CLK_TCK")
    return busy, times.user + times.system


def measure_decode(engine: Engine, task: Row) -> Row:
    """Tokens a second of the greedy loop, each timed loop from the same context on."""
    start = time.perf_counter()
    if task.get("state"):
        engine.restore(Path(task["state"]))
        token = 0
    else:
        token = engine.read(prompt(task["context"], task["vocab_size"]))
    context_s = time.perf_counter() - start
    engine.mark()
    expected = engine.generate(token, task["steps"])
    times = []
    for _ in range(task["repeats"]):
        engine.rewind()
        start = time.perf_counter()
        found = engine.generate(token, task["steps"])
        times.append(time.perf_counter() - start)
        if found != expected:
            raise RuntimeError("the same loop gave other tokens the second time")
    return {
        "context_s": round(context_s, 3),
        "ms_per_token": summary([1e3 * t / task["steps"] for t in times]),
        "tokens_per_s": summary([task["steps"] / t for t in times]),
    }


def measure_prefill(engine: Engine, task: Row) -> Row:
    """Tokens a second of reading a prompt into an empty state."""
    tokens = prompt(task["tokens"], task["vocab_size"])
    engine.mark()
    times = []
    for _ in range(task["repeats"] + 1):
        engine.rewind()
        start = time.perf_counter()
        engine.read(tokens)
        times.append(time.perf_counter() - start)
    return {"tokens_per_s": summary([task["tokens"] / t for t in times[1:]])}


def save_context(engine: Engine, task: Row) -> Row:
    """Makes the state behind a long prompt once and keeps it for later measurements."""
    start = time.perf_counter()
    engine.fill(prompt(task["context"], task["vocab_size"]))
    seconds = time.perf_counter() - start
    final = Path(task["state"])
    part = final.with_name(final.name + ".tmp")
    engine.save(part)
    part.replace(final)
    return {"context_s": round(seconds, 1), "state_mb": round(final.stat().st_size / 1e6, 1)}


WORKS = {"decode": measure_decode, "prefill": measure_prefill, "context": save_context}


def summary(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, least and greatest."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def run_task(task: Row) -> Row:
    """Runs one task; its row says what it was and what came out."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task["threads"]])
    before = memory()["rss_mb"]
    machine_s, own_s = busy_seconds()
    start = time.perf_counter()
    engine = OPEN[task["runtime"]](task)
    load_s = time.perf_counter() - start
    loaded = memory()
    row = {
        **task,
        "versions": engine.versions,
        "load_s": round(load_s, 3),
        "rss_before_mb": before,
        "rss_loaded_mb": loaded["rss_mb"],
        **WORKS[task["work"]](engine, task),
    }
    machine_s, own_s = busy_seconds()[0] - machine_s, busy_seconds()[1] - own_s
    others = max(0.0, machine_s - own_s) / (time.perf_counter() - start)
    return row | {"cores_of_others": round(others, 2)} | memory()


if __name__ == "__main__":
    print(json.dumps(run_task(json.loads(sys.stdin.readline()))), flush=True)
