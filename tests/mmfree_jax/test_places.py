"""Which settings take a URL for a file or a folder: every command, and every kind of file."""

import contextlib
import dataclasses
import inspect
import re
import typing
from pathlib import Path
from typing import Annotated

import pytest
import tyro
import yaml

from mmfree_jax import files
from mmfree_jax.cli.main import commands, main
from mmfree_jax.config import EvalConfig
from mmfree_jax.config_io import read_yaml
from mmfree_jax.errors import ConfigError
from mmfree_jax.places import check_local, check_place, is_place, takes_url
from mmfree_jax.saved.kinds import kind_of

LOCAL = "it must be on this machine, and takes no URL"

# Texts that name no file or folder of this machine. A new option belongs here or is a `Place`.
TEXTS = {
    "--accelerator", "--accelerator-type", "--accelerators", "--account", "--agreement",
    "--allowed-hosts",
    "--allowed-origins", "--assume", "--batch-forms",
    "--best", "--bucket", "--cases", "--checkpoint.best-metric", "--claim",
    "--columns.accuracy", "--columns.bits", "--columns.budget", "--columns.chance",
    "--columns.family", "--columns.flops", "--columns.loss",
    "--columns.loss-sd", "--columns.params", "--columns.params-non-embedding",
    "--columns.params-ternary", "--columns.provenance", "--columns.run", "--columns.seed",
    "--columns.tokens", "--columns.unique-tokens", "--constraint",
    "--container-image", "--container-mounts",
    "--context-forms", "--cpu", "--data-license", "--designs", "--device", "--devices", "--dtypes",
    "--energy-size", "--equal-to", "--fact",
    "--eval.sample-prompt", "--eval.tasks", "--families", "--family", "--forms", "--gpus", "--host",
    "--image", "--infra", "--labels", "--layouts",
    "--lengths-size",
    "--log.wandb-group", "--log.wandb-project", "--methods", "--metrics", "--model-license",
    "--mem", "--memory", "--mode", "--model.mixer", "--name", "--nfs",
    "--numerics", "--ops", "--optimizer.factory", "--package",
    "--partition", "--parts", "--prefill-sizes", "--preset", "--presets", "--processes.coordinator",
    "--project", "--prompt", "--prompt-ids", "--push-to-hub", "--qos",
    "--queue",
    "--runtime-version", "--served-as", "--service-account", "--setup", "--shard", "--share",
    "--shm", "--sizes",
    "--splits", "--stop",
    "--tasks", "--text-field", "--time", "--tokens", "--topology", "--train-size",
    "--txt-separator", "--url",
    "--where",
    "--x", "--y", "--zone", "--model of bench scaling",
}  # fmt: skip


class _Asked(BaseException):
    """What a command asks tyro for."""


@dataclasses.dataclass(frozen=True)
class _Option:
    flag: str
    hint: object
    required: bool
    positional: bool


def _options(target, default=None, prefix=""):
    hints = typing.get_type_hints(target, include_extras=True)
    if dataclasses.is_dataclass(target):
        missing = dataclasses.MISSING
        required = {
            f.name: f.default is missing and f.default_factory is missing and default is None
            for f in dataclasses.fields(target)
        }
    else:
        parameters = inspect.signature(target).parameters.values()
        required = {p.name: p.default is inspect.Parameter.empty for p in parameters}
    for name, needed in required.items():
        hint, marks = hints[name], ()
        if typing.get_origin(hint) is Annotated:
            marks, bare = hint.__metadata__, hint.__origin__
        else:
            bare = hint
        flag = f"{prefix}{name}".replace("_", "-")
        if dataclasses.is_dataclass(bare):
            unnamed = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from _options(bare, default or bare, prefix if unnamed else f"{flag}.")
            continue
        positional = tyro.conf.Positional in marks
        yield _Option(f"--{flag}", hint, needed, positional)


def _has_text(hint):
    if typing.get_origin(hint) is typing.Literal:
        return False
    return hint is str or any(map(_has_text, typing.get_args(hint)))


def _all_options():
    """(the command's words, all its options) by asking each command for what it asks tyro."""

    def ask(target, *, default=None, **_):
        has_default = default not in (None, tyro.MISSING_NONPROP)
        raise _Asked(target, default if has_default else None)

    found = []
    for name in commands():
        platforms = ("slurm", "tpu-vm", "gke", "sky") if name == "launch render" else ("",)
        for platform in platforms:
            words = [*name.split(), *filter(None, [platform])]
            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
                patch.setattr(tyro, "cli", ask)
                with pytest.raises(_Asked) as asked:
                    main(words)
            found.append((words, list(_options(*asked.value.args))))
    return found


