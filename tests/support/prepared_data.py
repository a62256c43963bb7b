"""Texts, and a data set prepared of them."""

import json
from pathlib import Path

import numpy as np

from mmfree_jax.data.prepare import PrepareConfig, prepare_dataset
from mmfree_jax.data.verification import verify_checksums


def make_texts(seed, count):
    rng = np.random.default_rng(seed)
    words = ["we", "the", "people", "naïve", "日本", "🙂", "peace\n", "union,"]
    return [
        " ".join(rng.choice(words, rng.integers(1, 300))) + f" {seed}.{i}" for i in range(count)
    ]


TEXTS = make_texts(0, 60)


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({"id": 1, field: t}) + "\n" for t in texts))
    return str(path)


def run(out, **kwargs):
    kwargs = {"heldout_fraction": 0.0, "workers": 1, **kwargs}
    index, worked = prepare_dataset(PrepareConfig(out=str(out), **kwargs))
    assert worked
    assert verify_checksums(index) == []
    return index


def shard_bytes(folder):
    return {
        p.name: p.read_bytes()
        for p in Path(folder).iterdir()
        if p.suffix in (".tokens", ".documents")
    }
