"""No number of a setting is nan, inf or senseless: what each may be, and that each says so."""

import ast
import dataclasses
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from mmfree_jax.cli.main import main
from mmfree_jax.config import DataConfig, OptimizerConfig, TrainConfig
from mmfree_jax.config_io import from_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.infer.sample import Sampling
from mmfree_jax.ranges import AboveZero, Count, Range, Seed, Share, check_numbers

ROOT = Path(__file__).resolve().parents[2]
INF = math.inf


@dataclass(frozen=True)
class _Settings:
    rate: AboveZero = 1.0
    share: Share | None = None
    rows: Count = 1
    seed: Seed = 0
    undeclared: float = 0.0
    name: str = ""
    weights: tuple[AboveZero, ...] = ()
    nested: dict = dataclasses.field(default_factory=dict)
    on: bool = True
    below: Annotated[float, Range(-1, 2, open_high=True)] = 0.0

    def __post_init__(self):
        check_numbers(self, "here.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": INF}, "here.rate is inf: set a finite number, a value above 0"),
        ({"rate": math.nan}, "here.rate is nan: set a finite number, a value above 0"),
        ({"rate": 1e39}, r"here.rate is 1e\+39: set a number that float32 holds, at most 3.4e38"),
        ({"rate": 1e-40}, "here.rate is 1e-40: set a number that float32 holds: 0 is the nearest"),
        ({"undeclared": -1e-300}, "here.undeclared is -1e-300: set a number that float32 holds"),
        ({"rate": 0.0}, "here.rate is 0.0: set a value above 0"),
        ({"share": 1.5}, r"here.share is 1.5: set a value in \[0, 1\]"),
        ({"rows": 0}, "here.rows is 0: set a value above 0"),
        ({"seed": -1}, r"here.seed is -1: set a value in \[0, 2\^32 - 1\]"),
        ({"seed": 2**32}, r"here.seed is 4294967296: set"),
        ({"undeclared": -INF}, "here.undeclared is -inf: set a finite number$"),
        ({"weights": (1.0, -1.0)}, r"here.weights is \(1.0, -1.0\): set a value above 0"),
        ({"nested": {"a": {"b": [math.nan]}}}, "here.nested is .*: set a finite number"),
        ({"rows": 2**31}, "here.rows is 2147483648: set at most 2147483647$"),
        ({"rows": 10**400}, "here.rows is 10*: set at most 2147483647$"),
        ({"rows": -(10**400)}, "here.rows is -10*: set a value above 0$"),
        ({"undeclared": 10**400}, "here.undeclared is 10*: set a number that float32 holds"),
        ({"seed": 10**400}, "here.seed is 10*: set a number that float32 holds"),
        ({"name": "a\0b"}, r"here.name is 'a\\x00b': leave out the character NUL"),
        (
            {"name": "\ud800"},
            r"here.name is '\\ud800': it is not Unicode \(half of a surrogate pair",
        ),
        ({"nested": {"\udcff": ""}}, r"here.nested is '\\udcff': it is not Unicode"),
        ({"below": 2.0}, r"here.below is 2.0: set a value in \[-1, 2\)"),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        _Settings(**changes)


