"""The notebook runs from its first cell to its last, and is kept without outputs."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs/attack_from_python.ipynb"


@pytest.mark.slow
def test_the_notebook_runs():
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert "3 of 6 queries used" in printed
    assert "query budget exhausted: 3 of 6 queries spent" in printed
    assert "student, swin_to_r21_kd" in printed
    assert "40 queries of my own victim" in printed
