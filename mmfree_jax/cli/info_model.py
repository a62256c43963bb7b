"""What `mmfree info --model` shows of a saved model."""

import dataclasses
import re
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import Console
from rich.table import Table

from mmfree_jax.config import tokens_per_step
from mmfree_jax.errors import CheckpointError, DataError, TrainingError
from mmfree_jax.files import sha256_file
from mmfree_jax.json_shape import fault
from mmfree_jax.ranges import Step
from mmfree_jax.readable import printable
from mmfree_jax.saved.kinds import RESULTS, SUMS
from mmfree_jax.text_files import read_json, read_text

_NUMBER = {"name": str, "of": str, "value": (int, float)}
_SUM = re.compile(r"([0-9a-f]{64}) [ *](.+)")
UNKNOWN = "not recorded"


def describe_model(place: str, step: Step | None, *, checksums: bool) -> dict[str, Any]:
    """What is known of a saved model, as plain values; None where the folder does not say.

    Args:
      place: a run, packed model, model folder or Hugging Face folder, or its URL.
      step: of a run's checkpoint, as `open_model` takes it.
      checksums: whether files are compared with the checksums that are kept of them.

    Raises:
      MMFreeError: there is no model, or its config or header is damaged.
    """
    from mmfree_jax.saved.open_model import open_model
    from mmfree_jax.train.flops import count_parameters

    saved = open_model(place, step=step)
    config = saved.config
    counted = count_parameters(config)
    sums, checkpoint = _checksums(saved) if checksums else (None, None)
    return {
        "model": str(saved.place),
        "kind": saved.kind,
        "family": config.family,
        "mixer": config.mixer,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "glu_size": config.glu_size,
        "vocab_size": config.vocab_size,
        "parameters": {
            **dataclasses.asdict(counted),
            "total": counted.total,
            "non_embedding": counted.non_embedding,
        },
        "weights": _weights(saved),
        "compute_dtype": config.compute_dtype,
        "row_tokens": saved.trained_length,
        # What is carried of a text: as large behind any, or a cache of every place.
        "state": "constant" if config.recurrent else "grows",
        "tokenizer": _tokenizer(saved),
        "training": _training(saved, step, checkpoint, verified=checksums),
        "license": _license(saved),
        "checksums": sums,
    }


def _weights(saved: Any) -> dict[str, Any]:
    """How the weights are kept, and the bytes of their files; those of a run are not counted."""
    from mmfree_jax.saved.packed import open_packed, packed_files

    if saved.kind == "run":
        return {"dtype": "float32"}
    if saved.kind == "packed":
        files = packed_files(saved.path)
        kept: dict[str, Any] = {
            "dtype": "float32",
            "bits": open_packed(saved.path).bits,
            "embedding": saved.packed_embedding,
        }
    else:
        files = list(saved.path.glob("*.safetensors"))
        kept = {"dtype": "float32"}
        if saved.kind == "huggingface":
            kept = {"dtype": _torch_dtype(saved.path)}
    return kept | {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}


def _torch_dtype(folder: Path) -> str | None:
    from mmfree_jax.saved.huggingface import CONFIG

    fields = read_json(folder / CONFIG)  # read once already: it is an object
    found = fields.get("torch_dtype", fields.get("dtype"))
    return found if isinstance(found, str) else None


def _tokenizer(saved: Any) -> dict[str, Any] | None:
    try:
        found = saved.tokenizer()
    except DataError as e:
        return {"damaged": str(e)}
    return None if found is None else {"kind": found.kind, "vocab_size": found.vocab_size}


