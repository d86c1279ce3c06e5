"""Run the notebooks of docs/notebooks, each in a fresh kernel, and write their outputs into them.

    python -m tools.notebooks [NAME ...]

`make notebooks` compares the committed outputs with those of a fresh run instead (tests/test_notebooks.py). A cell with
the tag `real-models` prints one line for each model package that is installed, so its output is that of the machine.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
SECONDS = 600  # of the slowest cell
VOLATILE = ("execution", "jupyter")  # metadata of a run


def executed(path: Path) -> nbformat.NotebookNode:
    """Return the notebook with the outputs of a fresh run, in an empty folder.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=SECONDS, coalesce_streams=True, resources={"metadata": {"path": folder}}
        ).execute()
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        for name in VOLATILE:
            cell.metadata.pop(name, None)
    return notebook


if __name__ == "__main__":
    for each in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        print(each)
        nbformat.write(executed(FOLDER / f"{each}.ipynb"), FOLDER / f"{each}.ipynb")
