"""SAMPa: two gradients that do not wait for each other."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

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
    gradient_axis: str | None = None,
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
    :math:`q_{t+1}` needs the other.

    Args:
        optimizer: the base optimizer, with its weight decay and momentum; it looks ahead too.
        rho: radius of the ball: a scalar, possibly traced, or a schedule.
        interpolation: weight of the look-ahead gradient, a scalar in [0, 1], possibly traced.
            With 1, this is the look-ahead optimizer alone.
        bilevel: whether another loss is ascended: ``update`` then needs
            ``batch_perturbation_loss_fn``, the perturbation is along its gradient at the
            look-ahead point, and a step costs a third gradient.
        gradient_axis: name of an axis of the mesh in context (:func:`jax.set_mesh`), of size 2 and
            type Auto. Under :func:`jax.jit` one half of the devices then computes :math:`p_t` and
            the other :math:`q_{t+1}`, which are exchanged; all else, the third gradient of
            ``bilevel`` too, both halves compute. The numbers are those of one device.

    Returns:
        A transformation that contains the base optimizer: its updates go to
        ``optax.apply_updates``. The incoming ``grads`` are not used. ``update`` needs the extra
        args ``batch_loss_fn``, from parameters and a batch to a scalar, ``batch``, and
        ``previous_batch``, of the same shapes (any such batch in the first step).

    Raises:
        TypeError, ValueError: if ``optimizer`` is no transformation, a hyperparameter out of its
            range, or an argument of ``update`` missing; if a loss is no real scalar; in
            ``update``, if the mesh in context has no ``gradient_axis`` as above.

    Examples:
        Each half of the devices computes one gradient, with the examples of a batch over the
        devices of a half::

            shape = (2, jax.device_count() // 2)
            mesh = jax.make_mesh(shape, ("gradients", "data"), (AxisType.Auto, AxisType.Auto))
            tx = sampa(optax.sgd(0.1), gradient_axis="gradients")
            params = jax.device_put(params, NamedSharding(mesh, P()))
            batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
            previous_batch = jax.device_put(previous_batch, NamedSharding(mesh, P("data")))
            with jax.set_mesh(mesh):
                updates, state = jax.jit(functools.partial(tx.update, batch_loss_fn=loss_fn))(
                    None, tx.init(params), params, batch=batch, previous_batch=previous_batch
                )

    References:
        Xie, Pethick and Cevher, `SAMPa: Sharpness-aware Minimization Parallelized
        <https://arxiv.org/abs/2410.10683>`_, 2024

    .. note:: Two gradients a step, three with ``bilevel``; state: one gradient (two with
        ``bilevel``) beside the base optimizer's. Agrees to 1e-9 in float64 with the authors' code.
    """
    check_transformation("optimizer", optimizer)
    check_scalar("interpolation", interpolation, minimum=0.0, maximum=1.0)
    if not isinstance(gradient_axis, str | None):
        raise TypeError(f"gradient_axis must be the name of a mesh axis, got {gradient_axis!r}.")
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
        if gradient_axis is not None:
            _check_axis(gradient_axis)
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
        perturbed, lookahead = _gradients(batch_loss_fn, points, [earlier, batch], gradient_axis)
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


def _gradients(
    loss_fn: Any, points: list, batches: list, axis: str | None
) -> tuple[optax.Updates, optax.Updates]:
    """The gradients at two points on two batches; with `axis`, each on one half of the devices."""
    gradient = _gradient("batch_loss_fn", loss_fn)
    if axis is None:
        return gradient(points[0], batches[0]), gradient(points[1], batches[1])
    floats = [float_part(point) for point in points]

    # Not vmap: XLA cannot split its convolutions over devices. Not checked: a loss that starts a
    # loop from zeros would have to know of the axis.
    @functools.partial(
        jax.shard_map,
        in_specs=P(axis),
        out_specs=P(axis),
        axis_names=frozenset({axis}),
        check_vma=False,
    )
    def of_this_half(stacked: Any) -> optax.Updates:
        floating, batch = jax.tree.map(lambda x: x[0], stacked)
        whole = jax.tree.map(
            lambda p, f: p if f is None else f, points[0], floating, is_leaf=lambda x: x is None
        )
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), gradient(whole, batch))

    pairs = zip(floats, batches, strict=True)
    both = of_this_half(jax.tree.map(functools.partial(_laid_out, axis), *pairs))
    # One exchange between the halves; slices of what lies on a half would take several.
    both = jax.tree.map(functools.partial(_on_axis, None), both)
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], both) for i in (0, 1))
    return first, second


def _laid_out(axis: str, first: jax.Array, second: jax.Array) -> jax.Array:
    """Two arrays stacked, with one of them on each half of the devices."""
    # A choice, which each device makes on its own: XLA would send the parts of a stack around.
    half = jax.lax.broadcasted_iota(jnp.int32, (2,) + (1,) * jnp.ndim(first), 0)
    first, second = (jnp.expand_dims(x, 0) for x in (first, second))
    return jnp.where(_on_axis(axis, half) == 0, first, second)


def _on_axis(axis: str | None, x: jax.Array) -> jax.Array:
    """Lays the first axis of an array over a mesh axis, or all of it on both halves if None."""
    return jax.lax.with_sharding_constraint(x, P(axis, *[P.UNCONSTRAINED] * (x.ndim - 1)))


def _check_axis(name: str) -> None:
    mesh = jax.sharding.get_abstract_mesh()
    axes = {
        axis: f"{axis_type.name} of size {size}"
        for axis, size, axis_type in zip(
            mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True
        )
    }
    if axes.get(name) != f"{AxisType.Auto.name} of size 2":
        raise ValueError(
            f"gradient_axis must be an Auto axis of size 2 of the mesh in context, got {name!r} "
            f"where the axes are {axes or 'none'}: make one, such as jax.make_mesh((2, n // 2), "
            f"({name!r}, 'data'), (jax.sharding.AxisType.Auto,) * 2) for n devices, and call "
            "update under jax.jit in jax.set_mesh(mesh)."
        )
