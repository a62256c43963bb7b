"""The shipped notebooks run from top to bottom on the shipped results."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "experiments" / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    names = {path.name for path in NOTEBOOKS}
    assert {"scaling_law_fit.ipynb", "crossing_analysis.ipynb", "joint_fit.ipynb"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs the notebooks extra (nbformat)")
    nbclient = pytest.importorskip("nbclient", reason="needs the notebooks extra (nbclient)")
    pytest.importorskip("ipykernel", reason="needs the notebooks extra (ipykernel)")
    repository = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", str(repository))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=400, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    text = "".join(o.get("text", "") for o in outputs)
    assert "[" in text, "no interval was printed"
    assert any("image/png" in o.get("data", {}) for o in outputs), "no figure was drawn"
