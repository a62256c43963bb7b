"""What `mmfree serve` says while it starts."""

import re

from served import write_small_model

from mmfree_jax import progress
from mmfree_jax.cli import serve
from mmfree_jax.cli.main import main
from mmfree_jax.serve.batch import Batch
from mmfree_jax.serve.server import Running


def test_it_says_which_model_and_which_programs_and_when_it_is_ready(tmp_path, monkeypatch, capsys):
    write_small_model(tmp_path / "model")
    ran = []
    for name in ("_move_rows", "read", "decode"):  # takes the compiler's time, here of no interest
        monkeypatch.setattr(Batch, name, lambda self, *given, name=name: ran.append(name))
    monkeypatch.setattr(Running, "run", lambda self, listening, on_ready: on_ready())
    monkeypatch.setattr(serve, "_PATIENCE", 0.0)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    argv = ["serve", "--model", str(tmp_path / "model"), "--port", "0", "--slots", "2"]
    assert main([*argv, "--name", "mine", "--one-batch-size"]) == 0
    out, err = capsys.readouterr()
    model, compiling, *programs, ready, stopped = err.splitlines()
    assert model == f"reading the weights of {tmp_path / 'model'}, 24.1k parameters"
    assert compiling == "compiling programs for mine"
    assert len(programs) == len(ran)
    assert programs[0] == f"{compiling}  0/{len(ran)}  slots"
    assert re.fullmatch(rf"{compiling}  1/{len(ran)}  reading \d+ tokens", programs[1])
    assert programs[-3:] == [
        f"{compiling}  {len(ran) - 3 + n}/{len(ran)}  decoding a batch of 2 ({draw})"
        for n, draw in enumerate(("greedy", "plain", "full"))
    ]
    found = re.fullmatch(r"serving mine at (http://127\.0\.0\.1:\d+)/v1, page at \1/\n", out)
    assert found is not None
    assert re.fullmatch(rf"mmfree serve: ready at {re.escape(found[1])} after \d+s", ready)
    assert stopped == "mmfree serve: stopped"


def test_an_error_at_the_start_stays_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve, "_PATIENCE", 0.0)
    assert main(["serve", "--model", str(tmp_path / "nothing"), "--port", "0"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert str(tmp_path / "nothing") in err
