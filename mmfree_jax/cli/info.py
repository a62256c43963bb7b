"""`mmfree info`."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from mmfree_jax.cli.parse import parse
from mmfree_jax.cli.train import base_config, with_vocabulary
from mmfree_jax.config import MeshConfig, TrainConfig, tokens_per_step
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.progress import show_progress
from mmfree_jax.ranges import Step

_DESCRIPTION = """Parameters by component, floating-point operations a token, and an estimate of the
memory that training takes on each device, for a preset, a config file or a run directory; the
flags of `mmfree train` change single fields. Nothing is compiled and no device is needed.

With --model it says what is known of a saved model: its sizes, how it is kept, its tokenizer, what
it was trained on, its licence, and whether its files are as they were written. Exit code 2 where
they are not."""

_DEVICES = "1,2,4,8"
_GROUPS = (
    "weight_scale groups: no Pallas kernel takes them; products go through XLA in training and "
    "decoding on every device, packed models on a GPU too, and exports are refused (docs/models.md)"
)


@dataclasses.dataclass(frozen=True)
class _Arguments:
    preset: str | None
    """Named size, for example 370M or 1.3B-transformer."""
    config: PlaceOrUrl | None
    """YAML file over it, or its URL."""
    run: PlaceOrUrl | None
    """Run directory, or its URL, instead of either."""
    model: PlaceOrUrl | None
    """Folder of a saved model, or its URL, to say what is known of it instead: a training run, a
    packed model, a model folder or a Hugging Face model."""
    step: Step | None
    """With --model, checkpoint of a training run: its step, or best; None: the newest."""
    checksums: bool
    """With --model, compare its files with the checksums that are kept of them."""
    devices: str
    """Numbers of devices to estimate memory for, separated by commas."""
    json: bool
    """Print JSON instead of tables."""
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")]


def info(argv: Sequence[str]) -> int:
    """Show a model's parameters, FLOPs a token and memory by number of devices."""
    base = base_config(argv, run_flag="--run")
    default = _Arguments(None, None, None, None, None, True, _DEVICES, False, base)
    arguments = parse(
        _Arguments, argv, prog="mmfree info", description=_DESCRIPTION, default=default
    )
    if arguments.model is not None:
        return _info_of_model(arguments, default)
    if arguments.step is not None or not arguments.checksums:
        flag = "--no-checksums" if arguments.step is None else "--step"
        raise ConfigError(f"{flag} is given, which goes with --model: name a saved model by that")
    settings = with_vocabulary(argv, arguments.settings, run_flag="--run")
    report = describe(settings, _device_counts(arguments.devices))
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        _print_tables(report, Console())
    return 0


def _info_of_model(arguments: _Arguments, default: _Arguments) -> int:
    others = ("preset", "config", "run", "devices", "settings")
    changed = [name for name in others if getattr(arguments, name) != getattr(default, name)]
    if changed or default.settings != TrainConfig():
        names = [f"--{name}" for name in changed if name != "settings"] or ["settings of training"]
        raise ConfigError(
            f"--model is {arguments.model}: leave out {' and '.join(names)}, as the saved model is "
            "shown as it is"
        )
    with show_progress("reading the model") as show:
        from mmfree_jax.cli.info_model import describe_model, print_model

        if arguments.checksums:
            show.stage("comparing checksums")
        assert arguments.model is not None
        report = describe_model(arguments.model, arguments.step, checksums=arguments.checksums)
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        print_model(report, Console())
    found = report["checksums"]
    if found is not None and found["damaged"]:
        raise CheckpointError(
            f"model {arguments.model} is damaged: {found['damaged'][0]}"
            + (f" (and {len(found['damaged']) - 1} more)" if found["damaged"][1:] else "")
        )
    return 0


def _device_counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ConfigError(f"--devices is {text!r}: give numbers above 0, for example 1,2,4,8")
    return counts


