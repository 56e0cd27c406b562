"""Every architecture by its shapes, and a small member of each family by its numbers."""

import functools
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import models
from tests.experiments.models.values import drawn, normal

FLOAT32, BFLOAT16 = jnp.float32, jnp.bfloat16
# (image shape, options) of a member of each family that compiles fast.
SMALL = {
    "mlp": ((8, 8, 1), {"width": 32}),
    "cnn": ((8, 8, 1), {"width": 8}),
    "cnn1d": ((1, 12, 1), {"width": 8}),
    "resnet20": ((8, 8, 3), {"depth": 8}),
    "wrn16_8": ((8, 8, 3), {"depth": 10, "width": 2}),
    "densenet121": ((8, 8, 3), {"layers": (1, 2), "growth": 8}),
    "vgg19_bn": ((17, 17, 3), {"convolutions": (1, 1, 1, 1, 1)}),
    "resnet18": ((17, 17, 3), {"blocks": (1, 1)}),
    "resnet50": ((17, 17, 3), {"blocks": (1, 1)}),
    "vit_tiny": ((8, 8, 3), {"depth": 1}),
}
# Trainable parameters, and layers: those in the name, and shortcuts that are convolutions. The
# name of a wide network counts these, but not its head.
SIZES = {
    "cnn1d": (5_210, 4),
    "resnet8": (75_290, 8),
    "resnet20": (269_722, 20),
    "resnet32": (464_154, 32),
    "resnet56": (853_018, 56),
    "wrn16_8": (10_961_370, 16 + 1),
    "wrn28_2": (1_467_610, 28 + 1),
    "wrn28_10": (36_479_194, 28 + 1),
    "densenet121": (6_956_298, 121),
    "vgg19_bn": (20_565_834, 19),
    "resnet18": (11_181_642, 18 + 3),
    "resnet50": (23_528_522, 50 + 4),
}
KEY = jax.random.key(1)


def some(names, kept):
    """Parameters of a test: all but `kept` are slow."""
    return [n if n in kept else pytest.param(n, marks=pytest.mark.slow) for n in names]


@functools.cache
def abstract(name, image_shape=None, classes=10):
    """`(apply, params, stats)` in bfloat16, without arrays."""
    image_shape = image_shape or shape_of(name)
    options = {"vocabulary": 50} if models.ARCHITECTURES[name].reads_texts else {}
    init, apply = models.build(name, image_shape, classes, dtype=BFLOAT16, **options)
    return apply, *jax.eval_shape(init, KEY)


def shape_of(name):
    reads_texts = models.ARCHITECTURES[name].reads_texts
    return {"cnn1d": (1, 40, 1)}.get(name, (12,) if reads_texts else (32, 32, 3))


def count(params):
    return sum(x.size for x in jax.tree.leaves(params))


def small(name, dtype=FLOAT32, **options):
    """`(apply, params, stats, images)` of a small member of a family."""
    image_shape, others = SMALL[name]
    init, apply = models.build(name, image_shape, 10, dtype=dtype, **others, **options)
    return apply, *drawn(jax.eval_shape(init, KEY)), normal(16, *image_shape, seed=1)


def relative_error(x, y):
    x, y = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (x, y))
    return np.linalg.norm(x - y) / np.linalg.norm(y)


