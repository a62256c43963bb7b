"""`mmfree bench packing`: what it refuses before it measures, and how rows read."""

import pytest
from small_packed_model import BASE, build

from mmfree_jax.cli.main import main
from mmfree_jax.experiments.bench.packing import describe


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dtypes", "float16"], "float16"),
        (["--prompts", "21", "--new-tokens", "8"], "set --prompts "),
    ],
)
def test_what_cannot_be_measured_is_one_line(flags, said, byte_data, save_model, tmp_path, capsys):
    save_model(tmp_path / "m", BASE, build(BASE)[1])
    args = ["--model", tmp_path / "m", "--data", byte_data, "--out", tmp_path / "out", *flags]
    assert main(["bench", "packing", *map(str, args)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_row_says_how_many_prompts_keep_their_text():
    row = {
        "work": "form", "dtypes": "trained", "program": "xla", "form": "int8", "kept": 21,
        "share_of_tokens": 0.53, "agreed_min_5_25_50_75": [0, 5, 28, 85, 200], "prompts": 64,
    }  # fmt: skip
    assert describe(row) == (
        "form, trained, xla, int8: 21/64 kept, 53.0% of tokens, parted at [0, 5, 28, 85, 200]"
    )
