"""One case of the paper's tables by a peer: `python -I paper_peer.py`, task and result as JSON.

In an interpreter that has torch and transformers. Weights are random, float32 with bfloat16
autocast in training and bfloat16 for inference; decoding is greedy, fed back from Python, as
these packages are used.
"""

import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PACKAGES = ("torch", "transformers")


def run_task(task: Row) -> Row:
    """The row of a task, or which packages are missing."""
    if task["work"] == "packages":
        return {"missing": [n for n in PACKAGES if importlib.util.find_spec(n) is None]}
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = (*PACKAGES, "triton")
    row = task | {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "backend": device,
        "versions": {n: importlib.metadata.version(n) for n in names if _has(n)},
    }
    torch.manual_seed(0)
    with torch.device(device):
        model = make_model(task)
    work = {"train": train, "prefill": prefill, "decode": decode}[task["work"]]
    row |= work(model, task, device)
    if device == "cuda":
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 4)
    return row


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def make_model(task: Row) -> Any:
    """The peer's model of a task, on the default device."""
    dims = task["dims"]
    if task["form"] == "hf-llama":
        from transformers import (  # pyright: ignore[reportMissingImports]
            LlamaConfig,
            LlamaForCausalLM,
        )

        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=dims["vocab_size"],
                hidden_size=dims["width"],
                intermediate_size=dims["glu"],
                num_hidden_layers=dims["layers"],
                num_attention_heads=dims["heads"],
                num_key_value_heads=dims["kv_heads"],
                max_position_embeddings=dims["context"],
                attn_implementation="sdpa",
            )
        )
    sys.path.insert(0, task["checkout"])
    from mmfreelm.layers import hgrn_bit  # pyright: ignore[reportMissingImports]
    from mmfreelm.models.hgrn_bit import (  # pyright: ignore[reportMissingImports]
        modeling_hgrn_bit as modeling,
    )
    from mmfreelm.ops import bitnet, fusedbitnet  # pyright: ignore[reportMissingImports]

    # Checkouts differ in which of the two they import under this name.
    plain = task["form"] == "authors-plain"
    modeling.BitLinear = hgrn_bit.BitLinear = (
        bitnet.BitLinear if plain else fusedbitnet.FusedBitLinear
    )
    config = modeling.HGRNBitConfig(
        vocab_size=dims["vocab_size"],
        hidden_size=dims["width"],
        num_hidden_layers=dims["layers"],
    )
    return modeling.HGRNBitForCausalLM(config)


def train(model: Any, task: Row, device: str) -> Row:
    """A step of AdamW on random tokens."""
    import torch  # pyright: ignore[reportMissingImports]

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    shape = (task["batch"], task["tokens"])
    tokens = torch.randint(task["dims"]["vocab_size"], shape, device=device)

    def steps() -> None:
        for _ in range(task["steps"]):
            with torch.autocast(device, torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    times = measure(steps, task["repeats"], device)
    seconds = statistics.median(times) / task["steps"]
    return {
        "ms": {
            "median": round(1e3 * seconds, 3),
            "spread": round(1e3 * (max(times) - min(times)) / task["steps"], 3),
        },
        "tokens_per_s": round(tokens.numel() / seconds, 1),
    }


def prefill(model: Any, task: Row, device: str) -> Row:
    """A prompt in, the last token's logits out."""
    import torch  # pyright: ignore[reportMissingImports]

    model = model.to(torch.bfloat16).eval()
    tokens = torch.ones((task["batch"], task["tokens"]), dtype=torch.long, device=device)
    last = {"logits_to_keep": 1} if task["form"] == "hf-llama" else {}

    def read() -> Any:
        with torch.no_grad():
            return model(input_ids=tokens, use_cache=True, **last)

    times = measure(read, task["repeats"], device)
    return {"ms": _summary(times, 1.0), **_energy(task, read, tokens.numel(), device)}


def decode(model: Any, task: Row, device: str) -> Row:
    """Greedy tokens behind a context of `context` tokens."""
    import torch  # pyright: ignore[reportMissingImports]

    model = model.to(torch.bfloat16).eval()
    steps, batch = task["steps"], task["batch"]
    held: Row = {}

    def generate() -> None:
        with torch.no_grad():
            for _ in range(steps):
                found = model(input_ids=held["token"], past_key_values=held["past"], use_cache=True)
                held["past"] = found.past_key_values
                held["token"] = found.logits[:, -1:].argmax(-1)

    with torch.no_grad():
        tokens = torch.ones((batch, max(1, task["context"])), dtype=torch.long, device=device)
        found = model(input_ids=tokens, use_cache=True)
    held |= {"past": found.past_key_values, "token": found.logits[:, -1:].argmax(-1)}
    del found
    times = measure(generate, task["repeats"], device)
    return {
        "ms_per_token": _summary(times, 1 / steps),
        "tokens_per_s": round(batch * steps / statistics.median(times), 1),
        **_energy(task, generate, batch * steps, device),
    }


def measure(run: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Seconds of each call, behind one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return times[1:]


def _wait(device: str) -> None:
    import torch  # pyright: ignore[reportMissingImports]

    if device == "cuda":
        torch.cuda.synchronize()


def _energy(task: Row, run: Callable[[], object], tokens: int, device: str) -> Row:
    if not task.get("energy_s"):
        return {}
    sys.path.append(str(Path(__file__).parent))
    from energy import measure_energy  # pyright: ignore[reportMissingImports]

    def call() -> None:
        run()
        _wait(device)

    return measure_energy(call, seconds=task["energy_s"], tokens=tokens, device=0)


def _summary(times: list[float], share: float) -> dict[str, float]:
    found = {"median": statistics.median(times), "min": min(times), "max": max(times)}
    return {name: round(1e3 * share * value, 4) for name, value in found.items()}


if __name__ == "__main__":
    print(json.dumps(run_task(json.loads(sys.stdin.readline()))), flush=True)
