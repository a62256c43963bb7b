"""The study's text: which documents, under which name their losses are reported, in which files.

`python -m mmfree_jax.experiments.study.corpus --text ../shared/data --out data/study/text` reads
classic_books.jsonl.zst and english_mixed-*.jsonl.zst and writes NAME-00.jsonl.zst and so on, a
name for each group of sources, parts small enough to travel one at a time. `mmfree data prepare`
then makes a folder of each name, which is how a run tells its held-out losses apart.

Left out, so that a model trained on the rest can be given away: sources under CC BY-SA, and books
whose own heading gives a year after 1930.
"""

import argparse
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard

SHARE_ALIKE = ("perseus-latin-translations", "owasp", "owasp-cheatsheets", "d2l-en")
GROUPS: dict[str, tuple[str, ...]] = {
    "classic_books": ("classic-books",),
    "more_books": ("classic-books-rest", "common-library"),
    "gutenberg": ("gutenberg-text",),
    "novels": ("100-english-novels", "eltec-eng"),
    "old_spelling": ("ecco-tcp",),
    "modern_prose": ("digitalgov", "openstax-ccby", "frus-history", "factbook"),
    "abstracts": ("acl-abstracts",),
    "law": ("dc-law",),
    "proposals": (
        "peps", "rust-rfcs", "rust-book", "eips", "kubernetes-keps", "kubernetes-community",
        "ms-well-architected",
    ),
    "manuals": ("ms-powershell", "ms-cpp", "ms-win32"),
}  # fmt: skip
"""Name -> sources. `law` and `manuals` repeat stock phrases, so their losses flatter."""
LAST_YEAR = 1930
_YEAR = re.compile(r"^## Year: (\d{4})", re.MULTILINE)
_HEADING = 2000  # characters in which a book gives its year


@dataclass(frozen=True)
class Document:
    """A document of one of the sources."""

    source: str
    id: str
    text: str


def group_of(document: Document) -> str | None:
    """The name under which a document is kept; None: it is left out.

    Raises:
      KeyError: its source is in no group.
    """
    if document.source in SHARE_ALIKE:
        return None
    year = _YEAR.search(document.text[:_HEADING])
    if year is not None and int(year[1]) > LAST_YEAR:
        return None
    return {source: name for name, sources in GROUPS.items() for source in sources}[document.source]


def read(path: Path) -> Iterator[Document]:
    """The documents of a .jsonl.zst file, those without a source as of `classic-books`."""
    with path.open("rb") as file:
        # english_mixed has windows of 128 MiB, more than a reader takes by default.
        stream = zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(file)
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            record = json.loads(line)
            yield Document(record.get("source", "classic-books"), record["id"], record["text"])


class _Parts:
    """The files of one group; the next one is begun where one would grow too long."""

    def __init__(self, folder: Path, name: str, most_bytes: int, level: int) -> None:
        self._folder, self._name, self._most, self._level = folder, name, most_bytes, level
        self.count, self._written = 0, 0
        self._file: zstandard.ZstdCompressionWriter | None = None

    def write(self, line: bytes) -> None:
        """Adds a line to the newest part."""
        if self._file is None or self._written + len(line) > self._most:
            self.close()
            path = self._folder / f"{self._name}-{self.count:02d}.jsonl.zst"
            settings = zstandard.ZstdCompressionParameters.from_level(
                self._level, window_log=27, enable_ldm=True
            )
            writer = zstandard.ZstdCompressor(compression_params=settings)
            self._file = writer.stream_writer(path.open("wb"))
            self.count, self._written = self.count + 1, 0
        self._file.write(line)
        self._written += len(line)

    def close(self) -> None:
        """Ends the newest part."""
        if self._file is not None:
            self._file.close()


def write_corpus(paths: Sequence[Path], out: Path, most_bytes: int, level: int) -> dict[str, int]:
    """Writes the files of all groups; documents keep their order. Returns documents a name."""
    out.mkdir(parents=True)
    parts = {name: _Parts(out, name, most_bytes, level) for name in GROUPS}
    counts = dict.fromkeys((*GROUPS, "left out"), 0)
    for path in paths:
        for document in read(path):
            name = group_of(document)
            counts[name or "left out"] += 1
            if name is not None:
                line = json.dumps(vars(document), ensure_ascii=False)
                parts[name].write(line.encode() + b"\n")
    for part in parts.values():
        part.close()
    return counts


def main() -> None:
    """Reads the arguments and prints how many documents each name has."""
    parser = argparse.ArgumentParser(description="Write the text of the study.")
    parser.add_argument("--text", type=Path, required=True, help="folder of the two corpora")
    parser.add_argument("--out", type=Path, required=True, help="folder that is made")
    parser.add_argument("--part-mb", type=int, default=140, help="text of one file (MB)")
    parser.add_argument("--level", type=int, default=19, help="of zstd")
    given = parser.parse_args()
    paths = [given.text / "classic_books.jsonl.zst", *sorted(given.text.glob("english_mixed-*"))]
    counts = write_corpus(paths, given.out, given.part_mb * 10**6, given.level)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
