"""Compiling ahead: topologies, what is read out of a program, meshes on paper."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_compilation
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.config import MeshConfig
from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.ahead import hlo
from mmfree_jax.launch.ahead.step_cost import Times, estimate_times, rank_meshes
from mmfree_jax.launch.ahead.topology import _tpu_shape, as_if_on, missing_compiler, parse_topology
from mmfree_jax.model_config import DENSE
from mmfree_jax.presets import preset
from mmfree_jax.train.flops import count_flops


@pytest.mark.parametrize(
    ("text", "chip", "groups", "each"),
    [
        ("v5e-256", "v5e", 1, 256),
        ("2xv6e-64", "v6e", 2, 64),
        ("v5p-128", "v5p", 1, 64),  # named for its cores
        ("h100x8", "h100", 1, 8),
        ("h200x8x16", "h200", 16, 8),
        ("cpu:8", "cpu", 1, 8),
    ],
)
def test_topologies(text, chip, groups, each):
    topology = parse_topology(text)
    assert (topology.chip, topology.groups, topology.each) == (chip, groups, each)
    assert (topology.device is None) == (chip == "cpu")
    assert (topology.links is None) == (chip == "cpu")


@pytest.mark.parametrize("text", ["v5e", "v5e-6", "v5e-512", "x100x8", "h100x0", "cpu", "2xh100"])
def test_unknown_topologies_are_refused(text):
    with pytest.raises(ConfigError, match="topology is"):
        parse_topology(text)


def test_slices_are_as_square_as_they_are_sold():
    assert _tpu_shape("v5e", 256) == (16, 16)
    assert _tpu_shape("v5e", 32) == (4, 8)
    assert _tpu_shape("v5p", 64) == (4, 4, 4)
    assert _tpu_shape("v4", 2048) == (8, 16, 16)


def test_what_code_asks_is_answered_for_the_other_devices():
    tpus = [dataclasses.make_dataclass("D", [("platform", str)])("tpu")] * 3
    with as_if_on(tpus):
        assert jax.default_backend() == "tpu"
        assert jax.device_count() == len(jax.devices()) == 3
    assert jax.default_backend() == "cpu"


def test_collectives_of_a_loop_count_once_a_turn():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    turns, size = 5, 64

    def loop(x, ws):
        def turn(x, w):
            y = jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P()))
            return jax.lax.with_sharding_constraint(
                jnp.tanh(y), NamedSharding(mesh, P(None, "a"))
            ), 0.0

        return jax.lax.scan(turn, x, ws)[0]

    x = jax.ShapeDtypeStruct((size, size), jnp.float32, sharding=NamedSharding(mesh, P(None, "a")))
    ws = jax.ShapeDtypeStruct(
        (turns, size, size), jnp.float32, sharding=NamedSharding(mesh, P(None, "a"))
    )
    text = jax.jit(loop).lower(x, ws).compile().as_text()
    found = hlo.parse_collectives(text, [0] * 8)
    assert {c.kind for c in found} == {"all-reduce"}
    assert sum(c.times for c in found) == turns
    assert {c.group for c in found} == {4}
    assert sum(c.near for c in found) == turns * 2 * 3 / 4 * size * size * 4
    assert sum(c.far for c in found) == 0
    # Two hosts of four: every group has two members in each.
    split = hlo.parse_collectives(text, [0] * 4 + [1] * 4)
    assert sum(c.near for c in split) == turns * 2 * 1 / 2 * size * size * 4
    assert sum(c.far for c in split) == turns * 2 * 1 / 2 * size * size * 4 / 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", [[3, 2], [1, 0]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_in_all_notations(text, expected):
    np.testing.assert_array_equal(hlo._groups(text, 4), expected)


def test_started_and_wrapped_collectives_and_loops_without_a_note_are_counted():
    text = """
HloModule m

%gather (p: f32[8]) -> f32[16] {
  %p = f32[8]{0} parameter(0)
  ROOT %g = f32[16]{0} all-gather(%p), replica_groups={{0,1}}, dimensions={0}
}

%condition (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] constant(3)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %begun = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%x), replica_groups={{0,1}}, to_apply=%add
  %work = f32[8]{0} fusion(%x), kind=kLoop, calls=%add
  %done = f32[8]{0} all-reduce-done(%begun)
  %a = ((f32[8]{0}), f32[16]{0}, u32[]) async-start(%done), calls=%gather
  %b = f32[16]{0} async-done(%a), calls=%gather
}

ENTRY %main (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = (s32[], f32[8]{0}) parameter(0)
  ROOT %w = (s32[], f32[8]{0}) while(%x), condition=%condition, body=%body
}
"""
    found = {c.kind: c for c in hlo.parse_collectives(text, [0, 0])}
    assert found["all-reduce"].times == found["all-gather"].times == 3
    assert found["all-reduce"].near == 3 * 2 * 1 / 2 * 32
    assert found["all-gather"].near == 3 * 1 * 32
    # Of the all-reduce's 32 bytes and the gather's 32, the fusion hides the first.
    assert hlo.share_alongside(text) == 0.5


def test_kernels_that_only_lay_arrays_out_otherwise_are_told_from_those_that_compute():
    text = """
