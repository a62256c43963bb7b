"""`mmfree data prepare` and `mmfree data inspect`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.progress import Display, show_progress
from mmfree_jax.ranges import CountOrZero
from mmfree_jax.readable import indented, printable

if TYPE_CHECKING:
    from mmfree_jax.data.dataset_index import DatasetIndex
    from mmfree_jax.data.prepare import PrepareProgress

_PREPARING = "preparing"


def prepare(argv: Sequence[str]) -> int:
    """Turn text files into a prepared data set."""
    from mmfree_jax.data.prepare import PrepareConfig, prepare_dataset

    config = parse(PrepareConfig, argv, prog="mmfree data prepare")
    start = time.monotonic()
    with show_progress("starting workers") as show:
        index, worked = prepare_dataset(config, _shown_on(show))
    seconds = time.monotonic() - start
    if not worked:
        print(f"{config.out} holds this data set already")
    _print_summary(index)
    for line in _reading_lines(index):
        print(line)
    if worked:
        print(f"prepared in {seconds:.1f} s")
    return 0


@dataclass(frozen=True)
class InspectConfig:
    """Show what a prepared data set holds."""

    path: Annotated[PlaceOrUrl, tyro.conf.Positional]
    """Folder written by `mmfree data prepare`, or its URL."""
    verify: bool = False
    """Read every shard and compare its checksums."""
    samples: CountOrZero = 1
    """Documents of each split to show."""
    sample_tokens: CountOrZero = 32
    """Tokens of each to show."""


def inspect(argv: Sequence[str]) -> int:
    """Show what a prepared data set holds, and check it."""
    from mmfree_jax.data.dataset import open_dataset
    from mmfree_jax.data.dataset_index import load_index
    from mmfree_jax.data.shards import made_again
    from mmfree_jax.data.verification import verify_checksums
    from mmfree_jax.errors import DataError

    config = parse(InspectConfig, argv, prog="mmfree data inspect")
    index = load_index(config.path)
    _print_summary(index)
    for line in _reading_lines(index):
        print(line)
    if config.verify:
        with show_progress("comparing the checksums of all shards"):
            problems = verify_checksums(index)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise DataError(f"{problems[0]}{more}: {made_again(index.path)}")
        print("checksums: all shards are as they were written")
    if config.samples:
        _print_samples(index, config, open_dataset)
    return 0


def _print_summary(index: "DatasetIndex") -> None:
    from rich.console import Console
    from rich.table import Table

    tokenizer = index.tokenizer
    console = Console(highlight=False)
    console.print(f"data set   {index.path} ({index.token_dtype} tokens)", markup=False)
    console.print(
        f"tokenizer  {tokenizer.get('kind')}, {tokenizer['vocab_size']:,} tokens, "
        f"bos {tokenizer.get('bos_id')}, eos {tokenizer.get('eos_id')}, "
        f"sha256 {str(tokenizer.get('sha256'))[:16]}"
    )
    table = Table("split", title_justify="left")
    for name in ("documents", "tokens", "text MB", "bytes/token", "shards"):
        table.add_column(name, justify="right")
    for split, shards in index.splits.items():
        tokens, documents = sum(s.tokens for s in shards), sum(s.documents for s in shards)
        size = sum(s.bytes for s in shards)
        table.add_row(
            split,
            f"{documents:,}",
            f"{tokens:,}",
            f"{size / 1e6:,.2f}",
            f"{size / max(1, tokens):.3f}",
            f"{len(shards):,}",
        )
    console.print(table)
    left_out = {
        "empty": "empty documents",
        "bad_records": "malformed records",
        "cut": "cuts in long documents",
        "unknown_tokens": "unknown tokens",
    }
    counts: dict[str, int] = index.source.get("counts", {})
    notes = [f"{counts[k]:,} {text}" for k, text in left_out.items() if counts.get(k)]
    if notes:
        console.print("also       " + ", ".join(notes))


def _reading_lines(index: "DatasetIndex") -> list[str]:
    """What was read of each input; nothing for data sets from before that was kept."""
    from mmfree_jax.data.reading import InputReading, reading_lines

    readings = [InputReading.from_json(r) for r in index.source.get("readings", ())]
    return reading_lines(readings, index.source.get("settings", {}).get("txt_separator"))


def _print_samples(index: "DatasetIndex", config: InspectConfig, open_dataset: Any) -> None:
    from mmfree_jax.data.tokenizer import load_tokenizer, tokenizer_folder

    folder = tokenizer_folder(index.path)
    tokenizer = None if folder is None else load_tokenizer(folder)
    for split in index.splits:
        dataset = open_dataset(config.path, split)
        count = min(config.samples, dataset.num_documents)
        for k in range(count):
            # Spread over the split: neighbours are often alike.
            i = k * dataset.num_documents // count
            ids = dataset.document(i)
            shown = ids[: config.sample_tokens]
            more = " ..." if len(ids) > len(shown) else ""
            print(f"\n{split} document {i} ({len(ids):,} tokens)")
            print(f"  ids   {' '.join(map(str, shown))}{more}")
            if tokenizer is not None:
                print(f"  text{more}\n{indented(tokenizer.decode(shown))}")


def _shown_on(show: Display) -> "Callable[[PrepareProgress], None]":
    """Shows how far a preparation is."""
    start = time.monotonic()

    def update(p: "PrepareProgress") -> None:
        if show.state.stage != _PREPARING:  # the workers are there
            show.stage(_PREPARING)
        rate = p.text_bytes / 1e6 / max(1e-9, time.monotonic() - start)
        show.update(
            p.read_bytes,
            p.total_bytes,
            f"{p.tokens:,} tokens",
            f"{rate:.1f} MB/s",
            f"{p.documents:,} documents",
            printable(Path(p.file).name),
        )

    return update
