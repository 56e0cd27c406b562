"""Means over random probes, with their standard errors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bisam_jax._checks import check_count, check_key, check_static


class Estimate(NamedTuple):
    """A mean over random probes.

    Attributes:
        mean: the mean.
        standard_error: its standard error, in the shape of the mean.
    """

    mean: jax.Array
    standard_error: jax.Array


def estimate_of(samples: jax.Array) -> Estimate:
    """Returns the mean over the first axis."""
    error = samples.std(axis=0, ddof=1) / jnp.sqrt(jnp.asarray(len(samples), samples.dtype))
    return Estimate(samples.mean(axis=0), error)


def check_probes(key: Any, num_samples: Any) -> None:
    """Raises unless `key` is a random key or a seed, and `num_samples` an integer of at least 2."""
    check_key(key)
    check_static("num_samples", num_samples)
    check_count("num_samples", num_samples)
    if num_samples < 2:
        raise ValueError(
            f"num_samples must be at least 2, for a standard error, got {num_samples}."
        )
