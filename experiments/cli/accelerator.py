"""`mmfree hardware compile`, `run`, `cells` and `report`."""

import dataclasses
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from mmfree_jax.cli.parse import parse
from mmfree_jax.cli.train import base_config, with_vocabulary
from mmfree_jax.config import TrainConfig
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.experiments.accelerator.machine import Machine
from mmfree_jax.fetched import local_copy, nothing
from mmfree_jax.files import check_file, write_bytes
from mmfree_jax.installed import import_optional, install_command
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.outputs import check_target, new_folder
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.ranges import AboveZero, Count, CountOrZero, Range, Seed
from mmfree_jax.text_files import read_text


def compile_(
    model: PlaceOrUrl,
    out: PlaceOrUrl,
    numerics: str = "fixed:w8a16",
    layer: CountOrZero | None = None,
    lanes: Count = 4,
    vector_length: Count | None = None,
    memory_latency: CountOrZero = 8,
    cycles_per_beat: AboveZero = 1.0,
    clock_mhz: AboveZero = 60.0,
    seed: Seed = 0,
) -> int:
    """Compile a trained model to a program and its memory.

    Args:
      model: Run directory, model folder, packed model or Hugging Face folder, or its URL.
      out: Folder that receives program.asm, memory.bin and program.json, or its URL.
      numerics: Integers to compute with (docs/hardware.md).
      layer: One block only, from the vector "x", which holds what the blocks before it make of a
        token, to the vector "y"; default: the whole model.
      lanes: Elements handled in a cycle; the memory bus has two bits for each.
      vector_length: Elements of a register; default: the model's widest vector.
      memory_latency: Cycles from a request to its first beat.
      cycles_per_beat: Cycles between beats of the memory bus.
      clock_mhz: Clock.
      seed: Of the text, written by the model itself, that the formats are fitted to.
    """
    from mmfree_jax.experiments.accelerator.compile import (
        compile_block,
        compile_model,
        write_vector,
    )
    from mmfree_jax.experiments.accelerator.numerics import parse_numerics
    from mmfree_jax.experiments.accelerator.program_dir import COMMAND, save
    from mmfree_jax.experiments.accelerator.quantized import check_supported, quantize, self_written

    check_target(out, command=COMMAND, sources=[model], overwrite=True)
    fixed = parse_numerics(numerics)
    language_model, variables = _load(model)
    config = language_model.config
    check_supported(config)
    if layer is not None and not 0 <= layer < config.num_layers:
        raise ConfigError(f"--layer is {layer}: the model has 0 to {config.num_layers - 1}")
    machine = Machine(
        lanes,
        vector_length or max(config.hidden_size, config.glu_size),
        memory_latency,
        cycles_per_beat,
        clock_mhz,
        fixed.sigmoid_entries,
        fixed.newton_steps,
    )
    tokens_BT = self_written(config, variables, seed=seed)
    quantized = quantize(variables, config, fixed, tokens_BT)
    if layer is None:
        compiled = compile_model(quantized, machine)
    else:
        compiled = compile_block(quantized, layer, machine)
        assert compiled.memory is not None
        write_vector(compiled, "x", _block_input(quantized, layer, tokens_BT), compiled.memory)
    save(compiled, out, model=model)
    assert compiled.memory is not None
    print(f"{len(compiled.program)} instructions, {len(compiled.memory):,} bytes of memory: {out}")
    return 0


def _block_input(quantized: Any, layer: int, tokens_BT: np.ndarray) -> np.ndarray:
    """The residual stream [D] in front of a block, for the first token of the first row."""
    import jax
    import jax.numpy as jnp

    from mmfree_jax.experiments.accelerator import integer_model

    before = {name: value[:layer] for name, value in quantized.arrays["layers"].items()}
    h_LBD = jnp.zeros((layer, 1, quantized.config.hidden_size), jnp.int32)
    arrays = jax.tree.map(jnp.asarray, quantized.arrays | {"layers": before})
    token_BT = jnp.asarray(tokens_BT[:1, :1])
    x_BTD, _ = integer_model.hidden(arrays, token_BT, None, h_LBD, quantized.numerics)
    return np.asarray(x_BTD[0, 0])


def _load(path: PlaceOrUrl) -> tuple[Any, Any]:
    """A model in float32 and its trits."""
    from mmfree_jax.model.weights import as_weights
    from mmfree_jax.saved.open_model import open_model

    saved = open_model(path)
    model = saved.model("float32")
    config = dataclasses.replace(model.config, bitlinear="fused")
    form = "ternary" if saved.kind == "packed" else "master"
    return type(model)(config), as_weights(saved.weights(form), config)


