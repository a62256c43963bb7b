"""`mmfree generate` on a run directory: output forms, and one line for each bad input."""

import dataclasses
import json

import jax
import pytest

from mmfree_jax.cli.main import main
from mmfree_jax.config_io import to_dict
from mmfree_jax.data.tokenizer import ByteTokenizer
from mmfree_jax.infer import api
from mmfree_jax.presets import preset
from mmfree_jax.saved.checkpoint import Checkpointer
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.run_directory import write_config
from mmfree_jax.train.optimizer import make_optimizer
from mmfree_jax.train.step import init_state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with checkpoints of two steps, and the newer one's parameters."""
    path = tmp_path_factory.mktemp("run")
    config = preset("tiny")
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, intermediate_size=64, vocab_size=300)
    )
    write_config(path, config)
    checkpointer = Checkpointer(path / "checkpoints")
    optimizer = make_optimizer(config.optimizer)
    # By one program: without jit, each of its hundred operations is compiled alone.
    first_state = jax.jit(lambda key: init_state(config, optimizer, key))
    for step in (1, 2):
        state = first_state(jax.random.key(step))
        data = {"fingerprints": [], "tokens": [], "paths": [], "tokenizer": {}}
        checkpointer.save(step, state, {"config": to_dict(config), "data": data})
    checkpointer.wait()
    return path, state.params


def run_main(capsys, *args):
    code = main(["generate", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_run_gives_the_newest_parameters(run):
    path, params = run
    saved = open_model(path)
    assert (saved.kind, saved.config.intermediate_size) == ("run", 64)
    loaded = saved.weights("master").params
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, params))


def test_a_run_falls_back_from_a_damaged_checkpoint(run, tmp_path):
    import shutil

    path = tmp_path / "copy"
    shutil.copytree(run[0], path)
    victim = max((path / "checkpoints" / "2" / "state").rglob("*"), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-3] + b"xyz")
    with pytest.warns(UserWarning, match="falling back"):
        loaded = open_model(path).weights("master").params
    older = open_model(run[0], step=1).weights("master").params
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, older))


def test_ids_in_ids_out(run, capsys):
    code, out, err = run_main(
        capsys, "--model", run[0], "--prompt-ids", "1,2,3", "--max-new-tokens", 5,
        "--temperature", 0,
    )  # fmt: skip
    assert code == 0, err
    saved = open_model(run[0])
    expected = api.generate(
        saved.model(), saved.weights(), [[1, 2, 3]], max_new_tokens=5, temperature=0
    ).tokens[0]
    assert out == ",".join(map(str, expected)) + "\n"
    assert "tokens/s" in err


def test_a_prompts_file_gives_one_json_line_each_and_streams_the_same(run, capsys, tmp_path):
    prompts = [[1, 2, 3], [4], [5, 6]]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({"prompt_ids": p}) for p in prompts))
    args = ["--model", run[0], "--prompts-file", file, "--max-new-tokens", 6, "--json", "--quiet"]
    code, out, err = run_main(capsys, *args, "--batch-size", 2)
    assert (code, err) == (0, "")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["prompt_ids"] for a in answers] == prompts
    assert [a["index"] for a in answers] == [0, 1, 2]
    assert all(len(a["tokens"]) == 6 and a["finish_reason"] == "length" for a in answers)

    _, out, _ = run_main(capsys, *args, "--stream")
    streamed = {i: [] for i in range(3)}
    for line in out.splitlines():
        piece = json.loads(line)
        streamed[piece["index"]] += piece.get("tokens", [])
    assert streamed == {a["index"]: a["tokens"] for a in answers}


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_every_end_token_of_a_hugging_face_folder_ends_an_answer(run, capsys, tmp_path, where):
    folder = tmp_path / "hf"
    assert main(["export-hf", str(run[0]), str(folder)]) == 0
    capsys.readouterr()
    args = ["--model", folder, "--prompt-ids", "1,2,3", "--max-new-tokens", 6]
    args += ["--temperature", 0, "--quiet", "--json"]
    _, out, _ = run_main(capsys, *args)
    free = json.loads(out)["tokens"]
    assert len(free) == 6
    fields = json.loads((folder / where).read_text())
    if where == "config.json":  # which the other stands in the place of
        (folder / "generation_config.json").unlink()
    # The third token by greedy choice ends the answer, listed behind one that does not occur.
    other = next(i for i in range(300) if i not in free)
    (folder / where).write_text(json.dumps(fields | {"eos_token_id": [other, free[2], 299_999]}))
    _, out, _ = run_main(capsys, *args)
    answer = json.loads(out)
    cut = free[: free.index(free[2])]
    assert (answer["tokens"], answer["finish_reason"]) == (cut, "stop_id")
    _, out, _ = run_main(capsys, *args, "--ignore-eos")
    assert json.loads(out)["tokens"] == free


