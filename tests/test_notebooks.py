"""The notebooks run, in small: from the first cell to the last, in a real kernel (`make notebooks`)."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
SMALL = {
    "STEPS": "2",
    "EPOCHS": "1",
    "TRIALS": "1",
    "SCENES": "12",
    "SIZE": "[64, 48]",
    "NETWORK": "w18_small_v1",
}
"""What the first cells take from the environment, as HRNET_NOTEBOOK_..."""


def source(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A client whose kernel all notebooks share, as they do the scenes: torch is imported once."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SMALL, "RUNS": str(tmp_path_factory.mktemp("runs"))}.items():
            patch.setenv(f"HRNET_NOTEBOOK_{name}", value)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        client = NotebookClient(nbformat.v4.new_notebook(), timeout=200, kernel_name="python3")
        with client.setup_kernel():
            yield client


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_it_runs(path, kernel):
    where = ROOT if NOTEBOOKS.index(path) % 2 else path.parent  # it should not matter
    notebook = source(path)
    begin = nbformat.v4.new_code_cell(f"%reset -f\nimport os\nos.chdir({str(where)!r})\ndel os")
    kernel.nb = notebook
    notebook.cells.insert(0, begin)
    for index, cell in enumerate(notebook.cells):
        kernel.execute_cell(cell, index)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    drawn = sum("image/png" in output.get("data", {}) for output in outputs)
    assert drawn == sum("plt.figure(" in cell.source or "plt.subplots(" in cell.source for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_it_is_kept_as_it_should_be(path):
    notebook = source(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    first, code = notebook.cells[0].source, [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert first.startswith("# ")
    assert "pip install -c constraints.txt -e '.[notebooks]'" in first
    assert all(not cell.outputs and cell.execution_count is None for cell in code), "clear the outputs before a commit"
    text = "\n".join(cell.source for cell in notebook.cells)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert not re.search(r"""["'( ](/\w+/|~/|[A-Z]:\\)""", text), "a path of one machine"
    for target in re.findall(r"\]\(([^)#]+)", prose):
        assert (path.parent / target).is_file(), target


def test_the_page_lists_them_all():
    page = (ROOT / "docs/notebooks.md").read_text()
    assert re.findall(r"`notebooks/(\w+)\.ipynb`", page) == NAMES
