"""A run's programs are kept whole between starts, and nothing else than the same ones is loaded."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax import compiled_programs
from mmfree_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig, replace_model
from mmfree_jax.parallel.sharding import make_mesh
from mmfree_jax.train import kept_programs
from mmfree_jax.train.kept_programs import Programs
from mmfree_jax.train.step import traced_config

_CONFIG = TrainConfig()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where programs are kept, in a process that passes for the command."""
    monkeypatch.setattr(compiled_programs, "_began", float("inf"))
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    _forget()
    yield tmp_path / "whole"
    jax.config.update("jax_compilation_cache_dir", before)
    monkeypatch.undo()
    _forget()


def _forget():
    kept_programs._sources.cache_clear()
    kept_programs._surroundings.cache_clear()


def _mesh(devices=2):
    return make_mesh(MeshConfig(fsdp=devices), jax.devices()[:devices])


def _argument(mesh, *, value=3.0, shape=(4,), dtype=jnp.float32, axis: str | None = "fsdp"):
    return jax.device_put(jnp.full(shape, value, dtype), NamedSharding(mesh, P(axis)))


def _start(*args, config=_CONFIG, mesh=None, name="triple", factor=3, fails=False):
    """Another start's program: (loaded, made), what it gives, what there is to say."""
    mesh = mesh or _mesh()
    programs = Programs(mesh, config)

    def make():
        assert not fails, "it is traced again"
        return jax.jit(lambda x: {"tripled": (x * factor, None)}, donate_argnums=0)

    program = programs.get(name, make, config, args or (_argument(mesh),))
    given = program(*(args or (_argument(mesh),)))["tripled"][0]
    return (programs.loaded, programs.made), np.asarray(given).tolist(), programs.take_note()


def test_a_later_start_loads_what_an_earlier_one_compiled(folder):
    assert _start() == ((0, 1), [9, 9, 9, 9], None)
    assert _start(fails=True) == ((1, 0), [9, 9, 9, 9], None)
    assert (folder.stat().st_mode & 0o777, len(list(folder.iterdir()))) == (0o700, 1)


def test_jaxs_cache_is_used_as_before_once_a_program_is_kept(folder):
    _start()
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    try:
        for _ in range(2):
            jax.jit(lambda x: x * 7 - 2).lower(jnp.ones(3)).compile()
            jax.clear_caches()
    finally:
        jax.monitoring.clear_event_listeners()
    assert "/jax/compilation_cache/cache_hits" in hits


def _change_source(patch):
    patch.setattr(kept_programs, "_sources", lambda: "other files")


def _change_flags(patch):
    patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=true")
    kept_programs._surroundings.cache_clear()


def _change_packages(patch):
    found = [SimpleNamespace(name="jaxlib", version="0.0.1")]
    patch.setattr(kept_programs.metadata, "distributions", lambda: found)
    kept_programs._surroundings.cache_clear()


@pytest.mark.parametrize("change", [_change_source, _change_flags, _change_packages])
def test_other_files_flags_or_packages_make_another_program(folder, monkeypatch, change):
    _start()
    change(monkeypatch)
    assert _start(factor=5) == ((0, 1), [15, 15, 15, 15], None)


def test_another_setting_of_jax_makes_another_program(folder):
    _start()
    kept_programs._surroundings.cache_clear()
    before = jax.config.values["jax_default_matmul_precision"]
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        assert _start()[0] == (0, 1)
    finally:
        jax.config.update("jax_default_matmul_precision", before)


def test_other_configs_devices_and_arguments_make_other_programs(folder):
    mesh = _mesh()
    _start()
    others = [
        _start(config=dataclasses.replace(_CONFIG, z_loss=1e-4)),
        _start(config=replace_model(_CONFIG, num_layers=3)),
        _start(name="other"),
        _start(mesh=make_mesh(MeshConfig(fsdp=2), jax.devices()[2:4])),
        _start(mesh=_mesh(1)),
        _start(_argument(mesh, shape=(6,))),
        _start(_argument(mesh, dtype=jnp.int32)),
        _start(_argument(mesh, axis=None)),
    ]
    assert [counts for counts, _, _ in others] == [(0, 1)] * len(others)
    assert _start(_argument(mesh, value=5.0))[:2] == ((1, 0), [15, 15, 15, 15])


