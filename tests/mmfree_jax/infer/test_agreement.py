"""Whether packed and trained greedy text agree: how it is counted, kept and shown."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_packed_model import BASE, build

from mmfree_jax.cli.main import main
from mmfree_jax.errors import DataError
from mmfree_jax.infer.agreement import compare_streams, held_out_documents
from mmfree_jax.model.parameters import flatten
from mmfree_jax.saved.kinds import PACKED_FILE
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.pack import write_packed
from mmfree_jax.saved.packed import (
    FORMAT,
    VERSION,
    StreamAgreement,
    open_packed,
    record_agreement,
)
from mmfree_jax.saved.tensor_file import Reader, tensor_writer

HALF = dataclasses.replace(BASE, compute_dtype="bfloat16", residual_dtype="bfloat16")


def write(config, folder, **options):
    folder.mkdir()
    leaf = flatten(build(config)[1]).__getitem__
    return write_packed(folder / PACKED_FILE, config, leaf, **options)


def test_what_agrees_is_the_tokens_before_the_first_that_differs():
    wanted = [[1, 2, 3], [1, 2, 3], [1, 2, 3]]
    agreement = compare_streams([[1, 2, 3], [1, 9, 3], [9, 2, 3]], wanted, "of the test")
    assert agreement == StreamAgreement(3, (3, 1, 0), "of the test")
    assert agreement.kept == 1
    assert str(agreement) == (
        "1 of 3 prompts (of the test) keep the unpacked model's 3 greedy tokens; "
        "the first to part does after 0"
    )
    whole = StreamAgreement(3, (3, 3), "of the test")
    assert str(whole).endswith("2 of 2 prompts (of the test) keep the unpacked model's 3 greedy "
                               "tokens")  # fmt: skip


def test_the_header_keeps_the_agreement_and_nothing_else_changes(tmp_path):
    write(BASE, tmp_path / "p", embedding="int8")
    file = tmp_path / "p" / PACKED_FILE
    before = open_model(tmp_path / "p").weights("packed")
    assert open_packed(tmp_path / "p").agreement is None  # as in files of earlier versions
    agreement = StreamAgreement(200, (200, 13), "held-out text")
    record_agreement(file, agreement)
    assert open_packed(tmp_path / "p").agreement == agreement
    jax.tree.map(
        np.testing.assert_array_equal, open_model(tmp_path / "p").weights("packed"), before
    )


def test_a_file_of_an_earlier_version_with_bfloat16_norms_still_loads(tmp_path):
    write(HALF, tmp_path / "now")
    now = Reader(tmp_path / "now" / PACKED_FILE, file_format=FORMAT, version=VERSION)
    kept = ("/packed", "proj/scale", "head/scale", "lower_bounds")
    tensors = [
        (name, shape, dtype if name.endswith(kept) else jnp.dtype("bfloat16"))
        for name, shape, dtype in now.tensors()
    ]
    (tmp_path / "old").mkdir()
    with tensor_writer(
        tmp_path / "old" / PACKED_FILE, tensors, file_format=FORMAT, version=VERSION,
        metadata=now.written,
    ) as put:  # fmt: skip
        for name, _, dtype in tensors:
            put(name, now.read(name).astype(dtype))
    old, new = (open_model(tmp_path / name).weights("packed") for name in ("old", "now"))
    assert (old.final_norm_D.dtype, new.final_norm_D.dtype) == (jnp.bfloat16, jnp.float32)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2**-8), old, new)
    master = open_model(tmp_path / "old").weights("master").params
    assert master["final_norm"]["scale"].dtype == jnp.float32


def test_a_bfloat16_embedding_changes_nothing_where_the_stream_is_bfloat16(tmp_path):
    assert write(HALF, tmp_path / "default").embedding == "bfloat16"
    write(HALF, tmp_path / "whole", embedding="float32")
    tokens = jnp.arange(24).reshape(2, 12)
    model = open_model(tmp_path / "whole").model()
    apply = jax.jit(model.apply)
    for form in ("ternary", "packed"):
        logits = [
            apply(open_model(tmp_path / name).weights(form), tokens)
            for name in ("default", "whole")
        ]
        np.testing.assert_array_equal(*logits)


def test_prompts_are_held_out_documents_spread_over_the_split(byte_data):
    documents = held_out_documents(byte_data, count=3, length=32, flag="--prompts")
    assert documents.shape == (3, 32)
    assert len({tuple(row) for row in documents.tolist()}) == 3
    with pytest.raises(DataError, match=r"set --prompts \d+, or name other data"):
        held_out_documents(byte_data, count=21, length=32, flag="--prompts")


def test_pack_compares_held_out_text_prints_and_keeps_it(byte_data, save_model, tmp_path, capsys):
    config = dataclasses.replace(BASE, vocab_size=256)
    save_model(tmp_path / "m", config, build(config)[1])
    args = ["pack", "--model", str(tmp_path / "m"), "--out", str(tmp_path / "p"),
            "--agreement-data", str(byte_data), "--agreement-tokens", "4"]  # fmt: skip
    assert main([*args, "--agreement-prompts", "2"]) == 0
    said = "2 of 2 prompts (held-out text) keep the unpacked model's 4 greedy tokens\n"
    assert capsys.readouterr().out.endswith(said)
    assert open_packed(tmp_path / "p").agreement == StreamAgreement(4, (4, 4), "held-out text")
    assert main([*args, "--agreement-prompts", "0"]) == 2
    assert "leave one out" in capsys.readouterr().err
