"""A trained model measured in steps that go on, and published with what each number rests on."""

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from measured_model import LOSSES, MODEL, PROVENANCE, TWIN, measured_model, trained_model

from mmfree_jax.cli.main import main as mmfree
from mmfree_jax.errors import DataError
from mmfree_jax.experiments.study import measure_model, model_agreement, publish_model
from mmfree_jax.experiments.study.corpus import GROUPS
from mmfree_jax.experiments.study.model_results import Number, check_provenance, numbers_of
from mmfree_jax.experiments.study.model_steps import Step, steps
from mmfree_jax.experiments.study.text_sources import SOURCES
from mmfree_jax.outputs import MARKER
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.pack import pack


@pytest.fixture
def measured(tmp_path):
    return measured_model(tmp_path)


def run(wanted, out, seconds=60.0):
    return measure_model.run_steps(wanted, out, deadline=time.time() + seconds, jobs=2)


def base64(name, *arguments, seconds=60, needs=()):
    return Step(name, "base64", arguments, f"{name}/out", seconds, (), needs, prints=True)


def test_steps_fail_alone_and_the_same_command_goes_on(tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("some text")
    slow = ("-n", "1", "-r", "1", "-s", "import time", "time.sleep(60)")
    wanted = [
        base64("good", "-e", str(text)),
        base64("broken", "-e", str(tmp_path / "nothing")),
        Step("slow", "timeit", slow, "slow", 1, (), prints=True),
        base64("later", "-d", str(tmp_path / "code"), needs=(str(tmp_path / "code"),)),
    ]
    out = tmp_path / "out"
    assert [step.name for step in run(wanted, out)] == ["broken", "slow", "later"]
    assert (out / "good/out").read_text().strip() == "c29tZSB0ZXh0"
    assert not (out / "slow").exists()
    said = capsys.readouterr().out
    assert "broken: FAILED (1)" in said
    assert "No such file" in said
    assert "slow: FAILED (-9)" in said
    record = measure_model.read_record(out)
    assert set(record) == {"good", "broken", "slow"}
    assert all(record["good"][key] is not None for key in PROVENANCE)

    before = record["good"]["begun"], (out / "good/out").stat().st_mtime_ns
    (tmp_path / "code").write_text("aGVyZQ==")
    assert [step.name for step in run([wanted[0], wanted[3]], out)] == []
    assert (out / "later/out").read_text() == "here"
    record = measure_model.read_record(out)
    assert (record["good"]["begun"], (out / "good/out").stat().st_mtime_ns) == before
    # Another command of the name is another step, and nothing begins when time is up.
    changed = [base64("good", "-d", str(tmp_path / "code"))]
    assert run(changed, out, seconds=1.0) == changed
    assert run(changed, out) == []
    assert (out / "good/out").read_text() == "here"


def test_all_that_the_steps_run_is_there(tmp_path, capsys):
    table = steps("runs/a", "runs/b", list(GROUPS), data=Path("data"), out=tmp_path, tasks=tmp_path)
    assert len({step.name for step in table}) == len({step.makes for step in table}) == len(table)
    assert table[0].command.endswith(f"--agreement-data data/classic_books --out {tmp_path}/packed")
    kinds = {step.name.split()[0]: step for step in table}
    for step in kinds.values():
        if step.module == "mmfree_jax":  # the model is missing, no option is unknown
            assert mmfree(list(step.arguments)) == 2
            assert "unrecognized" not in capsys.readouterr().err.lower()


def test_the_published_folder_has_weights_card_results_and_checksums(measured, tmp_path, capsys):
    out = tmp_path / "models" / MODEL
    size = publish_model.publish(measured, out)
    files = {f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()} - {MARKER}
    assert files == {
        "packed.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
        "README.md", "results.json", "SHA256SUMS", f"training-{MODEL}.yaml",
        f"training-{TWIN}.yaml",
    }  # fmt: skip
    assert size == sum((out / name).stat().st_size for name in files)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=out, check=True,
                   capture_output=True)  # fmt: skip
    listed = {line[66:] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert listed == files - {"SHA256SUMS"}
    card = (out / "README.md").read_text()
    for text in (
        f"mmfree train --config experiments/results/models/{MODEL}/training-{TWIN}.yaml",
        "4,321 ternary weights (9,876 parameters", "commit `0123456789abcdef`",
        "| passes over the text | 2.0 | 2.0 |",
        "| law | 3.000 (2.700 to 3.300) | 3.500 (3.200 to 3.800) | -0.500 (-0.500 to -0.500) |",
        "| onnx-exact | 1 of 2 | 1 of 2 | 1.0e-06 | 99.97 | 80.500 -> 80.000 |",
        "| piqa, acc | 50 | 25.0 (23.0 to 27.0) | - | 50 |",
        "| 256 tokens, no fact | 50 (30 to 70) | - |", "> It was so", "'It was', seed 2",
        "MicrosoftDocs/win32@47e64c189d | CC BY 4.0",
    ):  # fmt: skip
        assert text in card
    assert json.loads((out / "results.json").read_text())["failed_steps"] == [f"tasks {TWIN}"]
    arguments = ["generate", "--model", str(out), "--prompt", "It was", "--max-new-tokens", "3"]
    assert mmfree([*arguments, "--json", "--quiet"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 3


def test_the_card_says_what_was_measured_elsewhere(measured, tmp_path):
    for step in (f"needle {MODEL}", "agreement onnx-exact"):
        measured.steps[step] = PROVENANCE | {"device": "a laptop"}
    publish_model.publish(measured, tmp_path / MODEL)
    card = (tmp_path / MODEL / "README.md").read_text()
    assert (
        "10% by chance. Of the MatMul-free model the packed files were read, on a laptop." in card
    )
    assert "| onnx-exact (*) | 1 of 2 |" in card
    assert "(*): on a laptop, and compared with the packed files" in card
    assert "looked into.\n" in card  # the tasks ran where the model was trained


def test_losses_of_sources_together_are_those_of_all_tokens(measured):
    found = {(n.name, n.of): n for n in numbers_of(measured)}
    whole = found["held-out loss/all sources", MODEL]
    # 100 tokens at 3 nats and 300 at 4; half-widths of 0.3 add as independent errors do.
    assert whole.value == pytest.approx(3.75)
    assert whole.high == pytest.approx(3.75 + 0.3 * np.hypot(0.25, 0.75))
    assert found["bits a byte/all sources", MODEL].value == pytest.approx(3.75 / np.log(2) / 4)
    assert found["held-out loss/without law and manuals", MODEL].value == 4.0
    gap = found["held-out loss/all sources", "difference"]
    assert gap.value == pytest.approx((3 * 100 + 4 * 300 - 3.5 * 100 - 3 * 300) / 400)
    assert found["loss by position/all sources/16 and later", TWIN].value == pytest.approx(3.125)
    assert found["agreement/onnx-exact/streams of float32/median agreed", MODEL].value == 103.5
    assert set(LOSSES) == {"law", "novels"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"commit": None}, "lacks commit"),
        ({"device": ""}, "lacks device"),
        ({"commit": "0123+"}, "differ from commit 0123"),
    ],
)
def test_a_number_without_provenance_is_refused(measured, change, said):
    measured.steps["pack"] |= change
    number = Number("size", MODEL, 1.0, "bytes", ("pack",))
    with pytest.raises(DataError, match=said):
        check_provenance([number], measured.steps)
    with pytest.raises(DataError, match="rests on the step 'gone'"):
        check_provenance([Number("size", MODEL, 1.0, "bytes", ("gone",))], measured.steps)
    nowhere = Number("loss", MODEL, np.nan, "nats", ("documents",))
    with pytest.raises(DataError, match="is nan"):
        check_provenance([nowhere], measured.steps)


