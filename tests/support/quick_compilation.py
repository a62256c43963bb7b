"""XLA's flags and JAX's settings by which the tests and the processes that they start compile.

Compilation takes most of the tests' time. LLVM does not optimise, and fusions are emitted as
LLVM's own code, without the passes over MLIR that took two fifths of a training step's
compilation: jax 0.12 knows the preset, earlier ones the option, and XLA leaves an option that it
does not know aside. Nor is a module of LLVM split into parts that threads compile, which takes a
fifth more in all. A program that was compiled once is read from a folder where it is asked for
again: by another test, or by a process that a test starts.
"""

FLAGS = (
    "--xla_backend_optimization_level=0 "
    "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)


def cached_in(folder: str) -> dict[str, str]:
    """Environment of processes that keep every compiled program in a folder."""
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
