"""What the families share: convolutions, batch normalisation, dropout's keys, checks."""

import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


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
    """A `size` x `size` convolution that halves like PyTorch's, of variance 2 / `fan`."""
    return nnx.Conv(
        n_in,
        n_out,
        kernel_size=(size, size),
        strides=stride,
        # "SAME" would pad strided convolutions on the right alone, beside what shortcuts sample.
        padding=size // 2,
        use_bias=use_bias,
        kernel_init=nnx.initializers.variance_scaling(2.0, fan, "truncated_normal"),
        dtype=dtype,
        rngs=rngs,
    )


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation in float32, returned in the input's dtype.

    Running statistics move by a tenth (PyTorch's momentum 0.1), the variance without Bessel's
    correction, unlike PyTorch's.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs) -> None:
        # In bfloat16, nnx would round the statistics and the scale before it normalises.
        super().__init__(features, momentum=0.9, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return super().__call__(x, use_running_average=not train).astype(x.dtype)


def head(n_in: int, classes: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """The last layer, in float32: logits keep their digits whatever the compute dtype."""
    return nnx.Linear(n_in, classes, dtype=jnp.float32, rngs=rngs)


def global_mean(x: jax.Array) -> jax.Array:
    """The mean over height and width of [batch, height, width, channels], in float32."""
    return x.mean(axis=(1, 2), dtype=jnp.float32)


def max_pool(x: jax.Array, window: int) -> jax.Array:
    """Maxima of `window` x `window` pixels, 2 or 3, around every second pixel of x >= 0.

    An odd side is rounded up. Windows of 3 are centred, those of 2 look to the right.
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
    """The dropout layers of one pass, each call the next one; whose masks are all different."""

    def __init__(self, rate: float, keys: jax.Array | None, *, active: bool) -> None:
        """Takes one key an example, Key[batch]; nothing is dropped unless `active`.

        Raises:
            ValueError: if dropout is active without keys.
        """
        self._rate = rate if active else 0.0
        if self._rate and keys is None:
            raise ValueError("train=True with dropout needs keys=, one an example; got keys=None")
        self._keys = keys
        self._layers = itertools.count()

    def __call__(self, x: jax.Array) -> jax.Array:
        if self._keys is None or not self._rate:
            return x
        layer = next(self._layers)

        # Each example's mask is drawn by itself: it is the same however the batch is split.
        def mask_of(key: jax.Array) -> jax.Array:
            return jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - self._rate, x.shape[1:])

        return jnp.where(jax.vmap(mask_of)(self._keys), x / (1 - self._rate), 0)


def check_image_shape(image_shape: tuple[int, ...], smallest: int) -> None:
    """Raises ValueError unless it is (height, width, channels), both sides >= `smallest`."""
    if len(image_shape) != 3 or min(image_shape[:2]) < smallest:
        raise ValueError(
            "image_shape must be (height, width, channels), at least "
            f"{smallest}x{smallest}, for this model; got {tuple(image_shape)}"
        )
