"""A run's compiled programs, kept whole, so that a later start neither traces nor compiles them.

JAX's own cache keeps what the compiler made, under a name that it finds by tracing a program and
lowering its kernels, which takes seconds each. Here the name is a digest of all that decides what
the program is: our source files, the packages, the devices, the settings of XLA and JAX, the
config that it is traced from, and its arguments. What is loaded is the executable that an earlier
start compiled, bit for bit.

The folder lies in that of JAX's cache, whose switches and bound hold, and belongs to the user
alone: what is loaded from it is run. Only the `mmfree` command keeps programs, whose code is what
is on disk; a notebook's may be another. Runs with code of the user's own keep none, nor do runs of
several processes. A file that cannot be used is told of once, and made anew.

A program that is to be kept is compiled without JAX's cache: jaxlib cannot write a program for a
CPU that it has read itself (0.10.2, 0.11.2: "Function ... not found" when it is run).
"""

import contextlib
import functools
import hashlib
import os
import pickle
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh

from mmfree_jax import compiled_programs
from mmfree_jax.config import TrainConfig
from mmfree_jax.errors import OutputError
from mmfree_jax.files import is_leftover, write_bytes
from mmfree_jax.mixer_pattern import is_own

_FOLDER = "whole"
"""Below the folder of JAX's cache."""
_MOST_BYTES = 4 * 2**30
"""What was used least recently goes beyond it, where JAX's cache has no bound."""
_SUFFIX = ".program"
_BEGINS = b"mmfree_jax program 1\n"
_OLD_SECONDS = 3600.0
"""Age at which what a killed writer left is removed."""
_PACKAGES = re.compile(
    r"(jax|flax|optax|chex|numpy|scipy|ml.dtypes|opt.einsum|nvidia|libtpu|triton)", re.IGNORECASE
)
_VARIABLES = re.compile(r"(XLA|LIBTPU|TPU|TF|NVIDIA|CUBLAS|CUDNN|CUDA|NCCL|LD)_|TRITON|MOSAIC")
_NOT_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")
"""Runs beside each other, each on a GPU of one kind, share their programs."""


class Programs:
    """The programs of a run in this process: loaded where they are kept, else made and kept.

    Attributes:
      loaded: programs that an earlier start had made.
      made: programs that were compiled here.
    """

    def __init__(self, mesh: Mesh, config: TrainConfig) -> None:
        self.loaded, self.made = 0, 0
        self._mesh = mesh
        self._note: str | None = None
        self._was_told = False
        self._folder = self._open(_folder_of(config))

    def take_note(self) -> str | None:
        """What there is to say of the folder; once a process at most."""
        note, self._note = self._note, None
        return note

    def get(
        self, name: str, make: Callable[[], Any], config: TrainConfig, args: tuple[Any, ...]
    ) -> Callable[..., Any]:
        """A compiled program.

        Args:
          name: which program it is of those that are made of this config.
          make: gives the jitted function, made of nothing but `name`, `config` and the mesh.
          config: all that the program is traced from.
          args: its arguments, by position; only their types and places count.

        Returns:
          What takes such arguments.
        """
        if self._folder is None:
            self.made += 1
            return make().lower(*args).compile()
        key = _key(name, config, self._mesh, args)
        path = self._folder / (key + _SUFFIX)
        if (found := self._load(path, key)) is not None:
            self.loaded += 1
            return found
        self.made += 1
        if not os.access(self._folder, os.W_OK | os.X_OK):
            self._tell(f"{self._folder} cannot be written: what is compiled is not kept there")
            return make().lower(*args).compile()
        with _without_the_cache_of_jax():
            compiled = make().lower(*args).compile()
        self._save(path, key, compiled)
        return compiled

    def later(self, name: str, make: Callable[[], Any], config: TrainConfig) -> Callable[..., Any]:
        """As `get`, when it is first called; one program for each structure of arguments."""
        if self._folder is None:
            self.made += 1
            return make()
        found: dict[Any, Callable[..., Any]] = {}

        def call(*args: Any) -> Any:
            structure = jax.tree.structure(args)
            if structure not in found:
                found[structure] = self.get(name, make, config, args)
            return found[structure](*args)

        return call

    def _tell(self, note: str) -> None:
        if not self._was_told:
            self._note, self._was_told = note, True

    def _open(self, folder: Path | None) -> Path | None:
        """The folder, made where it is missing; None: it cannot be, or is not ours alone."""
        if folder is None:
            return None
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = os.lstat(folder)
        except OSError:  # as with JAX's cache, which is then not kept either
            return None
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            if not stat.S_IMODE(found.st_mode) & 0o077:
                return folder
            way_out = f"chmod 700 {folder}"
        else:
            way_out = f"remove {folder}, or set JAX_COMPILATION_CACHE_DIR to a folder of your own"
        self._tell(
            f"no compiled programs are kept in {folder}, which is not this user's alone: {way_out}"
        )
        return None

    def _load(self, path: Path, key: str) -> Callable[..., Any] | None:
        try:
            found = path.read_bytes()
        except OSError:
            return None
        head, body = found[: len(_BEGINS) + 32], found[len(_BEGINS) + 32 :]
        try:
            if head != _BEGINS + _digest_of(key, body):
                raise ValueError("it is damaged")
            serialized, inputs, outputs = pickle.loads(body)
            program = deserialize_and_load(
                serialized,
                jax.tree.structure(inputs),
                jax.tree.structure(outputs),
                execution_devices=list(self._mesh.devices.flat),
            )
        except Exception as e:  # whatever a file of another's making may raise
            reason = (str(e) or type(e).__name__).splitlines()[0]
            self._tell(f"{path} cannot be used ({reason}) and is made anew")
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used last
        return program

    def _save(self, path: Path, key: str, compiled: Any) -> None:
        try:
            serialized, inputs, outputs = serialize(compiled)
            # Structures as they are taken apart, whatever classes they are of.
            trees = (tree.unflatten(range(tree.num_leaves)) for tree in (inputs, outputs))
            body = pickle.dumps((serialized, *trees))
        except Exception as e:  # jaxlib raises any kind
            reason = (str(e) or type(e).__name__).splitlines()[0]
            self._tell(f"a compiled program cannot be kept ({reason})")
            return
        try:
            limit = _limit()
            if len(body) <= limit:
                write_bytes(path, b"".join((_BEGINS, _digest_of(key, body), body)))
                _bound(path.parent, limit)
        except (OSError, OutputError) as e:
            self._tell(f"compiled programs are not kept: {e}")


