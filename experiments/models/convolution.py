"""Convolutions as matrix products, where XLA's own are slow: on CPUs, and of many networks at once.

XLA on CPU computes the gradient in the kernel as a convolution whose window is the whole image,
several times slower than the other two passes, and all three many times slower inside loops and
under `jax.vmap` over kernels. Matrix products give the same numbers without these costs. See
`python -m experiments.benchmarks.convolutions`.

On a GPU, `jax.vmap` over kernels makes grouped convolutions, which can be slower than one network
after another. Batched products are not: see `python -m experiments.benchmarks.at_once`.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Examples are computed in blocks, whose intermediate arrays of about this size stay in the cache.
_BLOCK_NUMBERS = 2**20
_ON_ALL_DEVICES = contextvars.ContextVar("products_on_all_devices", default=False)


@contextlib.contextmanager
def products_on_all_devices() -> Iterator[None]:
    """Functions that are traced within it convolve by products on accelerators too."""
    token = _ON_ALL_DEVICES.set(True)
    try:
        yield
    finally:
        _ON_ALL_DEVICES.reset(token)


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    feature_group_count: int = 1,
    preferred_element_type: DTypeLike | None = None,
    **options: Any,
) -> jax.Array:
    """Acts as `jax.lax.conv_general_dilated`, computed as matrix products on CPUs.

    On other devices it is that function, except within :func:`products_on_all_devices`. It is the
    argument `conv_general_dilated` of `flax.nnx.Conv`. Derivatives of any order, `jax.vmap` and
    loops are those of the products. Convolutions along more than two axes are XLA's.

    Args:
        images: [batch, height, width, channels], or without the height.
        kernel: [height, width, channels of a group, channels of the result], or without the height.
        strides: steps of the window along height and width.
        padding: zeros before and after the height, and the width; "SAME" or "VALID".
        lhs_dilation: distances of the pixels, with zeros between them.
        rhs_dilation: distances of the pixels in the window.
        feature_group_count: number of groups of channels that are convolved by themselves.
        preferred_element_type: dtype of the result; None for that of the images.
        **options: other arguments of `jax.lax.conv_general_dilated`.
    """

    def compiled(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            images,
            kernel,
            strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            feature_group_count=feature_group_count,
            preferred_element_type=preferred_element_type,
            **options,
        )

    def products(images: jax.Array, kernel: jax.Array, block_numbers: int | None) -> jax.Array:
        kernel = _dilated(kernel, (*rhs_dilation, 1, 1))
        zeros = padding
        if isinstance(zeros, str):
            sizes = (images.shape[1:-1], kernel.shape[:-2])
            zeros = jax.lax.padtype_to_pads(*sizes, strides, zeros)
        images = _dilated(images, (1, *lhs_dilation, 1))
        last = (feature_group_count, preferred_element_type, block_numbers)
        if images.ndim == 3:
            row = (images[:, None], kernel[None], (1, *strides), ((0, 0), *zeros))
            return _in_groups(*row, *last)[:, 0]
        return _in_groups(images, kernel, strides, zeros, *last)

    if images.ndim > 4:
        return compiled(images, kernel)
    # Accelerators have no cache to stay in, and are fastest with the whole batch.
    whole = functools.partial(products, block_numbers=None)
    return jax.lax.platform_dependent(
        images,
        kernel,
        cpu=functools.partial(products, block_numbers=_BLOCK_NUMBERS),
        default=whole if _ON_ALL_DEVICES.get() else compiled,
    )


def as_products(
    images: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dtype: DTypeLike | None = None,
    block_numbers: int | None = None,
) -> jax.Array:
    """Returns the convolution, computed as one matrix product per block of examples.

    Each row of the left factor has the pixels of one column of the image that are in the window's
    rows. The right factor has all columns of the kernel. Their results are then added, each shifted
    to its place.

    Args:
        images: [batch, height, width, channels].
        kernel: [height, width, channels, channels of the result].
        strides: steps of the window along height and width.
        padding: zeros before and after the height, and the width.
        dtype: dtype of the result; None for that of the images.
        block_numbers: size of a block's intermediate arrays; None for one block.
    """
    (rows, columns), (row_step, column_step) = kernel.shape[:2], strides
    batch, _, width, n_in = images.shape
    n_out = kernel.shape[-1]
    height_out, width_out = (
        (size + sum(zeros) - window) // step + 1
        for size, zeros, window, step in zip(
            images.shape[1:3], padding, (rows, columns), strides, strict=True
        )
    )
    # Sums, also those of the kernel's gradient over the blocks, are rounded once.
    precise = jnp.promote_types(images.dtype, jnp.float32)

    # Kept for the backward pass are only the images, as in the compiler's convolution.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_block(block: jax.Array, matrix: jax.Array) -> jax.Array:
        padded = jnp.pad(block, ((0, 0), padding[0], (0, 0), (0, 0)))
        seen = jnp.concatenate(
            [_every(padded, row, height_out, row_step, axis=1) for row in range(rows)], axis=-1
        )
        product = jax.lax.dot(
            seen.reshape(-1, rows * n_in),
            matrix.astype(block.dtype),
            preferred_element_type=precise,
        )
        by_column = jnp.split(
            product.reshape(len(block), height_out, width, columns * n_out), columns, axis=-1
        )
        zeros = ((0, 0), (0, 0), padding[1], (0, 0))
        placed = [
            _every(jnp.pad(part, zeros), column, width_out, column_step, axis=2)
            for column, part in enumerate(by_column)
        ]
        return functools.reduce(jnp.add, placed).astype(dtype or block.dtype)

    matrix = kernel.swapaxes(1, 2).reshape(rows * n_in, columns * n_out).astype(precise)
    numbers = height_out * width * (rows * n_in + columns * n_out)
    size = batch if block_numbers is None else max(1, min(batch, block_numbers // numbers))
    blocks = batch // size
    whole, rest = images[: blocks * size], images[blocks * size :]
    if blocks == 1:
        results = [of_block(whole, matrix)]
    else:
        looped = jax.lax.map(
            lambda block: of_block(block, matrix), whole.reshape(blocks, size, *images.shape[1:])
        )
        results = [looped.reshape(-1, height_out, width_out, n_out)]
    if len(rest):
        results.append(of_block(rest, matrix))
    return jnp.concatenate(results)


def _every(x: jax.Array, start: int, count: int, step: int, axis: int) -> jax.Array:
    """Returns `count` entries from `start` on along an axis, `step` apart."""
    return jax.lax.slice_in_dim(x, start, start + (count - 1) * step + 1, step, axis)


def _in_groups(
    images: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    groups: int,
    dtype: DTypeLike | None,
    block_numbers: int | None,
) -> jax.Array:
    of_group = functools.partial(
        as_products, strides=strides, padding=padding, dtype=dtype, block_numbers=block_numbers
    )
    if groups == 1:
        return of_group(images, kernel)
    # The channels of a group, and of its results, are neighbors.
    results = jax.vmap(of_group, in_axes=3, out_axes=3)(
        images.reshape(*images.shape[:3], groups, -1),
        kernel.reshape(*kernel.shape[:3], groups, -1),
    )
    return results.reshape(*results.shape[:3], -1)


def _dilated(x: jax.Array, distances: Sequence[int]) -> jax.Array:
    """Puts zeros between the entries, which are then as far apart as `distances`."""
    if all(distance == 1 for distance in distances):
        return x
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, distance - 1) for distance in distances])