def test_nothing_is_published_of_a_step_that_lacks_its_commit(measured, tmp_path, capsys):
    record = json.loads((measured.folder / "steps.json").read_text())
    del record[f"held-out {MODEL} law"]["commit"]
    (measured.folder / "steps.json").write_text(json.dumps(record))
    out = tmp_path / "published"
    arguments = ["--measured", str(measured.folder), "--model", MODEL, "--twin", TWIN]
    assert publish_model.main([*arguments, "--out", str(out)]) == 2
    assert f"step 'held-out {MODEL} law', whose record lacks commit" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("MOST_OF_A_FILE", r"packed.safetensors has [\d,]+ bytes, above 500,000"),
        ("MOST_IN_ALL", "the files have"),
    ],
)
def test_a_folder_above_the_limits_is_not_written(measured, tmp_path, monkeypatch, limit, said):
    monkeypatch.setattr(publish_model, limit, 500_000)
    with pytest.raises(DataError, match=said):
        publish_model.publish(measured, tmp_path / "published")
    assert not (tmp_path / "published").exists()


def test_text_of_every_group_has_a_licence():
    assert {s.name for s in SOURCES} == {name for names in GROUPS.values() for name in names}
    assert not any("BY-SA" in source.licence for source in SOURCES)


def test_two_programs_are_compared_token_by_token():
    own = np.log(np.array([[[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [1, 1, 1]]], np.float32))
    found = np.log(np.array([[[0.25, 0.5, 0.25], [0.2, 0.2, 0.6], [9, 1, 1]]], np.float32))
    compared = model_agreement.compare_logits(own + 3, found, np.array([[0, 1, 2]]))
    assert compared["tokens"] == 2  # nothing follows the last
    assert compared["kl_nats"] == pytest.approx(0.25 * np.log(2) / 2, rel=1e-5)
    assert compared["same_top_1"] == 0.5
    assert compared["perplexity_of_float32"] == pytest.approx((0.25 * 0.6) ** -0.5, rel=1e-5)
    assert compared["perplexity"] == pytest.approx((0.5 * 0.6) ** -0.5, rel=1e-5)
    with pytest.raises(DataError, match="not finite"):
        model_agreement.compare_logits(own * np.nan, found, np.array([[0, 1, 2]]))


def test_a_packed_model_in_float32_is_the_trained_one(byte_data, tmp_path):
    trained = trained_model(tmp_path)
    pack(open_model(trained), tmp_path / "packed", bits="1.6")
    arguments = [
        "--run", trained, "--packed", tmp_path / "packed", "--form", "packed-float32",
        "--data", byte_data, "--scratch", tmp_path, "--out", tmp_path / "form.json",
        "--prompts", 2, "--prompt-tokens", 4, "--new-tokens", 5, "--windows", 2, "--length", 8,
    ]  # fmt: skip
    assert model_agreement.main([str(a) for a in arguments]) == 0
    record = json.loads((tmp_path / "form.json").read_text())
    assert record["streams_of_float32"] == {"kept": 2, "agreed_tokens": [5, 5]}
    assert record["kl_nats"] == 0.0
    assert record["tokens"] == 14
    assert record["reference"] == "the model folder in float32, trits by XLA"
    arguments[1] = tmp_path / "packed"  # the trained weights are not at hand
    assert model_agreement.main([str(a) for a in arguments]) == 0
    record = json.loads((tmp_path / "form.json").read_text())
    assert record["reference"] == "the packed model in float32, trits by XLA"
    assert record["streams_of_float32"]["kept"] == 2
