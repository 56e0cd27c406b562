"""Pretrained weights in Hugging Face's layout. tests/weights/written.py made the files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.models.hugging_face import FAMILIES, from_hugging_face, read_weights
from experiments.models.trees import flat, nested

FOLDER = Path(__file__).parent / "weights"
TOKENS = np.array([[2, 5, 7, 3, 0, 0], [2, 9, 4, 6, 8, 3], [2, 3, 0, 0, 0, 0]], np.uint16)
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
SMALL = {
    "bert": ("bert-tiny", (6,), {"vocabulary": 12, "width": 8, "positions": 10}),
    "vit": ("vit_tiny", (8, 8, 3), {"width": 8, "heads": 2, "depth": 2}),
}
INPUTS = {"bert": TOKENS, "vit": IMAGES}


def named(path):
    return ".".join(map(str, path))


def params_from(name, tensors):
    architecture, shape, sizes = SMALL[name]
    init, apply = models.build(architecture, shape, 3, **sizes)
    params, stats = jax.eval_shape(init, jax.random.key(0))
    asked = {named(path): leaf.shape for path, leaf in flat(params).items()}
    found = from_hugging_face(tensors, FAMILIES[name], asked)
    whole = nested({path: jnp.asarray(found[named(path)]) for path in flat(params)})
    return apply, whole, stats


def assert_logits(name, tensors, logits):
    """All parameters, the last layer's too."""
    apply, params, stats = params_from(name, tensors)
    got, _ = apply(params, stats, jnp.asarray(INPUTS[name]), train=False)
    assert np.ptp(logits, axis=0).max() > 0.05
    np.testing.assert_allclose(got, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_logits_are_those_of_transformers(name):
    tensors = read_weights(str(FOLDER / f"{name}.safetensors"))
    logits = tensors.pop("logits")
    assert_logits(name, tensors, logits)
    # The files of an encoder, and of old versions.
    prefix = FAMILIES[name].prefix
    plain = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): tensor
        for key, tensor in plain.items()
    }
    assert_logits(name, old, logits)


def test_what_does_not_fit():
    tensors = read_weights(str(FOLDER / "bert.safetensors"))
    lacking = {key: tensor for key, tensor in tensors.items() if "pooler" not in key}
    with pytest.raises(ValueError, match=r"it has no pooler\.dense\.\w+, which pooler\.\w+ needs"):
        params_from("bert", lacking)
    other = tensors | {"classifier.weight": np.zeros((5, 8), np.float32)}
    with pytest.raises(ValueError, match=r"the shape of head.kernel, from classifier.weight, is"):
        params_from("bert", other)
    for path in (Path(__file__), FOLDER / "none.safetensors"):
        with pytest.raises(ValueError, match=r"cannot be read as safetensors"):
            read_weights(str(path))