@pytest.mark.parametrize("name", some(models.ARCHITECTURES, ("mlp", "cnn", "resnet8", "wrn16_8")))
def test_architecture(name):
    apply, params, stats = abstract(name)
    # The passes of deep networks are those of their small members, below.
    if count(params) < 3e5:
        dtype = jnp.uint16 if models.ARCHITECTURES[name].reads_texts else FLOAT32
        images = jax.ShapeDtypeStruct((2, *shape_of(name)), dtype)
        call = functools.partial(apply, train=True, keys=jax.random.split(KEY, 2))
        logits, new_stats = jax.eval_shape(call, params, stats, images)
        assert (logits.shape, logits.dtype) == ((2, 10), FLOAT32)
        assert new_stats == stats
    assert {x.dtype for x in jax.tree.leaves((params, stats))} == {jnp.dtype(FLOAT32)}
    if name in SIZES:
        layers = sum(x.ndim > 1 for x in jax.tree.leaves(params))
        assert (count(params), layers) == SIZES[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("vit_tiny", 5_717_416),
        ("vit_small", 22_050_664),
    ],
)
def test_number_of_parameters_on_imagenet(name, expected):
    """Those that torchvision and timm give for their models."""
    assert count(abstract(name, (224, 224, 3), 1000)[1]) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "width", "size", "channels", "patch"),
    [("vit_tiny", 192, 28, 1, 4), ("vit_small", 384, 64, 3, 16)],
)
def test_number_of_parameters_of_transformers(name, width, size, channels, patch):
    def linear(n_in, n_out):
        return n_in * n_out + n_out

    block = 2 * (2 * width) + linear(width, 3 * width) + linear(width, width)
    block += linear(width, 4 * width) + linear(4 * width, width)
    tokens = (size // patch) ** 2 + 1
    expected = linear(patch * patch * channels, width) + width + tokens * width
    expected += 12 * block + 2 * width + linear(width, 10)
    assert count(abstract(name, (size, size, channels))[1]) == expected


@pytest.mark.parametrize("name", some(SMALL, ("cnn", "vit_tiny")))
def test_a_small_member(name):
    """Statistics, gradients, and the same in bfloat16."""
    apply, params, stats, images = small(name)
    # The others need none.
    keys = jax.random.split(KEY, 16) if name == "vgg19_bn" else None

    def loss(params):
        logits, new_stats = apply(params, stats, images, train=True, keys=keys)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(16) % 10)
        return losses.mean(), (logits, new_stats)

    gradients, (logits, moved) = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert (logits.shape, logits.dtype) == ((16, 10), FLOAT32)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        # A bias before batch normalisation has none.
        if not (name == "vgg19_bn" and "convolutions" in str(path) and "bias" in str(path)):
            assert jnp.linalg.norm(gradient) > 1e-5, path

    evaluate = jax.jit(functools.partial(apply, train=False))
    evaluated, kept = evaluate(params, stats, images)
    assert jnp.isfinite(evaluated).all()
    assert jax.tree.structure(moved) == jax.tree.structure(kept) == jax.tree.structure(stats)
    for old, new, same in zip(*map(jax.tree.leaves, (stats, moved, kept)), strict=True):
        assert (old != new).any()
        assert (old == same).all()
    assert (name in ("vit_tiny", "cnn1d")) == (not jax.tree.leaves(stats))

    rounded_apply = jax.jit(functools.partial(small(name, BFLOAT16)[0], train=True))
    rounded, rounded_moved = rounded_apply(params, stats, images, keys=keys)
    assert rounded.dtype == FLOAT32
    assert {x.dtype for x in jax.tree.leaves(rounded_moved)} <= {jnp.dtype(FLOAT32)}
    assert 1e-5 < relative_error(rounded, logits) < 0.05
    if rounded_moved:
        assert relative_error(rounded_moved, moved) < 0.005


@pytest.mark.parametrize(
    ("name", "fan"),
    [
        ("cnn", "in"),
        ("resnet20", "in"),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("wrn16_8", "out"),
                ("densenet121", "in"),
                ("vgg19_bn", "out"),
                ("resnet18", "out"),
                ("resnet50", "out"),
            )
        ),
    ],
)
def test_variance_of_kernels(name, fan):
    image_shape, options = SMALL[name]
    init, _ = models.build(name, image_shape, 10, **options)
    shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(init, KEY))]
    tellers = [i for i, x in enumerate(shapes) if len(x) == 4 and x[2] != x[3]]
    largest = max(tellers, key=lambda i: math.prod(shapes[i]))
    kernel = jax.jit(lambda key: jax.tree.leaves(init(key))[largest])(KEY)
    height, width, n_in, n_out = kernel.shape
    expected = 2 / (height * width * (n_in if fan == "in" else n_out))
    # Five standard errors of as many normal numbers; truncated ones vary less.
    np.testing.assert_allclose(kernel.var(), expected, rtol=5 * math.sqrt(2 / kernel.size))
    np.testing.assert_allclose(kernel.mean(), 0, atol=5 * math.sqrt(expected / kernel.size))


