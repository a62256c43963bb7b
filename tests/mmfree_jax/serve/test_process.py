"""`mmfree serve` as a process, with a packed model: under a small load, and stopped by SIGTERM."""

import asyncio
import re
import signal

import openai
import pytest
from served import NAME, small_model, write_small_model
from server_load import ServerProcess, plan, run_load

from mmfree_jax.data.tokenizer import ByteTokenizer
from mmfree_jax.infer import generate_text
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.pack import pack


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_small_model(folder / "model")
    pack(open_model(folder / "model"), folder / "packed")
    (folder / "keys").write_text("a-key\n")
    (folder / "keys").chmod(0o600)
    server = ServerProcess(
        folder / "packed", "--slots", "8", "--max-queue", "16", "--one-batch-size",
        "--sessions", str(folder / "sessions"), "--write-seconds", "1",
    )  # fmt: skip
    yield server, folder
    server.process.kill()


@pytest.mark.slow
def test_none_is_lost_and_none_mixed_up_and_it_stops_cleanly(process):
    server, folder = process
    planned = plan(60, seed=1)
    tally = asyncio.run(run_load(server.port, planned, at_once=24))
    assert tally.faults == []
    counts = (tally.answered, tally.cancelled, tally.malformed, tally.unread)
    kinds = [kind for kind, _ in planned]
    wanted = tuple(map(kinds.count, ("cancelled", "malformed", "unread")))
    assert counts == (60 - sum(wanted), *wanted)
    assert min(counts) >= 1

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="x")
    ask = {"model": NAME, "prompt": "My secret", "temperature": 0, "max_tokens": 20}
    model, params = small_model()
    expected = generate_text(
        model, params, ByteTokenizer(), ["My secret"], max_new_tokens=20, temperature=0.0
    )
    assert client.completions.create(**ask).choices[0].text == expected.texts[0]
    client.completions.create(**ask, extra_body={"save_as": "kept"})
    stream = client.completions.create(
        **ask | {"max_tokens": 1000}, stream=True, extra_body={"ignore_eos": True}
    )
    first = next(stream)
    server.process.send_signal(signal.SIGTERM)
    chunks = [first, *stream]
    assert chunks[-1].choices[0].finish_reason == "length"
    client.close()
    output, errors = server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    assert [path.name for path in (folder / "sessions").iterdir() if "kept" in path.name]
    # Nothing of a request is logged; what is said before is of the start.
    assert output == ""
    assert re.fullmatch(
        r"(reading the weights of .+\n|compiling programs .+\n)*"
        r"mmfree serve: ready at http://127\.0\.0\.1:\d+ after \w+\nmmfree serve: stopped\n",
        errors,
    ), errors