@pytest.fixture
def answers(run, capsys, tmp_path):
    """Answers to the lines of a prompts file, as JSON objects."""

    def answer(lines, *options):
        file = tmp_path / "lines.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        args = ["--model", run[0], "--prompts-file", file, "--max-new-tokens", 8, "--json"]
        code, out, err = run_main(capsys, *args, "--quiet", *options)
        assert (code, err) == (0, "")
        return [json.loads(line) for line in out.splitlines()]

    return answer


def test_equal_prompts_get_answers_of_their_own_in_any_batch(answers):
    lines = [{"prompt_ids": [1, 2, 3]}] * 3
    one = answers(lines, "--num-samples", 2, "--seed", 5)
    assert [(a["index"], a["sample"]) for a in one] == [(i, s) for i in range(3) for s in (0, 1)]
    assert len({tuple(a["tokens"]) for a in one}) == 6
    assert answers(lines, "--num-samples", 2, "--seed", 5, "--batch-size", 4) == one
    first = answers(lines, "--seed", 5)
    assert [a["tokens"] for a in first] == [a["tokens"] for a in one if a["sample"] == 0]
    assert "sample" not in first[0]
    other = answers(lines, "--seed", 6)
    assert not {tuple(a["tokens"]) for a in other} & {tuple(a["tokens"]) for a in one}


def test_a_prompts_own_seed_gives_the_same_answer_at_any_place(answers):
    seeded = {"prompt_ids": [1, 2, 3], "seed": 9}
    lines = [seeded, {"prompt_ids": [1, 2, 3]}, seeded | {"seed": 0}, seeded]
    got = [a["tokens"] for a in answers(lines, "--seed", 5, "--num-samples", 2)]
    assert got[0:2] == got[6:8]
    assert len(set(map(tuple, got))) == 6
    assert [a["tokens"] for a in answers([seeded], "--seed", 77)] == [got[0]]


