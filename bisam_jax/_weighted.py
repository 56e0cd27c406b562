"""Weighted SAM: sharpness as a regulariser with its own weight."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bisam_jax._balls import l2_ball_unless
from bisam_jax._boundary import TwoLosses, from_rule, perturbed_gradient
from bisam_jax._checks import check_scalar
from bisam_jax._sharpness_aware import SharpnessAwareState


def weighted_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    gamma: jax.typing.ArrayLike = 0.9,
    *,
    perturbation: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Weighted SAM: weighs the sharpness of the loss against the loss.

    With :math:`g` the gradient of :math:`L` at the parameters :math:`w`, :math:`g_p` its gradient
    at :math:`w + \rho\, a / \lVert a \rVert`, where :math:`a` is the ascent gradient, and
    :math:`\gamma` (``gamma``), returns

    .. math:: g + \frac{\gamma}{1 - \gamma} (g_p - g).

    Args:
        rho: radius of the ball: a scalar, possibly traced, or a schedule.
        gamma: weight of the sharpness, a scalar in [0, 1), possibly traced. With 0, this is the
            plain gradient; with 0.5, SAM; above 0.5, it extrapolates beyond SAM.
        perturbation: replaces the ball of radius ``rho``.

    Returns:
        A transformation whose ``update`` takes the arguments listed in :func:`sharpness_aware`.
        :math:`g` is ``grads``, or is computed if ``grads`` is None.

    Raises:
        TypeError, ValueError: as :func:`sharpness_aware`; also if ``gamma`` is outside [0, 1), or
            both ``rho`` and ``perturbation`` are given.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> tx = weighted_sam(rho=0.5, gamma=0.75)
        >>> w = jnp.array([3.0, 4.0])
        >>> grads, state = tx.update(None, tx.init(w), w, loss_fn=lambda w: jnp.sum(w**2))
        >>> print(grads)
        [ 7.8 10.4]

    References:
        Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization
        Term <https://arxiv.org/abs/2305.15817>`_, 2023

    .. note:: Two gradients per step, three with a perturbation loss; no state. With an adaptive
        base optimizer, the authors apply the sharpness term outside of it. Here, the base optimizer
        sees the whole gradient. With SGD without momentum, both are the same.
    """
    check_scalar("gamma", gamma, minimum=0.0, maximum=1.0, exclusive_maximum=True)
    ball = l2_ball_unless(perturbation, rho)

    def init_fn(params: optax.Params) -> SharpnessAwareState:
        return SharpnessAwareState(ball.init(params))

    def rule(
        losses: TwoLosses, state: Any, params: optax.Params, /, **extra_args: Any
    ) -> tuple[optax.Updates, SharpnessAwareState]:
        clean = losses.clean_gradient
        perturbed, _, ball_state = perturbed_gradient(
            losses, ball, state.perturbation_state, params, **extra_args
        )
        weight = gamma / (1 - gamma)
        gradient = jax.tree.map(
            lambda g, p: g + jnp.asarray(weight, g.dtype) * (p - g), clean, perturbed
        )
        return gradient, SharpnessAwareState(ball_state)

    return from_rule(init_fn, rule)
