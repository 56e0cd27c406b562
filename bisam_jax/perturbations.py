"""Perturbations: optax transformations that map the ascent gradient to eps.

`update(gradient, state, params)` returns the perturbation itself. It points uphill and is added to
the parameters; it is not a descent update. A pipeline is an `optax.chain` that ends in a ball:
`optax.transforms.freeze(mask)` before the ball perturbs only some leaves, and
`optax.stateless(lambda g, _: jax.lax.pmean(g, axis_name))` before the ball gives all devices the
same perturbation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bisam_jax._checks import check_same_structure, check_scalar
from bisam_jax._trees import is_floating, scale_to_norm, spread


class ScheduledRadiusState(NamedTuple):
    """State of a ball whose radius follows a schedule; a ball of constant radius has no state.

    Attributes:
        radius_count: int32 scalar, the number of perturbations made so far.
    """

    radius_count: jax.Array


def l2_ball(rho: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Perturbation to the worst point of a ball, to first order (SAM, BiSAM).

    With :math:`g` the incoming gradient and :math:`\rho` (``rho``), returns

    .. math:: \epsilon = \rho\, g / \lVert g \rVert_2,

    where the norm is over all leaves together, and :math:`\epsilon = 0` for :math:`g = 0`.

    Args:
        rho: radius of the ball, in the units of the parameters: a scalar, possibly traced, or a
            schedule, called with the number of perturbations made so far.

    Returns:
        A transformation whose updates are the perturbation, in the gradient's dtypes.

    Raises:
        TypeError: if ``rho`` is neither a real number nor a callable.
        ValueError: if a concrete ``rho`` is not a finite scalar >= 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> ball = l2_ball(rho=0.5)
        >>> eps, _ = ball.update({"w": jnp.array([3.0, 4.0])}, ball.init(None))
        >>> print(eps["w"])
        [0.3 0.4]

    References:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, 2021

    .. note:: Computes no gradients; state: one counter for a schedule, otherwise none. Published
        codes add about 1e-12 to the norm. Here nothing is added, so a gradient of 1e-21 in float32
        still gives a perturbation of norm ``rho``. An infinity or NaN makes the whole perturbation
        NaN.
    """
    return _ball(rho, lambda gradient, radius, params: scale_to_norm(gradient, radius))


