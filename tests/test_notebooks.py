"""The notebooks run in a fresh kernel, and the outputs that are committed are those of the run."""

import re
from pathlib import Path

import nbformat
import pytest

from jaxrl_llm.models import loading
from tests.test_documents import alike
from tools import notebooks

PATHS = sorted(notebooks.FOLDER.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_fresh_run_gives_the_committed_outputs(path):
    compare(path, real_models=False)


@pytest.mark.parity
def test_a_fresh_run_gives_the_committed_outputs_of_real_models():
    missing = [name for name in loading.PACKAGED if not loading.is_installed(name)]
    assert not missing
    compare(notebooks.FOLDER / "sycophancy.ipynb", real_models=True)


def test_there_are_five_notebooks():
    assert [path.stem for path in PATHS] == ["decoding", "landscape", "sycophancy", "theory", "translation"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_was_run_from_top_to_bottom(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [each for cell in code for each in cell.outputs]
    assert not [each for each in outputs if each.output_type == "error" or each.get("name") == "stderr"]
    assert any("image/png" in each.get("data", {}) for each in outputs)
    assert "import jaxrl_llm as jl" in code[0].source
    assert cells[-1].source.startswith("## Your own")
    assert path.stat().st_size < 600_000
    links = [link for cell in cells for link in re.findall(r"\]\((?!http)([^)#]+)", cell.source)]
    assert not [link for link in links if not (Path(path).parent / link).exists()]


def compare(path, *, real_models):
    """Compare the outputs of a fresh run, of cells with real models only where these are installed."""
    committed, fresh = nbformat.read(path, as_version=4), notebooks.executed(path)
    for place, (cell, found) in enumerate(zip(committed.cells, fresh.cells, strict=True)):
        if cell.cell_type == "code" and (real_models or "real-models" not in cell.metadata.get("tags", [])):
            assert alike(texts(cell), texts(found)), f"cell {place} of {path.name} gives\n{texts(found)}"
            assert pictures(cell) == pictures(found), f"cell {place} of {path.name}"


def texts(cell):
    """The printed text of a cell, and its value unless that is a picture."""
    printed = [each.text for each in cell.outputs if each.output_type == "stream"]
    values = [each.data.get("text/plain", "") for each in cell.outputs if each.output_type == "execute_result"]
    return "".join(printed + [value for value in values if not value.startswith("<Figure")])


def pictures(cell):
    """The number of pictures."""
    return sum("image/png" in each.get("data", {}) for each in cell.outputs)
