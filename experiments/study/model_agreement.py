"""How far programs that compute a trained model are from it in float32: text, logits, perplexity.

`python -m mmfree_jax.experiments.study.model_agreement --run runs/61M --step best --packed
after/packed --form onnx-exact --data data/study/classic_books --out onnx-exact.json`

The reference is the run's own weights, ternarised once, in float32 throughout, by XLA; where
`--run` is the packed folder too, as when the run is not at hand, its trits with the embedding that
it stores. A form is

- trained: the run as decoding on this device reads it, in the dtypes of training;
- packed: the packed folder likewise; packed-float32: its trits in float32 by XLA;
- onnx-exact, onnx-fast: the packed folder exported, in onnxruntime on the processor;
- transformers: the run exported for Hugging Face in float32, in PyTorch on the processor.

Greedy streams begin behind stretches of held-out text; each is also compared with what the run
writes in its own dtypes. Logits are those of each token of other stretches, each read afresh.

Shapes: P prompts, W windows of T tokens, V vocabulary.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.data.dataset import HELDOUT, TokenDataset, open_dataset
from mmfree_jax.errors import DataError, MMFreeError
from mmfree_jax.experiments.study.model_steps import FORMS
from mmfree_jax.export.agreement import LogitSums
from mmfree_jax.files import write_text
from mmfree_jax.infer.agreement import Streams, compare_streams, greedy_streams
from mmfree_jax.installed import import_optional, versions
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.weights import Weights
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.saved.open_model import SavedModel, open_model


@dataclass(frozen=True)
class Program:
    """A model as something computes it.

    Attributes:
      logits: of tokens [W, T]: [W, T, V] float32.
      greedy: prompts and a number of tokens: that many likeliest ones behind each prompt.
      on: what computes it.
    """

    logits: Callable[[np.ndarray], np.ndarray]
    greedy: Callable[[Streams, int], Streams]
    on: str


def stretches(dataset: TokenDataset, count: int, size: int) -> np.ndarray:
    """Stretches of a split's text at even distances, [count, size] int.

    Raises:
      DataError: it is shorter than one.
    """
    if dataset.num_tokens < size:
        raise DataError(f"{dataset.path} has {dataset.num_tokens} held-out tokens: {size} are read")
    starts = np.linspace(0, dataset.num_tokens - size, count).astype(int)
    return np.stack([dataset.tokens(int(start), int(start) + size) for start in starts])


@functools.partial(jax.jit, static_argnames="config")
def _logits(weights: Weights, tokens_WT: jax.Array, *, config: ModelConfig) -> jax.Array:
    return LanguageModel(config).apply(weights, tokens_WT).astype(jnp.float32)  # type: ignore[union-attr]


def of_jax(config: ModelConfig, weights: Weights) -> Program:
    """By this package, on JAX's device."""
    model = LanguageModel(config)

    def logits(tokens_WT: np.ndarray) -> np.ndarray:
        parts = np.array_split(tokens_WT, max(1, len(tokens_WT) // 4))
        found = (_logits(weights, jnp.asarray(part, jnp.int32), config=config) for part in parts)
        return np.concatenate([np.asarray(part) for part in found])

    def greedy(prompts: Streams, count: int) -> Streams:
        return greedy_streams(model, weights, prompts, new_tokens=count)

    return Program(logits, greedy, jax.devices()[0].device_kind)


def in_float32(saved: SavedModel) -> Program:
    """A model's trits by XLA, float32 throughout."""
    config = dataclasses.replace(
        saved.model().config, compute_dtype="float32", residual_dtype="float32", remat="none"
    )
    return of_jax(config, saved.weights("ternary"))


def as_decoded(saved: SavedModel) -> Program:
    """A model as decoding on this device reads it, in its own dtypes."""
    return of_jax(saved.model().config, saved.weights())


def of_onnx(packed: SavedModel, grade: str, scratch: Path) -> Program:
    """A packed model's ONNX export, read and written token by token."""
    from mmfree_jax.export import onnx_export, onnx_session

    folder = scratch / f"onnx-{grade}"
    onnx_export.export_onnx(packed, folder, grade=grade, web=False, overwrite=True)  # type: ignore[arg-type]
    model = onnx_session.load(folder)

    def logits(tokens_WT: np.ndarray) -> np.ndarray:
        state, found = model.start(len(tokens_WT)), []
        for t in range(tokens_WT.shape[1]):
            step_WV, state = model.step(tokens_WT[:, t : t + 1], state)
            found.append(step_WV)
        return np.stack(found, axis=1)

    def greedy(prompts: Streams, count: int) -> Streams:
        return [list(itertools.islice(onnx_session.greedy(model, p), count)) for p in prompts]

    return Program(logits, greedy, "onnxruntime, CPU")


def of_transformers(run: Path, step: Any, scratch: Path) -> Program:
    """The run's Hugging Face export in float32, in PyTorch on the processor."""
    from mmfree_jax.saved.convert import export_hf

    # transformers copies the code of a loaded folder into its cache; it need not ask a network.
    os.environ |= {"HF_HOME": str(scratch / "hf-home"), "HF_HUB_OFFLINE": "1"}
    export_hf(run, scratch / "hf", step=step, overwrite=True)
    purpose = "the form transformers"
    torch = import_optional("torch", purpose, "pip install torch")
    transformers = import_optional("transformers", purpose, "pip install transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(scratch / "hf", trust_remote_code=True, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # streams go on past an end of text

    def logits(tokens_WT: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            rows = (model(torch.tensor(row[None].astype(np.int64))).logits for row in tokens_WT)
            return np.concatenate([row.float().numpy() for row in rows])

    def greedy(prompts: Streams, count: int) -> Streams:
        tokens = torch.tensor(prompts)  # of one length
        mask = torch.ones_like(tokens)
        out = model.generate(
            tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return out[:, tokens.shape[1] :].tolist()

    return Program(logits, greedy, "PyTorch, CPU")


def program_of(form: str, run: Path, step: Any, packed: Path, scratch: Path) -> Program:
    """The program that a form stands for."""
    if form == "trained":
        return as_decoded(open_model(run, step=step))
    if form == "transformers":
        return of_transformers(run, step, scratch)
    saved = open_model(packed)
    if form == "packed":
        return as_decoded(saved)
    if form == "packed-float32":
        return in_float32(saved)
    return of_onnx(saved, form.removeprefix("onnx-"), scratch)


def compare_logits(
    own_WTV: np.ndarray, found_WTV: np.ndarray, tokens_WT: np.ndarray
) -> dict[str, float]:
    """KL from the reference, share of equal likeliest tokens, both perplexities.

    All are of the tokens that are predicted, each window's but its first.

    Raises:
      DataError: a program's logits are not finite.
    """
    sums = LogitSums()
    for own_TV, found_TV, tokens_T in zip(own_WTV, found_WTV, tokens_WT, strict=True):
        sums.add(own_TV[:-1], found_TV[:-1], tokens_T[1:])
    if not math.isfinite(sums.loss + sums.other_loss):
        raise DataError("the logits are not finite: the model, or the program, is broken")
    found = sums.agreement()
    return {
        "tokens": found.tokens,
        "kl_nats": found.kl,
        "same_top_1": found.same_top,
        "perplexity_of_float32": found.perplexity,
        "perplexity": found.export_perplexity,
        "largest_difference": found.largest_difference,
    }


def _streams(found: Streams, wanted: Streams) -> dict[str, Any]:
    agreement = compare_streams(found, wanted, "held-out text")
    return {"kept": agreement.kept, "agreed_tokens": list(agreement.agreed)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures one form and writes its record."""
    parser = argparse.ArgumentParser(description="Compare a form of a model with it in float32.")
    parser.add_argument("--run", type=Path, required=True, help="run of the model, or packed")
    parser.add_argument("--step", default=None, help="checkpoint, or best (the newest)")
    parser.add_argument("--packed", type=Path, required=True, help="the packed model")
    parser.add_argument("--form", choices=FORMS, required=True, help="what is compared")
    parser.add_argument("--data", type=Path, required=True, help="its held-out text is read")
    parser.add_argument("--scratch", type=Path, required=True, help="folder of exports")
    parser.add_argument("--out", type=Path, required=True, help="record (.json)")
    parser.add_argument("--prompts", type=int, default=64, help="greedy streams")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of each")
    parser.add_argument("--new-tokens", type=int, default=200, help="of a stream")
    parser.add_argument("--windows", type=int, default=16, help="stretches whose logits are read")
    parser.add_argument("--length", type=int, default=256, help="of a stretch (tokens)")
    given = parser.parse_args(argv)
    step = int(given.step) if (given.step or "").isdigit() else given.step
    try:
        data = open_dataset(given.data, HELDOUT)
        prompts: Streams = stretches(data, given.prompts, given.prompt_tokens).tolist()
        windows_WT = stretches(data, given.windows, given.length)
        trained = open_model(given.run, step=step)
        what = "packed model" if trained.kind == "packed" else trained.kind
        own = in_float32(trained)
        logits_WTV, streams = own.logits(windows_WT), own.greedy(prompts, given.new_tokens)
        own_dtypes = as_decoded(trained).greedy(prompts, given.new_tokens)
        form = program_of(given.form, given.run, step, given.packed, given.scratch)
        found = form.greedy(prompts, given.new_tokens)
        record = {
            "form": given.form,
            "computed_on": form.on,
            "reference_on": own.on,
            "reference": f"the {what} in float32, trits by XLA",
            "data": {"path": str(given.data), "fingerprint": data.fingerprint},
            "prompts": len(prompts),
            "prompt_tokens": given.prompt_tokens,
            "new_tokens": given.new_tokens,
            "streams_of_float32": _streams(found, streams),
            "streams_of_trained": _streams(found, own_dtypes),
            **compare_logits(logits_WTV, form.logits(windows_WT), windows_WT),
            "versions": versions("jax", "jaxlib", "onnxruntime", "torch", "transformers"),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    except MMFreeError as e:
        print(f"model_agreement: {e}", file=sys.stderr)
        return 2
    write_text(given.out, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
