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
# Trainable parameters, and layers: those in the name, and shortcuts that are convolutions. The
# name of a wide network counts these, but not its head.
SIZES = {
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


@functools.cache
def abstract(name, image_shape=(32, 32, 3), classes=10):
    """`(apply, params, stats)` in bfloat16, without arrays."""
    init, apply = models.build(name, image_shape, classes, dtype=BFLOAT16)
    return apply, *jax.eval_shape(init, KEY)


def count(params):
    return sum(x.size for x in jax.tree.leaves(params))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), FLOAT32)


def drawn(tree):
    """Values for an abstract tree, without JAX, which would compile for each shape."""

    def draw(path, x):
        centre = 1.0 if path[-1].key in ("scale", "var") else 0.0
        deviation = 0.1 if x.ndim == 1 else math.sqrt(2 / math.prod(x.shape[:-1]))
        return centre + deviation * normal(*x.shape)

    return jax.tree.map_with_path(draw, tree)


def small(name, dtype=FLOAT32, **options):
    """`(apply, params, stats, images)` of a small member of a family."""
    image_shape, others = SMALL[name]
    init, apply = models.build(name, image_shape, 10, dtype=dtype, **others, **options)
    return apply, *drawn(jax.eval_shape(init, KEY)), normal(16, *image_shape, seed=1)


def module(kind, *args, **options):
    abstract = nnx.eval_shape(lambda: kind(*args, dtype=FLOAT32, rngs=nnx.Rngs(0), **options))
    graphdef, state = nnx.split(abstract)
    return nnx.merge(graphdef, drawn(nnx.to_pure_dict(state)))


def evaluate(block, x):
    return jax.jit(lambda x: block(x, train=False))(x)


def relative_error(x, y):
    x, y = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (x, y))
    return np.linalg.norm(x - y) / np.linalg.norm(y)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_architecture(name):
    apply, params, stats = abstract(name)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), FLOAT32)
    call = functools.partial(apply, train=True, keys=jax.random.split(KEY, 2))
    logits, new_stats = jax.eval_shape(call, params, stats, images)
    assert (logits.shape, logits.dtype) == ((2, 10), FLOAT32)
    assert new_stats == stats
    assert {x.dtype for x in jax.tree.leaves((params, stats))} == {jnp.dtype(FLOAT32)}
    convolutions = any(x.ndim == 4 for x in jax.tree.leaves(params))
    assert models.ARCHITECTURES[name].convolutional == convolutions
    if name in SIZES:
        layers = sum(x.ndim > 1 for x in jax.tree.leaves(params))
        assert (count(params), layers) == SIZES[name]


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