def describe(config: TrainConfig, devices: Sequence[int]) -> dict[str, Any]:
    """What `mmfree info` shows, as plain values; memory in bytes a device."""
    from mmfree_jax.model.packing import not_packed
    from mmfree_jax.model.state import state_bytes
    from mmfree_jax.saved.pack import packed_bytes
    from mmfree_jax.train.flops import count_flops, count_parameters
    from mmfree_jax.train.memory import estimate_memory

    parameters = count_parameters(config.model)
    flops = count_flops(config.model, config.data.seq_len)
    memory = []
    for count in devices:
        layouts = {"data": MeshConfig(data=count), "fsdp": MeshConfig(data=1, fsdp=count)}
        for name, mesh in layouts.items():
            if count == 1 and name == "fsdp":
                continue
            row: dict[str, Any] = {"devices": count, "split": name}
            try:
                estimate = estimate_memory(config, mesh)
                row |= dataclasses.asdict(estimate) | {"total": estimate.total}
            except ConfigError as e:
                row["error"] = str(e)
            memory.append(row)
    tokens = tokens_per_step(config)
    constant, a_token = state_bytes(config.model)
    return {
        "model": {
            "family": config.model.family,
            "mixer": config.model.mixer,
            "num_layers": config.model.num_layers,
            "hidden_size": config.model.hidden_size,
            "glu_size": config.model.glu_size,
            "vocab_size": config.model.vocab_size,
        },
        "parameters": {
            **dataclasses.asdict(parameters),
            "total": parameters.total,
            "non_embedding": parameters.non_embedding,
        },
        # What `mmfree pack` writes, and why it is decoded otherwise; None without ternary layers.
        "packed_bytes": packed_bytes(config.model) if parameters.ternary else None,
        "not_packed": not_packed(config.model),
        "bfloat16_bytes": 2 * parameters.total,
        "notes": [_GROUPS] * (config.model.weight_scale == "groups"),
        # What a row carries while it generates.
        "state_bytes": {"constant": constant, "per_token": a_token},
        "flops_per_token": {
            **dataclasses.asdict(flops),
            "forward": flops.forward,
            "training": flops.training,
        },
        "seq_len": config.data.seq_len,
        "tokens_per_step": tokens,
        "training_flops_per_step": flops.training * tokens,
        "training_flops": flops.training * tokens * config.steps,
        "steps": config.steps,
        "remat": config.model.remat,
        "memory": memory,
    }


def _inference_weights(report: dict[str, Any]) -> str:
    packed, reasons = report["packed_bytes"], report["not_packed"]
    if packed is None:
        return f"inference weights in bfloat16: {_size(report['bfloat16_bytes'])}"
    text = f"inference weights packed: {_size(packed)}"
    if not reasons:
        return text
    return f"{text} on disk, decoded with a byte a trit for {', '.join(reasons)}"


def _size(num_bytes: int) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{1024 * gib:.1f} MiB"


def _print_tables(report: dict[str, Any], console: Console) -> None:
    model, parameters, flops = report["model"], report["parameters"], report["flops_per_token"]
    state = report["state_bytes"]
    console.print(
        f"{model['family']}: {model['num_layers']} layers ({model['mixer']}), "
        f"width {model['hidden_size']}, GLU {model['glu_size']}, vocabulary {model['vocab_size']}",
        highlight=False,
    )
    table = Table("parameters", title_justify="left")
    for name in ("count", "share"):
        table.add_column(name, justify="right")
    for name in ("embedding", "mixer", "glu", "head", "norms", "total"):
        if name == "total":
            table.add_section()
        value = parameters[name]
        table.add_row(name, f"{value:,}", f"{value / parameters['total']:.1%}")
    for name in ("non_embedding", "ternary"):
        value = parameters[name]
        label = {"non_embedding": "without embedding and head", "ternary": "ternary"}[name]
        table.add_row(label, f"{value:,}", f"{value / parameters['total']:.1%}")
    console.print(table)

    table = Table("operations a token")
    table.add_column("FLOPs", justify="right")
    table.add_column("share", justify="right")
    labels = {"mixer": "mixer projections", "mixing": "mixing of tokens", "glu": "GLU"}
    for name in ("mixer", "mixing", "glu", "head"):
        share = f"{flops[name] / flops['forward']:.1%}"
        table.add_row(labels.get(name, name), f"{flops[name]:,.0f}", share)
    table.add_section()
    table.add_row("forward", f"{flops['forward']:,.0f}", "")
    table.add_row("training", f"{flops['training']:,.0f}", "")
    console.print(table)
    console.print(
        f"training: {report['tokens_per_step']:,} tokens and "
        f"{report['training_flops_per_step']:.3g} FLOPs a step, "
        f"{report['training_flops']:.3g} FLOPs in {report['steps']:,} steps; "
        f"{_inference_weights(report)}; "
        f"state of a row: {state['constant'] / 1024:,.1f} KiB"
        + (f" and {state['per_token'] / 1024:,.1f} KiB a token" if state["per_token"] else ""),
        highlight=False,
    )

    for note in report["notes"]:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)

    columns = ("parameters", "gradients", "optimizer", "ternary", "activations", "logits", "total")
    table = Table(
        "devices",
        "split",
        title=f"training memory a device, GiB (estimate; remat {report['remat']})",
        title_justify="left",
    )
    for name in columns:
        short = {"parameters": "params", "gradients": "grads", "optimizer": "optim."}
        short |= {"activations": "activ."}
        table.add_column(short.get(name, name), justify="right")
    for row in report["memory"]:
        if "error" in row:
            cells = ["-"] * len(columns)
        else:
            cells = [f"{row[name] / 2**30:.2f}" for name in columns]
        table.add_row(str(row["devices"]), row["split"], *cells)
    console.print(table)
    for row in report["memory"]:
        if "error" in row:
            console.print(
                f"{row['devices']} devices, {row['split']}: {row['error']}",
                highlight=False,
                soft_wrap=True,
            )