def test_variance_of_transformers():
    init, _ = models.build("vit_tiny", (8, 8, 3), 10, depth=1)
    params, _ = jax.jit(init)(KEY)
    kernel = params["blocks"][0]["query_key_value"]["kernel"]
    for array in (params["positions"], params["class_token"], params["head"]["kernel"], kernel):
        np.testing.assert_allclose(array.std(), 0.02, rtol=5 * math.sqrt(0.5 / array.size))
    np.testing.assert_allclose(params["embedding"]["kernel"].var(), 1 / (3 * 48), rtol=0.1)


def test_seeds():
    def params(seed):
        return models.create("mlp", (2, 2, 1), 3, seed, width=8)[1]

    assert relative_error(params(0), params(0)) == 0
    assert relative_error(params(0), params(1)) > 0.5


def test_init_of_many_seeds():
    init, _ = models.build("mlp", (2, 2, 1), 3, width=8)
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    many = jax.jit(jax.vmap(init))(keys)
    for seed in range(2):
        _, *one = models.create("mlp", (2, 2, 1), 3, seed, width=8)
        got = jax.tree.map(lambda x, seed=seed: x[seed], many)
        assert relative_error(got, tuple(one)) < 1e-6


@pytest.mark.parametrize("name", some(["vgg19_bn", "vit_tiny"], ["vit_tiny"]))
def test_dropout(name):
    apply, params, stats, images = small(name, dropout=0.2)
    call = jax.jit(functools.partial(apply, train=True))
    first, same, other = (
        call(params, stats, images, keys=jax.random.split(key, len(images)))[0]
        for key in (KEY, KEY, jax.random.key(3))
    )
    assert (first == same).all()
    assert (first != other).any(axis=1).all()
    with pytest.raises(ValueError, match=r"needs keys=.*got keys=None"):
        call(params, stats, images)


@pytest.mark.parametrize(
    ("name", "image_shape", "message"),
    [
        ("resnet20", (32, 32), r"at least 4x4, for this model; got \(32, 32\)"),
        ("resnet20", (1, 8, 8, 3), r"got \(1, 8, 8, 3\)"),
        ("wrn28_2", (3, 8, 3), r"got \(3, 8, 3\)"),
        ("cnn", (3, 3, 1), r"at least 4x4"),
        ("densenet121", (8, 7, 3), r"at least 8x8, .* got \(8, 7, 3\)"),
        ("vgg19_bn", (16, 32, 3), r"at least 17x17, .* got \(16, 32, 3\)"),
        ("resnet18", (8, 8, 1), r"at least 17x17"),
        ("vit_tiny", (2, 2, 1), r"at least 4x4"),
        ("vit_tiny", (30, 32, 3), r"multiples of the patch, 4; got 30x32"),
        ("vit_small", (72, 64, 3), r"multiples of the patch, 16; got 72x64"),
    ],
)
def test_images_that_do_not_suit(name, image_shape, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, image_shape, 10, seed=0)


@pytest.mark.parametrize("shape", [(8, 8, 1), (2, 8, 8, 3), (2, 9, 8, 1)])
def test_images_of_another_shape(shape):
    apply, params, stats, _ = small("cnn")
    with pytest.raises(ValueError, match=r"images must have the shape \('batch', 8, 8, 1\); got"):
        apply(params, stats, jnp.zeros(shape), train=False)


def test_unknown_model():
    with pytest.raises(ValueError, match=r"no model 'resnt8': use mlp, .* Did you mean resnet8\?"):
        models.create("resnt8", (8, 8, 1), 10, seed=0)


