"""The page of a training loop of one's own does what it says, from a text to an answer."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "custom-loop.md"
SHORTER = {"STEPS = 300": "STEPS = 30", "seq_len=128": "seq_len=32", "size=16": "size=8"}
SHORTER |= {"max_new_tokens=40": "max_new_tokens=4", "window=128": "window=32"}


def test_the_loop_trains_saves_evaluates_and_generates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    documents = [f"We the people of district {i} say so. " * 8 for i in range(60)]
    Path("mine.txt").write_text("\n\n".join(documents))
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S))
    for shown, shorter in SHORTER.items():
        assert shown in code
        code = code.replace(shown, shorter)
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in lines if line.startswith("step ")]
    assert len(losses) == 4
    assert 5.4 < losses[0] < 5.7  # about log 258
    assert losses[-1] < 3.5
    assert abs(names["held_out"].loss.mean - losses[-1]) < 0.5  # it is alike text
    assert names["answer"].finish_reasons == ["length"]
    found = {path.name for path in Path("models/mine").iterdir()}
    assert {"model.yaml", "params.safetensors", "tokenizer"} <= found
