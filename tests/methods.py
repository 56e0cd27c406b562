"""Every method of the library, once, for the tests that all of them must pass."""

from collections.abc import Callable
from typing import NamedTuple

import optax

import bisam_jax


class Method(NamedTuple):
    """How to make a method, and what holds of it.

    Attributes:
        make: from rho to the transformation.
        gradients: gradients per step, the one that the caller computes included.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    gradients: int = 2


METHODS = {
    "sam": Method(bisam_jax.sam),
    "bisam": Method(bisam_jax.bisam),
    "asam": Method(bisam_jax.asam),
    "sharpness_aware": Method(lambda rho: bisam_jax.sharpness_aware(bisam_jax.l2_ball(rho))),
}
