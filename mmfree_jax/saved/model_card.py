"""README.md of an exported model: the card that the Hub shows, made from the run's own records."""

import re
from pathlib import Path
from typing import Any

import yaml

from mmfree_jax.config import tokens_per_step
from mmfree_jax.data.dataset import TRAIN, open_dataset
from mmfree_jax.data.dataset_index import load_index
from mmfree_jax.errors import ConfigError, DataError, StorageError, TrainingError
from mmfree_jax.json_shape import fault
from mmfree_jax.model.parameters import param_count
from mmfree_jax.readable import printable
from mmfree_jax.saved.evaluations import Evaluations
from mmfree_jax.saved.history import Record, read_history
from mmfree_jax.saved.manifest import Manifest, read_manifest
from mmfree_jax.saved.open_model import SavedModel
from mmfree_jax.saved.run_directory import METRICS, SUMMARY, load_config
from mmfree_jax.saved.source_card import SOURCE_CARD, SourceCard, read_source_card
from mmfree_jax.text_files import read_json

_CORPUS_LICENSES = {"sotu": "public domain"}  # of `data prepare --corpus`, see docs/data.md
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def model_card(
    name: str,
    saved: SavedModel,
    fields: dict[str, Any],
    tokenizer: Any,
    evaluations: Evaluations,
    *,
    model_license: str | None = None,
    data_license: str | None = None,
    repository: str | None = None,
) -> str:
    """The text of README.md, with the front matter that the Hub reads.

    Args:
      name: of the model.
      saved: that is exported.
      fields: of the export's config.json.
      tokenizer: beside the weights, or None.
      evaluations: of the model.
      model_license: identifier of the Hub, for example "apache-2.0"; None: none is named.
      data_license: of the training data, in words; None: what is known of it is written.
      repository: of the Hub that it will be loaded from; None: a folder.

    Raises:
      ConfigError: `model_license` is no identifier.
      CheckpointError: the run has no checkpoint that is whole.
      DataError: the exported folder has a card of its own that cannot be read.
    """
    if model_license is not None and not _IDENTIFIER.fullmatch(model_license):
        raise ConfigError(
            f"--model-license is {model_license!r}: give an identifier of the Hub, for example "
            "apache-2.0, mit, cc-by-4.0 or other"
        )
    remote = "auto_map" in fields
    source = read_source_card(saved.path, saved.kind)
    front: dict[str, Any] = dict(source.license) if source else {}
    if model_license is not None:
        front = {"license": model_license}
    front |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*(["matmul-free", "custom_code"] if remote else []), "mmfree-jax"],
    }
    sections = [
        f"# {_line(name)}",
        _model(saved, fields, tokenizer),
        _training(saved, data_license, has_card=source is not None),
        _origin(saved, source),
        _evaluation(evaluations),
        _use(fields, repository or "path/to/folder", has_tokenizer=tokenizer is not None),
    ]
    return f"---\n{yaml.safe_dump(front)}---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def _line(text: str) -> str:
    """A name from a folder or a file as one line in which nothing is markup."""
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", " ".join(printable(text).split()))


def _model(saved: SavedModel, fields: dict[str, Any], tokenizer: Any) -> str:
    config = saved.config
    if "auto_map" in fields:
        what = "A MatMul-free language model (MLGRU, ternary weights, 8-bit activations)"
        kept = "ternary ones at 2 bits, " if saved.kind == "packed" else ""
    else:
        what, kept = "A Transformer++ language model (attention, dense weights)", ""
    spoken = "none" if tokenizer is None else f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids"
    return f"""{what}, exported by mmfree-jax.

- parameters: {param_count(config):,}
- layers: {config.num_layers}; width: {config.hidden_size:,}; vocabulary: {config.vocab_size:,}
- tokenizer: {spoken}
- stored weights: {kept}{fields["torch_dtype"]}"""


def _origin(saved: SavedModel, source: SourceCard | None) -> str:
    """What the card of the exported folder says of licences and whom it credits."""
    if source is None:
        return ""
    place = saved.place
    name = place.resolve().name if isinstance(place, Path) else place.name
    text = (
        f"## Where it comes from\n\nExported from {_line(name)}, whose own card lies beside this "
        f"one: [{SOURCE_CARD}]({SOURCE_CARD})."
    )
    if not source.sections:
        return text
    quoted = "\n\n".join(f"#{section}" for section in source.sections)
    return f"{text} What it says of licences and credits, word for word:\n\n{quoted}"