def test_the_sources_are_those_that_this_process_runs(folder, monkeypatch):
    digest = kept_programs._sources()
    assert digest is not None
    package = Path(kept_programs.__file__).parents[1]
    roots = (package, (package / "pallas_kernels").resolve())
    sources = [p for root in roots for kind in ("*.py", "*.json") for p in root.rglob(kind)]
    newest = max(p.stat().st_ctime for p in sources)
    for began, expected in ((newest + 2, digest), (newest, None), (None, None)):
        kept_programs._sources.cache_clear()
        monkeypatch.setattr(compiled_programs, "_began", began)
        assert kept_programs._sources() == expected
    assert _start()[0] == (0, 1)
    assert not folder.exists(), "a caller's process may run other code than that on disk"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:10],
        lambda data: b"",
        lambda data: b"something else",
        lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
    ],
)
def test_a_damaged_file_is_told_of_and_made_anew(folder, damage):
    _start()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    counts, given, note = _start()
    assert (counts, given) == ((0, 1), [9, 9, 9, 9])
    assert note == f"{file} cannot be used (it is damaged) and is made anew"
    assert _start(fails=True) == ((1, 0), [9, 9, 9, 9], None)


def test_another_programs_file_is_not_taken(folder):
    _start()
    (file,) = folder.iterdir()
    _start(name="other", factor=5)
    (other,) = set(folder.iterdir()) - {file}
    other.replace(file)
    counts, given, note = _start()
    assert (counts, given) == ((0, 1), [9, 9, 9, 9])
    assert note is not None


def test_a_file_that_this_jaxlib_cannot_load_is_made_anew(folder, monkeypatch):
    _start()

    def refuse(*args, **kwargs):
        raise RuntimeError("no such version\nand more")

    monkeypatch.setattr(kept_programs, "deserialize_and_load", refuse)
    counts, given, note = _start()
    assert (counts, given) == ((0, 1), [9, 9, 9, 9])
    assert note is not None
    assert note.endswith("cannot be used (no such version) and is made anew")


def test_a_program_that_cannot_be_kept_is_told_of_once(folder):
    def make():
        return jax.jit(lambda x: jax.pure_callback(lambda y: y, x, x))

    mesh = _mesh(1)
    programs = Programs(mesh, _CONFIG)
    for name in ("one", "two"):
        program = programs.get(name, make, _CONFIG, (_argument(mesh),))
        assert np.asarray(program(_argument(mesh))).tolist() == [3, 3, 3, 3]
        note = programs.take_note()
        assert (note is not None and "cannot be kept" in note) == (name == "one")
    assert not list(folder.iterdir())


def test_a_folder_that_others_can_look_into_is_not_used(folder):
    _start()
    folder.chmod(0o755)
    counts, _, note = _start()
    assert counts == (0, 1)
    assert note is not None
    assert note.endswith(f"which is not this user's alone: chmod 700 {folder}")
    folder.chmod(0o700)
    aside = folder.rename(folder.with_name("aside"))
    folder.symlink_to(aside)
    counts, _, note = _start()
    assert counts == (0, 1)
    assert note is not None
    assert f"remove {folder}" in note


def test_a_folder_that_cannot_be_written_serves_what_it_has(folder, monkeypatch):
    _start()
    kept = list(folder.iterdir())
    monkeypatch.setattr(kept_programs.os, "access", lambda *_: False)  # as root may write anywhere
    assert _start(fails=True) == ((1, 0), [9, 9, 9, 9], None)
    counts, given, note = _start(name="other")
    assert (counts, given) == ((0, 1), [9, 9, 9, 9])
    assert note == f"{folder} cannot be written: what is compiled is not kept there"
    assert list(folder.iterdir()) == kept


def test_a_full_disk_ends_nothing(folder, full_disk):
    jax.config.update("jax_compilation_cache_dir", str(full_disk))
    (full_disk / "fill").write_bytes(bytes(8 << 10))
    counts, given, note = _start()
    assert (counts, given) == ((0, 1), [9, 9, 9, 9])
    assert note is not None
    assert note.startswith("compiled programs are not kept: ")


