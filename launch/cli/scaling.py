"""`mmfree bench scaling`."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmfree_jax.cli.parse import parse
from mmfree_jax.config_io import parse_yaml
from mmfree_jax.errors import ConfigError, MMFreeError
from mmfree_jax.files import check_file, write_text
from mmfree_jax.installed import versions
from mmfree_jax.json_shape import fault
from mmfree_jax.launch.device_scaling.plan import parse_case, plan_cases
from mmfree_jax.launch.device_scaling.report import (
    check_records,
    figure,
    read_results,
    table,
    training_times,
)
from mmfree_jax.launch.device_scaling.run import Options, run_study
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.ranges import AboveZero, Count
from mmfree_jax.text_files import read_json

STUDY = "study.json"


def scaling(argv: Sequence[str]) -> int:
    """Measure the training step on 1 to all GPUs of this host; make the table and figure."""
    argv = list(argv)

    def measure(
        out: Path | None = None,
        presets: tuple[str, ...] = (),
        devices: tuple[Count, ...] = (1, 2, 4, 8),
        layouts: tuple[str, ...] = ("data", "fsdp"),
        mode: str = "weak",
        batch_per_device: Count = 8,
        seq_len: Count = 2048,
        cases: tuple[str, ...] = (),
        model: tuple[str, ...] = (),
        max_minutes: AboveZero | None = None,
        compile_minutes: AboveZero = 3.0,
        case_minutes: AboveZero = 2.0,
        parallel_compiles: Count | None = None,
        report: Path | None = None,
    ) -> int:
        """Measure how the training step scales over the GPUs of this host.

        Every configuration compiles at once in a process of its own, then each is timed on
        GPUs that no other is using. Records are appended to OUT/results.jsonl as they come;
        `--report OUT` makes OUT/scaling.md and OUT/scaling.png from them.

        Args:
          out: folder for the results; also the compilation cache.
          presets: models; all combinations with devices and layouts are measured, in order.
          devices: numbers of GPUs.
          layouts: data, fsdp, data+fsdp, fsdp+tensor.
          mode: weak (rows a GPU fixed) or strong (global batch fixed).
          batch_per_device: rows on each GPU; strong: on each of the most GPUs.
          seq_len: tokens in a row.
          cases: single configurations before the combinations: PRESET:LAYOUT:GPUS[:ROWS], and
            behind it +plain (XLA's own flags), +checkpoint (time a save and a restore), +trace
            (how much of the collectives runs beside other kernels), +FIELD=VALUE (of the run, as
            optimizer.gradient_dtype=bfloat16) or +xla_FLAG=VALUE.
          model: fields of the model to change in all of them, as remat=dots.
          max_minutes: what is not done by then is recorded as not run.
          compile_minutes: how long to wait for all to compile.
          case_minutes: how long one may take once all have compiled.
          parallel_compiles: processes that compile at once; default: a quarter of the cores.
          report: only make the table and figure from the results in this folder.
        """
        if report is not None:
            return _report(report)
        if out is None:
            raise ConfigError("no folder for the results: give --out FOLDER, or --report FOLDER")
        if mode not in ("weak", "strong"):
            raise ConfigError(f"mode is {mode!r}: set --mode weak or --mode strong")
        planned = [parse_case(text, batch_per_device, seq_len) for text in cases]
        if presets:
            planned += plan_cases(presets, devices, layouts, mode, batch_per_device, seq_len)
        changes = tuple(map(_parse_change, model))
        planned = [dataclasses.replace(case, changes=changes + case.changes) for case in planned]
        if not planned:
            raise ConfigError("no model is named: give --presets or --cases")
        unique = list({case.name: case for case in planned}.values())
        options = Options(
            out=out,
            max_minutes=max_minutes,
            compile_minutes=compile_minutes,
            case_minutes=case_minutes,
            parallel_compiles=parallel_compiles,
        )
        _check(out)
        about = {
            "command": ["mmfree", "bench", "scaling", *argv],
            "versions": versions("jax", "jaxlib", "flax"),
        }
        write_text(out / STUDY, json.dumps(about))
        records = run_study(unique, options, say=_say)
        _report(out)
        if all("error" in record for record in records):
            raise MMFreeError(f"no configuration was measured: see the reasons in {out}")
        return 0

    return parse(measure, argv, prog="mmfree bench scaling")


def _parse_change(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or name not in {f.name for f in dataclasses.fields(ModelConfig)}:
        raise ConfigError(f"model holds {text!r}: give FIELD=VALUE, a field of the model's config")
    return name, parse_yaml(value, f"model field {name}")


def _check(out: Path) -> None:
    """Raises OutputError where a file would be replaced that no study made."""
    beside = [out / "scaling.md", out / "scaling.png"]
    check_file(out / STUDY, r'\{\s*"command"', beside=beside)


def _say(text: str) -> None:
    print(text, flush=True)


def _report(folder: Path) -> int:
    records = read_results(folder)
    check_records(records)
    study = folder / STUDY
    try:
        about: Any = read_json(study) if study.is_file() else {}
    except (OSError, ValueError):
        about = None
    wrong = fault(about, {}) or fault(about.get("versions", {}), {}, "versions")
    if wrong := wrong or fault(about.get("command", []), [str], "command"):
        raise ConfigError(f"{study} is damaged ({wrong}): remove it")
    done = [r for r in records if "error" not in r]
    kinds = ", ".join(sorted({r["device_kind"] for r in done}))
    versions = ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items())
    text = "\n".join(
        [
            f"Devices: {kinds}; {versions}. Random tokens on the devices beforehand.",
            f"Command: `{' '.join(about.get('command', ['?']))}`",
            "",
            table(records),
            training_times(records),
        ]
    )
    write_text(folder / "scaling.md", text)
    print(text)
    if done:
        figure(records, folder / "scaling.png")
    return 0
