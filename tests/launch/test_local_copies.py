"""Local copies of two real processes: each holds its share, in a folder of its own."""

import io
import sys
from pathlib import Path

import pytest

from mmfree_jax.launch.local import Plan, run

_PROGRAM = """
import shutil, sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mmfree_jax.parallel import processes
from mmfree_jax.parallel.process_options import ProcessOptions
from mmfree_jax.saved.local_copies import LocalCopies
processes.join(ProcessOptions())
me = jax.process_index()
folder = Path(sys.argv[1]) / f"host{me}"
devices = np.array(jax.devices()).reshape(2, 2)  # two of each process
by_process = NamedSharding(Mesh(devices, ("data", "fsdp")), P("data"))
otherwise = NamedSharding(Mesh(devices.T, ("data", "fsdp")), P("fsdp", "data"))
everywhere = NamedSharding(Mesh(devices, ("data", "fsdp")), P())
values = np.arange(32, dtype=np.float32).reshape(4, 8)
values[0, 0] = -0.0

def put(values, sharding):
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

def save(step, sharding):
    copies = LocalCopies(folder, "run")
    state = {"w": put(values + step, sharding), "step": put(np.int32(step), everywhere)}
    copies.save(step, state, {"config": {}, "data": {
        "fingerprints": [], "tokens": [], "paths": [], "tokenizer": {}}})
    copies.wait()

def restore(sharding):
    wanted = {"w": jax.ShapeDtypeStruct((4, 8), np.float32, sharding=sharding),
              "step": jax.ShapeDtypeStruct((), np.int32, sharding=everywhere)}
    restored, notes = LocalCopies(folder, "run").restore(wanted, newer_than=0)
    if restored is None:
        return None, notes
    for shard in restored.state["w"].addressable_shards:
        expected = (values + restored.step)[shard.index]
        assert np.asarray(shard.data).tobytes() == expected.tobytes(), (me, shard.index)
    assert int(restored.state["step"].addressable_shards[0].data) == restored.step
    return restored.step, notes

save(3, by_process)
processes.exchange("all have saved")
print("> same", restore(by_process)[0], flush=True)
print("> other", restore(otherwise)[0], flush=True)
save(5, everywhere)
processes.exchange("all have saved")
if me == 1:
    shutil.rmtree(folder)  # its machine is lost
processes.exchange("one is lost")
print("> whole on the other", restore(by_process)[0], flush=True)
if me == 0:
    for path in folder.glob("run/*/5"):
        shutil.rmtree(path)
processes.exchange("half is left")
step, notes = restore(by_process)
print("> fallen back", step, ["step 3" in n and "not whole" in n for n in notes], flush=True)
"""


@pytest.mark.slow
def test_what_is_whole_is_decided_by_all(pod_environment: dict[str, str], tmp_path: Path) -> None:
    out = io.StringIO()
    plan = Plan((sys.executable, "-c", _PROGRAM, str(tmp_path)), 2, devices_per_process=2)
    assert run(plan, environ=pod_environment, out=out) == 0, out.getvalue()
    for i in range(2):
        mine = f"[{i}] > "  # Gloo has lines of its own
        lines = [x.removeprefix(mine) for x in out.getvalue().splitlines() if x.startswith(mine)]
        assert lines == ["same 3", "other 3", "whole on the other 5", "fallen back None [True]"]
