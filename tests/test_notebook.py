"""The quickstart notebook runs from the first cell to the last, on the devices at hand."""

import os
import pathlib

import nbclient
import nbformat

NOTEBOOK = pathlib.Path(__file__).resolve().parents[1] / "experiments" / "notebooks" / "quickstart.ipynb"


def test_quickstart_notebook_runs_and_ends_with_a_plot(monkeypatch):
    monkeypatch.setenv("NOTEBOOK_STEPS", "12")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # one device, as in a notebook
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute(env=dict(os.environ))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_committed_notebook_holds_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
