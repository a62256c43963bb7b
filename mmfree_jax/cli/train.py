"""`mmfree train`."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.config import TrainConfig, replace_model
from mmfree_jax.config_io import from_dict, read_settings, with_settings
from mmfree_jax.data.vocabulary import gives_vocabulary, with_data_vocabulary
from mmfree_jax.errors import ConfigError
from mmfree_jax.no_effect import without_effect
from mmfree_jax.parallel.process_options import ProcessOptions, find_processes
from mmfree_jax.places import PlaceOrUrl, check_place, is_file, locate
from mmfree_jax.presets import PRESETS, names_vocabulary, preset
from mmfree_jax.progress import open_display

_DESCRIPTION = f"""Train a language model, or go on with the run in --run-dir.

Settings come from --preset, over it --config, over it the flags below. The same command
resumes: the run directory holds everything. To go on with a run as it is, give its own
config.yaml as --config.

--init-from takes the weights of any model and nothing else. --branch-from RUN or RUN@STEP takes
all of a run's checkpoint (weights, optimiser, step, tokens, position in the data) into a new run
in --run-dir, under that run's settings but for those given in --config and by flags: another
rate, schedule, data or batch, or more --steps, which count from the parent's first. Rows go on
where they were, at any batch size; with other data, data.seq-len, data.weights or data.seed they
begin anew.

presets: {", ".join(PRESETS)}
A rung, and a shape by flags alone, has the vocabulary of the data, where none is given.
A preset is a model and a peak rate, no recipe: steps, batch and warm-up are the defaults below. The
paper's runs are experiments/configs/paper-370M.yaml, paper-1.3B.yaml and paper-2.7B.yaml.

Exit codes: 0 complete, or max_minutes or stop_at reached; 143 SIGTERM, or
Compute Engine announced the machine's end, 130 SIGINT, 129 SIGHUP (the terminal is closed) and 138
SIGUSR1, all after saving a checkpoint; 2 something to put right, in one line; 75
another process of the run is gone or hangs: start all again."""


@dataclasses.dataclass(frozen=True)
class _Arguments:
    preset: str | None
    """Named size to start from; see the list above."""
    config: PlaceOrUrl | None
    """YAML file over it, or its URL; keys are the flags' names, nested at the dots."""
    processes: ProcessOptions
    run: Annotated[TrainConfig, tyro.conf.arg(name="")]


def resolve_config(argv: Sequence[str], *, prog: str = "mmfree train") -> TrainConfig:
    """The configuration that `argv` asks for: preset, over it YAML, over it flags.

    Raises:
      ConfigError: a flag, key or value is unknown or malformed; the message names it.
    """
    return _parse(argv, prog).run


def _parse(argv: Sequence[str], prog: str) -> _Arguments:
    default = _Arguments(None, None, ProcessOptions(), base_config(argv))
    found = parse(_Arguments, argv, prog=prog, description=_DESCRIPTION, default=default)
    return dataclasses.replace(found, run=with_vocabulary(argv, found.run, goes_on=True))


def with_vocabulary(
    argv: Sequence[str], config: TrainConfig, *, run_flag: str | None = None, goes_on: bool = False
) -> TrainConfig:
    """`config`, parsed from `argv`, with the vocabulary of its data where nothing names one.

    Args:
      argv: the command's arguments.
      config: what they came to.
      run_flag: as in `base_config`.
      goes_on: a run that has begun in `run_dir` keeps the vocabulary that it has.

    Raises:
      DataError: the data are damaged.
    """
    argv = list(argv)
    flags = ["--model.vocab-size", "--init-from", "--branch-from"]
    flags += [] if run_flag is None else [run_flag]
    path, name = last_value(argv, "--config"), last_value(argv, "--preset")
    values = {} if path is None else read_settings(path)
    name = name or values.get("preset")
    if (
        any(last_value(argv, flag) is not None for flag in flags)
        or gives_vocabulary(values)
        or config.branch_from is not None
        or config.init_from is not None
        or (name is not None and names_vocabulary(str(name)))
    ):
        return config
    if goes_on and (begun := _settings_begun(config.run_dir)) is not None:
        model = begun.get("model")
        if isinstance(model, dict) and type(size := model.get("vocab_size")) is int:
            return replace_model(config, vocab_size=size)
    return with_data_vocabulary(config)


def _settings_begun(run_dir: str) -> dict[str, Any] | None:
    """The settings of the run that has begun in `run_dir`; None: none has."""
    path = locate(run_dir, "run_dir") / "config.yaml"
    return read_settings(str(path)) if is_file(path) else None


