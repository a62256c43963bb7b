"""Talks to an exported MatMul-free model: Python, onnxruntime, numpy and its tokenizer, no JAX.

python chat.py --prompt "Fellow citizens"     one continuation
python chat.py                                type, it goes on; the state, its memory, carries over
"""

import argparse
import hashlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

CHUNK = 64  # tokens of a prompt read at once
FIELDS = {"files": dict, "graph": str, "onnxruntime": str, "state_shape": list, "start_ids": list}
FIELDS |= {"bos_token_id": int | None, "eos_token_id": int | None, "tokenizer": str | None}


def fail(message: str) -> NoReturn:  # noqa: D103
    argparse.ArgumentParser().exit(2, f"chat.py: error: {message}\n")


def package(name: str) -> Any:  # noqa: D103
    try:
        return __import__(name)
    except Exception as e:  # absent, or broken: told as it is
        fail(f"{name} cannot be imported ({e}): run pip install --upgrade {name}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """export.json, after every file's size and checksum were compared with it."""
    try:
        manifest = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        if manifest["format"] != "mmfree-onnx" or manifest["version"] > 1:
            fail(f"{folder} is a newer or another kind of export; use the chat.py inside it")
        found = manifest.pop("sha256", None)  # older exports have none
        text = json.dumps(manifest, sort_keys=True).encode()
        wrong = [name for name, kinds in FIELDS.items() if not isinstance(manifest[name], kinds)]
        if wrong or found not in (None, hashlib.sha256(text).hexdigest()):
            raise ValueError(", ".join(wrong) or "it does not match its own checksum")
        for name, entry in manifest["files"].items():
            if (size := (folder / name).stat().st_size) != entry["bytes"]:
                fail(f"{name} has {size} bytes, not {entry['bytes']}: copy it again")
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    fail(f"{name} does not match its checksum: copy it again")
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}; give --model the folder of `mmfree export onnx`")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        fail(f"{folder / 'export.json'} is damaged ({e}): copy it again")
    return manifest


def load_tokenizer(folder: Path, manifest: dict[str, Any]) -> tuple[Any, Any]:
    """(text -> ids, ids -> text)."""
    file = str(folder / (manifest["tokenizer"] or ""))
    if file.endswith(".model"):
        pieces = package("sentencepiece").SentencePieceProcessor(model_file=file)
        return pieces.encode, pieces.decode
    if file.endswith("tokenizer.json"):
        tokenizer = package("tokenizers").Tokenizer.from_file(file)
        tokenizer.encode_special_tokens = True  # "</s>" in a prompt is four characters
        return lambda s: tokenizer.encode(s, add_special_tokens=False).ids, tokenizer.decode
    if not file.endswith("byte.json"):
        fail(f"{folder} holds no tokenizer: export a model that has one")
    return str.encode, lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace")


def read_tokens(session: Any, ids: list[int], state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [vocabulary] after the last of `ids`, and the new state."""
    logits = [np.zeros(0, np.float32)]
    for first in range(0, len(ids), CHUNK):
        feeds = {"tokens": np.array([ids[first : first + CHUNK]], np.int64), "state": state}
        logits, state = session.run(["logits", "next_state"], feeds)
    if not np.isfinite(logits).all():
        fail("the model's logits are not finite: its weights are damaged, export a sound one")
    return logits[0], state


def sample(logits: np.ndarray, args: argparse.Namespace, random: np.random.Generator) -> int:
    """The likeliest token at temperature 0, otherwise one drawn from the top k (0: from all)."""
    if args.temperature == 0:
        return int(np.argmax(logits))
    scaled = (logits - logits.max()).astype(np.float64) / args.temperature
    if 0 < args.top_k < len(scaled):
        scaled[scaled < np.partition(scaled, -args.top_k)[-args.top_k]] = -np.inf
    # The largest of logits with Gumbel noise is a draw from their softmax.
    return int(np.argmax(scaled + random.gumbel(size=len(scaled))))


def answer(
    session: Any, manifest: dict, decode: Any, ids: list[int], state: Any, args: Any, random: Any
) -> np.ndarray:
    """Streams a continuation of `ids`; returns the state after it."""
    start, count, window = time.perf_counter(), 0, ids[-8:]
    ends = manifest.get("end_ids", [manifest["eos_token_id"]])
    logits, state = read_tokens(session, ids, state)
    begin, shown = time.perf_counter(), len(decode(window))
    while count < args.max_new_tokens:
        if (token := sample(logits, args, random)) in ends:
            break
        count += 1
        text = decode(window := [*window, token])
        if not text.endswith("\ufffd"):  # what a character reads as until its last byte
            print(text[shown:], end="", flush=True)
            shown = len(decode(window := window[-8:]))
        logits, state = read_tokens(session, [token], state)
    speed = f"{count} written at {count / max(time.perf_counter() - begin, 1e-9):.1f} tokens/s"
    print(flush=True)  # before what goes to the other stream
    print(f"[{len(ids)} tokens read in {begin - start:.2f} s, {speed}]", file=sys.stderr)
    return state


def main() -> None:
    """Reads the arguments, loads the folder, and answers."""
    flag = (parser := argparse.ArgumentParser(description="Talks to a model.")).add_argument
    flag("--model", type=Path, default=Path(__file__).parent, help="exported folder")
    flag("--prompt", help="text to continue; without it, lines that you type")
    flag("--max-new-tokens", type=int, default=128)
    flag("--temperature", type=float, default=0.8, help="0: the likeliest token")
    flag("--top-k", type=int, default=40, help="0: all tokens")
    flag("--seed", type=int, default=0)
    flag("--threads", type=int, default=0, help="0: one a core")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if isinstance(value, int | float) and not 0 <= value < 2**31:
            fail(f"--{name.replace('_', '-')} is {value}: give a number from 0 to {2**31 - 1}")
    manifest = read_manifest(args.model)
    encode, decode = load_tokenizer(args.model, manifest)
    onnxruntime, needed = package("onnxruntime"), manifest["onnxruntime"].removeprefix(">=")
    found, least = (re.findall(r"\d+", v)[:3] for v in (onnxruntime.__version__, needed))
    if list(map(int, found)) < list(map(int, least)):  # older ones are slow at two-bit weights
        fail(f"onnxruntime is {onnxruntime.__version__}; run pip install 'onnxruntime>={needed}'")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = onnxruntime.InferenceSession(args.model / manifest["graph"], options)
    state, random = np.zeros(manifest["state_shape"], np.float32), np.random.default_rng(args.seed)
    first = [] if manifest["bos_token_id"] is None else [manifest["bos_token_id"]]
    prompts = iter(lambda: input("\n> "), None) if args.prompt is None else [args.prompt]
    try:
        for prompt in prompts:
            ids, first = [*first, *encode(prompt.encode().decode())] or manifest["start_ids"], []
            print(args.prompt or "", end="", flush=True)
            state = answer(session, manifest, decode, ids, state, args, random)
    except (EOFError, KeyboardInterrupt):
        print()
    except UnicodeError as e:
        fail(f"the prompt is not UTF-8 ({e}): type it in a terminal, or convert the text")


if __name__ == "__main__":
    main()