SOURCE = """
import jax.numpy as jnp
from flax import nnx
from experiments.models.layers import Dropout, head

class Mine(nnx.Module):
    def __init__(self, image_shape, classes, *, dtype, rngs):
        self.norm = nnx.BatchNorm(image_shape[-1], rngs=rngs)
        self.head = head(image_shape[-1], classes, rngs=rngs)
    def __call__(self, images, *, train, keys):
        x = self.norm(images, use_running_average=not train).mean((1, 2))
        return self.head(Dropout(0.5, keys, active=train)(x))

class Wide(Mine):
    def __call__(self, images, **options):
        return jnp.concatenate(2 * [super().__call__(images, **options)], -1)

class Random(Mine):
    def __init__(self, *args, rngs, **options):
        super().__init__(*args, rngs=rngs, **options)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_models", None)


@pytest.mark.usefixtures("mine")
def test_a_model_from_elsewhere():
    apply, params, stats = models.create("my_models:Mine", (8, 8, 3), 5, seed=0)
    images, keys = jnp.ones((4, 8, 8, 3)), jax.random.split(jax.random.key(0), 4)
    logits, changed = apply(params, stats, images, train=True, keys=keys)
    assert logits.shape == (4, 5)
    assert jax.tree.leaves(jax.tree.map(jnp.array_equal, stats, changed)) != [True, True]


def test_a_convolution_of_ones_own_is_kept(monkeypatch):
    def doubled(*args, **options):
        return 2 * jax.lax.conv_general_dilated(*args, **options)

    apply, params, stats = models.create("cnn", (8, 8, 1), 3, seed=0)
    images = normal(2, 8, 8, 1)
    expected, _ = apply(params, stats, 2 * images, train=False)
    plain = nnx.Conv.__init__
    monkeypatch.setattr(
        nnx.Conv,
        "__init__",
        lambda self, n_in, *args, **options: plain(
            self, n_in, *args, **options | ({"conv_general_dilated": doubled} if n_in == 1 else {})
        ),
    )
    _, own = models.build("cnn", (8, 8, 1), 3)
    found, _ = own(params, stats, images, train=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_model_of_the_documentation(tmp_path, monkeypatch):
    text = (Path(models.__file__).parents[2] / "docs" / "training.md").read_text()
    (code,) = re.findall(r"^```python\n(from flax.*?)^```$", text, re.M | re.S)
    (tmp_path / "documented.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    apply, params, stats = models.create("documented:TwoLayers", (8, 8, 1), 10, seed=0)
    logits, _ = apply(params, stats, jnp.ones((4, 8, 8, 1)), train=True)
    assert logits.shape == (4, 10)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("their_models:Net", "cannot be imported: No module named 'their_models'. Run the command"),
        ("my_models:Nine", "cannot be imported: module 'my_models' has no attribute 'Nine'"),
        ("my_models:number", "must be a function or a class, got 3"),
        ("my_models:Wide", r"must return logits of the shape \(1, 5\); got \(1, 10\)"),
        ("my_models:Random", "for dropout, use experiments.models.layers.Dropout"),
        (":Mine", "there is no model ':Mine': use mlp"),
    ],
)
def test_models_from_elsewhere_that_cannot_be_used(name, message):
    def used():
        apply, params, stats = models.create(name, (8, 8, 3), 5, seed=0)
        apply(params, stats, jnp.ones((1, 8, 8, 3)), train=False)

    with pytest.raises(ValueError, match=message):
        used()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "vgg19_bn", "resnet18", "vit_tiny"])
def test_images_of_mnist(name):
    apply, params, stats = abstract(name, (28, 28, 1))
    images = jax.ShapeDtypeStruct((2, 28, 28, 1), FLOAT32)
    call = functools.partial(apply, train=False)
    assert jax.eval_shape(call, params, stats, images)[0].shape == (2, 10)


def test_only_the_positions_tell_patches_apart():
    apply, params, stats, images = small("vit_tiny")
    permuted = images.reshape(16, 2, 4, 8, 3)[:, ::-1].reshape(images.shape)
    call = jax.jit(functools.partial(apply, train=False))
    for positions, same in ((params["positions"], False), (0 * params["positions"], True)):
        first, second = (
            call(params | {"positions": positions}, stats, x)[0] for x in (images, permuted)
        )
        assert (relative_error(first, second) < 1e-5) == same