def test_what_was_used_least_recently_goes_beyond_the_bound(folder, monkeypatch):
    names = ["a", "b", "c"]
    for age, name in enumerate(names):
        _start(name=name)
        for file in folder.iterdir():
            os.utime(file, ns=(0, file.stat().st_mtime_ns - 10**10 * (3 - age)))
    assert _start(name="a")[0] == (1, 0)  # used last now
    (folder / "notes").write_text("a user's own")
    (folder / ".x.program.0123abcd.tmp").write_bytes(b"left by a killed writer")
    os.utime(folder / ".x.program.0123abcd.tmp", (0, 0))
    size = max(file.stat().st_size for file in folder.iterdir())
    before = jax.config.values["jax_compilation_cache_max_size"]
    jax.config.update("jax_compilation_cache_max_size", 2 * size + size // 2)
    try:
        _start(name="d")
        assert {name: _start(name=name)[0][0] for name in ("a", "d")} == {"a": 1, "d": 1}
        assert len(list(folder.glob("*.program"))) == 2
        assert sorted(f.name for f in folder.iterdir() if f.suffix != ".program") == ["notes"]
        jax.config.update("jax_compilation_cache_max_size", size // 2)
        assert _start(name="e")[0] == (0, 1)
        assert len(list(folder.glob("*.program"))) == 2, "what is larger than all is not kept"
    finally:
        jax.config.update("jax_compilation_cache_max_size", before)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(_CONFIG, optimizer=OptimizerConfig(factory="mine:optimizer")),
        replace_model(_CONFIG, mixer="mlgru,mine:MIXER", num_layers=2),
    ],
)
def test_code_of_the_users_own_is_not_kept(folder, config):
    assert _start(config=config)[0] == (0, 1)
    assert not folder.exists()


def test_none_are_kept_for_dumps_several_processes_or_no_cache(folder, monkeypatch):
    def keeps():
        return Programs(_mesh(), _CONFIG)._folder is not None

    assert keeps()
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/dump")
        assert not keeps()
    with monkeypatch.context() as patch:
        patch.setattr(kept_programs.jax, "process_count", lambda: 2)
        assert not keeps()
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert not keeps()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    for elsewhere in ("gs://bucket/cache", ""):
        jax.config.update("jax_compilation_cache_dir", elsewhere)
        assert not keeps()


def test_what_programs_are_traced_from_leaves_out_the_numbers_of_a_schedule():
    config = TrainConfig(
        run_dir="elsewhere",
        steps=77,
        seed=5,
        z_loss=1e-4,
        batch_size=4,
        data=DataConfig(paths=("somewhere",), seq_len=64),
        optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=7, schedule="wsd", b2=0.9),
    )
    assert traced_config(config) == TrainConfig(
        z_loss=1e-4,
        batch_size=4,
        data=DataConfig(seq_len=64),
        optimizer=OptimizerConfig(schedule="wsd", b2=0.9),
    )
    own = dataclasses.replace(config.optimizer, factory="mine:optimizer")
    assert traced_config(dataclasses.replace(config, optimizer=own)).optimizer == own


def test_a_run_goes_on_with_the_programs_that_it_began_with(byte_data, tmp_path):
    """And has the losses, bit for bit, of a run that is not interrupted and keeps nothing."""

    def run(name, *more, **env):
        flags = ["--preset", "tiny", "--data.seq-len", "32", "--batch-size", "2", "--steps", "3",
                 "--eval.batches", "1", "--eval.sample-tokens", "0",
                 "--log.every-steps", "1", "--log.progress", "plain", "--log.no-tensorboard",
                 "--data.paths", str(byte_data), "--run-dir", str(tmp_path / name)]  # fmt: skip
        xla = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
        kept = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "kept"), "XLA_FLAGS": xla}
        ran = subprocess.run(
            [sys.executable, "-m", "mmfree_jax", "train", *flags, *more],
            env=os.environ | kept | env,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        return summary["programs"], ran.stdout

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        found = {(r["kind"], r["step"]): r["loss"] for r in records if "loss" in r}
        return {key: loss for key, loss in found.items() if key != ("eval", 1)}

    programs, said = run("run", "--stop-at", "1")
    assert programs["loaded"] == 0
    assert programs["made"] >= 3  # initial state, step and evaluation
    assert "\ncompiled the training step in " in said
    programs, said = run("run")
    assert programs["loaded"] >= 2
    assert "\nloaded the training step in " in said
    programs, said = run("whole", JAX_ENABLE_COMPILATION_CACHE="false")
    assert programs["loaded"] == 0
    assert losses("run") == losses("whole")
    assert len(losses("run")) == 4
