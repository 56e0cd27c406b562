"""Bilateral SAM: the gradients at the worst and at the best point of two balls."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from bisam_jax._trees import fill_with_zeros, global_norm, map_floats, scale_to_norm
from bisam_jax.perturbations import l2_ball
from bisam_jax.sharpness_aware import (
    ascent_gradient,
    clean_gradient,
    sharpness_aware,
)


class BilateralState(NamedTuple):
    """State of :func:`bilateral_sam`; empty for constant radii.

    Attributes:
        max_state: of the step to the worst point.
        min_state: of the step to the best point.
    """

    max_state: optax.OptState
    min_state: optax.OptState


def bilateral_sam(
    rho_max: optax.ScalarOrSchedule = 0.05, rho_min: optax.ScalarOrSchedule = 0.05
) -> optax.GradientTransformationExtraArgs:
    r"""Bilateral SAM: flatness on both sides, uphill and downhill.

    With :math:`u = a / \lVert a \rVert` the direction of the ascent gradient, :math:`g` the clean
    gradient of :math:`L`, and :math:`g_+`, :math:`g_-` its gradients at
    :math:`w + \rho_{\max} u` (``rho_max``) and :math:`w - \rho_{\min} u` (``rho_min``), returns

    .. math:: g_+ + g - \frac{\lVert g_+ \rVert}{\lVert g_- \rVert}\, g_- .

    Args:
        rho_max: radius of the ball with the worst point: a scalar, possibly traced, or a schedule.
        rho_min: likewise of the ball with the best point.

    Returns:
        A transformation whose ``update`` takes what that of :func:`gsam` takes; ``loss_fn`` or
        ``grad_fn`` is called twice.

    Raises:
        TypeError, ValueError: as :func:`sharpness_aware`.

    References:
        Deng et al., `Bilateral Sharpness-Aware Minimization for Flatter Minima
        <https://arxiv.org/abs/2409.13173>`_, 2024

    .. note:: Three gradients a step, four with ``perturbation_loss_fn``; no state. Agrees to 1e-9
        in float64 with the authors' code where that restores the weights before the base
        optimizer's step. As published it steps from :math:`w - \rho_{\min} u`: the paper steps
        from :math:`w`, and so does this.
    """
    worst = sharpness_aware(l2_ball(rho_max))
    best = sharpness_aware(optax.chain(l2_ball(rho_min), optax.scale(-1.0)))

    def init_fn(params: optax.Params) -> BilateralState:
        return BilateralState(worst.init(params), best.init(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        perturbation_loss_fn: Callable[[optax.Params], jax.Array] | None = None,
        clean_grad_fn: Callable[[], optax.Updates] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, BilateralState]:
        if params is None:
            raise ValueError("params is missing: call update(grads, state, params, loss_fn=...).")
        # One ascent gradient for both points.
        ascent = fill_with_zeros(ascent_gradient(updates, params, perturbation_loss_fn), params)
        uphill, max_state = worst.update(ascent, state.max_state, params, **extra_args)
        downhill, min_state = best.update(ascent, state.min_state, params, **extra_args)
        clean = clean_gradient(updates, clean_grad_fn, params)
        balanced = scale_to_norm(downhill, global_norm(uphill))
        grads = map_floats(lambda g, up, down: up + g - down, clean, uphill, balanced)
        return grads, BilateralState(max_state, min_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