def _training(
    saved: Any, step: Step | None, checkpoint: Path | None, *, verified: bool
) -> dict[str, Any] | None:
    """Steps, tokens and held-out loss: of a run's manifests, of a published model's results.

    `checkpoint` is the run's that was `verified`; None: none is whole, which the checksums tell.
    """
    if saved.kind != "run":
        return _published(saved.path)
    from mmfree_jax.saved.history import read_history
    from mmfree_jax.saved.manifest import newest_manifest, read_manifest
    from mmfree_jax.saved.run_directory import CHECKPOINTS, METRICS, load_config
    from mmfree_jax.saved.run_model import kept_checkpoint

    config = load_config(saved.path)
    if verified:
        manifest = None if checkpoint is None else read_manifest(checkpoint)
    elif step == "best":
        manifest = read_manifest(saved.checkpoint())
    elif step is not None:
        manifest = read_manifest(kept_checkpoint(saved.place, step))
    else:
        manifest = newest_manifest(saved.place / CHECKPOINTS)
    if manifest is None:
        return None
    try:
        history = read_history(saved.path / METRICS)
    except TrainingError:
        history = []
    losses = [
        (record["step"], record["loss"])
        for record in history
        if record.get("kind") == "eval"
        and record.get("loss") is not None
        and (record.get("step") or 0) <= manifest.step
    ]
    last = losses[-1] if losses else (None, None)
    return {
        "step": manifest.step,
        "steps": config.steps,
        "tokens": manifest.origin.tokens_at(manifest.step, tokens_per_step(config)),
        "held_out_loss": last[1],
        "held_out_step": last[0],
    }


def _published(folder: Path) -> dict[str, Any] | None:
    try:
        results = read_json(folder / RESULTS)
    except (OSError, ValueError):
        return None
    if fault(results, {"model": str, "numbers": [_NUMBER]}):
        return None
    own = {n["name"]: n["value"] for n in results["numbers"] if n["of"] == results["model"]}
    return {
        "step": own.get("training/best step"),
        "steps": own.get("training/steps"),
        "tokens": own.get("training/tokens"),
        "held_out_loss": own.get("held-out loss/all sources"),
        "held_out_step": None,
    }


def _license(saved: Any) -> dict[str, Any] | None:
    """What the folder's card and the legal texts beside it say; of a run, of its data."""
    from mmfree_jax.saved.source_card import LEGAL_TEXTS, read_source_card

    try:
        card = read_source_card(saved.path, saved.kind)
    except DataError:
        card = None
    files = [name for name in LEGAL_TEXTS if (saved.path / name).is_file()]
    if card is None and not files:
        return None
    headings = [] if card is None else [s.partition("\n")[0].lstrip("# ") for s in card.sections]
    stated = None if card is None else card.license.get("license")
    found = {"license": stated, "sections_of_card": headings, "files": files}
    return found if any(found.values()) else None


def _checksums(saved: Any) -> tuple[dict[str, Any], Path | None]:
    """Whether files are as they were written: "ok", "damaged" or "none kept", how much was
    compared and what is damaged; and the folder of a run's checkpoint that is whole."""
    damaged, compared, checkpoint = [], 0, None
    if saved.kind == "run":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                checkpoint = saved.checkpoint()
                compared += 1
            except CheckpointError as e:
                damaged.append(str(e))
        damaged += [str(warning.message) for warning in caught]
    elif saved.kind == "packed":
        from mmfree_jax.saved.packed import open_packed

        reader = open_packed(saved.path).reader
        for name in reader.names():
            compared += 1
            try:
                reader.read(name)
            except CheckpointError as e:
                damaged.append(str(e))
    listed = _listed(saved.path)
    for name, wanted in listed.items():
        compared += 1
        try:
            if sha256_file(saved.path / name) != wanted:
                damaged.append(f"{name} does not match {SUMS}")
        except OSError as e:
            damaged.append(f"{name} is in {SUMS} and cannot be read ({e.strerror})")
    state = "damaged" if damaged else "ok" if compared else "none kept"
    return {"state": state, "compared": compared, "damaged": damaged}, checkpoint


def _listed(folder: Path) -> dict[str, str]:
    """The files of a list of sums that lie in the folder: name -> SHA-256."""
    try:
        lines = read_text(folder / SUMS).splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    pairs = ((m[2], m[1]) for m in map(_SUM.fullmatch, lines) if m)
    return {
        name: digest
        for name, digest in pairs
        if not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
    }


