"""The comparison of the fused program with the plain one, from its table of losses."""

import numpy as np
import pytest

from experiments.neutrality import COMPARED, differences, draw, held_out, read, seeds, table


def test_held_out_losses_and_differences_are_those_of_the_table():
    losses = read()
    assert seeds(losses) == ["0", "1"]
    np.testing.assert_allclose(held_out(losses, "plain"), [5.0041, 5.00338])
    np.testing.assert_allclose(differences(losses, "fused", "plain"), [-0.01173, -0.01124])
    np.testing.assert_allclose(differences(losses, "bf16-moments", "fused"), [0.02293, -0.00561])


def test_the_last_evaluation_counts_whatever_the_order_of_rows(tmp_path):
    path = tmp_path / "losses.csv"
    path.write_text("run,seed,step,kind,loss\na,0,9,eval,2.5\na,0,4,eval,3\na,0,9,train,1\n")
    assert held_out(read(path), "a") == pytest.approx([2.5])


def test_the_table_gives_every_difference_with_its_spread():
    text = table(read())
    for a, b in COMPARED:
        line = next(x for x in text.splitlines() if f"{a} less {b}" in x)
        assert "mean" in line
        assert "half range" in line
    assert "mean -0.0115, half range 0.0002" in text


def test_the_picture_is_drawn(tmp_path):
    draw(read(), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
