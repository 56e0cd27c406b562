"""Every recipe is short, is in the index, and has a test."""

import pytest

from tests.documents import ROOT

RECIPES = ROOT / "docs" / "recipes"
PAGES = sorted(path.stem for path in RECIPES.glob("*.md") if path.stem != "index")
TESTS = "".join(path.read_text() for path in (ROOT / "tests" / "recipes").glob("test_*.py"))


@pytest.mark.parametrize("page", PAGES)
def test_page(page):
    text = (RECIPES / f"{page}.md").read_text()
    assert text.count("\n") <= 40
    assert "```python\n" in text
    assert f"({page}.md)" in (RECIPES / "index.md").read_text()
    assert f"def test_{page.replace('-', '_')}(" in TESTS
