"""Layers that several models share: convolution, batch normalization, pooling, dropout."""

import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

# Flax before 0.12 takes plain lists. Later versions want lists of modules to be marked.
module_list: Any = getattr(nnx, "List", list)


def convolution(
    n_in: int,
    n_out: int,
    size: int,
    *,
    stride: int = 1,
    fan: Literal["fan_in", "fan_out"] = "fan_in",
    use_bias: bool = False,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Makes a `size` x `size` convolution, padded as in PyTorch, with kernel variance 2 / `fan`."""
    return nnx.Conv(
        n_in,
        n_out,
        kernel_size=(size, size),
        strides=stride,
        # "SAME" pads strided convolutions only on the right: not the pixels that shortcuts sample.
        padding=size // 2,
        use_bias=use_bias,
        kernel_init=nnx.initializers.variance_scaling(2.0, fan, "truncated_normal"),
        dtype=dtype,
        rngs=rngs,
    )


class BatchNorm(nnx.BatchNorm):
    """Batch normalization in float32, returned in the input's dtype.

    Running statistics have PyTorch's momentum of 0.1. Unlike PyTorch's, the running variance has
    no Bessel correction.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs) -> None:
        # In bfloat16, nnx would round the statistics and the scale before it normalizes.
        super().__init__(features, momentum=0.9, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return super().__call__(x, use_running_average=not train).astype(x.dtype)


def head(n_in: int, classes: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """Makes the last layer, in float32: logits keep their precision in any compute dtype."""
    return nnx.Linear(n_in, classes, dtype=jnp.float32, rngs=rngs)


def global_mean(x: jax.Array) -> jax.Array:
    """Returns the float32 mean over height and width of [batch, height, width, channels]."""
    return x.mean(axis=(1, 2), dtype=jnp.float32)


def max_pool(x: jax.Array, window: int) -> jax.Array:
    """Returns maxima over `window` x `window` pixels at every second pixel, for x >= 0.

    `window` is 2 or 3. Half of an odd side is rounded up. A window of 3 is centered on its pixel, a
    window of 2 starts at it.
    """
    # The gradient of a reduce-window is a scatter, on CPU many times slower than these slices.
    for axis in (1, 2):
        size = -(-x.shape[axis] // 2)
        before = (window - 1) // 2
        padding = [(0, 0)] * x.ndim
        padding[axis] = (before, 2 * size - x.shape[axis])
        padded = jnp.pad(x, padding)
        x = functools.reduce(
            jnp.maximum,
            [
                jax.lax.slice_in_dim(padded, start, start + 2 * size - 1, stride=2, axis=axis)
                for start in range(window)
            ],
        )
    return x


class Dropout:
    """The dropout layers of one pass. Each call is the next layer and draws a new mask."""

    def __init__(self, rate: float, keys: jax.Array | None, *, active: bool) -> None:
        """Takes one key per example, Key[batch]. Drops nothing unless `active`.

        Raises:
            ValueError: if dropout is active without keys.
        """
        self._rate = rate if active else 0.0
        if self._rate and keys is None:
            raise ValueError("train=True with dropout needs keys=, one per example; got keys=None")
        self._keys = keys
        self._layers = itertools.count()

    def __call__(self, x: jax.Array) -> jax.Array:
        if self._keys is None or not self._rate:
            return x
        layer = next(self._layers)

        # One mask per example: it does not depend on how the batch is split.
        def mask_of(key: jax.Array) -> jax.Array:
            return jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - self._rate, x.shape[1:])

        return jnp.where(jax.vmap(mask_of)(self._keys), x / (1 - self._rate), 0)


def check_image_shape(image_shape: tuple[int, ...], smallest: int) -> None:
    """Raises ValueError unless it is (height, width, channels) with both sides >= `smallest`."""
    if len(image_shape) != 3 or min(image_shape[:2]) < smallest:
        raise ValueError(
            "image_shape must be (height, width, channels), at least "
            f"{smallest}x{smallest}, for this model; got {tuple(image_shape)}"
        )
