"""From records to token ids: what worker processes of `prepare` do. No JAX here."""

import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import connection, parent_process
from typing import Any

import numpy as np

from mmfree_jax.data.dataset import HELDOUT, TRAIN
from mmfree_jax.data.reading import Tally
from mmfree_jax.data.sources import ReadOptions, RecordBatch
from mmfree_jax.data.tables import split_name
from mmfree_jax.data.text_split import cut_document
from mmfree_jax.data.tokenizer import Tokenizer, load_tokenizer
from mmfree_jax.errors import DataError


@dataclass(frozen=True)
class EncodeOptions:
    """How records become token ids."""

    tokenizer: str
    """Folder or name of the tokenizer."""
    read: ReadOptions
    """How records become documents."""
    heldout_fraction: float
    """Share of documents that go to the held-out split."""
    seed: int
    """Decides which those are."""
    skip_bad_records: bool
    """Count malformed records instead of raising an error."""


@dataclass
class EncodedSplit:
    """Documents of one split, end to end."""

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray


@dataclass
class EncodedBatch:
    """What has become of a `RecordBatch`."""

    file: str
    """Path of the file."""
    next_record: int
    """Number of the file's record that follows."""
    position: int
    """How far the file has been read (bytes on disk)."""
    splits: dict[str, EncodedSplit] = field(default_factory=dict)
    """Documents of each split that has any."""
    place: int = 0
    """Which of the inputs the file comes from."""
    tally: Tally = field(default_factory=Tally)
    """What was read and left out."""
    num_bytes: int = 0
    """UTF-8 bytes of all documents."""


class BadRecord(ValueError):
    """A malformed record. `reason` is the same for all of a kind; the message says more."""

    def __init__(self, reason: str, message: str | None = None) -> None:
        super().__init__(message or reason)
        self.reason = reason


def read_documents(
    batch: RecordBatch, options: ReadOptions, *, skip_bad: bool, tally: Tally
) -> Iterator[bytes]:
    """The documents of a batch as UTF-8, without the empty ones.

    Args:
      batch: records.
      options: how they become documents.
      skip_bad: count malformed records instead of raising.
      tally: what is left out is added to it.

    Raises:
      DataError: a record is malformed; the message names the file and the record.
    """
    tally.cut += batch.cut
    tally.separators += batch.separators
    for i, record in enumerate(batch.records):
        if batch.kind == "json" and not record.strip():
            continue  # a blank line
        try:
            text = _text_of(record, batch.kind, batch.text_field)
        except BadRecord as e:
            if skip_bad:
                tally.leave_out(e.reason)
                continue
            unit = {"json": "line", "row": "row", "text": "document"}[batch.kind]
            raise DataError(
                f"{batch.file}, {unit} {batch.first + i + 1}: {e}; repair it, or leave such "
                "records out with --skip-bad-records"
            ) from e
        if not text.strip():
            tally.empty += 1
            continue
        pieces = list(cut_document(text, options.max_document_bytes))
        tally.cut += len(pieces) - 1
        yield from pieces


def _text_of(record: bytes | str | None, kind: str, text_field: str) -> bytes:
    """A record's text as UTF-8; BadRecord says what is wrong with it."""
    if record is None:
        return b""
    if kind != "json" and isinstance(record, bytes):
        try:
            record.decode("utf-8")
        except UnicodeDecodeError as e:
            raise BadRecord("not UTF-8", f"byte {e.start} is not UTF-8") from e
        return record
    if kind == "json":
        try:
            values = json.loads(record, object_pairs_hook=_Fields)
        except UnicodeDecodeError as e:
            raise BadRecord("not UTF-8", f"byte {e.start} is not UTF-8") from e
        except ValueError as e:
            raise BadRecord("not JSON", f"not JSON ({e})") from e
        except RecursionError as e:
            raise BadRecord("not JSON", "not JSON that can be read (nested too deeply)") from e
        if not isinstance(values, _Fields):
            raise BadRecord("not a JSON object")
        record = _field(values, text_field)
        if record is None:
            return b""
        if not isinstance(record, str):
            raise BadRecord(f"field {text_field!r} is {type(record).__name__}, not text")
    assert isinstance(record, str)
    try:
        return record.encode("utf-8")
    except UnicodeEncodeError as e:
        raise BadRecord(
            "half a surrogate pair", f"character {e.start} is half of a surrogate pair"
        ) from e