def adaptive_l2_ball(
    rho: optax.ScalarOrSchedule,
    eta: jax.typing.ArrayLike = 0.01,
    where: optax.Params | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Perturbation to the worst point of an ellipsoid with axes of the weights' sizes (ASAM).

    With :math:`g` the incoming gradient, :math:`T = |w| + \eta` (``eta``) and :math:`\rho`
    (``rho``), returns

    .. math:: \epsilon = \rho\, T^2 g / \lVert T g \rVert_2,

    so that :math:`\lVert T^{-1} \epsilon \rVert_2 = \rho`, and :math:`\epsilon = 0` for :math:`g =
    0`.

    Args:
        rho: radius relative to the weights' sizes: a scalar, possibly traced, or a schedule,
            called with the number of perturbations made so far.
        eta: added to each weight's size; a scalar >= 0, possibly traced.
        where: leaves that use :math:`T`; other leaves use :math:`T = 1`. A tree of booleans with
            the structure of the parameters or a prefix of it, or a function that maps the
            parameters to such a tree; all leaves by default. Under ``optax.inject_hyperparams``,
            which takes functions for schedules, name it in ``static_args``.

    Returns:
        A transformation whose updates are the perturbation; its ``update`` needs ``params``.

    Raises:
        TypeError: if ``rho`` is neither a real number nor a callable, or ``eta`` is not a real
            number.
        ValueError: if a concrete ``rho`` or ``eta`` is not a finite scalar >= 0; in ``update``, if
            ``params`` is missing or ``where`` does not fit it.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> ball = adaptive_l2_ball(rho=0.5, eta=0.0)
        >>> params = {"w": jnp.array([3.0, 4.0])}
        >>> eps, _ = ball.update({"w": jnp.array([1.0, 1.0])}, ball.init(params), params)
        >>> print(eps["w"])
        [0.9 1.6]

    References:
        Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of
        Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, 2021

    .. note:: Computes no gradients; state: one counter for a schedule, otherwise none. The ASAM
        authors' code scales the arrays named "weight", not biases. For the same in models without
        normalisation scales, pass
        ``where=lambda params: jax.tree.map(lambda w: w.ndim > 1, params)``. The BiSAM authors'
        adaptive variant has ``eta=0``.
    """
    check_scalar("eta", eta, minimum=0.0)

    def worst_point(
        gradient: optax.Updates, radius: Any, params: optax.Params | None
    ) -> optax.Updates:
        if params is None:
            raise ValueError(
                "adaptive_l2_ball needs the parameters, got None: call "
                "update(gradient, state, params)."
            )
        check_same_structure("the gradient", gradient, params)
        # Scaling to unit norm first keeps both large and small gradients in range.
        gradient = scale_to_norm(gradient, 1.0)
        sizes = _sizes(params, gradient, eta, where)
        scaled = jax.tree.map(lambda size, g: size * g, sizes, gradient)
        return jax.tree.map(lambda size, u: size * u, sizes, scale_to_norm(scaled, radius))

    return _ball(rho, worst_point)


def linf_ball(rho: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Perturbation to the worst point of a cube, to first order.

    With :math:`g` the incoming gradient and :math:`\rho` (``rho``), returns :math:`\epsilon =
    \rho\, \operatorname{sign}(g)`: every parameter moves by the radius, or not at all where the
    gradient is zero.

    Args:
        rho: half the edge of the cube, in the units of the parameters: a scalar, possibly traced,
            or a schedule, called with the number of perturbations made so far.

    Returns:
        A transformation whose updates are the perturbation, in the gradient's dtypes.

    Raises:
        TypeError: if ``rho`` is neither a real number nor a callable.
        ValueError: if a concrete ``rho`` is not a finite scalar >= 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> ball = linf_ball(rho=0.5)
        >>> eps, _ = ball.update({"w": jnp.array([3.0, -4.0, 0.0])}, ball.init(None))
        >>> print(eps["w"])
        [ 0.5 -0.5  0. ]

    References:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, 2021, for p-norms in general

    .. note:: Computes no gradients; state: one counter for a schedule, otherwise none. Leaves that
        are not floating do not move. NaN stays NaN.
    """

    def worst_point(gradient: optax.Updates, radius: Any, params: Any) -> optax.Updates:
        del params
        return jax.tree.map(
            lambda g: (
                jnp.asarray(radius, g.dtype) * jnp.sign(g) if is_floating(g) else jnp.zeros_like(g)
            ),
            gradient,
        )

    return _ball(rho, worst_point)


def _ball(
    rho: optax.ScalarOrSchedule,
    worst_point: Callable[[optax.Updates, Any, optax.Params | None], optax.Updates],
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation from `worst_point(gradient, radius, params)`, with a step count."""
    if not callable(rho):
        check_scalar("rho", rho, minimum=0.0)

    def init_fn(params: optax.Params) -> optax.OptState:
        del params
        return (
            ScheduledRadiusState(jnp.zeros([], jnp.int32)) if callable(rho) else optax.EmptyState()
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        if not callable(rho):
            return worst_point(updates, rho, params), state
        radius = rho(state.radius_count)
        if jnp.shape(radius) != ():
            raise ValueError(
                f"the schedule rho must return a scalar, got shape {jnp.shape(radius)}."
            )
        eps = worst_point(updates, radius, params)
        count = jnp.asarray(optax.safe_increment(state.radius_count))
        return eps, ScheduledRadiusState(count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _sizes(params: optax.Params, gradient: optax.Updates, eta: Any, where: Any) -> optax.Params:
    """Returns T for each leaf, in the gradient's dtype."""
    mask = True if where is None else where(params) if callable(where) else where

    def size(use: bool, w: jax.Array, g: jax.Array) -> jax.Array:
        dtype = jnp.result_type(g)
        return (
            jnp.abs(jnp.asarray(w, dtype)) + jnp.asarray(eta, dtype) if use else jnp.ones((), dtype)
        )

    return jax.tree.map(size, spread(mask, params), params, gradient)