ALL = _all_options()
PLACES = [
    pytest.param(words, options, option, id=f"{' '.join(words)} {option.flag}")
    for words, options in ALL
    for option in options
    if is_place(option.hint) and not takes_url(option.hint)
]
# What may lie in a bucket; all others are of this machine.
URLS = {
    # Of every command that has it:
    "--branch-from",
    "--data.paths",
    "--init-from",
    "--run-dir",
    # Of one:
    "bench browser --export",
    "bench browser --tokenizer",
    "bench packing --data",
    "bench packing --model",
    "bench serve --model",
    "bench train --config",
    "compile --config",
    "compile --out",
    "crossing --a",
    "crossing --b",
    "crossing --out",
    "data inspect --path",
    "data prepare --input",
    "data prepare --out",
    "data prepare --tokenizer",
    "eval --data",
    "eval --model",
    "eval --output",
    "eval mqar --model",
    "eval mqar --output",
    "eval needle --data",
    "eval needle --model",
    "eval needle --output",
    "export compare --data",
    "export compare --export",
    "export compare --model",
    "export onnx --model",
    "export onnx --out",
    "export stablehlo --model",
    "export stablehlo --out",
    "export-hf --source",
    "export-hf --target",
    "extrapolate --out",
    "extrapolate --runs",
    "fit --out",
    "fit --runs",
    "fit power --out",
    "fit power --table",
    "generate --model",
    "generate --tokenizer",
    "hardware cells --out",
    "hardware compile --model",
    "hardware compile --out",
    "hardware report --config",
    "hardware report --run",
    "hardware run --program",
    "import-hf --source",
    "import-hf --target",
    "info --config",
    "info --model",
    "info --run",
    "isoflop --out",
    "isoflop --runs",
    "launch render gke --out",
    "launch render sky --out",
    "launch render slurm --out",
    "launch render tpu-vm --out",
    "pack --agreement-data",
    "pack --model",
    "pack --out",
    "plot --output",
    "plot --runs",
    "predict --fits",
    "predict --out",
    "serve --model",
    "serve --tokenizer",
    "sweep design --out",
    "sweep plan --data",
    "sweep plan --out",
    "sweep report --data",
    "sweep report --out",
    "sweep run --data",
    "sweep run --out",
    "sweep status --data",
    "sweep status --out",
    "tokenizer train --input",
    "tokenizer train --out",
    "train --config",
}


def test_every_text_on_the_command_line_is_a_place_or_is_known_to_be_none():
    assert len(ALL) == len(commands()) + 3
    texts = {
        f"{option.flag} of bench scaling"
        if words == ["bench", "scaling"] and option.flag == "--model"
        else option.flag
        for words, options in ALL
        for option in options
        if _has_text(option.hint) and not is_place(option.hint)
    }
    assert texts == TEXTS


def test_the_options_that_were_found_are_those_of_the_documents():
    found = {(" ".join(words), option.flag) for words, options in ALL for option in options}
    assert {("train", "--run-dir"), ("train", "--data.paths"), ("plot", "--runs")} <= found
    assert sum(is_place(option.hint) for _, options in ALL for option in options) > 110


def test_the_options_that_take_a_url_are_known():
    found = {
        option.flag if option.flag in URLS else f"{' '.join(words)} {option.flag}"
        for words, options in ALL
        for option in options
        if takes_url(option.hint)
    }
    assert found == URLS


def test_the_table_in_the_documents_has_them_all():
    text = (Path(__file__).parents[2] / "docs" / "storage.md").read_text()
    table = text.partition("## Which command takes what by URL\n")[2].partition("\n## ")[0]
    settings = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    rows = [re.sub(r" ([A-Z]+)$", lambda name: f" --{name[1].lower()}", s) for s in settings]
    assert sorted(rows) == sorted(URLS)