def _folder_of(config: TrainConfig) -> Path | None:
    """Where a run's programs are kept; None: they are not."""
    cache = jax.config.values["jax_compilation_cache_dir"]
    own_code = config.optimizer.factory is not None or any(map(is_own, config.model.layer_mixers))
    dumps = "--xla_dump" in os.environ.get("XLA_FLAGS", "") or jax.config.values["jax_dump_ir_to"]
    if (
        not jax.config.values["jax_enable_compilation_cache"]
        or not cache
        or "://" in cache
        or own_code
        or dumps
        or jax.process_count() > 1
        or "dev" in jax.__version__  # whose version says little of its source
        or _sources() is None
    ):
        return None
    return Path(cache).absolute() / _FOLDER


@functools.cache
def _sources() -> str | None:
    """A digest of our source files; None: they may not be what this process runs."""
    began = compiled_programs.command_began()
    if began is None:
        return None
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for root in (package, (package / "pallas_kernels").resolve()):
        for folder, _, names in sorted(os.walk(root)):
            for name in sorted(names):
                if name.endswith((".py", ".json")):
                    path = Path(folder, name)
                    # Not the time that a copy may bring along, but that of this machine.
                    if path.stat().st_ctime >= began - 1:
                        return None
                    content = hashlib.sha256(path.read_bytes()).hexdigest()
                    digest.update(f"{path.relative_to(root)} {content}\n".encode())
    return digest.hexdigest()


@functools.cache
def _surroundings() -> str:
    """What of this machine and process decides what a program becomes, beside our sources."""
    packages = {
        f"{found.name} {found.version}"
        for found in metadata.distributions()
        if _PACKAGES.match(found.name)
    }
    variables = {
        f"{name}={value}"
        for name, value in os.environ.items()
        if _VARIABLES.match(name) and name not in _NOT_VARIABLES
    }
    driver = Path("/proc/driver/nvidia/version")
    with contextlib.suppress(OSError):
        packages.add(driver.read_text(errors="replace"))
    settings = {
        f"{name}={value}" for name, value in jax.config.values.items() if "_cache_" not in name
    }
    lines = [sys.version, compiled_programs.processor(), str(os.cpu_count())]
    return "\n".join([*lines, *sorted(packages), *sorted(variables), *sorted(settings)])


def _key(name: str, config: TrainConfig, mesh: Mesh, args: tuple[Any, ...]) -> str:
    devices = [
        (d.id, d.platform, d.device_kind, getattr(d, "coords", None), getattr(d, "core_count", 0))
        for d in mesh.devices.flat
    ]
    first = mesh.devices.flat[0]
    parts = (
        name,
        repr(config),
        str(_sources()),
        _surroundings(),
        first.client.platform_version,
        getattr(first, "compute_capability", None),
        jax.device_count(),
        devices,
        repr(mesh),
        jax.sharding.get_abstract_mesh(),
        *map(_described, jax.tree_util.tree_leaves_with_path(args)),
    )
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _described(leaf: tuple[Any, Any]) -> str:
    """Path, type and place of an argument."""
    path, value = leaf
    kind, weak = jax.typeof(value), getattr(value, "weak_type", None)
    # Which device has what of it, in whatever words a sharding says so: the state of a run that
    # goes on from a checkpoint takes the program of one that begins.
    parts = value.sharding.devices_indices_map(value.shape).items()
    place = {device.id: index for device, index in parts}
    return (
        f"{jax.tree_util.keystr(path)} {kind.shape} {kind.dtype} {weak} {value.committed} {place}"
    )


def _digest_of(key: str, body: bytes) -> bytes:
    return hashlib.sha256(key.encode() + body).digest()


@contextlib.contextmanager
def _without_the_cache_of_jax() -> Iterator[None]:
    """Has JAX compile what it may have compiled before; `reset_cache` has it look anew."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def _limit() -> int:
    """Bytes that all programs may take."""
    most = jax.config.values["jax_compilation_cache_max_size"]
    return _MOST_BYTES if most < 0 else most


def _bound(folder: Path, limit: int) -> None:
    """Removes what was used least recently beyond the limit, and what killed writers left."""
    entries = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            found = path.stat()
            if path.suffix == _SUFFIX:
                entries.append((found.st_mtime_ns, path, found.st_size))
            elif is_leftover(path.name) and time.time() - found.st_mtime > _OLD_SECONDS:
                path.unlink()
    taken = sum(size for _, _, size in entries)
    for _, path, size in sorted(entries):
        if taken <= limit:
            return
        path.unlink(missing_ok=True)
        taken -= size
