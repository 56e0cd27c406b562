"""What README and guides show is run."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import nbclient
import nbformat
import numpy as np
import optax
import pytest

import bisam_jax

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(autouse=True)
def ranks_of_a_user():
    with jax.numpy_rank_promotion("allow"):
        yield


def code_of(name):
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(), re.M | re.S))


def test_readme_snippets():
    code = code_of("README.md")
    names = {}
    exec(code, names)
    start, batch = jnp.zeros((8, 3)), names["batch"]
    expected = bisam_jax.value_and_grad(
        bisam_jax.bisam(0.05), names["loss_fn"], names["perturbation_loss_fn"]
    )(start, bisam_jax.bisam(0.05).init(start), batch)[1]
    np.testing.assert_allclose(names["grads"], expected, rtol=1e-5, atol=1e-7)

    def loss(params):
        return names["loss_fn"](params, batch).mean()

    assert loss(names["params"]) < loss(start)
    assert loss(names["params"] + names["updates"]) < loss(names["params"])


def test_readme_has_exactly_two_commands_that_install():
    text = (ROOT / "README.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("pip install -e")]
    assert commands == [
        'pip install -e ".[experiments]" && python -m experiments.train',
        'pip install -e ".[test]" && python -m pytest',
    ]


@pytest.mark.slow
def test_guide():
    names = {}
    exec(code_of("docs/guide.md"), names)
    params, batch, close = names["params"], names["batch"], {"rtol": 1e-4, "atol": 1e-6}
    tx, loss_fn, q = names["tx"], names["loss_fn"], names["q"]
    expected, _ = tx.update(
        None,
        tx.init(params),
        params,
        loss_fn=lambda p: loss_fn(p, batch).mean(),
        perturbation_grads=jax.grad(lambda p: q(p, batch).mean())(params),
    )
    for name in ("same", "shared"):
        np.testing.assert_allclose(names[name]["w"], expected["w"], **close)
    assert optax.tree.norm(optax.tree.sub(names["own"], names["shared"])) > 1e-4


def test_every_public_name_has_a_docstring():
    for name in dir(bisam_jax):
        member = getattr(bisam_jax, name)
        if not name.startswith("_") and callable(member):
            assert member.__doc__, name
            if not name.endswith("State"):
                assert "Args:" in member.__doc__, name


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the notebook's own machinery
def test_notebook():
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = "\n".join(
            line for line in cell.source.splitlines() if not line.startswith("%pip")
        )
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT}})
    client.execute()
    printed = "".join(
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    )
    accuracies = dict(re.findall(r"(\w+) +test accuracy (\d\.\d+)", printed))
    assert set(accuracies) == {"SGD", "SAM", "BiSAM"}
    assert all(float(accuracy) > 0.9 for accuracy in accuracies.values())
