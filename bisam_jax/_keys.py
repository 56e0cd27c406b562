"""Random keys: of integer seeds, and in the state of a transformation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def as_key(key: Any) -> jax.Array:
    """Returns a random key: the given one, or one made from an integer seed."""
    return key if is_key(key) else jax.random.key(key)


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
