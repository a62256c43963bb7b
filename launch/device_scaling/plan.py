"""Which configurations a scaling study measures, and in which order."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

from mmfree_jax.config import MeshConfig, TrainConfig
from mmfree_jax.config_io import from_dict, parse_yaml
from mmfree_jax.errors import ConfigError
from mmfree_jax.presets import PRESETS, preset

Layout = Literal["data", "fsdp", "data+fsdp", "fsdp+tensor"]
LAYOUTS: tuple[str, ...] = get_args(Layout)


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration: a process of its own measures it."""

    preset: str
    devices: int
    layout: str
    mode: str
    batch_size: int
    """Rows in the global batch."""
    seq_len: int
    overlap: bool = True
    """With the XLA switches of `mmfree_jax.launch.xla_flags`."""
    checkpoint: bool = False
    """Also time saving and restoring a checkpoint."""
    trace: bool = False
    """Also trace two steps, and say how much of the collectives ran beside other kernels."""
    changes: tuple[tuple[str, Any], ...] = ()
    """Fields of the run that differ from the preset's, as `optimizer.gradient_dtype`; those of the
    model also by their name alone."""
    flags: tuple[str, ...] = ()
    """XLA's flags, before `mmfree_jax.launch.xla_flags`."""

    @property
    def name(self) -> str:
        """A name without spaces, for files and tables."""
        end = "".join(f"-{name}={value}" for name, value in self.changes)
        end += "".join(f"-{flag.removeprefix('--')}" for flag in self.flags)
        end += "" if self.overlap else "-plain"
        return f"{self.preset}-{self.mode}-{self.layout}-{self.devices}-b{self.batch_size}{end}"


def mesh_of(layout: str, devices: int) -> MeshConfig:
    """The mesh of a layout. fsdp+tensor splits the matrices over two devices.

    Raises:
      ConfigError: the layout is unknown.
    """
    if layout not in LAYOUTS and devices > 1:
        raise ConfigError(f"layouts holds {layout!r}: choose among {', '.join(LAYOUTS)}")
    if devices == 1 or layout == "data":
        return MeshConfig(data=devices)
    if layout == "fsdp":
        return MeshConfig(data=1, fsdp=devices)
    if devices % 2:
        raise ConfigError(f"devices holds {devices}: {layout} needs an even number")
    if layout == "data+fsdp":
        return MeshConfig(data=2, fsdp=devices // 2)
    return MeshConfig(data=1, fsdp=devices // 2, tensor=2)


def train_config(case: Case) -> TrainConfig:
    """The run whose step is measured."""
    base = preset(case.preset)
    base = dataclasses.replace(
        base,
        batch_size=case.batch_size,
        data=dataclasses.replace(base.data, seq_len=case.seq_len),
        mesh=mesh_of(case.layout, case.devices),
    )
    for name, value in case.changes:
        *groups, field = (name if "." in name else f"model.{name}").split(".")
        values = {field: value}
        for group in reversed(groups):
            values = {group: values}
        base = from_dict(TrainConfig, values, base)
    return base


def plan_cases(
    presets: Sequence[str],
    devices: Sequence[int],
    layouts: Sequence[str],
    mode: str,
    batch_per_device: int,
    seq_len: int,
) -> list[Case]:
    """Every combination, the largest number of devices first and one device once.

    Strong scaling keeps the global batch at `batch_per_device` times the most devices.

    Raises:
      ConfigError: a preset or layout is unknown, or the batch does not divide.
    """
    cases = []
    for name in presets:
        if name not in PRESETS:
            raise ConfigError(f"presets holds {name!r}: choose among {', '.join(PRESETS)}")
        for count in sorted(set(devices), reverse=True):
            for layout in layouts:
                mesh = mesh_of(layout, count)
                if count == 1 and layout != layouts[0]:
                    continue
                # Rows a device stand for its share of the work, also where tensor halves it.
                rows = batch_per_device * (count if mode == "weak" else max(devices))
                if rows % (mesh.data * mesh.fsdp):
                    raise ConfigError(
                        f"batch-per-device is {batch_per_device}: {rows} rows do not divide over "
                        f"{mesh.data * mesh.fsdp} devices"
                    )
                label = "one" if count == 1 else layout
                cases.append(Case(name, count, label, mode, rows, seq_len))
    return cases


def parse_case(text: str, batch_per_device: int, seq_len: int) -> Case:
    """A case from "13B:fsdp:8", with the rows a device behind a fourth colon if they differ.

    Options follow behind "+": "+plain" leaves the XLA switches out, "+checkpoint" times those,
    "+trace" looks at how much of the collectives ran beside other kernels;
    "+optimizer.gradient_dtype=bfloat16" sets a field of the run, "+xla_...=..." a flag of XLA.

    Raises:
      ConfigError: it is malformed.
    """
    head, *options = text.split("+")
    if head.endswith((":data", ":fsdp")) and options:  # the "+" of a layout
        head, options = f"{head}+{options[0]}", options[1:]
        name, layout_and_rest = head.split(":", 1)
        layout, *numbers = layout_and_rest.split(":")
    else:
        name, layout, *numbers = head.split(":") if head.count(":") >= 2 else (head, "", "")
    unknown = {o for o in options if "=" not in o} - {"plain", "checkpoint", "trace"}
    settings = [o for o in options if "=" in o]
    flags = tuple(f"--{o}" for o in settings if o.startswith("xla_"))
    pairs = [o.split("=", 1) for o in settings if not o.startswith("xla_")]
    try:
        count = int(numbers[0])
        rows = int(numbers[1]) if len(numbers) > 1 else batch_per_device
    except (ValueError, IndexError):
        count = 0
        rows = 0
    if not name or name not in PRESETS or layout not in LAYOUTS or count < 1 or unknown:
        raise ConfigError(
            f"case is {text!r}: give PRESET:LAYOUT:DEVICES[:ROWS], as in 13B:fsdp:8, with "
            "+plain, +checkpoint, +trace, +FIELD=VALUE or +xla_FLAG=VALUE behind it"
        )
    return Case(
        name,
        count,
        "one" if count == 1 else layout,
        "weak",
        rows * count,
        seq_len,
        overlap="plain" not in options,
        checkpoint="checkpoint" in options,
        trace="trace" in options,
        changes=tuple((name, parse_yaml(value, name)) for name, value in pairs),
        flags=flags,
    )