def print_model(report: dict[str, Any], console: Console) -> None:
    """Writes `describe_model`'s values for people."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in _rows(report):
        table.add_row(label, printable(value))
    console.print(table, highlight=False, markup=False)


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    parameters, weights, training = report["parameters"], report["weights"], report["training"]
    rows = [
        ("model", f"{report['model']} ({report['kind']})"),
        (
            "shape",
            f"{report['family']}: {report['num_layers']} layers ({report['mixer']}), width "
            f"{report['hidden_size']}, GLU {report['glu_size']}",
        ),
        (
            "parameters",
            f"{parameters['total']:,}; {parameters['non_embedding']:,} without embedding and head",
        ),
        ("ternary", f"{parameters['ternary']:,}"),
        ("embedding", f"{parameters['embedding']:,}"),
        ("vocabulary", f"{report['vocab_size']:,}"),
        ("weights", _weights_text(weights)),
        ("computes in", report["compute_dtype"]),
        ("context", _rows_text(report)),
        ("tokenizer", _tokenizer_text(report)),
    ]
    if training is not None:
        step, tokens = training["step"], training["tokens"]
        steps = "" if training["steps"] is None else f" of {training['steps']:,.0f}"
        rows += [
            ("step", UNKNOWN if step is None else f"{step:,.0f}{steps}"),
            ("training tokens", UNKNOWN if tokens is None else f"{tokens:,.0f}"),
            ("held-out loss", _loss_text(training)),
        ]
    else:
        rows.append(("training", UNKNOWN))
    return [*rows, ("licence", _license_text(report)), ("checksums", _sums_text(report))]


def _weights_text(weights: dict[str, Any]) -> str:
    kept = weights["dtype"] or "a dtype that config.json does not say"
    if "bits" in weights:
        kept = (
            f"{weights['bits']} bits a ternary weight, embedding in {weights['embedding']}, rest "
            f"in {kept}"
        )
    if "bytes" not in weights:
        return kept
    files = "1 file" if weights["files"] == 1 else f"{weights['files']} files"
    return f"{kept}; {weights['bytes']:,} bytes in {files}"


def _rows_text(report: dict[str, Any]) -> str:
    length = report["row_tokens"]
    text = f"length of rows {UNKNOWN}" if length is None else f"rows of {length:,} tokens"
    state = "is as large behind any text" if report["state"] == "constant" else "grows with a text"
    return f"{text}; what it carries of a text {state}"


def _tokenizer_text(report: dict[str, Any]) -> str:
    found = report["tokenizer"]
    if found is None:
        return "none"
    if "damaged" in found:
        return f"damaged: {found['damaged']}"
    text = f"{found['kind']}, {found['vocab_size']:,} ids"
    if found["vocab_size"] > report["vocab_size"]:
        text += f", more than the model's {report['vocab_size']:,}"
    return text


def _loss_text(training: dict[str, Any]) -> str:
    loss, step = training["held_out_loss"], training["held_out_step"]
    if loss is None:
        return UNKNOWN
    return f"{loss:.4f} nats a token" + ("" if step is None else f" (step {step:,})")


def _license_text(report: dict[str, Any]) -> str:
    found = report["license"]
    if found is None:
        return UNKNOWN
    parts = [found["license"]] if found["license"] else []
    parts += [f'see "{heading}" in its card' for heading in found["sections_of_card"]]
    parts += [f"see {name}" for name in found["files"]]
    return "; ".join(parts)


def _sums_text(report: dict[str, Any]) -> str:
    found = report["checksums"]
    if found is None:
        return "not compared"
    if found["state"] == "damaged":
        return "damaged: " + "; ".join(found["damaged"])
    if found["state"] == "none kept":
        return found["state"]
    what = "the newest checkpoint's files" if report["kind"] == "run" else "all that are kept"
    return f"ok ({what})"
