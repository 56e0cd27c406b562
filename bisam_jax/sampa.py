"""SAMPa: two gradients that do not wait for each other."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bisam_jax._checks import check_loss, check_scalar, check_transformation
from bisam_jax._trees import (
    check_not_masked,
    fill_with_zeros,
    float_part,
    map_floats,
    perturb,
)
from bisam_jax.perturbations import l2_ball

BatchLossFn = Callable[[optax.Params, Any], jax.Array]


class SampaState(NamedTuple):
    """State of :func:`sampa`.

    Attributes:
        sampa_count: int32 scalar, the number of steps made.
        lookahead_gradient: gradient of the training loss at the last look-ahead point.
        lookahead_ascent: gradient of the ascended loss there; None where it is the same loss.
        sampa_ball: state of the ball; empty for a constant radius.
        sampa_optimizer: state of the base optimizer.
    """

    sampa_count: jax.Array
    lookahead_gradient: optax.Updates
    lookahead_ascent: optax.Updates | None
    sampa_ball: optax.OptState
    sampa_optimizer: optax.OptState


def sampa(
    optimizer: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.05,
    interpolation: jax.typing.ArrayLike = 0.2,
    *,
    bilevel: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""SAMPa: SAM whose two gradients can be computed in parallel.

    With :math:`q_t` the gradient at the last look-ahead point, :math:`U` the step that the base
    ``optimizer`` would make, :math:`\rho` (``rho``) and :math:`\lambda` (``interpolation``),

    .. math::
        p_t &= \nabla L_{t-1}(x_t + \rho\, q_t / \lVert q_t \rVert), \\
        y_{t+1} &= x_t + U(q_t), \qquad q_{t+1} = \nabla L_t(y_{t+1}), \\
        x_{t+1} &= x_t + U((1 - \lambda)\, p_t + \lambda\, q_{t+1}),

    where :math:`L_t` is the loss on batch :math:`t`. In the first step :math:`q_0 = 0`,
    :math:`y_1 = x_0` and both losses are of the first batch. Neither :math:`p_t` nor
    :math:`q_{t+1}` needs the other: they are one vmapped call over stacked parameters and batches.

    Args:
        optimizer: the base optimizer, with its weight decay and momentum; it looks ahead too.
        rho: radius of the ball: a scalar, possibly traced, or a schedule.
        interpolation: weight of the look-ahead gradient, a scalar in [0, 1], possibly traced.
            With 1, this is the look-ahead optimizer alone.
        bilevel: whether another loss is ascended: ``update`` then needs
            ``batch_perturbation_loss_fn``, the perturbation is along its gradient at the
            look-ahead point, and a step costs a third gradient.

    Returns:
        A transformation that contains the base optimizer: its updates go to
        ``optax.apply_updates``. The incoming ``grads`` are not used. ``update`` needs the extra
        args ``batch_loss_fn``, from parameters and a batch to a scalar, ``batch``, and
        ``previous_batch``, of the same shapes (any such batch in the first step).

    Raises:
        TypeError, ValueError: if ``optimizer`` is no transformation, a hyperparameter out of its
            range, or an argument of ``update`` missing; if a loss is no real scalar.

    References:
        Xie, Pethick and Cevher, `SAMPa: Sharpness-aware Minimization Parallelized
        <https://arxiv.org/abs/2410.10683>`_, 2024

    .. note:: Two gradients a step, three with ``bilevel``; state: one gradient (two with
        ``bilevel``) beside the base optimizer's. Agrees to 1e-9 in float64 with the authors' code.
    """
    check_transformation("optimizer", optimizer)
    check_scalar("interpolation", interpolation, minimum=0.0, maximum=1.0)
    optimizer = optax.with_extra_args_support(optimizer)
    ball = l2_ball(rho)

    def init_fn(params: Any) -> Any:
        check_not_masked(params)
        floats = float_part(params)
        zeros = optax.tree.zeros_like(floats)
        return SampaState(
            sampa_count=jnp.zeros([], jnp.int32),
            lookahead_gradient=zeros,
            lookahead_ascent=optax.tree.zeros_like(floats) if bilevel else None,
            sampa_ball=ball.init(floats),
            sampa_optimizer=optimizer.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        batch_loss_fn: BatchLossFn | None = None,
        batch_perturbation_loss_fn: BatchLossFn | None = None,
        batch: Any = None,
        previous_batch: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del updates
        given = {
            "params": params,
            "batch_loss_fn": batch_loss_fn,
            "batch": batch,
            "previous_batch": previous_batch,
        }
        if bilevel:
            given["batch_perturbation_loss_fn"] = batch_perturbation_loss_fn
        for name, value in given.items():
            if value is None:
                raise ValueError(
                    f"{name} is missing: call update(None, state, params, batch_loss_fn=..., "
                    "batch=..., previous_batch=...), and batch_perturbation_loss_fn=... if bilevel."
                )
        check_not_masked(params)
        first = state.sampa_count == 0

        def step_by(gradient: optax.Updates) -> tuple[optax.Updates, optax.OptState]:
            gradient = fill_with_zeros(gradient, params)
            return optimizer.update(gradient, state.sampa_optimizer, params, **extra_args)

        direction = state.lookahead_ascent if bilevel else state.lookahead_gradient
        eps, ball_state = ball.update(direction, state.sampa_ball, float_part(params))
        # The first look-ahead is the start itself, without the weight decay of a zero gradient.
        ahead = jax.tree.map(
            lambda u: jnp.where(first, 0, u), float_part(step_by(state.lookahead_gradient)[0])
        )
        points = [perturb(params, eps), perturb(params, ahead)]
        earlier = jax.tree.map(lambda old, new: jnp.where(first, new, old), previous_batch, batch)
        perturbed, lookahead = _gradients(batch_loss_fn, points, [earlier, batch])
        gradient = map_floats(
            lambda p, q: p + jnp.asarray(interpolation, p.dtype) * (q - p), perturbed, lookahead
        )
        ascent = None
        if bilevel:
            ascent = _gradient("batch_perturbation_loss_fn", batch_perturbation_loss_fn)(
                points[1], batch
            )
        new_updates, optimizer_state = step_by(gradient)
        count = jnp.asarray(optax.safe_increment(state.sampa_count))
        return new_updates, SampaState(count, lookahead, ascent, ball_state, optimizer_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _gradient(name: str, loss_fn: Any) -> Callable[[optax.Params, Any], optax.Updates]:
    gradient = jax.grad(lambda p, batch: check_loss(name, loss_fn(p, batch)), allow_int=True)
    return lambda params, batch: float_part(gradient(params, batch))


def _gradients(loss_fn: Any, points: list, batches: list) -> tuple[optax.Updates, optax.Updates]:
    """The gradients at two points on two batches, in one call over stacked arguments."""
    floats = [float_part(point) for point in points]
    stacked, stacked_batches = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *pair) for pair in (floats, batches)
    )

    def gradient(floating: optax.Params, batch: Any) -> optax.Updates:
        whole = jax.tree.map(
            lambda p, f: p if f is None else f, points[0], floating, is_leaf=lambda x: x is None
        )
        return _gradient("batch_loss_fn", loss_fn)(whole, batch)

    both = jax.vmap(gradient)(stacked, stacked_batches)
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], both) for i in (0, 1))
    return first, second
