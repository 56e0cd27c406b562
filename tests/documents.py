"""The code in README and docs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def code_of(name):
    """The Python code of a page, as one program."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(), re.M | re.S))
