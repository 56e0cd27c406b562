"""Every method of the library, once, for the tests that all of them must pass."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

import bisam_jax


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """How to make a method, and what holds of it.

    Attributes:
        make: from rho to the transformation.
        loss_calls: how often `loss_fn` is called when `grads` is ascended.
        state_bytes: per weight, in float32.
        takes_grad_fn: whether it takes `grad_fn`; it needs losses otherwise.
        ascends_loss_fn: whether it takes the ascent gradient itself, not at the parameters.
        extra_args: what `update` needs besides.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    loss_calls: int = 1
    state_bytes: int = 0
    takes_grad_fn: bool = True
    ascends_loss_fn: bool = False
    extra_args: dict[str, Any] = dataclasses.field(default_factory=dict)


def largest_weights(params):
    """Stands in for Fisher scores."""
    return params


METHODS = {
    "sam": Method(bisam_jax.sam),
    "bisam": Method(bisam_jax.bisam),
    "asam": Method(bisam_jax.asam),
    "gsam": Method(bisam_jax.gsam),
    "bilateral": Method(lambda rho: bisam_jax.bilateral_sam(rho, rho_min=rho), loss_calls=2),
    "friendly": Method(bisam_jax.friendly_sam, state_bytes=4),
    "sparse fisher": Method(
        bisam_jax.sparse_sam_fisher,
        state_bytes=1,
        extra_args={"fisher_scores_fn": largest_weights},
    ),
    "sparse dynamic": Method(bisam_jax.sparse_sam_dynamic, state_bytes=1),
    "tilted": Method(
        lambda rho: bisam_jax.tilted_sam(rho, num_samples=1, radius=0.0),
        loss_calls=2,
        takes_grad_fn=False,
        ascends_loss_fn=True,
    ),
    "efficient": Method(
        lambda rho: bisam_jax.efficient_sam(rho, beta=1.0, gamma=1.0), takes_grad_fn=False
    ),
}
TAKING_GRAD_FN = {name: method for name, method in METHODS.items() if method.takes_grad_fn}
