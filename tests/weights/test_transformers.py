"""Weights that transformers write at random give the same logits here.

pip install -e ".[test-weights]" && python -m pytest tests/weights
"""

import pytest
from safetensors.numpy import load_file

from tests.experiments.models.test_hugging_face import assert_logits
from tests.weights.written import write


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_logits_are_the_same(name, seed, tmp_path):
    logits = write(name, tmp_path, seed)
    assert_logits(name, load_file(tmp_path / "model.safetensors"), logits)