class _Fields(dict[str, Any]):
    """A JSON object that remembers which of its keys occur more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs] if len(self) < len(pairs) else []
        self.repeated = {name for name in names if names.count(name) > 1}


def _field(values: _Fields, text_field: str) -> Any:
    """The value of a field: "a.b" is that field if there is one, else b in a."""
    found = _look_up(values, text_field)
    if not found:
        names = ", ".join(map(str, values))
        reason = f"no field {text_field!r}"
        raise BadRecord(reason, f"{reason} (it has: {names}; see --text-field)")
    return found[0]


def _look_up(values: _Fields, text_field: str) -> list[Any]:
    """The value of a field, in a list; an empty list where there is none."""
    for head, rest in split_name(text_field):
        if head not in values:
            continue
        inner = values[head]
        found = [inner]
        if rest and inner is not None:
            found = _look_up(inner, rest) if isinstance(inner, _Fields) else []
        if found or head in values.repeated:
            if head in values.repeated:
                raise BadRecord(f"field {head!r} occurs twice")
            return found
    return []


def is_heldout(text: bytes, fraction: float, seed: int) -> bool:
    """Whether a document belongs to the held-out split: by its hash, wherever it comes from."""
    key = (seed % 2**64).to_bytes(8, "little")
    digest = hashlib.blake2b(text, digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def encode_batch(batch: RecordBatch, tokenizer: Tokenizer, options: EncodeOptions) -> EncodedBatch:
    """Reads the documents of a batch, puts each into its split and tokenises it."""
    result = EncodedBatch(
        batch.file,
        batch.first + len(batch.records),
        batch.position,
        place=batch.place,
    )
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    start = [] if tokenizer.bos_id is None else [np.array([tokenizer.bos_id], dtype)]
    end = [] if tokenizer.eos_id is None else [np.array([tokenizer.eos_id], dtype)]
    parts: dict[str, list[np.ndarray]] = {TRAIN: [], HELDOUT: []}
    lengths: dict[str, list[int]] = {TRAIN: [], HELDOUT: []}
    sizes: dict[str, list[int]] = {TRAIN: [], HELDOUT: []}
    tally = result.tally
    for text in read_documents(batch, options.read, skip_bad=options.skip_bad_records, tally=tally):
        ids = tokenizer.encode_array(decoded := text.decode("utf-8"))
        tally.lost_characters += tokenizer.count_lost(decoded)
        if len(ids) == 0:
            tally.empty += 1
            continue
        if int(ids.max()) >= tokenizer.vocab_size or int(ids.min()) < 0:
            raise DataError(
                f"the tokenizer made id {int(ids.max())}, beyond its vocabulary of "
                f"{tokenizer.vocab_size}: it is damaged; give another"
            )
        if tokenizer.unk_id is not None:
            tally.unknown_tokens += int(np.count_nonzero(ids == tokenizer.unk_id))
        tally.documents += 1
        heldout = is_heldout(text, options.heldout_fraction, options.seed)
        split = HELDOUT if heldout else TRAIN
        parts[split] += [*start, ids.astype(dtype), *end]
        lengths[split].append(len(start) + len(ids) + len(end))
        sizes[split].append(len(text))
        result.num_bytes += len(text)
    for split, arrays in parts.items():
        if arrays:
            result.splits[split] = EncodedSplit(
                np.concatenate(arrays),
                np.array(lengths[split], np.int64),
                np.array(sizes[split], np.int64),
            )
    return result


_worker: tuple[Tokenizer, EncodeOptions] | None = None


def start_worker(options: EncodeOptions) -> None:
    """Initialises a worker process: its tokenizer, and ending when its parent does."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = parent_process()
    if parent is not None:
        # A killed parent would leave its workers waiting for work for ever.
        def follow() -> None:
            connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
    _worker = load_tokenizer(options.tokenizer), options


def work(batch: RecordBatch) -> EncodedBatch:
    """`encode_batch` in a worker process."""
    assert _worker is not None
    return encode_batch(batch, *_worker)


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """A process that is spawned meanwhile does not run this one's script first.

    Python does so, and a script that has no `if __name__ == "__main__":` would begin anew in each
    worker. What workers need comes from this package alone.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def encode_in_order(
    batches: Iterable[RecordBatch], options: EncodeOptions, workers: int
) -> Generator[EncodedBatch, None, None]:
    """Encodes batches in worker processes; yields the results in the order of the batches.

    At most two batches a worker are under way. Workers are spawned, not forked, so they
    inherit no threads or locks, and never import JAX.

    Raises:
      DataError: the first malformed record in order, or a worker was killed.
    """
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(options,),
    )
    pending: collections.deque[Future[EncodedBatch]] = collections.deque()
    try:
        for batch in batches:
            with _main_hidden():  # this is where workers are spawned
                pending.append(executor.submit(work, batch))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as e:
        raise DataError(
            f"one of the {workers} worker processes was killed, most likely for memory: set fewer "
            "--workers or a smaller --max-document-mib, and run the same command again to go on"
        ) from e
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
