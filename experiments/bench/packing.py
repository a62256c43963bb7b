"""How faithful a packed model is: each form against the trained model, on the same prompts.

Three programs decode: the training program on trits (XLA), the GPU's kernels with all prompts in
one batch, and those for one prompt. A form is compared with the float32 one by the same program,
which tells what the stored numbers change, and the programs with each other, which tells what
the order of sums changes. Where there is no GPU the packed programs are XLA's too.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.cli.parse import Names
from mmfree_jax.data.dataset import open_dataset
from mmfree_jax.experiments.bench.edge_process import summary
from mmfree_jax.experiments.bench.infer_process import decode_loop
from mmfree_jax.experiments.bench.records import Row, one_of, say_each
from mmfree_jax.files import check_file, write_text
from mmfree_jax.infer.agreement import Streams, compare_streams, greedy_streams, held_out_documents
from mmfree_jax.installed import versions
from mmfree_jax.model import LanguageModel, init_state
from mmfree_jax.model.packing import pack as pack_in_memory
from mmfree_jax.model.weights import Packed, Ternary, Weights, as_weights
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.pallas_kernels.decode.api import multiprocessors
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.ranges import Count
from mmfree_jax.saved.open_model import SavedModel, open_model
from mmfree_jax.saved.pack import pack

# Stored embeddings; "bfloat16 norms" is what earlier versions wrote.
FORMS = ("float32", "bfloat16", "int8", "bfloat16 norms")
# Compute and residual dtype; None: as trained.
DTYPES = {
    "trained": (None, None),
    "float32": ("float32", "float32"),
    "float32-between": ("float32", None),
}
_TIMED_STEPS = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """Measure how far packed forms of a trained model agree with it, and what each costs."""

    model: PlaceOrUrl
    """Folder of the trained model, or its URL."""
    data: PlaceOrUrl
    """Prepared data set, or its URL, whose held-out documents give the prompts."""
    out: Path
    """Folder that receives packing.json and the packed models."""
    prompts: Count = 64
    """Held-out documents."""
    prompt_tokens: Count = 32
    """Tokens read of each."""
    new_tokens: Count = 200
    """Greedy tokens behind each prompt."""
    dtypes: Names = ("trained", "float32")
    """Separated by commas. trained: as the model was trained; float32: everything between the
    integers in float32; float32-between: all of it but the residual stream."""
    repeats: Count = 5
    """Timed loops of 128 tokens; the median counts."""


def measure(plan: Plan, about: Mapping[str, Any]) -> Iterator[Row]:
    """Every measurement of a plan as it is made, kept in packing.json.

    Args:
      plan: what to measure.
      about: what the record begins with (command, date and the like).

    Raises:
      DataError: too few held-out documents are long enough.
      OutputError: the folder holds what no such measurement made.
    """
    one_of(plan, DTYPES, "dtypes")
    record_file = plan.out / "packing.json"
    check_file(record_file, r'\{\s*"command"')
    saved = open_model(plan.model)
    documents_PT = held_out_documents(
        plan.data,
        count=plan.prompts,
        length=plan.prompt_tokens + plan.new_tokens,
        flag="--prompts",
    )
    record: Row = {
        **about,
        "device": jax.devices()[0].device_kind,
        "multiprocessors": multiprocessors(),
        "versions": versions("jax", "jaxlib", "flax"),
        "plan": {name: str(value) for name, value in dataclasses.asdict(plan).items()},
        "data": {"fingerprint": open_dataset(plan.data, "heldout").fingerprint},
        "rows": [],
    }
    for row in _rows(plan, saved, documents_PT):
        record["rows"].append(row)
        write_text(record_file, json.dumps(record, indent=1) + "\n")
        yield row


def _rows(plan: Plan, saved: SavedModel, documents_PT: np.ndarray) -> Iterator[Row]:
    master = saved.weights("master")
    folders = {}
    for form in FORMS[:3]:
        start = time.perf_counter()
        report = pack(saved, plan.out / form, embedding=form)  # type: ignore[arg-type]
        folders[form] = open_model(plan.out / form)
        yield {
            "work": "pack",
            "form": form,
            "bytes": report.num_bytes,
            "embedding_error": report.embedding_error,
            "seconds": round(time.perf_counter() - start, 2),
        }
    prompts = documents_PT[:, : plan.prompt_tokens].tolist()
    for dtypes in plan.dtypes:
        compute, residual = DTYPES[dtypes]
        config = saved.config
        config = dataclasses.replace(
            config,
            compute_dtype=compute or config.compute_dtype,
            residual_dtype=residual or config.residual_dtype,
        )
        model = LanguageModel(config)
        trained = as_weights(master, dataclasses.replace(model.config, bitlinear="fused"))
        assert isinstance(trained, Ternary)
        in_memory = pack_in_memory(trained, model.config)

        def weights_of(form: str, program: str) -> Weights:
            """The weights as read from the packed file, or as old files held them."""
            if form == "bfloat16 norms":
                return _rounded(weights_of("bfloat16", program))
            return folders[form].weights("ternary" if program.startswith("xla") else "packed")

        programs = {"xla": plan.prompts, "xla, one row": 1, "packed": plan.prompts,
                    "packed, one row": 1}  # fmt: skip
        references: dict[str, Streams] = {}
        for program, batch in programs.items():
            start = time.perf_counter()
            weights = trained if program.startswith("xla") else in_memory
            references[program] = greedy_streams(
                model, weights, prompts, new_tokens=plan.new_tokens, batch_size=batch
            )
            yield {
                "work": "program",
                "dtypes": dtypes,
                "program": program,
                "against": "xla, one row" if program != "xla" else "xla",
                "seconds": round(time.perf_counter() - start, 1),
                **_agreement(
                    references[program],
                    references.get("xla, one row", references["xla"]),
                ),
            }
            if program == "xla, one row":
                continue
            for form in FORMS:
                found = greedy_streams(
                    model, weights_of(form, program), prompts, new_tokens=plan.new_tokens,
                    batch_size=batch,
                )  # fmt: skip
                yield {
                    "work": "form",
                    "dtypes": dtypes,
                    "program": program,
                    "form": form,
                    **_agreement(found, references[program]),
                }
        yield from _logit_rows(
            model, {"xla": trained, "packed": in_memory}, weights_of, dtypes, documents_PT
        )
        for form in FORMS:
            yield {
                "work": "time",
                "dtypes": dtypes,
                "form": form,
                "batch": 1,
                "ms_per_token": _milliseconds(
                    model.config, weights_of(form, "packed"), plan.repeats
                ),
            }
        yield {
            "work": "time",
            "dtypes": dtypes,
            "form": "trits, XLA",
            "batch": 1,
            "ms_per_token": _milliseconds(model.config, trained, plan.repeats),
        }
        yield _steps_row(model, trained, in_memory, dtypes, documents_PT)


def _rounded(weights: Weights) -> Weights:
    """Norms in bfloat16, as earlier versions stored them."""
    bf16 = functools.partial(jnp.asarray, dtype=jnp.bfloat16)
    if isinstance(weights, Packed):
        bounds = weights.mixer.lower_bound
        # Vectors of the norms: all float32 arrays but the scales [.., 1, 1] and the table.
        table = weights.embedding
        rounded = jax.tree.map(
            lambda x: bf16(x) if x.dtype == jnp.float32 and x.shape[-1] > 1 else x, weights
        )
        mixer = rounded.mixer._replace(lower_bound=bounds)
        blocks = (dataclasses.replace(rounded.blocks[0], mixer=mixer),)
        return dataclasses.replace(rounded, blocks=blocks, embedding=table)
    assert isinstance(weights, Ternary)
    params = dict(weights.params)
    kept = {name: params.pop(name) for name in ("embedding", "lower_bounds") if name in params}
    return Ternary(jax.tree.map(bf16, params) | kept, weights.ternary)


def _agreement(found: Streams, wanted: Streams) -> Row:
    agreement = compare_streams(found, wanted, "")
    quantiles = np.percentile(agreement.agreed, [0, 5, 25, 50, 75], method="lower")
    return {
        "kept": agreement.kept,
        "prompts": len(wanted),
        "agreed_tokens": list(agreement.agreed),
        "agreed_min_5_25_50_75": [int(q) for q in quantiles],
        "share_of_tokens": round(float(np.mean(agreement.agreed)) / agreement.new_tokens, 4),
    }


@functools.partial(jax.jit, static_argnames="config")
def _logits(weights: Weights, tokens_BT: jax.Array, *, config: ModelConfig) -> jax.Array:
    return LanguageModel(config).apply(weights, tokens_BT)


@jax.jit
def _differences(found_BTV: jax.Array, wanted_BTV: jax.Array, tokens_BT: jax.Array) -> Any:
    """Largest and mean difference of two logits, mean KL, share of equal argmax, and the losses."""
    p, q = jax.nn.log_softmax(wanted_BTV), jax.nn.log_softmax(found_BTV)
    targets = tokens_BT[:, 1:, None]
    difference = jnp.abs(found_BTV - wanted_BTV)
    same = (jnp.argmax(p, -1) == jnp.argmax(q, -1)) & jnp.isfinite(p + q).all(-1)
    return {
        # XLA's maximum on a CPU may pass over a NaN (pallas_kernels/keep_nan.py).
        "largest_difference": jnp.where(jnp.isnan(difference).any(), jnp.nan, jnp.max(difference)),
        "mean_difference": jnp.mean(difference),
        "kl_nats": jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1)),
        "same_top_1": jnp.mean(same),
        "loss": -jnp.mean(jnp.take_along_axis(q[:, :-1], targets, -1)),
    }


def _logit_rows(
    model: LanguageModel,
    trained: Mapping[str, Weights],
    weights_of: Any,
    dtypes: str,
    documents_PT: np.ndarray,
) -> Iterator[Row]:
    """Logits on the held-out text itself, all tokens at once, 8 documents a time."""
    apply = functools.partial(_logits, config=model.config)
    batches = [jnp.asarray(documents_PT[i : i + 8]) for i in range(0, len(documents_PT), 8)]
    for program in ("xla", "packed"):
        for form in ("trained", *FORMS):
            weights = trained[program] if form == "trained" else weights_of(form, program)
            # The trained model by XLA is what its packed program is compared with.
            reference = trained["xla" if form == "trained" else program]
            found = [_differences(apply(weights, b), apply(reference, b), b) for b in batches]
            values = jax.device_get(found)
            yield {
                "work": "logits",
                "dtypes": dtypes,
                "program": program,
                "form": form,
                **{
                    name: float(
                        (np.max if name == "largest_difference" else np.mean)(
                            [v[name] for v in values]
                        )
                    )
                    for name in values[0]
                },
            }


def _steps_row(
    model: LanguageModel,
    trained: Weights,
    in_memory: Weights,
    dtypes: str,
    documents_PT: np.ndarray,
) -> Row:
    """Logits of token after token, one row, by the kernel of whole tokens and by XLA."""

    @jax.jit
    def step(weights: Weights, token_B: jax.Array, state: Any) -> Any:
        return model.apply(weights, token_B[:, None], state, method=LanguageModel.decode)

    worst, means, parted = 0.0, [], []
    for document_T in documents_PT[:4]:
        states = [init_state(model.config, 1) for _ in range(2)]
        first = len(document_T)
        for t, token in enumerate(document_T.tolist()):
            logits = []
            for i, weights in enumerate((trained, in_memory)):
                out, states[i] = step(weights, jnp.asarray([token]), states[i])
                logits.append(out)
            difference = np.abs(np.asarray(logits[0] - logits[1]))
            # np.maximum keeps a NaN, which is no agreement.
            worst = float(np.maximum(worst, difference.max()))
            means.append(float(difference.mean()))
            if not difference.max() <= 1e-3 and first == len(document_T):
                first = t
        parted.append(first)
    return {
        "work": "steps",
        "dtypes": dtypes,
        "documents": len(parted),
        "largest_difference": worst,
        "mean_difference": statistics.fmean(means),
        "mean_differences_first_document": [float(f"{m:.3g}") for m in means[: len(document_T)]],
        "first_difference_above_1e-3": parted,
    }


def _milliseconds(config: ModelConfig, weights: Weights, repeats: int) -> dict[str, float]:
    steps = _TIMED_STEPS
    run = decode_loop(config, weights, batch=1, steps=steps, calls=repeats + 1)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(1e3 * (time.perf_counter() - start) / steps)
    return summary(times[1:], 4)


def describe(row: Row) -> str:
    """A line for a row."""
    head = ", ".join(str(row[k]) for k in ("work", "dtypes", "program", "form") if k in row)
    if "kept" in row:
        return (
            f"{head}: {row['kept']}/{row['prompts']} kept, {row['share_of_tokens']:.1%} of tokens, "
            f"parted at {row['agreed_min_5_25_50_75']}"
        )
    hidden = ("agreed_tokens", "mean_differences_first_document", "work", "dtypes", "program",
              "form")  # fmt: skip
    values = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
              if k not in hidden]  # fmt: skip
    return f"{head}: " + ", ".join(values)


def run(plan: Plan, about: Mapping[str, Any]) -> Sequence[Row]:
    """Measures, and shows each row as it comes."""
    return say_each(measure(plan, about), describe)
