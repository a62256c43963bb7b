"""A run that takes seconds, started as several real processes on this machine's CPUs."""

import io
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import quick_compilation

from mmfree_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    OptimizerConfig,
    TrainConfig,
)
from mmfree_jax.config_io import dump_yaml
from mmfree_jax.launch.local import Plan, mmfree_command, run
from mmfree_jax.model_config import LinearConfig, ModelConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def pod_config(byte_data: Path) -> TrainConfig:
    """A run whose batch divides over 1, 2, 3, 4 and 8 devices."""
    # Not quantised: a sum in another order may otherwise turn a trit, which shows in the loss.
    linear = LinearConfig(ternary_weights=False, int8_activations=False)
    return TrainConfig(
        steps=72,
        batch_size=24,
        model=ModelConfig(
            vocab_size=256,
            hidden_size=24,
            num_layers=2,
            intermediate_size=24,
            compute_dtype="float32",
            residual_dtype="float32",
            remat="none",
            mixer_linear=linear,
            glu_linear=linear,
            head_linear=linear,
        ),
        data=DataConfig(paths=(str(byte_data),), seq_len=16),
        # A large eps: Adam must not blow a gradient of rounding noise up to a full step.
        optimizer=OptimizerConfig(learning_rate=2e-3, eps=1e-3, schedule="constant"),
        checkpoint=CheckpointConfig(every_steps=8),
        eval=EvalConfig(every_steps=40, batches=2, sample_tokens=0),
        log=LogConfig(every_steps=1, ternary_every_steps=0, tensorboard=False, progress="plain"),
    )


@pytest.fixture(scope="session")
def pod_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process; programs are compiled once for all of them."""
    return os.environ | {
        "XLA_FLAGS": quick_compilation.FLAGS,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        **quick_compilation.cached_in(str(tmp_path_factory.mktemp("compiled"))),
    }


class Launch:
    """`mmfree launch local` in a thread, so that a test can meddle with its processes."""

    def __init__(self, plan: Plan, environ: dict[str, str]):
        self.out = io.StringIO()
        self.processes: list = []
        self.code: int | None = None
        started = threading.Event()

        def on_start(processes: list) -> None:
            self.processes = processes
            started.set()

        def work() -> None:
            self.code = run(plan, environ=environ, out=self.out, on_start=on_start)

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        assert started.wait(60)

    @property
    def text(self) -> str:
        return self.out.getvalue()

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for the condition; fails if the processes end before it."""
        while not condition():
            assert self._thread.is_alive(), self.text
            time.sleep(0.005)

    def wait(self) -> int:
        self._thread.join(timeout=240)
        assert self.code is not None, self.text
        return self.code


@pytest.fixture
def launch(pod_config: TrainConfig, pod_environment: dict[str, str], tmp_path: Path):
    """launch(n, run_dir, *flags) starts `mmfree train` as n processes.

    One that is slow, as on a busy machine, is silent for a while: only where a process is to be
    found out by its silence are the `silent_seconds` few.
    """
    launches = []
    config = tmp_path / "config.yaml"
    config.write_text(dump_yaml(pod_config))

    def start(
        count: int, run_dir: Path, *flags: str, grace: float = 60.0, silent_seconds: int = 120
    ) -> Launch:
        argv = ["train", "--config", str(config), "--run-dir", str(run_dir), *flags]
        argv += ["--processes.beat-seconds", "0.5"]
        argv += ["--processes.silent-seconds", str(silent_seconds)]
        plan = Plan(mmfree_command(argv), count, grace_seconds=grace)
        launches.append(Launch(plan, pod_environment))
        return launches[-1]

    yield start
    for one in launches:
        for process in one.processes:
            process.kill()
        one.wait()
