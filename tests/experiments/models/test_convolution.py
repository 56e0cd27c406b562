"""Convolutions as matrix products against XLA's, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import models
from experiments.models import convolution
from experiments.models.convolution import as_products, convolve

pytestmark = pytest.mark.usefixtures("float64", "settings_of_a_user")


def normals(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def layer_of(n_in, n_out, size, dtype=jnp.float64, **options):
    return nnx.Conv(
        n_in,
        n_out,
        size,
        use_bias=False,
        param_dtype=dtype,
        dtype=dtype,
        rngs=nnx.Rngs(0),
        **options,
    )


def both(shape, n_out, size, dtype=jnp.float64, **options):
    """Results and gradients in kernel and images, of XLA's convolution and of ours."""
    x = normals(*shape).astype(dtype)
    for function in (jax.lax.conv_general_dilated, convolve):
        options["conv_general_dilated"] = function
        graph, params = nnx.split(layer_of(shape[-1], n_out, size, dtype, **options))

        def loss(params, x, graph=graph):
            y = nnx.merge(graph, params)(x)
            return jnp.sum(jnp.tanh(y.astype(jnp.float64)) ** 2), y

        yield jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)


def check(found, expected, rtol=1e-13):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize(
    ("strides", "size", "padding"),
    [
        (1, (3, 3), "SAME"),
        (2, (3, 3), "SAME"),
        (2, (3, 3), 1),
        (2, (1, 1), "SAME"),
        (1, (1, 1), 1),
        ((1, 2), (2, 5), "SAME"),
        ((1, 2), (2, 5), "VALID"),
        ((3, 2), (5, 2), ((0, 2), (1, 0))),
    ],
    ids=str,
)
def test_windows(strides, size, padding):
    check(*both((3, 7, 9, 4), 6, size, strides=strides, padding=padding))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "n_out", "size", "options"),
    [
        ((3, 7, 9, 4), 6, (3, 3), {"feature_group_count": 2}),
        ((3, 7, 9, 4), 8, (3, 3), {"feature_group_count": 4, "strides": 2}),
        ((3, 9, 9, 4), 6, (3, 2), {"kernel_dilation": 2}),
        ((3, 9, 9, 4), 6, (3, 2), {"kernel_dilation": 2, "padding": "VALID"}),
        ((3, 7, 9, 4), 6, (3, 3), {"input_dilation": 2, "padding": 1}),
        ((3, 20, 4), 6, (5,), {"strides": 2, "padding": 1}),
        ((3, 20, 4), 6, (5,), {"feature_group_count": 2, "kernel_dilation": 2}),
        ((2, 5, 4, 3, 2), 3, (3, 3, 3), {}),
    ],
    ids=str,
)
def test_whatever_flax_takes(shape, n_out, size, options):
    check(*both(shape, n_out, size, **options))


@pytest.mark.parametrize("batch", [1, 6, 8])
def test_blocks_and_what_is_left(batch, monkeypatch):
    """Blocks of three examples: one example, no rest, and a rest of two."""
    shape = (batch, 5, 6, 4)
    monkeypatch.setattr(convolution, "_BLOCK_NUMBERS", 3 * 5 * 6 * (3 * 4 + 3 * 7))
    check(*both(shape, 7, (3, 3)))


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-7)])
def test_narrow_types_are_rounded_once(dtype, rtol):
    check(*both((8, 8, 8, 16), 16, (3, 3), dtype), rtol=rtol)
    x, kernel = (normals(*shape).astype(dtype) for shape in ((4, 6, 6, 8), (3, 3, 8, 5)))
    same = functools.partial(as_products, strides=(1, 1), padding=((1, 1), (1, 1)))
    found = np.asarray(jax.jit(same)(x, kernel), np.float64)
    x, kernel = (v.astype(jnp.float64) for v in (x, kernel))
    # Half a unit of the result, and one unit of float32 for every term of a sum of 72.
    bound = jnp.finfo(dtype).eps / 2 * np.abs(found) + 72 * 2**-24 * same(abs(x), abs(kernel))
    assert (np.abs(found - same(x, kernel)) <= 1.01 * bound).all()


