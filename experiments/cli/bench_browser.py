"""`mmfree bench browser`: an export's web page, measured in headless Chromium."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfree_jax.cli.parse import parse
from mmfree_jax.fetched import local_copy
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.ranges import Count, TwoOrMore


@dataclass(frozen=True)
class BenchBrowserConfig:
    """Time an export's web page in headless Chromium, and the export in onnxruntime."""

    export: PlaceOrUrl
    """Folder that `mmfree export onnx` wrote, or its URL."""
    tokenizer: PlaceOrUrl | None = None
    """Tokenizer file or folder, or its URL; None: the one in the export."""
    tokens: TwoOrMore = 200
    """Tokens to generate, greedily; a browser translates the runtime to fast code meanwhile."""
    threads: Count = 2
    """Threads of either runtime."""


def bench_browser(argv: Sequence[str]) -> int:
    """Time an export's web page in headless Chromium, and the export in onnxruntime.

    Args:
      argv: the arguments behind `mmfree bench browser`.

    Returns:
      The exit code.

    Raises:
      MMFreeError: bad input, something that is not installed, or the page failed.
    """
    config = parse(BenchBrowserConfig, argv, prog="mmfree bench browser")
    from mmfree_jax.data.tokenizer import load_tokenizer
    from mmfree_jax.experiments.bench.browser import measure
    from mmfree_jax.export import manifest

    export = local_copy(config.export, "export")
    manifest.read(export)
    tokenizer = load_tokenizer(config.tokenizer or export)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(
            export, tokenizer, Path(folder), tokens=config.tokens, threads=config.threads
        )
    page, native = (row["tokens"] for row in rows)
    equal = next((i for i, (a, b) in enumerate(zip(page, native, strict=False)) if a != b), None)
    for row in rows:
        peak = "" if row["peak_mib"] is None else f", peak of the page {row['peak_mib']:,.0f} MiB"
        print(
            f"{row['runtime']}: ready after {row['load_s']:.1f} s, {row['tokens_per_s']:.4g} "
            f"tokens/s{peak}"
        )
    if equal is None:
        print(f"all {len(page)} tokens are the same")
    else:
        print(f"the first {equal} tokens are the same")
    return 0
