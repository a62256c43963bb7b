"""A run, a packed model and a session of an earlier version still give what they gave then."""

import gc
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import mmfree_jax
from mmfree_jax.cli.main import main

OLD = Path(__file__).parent / "old"
EXPECTED = json.loads((OLD / "expected.json").read_text())
LETTERS = slice(97, 123)


@pytest.mark.parametrize("name", ["run", "packed"])
def test_the_logits_are_the_same(name):
    model, params = mmfree_jax.load_pretrained(OLD / name)
    tokens = jnp.asarray([EXPECTED["prompt"]], jnp.int32)
    logits = np.asarray(model.apply({"params": params}, tokens))[0, -1, LETTERS]
    # XLA may order sums anew; an int8 activation that then rounds the other way shows in the third
    # digit.
    np.testing.assert_allclose(logits, EXPECTED[f"{name}_logits"], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["run", "packed"])
def test_the_tokens_are_the_same(name, capsys):
    prompt = ",".join(map(str, EXPECTED["prompt"]))
    args = ["--prompt-ids", prompt, "--temperature", "0", "--max-new-tokens", "8", "--print-ids"]
    assert main(["generate", "--model", str(OLD / name), *args, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out == ",".join(map(str, EXPECTED[f"{name}_tokens"])) + "\n"


@pytest.mark.parametrize("name", ["run", "packed"])
def test_the_session_goes_on_the_same(name, capsys):
    args = ["--load-state", str(OLD / "session.safetensors"), "--max-new-tokens", "12"]
    args += ["--temperature", "0", "--print-ids", "--quiet"]
    assert main(["generate", "--model", str(OLD / name), *args]) == 0
    out = capsys.readouterr().out
    assert out == ",".join(map(str, EXPECTED["session_tokens"])) + "\n"


def test_what_orbax_finds_damaged_is_one_line(tmp_path, capfd):
    """A manifest of that version has no digest of itself: files may be struck from it."""
    shutil.copytree(OLD / "run", tmp_path / "run")
    folder = tmp_path / "run/checkpoints/300"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
    (folder / "state/array_metadatas/process_0").write_text("{}")
    (stored,) = (folder / "state/ocdbt.process_0/d").iterdir()
    stored.write_bytes(bytes(stored.stat().st_size))
    arguments = ["generate", "--model", str(tmp_path / "run"), "--prompt-ids", "1", "--quiet"]
    assert main(arguments) == 2
    gc.collect()  # of what was never waited for, which says so when it goes
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "300 cannot be read: " in err