def test_other_fields_of_a_prompt_come_back_with_its_answer(answers):
    lines = [
        {"prompt_ids": [1], "id": "q-1", "meta": {"gold": [1, None]}, "seed": 3},
        {"prompt_ids": [2], "id": "q-2"},
    ]
    whole = answers(lines, "--batch-size", 1)
    assert [(a["id"], a.get("meta"), a.get("seed")) for a in whole] == [
        ("q-1", {"gold": [1, None]}, 3),
        ("q-2", None, None),
    ]
    assert all({"index", "tokens", "finish_reason", "prompt_ids"} <= a.keys() for a in whole)
    assert {a["id"] for a in answers(lines, "--stream")} == {"q-1", "q-2"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt_ids": [1], "seed": -1}, "line 1: seed is -1"),
        ({"prompt_ids": [1], "seed": 1.5}, "line 1: seed is 1.5"),
        ({"prompt_ids": [1], "seed": True}, "line 1: seed is True"),
        ({"prompt_ids": [1], "tokens": []}, "prompt 0 has a field 'tokens', which its answer has"),
        ({"prompt_ids": [1], "id": "\ud800"}, "and no text"),  # half a surrogate pair
    ],
)
def test_fields_that_cannot_be_taken_are_named(run, capsys, tmp_path, line, message):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(line) + "\n")
    code, out, err = run_main(capsys, "--model", run[0], "--prompts-file", file, "--json")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ([], "give one of --prompt"),
        (["--prompt", "a", "--prompt-ids", "1"], "--prompt and --prompt-ids"),
        (["--prompt-ids", "1,x"], "'1,x'"),
        (["--prompt-ids", ","], "is empty"),
        (["--prompt-ids", "1,300"], "token id 300"),
        (["--prompt-ids", "1,-1"], "token id -1"),
        (["--prompt-ids", "1", "--top-p", "2"], "--top-p is 2.0"),
        (["--prompt-ids", "1", "--stop", ""], "--stop is an empty string"),
        (["--prompt-ids", "1", "--stop", "x"], "no tokenizer"),
        (["--prompt-ids", "1", "--batch-size", "0"], "--batch-size"),
        (["--prompt", "a"], "no tokenizer"),
        (["--prompts-file", "/nowhere"], "prompts file /nowhere"),
        (["--promt", "a"], "--promt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, capsys, args, match):
    code, out, err = run_main(capsys, "--model", run[0], *args)
    assert code == 2
    assert out == ""
    assert match in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("line", ["{", "[1]", '{"prompt_ids": []}', '{"prompt_ids": ["a"]}', "{}"])
def test_bad_lines_of_a_prompts_file_are_numbered(run, capsys, tmp_path, line):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt_ids": [1]}\n' + line + "\n")
    code, _, err = run_main(capsys, "--model", run[0], "--prompts-file", file)
    assert code == 2
    assert "line 2" in err


def test_a_folder_that_is_no_model_is_named(capsys, tmp_path):
    code, _, err = run_main(capsys, "--model", tmp_path / "none", "--prompt-ids", "1")
    assert code == 2
    assert "is not a folder" in err


def test_pack_and_generate_give_the_trained_models_stream(run, capsys, tmp_path):
    assert main(["pack", "--model", str(run[0]), "--out", str(tmp_path / "p"),
                 "--embedding", "float32", "--agreement-prompts", "1",
                 "--agreement-tokens", "4"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "2 bits" in said
    assert "1 of 1 prompts (sampled from the model) keep the unpacked model's 4 greedy" in said
    args = ["--prompt-ids", "1,2,3", "--max-new-tokens", 12, "--temperature", 0, "--quiet"]
    _, expected, _ = run_main(capsys, "--model", run[0], *args)
    code, out, err = run_main(capsys, "--model", tmp_path / "p", *args)
    assert (code, err) == (0, "")
    assert out == expected

    # A packed model is packed again as it is, and an existing one not overwritten.
    assert main(["pack", "--model", str(tmp_path / "p"), "--out", str(tmp_path / "q"),
                 "--bits", "1.6", "--agreement-prompts", "0"]) == 0  # fmt: skip
    capsys.readouterr()
    assert run_main(capsys, "--model", tmp_path / "q", *args) == (0, expected, "")
    assert main(["pack", "--model", str(run[0]), "--out", str(tmp_path / "p")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_saved_state_goes_on_where_it_ended(run, capsys, tmp_path):
    common = ["--model", run[0], "--temperature", 0.7, "--seed", 5, "--quiet"]
    _, whole, _ = run_main(capsys, *common, "--prompt-ids", "1,2", "--max-new-tokens", 12)
    state = tmp_path / "state"
    _, first, _ = run_main(
        capsys, *common, "--prompt-ids", "1,2", "--max-new-tokens", 5, "--save-state", state
    )
    code, rest, err = run_main(capsys, *common, "--load-state", state, "--max-new-tokens", 7)
    assert code == 0, err
    assert first.strip() + "," + rest.strip() == whole.strip()
    # One cached prompt serves several continuations.
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt_ids": [4]}\n{"prompt_ids": [5, 6]}\n')
    code, out, err = run_main(
        capsys, *common, "--load-state", state, "--prompts-file", file, "--max-new-tokens", 3
    )
    assert code == 0, err
    assert len(out.splitlines()) == 2


def test_text_in_text_out_streamed_or_not(run, capsys, tmp_path):
    import shutil

    path = tmp_path / "run"
    shutil.copytree(run[0], path)
    (path / "tokenizer").mkdir()
    ByteTokenizer().save(path / "tokenizer")
    args = ["--model", path, "--max-new-tokens", 20, "--seed", 3, "--quiet"]
    _, whole, err = run_main(capsys, *args, "--prompt", "Über")
    assert err == ""
    assert whole.startswith("Über")
    _, streamed, _ = run_main(capsys, *args, "--prompt", "Über", "--stream")
    assert streamed == whole
    _, as_json, _ = run_main(capsys, *args, "--prompt", "Über", "--json")
    assert "Über" + json.loads(as_json)["text"] + "\n" == whole
    # An empty prompt starts a new document.
    code, out, _ = run_main(capsys, *args, "--prompt", "")
    assert code == 0
    assert out.strip("\n")
