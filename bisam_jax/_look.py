"""LookSAM: compute the perturbed gradient every k-th step, and reuse part of it in between."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bisam_jax._balls import l2_ball_unless
from bisam_jax._boundary import TwoLosses, from_rule, perturbed_gradient
from bisam_jax._checks import check_count, check_scalar
from bisam_jax._trees import global_norm, orthogonal_part, scale_to_norm


class LookState(NamedTuple):
    """State of :func:`look_sam`.

    Attributes:
        look_count: int32 scalar, the number of steps so far.
        orthogonal_gradient: the part of the last perturbed gradient that is orthogonal to the
            clean one. It has the structure of the parameters' floating part, in float32 or wider.
        look_ball: state of the ball; empty for a constant radius.
    """

    look_count: jax.Array
    orthogonal_gradient: optax.Updates
    look_ball: optax.OptState


def look_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    alpha: jax.typing.ArrayLike = 0.7,
    k: int = 5,
    *,
    perturbation: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: the perturbed gradient every k-th step, and an estimate of it in between.

    With :math:`g` the gradient of :math:`L` at the parameters :math:`w`, :math:`g_p` its gradient
    at :math:`w + \rho\, a / \lVert a \rVert`, where :math:`a` is the ascent gradient, steps
    :math:`0, k, 2k, \dots` (``k``) return :math:`g_p` and keep its part that is orthogonal to
    :math:`g`,

    .. math:: g_v = g_p - \frac{\langle g_p, g \rangle}{\lVert g \rVert^2}\, g,

    which changes slowly. All other steps return, with :math:`\alpha` (``alpha``),

    .. math:: g + \alpha \frac{\lVert g \rVert}{\lVert g_v \rVert}\, g_v .

    Norms are over all parameters together.

    Args:
        rho: radius of the ball: a scalar, possibly traced, or a schedule, called with the number
            of perturbations made so far.
        alpha: weight of the reused part, a scalar >= 0, possibly traced.
        k: number of steps from one perturbed gradient to the next, a positive integer, possibly
            traced; with 1, this is SAM.
        perturbation: replaces the ball of radius ``rho``.

    Returns:
        A transformation whose ``update`` takes the arguments listed in :func:`sharpness_aware`.
        :math:`g` is ``grads``, or is computed if ``grads`` is None.

    Raises:
        TypeError, ValueError: as :func:`sharpness_aware`; also if ``alpha`` is not a finite
            scalar >= 0, ``k`` is not a positive integer, or both ``rho`` and ``perturbation`` are
            given.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> tx = look_sam(rho=0.5, alpha=1.0, k=2)
        >>> w = jnp.array([1.0, 1.0])
        >>> state = tx.init(w)
        >>> for step in range(2):
        ...     grads, state = tx.update(
        ...         None, state, w, loss_fn=lambda w: w[0] ** 2 + 3 * w[1] ** 2)
        ...     print(grads)
        [2.3162 8.8461]
        [-4.  8.]

    References:
        Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
        <https://arxiv.org/abs/2203.02714>`_, 2022

    .. note:: Two gradients on every k-th step (three with a perturbation loss), and one on all
        other steps, by ``jax.lax.cond``; under ``jax.vmap``, both branches are computed. State: one
        gradient, and a counter.
    """
    check_scalar("alpha", alpha, minimum=0.0)
    check_count("k", k)
    ball = l2_ball_unless(perturbation, rho)

    def init_fn(params: optax.Params) -> LookState:
        return LookState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params), ball.init(params))

    def rule(
        losses: TwoLosses, state: Any, params: optax.Params, /, **extra_args: Any
    ) -> tuple[optax.Updates, LookState]:
        clean = losses.clean_gradient

        def look() -> tuple:
            perturbed, eps, ball_state = perturbed_gradient(
                losses, ball, state.look_ball, params, **extra_args
            )
            # If eps is zero, the orthogonal part is only rounding, which must not be scaled up.
            is_moved = global_norm(eps) > 0
            orthogonal = jax.tree.map(
                lambda o: jnp.where(is_moved, o, 0), orthogonal_part(perturbed, clean)
            )
            return perturbed, orthogonal, ball_state

        def reuse() -> tuple:
            norm = global_norm(clean)
            norm = jnp.asarray(alpha, norm.dtype) * norm
            kept = scale_to_norm(state.orthogonal_gradient, norm)
            gradient = jax.tree.map(jnp.add, clean, kept)
            return gradient, state.orthogonal_gradient, state.look_ball

        due = state.look_count % jnp.asarray(k, jnp.int32) == 0
        gradient, orthogonal, ball_state = jax.lax.cond(due, look, reuse)
        count = jnp.asarray(optax.safe_increment(state.look_count))
        return gradient, LookState(count, orthogonal, ball_state)

    return from_rule(init_fn, rule)
