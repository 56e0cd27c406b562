"""Runs docs/tour.ipynb as a visitor would: with a wheel, from another folder than the clone.

    python notebook.py FOLDER WHEEL [--epochs N | --output FILE]

Only the requirement of the install cell is replaced by the wheel. With --epochs, networks are
trained for N epochs: enough to see that every cell runs. With --output, the executed notebook
is written there, which is how the outputs in docs/tour.ipynb are made.
"""

import argparse
from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tour.ipynb"
PLOTS = 5
EPOCHS = "EPOCHS, BATCH = 30, 64"


def executed(folder: str, wheel: str, epochs: int | None) -> nbformat.NotebookNode:
    """Executes the notebook in `folder`, and checks that it drew everything."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (install,) = [cell for cell in notebook.cells if "%pip install" in cell.source]
    published = install.source
    requirement = published.split("%pip install -q ")[1].splitlines()[0]
    install.source = published.replace(requirement, f"--force-reinstall --no-deps {wheel}")
    if epochs is not None:
        (training,) = [cell for cell in notebook.cells if EPOCHS in cell.source]
        training.source = training.source.replace(EPOCHS, f"EPOCHS, BATCH = {epochs}, 64")
    where = {"metadata": {"path": folder}}
    nbclient.NotebookClient(notebook, timeout=600, record_timing=False, resources=where).execute()
    install.source, install.outputs = published, []
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    plots = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(plots) == PLOTS, f"expected {PLOTS} plots, got {len(plots)}"
    assert any("test accuracy" in out.get("text", "") for out in outputs)
    return notebook


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("wheel")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--epochs", type=int)
    either.add_argument("--output", type=Path)
    options = parser.parse_args()
    notebook = executed(options.folder, options.wheel, options.epochs)
    if options.output:
        nbformat.write(notebook, options.output)


if __name__ == "__main__":
    main()