@pytest.mark.slow
def test_under_every_transformation():
    """vmap over kernels, loops, and derivatives of derivatives."""
    images, kernel = (normals(*shape) for shape in ((4, 6, 6, 3), (3, 3, 3, 5)))
    direction = normals(3, 3, 3, 5, seed=2)

    def of(function):
        def loss(kernel, images=images):
            y = function(
                images,
                kernel,
                (1, 1),
                ((1, 1), (1, 1)),
                lhs_dilation=(1, 1),
                rhs_dilation=(1, 1),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            return jnp.sum(jnp.tanh(y) ** 2)

        gradient = jax.grad(loss)

        def product(vector):
            return jax.jvp(gradient, (kernel,), (vector,))[1]

        kernels = jnp.stack([kernel, 2 * kernel])

        def descend(kernel, images):
            return kernel - 0.1 * jax.grad(loss)(kernel, images), None

        return {
            "vmap": jax.vmap(gradient)(kernels),
            "vmap, own images": jax.vmap(gradient)(kernels, jnp.stack([images, -images])),
            "scan": jax.lax.scan(descend, kernel, jnp.stack([images, -images, images]))[0],
            "hessian": jax.vmap(product)(jnp.stack([kernel, direction])),
            "reverse over reverse": jax.grad(lambda k: jnp.vdot(gradient(k), direction))(kernel),
            "remat": jax.grad(jax.checkpoint(loss))(kernel),
        }

    found, expected = (
        jax.jit(lambda f=f: of(f))() for f in (convolve, jax.lax.conv_general_dilated)
    )
    check(found, expected, rtol=1e-12)


def test_elsewhere_it_is_the_compilers():
    """What is compiled for CPUs has no convolution, and for other devices nothing else."""
    apply, params, stats = models.create("cnn", (8, 8, 3), 10, 0)
    images = jnp.zeros((2, 8, 8, 3), jnp.float32)

    def loss(params):
        return apply(params, stats, images, train=True)[0].sum()

    program = jax.jit(jax.grad(loss)).trace(params)
    cpu, other = (
        program.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu")
    )
    assert "stablehlo.convolution" not in cpu
    # Three layers forward, as many kernels, and the images of all but the first.
    assert other.count("stablehlo.convolution") == 3 + 3 + 2
    # The last layer's.
    assert other.count("stablehlo.dot_general") == 3 - 1


def test_products_on_all_devices():
    """There in one block: a loop would leave an accelerator idle."""
    images, kernel = jnp.zeros((64, 16, 16, 8)), jnp.zeros((3, 3, 8, 8))

    def program():
        options = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1)}
        options["dimension_numbers"] = ("NHWC", "HWIO", "NHWC")
        convolved = jax.jit(lambda *args: convolve(*args, (1, 1), "SAME", **options))
        return convolved.trace(images, kernel).lower(lowering_platforms=("cuda",)).as_text()

    with convolution.products_on_all_devices():
        inside = program()
    assert inside.count("stablehlo.dot_general") == 1
    assert "stablehlo.while" not in inside
    assert "stablehlo.convolution" not in inside
    assert program().count("stablehlo.convolution") == 1


def test_the_kernels_gradient_is_rounded_once(monkeypatch):
    """In bfloat16, a sum over 64 blocks of one example would lose half of its digits."""
    monkeypatch.setattr(convolution, "_BLOCK_NUMBERS", 1)
    found, expected = both((64, 6, 6, 8), 8, (3, 3), jnp.bfloat16)
    check(found, expected, rtol=2**-7)


def test_another_dtype_of_the_result():
    x, layer = normals(2, 6, 6, 3).astype(jnp.bfloat16), functools.partial(nnx.Conv, 3, 4, (3, 3))
    options = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}
    y, expected = (
        layer(**options, conv_general_dilated=function, rngs=nnx.Rngs(0))(x)
        for function in (convolve, jax.lax.conv_general_dilated)
    )
    check(y, expected, rtol=1e-6)


def test_only_the_images_are_kept_for_the_backward_pass():
    images, kernel = jnp.zeros((64, 16, 16, 8)), jnp.zeros((3, 3, 8, 8))

    def loss(images, kernel):
        several_blocks = {"block_numbers": 2**16}
        return as_products(images, kernel, (1, 1), ((1, 1), (1, 1)), **several_blocks).sum()

    _, pullback = jax.vjp(loss, images, kernel)
    kept = sum(x.size for x in jax.tree.leaves(pullback))
    assert kept <= images.size + 2 * kernel.size + 64
