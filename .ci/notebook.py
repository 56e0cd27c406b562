"""Runs docs/tour.ipynb as a visitor would: with a wheel, from another folder than the clone.

    python notebook.py FOLDER WHEEL [OUTPUT]

Only the requirement of the install cell is replaced by the wheel. With OUTPUT, the executed
notebook is written there, which is how the outputs in docs/tour.ipynb are made.
"""

import sys
from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tour.ipynb"
PLOTS = 5


def main(folder: str, wheel: str, output: str | None = None) -> None:
    """Executes the notebook in `folder`, and checks that it drew everything."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (install,) = [cell for cell in notebook.cells if "%pip install" in cell.source]
    published = install.source
    requirement = published.split("%pip install -q ")[1].splitlines()[0]
    install.source = published.replace(requirement, f"--force-reinstall --no-deps {wheel}")
    where = {"metadata": {"path": folder}}
    nbclient.NotebookClient(notebook, timeout=600, record_timing=False, resources=where).execute()
    install.source, install.outputs = published, []
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    plots = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(plots) == PLOTS, f"expected {PLOTS} plots, got {len(plots)}"
    assert any("test accuracy" in out.get("text", "") for out in outputs)
    if output is not None:
        nbformat.write(notebook, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
