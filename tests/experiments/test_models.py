"""Every architecture by its shapes; a small member of each family by its numbers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import models
from experiments.models import cifar_resnet, densenet, layers, resnet, vit, wide_resnet

FLOAT32, BFLOAT16 = jnp.float32, jnp.bfloat16
# (image shape, options) of a member of each family that compiles fast.
SMALL = {
    "mlp": ((8, 8, 1), {"width": 32}),
    "cnn": ((8, 8, 1), {"width": 8}),
    "resnet20": ((8, 8, 3), {"depth": 8}),
    "wrn16_8": ((8, 8, 3), {"depth": 10, "width": 2}),
    "densenet121": ((8, 8, 3), {"layers": (1, 2), "growth": 8}),
    "vgg19_bn": ((17, 17, 3), {"convolutions": (1, 1, 1, 1, 1)}),
    "resnet18": ((17, 17, 3), {"blocks": (1, 1)}),
    "resnet50": ((17, 17, 3), {"blocks": (1, 1)}),
    "vit_tiny": ((8, 8, 3), {"depth": 2}),
}
WITH_DROPOUT = {"vgg19_bn": {"dropout": 0.5}, "vit_tiny": {"dropout": 0.1}}
KEY = jax.random.key(1)

build = functools.cache(models.build)


@functools.cache
def small(name, dtype=FLOAT32):
    """`(apply, params, stats, images)`, `apply` compiled."""
    image_shape, options = SMALL[name]
    apply, params, stats = models.create(name, image_shape, 10, seed=0, dtype=dtype, **options)
    images = jax.random.uniform(jax.random.key(2), (16, *image_shape))
    return jax.jit(apply, static_argnames="train"), params, stats, images


def abstract(name, image_shape=(32, 32, 3), classes=10, dtype=FLOAT32):
    init, apply = build(name, image_shape, classes, dtype=dtype)
    return apply, *jax.eval_shape(init, KEY)


def count(name, image_shape=(32, 32, 3), classes=10):
    _, params, _ = abstract(name, image_shape, classes)
    return sum(x.size for x in jax.tree.leaves(params))


def relative_error(x, y):
    x, y = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (x, y))
    return jnp.linalg.norm(x - y) / jnp.linalg.norm(y)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet56", 853_018),
        ("wrn28_2", 1_467_610),
        ("wrn28_10", 36_479_194),
        ("wrn16_8", 10_961_370),
        ("densenet121", 6_956_298),
        ("vgg19_bn", 20_565_834),
        ("resnet18", 11_181_642),
        ("resnet50", 23_528_522),
    ],
)
def test_number_of_parameters(name, expected):
    assert count(name) == expected


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
    assert count(name, (224, 224, 3), 1000) == expected


@pytest.mark.parametrize(("name", "width"), [("vit_tiny", 192), ("vit_small", 384)])
@pytest.mark.parametrize(("size", "channels", "patch"), [(32, 3, 4), (28, 1, 4), (64, 3, 16)])
def test_number_of_parameters_of_transformers(name, width, size, channels, patch):
    def linear(n_in, n_out):
        return n_in * n_out + n_out

    block = 2 * (2 * width) + linear(width, 3 * width) + linear(width, width)
    block += linear(width, 4 * width) + linear(4 * width, width)
    tokens = (size // patch) ** 2 + 1
    expected = linear(patch * patch * channels, width) + width + tokens * width
    expected += 12 * block + 2 * width + linear(width, 10)
    assert count(name, (size, size, channels)) == expected


@pytest.mark.parametrize(
    ("name", "expected", "projections"),
    [
        ("resnet20", 20, 0),
        ("resnet32", 32, 0),
        ("resnet56", 56, 0),
        # These papers count the shortcuts of wide networks, but not their heads.
        ("wrn16_8", 16 + 1, 0),
        ("wrn28_10", 28 + 1, 0),
        ("densenet121", 121, 0),
        ("vgg19_bn", 19, 0),
        ("resnet18", 18, 3),
        ("resnet50", 50, 4),
    ],
)
def test_depth(name, expected, projections):
    _, params, _ = abstract(name)
    kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
    assert len(kernels) == expected + projections


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_shapes_and_types(name):
    apply, params, stats = abstract(name, classes=7, dtype=BFLOAT16)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), FLOAT32)
    call = functools.partial(apply, train=True, key=KEY)
    logits, new_stats = jax.eval_shape(call, params, stats, images)
    assert (logits.shape, logits.dtype) == ((2, 7), FLOAT32)
    assert new_stats == stats
    assert {x.dtype for x in jax.tree.leaves((params, stats))} == {jnp.dtype(FLOAT32)}
    convolutions = any(x.ndim == 4 for x in jax.tree.leaves(params))
    assert models.ARCHITECTURES[name].convolutional == convolutions


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_is_close_to_float32(name):
    results = []
    for dtype in (FLOAT32, BFLOAT16):
        apply, params, stats, images = small(name, dtype)
        logits, new_stats = apply(params, stats, images, train=True, key=KEY)
        assert (logits.shape, logits.dtype) == ((16, 10), FLOAT32)
        assert jnp.isfinite(logits).all()
        assert {x.dtype for x in jax.tree.leaves(new_stats)} <= {jnp.dtype(FLOAT32)}
        results.append((logits, new_stats))
    (exact, exact_stats), (rounded, rounded_stats) = results
    assert 1e-5 < relative_error(rounded, exact) < 0.05
    if exact_stats:
        assert relative_error(rounded_stats, exact_stats) < 0.005


@pytest.mark.parametrize("name", SMALL)
def test_statistics_move_if_and_only_if_training(name):
    apply, params, stats, images = small(name)
    _, moved = apply(params, stats, images, train=True, key=KEY)
    _, kept = apply(params, stats, images, train=False)
    assert jax.tree.structure(moved) == jax.tree.structure(kept) == jax.tree.structure(stats)
    for old, new, same in zip(*map(jax.tree.leaves, (stats, moved, kept)), strict=True):
        assert (old != new).any()
        assert (old == same).all()
    assert (name == "vit_tiny") == (not jax.tree.leaves(stats))


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_has_a_gradient(name):
    apply, params, stats, images = small(name)

    def loss(params):
        logits, _ = apply(params, stats, images, train=True, key=KEY)
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, jnp.arange(16) % 10
        ).mean()

    for path, gradient in jax.tree.leaves_with_path(jax.grad(loss)(params)):
        # A bias before batch normalisation has none.
        if "convolutions" not in str(path) or "bias" not in str(path):
            assert jnp.linalg.norm(gradient) > 1e-5, path


@pytest.mark.parametrize(
    ("name", "fan"),
    [
        ("cnn", "in"),
        ("resnet20", "in"),
        ("wrn16_8", "out"),
        ("densenet121", "in"),
        ("vgg19_bn", "out"),
        ("resnet18", "out"),
        ("resnet50", "out"),
    ],
)
def test_variance_of_kernels(name, fan):
    kernels = [x for x in jax.tree.leaves(small(name)[1]) if x.ndim == 4 and x.size > 1000]
    assert kernels
    for kernel in kernels:
        height, width, n_in, n_out = kernel.shape
        expected = 2 / (height * width * (n_in if fan == "in" else n_out))
        # Five standard errors of the variance of as many normal numbers, which is a little more.
        tolerance = 5 * math.sqrt(2 / kernel.size)
        np.testing.assert_allclose(kernel.var(), expected, rtol=tolerance)
        np.testing.assert_allclose(kernel.mean(), 0, atol=5 * math.sqrt(expected / kernel.size))


def test_variance_of_transformers():
    _, params, _, _ = small("vit_tiny")
    blocks = [params["blocks"][i]["query_key_value"]["kernel"] for i in range(2)]
    for array in (params["positions"], params["class_token"], params["head"]["kernel"], *blocks):
        np.testing.assert_allclose(array.std(), 0.02, rtol=5 * math.sqrt(0.5 / array.size))
    assert (blocks[0] != blocks[1]).all()
    np.testing.assert_allclose(params["embedding"]["kernel"].var(), 1 / (3 * 48), rtol=0.1)


def test_seeds():
    first, same, other = (models.create("mlp", (8, 8, 1), 10, seed)[1] for seed in (0, 0, 1))
    assert relative_error(first, same) == 0
    assert relative_error(first, other) > 1


def test_init_of_many_seeds():
    init, _ = build("vit_tiny", (4, 4, 1), 3, depth=1)
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    params, stats = jax.jit(jax.vmap(init))(keys)
    assert not jax.tree.leaves(stats)
    for seed in range(2):
        _, expected, _ = models.create("vit_tiny", (4, 4, 1), 3, seed, depth=1)
        got = jax.tree.map(lambda x, seed=seed: x[seed], params)
        assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize(("name", "options"), WITH_DROPOUT.items())
def test_dropout(name, options):
    image_shape, small_options = SMALL[name]
    apply, params, stats = models.create(name, image_shape, 10, seed=0, **small_options | options)
    images = small(name)[-1]
    call = jax.jit(functools.partial(apply, train=True))
    first, same, other = (
        call(params, stats, images, key=key)[0] for key in (KEY, KEY, jax.random.key(3))
    )
    assert (first == same).all()
    assert (first != other).all()
    with pytest.raises(ValueError, match=r"needs key=.*got key=None"):
        call(params, stats, images)
    evaluate = jax.jit(functools.partial(apply, train=False))
    exact, _ = evaluate(params, stats, images)
    assert (exact == evaluate(params, stats, images, key=KEY)[0]).all()
    without = models.build(name, image_shape, 10, **small_options | {"dropout": 0.0})[1]
    # Without dropout, training needs no key.
    no_dropout, _ = jax.jit(functools.partial(without, train=True))(params, stats, images)
    assert relative_error(first, no_dropout) > 0.01


def test_dropout_has_a_key_for_each_layer():
    drawn = layers.dropout_keys(KEY, active=True)
    keys = {jax.random.key_data(next(drawn)).tobytes() for _ in range(40)}
    assert len(keys) == 40
    assert next(layers.dropout_keys(KEY, active=False)) is None


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
    with pytest.raises(ValueError, match="model must be one of mlp, cnn, .*; got 'lenet'"):
        models.create("lenet", (8, 8, 1), 10, seed=0)


@pytest.mark.parametrize("name", ["resnet56", "vgg19_bn", "densenet121", "resnet18", "vit_tiny"])
def test_images_of_mnist(name):
    apply, params, stats = abstract(name, (28, 28, 1))
    images = jax.ShapeDtypeStruct((2, 28, 28, 1), FLOAT32)
    call = functools.partial(apply, train=False)
    assert jax.eval_shape(call, params, stats, images)[0].shape == (2, 10)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_batch_norm(dtype):
    norm = layers.BatchNorm(3, rngs=nnx.Rngs(0))
    norm.mean[...], norm.var[...] = jnp.array([0.0, 1.0, 2.0]), jnp.array([1.0, 2.0, 3.0])
    norm.scale[...], norm.bias[...] = jnp.array([1.0, 1.001, 3.0]), jnp.array([0.0, 0.1, 0.2])
    # In bfloat16 a running sum of so many would stop at 512.
    x = (1 + jax.random.uniform(KEY, (16, 16, 16, 3))).astype(dtype)
    exact = np.asarray(x.astype(FLOAT32), np.float64).reshape(-1, 3)
    tolerance = 1e-5 if dtype == FLOAT32 else 2**-8

    def expected(mean, variance):
        return (exact - mean) / np.sqrt(variance + 1e-5) * [1, 1.001, 3] + [0, 0.1, 0.2]

    evaluated = norm(x, train=False)
    trained = norm(x, train=True)
    assert evaluated.dtype == trained.dtype == dtype
    for y, z in (
        (evaluated, expected([0, 1, 2], [1, 2, 3])),
        (trained, expected(exact.mean(0), exact.var(0))),
    ):
        np.testing.assert_allclose(y.astype(FLOAT32).reshape(-1, 3), z, tolerance, 1e-5)
    np.testing.assert_allclose(norm.mean[...], [0, 0.9, 1.8] + 0.1 * exact.mean(0), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], [0.9, 1.8, 2.7] + 0.1 * exact.var(0), rtol=1e-5)


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize(("window", "padding"), [(2, "SAME"), (3, ((1, 1), (1, 1)))])
def test_max_pool(side, window, padding):
    x = jax.random.uniform(KEY, (2, side, side, 3))

    def reference(x):
        return nnx.max_pool(x, (window, window), strides=(2, 2), padding=padding)

    results = []
    for pool in (reference, lambda x: layers.max_pool(x, window)):
        y, pullback = jax.vjp(pool, x)
        results.append((y, pullback(jnp.cos(y))[0]))
    (y, gradient), (expected, expected_gradient) = results
    assert (y == expected).all()
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6)


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_strided_convolutions_are_centred_on_what_shortcuts_sample(side, size):
    convolution = layers.convolution(2, 2, size, stride=2, dtype=FLOAT32, rngs=nnx.Rngs(0))
    centre = jnp.zeros((size, size, 2, 2)).at[size // 2, size // 2].set(jnp.eye(2))
    convolution.kernel[...] = centre
    x = jax.random.normal(KEY, (1, side, side, 2))
    np.testing.assert_allclose(convolution(x), x[:, ::2, ::2], rtol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_shortcut_without_parameters(stride):
    n_out = 4 * stride
    block = cifar_resnet.Block(4, n_out, stride, dtype=FLOAT32, rngs=nnx.Rngs(0))
    block.norm_2.scale[...] = jnp.zeros(n_out)
    x = jax.random.normal(KEY, (2, 8, 8, 4))
    y = block(x, train=True)
    assert (y[..., :4] == jnp.maximum(x[:, ::stride, ::stride], 0)).all()
    assert (y[..., 4:] == 0).all()


def test_wide_blocks():
    x = jax.random.normal(KEY, (2, 8, 8, 4))
    for n_out in (4, 8):
        block = wide_resnet.Block(4, n_out, 1, dtype=FLOAT32, rngs=nnx.Rngs(0))
        block.convolution_2.kernel[...] = jnp.zeros((3, 3, n_out, n_out))
        y = block(x, train=False)
        if n_out == 4:
            assert block.shortcut is None
            assert (y == x).all()
        else:
            positive = jnp.maximum(x, 0) / jnp.sqrt(1 + 1e-5)
            expected = jnp.einsum("bhwi,io->bhwo", positive, block.shortcut.kernel[0, 0])
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)


def test_dense_layers_keep_what_they_are_given():
    layer = densenet.DenseLayer(6, 2, dtype=FLOAT32, rngs=nnx.Rngs(0))
    x = jax.random.normal(KEY, (2, 4, 4, 6))
    y = layer(x, train=True)
    assert y.shape == (2, 4, 4, 8)
    assert (y[..., :6] == x).all()


def test_bottlenecks_have_their_stride_in_the_middle():
    block = resnet.Block(16, 8, 2, bottleneck=True, dtype=FLOAT32, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 8, 8, 16))
    shapes = []
    for convolution in block.convolutions:
        x = convolution(x)
        shapes.append(x.shape[1:])
    assert shapes == [(8, 8, 8), (4, 4, 8), (4, 4, 32)]


def test_residual_blocks_add_their_shortcut():
    x = jax.random.normal(KEY, (2, 8, 8, 16))
    for stride in (1, 2):
        block = resnet.Block(16, 16, stride, bottleneck=False, dtype=FLOAT32, rngs=nnx.Rngs(0))
        block.norms[-1].scale[...] = jnp.zeros(16)
        shortcut = x if stride == 1 else block.shortcut(x, train=False)
        assert (block(x, train=False) == jnp.maximum(shortcut, 0)).all()
        assert (block.shortcut is None) == (stride == 1)


def test_patches_are_a_strided_convolution():
    images = jax.random.normal(KEY, (2, 8, 12, 3))
    kernel = jax.random.normal(jax.random.key(2), (4, 4, 3, 5))
    convolution = nnx.Conv(3, 5, (4, 4), strides=4, use_bias=False, rngs=nnx.Rngs(0))
    convolution.kernel[...] = kernel
    got = vit.patches(images, 4) @ kernel.reshape(-1, 5)
    np.testing.assert_allclose(got, convolution(images).reshape(2, 6, 5), rtol=1e-4, atol=1e-5)


def test_only_the_positions_tell_patches_apart():
    apply, params, stats, images = small("vit_tiny")
    permuted = images.reshape(16, 2, 4, 8, 3)[:, ::-1].reshape(images.shape)
    for positions, same in ((params["positions"], False), (0 * params["positions"], True)):
        first, second = (
            apply(params | {"positions": positions}, stats, x, train=False)[0]
            for x in (images, permuted)
        )
        assert (relative_error(first, second) < 1e-5) == same


def test_attention():
    block = vit.Block(6, 2, 0.0, dtype=FLOAT32, rngs=nnx.Rngs(0))
    block.query_key_value.kernel[...] *= 50
    block.projection.kernel[...] = jnp.eye(6)
    x = jax.random.normal(KEY, (1, 5, 6))
    query, key, value = np.split(np.asarray(block.query_key_value(x))[0], 3, axis=1)
    for head in (slice(0, 3), slice(3, 6)):
        weights = np.exp(query[:, head] @ key[:, head].T / math.sqrt(3))
        expected = weights / weights.sum(1, keepdims=True) @ value[:, head]
        np.testing.assert_allclose(block.attention(x)[0, :, head], expected, rtol=1e-4)
