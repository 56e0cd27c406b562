"""What README and guides show is run."""

import re
import tomllib

import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import optax
import pytest

import bisam_jax
from tests.documents import ROOT, code_of

pytestmark = pytest.mark.usefixtures("settings_of_a_user")


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


@pytest.mark.slow
def test_measuring():
    names = {}
    exec(code_of("docs/measuring.md"), names)
    assert names["worst"] >= names["rise"] > 0
    assert names["average"].mean < names["worst"]
    assert names["top"].residuals[0] < 1e-3 * names["top"].values[0]
    assert names["gauss_newton"].mean > 0


def test_every_public_name_has_a_docstring():
    for name in dir(bisam_jax):
        member = getattr(bisam_jax, name)
        if not name.startswith("_") and callable(member):
            assert member.__doc__, name
            if not (isinstance(member, type) and issubclass(member, tuple)):
                assert "Args:" in member.__doc__, name


def test_the_reference_has_every_public_name_once():
    listed = re.findall(r"\.\. auto(?:function|class):: (\w+)", (ROOT / "docs/api.md").read_text())
    assert sorted(listed) == sorted(bisam_jax.__all__)


def test_the_address_of_the_project_is_the_same_everywhere():
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    address = urls["Repository"].removeprefix("https://")
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*.cff"), *(ROOT / "docs").rglob("*.[mi]*[db]")]
    found = {
        match
        for page in pages
        for match in re.findall(r"github\.com/[\w-]+/bisam[\w-]*", page.read_text())
    }
    assert found == {address}
    badge = f"colab.research.google.com/github/{address.removeprefix('github.com/')}/blob/main/docs"
    assert f"{badge}/tour.ipynb" in (ROOT / "README.md").read_text()


def test_the_notebook_is_stored_with_its_plots():
    """`.ci/notebook.py` executes it."""
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        drawn = any("image/png" in output.get("data", {}) for output in outputs)
        assert drawn == ("plt.show()" in cell.source)
        assert not any(output.output_type == "error" for output in outputs)


def test_links_between_the_pages_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page}: {link}"