@pytest.mark.parametrize(("words", "options", "option"), PLACES)
def test_no_other_option_of_any_command_takes_a_url(
    words, options, option, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    argv, behind = [], []
    for other in options:
        value = "gs://bucket/x" if other == option else "somewhere"
        if other.positional:
            argv.append(value)
        elif other == option or other.required:
            argv += [other.flag, "2" if other.flag in ("--n", "--budget") else value]
    if words[:2] == ["launch", "render"]:
        argv, behind = [*argv, "--name", "x"], ["--", "--run-dir", "/mnt/shared/x"]
        for flag, value in _OF_JOBS.get(words[2], {}).items():
            argv += [] if flag in argv else [flag, value]
    assert main([*words, *argv, *behind]) == 2
    error = capsys.readouterr().err
    assert LOCAL in error
    assert "bucket/x'" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


_OF_JOBS = {
    "slurm": {"--nodes": "1"},
    "sky": {"--accelerators": "H100:8", "--setup": ":"},
    "tpu-vm": {
        "--project": "p",
        "--zone": "z",
        "--accelerator-type": "v5litepod-8",
        "--package": "/mnt/shared/wheel",
        "--nfs": "10.0.0.2:/v",
    },
    "gke": {
        "--image": "i",
        "--claim": "c",
        "--accelerator": "nvidia",
        "--hosts": "1",
        "--devices-per-host": "8",
    },
}


@pytest.mark.parametrize(
    ("given", "way_out"),
    [
        ("gs://b/x", "a mounted bucket"),
        ("gs:/b/x", "a mounted bucket"),
        ("gs:b", "a mounted bucket"),
        ("GS://b", "a mounted bucket"),
        (" s3://b", "a mounted bucket"),
        ("s3a://b/x", "a mounted bucket"),
        ("abfss://c@account/x", "a mounted bucket"),
        ("hf://datasets/x", "hf download"),
        ("file:///data/x", "without file://"),
        ("https://host/x.jsonl", "download it"),
        (Path("hdfs://b/x"), "a mounted bucket"),
    ],
)
def test_what_is_a_url(given, way_out):
    with pytest.raises(ConfigError, match=f"here is '.*': {LOCAL}; .*{way_out}"):
        check_local(given, "here")


@pytest.mark.parametrize(
    ("given", "way_out"),
    [
        ("abfss://c@account/x", "or gs:// or s3://"),
        ("hf://datasets/x", "hf download"),
        ("file:///data/x", "without file://"),
        ("gcs://bucket/x", "or gs:// or s3://"),
    ],
)
def test_what_is_no_bucket(given, way_out):
    with pytest.raises(ConfigError, match=f"here is '.*': URLs of .* not supported; .*{way_out}"):
        check_place(given, "here")


@pytest.mark.parametrize(
    "given", ["runs/a", "/gs/b", "a.jsonl:meta.text", "runs/12:30", "C:/runs", "run:1", "gs", ""]
)
def test_what_is_none(given):
    check_local(given, "here")


def _file(tmp_path, name, values):
    path = tmp_path / name
    path.write_text(yaml.safe_dump(values))
    return str(path)


RULED = {"families": [{"rate_rule": {"file": "gs://b"}}], "sizes": ["rung-1M"], "tokens": [1e6]}


@pytest.mark.parametrize(
    ("command", "values", "field"),
    [
        (["train", "--config"], {"eval": {"tasks_dir": "hf://b"}}, "eval.tasks_dir is 'hf://b'"),
        (["sweep", "plan"], RULED, "families.rate_rule.file is 'gs://b'"),
    ],
)
def test_no_config_file_takes_another_url(command, values, field, capsys, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert main([*command, _file(tmp_path, "c.yaml", values)]) == 2
    error = capsys.readouterr().err
    assert f"{field}: {LOCAL}" in error
    assert error.count("\n") == 1
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("platform", "name"), [("tpu-vm", "mount"), ("gke", "mount"), ("tpu-vm", "nfs")]
)
def test_no_job_file_mounts_a_url(platform, name, capsys, tmp_path):
    values = {flag[2:].replace("-", "_"): v for flag, v in _OF_JOBS[platform].items()}
    values |= {"hosts": 1, "devices_per_host": 8} if platform == "gke" else {}
    path = _file(tmp_path, "v.yaml", values | {"name": "x", name: "gs://b"})
    argv = ["launch", "render", platform, "--values", path]
    assert main([*argv, "--", "--run-dir", "/mnt/shared/x"]) == 2
    assert f"{name} is 'gs://b': {LOCAL}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "call",
    [
        lambda url: EvalConfig(tasks_dir=url),
        read_yaml,
        kind_of,
        lambda url: files.take_lock(Path(url) / ".lock", "run_dir"),
    ],
)
def test_the_library_takes_none_either(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=LOCAL):
        call("gs://bucket/x")
    assert list(tmp_path.iterdir()) == []
