"""Scaling studies: which cases, on which devices, and what is made of the results."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from mmfree_jax.config import MeshConfig
from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.cli.scaling import scaling
from mmfree_jax.launch.device_scaling import report, run
from mmfree_jax.launch.device_scaling.plan import (
    Case,
    mesh_of,
    parse_case,
    plan_cases,
    train_config,
)
from mmfree_jax.launch.device_scaling.worker import read_case, timing_of, write_case
from mmfree_jax.launch.xla_flags import OVERLAP, with_overlap


def test_combinations_in_order_and_one_device_once():
    cases = plan_cases(["370M", "1.3B"], [1, 2, 4], ["data", "fsdp"], "weak", 8, 2048)
    assert [(c.devices, c.layout, c.batch_size) for c in cases if c.preset == "1.3B"] == [
        (4, "data", 32),
        (4, "fsdp", 32),
        (2, "data", 16),
        (2, "fsdp", 16),
        (1, "one", 8),
    ]
    assert cases[0].preset == "370M"


def test_strong_scaling_keeps_the_global_batch():
    cases = plan_cases(["370M"], [1, 2, 4], ["data"], "strong", 8, 2048)
    assert {case.batch_size for case in cases} == {32}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("13B:fsdp:8", Case("13B", 8, "fsdp", "weak", 64, 2048)),
        ("7B:fsdp+tensor:4:2", Case("7B", 4, "fsdp+tensor", "weak", 8, 2048)),
        ("370M:data:1", Case("370M", 1, "one", "weak", 8, 2048)),
        ("370M:data:2+trace", Case("370M", 2, "data", "weak", 16, 2048, trace=True)),
        (
            "1.3B:data+fsdp:8+plain+checkpoint",
            Case("1.3B", 8, "data+fsdp", "weak", 64, 2048, overlap=False, checkpoint=True),
        ),
    ],
)
def test_single_cases(text, expected):
    assert parse_case(text, 8, 2048) == expected
    train_config(expected)


def test_a_case_may_change_fields_and_flags():
    text = "13B:fsdp:4+optimizer.gradient_dtype=bfloat16+model.remat=dots+xla_gpu_x=false+trace"
    case = parse_case(text, 8, 2048)
    assert case.flags == ("--xla_gpu_x=false",)
    assert case.trace
    config = train_config(case)
    assert (config.optimizer.gradient_dtype, config.model.remat) == ("bfloat16", "dots")
    assert "gradient_dtype=bfloat16" in case.name
    assert "xla_gpu_x=false" in case.name
    with pytest.raises(ConfigError, match=r"unknown config key 'optimizer\.gradient'"):
        train_config(parse_case("13B:fsdp:4+optimizer.gradient=float32", 8, 2048))


@pytest.mark.parametrize(
    "text", ["13B", "13Z:data:1", "13B:rows:2", "13B:data:two", "13B:data:2+x"]
)
def test_malformed_cases_are_refused(text):
    with pytest.raises(ConfigError, match="case is"):
        parse_case(text, 8, 2048)


def test_layouts_become_meshes():
    assert mesh_of("data+fsdp", 8) == MeshConfig(data=2, fsdp=4)
    assert mesh_of("fsdp+tensor", 8) == MeshConfig(data=1, fsdp=4, tensor=2)
    with pytest.raises(ConfigError, match="layouts holds 'rows'"):
        mesh_of("rows", 8)
    with pytest.raises(ConfigError, match="even number"):
        mesh_of("fsdp+tensor", 3)


def test_a_case_survives_its_file(tmp_path):
    changes = (("remat", "dots"), ("optimizer.gradient_dtype", "bfloat16"))
    case = Case("tiny", 2, "fsdp", "weak", 8, 64, changes=changes, flags=("--x=1",))
    write_case(tmp_path / "case.json", case)
    assert read_case(tmp_path / "case.json") == case
    assert train_config(case).model.remat == "dots"


def test_long_steps_are_timed_fewer_times():
    assert timing_of(Case("370M", 8, "data", "weak", 64, 2048))["steps_per_group"] == 4
    assert timing_of(Case("13B", 8, "fsdp", "weak", 64, 2048))["steps_per_group"] == 1


def test_neighbours_share_the_host_and_the_largest_stand_alone(tmp_path):
    counts = (8, 8, 4, 2, 1, 4, 2, 8)
    workers = [run._Worker(Case("tiny", n, "data", "weak", 8, 64), tmp_path) for n in counts]
    run._place(workers, 8)
    sets = [set(worker.gpus) for worker in workers]
    assert all(len(gpus) == n for gpus, n in zip(sets, counts, strict=True))
    assert not sets[2] & sets[3]
    assert not (sets[2] | sets[3]) & sets[4]
    assert not sets[5] & sets[6]
    assert workers[0].gpus[0] != workers[1].gpus[0], "tuned on different devices"


def test_overlap_flags_leave_the_users_own():
    flags = with_overlap({"XLA_FLAGS": "--xla_gpu_enable_pipelined_all_reduce=false --y=1"})
    given = flags["XLA_FLAGS"].split()
    assert given.count("--xla_gpu_enable_pipelined_all_reduce=false") == 1
    assert len(given) == len(OVERLAP) + 1


def _record(preset, devices, layout, rate, **extra):
    case = dataclasses.asdict(Case(preset, devices, layout, "weak", 8 * devices, 2048))
    return {
        "name": f"{preset}-{layout}-{devices}",
        "case": case,
        "devices": devices,
        "device_kind": "H",
        "parameters": 370,
        "tokens_per_s": rate * devices,
        "step_ms": 100.0,
        "model_tflops": 200.0 * devices,
        "peak_gib": 31.5,
        **extra,
    }


def test_the_report(tmp_path):
    records = [
        _record("370M", 1, "one", 100_000.0),
        _record("370M", 8, "data", 95_000.0),
        _record("370M", 8, "fsdp", 90_000.0, checkpoint={
            "gib": 4.1, "save_blocked_s": 0.5, "save_s": 3.0, "verify_s": 1.0, "restore_s": 4.0,
        }),
        _record("370M", 4, "fsdp", 90_000.0, checkpoint={
            "gib": 4.1, "save_blocked_s": 0.1, "save_stall_s": 0.7, "save_s": 3.0,
            "restore_s": 2.0,
        }),
        _record("370M", 2, "fsdp", 91_000.0, exchange={
            "ms_a_step": 10.0, "hidden_ms_a_step": 8.0, "collectives": [],
        }),
        {"name": "bad", "case": {}, "error": "out of memory: 1"},
    ]  # fmt: skip
    text = report.table(records)
    assert "| 370M | weak | 8 | data | 64 x 2048 | 95,000 | 95.0% | 100.0 | 200 | 31.5 |" in text
    assert "| 370M | 8 | 4.1 | 0.5 | 3.0 | 4.0 |" in text
    assert "| 370M | 4 | 4.1 | 0.7 | 3.0 | 2.0 |" in text
    assert "| 370M | 2 | fsdp | 10.0 | 80% |" in text
    assert "Not measured: bad: out of memory: 1" in text
    # 15e9 tokens at 760,000 a second.
    assert "| 370M, 15B tokens | 8 x H, data | 760,000 | 5.5 | 5 |" in report.training_times(
        records
    )
    (tmp_path / run.RESULTS).write_text("".join(json.dumps(r) + "\n" for r in records))
    assert scaling(["--report", str(tmp_path)]) == 0
    assert (tmp_path / "scaling.png").stat().st_size > 5_000
    assert "95.0%" in (tmp_path / "scaling.md").read_text()


@pytest.mark.parametrize("line", ['{"name": "x", "ca', "[]", '{"name": 3, "case": {}}'])
def test_a_damaged_record_is_named(tmp_path, line):
    (tmp_path / "results.jsonl").write_text('{"name": "x", "case": {}}\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"results.jsonl, line 2 is damaged"):
        report.read_results(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokens_per_s": "fast"}, "tokens_per_s is 'fast'"),
        ({"tokens_per_s": 0}, "tokens_per_s is 0"),
        ({"devices": None}, "devices is None"),
        ({"case": {"preset": "370M"}}, "mode is missing"),
        ({"exchange": [1]}, "exchange is not a mapping"),
        ({"checkpoint": {"gib": 1}}, "save_blocked_s is missing"),
        ({"peak_gib": "x"}, "peak_gib is 'x'"),
    ],
)
def test_a_measurement_of_other_types_is_named(tmp_path, capsys, change, told):
    record = _record("370M", 1, "one", 100.0) | change
    (tmp_path / run.RESULTS).write_text(json.dumps(record) + "\n")
    with pytest.raises(ConfigError, match=rf"record '370M-one-1' .* damaged \({told}"):
        scaling(["--report", str(tmp_path)])


def test_what_is_no_record_of_a_command_is_named(tmp_path):
    (tmp_path / run.RESULTS).write_text(json.dumps(_record("370M", 1, "one", 100.0)) + "\n")
    for text in ('{"versions": 3}', '{"command": [[]]}', "[" * 100_000, "[]"):
        (tmp_path / "study.json").write_text(text)
        with pytest.raises(ConfigError, match=r"study\.json is damaged"):
            scaling(["--report", str(tmp_path)])


def test_a_later_success_replaces_a_failure_but_not_the_reverse(tmp_path):
    good, bad = _record("370M", 1, "one", 1.0), {"name": "370M-one-1", "case": {}, "error": "x"}
    for order in ((good, bad), (bad, good)):
        (tmp_path / run.RESULTS).write_text("".join(json.dumps(r) + "\n" for r in order))
        assert "error" not in report.read_results(tmp_path)[0]
    with pytest.raises(ConfigError, match=r"holds no results\.jsonl"):
        report.read_results(tmp_path / "none")


@pytest.mark.slow
def test_a_study_on_simulated_devices(tmp_path, pod_environment):
    good = Case("tiny", 2, "fsdp", "weak", 4, 32, checkpoint=True, trace=True)
    odd = dataclasses.replace(good, batch_size=3, checkpoint=False, trace=False)
    options = run.Options(out=tmp_path / "out", parallel_compiles=2)
    environ = dict(pod_environment)
    environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # a study has one of its own
    records = run.run_study([good, odd], options, environ=environ, say=lambda text: None)
    by_batch = {record["case"]["batch_size"]: record for record in records}
    assert "mesh.data x mesh.fsdp: set --batch-size 4" in by_batch[3]["error"]
    measured = by_batch[4]
    assert measured["devices"] == 2
    assert measured["tokens_per_s"] > 0
    assert measured["checkpoint"]["restore_s"] > 0
    # The measuring process found the step that the compiling one had left in the cache.
    steps = (tmp_path / "out" / "compiled").glob("jit_train_step*-cache")
    assert len(list(steps)) == 1
    assert measured["exchange"]["ms_a_step"] == 0, "a CPU's trace has no line of kernels"
    assert list((tmp_path / "out").rglob("timeline.png"))
    lines = (tmp_path / "out" / run.RESULTS).read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == [r["name"] for r in records]
    assert not list((tmp_path / "out").rglob("manifest.json")), "checkpoints are removed again"


def test_gpus_in_use_are_left_out(tmp_path, monkeypatch):
    stub = tmp_path / "nvidia-smi"
    stub.write_text("#!/bin/sh\nprintf '0, 4\\n1, 107929\\n2, 0\\n'\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert run.idle_gpus(["0", "1", "2"]) == ["0", "2"]
    assert run.idle_gpus([]) == []
    case = Case("tiny", 3, "data", "weak", 3, 32)
    said = []
    records = run.run_study(
        [case],
        run.Options(out=tmp_path / "out"),
        environ={"CUDA_VISIBLE_DEVICES": "0,1,2"},
        say=said.append,
    )
    assert records[0]["error"] == "not run: needs 3 GPUs, 2 are idle"
    assert "left out: GPU 1" in said[0]


@pytest.mark.slow
def test_a_case_that_hangs_does_not_hold_up_the_rest(tmp_path, pod_environment, monkeypatch):
    # Its word never comes through: the file that it waits for is not the one that is written.
    cases = [Case("tiny", 1, "one", "weak", rows, 32) for rows in (4, 2)]
    touch, skipped = Path.touch, [0.0]

    def word(path):
        if "b4" in str(path):
            skipped[0] += 60.0  # of waiting for it
        else:
            touch(path)

    monkeypatch.setattr(Path, "touch", word)
    options = run.Options(out=tmp_path, parallel_compiles=2, case_minutes=1.0)
    records = run.run_study(
        cases,
        options,
        environ=pod_environment,
        clock=lambda: time.monotonic() + skipped[0],
        say=lambda text: None,
    )
    assert records[0]["error"] == "not done in 1 minutes: ended"
    assert records[1]["tokens_per_s"] > 0


def test_a_study_that_runs_out_of_time_says_what_it_left_out(tmp_path, pod_environment):
    case = Case("tiny", 1, "one", "weak", 4, 32)
    times = iter([0.0] + [1000.0] * 100_000)
    options = run.Options(out=tmp_path, max_minutes=1)
    records = run.run_study(
        [case], options, environ=pod_environment, clock=lambda: next(times), say=lambda text: None
    )
    assert records[0]["error"] == "not run to its end: max-minutes is over"
