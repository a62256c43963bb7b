"""A small file of texts."""

from pathlib import Path

import pytest
from prepared_data import TEXTS, write_jsonl


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A file of the texts, a record each."""
    return write_jsonl(tmp_path / "texts.jsonl", TEXTS)