def _training(saved: SavedModel, data_license: str | None, *, has_card: bool) -> str:
    checkpoint = saved.checkpoint()
    if checkpoint is None:
        unknown = "The folder that was exported has no records of a training run."
        if has_card:
            unknown = "The folder that was exported has a card, and no records of a training run."
        if data_license is not None:
            unknown += f"\n\n- licence of the data: {_line(data_license)}"
        return f"## Training\n\n{unknown}"
    manifest = read_manifest(checkpoint)
    config, step = load_config(saved.path), manifest.step
    tokens = manifest.origin.tokens_at(step, tokens_per_step(config))
    facts = [
        f"steps: {step:,} of {config.steps:,}",
        f"tokens: {tokens:,} ({config.batch_size} rows of {config.data.seq_len:,} at a time)",
        f"peak learning rate: {config.optimizer.learning_rate:g}; seed: {config.seed}",
    ]
    summary = _summary(saved.path, step)
    if summary is not None:
        facts += [
            f"training FLOPs: {summary['training_flops']:.3g}",
            f"devices: {summary['device']['count']} x {_line(summary['device']['kind'])}",
        ]
    if (parent := manifest.origin.parent) is not None:
        begun = manifest.origin.step
        facts.append(f"branched from the run {_line(Path(parent).name)} at step {begun:,}")
    if config.init_from is not None:
        facts.append(f"initial weights: those of {_line(Path(config.init_from).name)}")
    facts += _losses(saved.path, step) + data_lines(manifest, data_license)
    return "## Training\n\n" + "\n".join(f"- {fact}" for fact in facts)


def _summary(run: Path, step: int) -> dict[str, Any] | None:
    """summary.json where it is of this step; None otherwise."""
    try:
        summary = read_json(run / SUMMARY)
    except (OSError, ValueError):
        return None
    wanted = {
        "step": int,
        "training_flops": (int, float),
        "device": {"kind": str, "count": int},
    }
    return None if fault(summary, wanted) or summary["step"] != step else summary


def _losses(run: Path, step: int) -> list[str]:
    """The last training and held-out losses up to a step, of records that can be read."""
    try:
        history = read_history(run / METRICS)
    except TrainingError:
        return []
    last: dict[str, Record] = {
        str(record.get("kind")): record
        for record in history
        if record.get("loss") is not None and (record.get("step") or 0) <= step
    }
    facts = []
    for kind, name in (("train", "training loss"), ("eval", "held-out loss during training")):
        if kind in last:
            record = last[kind]
            bits = record.get("bits_per_byte")
            more = f", {bits:.4f} bits a byte" if isinstance(bits, (int, float)) else ""
            facts.append(
                f"{name}: {record['loss']:.4f} nats a token{more} (step {record['step']:,})"
            )
    return facts


def data_lines(manifest: Manifest, data_license: str | None) -> list[str]:
    """A line for each data set, then what is known of the licence."""
    facts, known = [], []
    data = manifest.data
    for path, tokens, digest in zip(
        data["paths"], data["tokens"], data["fingerprints"], strict=True
    ):
        settings = _settings(path, digest)
        corpus = settings.get("corpus")
        known.append(_CORPUS_LICENSES.get(str(corpus)))
        named = f"{_line(Path(path).name)}" + (f" (corpus {_line(corpus)})" if corpus else "")
        facts.append(f"data: {named}, {tokens:,} tokens, fingerprint {digest}")
    if data_license is None:
        known_to_all = dict.fromkeys(x for x in known if x) if all(known) else {}
        data_license = "; ".join(known_to_all) or "not recorded"
    return [*facts, f"licence of the data: {_line(data_license)}"]


def _settings(folder: str, fingerprint: str) -> dict[str, Any]:
    """How a data set was prepared, where its folder is still there and still the same."""
    try:
        if open_dataset(folder, TRAIN).fingerprint != fingerprint:
            return {}
        settings = load_index(folder).source.get("settings")
    except (ConfigError, DataError, StorageError, OSError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _evaluation(evaluations: Evaluations) -> str:
    lines = []
    if (held_out := evaluations.held_out) is not None:
        bits = held_out.bits_per_byte
        lines += [
            f"Held-out documents of {_line(held_out.data)} ({held_out.documents:,}): "
            f"{held_out.nats:.4f} nats a token"
            + ("." if bits is None else f", {bits:.4f} bits a byte."),
            "",
        ]
    if evaluations.tasks:
        lines += ["| task | metric | value | standard error | shots | documents |"]
        lines += ["|---|---|---|---|---|---|"]
    for score in evaluations.tasks:
        error = "" if score.error is None else f"{score.error:.4f}"
        documents = "all" if score.limit is None else f"first {score.limit:g}"
        lines.append(
            f"| {_line(score.task)} | {score.metric} | {score.value:.4f} | {error} | "
            f"{score.shots} | {documents} |"
        )
    return "\n".join(["## Evaluation", "", *lines]).rstrip() if lines else ""


def _use(fields: dict[str, Any], place: str, *, has_tokenizer: bool) -> str:
    trust = ", trust_remote_code=True" if "auto_map" in fields else ""
    lines = [
        "```python",
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' * has_tokenizer}",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{place}"{trust})',
    ]
    if has_tokenizer:
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{place}"{trust})')
    lines += ["```", ""]
    if fields["model_type"].endswith("_packed"):
        lines.append("JAX: mmfree-jax reads the packed model that this was made from, not this.")
    else:
        lines += [
            "```python",
            "import mmfree_jax  # the folder on disk",
            "",
            'model, params = mmfree_jax.load_pretrained("path/to/folder")',
            "```",
        ]
    return "\n".join(["## Use", "", *lines])