HloModule m

%turned (p: f32[4,2]) -> f32[2,4] {
  %p = f32[4,2]{1,0} parameter(0)
  %b = f32[4,2]{1,0} bitcast(%p)
  ROOT %t = f32[2,4]{1,0} transpose(%b), dimensions={1,0}
}

%added (p: f32[4,2]) -> f32[2,4] {
  %p = f32[4,2]{1,0} parameter(0)
  %t = f32[2,4]{1,0} transpose(%p), dimensions={1,0}
  ROOT %a = f32[2,4]{1,0} add(%t, %t)
}

%flat (p: f32[4,2]) -> f32[8] {
  %p = f32[4,2]{1,0} parameter(0)
  ROOT %b = f32[8]{0} bitcast(%p)
}

%condition (s: (s32[], f32[4,2])) -> pred[] {
  %s = (s32[], f32[4,2]{1,0}) parameter(0)
  %n = s32[] constant(3)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (s: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %s = (s32[], f32[4,2]{1,0}) parameter(0)
  %x = f32[4,2]{1,0} get-tuple-element(%s), index=1
  %moves = f32[2,4]{1,0} fusion(%x), kind=kLoop, calls=%turned
  %works = f32[2,4]{1,0} fusion(%x), kind=kLoop, calls=%added
  %nothing = f32[8]{0} fusion(%x), kind=kLoop, calls=%flat
}

ENTRY %main (x: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %x = (s32[], f32[4,2]{1,0}) parameter(0)
  %y = f32[4,2]{1,0} get-tuple-element(%x), index=1
  %c = f32[4,2]{0,1} copy(%y)
  ROOT %w = (s32[], f32[4,2]{1,0}) while(%x), condition=%condition, body=%body
}
"""
    # Eight floats are read and written by the copy, and by the transpose in each of 3 turns.
    assert hlo.moved_within(text) == (1 + 3) * 2 * 32


_SUM = """
HloModule m, num_partitions=4

ENTRY %main (x: f32[32]) -> f32[32] {
  %x = f32[32]{0} parameter(0)
  ROOT %sum = f32[32]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""


@pytest.mark.parametrize(
    ("places", "near", "far"),
    [
        ([0, 0, 1, 1], 128, 0),  # 2 (2 - 1) / 2 times 32 floats
        ([0, 1, 0, 1], 0, 128),
        ([0, 1, 1, 1], 0, 128),  # as the worst group fares
    ],
)
def test_what_crosses_hosts_is_told_by_where_the_devices_of_a_group_are(places, near, far):
    (found,) = hlo.parse_collectives(_SUM, places)
    assert (found.near, found.far) == (near, far)


def test_sends_between_slices_are_the_collectives_that_they_are_part_of():
    # As libtpu compiles for several slices: a program of one slice's devices.
    lines = (
        "HloModule m, num_partitions=4",
        "ENTRY %main (x: f32[4,8,128], y: s8[1,64,8]) -> f32[4,8,128] {",
        "  %x = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)",
        "  %y = s8[1,64,8]{1,2,0:T(8,128)(4,1)} parameter(1)",
        "  %t = token[] after-all()",
        "  %a = (f32[4,8,128]{2,1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%x, %t), "
        'frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}',
        "  %b = (s8[1,64,8]{1,2,0:T(8,128)(4,1)}, u32[]{:S(2)}, token[]) send(%y, %t), "
        "frontend_attributes={_xla_megascale_target={{100000,200000},{300000,400000}},"
        '_xla_megascale_transfer_type="ALL_GATHER"}',
        "  %c = (s8[1,64,8]{1,2,0:T(8,128)(4,1)}, u32[]{:S(2)}, token[]) send(%y, %t)",
        "  ROOT %g = f32[4,8,128]{2,1,0} all-reduce(%x), replica_groups={{0,1,2,3}}",
        "}",
    )
    text = "\n".join(lines)
    first, second, within = hlo.parse_collectives(text, [0] * 4 + [1] * 4)
    assert (first.kind, first.near, first.far, first.group) == ("all-reduce", 0, 4 * 4096, 2)
    assert (second.kind, second.near, second.far) == ("all-gather", 0, 512)
    assert (within.kind, within.near, within.far) == ("all-reduce", 1.5 * 4 * 4096, 0)


def test_meshes_on_paper():
    config = dataclasses.replace(preset("13B"), batch_size=64)
    ranked = rank_meshes(config, parse_topology("h100x8"), 0.4)
    best, gib, times = ranked[0]
    assert best == MeshConfig(data=1, fsdp=8)
    assert 30 < gib < 45
    assert times is not None
    assert all(mesh.data * mesh.fsdp * mesh.sequence * mesh.tensor == 8 for mesh, _, _ in ranked)
    # One copy of weights and optimiser on a device of 80 GiB: does not fit, so it comes last.
    assert ranked[-1][0].fsdp * ranked[-1][0].tensor == 1
    odd = dataclasses.replace(preset("13B-transformer"), batch_size=63)
    with pytest.raises(ConfigError, match="no mesh divides 16 devices"):
        rank_meshes(odd, parse_topology("h100x8x2"), 0.4)


def test_slow_networks_are_kept_out_of_the_layers():
    config = dataclasses.replace(preset("1.3B"), batch_size=1024)
    ranked = rank_meshes(config, parse_topology("h100x8x16"), 0.4)
    assert all(mesh.sequence * mesh.tensor <= 8 for mesh, _, _ in ranked)
    assert ranked[0][0].data >= 16, "what fits within a host stays within it"


def test_times_are_the_data_sheets():
    config = dataclasses.replace(preset("370M"), batch_size=8)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, remat="none", head_linear=DENSE)
    )
    topology = parse_topology("h100x8")
    exchange = [hlo.Collective("all-reduce", 1, 450e9, 25e9, 8)]
    times = estimate_times(config, topology, exchange, 0.5)
    assert times is not None
    assert (times.near, times.far) == (1.0, 0.5)
    # Forward products of the layers in int8, at twice the rate; all others in bfloat16.
    flops = count_flops(config.model, 2048)
    halves = flops.training - (flops.mixer + flops.glu) / 2
    assert times.compute == pytest.approx(halves * 8 * 2048 / (8 * 0.5 * 989.4e12))
    assert Times(2.0, 1.0, 0.5).hidden == 2.0
    assert Times(2.0, 1.0, 0.5).exposed == 3.5


