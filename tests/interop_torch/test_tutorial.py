"""The PyTorch of the tutorial about packing, on the folder that the tutorials' commands make."""

import pytest
from tutorial_pages import FIRST, PACKED, SHORTER, run_steps, steps

from mmfree_jax.infer import generate_text, load_model
from mmfree_jax.saved.open_model import open_model

pytest.importorskip("torch", reason="torch is not installed: run make torch")


def test_the_page_writes_the_text_that_the_run_writes(tmp_path):
    first = steps(FIRST, SHORTER[FIRST])
    trained = next(i for i, block in enumerate(first) if "--stop-at" in block.text)
    run_steps(FIRST, first[: trained + 1], tmp_path)
    page = [
        block
        for block in steps(PACKED, SHORTER[PACKED])
        if "export-hf" in block.text or "from transformers" in block.text
    ]
    assert [block.language for block in page] == ["bash", "python"]
    _, written = run_steps(PACKED, page, tmp_path)
    model, params = load_model(tmp_path / "runs/first")
    tokenizer = open_model(tmp_path / "runs/first").tokenizer()
    prompt = "My fellow citizens,"
    ours = generate_text(model, params, tokenizer, [prompt], max_new_tokens=20, temperature=0.0)
    assert f"{prompt}{ours.texts[0]}" in written.out
    assert "[y/N]" not in "".join(written)
