"""Random keys: of integer seeds, and in the state of a transformation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def as_key(key: Any) -> jax.Array:
    """Returns a random key: the given one, or one made from an integer seed."""
    return key if is_key(key) else jax.random.key(key)


def draw_like(tree: Any, key: jax.Array, draw: Callable[..., jax.Array]) -> Any:
    """Returns a tree of random leaves, independent of each other.

    Leaves of one shape and dtype are drawn together: XLA compiles each draw anew, which would take
    most of the compile time of a tree with many leaves.

    Args:
        tree: has the shapes and dtypes, and the structure.
        key: random key.
        draw: `draw(key, shape, dtype)` draws an array.
    """
    leaves, structure = jax.tree.flatten(tree)
    alike: dict[Any, list[int]] = {}
    for number, leaf in enumerate(leaves):
        alike.setdefault((jnp.shape(leaf), jnp.result_type(leaf)), []).append(number)
    drawn: list[Any] = [None] * len(leaves)
    keys = jax.random.split(key, max(len(alike), 1))
    for own, ((shape, dtype), numbers) in zip(keys, alike.items(), strict=False):
        if len(numbers) == 1:
            drawn[numbers[0]] = draw(own, shape, dtype)
            continue
        together = draw(own, (len(numbers), *shape), dtype)
        for place, number in enumerate(numbers):
            drawn[number] = together[place]
    return structure.unflatten(drawn)


class KeyData(NamedTuple):
    """The data of a random key in an optimizer's state: arrays of numbers, which can be saved.

    Attributes:
        first: returns the data of the first key.
        as_key: maps the data back to a key, of the same kind as the key or seed was.
    """

    first: Callable[[], jax.Array]
    as_key: Callable[[jax.Array], jax.Array]


def key_data_of(key: Any) -> KeyData:
    """Returns how a state keeps random keys that begin with `key`."""

    def first() -> jax.Array:
        # A new key: donating the state must not delete the caller's key.
        return jax.random.key_data(jax.random.fold_in(as_key(key), 0))

    kind = jax.random.key_impl(key) if is_key(key) else None
    return KeyData(first, functools.partial(jax.random.wrap_key_data, impl=kind))


def is_key(key: Any) -> bool:
    """Returns whether `key` is an array of random keys."""
    return isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