@pytest.mark.slow
def test_the_command_on_stand_in_devices(tmp_path):
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XLA_FLAGS": quick_compilation.FLAGS,
    }
    out = tmp_path / "report.json"
    simulated = missing_compiler(parse_topology("h100x4")) is not None
    flags = f"--preset tiny --topology h100x4 --batch-size 16 --suggest 1 --out {out}"
    command = [sys.executable, "-m", "mmfree_jax", "compile", *flags.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(out.read_text())
    assert report["devices"] == 4
    assert report["simulated"] == simulated
    assert ("pip install" in done.stdout) == simulated
    assert np.prod(list(report["mesh"].values())) == 4
    assert report["collectives"]
    assert "suggested: --mesh.data" in done.stdout


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.parametrize(
    ("topology", "each", "near", "far", "least", "most"),
    [
        # 100,288 parameters of 4 bytes, of whose gradients each device of a host sends an eighth
        # and of a slice a quarter, and the loss's four sums; libtpu fills up tiles of 4 KiB.
        ("h100x8x2", 8, "NVLink", "InfiniBand", 50_144 + 2, 50_144 + 2),
        ("2xv5e-4", 4, "ICI", "DCN", 100_288, 100_288 + 14 * 4096),
    ],
)
def test_only_gradients_cross_the_slow_network(topology, each, near, far, least, most, tmp_path):
    if missing_compiler(parse_topology(topology)):
        pytest.skip("its compiler is not installed: run `make aot`")
    out = tmp_path / "report.json"
    flags = (
        f"--preset tiny --model.num-layers 1 --data.seq-len 64 --topology {topology} --out {out}"
    )
    command = [sys.executable, "-m", "mmfree_jax", "compile", *flags.split()]
    command += ["--batch-size", str(2 * each), "--mesh.fsdp", str(each), "--out", str(out)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=600)
    (report,) = json.loads(out.read_text())
    assert not report["simulated"]
    assert report["mesh"] == {"data": 2, "fsdp": each, "sequence": 1, "tensor": 1}
    crossing = {kind for kind, row in report["collectives"].items() if row["far_bytes"]}
    assert crossing == {"all-reduce"}, "weights are gathered within"
    assert report["collectives"]["all-gather"]["near_bytes"] > 0
    assert [network["name"] for network in report["networks"]] == [near, far]
    assert least <= report["networks"][1]["bytes"] <= most
    assert f"GB by {far}" in done.stdout


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.parametrize("topology", ["h100x4", "v5e-4"])
def test_absent_hardware(topology, tmp_path):
    if missing_compiler(parse_topology(topology)):
        pytest.skip("its compiler is not installed: run `make aot`")
    out = tmp_path / "report.json"
    flags = f"--preset small --topology {topology} --batch-size 16 --mesh.fsdp 4 --out {out}"
    command = [sys.executable, "-m", "mmfree_jax", "compile", *flags.split()]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, env=env, check=True, timeout=600)
    (report,) = json.loads(out.read_text())
    assert not report["simulated"]
    assert report["memory_gib"]["fits"]