def run(
    program: PlaceOrUrl,
    tokens: str = "",
    generate: CountOrZero = 0,
    backend: Literal["simulator", "amaranth", "icarus"] = "simulator",
    out: Path | None = None,
) -> int:
    """Run a compiled program, and count its cycles.

    Args:
      program: Folder that `mmfree hardware compile` wrote; or one file of assembly, whose memory
        is 64 KiB of zeros; or the URL of either.
      tokens: Token ids, separated by commas, for a whole model: one run each.
      generate: Then go on greedily for so many tokens (simulator only).
      backend: The instruction-level simulator, the RTL in Amaranth's, or its Verilog in Icarus.
      out: File that receives the memory after the last run.
    """
    from mmfree_jax.experiments.accelerator import simulate
    from mmfree_jax.experiments.accelerator.compile import Compiled, read_vector
    from mmfree_jax.experiments.accelerator.isa import assemble
    from mmfree_jax.experiments.accelerator.machine import timeline
    from mmfree_jax.experiments.accelerator.program_dir import load

    place = local_copy(program, "program", beside=nothing)
    if place.is_file():
        try:
            instructions = assemble(read_text(place))
        except OSError as e:
            raise DataError(f"{program}: {e.strerror}; give a readable file") from e
        except (DataError, UnicodeDecodeError) as e:
            raise DataError(f"{program}, {e}") from e
        compiled = Compiled(instructions, np.zeros(1 << 16, np.uint8), {}, Machine(), 0, {})
    else:
        compiled = load(place)
    memory, machine = compiled.memory, compiled.machine
    assert memory is not None
    if out is not None:
        check_file(out, "", sources=[place, place / "memory.bin"])
        if out.is_file() and out.stat().st_size != len(memory):
            raise ConfigError(f"{out} is not replaced: it is no memory of this; choose another")
    ids = _token_ids(tokens, compiled)
    if generate and (backend != "simulator" or not ids):
        raise ConfigError("--generate needs --backend simulator and --tokens to begin with")
    offsets = [token * compiled.token_stride for token in ids] or [0]
    line = timeline(compiled.program, machine)
    if backend == "simulator":
        k = 0
        while k < len(offsets):
            simulate.run(compiled.program, memory, machine, token_offset=offsets[k])
            k += 1
            if k == len(offsets) and len(ids) and len(offsets) < len(ids) + generate:
                following = int(read_vector(compiled, "logits", memory).argmax())
                offsets.append(following * compiled.token_stride)
        counted = [line.cycles] * len(offsets)
    else:
        expected = memory.copy()
        for offset in offsets:
            simulate.run(compiled.program, expected, machine, token_offset=offset)
        counted = _run_rtl(backend, compiled, memory, offsets)
        if different := int((memory != expected).sum()):
            raise DataError(f"{different:,} bytes of the RTL's memory are not the simulator's")
        if set(counted) != {line.cycles}:
            raise DataError(f"the RTL took {counted} cycles, the timing model says {line.cycles}")
        print(f"the RTL's memory of {len(memory):,} bytes and its cycles are the simulator's")
    table = Table("unit", title_justify="left")
    for name in ("cycles", "share"):
        table.add_column(name, justify="right")
    for unit, cycles in line.busy.items():
        table.add_row(unit, f"{cycles:,}", f"{cycles / max(1, line.cycles):.1%}")
    console = Console()
    console.print(table)
    ms = counted[0] / machine.clock_mhz / 1e3
    console.print(
        f"{len(compiled.program)} instructions, {counted[0]:,} cycles a run ({backend}), "
        f"{line.stalled:,} of them waiting to issue, {line.beats:,} beats of {machine.bus_bits} "
        f"bits; {ms:.4g} ms at {machine.clock_mhz:g} MHz",
        highlight=False,
    )
    if generate:
        print("generated:", [o // compiled.token_stride for o in offsets[len(ids) :]])
    if "logits" in compiled.frac:
        logits = read_vector(compiled, "logits", memory)
        best = np.argsort(-logits, kind="stable")[:5]
        scale = 2.0 ** -compiled.frac["logits"]
        print("likeliest next:", [(int(t), round(float(logits[t]) * scale, 3)) for t in best])
    if out is not None:
        write_bytes(out, memory.tobytes())
    return 0


def _token_ids(text: str, compiled: Any) -> list[int]:
    if not text:
        if compiled.token_stride:
            raise ConfigError("--tokens is empty: a whole model needs token ids, for example 1,5,2")
        return []
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*-?\d{1,10}\s*", part, re.ASCII) for part in parts):
        raise ConfigError(f"--tokens is {text!r}: give token ids separated by commas")
    ids = [int(part) for part in parts]
    if not compiled.token_stride:
        raise ConfigError("--tokens is given, but the program is not of a whole model")
    rows = compiled.places["embedding"][1]
    if min(ids) < 0 or max(ids) >= rows:
        raise ConfigError(f"--tokens is {text!r}: the model's ids go from 0 to {rows - 1}")
    return ids


def _run_rtl(backend: str, compiled: Any, memory: np.ndarray, offsets: list[int]) -> list[int]:
    import_optional("amaranth", f"--backend {backend}", install_command("hardware"))
    from mmfree_jax.experiments.accelerator.rtl import simulation, verilog

    machine = compiled.machine
    if backend == "amaranth":
        traces = simulation.simulate(compiled.program, memory, machine, token_offsets=offsets)
    else:
        with tempfile.TemporaryDirectory(prefix="mmfree-rtl-") as folder:
            traces = verilog.run_icarus(
                compiled.program, memory, machine, Path(folder), token_offsets=offsets
            )
    return [trace.cycles for trace in traces]


def cells(width: Count = 512, lanes: Count = 4, out: PlaceOrUrl | None = None) -> int:
    """Synthesise a core with Yosys and count its cells.

    Args:
      width: Of the model; the registers are as long as its GLU is wide.
      lanes: Elements handled in a cycle.
      out: Folder for Yosys' files, or its URL; default: a temporary one.
    """
    glu = ModelConfig(hidden_size=width).glu_size
    machine = Machine(lanes=lanes, vector_length=max(width, glu))
    import_optional("amaranth", "mmfree hardware cells", install_command("hardware"))
    from mmfree_jax.experiments.accelerator.rtl.verilog import cell_counts

    if out is None:
        with tempfile.TemporaryDirectory(prefix="mmfree-rtl-") as temporary:
            counts = cell_counts(machine, Path(temporary))
    else:
        with new_folder(out, command="hardware cells", overwrite=True) as folder:
            counts = cell_counts(machine, folder)
    title = f"d = {width}, registers of {machine.vector_length}, {lanes} lanes"
    table = Table("module", title=title, title_justify="left")
    for name in ("6-input LUTs", "flip-flops", "multipliers", "memory bits"):
        table.add_column(name, justify="right")
    for module, own in counts.items():
        if module == "total":
            table.add_section()
        table.add_row(module, *(f"{n:,}" for n in vars(own).values()))
    Console(width=100).print(table)
    return 0


@dataclasses.dataclass(frozen=True)
class _ReportArguments:
    preset: str | None
    """Named size, in place of 370M, 1.3B and 2.7B."""
    config: PlaceOrUrl | None
    """YAML file over it, or its URL."""
    run: PlaceOrUrl | None
    """Run directory, or its URL, instead of either."""
    cores: Annotated[int, Range(1, 64)]
    """Cores, each with a token stream of its own, on four memory channels."""
    json: bool
    """Print JSON instead of tables."""
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")]


def report(argv: Sequence[str]) -> int:
    """Compare with the paper's FPGA tables, and estimate any model's speed and energy."""
    from mmfree_jax.experiments.accelerator import paper
    from mmfree_jax.experiments.accelerator.performance import estimate, machines
    from mmfree_jax.experiments.accelerator.quantized import check_supported
    from mmfree_jax.experiments.accelerator.report import as_dict, show
    from mmfree_jax.presets import preset

    base = base_config(argv, run_flag="--run")
    arguments = parse(
        _ReportArguments,
        argv,
        prog="mmfree hardware report",
        description="Rows of the paper's Tables 4 and 5 beside fitted laws, what does not agree, "
        "and latency, tokens/s, power and energy a token of 370M, 1.3B, 2.7B and the model that "
        "the flags of `mmfree train` describe.",
        default=_ReportArguments(None, None, None, 1, False, base),
    )
    sizes = {name: preset(name).model for name in ("370M", "1.3B", "2.7B")}
    own = with_vocabulary(argv, arguments.settings, run_flag="--run").model
    if own != TrainConfig().model:
        check_supported(own)
        sizes = {arguments.preset or f"{own.num_layers} layers of {own.hidden_size}": own}
    laws = paper.fit()
    estimates = {
        name: [
            estimate(config, machine, laws, name=label, cores=arguments.cores)
            for label, machine in machines(laws)
        ]
        for name, config in sizes.items()
    }
    rows, notes = paper.predictions(laws), paper.inconsistencies(laws)
    if arguments.json:
        print(json.dumps(as_dict(laws, rows, notes, estimates), indent=1))
    else:
        console = Console()
        wide = console if console.is_terminal else Console(width=120)
        show(wide, laws, rows, notes, estimates)
    return 0
