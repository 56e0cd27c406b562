"""The documentation site: python -m sphinx -W docs site."""

import tomllib
from pathlib import Path

import bisam_jax

_ROOT = Path(__file__).parents[1]
_URLS = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["urls"]

project = "bisam_jax"
copyright = "The bisam_jax authors"
release = version = bisam_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"bisam_jax {version}"
html_theme_options = {
    "source_repository": _URLS["Repository"],
    "source_branch": "main",
    "source_directory": "docs/",
}

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# The tests run the notebook; the site shows the outputs that are stored in it.
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes and dtypes
autodoc_preserve_defaults = True
autodoc_default_options = {"show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Args and Returns as in the sources, where a description may have several lines.
napoleon_use_rtype = False
