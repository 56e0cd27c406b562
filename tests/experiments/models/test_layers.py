"""Layers that models share, and the blocks of each family, by their numbers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import cifar_resnet, densenet, layers, resnet, vit, wide_resnet
from tests.experiments.models.values import module, normal

FLOAT32, BFLOAT16 = jnp.float32, jnp.bfloat16
KEY = jax.random.key(1)


def evaluate(block, x):
    return jax.jit(lambda x: block(x, train=False))(x)


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


@pytest.mark.parametrize("stride", [1, 2])
def test_shortcut_without_parameters(stride):
    n_out = 4 * stride
    block = module(cifar_resnet.CifarBlock, 4, n_out, stride)
    block.norm_2.scale[...] = block.norm_2.bias[...] = jnp.zeros(n_out)
    x = normal(2, 8, 8, 4)
    y = evaluate(block, x)
    assert (y[..., :4] == jnp.maximum(x[:, ::stride, ::stride], 0)).all()
    assert (y[..., 4:] == 0).all()


def test_wide_blocks_pass_on_the_raw_input():
    block = module(wide_resnet.WideBlock, 4, 4, 1)
    block.convolution_2.kernel[...] = jnp.zeros((3, 3, 4, 4))
    x = normal(2, 8, 8, 4)
    assert (evaluate(block, x) == x).all()


def test_wide_blocks_project_the_normalised_input():
    block = module(wide_resnet.WideBlock, 4, 8, 2)
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
    block = module(resnet.ResNetBlock, 16, 8, 2, bottleneck=True)
    kernels = [(x.kernel_size, x.strides) for x in block.convolutions]
    assert kernels == [((1, 1), 1), ((3, 3), 2), ((1, 1), 1)]


@pytest.mark.parametrize("stride", [1, 2])
def test_residual_blocks_add_their_shortcut(stride):
    block = module(resnet.ResNetBlock, 16, 16, stride, bottleneck=False)
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


def test_attention():
    block = module(vit.TransformerBlock, 6, 2)
    block.projection.kernel[...], block.projection.bias[...] = jnp.eye(6), jnp.zeros(6)
    x = normal(1, 5, 6)
    query, key, value = np.split(np.asarray(block.query_key_value(x))[0], 3, axis=1)
    for head in (slice(0, 3), slice(3, 6)):
        weights = np.exp(query[:, head] @ key[:, head].T / math.sqrt(3))
        expected = weights / weights.sum(1, keepdims=True) @ value[:, head]
        np.testing.assert_allclose(
            block.attention(x, None, lambda x: x)[0, :, head], expected, rtol=1e-4, atol=1e-5
        )
