"""Shared fixtures: simulated devices, small disks, reference files and prepared data."""

import atexit
import contextlib
import gc
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import quick_compilation

# Before numpy is imported: two test processes with two threads each get into each other's way.
for _library in ("OPENBLAS", "OMP"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")

# Before jax is imported: eight simulated devices, so that every mesh shape can be tested, and
# quick compilation, which takes most of the tests' time.
for _flag in ("--xla_force_host_platform_device_count=8", *quick_compilation.FLAGS.split()):
    if _flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

# What commands compile is kept for these tests alone; their workers inherit the folder.
if "XDG_CACHE_HOME" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="mmfree-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# What tests and their children compile is kept for this worker: another one could read a file that
# is half written, and JAX's lock, which hinders that, comes with a look at every file.
_COMPILED = tempfile.TemporaryDirectory(prefix="mmfree-compiled-")
os.environ |= quick_compilation.cached_in(_COMPILED.name)

# A shell starts what it puts into the background with the first two ignored, and `nohup` the last,
# and every child of ours would inherit that: tests interrupt children and close their terminals.
for _signal, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _handler)

# numpy and jax read the above when they are first imported.
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from bucket_servers import Bucket, BucketServer, new_bucket, serve_gcs, serve_s3  # noqa: E402

from mmfree_jax.data import writer  # noqa: E402

# Hypothesis draws the same cases each time, and fails nobody for being slow to do so. To have it
# draw others: `pytest --hypothesis-profile=default`. The environment of `make torch` has none.
with contextlib.suppress(ImportError):
    import hypothesis

    hypothesis.settings.register_profile(
        "same",
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("same")

_DATA = Path(__file__).resolve().parent / "data"

# Traced programs live long, and to look through all of them for garbage took a tenth of the time.
gc.freeze()
gc.set_threshold(20_000, 20, 1_000)
_memory_kept = 2 << 30


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tutorials, which take minutes, unless `-m tutorial` asks for them."""
    if "tutorial" not in config.getoption("markexpr"):
        left_out = [item for item in items if item.get_closest_marker("tutorial")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _resident() -> int:
    """Bytes of memory of this process; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module", autouse=True)
def _memory() -> Iterator[None]:
    """Drops compiled programs and garbage between modules, at 2 GiB and after each further half.

    The process keeps much of what is freed, to use it again.
    """
    global _memory_kept
    yield
    if _resident() > _memory_kept:
        jax.clear_caches()
        gc.collect()
        _memory_kept = _resident() + (1 << 29)


@pytest.fixture(scope="session")
def authors_package() -> Path:
    """The folder of a small model and what the authors' package computes with it."""
    return _DATA / "authors_package"


@pytest.fixture(scope="session")
def mistral_model() -> Path:
    """Mistral's SentencePiece model."""
    return _DATA / "mistral_tokenizer" / "mistral_v1.model"


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many KiB and gives its folder; skips where that is not allowed."""
    folders = []

    def make(kib: int) -> Path:
        folder = tmp_path / f"disk {len(folders)}"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("cannot mount a small disk here")
        folders.append(folder)
        return folder

    yield make
    for folder in folders:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def full_disk(make_disk: Callable[[int], Path]) -> Path:
    """A folder on a disk of its own with room for 16 KiB."""
    return make_disk(16)


_WORDS = ["we", "hold", "these", "truths", "to", "be", "self", "evident", "that", "all", "are"]


def _documents(seed: int, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    texts = (" ".join(rng.choice(_WORDS, rng.integers(5, 40))) for _ in range(count))
    return [np.frombuffer(text.encode(), np.uint8) for text in texts]


@pytest.fixture(scope="session")
def byte_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of byte tokens, with a held-out split."""
    folder = tmp_path_factory.mktemp("data") / "words"
    identity = {"kind": "byte", "vocab_size": 256, "sha256": "0", "bos_id": None, "eos_id": None}
    splits = {"train": _documents(0, 120), "heldout": _documents(1, 20)}
    writer.write_dataset(folder, splits, identity)
    return folder


@pytest.fixture(scope="session")
def save_model():
    """Writes a model folder and opens it: (folder, config, params, tokenizer folder) -> model."""
    from mmfree_jax.saved.model_folder import write_model
    from mmfree_jax.saved.open_model import open_model

    def save(folder, config, params, tokenizer=None):
        folder.mkdir(parents=True)
        write_model(folder, config, params)
        if tokenizer is not None:
            shutil.copytree(tokenizer, folder / "tokenizer")
        return open_model(folder)

    return save


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[BucketServer]:
    """The GCS emulator of this process; see tests/support/bucket_servers.py."""
    for package in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(package)
    with serve_gcs() as server:
        yield server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[BucketServer]:
    """The S3 server of this process; see tests/support/bucket_servers.py."""
    for package in ("s3fs", "moto", "flask_cors"):
        pytest.importorskip(package)
    with serve_s3() as server:
        yield server


@pytest.fixture
def gcs_bucket(gcs_server: BucketServer) -> Iterator[Bucket]:
    """An empty bucket of the GCS emulator."""
    with new_bucket(gcs_server) as bucket:
        yield bucket


@pytest.fixture
def s3_bucket(s3_server: BucketServer) -> Iterator[Bucket]:
    """An empty bucket of the S3 server."""
    with new_bucket(s3_server) as bucket:
        yield bucket


@pytest.fixture(params=["gcs", "s3"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    """An empty bucket, of each server."""
    return request.getfixturevalue(f"{request.param}_bucket")
