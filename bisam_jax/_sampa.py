"""SAMPa: SAM with two gradients that can be computed in parallel."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bisam_jax._balls import l2_ball_unless
from bisam_jax._boundary import gives_q
from bisam_jax._checks import (
    MissingArgumentError,
    check_not_masked,
    check_params,
    check_scalar,
    check_scalar_loss,
    check_transformation,
    shapes_of,
)
from bisam_jax._trees import fill_with_zeros, float_part, is_floating, perturb
from bisam_jax._two_halves import on_two_halves

BatchLossFn = Callable[[Any, Any], Any]


class SampaState(NamedTuple):
    """State of :func:`sampa`.

    Attributes:
        sampa_count: int32 scalar, the number of steps so far.
        lookahead_gradient: gradient of the training loss at the last look-ahead point.
        lookahead_ascent: gradient of the perturbation loss at that point; None without ``bilevel``.
        sampa_batch: batch of the last step, sharded like the batches.
        sampa_ball: state of the ball; empty for a constant radius.
        sampa_optimizer: state of the base optimizer.
    """

    sampa_count: jax.Array
    lookahead_gradient: optax.Updates
    lookahead_ascent: optax.Updates | None
    sampa_batch: Any
    sampa_ball: optax.OptState
    sampa_optimizer: optax.OptState


def sampa(
    optimizer: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.05,
    interpolation: jax.typing.ArrayLike = 0.2,
    *,
    batch_like: Any,
    perturbation: optax.GradientTransformation | None = None,
    bilevel: bool = False,
    gradient_axis: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAMPa: SAM whose two gradients can be computed in parallel.

    With :math:`q_t` the gradient at the last look-ahead point, :math:`U` the step that the base
    ``optimizer`` would make, :math:`\rho` (``rho``) and :math:`\lambda` (``interpolation``), step
    :math:`t` computes

    .. math::
        p_t &= \nabla L_{t-1}(x_t + \rho\, q_t / \lVert q_t \rVert), \\
        y_{t+1} &= x_t + U(q_t), \qquad q_{t+1} = \nabla L_t(y_{t+1}), \\
        x_{t+1} &= x_t + U((1 - \lambda)\, p_t + \lambda\, q_{t+1}),

    where :math:`L_t` is the loss on batch :math:`t`. In the first step :math:`q_0 = 0`,
    :math:`y_1 = x_0`, and both losses are on the first batch. Neither :math:`p_t` nor
    :math:`q_{t+1}` needs the other.

    Args:
        optimizer: the base optimizer, with its weight decay and momentum. It also makes the
            look-ahead step.
        rho: radius of the ball: a scalar, possibly traced, or a schedule.
        interpolation: weight of the look-ahead gradient, a scalar in [0, 1], possibly traced.
            With 1, this is only the look-ahead optimizer.
        batch_like: a batch, or its shapes (``jax.ShapeDtypeStruct``), since the state keeps the
            previous batch. On several devices, pass the whole batch, and shard
            ``state.sampa_batch`` like your batches. Under ``optax.inject_hyperparams``, name it in
            ``static_args``.
        perturbation: replaces the ball of radius ``rho``.
        bilevel: whether to ascend a perturbation loss. ``update`` then needs
            ``batch_perturbation_loss_fn``, and the perturbation follows its gradient at the
            look-ahead point, which costs a third gradient per step. If False, a perturbation loss
            is an error.
        gradient_axis: name of an axis of the mesh in context (:func:`jax.set_mesh`), of size 2 and
            type Auto. Under :func:`jax.jit`, one half of the devices then computes :math:`p_t`, the
            other half computes :math:`q_{t+1}`, and the halves exchange them. Both halves compute
            everything else, including the third gradient of ``bilevel``. The numbers are the same
            as on one device.

    Returns:
        A transformation that contains the base optimizer: pass its updates to
        ``optax.apply_updates``. ``grads`` is not used. ``update`` needs ``batch``, and
        ``batch_loss_fn``, which maps parameters and a batch to a scalar.
        :func:`bisam_jax.value_and_grad` passes both.

    Raises:
        TypeError, ValueError: if ``optimizer`` is not a transformation, a hyperparameter is out of
            range, or both ``rho`` and ``perturbation`` are given; in ``update``, if an argument is
            missing, a loss is not a real scalar, the batch does not match ``batch_like``, there is
            a perturbation loss without ``bilevel``, or the mesh in context has no such
            ``gradient_axis``.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> batch_loss_fn = lambda w, batch: jnp.mean(jnp.square(batch @ w))
        >>> w, batch = jnp.array([1.0, 1.0]), jnp.eye(2)
        >>> tx = sampa(optax.sgd(0.1), rho=0.5, batch_like=batch)
        >>> state = tx.init(w)
        >>> for step in range(2):
        ...     updates, state = tx.update(
        ...         None, state, w, batch_loss_fn=batch_loss_fn, batch=batch)
        ...     w = optax.apply_updates(w, updates)
        >>> print(w)
        [0.7837 0.7837]

        To compute one gradient on each half of the devices, with the examples of a batch sharded
        over the devices of each half::

            shape = (2, jax.device_count() // 2)
            mesh = jax.make_mesh(shape, ("gradients", "data"), (AxisType.Auto, AxisType.Auto))
            tx = sampa(optax.sgd(0.1), batch_like=batch, gradient_axis="gradients")
            params = jax.device_put(params, NamedSharding(mesh, P()))
            batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
            with jax.set_mesh(mesh):
                updates, state = jax.jit(functools.partial(tx.update, batch_loss_fn=loss_fn))(
                    None, tx.init(params), params, batch=batch
                )

    References:
        Xie, Pethick and Cevher, `SAMPa: Sharpness-aware Minimization Parallelized
        <https://arxiv.org/abs/2410.10683>`_, 2024

    .. note:: Two gradients per step, three with ``bilevel``. State: one gradient (two with
        ``bilevel``) and one batch, in addition to the base optimizer's state. Agrees to 1e-9 in
        float64 with the authors' code.
    """
    check_transformation("optimizer", optimizer)
    check_scalar("interpolation", interpolation, minimum=0.0, maximum=1.0)
    if not isinstance(gradient_axis, str | None):
        raise TypeError(f"gradient_axis must be the name of a mesh axis, got {gradient_axis!r}.")
    optimizer = optax.with_extra_args_support(optimizer)
    ball = l2_ball_unless(perturbation, rho)

    def init_fn(params: Any) -> Any:
        return _start(params, batch_like, bilevel, ball, optimizer)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        batch: Any = None,
        batch_loss_fn: BatchLossFn | None = None,
        batch_perturbation_loss_fn: BatchLossFn | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del updates
        check_params(params)
        q = batch_perturbation_loss_fn
        _check_losses(batch_loss_fn, q, gives_q(extra_args), bilevel)
        batch = _checked_batch(batch, state.sampa_batch)
        first = state.sampa_count == 0

        def descend(gradient: optax.Updates) -> tuple[optax.Updates, optax.OptState]:
            gradient = fill_with_zeros(gradient, params)
            return optimizer.update(gradient, state.sampa_optimizer, params, **extra_args)

        direction = state.lookahead_ascent if bilevel else state.lookahead_gradient
        eps, ball_state = ball.update(direction, state.sampa_ball, float_part(params), **extra_args)
        # The first look-ahead point is the start itself: weight decay must not move it.
        moved = _floats_of(params, descend(state.lookahead_gradient)[0])
        ahead = jax.tree.map(lambda u: jnp.where(first, 0, u), moved)
        points = [perturb(params, eps), perturb(params, ahead)]
        earlier = jax.tree.map(functools.partial(jnp.where, first), batch, state.sampa_batch)
        perturbed, lookahead = _gradients(batch_loss_fn, points, [earlier, batch], gradient_axis)
        ascent = _gradient_of("batch_perturbation_loss_fn", q)(points[1], batch) if q else None
        new_updates, optimizer_state = descend(_between(perturbed, lookahead, interpolation))
        count = jnp.asarray(optax.safe_increment(state.sampa_count))
        return new_updates, SampaState(count, lookahead, ascent, batch, ball_state, optimizer_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _start(params: Any, batch_like: Any, bilevel: bool, ball: Any, optimizer: Any) -> SampaState:
    check_not_masked(params)
    zeros = optax.tree.zeros_like(float_part(params))
    return SampaState(
        sampa_count=jnp.zeros([], jnp.int32),
        lookahead_gradient=zeros,
        lookahead_ascent=jax.tree.map(jnp.copy, zeros) if bilevel else None,
        sampa_batch=jax.tree.map(_empty_like, batch_like),
        sampa_ball=ball.init(zeros),
        sampa_optimizer=optimizer.init(params),
    )


def _floats_of(params: optax.Params, updates: optax.Updates) -> optax.Updates:
    """Returns the updates of floating parameters; integers may have floating updates too."""
    kept = jax.tree.map(lambda p, u: u if is_floating(p) else None, params, updates)
    return float_part(kept)


def _between(first: optax.Updates, second: optax.Updates, weight: Any) -> optax.Updates:
    return jax.tree.map(lambda a, b: a + jnp.asarray(weight, a.dtype) * (b - a), first, second)


def _gradients(
    loss_fn: Any, points: list, batches: list, axis: str | None
) -> tuple[optax.Updates, optax.Updates]:
    """Returns the gradients at two points on two batches."""
    gradient = _gradient_of("batch_loss_fn", loss_fn)
    if axis is not None:
        return on_two_halves(gradient, points, batches, axis)
    return gradient(points[0], batches[0]), gradient(points[1], batches[1])


def _gradient_of(name: str, loss_fn: Any) -> Callable[[Any, Any], optax.Updates]:
    gradient = jax.grad(lambda p, batch: check_scalar_loss(name, loss_fn(p, batch)), allow_int=True)
    return lambda params, batch: float_part(gradient(params, batch))


def _check_losses(loss_fn: Any, perturbation_loss_fn: Any, q: bool, bilevel: bool) -> None:
    if loss_fn is None:
        raise MissingArgumentError(
            "batch_loss_fn is missing, and sampa evaluates the loss on two batches",
            "call update(None, state, params, batch_loss_fn=fn_of_params_and_batch, batch=batch)",
            "pass loss_fn",
        )
    if bilevel and perturbation_loss_fn is None:
        raise MissingArgumentError(
            "batch_perturbation_loss_fn is missing, and sampa(bilevel=True) ascends it",
            "pass batch_perturbation_loss_fn=lambda params, batch: ..., or leave out bilevel",
            "pass perturbation_loss_fn, or leave out bilevel",
        )
    if not bilevel and (q or perturbation_loss_fn is not None):
        raise ValueError(
            "this sampa ascends the training loss, but got a perturbation loss: make it with "
            "sampa(..., bilevel=True)."
        )


def _empty_like(leaf: Any) -> jax.Array:
    dtype: Any = jax.dtypes.canonicalize_dtype(jnp.result_type(leaf), allow_extended_dtype=True)
    return jnp.zeros(jnp.shape(leaf), dtype)


def _checked_batch(batch: Any, previous: Any) -> Any:
    """Returns the batch as arrays with the types of the previous batch."""
    if batch is None:
        raise MissingArgumentError(
            "batch is missing, and sampa keeps it for the next step",
            "call update(None, state, params, batch=batch, ...)",
            "call step(params, state, batch)",
        )
    got, expected = shapes_of(batch), shapes_of(previous)
    if got != expected:
        raise ValueError(
            f"batch must match the batch_like that sampa was made with, {expected}, got {got}."
        )
    # A copy: donating the state must not delete the caller's batch.
    return jax.tree.map(lambda new, old: jnp.array(new, old.dtype), batch, previous)