@pytest.mark.parametrize(("name", "width"), [("vit_tiny", 192), ("vit_small", 384)])
@pytest.mark.parametrize(("size", "channels", "patch"), [(28, 1, 4), (64, 3, 16)])
def test_number_of_parameters_of_transformers(name, width, size, channels, patch):
    def linear(n_in, n_out):
        return n_in * n_out + n_out

    block = 2 * (2 * width) + linear(width, 3 * width) + linear(width, width)
    block += linear(width, 4 * width) + linear(4 * width, width)
    tokens = (size // patch) ** 2 + 1
    expected = linear(patch * patch * channels, width) + width + tokens * width
    expected += 12 * block + 2 * width + linear(width, 10)
    assert count(abstract(name, (size, size, channels))[1]) == expected


@pytest.mark.parametrize("name", SMALL)
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
    assert (name == "vit_tiny") == (not jax.tree.leaves(stats))

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
        ("wrn16_8", "out"),
        ("densenet121", "in"),
        ("vgg19_bn", "out"),
        ("resnet18", "out"),
        ("resnet50", "out"),
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
    params, _ = init(KEY)
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


@pytest.mark.parametrize("name", ["vgg19_bn", "vit_tiny"])
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


def test_dropout_zeros_a_share_and_keeps_the_mean():
    keys, x = jax.random.split(KEY, 100), jnp.ones((100, 50))
    dropout = layers.Dropout(0.3, keys, active=True)
    first, second = dropout(x), dropout(x)
    for y in (first, second):
        np.testing.assert_allclose((y == 0).mean(), 0.3, atol=0.03)
        np.testing.assert_allclose(y[y != 0], 1 / 0.7, rtol=1e-6)
    # Each layer and each example has a mask of its own.
    assert (first != second).any(axis=1).all()
    assert len({row.tobytes() for row in np.asarray(first)}) == 100
    # Whoever else is in the batch.
    np.testing.assert_array_equal(layers.Dropout(0.3, keys[7:9], active=True)(x[7:9]), first[7:9])
    assert layers.Dropout(0.3, keys, active=False)(x) is x


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
    with pytest.raises(ValueError, match=r"model must be one of mlp, cnn, .*; got 'lenet'"):
        models.create("lenet", (8, 8, 1), 10, seed=0)


@pytest.mark.parametrize("name", ["resnet20", "vgg19_bn", "resnet18", "vit_tiny"])
def test_images_of_mnist(name):
    apply, params, stats = abstract(name, (28, 28, 1))
    images = jax.ShapeDtypeStruct((2, 28, 28, 1), FLOAT32)
    call = functools.partial(apply, train=False)
    assert jax.eval_shape(call, params, stats, images)[0].shape == (2, 10)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_batch_norm(dtype):
    norm = layers.BatchNorm(3, rngs=nnx.Rngs(0))
    mean, var = np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])
    scale, bias = np.array([1.0, 1.001, 3.0]), np.array([0.0, 0.1, 0.2])
    for name, value in {"mean": mean, "var": var, "scale": scale, "bias": bias}.items():
        getattr(norm, name)[...] = jnp.asarray(value, FLOAT32)
    # In bfloat16 a running sum of so many would stop at 512.
    x = (1.5 + 0.3 * normal(16, 16, 16, 3)).astype(dtype)
    exact = np.asarray(x, np.float64)
    batch_mean, batch_var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    for train, mean_used, var_used in ((False, mean, var), (True, batch_mean, batch_var)):
        y = norm(x, train=train)
        assert y.dtype == dtype
        expected = (exact - mean_used) / np.sqrt(var_used + 1e-5) * scale + bias
        rtol = 1e-4 if dtype == FLOAT32 else 2**-8
        np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=rtol, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.9 * mean + 0.1 * batch_mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 * var + 0.1 * batch_var, rtol=1e-5)


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize(("window", "padding"), [(2, "SAME"), (3, ((1, 1), (1, 1)))])
def test_max_pool(side, window, padding):
    x = jnp.abs(normal(2, side, side, 3))

    def reference(x):
        return nnx.max_pool(x, (window, window), strides=(2, 2), padding=padding)

    def weighted(pool, x):
        y = pool(x)
        return (y * jnp.cos(y)).sum(), y

    results = [
        jax.jit(jax.grad(functools.partial(weighted, pool), has_aux=True))(x)
        for pool in (reference, lambda x: layers.max_pool(x, window))
    ]
    (expected_gradient, expected), (gradient, y) = results
    assert (y == expected).all()
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "side"), [(1, 7), (3, 7), (3, 8), (7, 8)])
def test_strided_convolutions_are_centred_on_what_shortcuts_sample(size, side):
    convolution = module(layers.convolution, 2, 2, size, stride=2)
    centre = np.zeros((size, size, 2, 2), np.float32)
    centre[size // 2, size // 2] = np.eye(2)
    convolution.kernel[...] = jnp.asarray(centre)
    x = normal(1, side, side, 2)
    np.testing.assert_allclose(convolution(x), x[:, ::2, ::2], rtol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_shortcut_without_parameters(stride):
    n_out = 4 * stride
    block = module(cifar_resnet.Block, 4, n_out, stride)
    block.norm_2.scale[...] = block.norm_2.bias[...] = jnp.zeros(n_out)
    x = normal(2, 8, 8, 4)
    y = evaluate(block, x)
    assert (y[..., :4] == jnp.maximum(x[:, ::stride, ::stride], 0)).all()
    assert (y[..., 4:] == 0).all()


def test_wide_blocks_pass_on_the_raw_input():
    block = module(wide_resnet.Block, 4, 4, 1)
    block.convolution_2.kernel[...] = jnp.zeros((3, 3, 4, 4))
    x = normal(2, 8, 8, 4)
    assert (evaluate(block, x) == x).all()


def test_wide_blocks_project_the_normalised_input():
    block = module(wide_resnet.Block, 4, 8, 2)
    block.convolution_2.kernel[...] = jnp.zeros((3, 3, 8, 8))
    x = normal(2, 8, 8, 4)
    positive = np.maximum(evaluate(block.norm_1, x), 0)[:, ::2, ::2]
    expected = np.einsum("bhwi,io->bhwo", positive, block.shortcut.kernel[0, 0])
    np.testing.assert_allclose(evaluate(block, x), expected, rtol=1e-4, atol=1e-6)


def test_dense_layers_keep_what_they_are_given():
    x = normal(2, 4, 4, 6)
    y = evaluate(module(densenet.DenseLayer, 6, 2), x)
    assert y.shape == (2, 4, 4, 8)
    assert (y[..., :6] == x).all()


def test_bottlenecks_have_their_stride_in_the_middle():
    block = module(resnet.Block, 16, 8, 2, bottleneck=True)
    kernels = [(x.kernel_size, x.strides) for x in block.convolutions]
    assert kernels == [((1, 1), 1), ((3, 3), 2), ((1, 1), 1)]


@pytest.mark.parametrize("stride", [1, 2])
def test_residual_blocks_add_their_shortcut(stride):
    block = module(resnet.Block, 16, 16, stride, bottleneck=False)
    block.norms[1].scale[...] = block.norms[1].bias[...] = jnp.zeros(16)
    x = normal(2, 8, 8, 16)
    shortcut = x if block.shortcut is None else evaluate(block.shortcut, x)
    assert shortcut.shape == (2, 8 // stride, 8 // stride, 16)
    np.testing.assert_allclose(evaluate(block, x), np.maximum(shortcut, 0), rtol=1e-5, atol=1e-6)


def test_patches_are_a_strided_convolution():
    images, kernel = normal(2, 8, 12, 3), normal(4, 4, 3, 5)
    strided = jax.lax.conv_general_dilated(
        images, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    got = vit.patches(images, 4) @ kernel.reshape(-1, 5)
    np.testing.assert_allclose(got, strided.reshape(2, 6, 5), rtol=1e-4, atol=1e-4)


def test_only_the_positions_tell_patches_apart():
    apply, params, stats, images = small("vit_tiny")
    permuted = images.reshape(16, 2, 4, 8, 3)[:, ::-1].reshape(images.shape)
    call = jax.jit(functools.partial(apply, train=False))
    for positions, same in ((params["positions"], False), (0 * params["positions"], True)):
        first, second = (
            call(params | {"positions": positions}, stats, x)[0] for x in (images, permuted)
        )
        assert (relative_error(first, second) < 1e-5) == same


def test_attention():
    block = module(vit.Block, 6, 2)
    block.projection.kernel[...], block.projection.bias[...] = jnp.eye(6), jnp.zeros(6)
    x = normal(1, 5, 6)
    query, key, value = np.split(np.asarray(block.query_key_value(x))[0], 3, axis=1)
    for head in (slice(0, 3), slice(3, 6)):
        weights = np.exp(query[:, head] @ key[:, head].T / math.sqrt(3))
        expected = weights / weights.sum(1, keepdims=True) @ value[:, head]
        np.testing.assert_allclose(block.attention(x)[0, :, head], expected, rtol=1e-4, atol=1e-5)