def base_config(argv: Sequence[str], *, run_flag: str | None = None) -> TrainConfig:
    """The configuration that --preset and --config in `argv` name, before any other flag.

    Args:
      argv: the command's arguments.
      run_flag: a flag that names a run directory to take the config of instead.

    Raises:
      ConfigError: no such preset, or the file is missing or malformed.
    """
    argv = list(argv)
    name, path = last_value(argv, "--preset"), last_place(argv, "--config")
    run = None if run_flag is None else last_place(argv, run_flag)
    if run is not None:
        if name is not None or path is not None:
            raise ConfigError(f"{run_flag} is {run!r}: leave out --preset and --config")
        config = locate(run, run_flag or "") / "config.yaml"
        if not is_file(config):
            raise ConfigError(
                f"{run_flag} is {run!r}: there is no {config}, so it is no training run: give one; "
                "mmfree info --model shows saved models of every kind"
            )
        path = str(config)
    values = {} if path is None else read_settings(path)
    base = None if name is None else preset(name)
    if run is None and (branch := _branch(argv, values)) is not None:
        if (name := name or values.get("preset")) is not None:
            raise ConfigError(
                f"branch_from is {branch.branch_from!r}: leave out the preset {name!r}, as the "
                "settings start from those of that run"
            )
        base = branch
    base = base or TrainConfig() if path is None else with_settings(values, path, base)
    source = last_place(argv, "--init-from")
    if source is None:
        return base
    from mmfree_jax.train.init_from import training_config  # imports JAX

    begun = _settings_begun(str(_given("run_dir", argv, values) or TrainConfig.run_dir)) or {}
    own = from_dict(TrainConfig, begun).model if begun.get("init_from") == source else None
    return dataclasses.replace(base, model=training_config(source, base.model, own))


def _branch(argv: list[str], values: dict[str, Any]) -> TrainConfig | None:
    """The config that a branch starts from, if flags or a config file ask for one."""

    source = _given("branch_from", argv, values)
    if not isinstance(source, str):
        return None
    from mmfree_jax.train.branch_source import branch_config  # imports JAX

    check_place(source, "branch_from")
    return branch_config(source, str(_given("run_dir", argv, values) or TrainConfig.run_dir))


def _given(name: str, argv: list[str], values: dict[str, Any]) -> Any:
    """A place that a flag or else a config file's values give; None: neither does."""
    in_file = values.get(name, values.get(name.replace("_", "-")))
    return last_place(argv, "--" + name.replace("_", "-")) or in_file


def last_value(argv: list[str], flag: str) -> str | None:
    """The value of `flag` in `argv`, which tyro reads only once the defaults are known."""
    value = None
    for i, argument in enumerate(argv):
        name, equals, rest = argument.partition("=")
        if name.replace("_", "-") != flag:
            continue
        if equals:
            value = rest
        else:
            if i + 1 == len(argv) or argv[i + 1].startswith("--"):
                raise ConfigError(f"{flag} has no value: give one after it")
            value = argv[i + 1]
    return value


def last_place(argv: list[str], flag: str) -> str | None:
    """`last_value` of a flag that names a file or folder, or the URL of one.

    Raises:
      ConfigError: it has no value, or the URL of what is no bucket.
    """
    value = last_value(argv, flag)
    if value is not None:
        check_place(value, flag)
    return value


def train(argv: Sequence[str]) -> int:
    """Train a language model, or go on with a run."""
    arguments = _parse(argv, "mmfree train")
    joined = find_processes(arguments.processes, os.environ)
    is_first = joined is None or joined.get("process_id", 0) == 0
    if is_first:
        for line in without_effect(arguments.run):
            print(f"warning: {line}", file=sys.stderr)
    kind = arguments.run.log.progress if is_first else "none"
    with contextlib.closing(open_display(kind, sys.stdout, patience=0.0)) as display:
        display.stage("starting JAX")
        from mmfree_jax.parallel import processes
        from mmfree_jax.train.stop import STOP_CODES
        from mmfree_jax.train.training import (
            train as run_training,  # JAX starts here, not for --help
        )

        if joined is not None:
            display.stage("meeting the other processes")
        processes.join(arguments.processes)
        # Closed before the error is said, behind which nothing is cleared away.
        with processes.leaving_at_once(), contextlib.closing(display):
            summary = run_training(
                arguments.run, process_options=arguments.processes, display=display
            )
    return STOP_CODES.get(summary["stopped_by"] or "", 0)
