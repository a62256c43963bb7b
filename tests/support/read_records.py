"""What reading gives of a file, and files of records."""

import json

from mmfree_jax.data.documents import read_documents
from mmfree_jax.data.reading import Tally
from mmfree_jax.data.sources import InputFile, ReadOptions, read_batches


def texts(file, field="text", *, skip_bad=False, tally=None, **options):
    """The documents of a file."""
    read = ReadOptions(**options)
    tally = Tally() if tally is None else tally
    return [
        text.decode()
        for batch in read_batches(InputFile(file, field), read)
        for text in read_documents(batch, read, skip_bad=skip_bad, tally=tally)
    ]


def write_lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)