def test_numbers_within_pass():
    _Settings(
        rows=2**31 - 1,
        name="naïve 日本",
        rate=1.2e-38,
        share=1,
        seed=2**32 - 1,
        undeclared=-3.4e38,
        weights=(0.1,),
        below=-1.0,
        on=False,
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OptimizerConfig(learning_rate=INF), "optimizer.learning_rate is inf"),
        (lambda: OptimizerConfig(clip_norm=INF), "optimizer.clip_norm is inf"),
        (lambda: OptimizerConfig(weight_decay=math.nan), "optimizer.weight_decay is nan"),
        (lambda: DataConfig(seed=-1), "data.seed is -1"),
        (lambda: DataConfig(paths=("a",), weights=(INF,)), r"data.weights is \(inf,\)"),
        (lambda: TrainConfig(z_loss=INF), "z_loss is inf"),
        (lambda: TrainConfig(max_minutes=math.nan), "max_minutes is nan"),
        (lambda: Sampling(temperature=INF), "temperature is inf"),
        (lambda: Sampling(repetition_penalty=INF), "repetition_penalty is inf"),
        (lambda: from_dict(TrainConfig, {"optimizer": {"eps": INF}}), "optimizer.eps is inf"),
        (lambda: from_dict(TrainConfig, {"model": {"norm_eps": "nan"}}), "model.norm_eps is nan"),
        (
            lambda: from_dict(TrainConfig, {"optimizer": {"eps": 10**400}}),
            "optimizer.eps is 10+",
        ),
        (
            lambda: TrainConfig(batch_size=10**11),
            "batch_size is 100000000000: set at most 2147483647",
        ),
        (lambda: from_dict(TrainConfig, {"run_dir": "\ud800"}), r"run_dir is '\\ud800': it is not"),
        (lambda: from_dict(TrainConfig, {"log": {"profile_steps": [9, 3]}}), "first step first"),
    ],
)
def test_settings_are_checked_however_they_are_made(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --optimizer.learning-rate inf", "optimizer.learning_rate is inf"),
        ("train --seed -1", "seed is -1"),
        ("generate --model x --prompt y --temperature 1e-40", "--temperature is 1e-40"),
        ("train --processes.join-seconds nan", "processes.join_seconds is nan"),
        ("generate --model x --prompt y --temperature inf", "--temperature is inf"),
        ("generate --model x --prompt y --seed -1", "--seed is -1"),
        ("generate --model x --prompt y --max-new-tokens -1", "--max-new-tokens is -1"),
        ("eval --model x --tasks piqa --num-fewshot -1", "--num-fewshot is -1"),
        ("eval --model x --data y --window 0", "--window is 0"),
        ("eval --model x --data y --seed -1", "--seed is -1"),
        ("plot x --smoothing nan", "--smoothing is nan"),
        ("data prepare --input x --out y --heldout-fraction nan", "heldout_fraction is nan"),
        ("export compare --model m --export x --data d --threads -1", "--threads is -1"),
        ("bench infer --out x --timeout inf", "--timeout is inf"),
        ("bench edge --out x --quiet nan", "--quiet is nan"),
        ("compile --topology h100x8 --peak-share nan", "--peak-share is nan"),
        ("launch local -n 2 --grace-seconds inf -- train", "--grace-seconds is inf"),
        ("launch local -n 2147483647 -- train", "--n is 2147483647: set a value in [1, 1024]"),
        ("launch render slurm --name x --nodes 0 -- --preset tiny", "nodes is 0"),
        ("fit runs.csv --level nan", "--level is nan"),
        ("crossing a b --horizon inf", "--horizon is inf"),
        ("crossing a b --horizon nan", "--horizon is nan"),
        ("train --batch-size 100000000000", "batch_size is 100000000000: set at most 2147483647"),
    ],
)
def test_the_command_line_refuses_in_one_line(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# Where settings are declared; every command's own file is looked through as well.
_SETTINGS = {
    "mmfree_jax/config.py": None,
    "mmfree_jax/model_config.py": None,
    "mmfree_jax/parallel/process_options.py": None,
    "mmfree_jax/data/prepare.py": ("PrepareConfig",),
    "mmfree_jax/infer/sample.py": ("Sampling",),
    "experiments/sweep/config.py": None,
    "launch/local.py": ("Plan",),
    "launch/jobs/gke.py": ("Gke",),
    "launch/jobs/sky.py": None,
    "launch/jobs/slurm.py": None,
    "launch/jobs/slurm_array.py": None,
    "launch/jobs/tpu_vm.py": None,
    "launch/device_scaling/run.py": ("Options",),
}


def _bare_numbers(annotation):
    """Whether an annotation has an int or float outside of Annotated[..., Range(...)]."""
    if isinstance(annotation, ast.Subscript):
        name = getattr(annotation.value, "id", getattr(annotation.value, "attr", ""))
        if name in ("Literal", "Callable", "dict"):
            return False
        if name == "Annotated":
            declared = [
                n for n in ast.walk(annotation) if isinstance(n, ast.Name) and n.id == "Range"
            ]
            return not declared and _bare_numbers(annotation.slice.elts[0])
    if isinstance(annotation, ast.Name):
        return annotation.id in ("int", "float")
    return any(_bare_numbers(child) for child in ast.iter_child_nodes(annotation))


def _is_dataclass(node):
    names = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return any(getattr(n, "attr", getattr(n, "id", "")) == "dataclass" for n in names)


def _undeclared(file, classes, functions):
    for node in ast.walk(ast.parse(file.read_text())):
        fields = []
        if isinstance(node, ast.ClassDef) and _is_dataclass(node):
            if classes is None or node.name in classes:
                fields = [(f.target.id, f.annotation) for f in node.body if _is_field(f)]
        elif isinstance(node, ast.FunctionDef) and node.name in functions:
            fields = [(a.arg, a.annotation) for a in (*node.args.args, *node.args.kwonlyargs)]
        for name, annotation in fields:
            if annotation is not None and _bare_numbers(annotation):
                yield f"{file.relative_to(ROOT)}: {node.name}.{name}"


def _is_field(node):
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


def test_every_number_of_every_setting_has_a_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    commands = project["entry-points"]["mmfree.commands"].values()
    functions = {}
    for target in commands:
        module, _, function = target.partition(":")
        functions.setdefault(module.replace(".", "/") + ".py", set()).add(function)
    functions["mmfree_jax/launch/cli/local.py"].add("plan")
    functions["mmfree_jax/launch/cli/scaling.py"].add("measure")
    found, seen = [], 0
    for file, names in functions.items():
        seen += 1
        found += _undeclared((ROOT / file).resolve(), None, names)
    for file, classes in _SETTINGS.items():
        found += _undeclared(ROOT / file, classes, ())
    assert seen > 15
    assert found == [], "annotate these with a range of mmfree_jax/ranges.py"


def test_an_undeclared_number_would_be_found(tmp_path):
    file = ROOT / "tests/mmfree_jax/test_ranges.py"
    assert list(_undeclared(file, ("_Settings",), ())) == [
        "tests/mmfree_jax/test_ranges.py: _Settings.undeclared"
    ]
