"""Sharpness: how much the loss rises around the parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bisam_jax._batches import Batch, BatchLoss, BatchLossFn
from bisam_jax._checks import check_count, check_static, check_transformation
from bisam_jax._estimates import Estimate, check_probes, estimate_of
from bisam_jax._keys import as_key
from bisam_jax._means import Mean, mean_over
from bisam_jax._trees import float_part, merge, perturb


class Sharpness(NamedTuple):
    """What :func:`sharpness` returns.

    Attributes:
        rise: scalar, the loss at ``point`` minus the loss at the parameters.
        point: the perturbed parameters, where anything else can be measured. Floating leaves are in
            float32 or wider.
    """

    rise: jax.Array
    point: optax.Params


def sharpness(
    loss_fn: BatchLossFn,
    params: optax.Params,
    batch: Batch | list[Batch],
    perturbation: optax.GradientTransformation,
    *,
    perturbation_loss_fn: BatchLossFn | None = None,
    steps: int = 1,
    microbatch_size: int | None = None,
) -> Sharpness:
    r"""Returns how much the loss rises at the point of a ball that an ascent finds.

    With one step, this is the point that an optimizer with this ``perturbation`` takes its gradient
    at. With more, the ascent goes on inside the ball:

    .. math:: \epsilon_{t+1} = (1 - s_t)\, \epsilon_t + s_t\, P(\nabla Q(w + \epsilon_t)),

    where :math:`P` (``perturbation``) maps a gradient to the point of the ball that is the farthest
    in its direction, and :math:`Q` is the ascended loss. The share :math:`s_t` starts at 1, halves
    when :math:`Q` does not rise, and doubles when it does; a point with a lower :math:`Q` is not
    kept. So the points never leave the ball, whatever its shape, and there is no step size to
    choose.

    Args:
        loss_fn: the loss whose rise is returned. ``loss_fn(params, batch)`` returns one loss per
            example, floating[batch], or their mean, a scalar.
        params: a tree of parameters. Leaves that are not floating are not perturbed.
        batch: a tree of arrays with the examples along their first axis. A list or an iterator of
            batches is measured as one large batch.
        perturbation: a ball, such as :func:`l2_ball`, :func:`adaptive_l2_ball` or
            :func:`linf_ball`, or a chain that ends in one. A schedule counts from zero.
        perturbation_loss_fn: the loss to ascend, in the form of ``loss_fn``; ``loss_fn`` by
            default.
        steps: number of gradients of the ascent; it cannot be traced.
        microbatch_size: number of examples in memory at a time; it must divide every batch.

    Returns:
        :class:`Sharpness`: the rise of the loss, and the point.

    Raises:
        TypeError: if ``perturbation`` is not a transformation, ``steps`` is not an integer, or a
            loss function does not return what it should.
        ValueError: if ``steps`` is less than 1, there is no batch, or ``microbatch_size`` does not
            divide one.

    Examples:
        >>> import jax.numpy as jnp
        >>> from bisam_jax import l2_ball
        >>> def loss_fn(w, batch):
        ...     return batch @ w**2
        >>> w, batch = jnp.array([0.0, 0.1]), jnp.array([[4.0, 1.0], [6.0, 1.0]])
        >>> rise, point = sharpness(loss_fn, w, batch, l2_ball(0.5))
        >>> print(rise.round(4))
        0.35
        >>> rise, point = sharpness(loss_fn, jnp.array([0.001, 0.1]), batch, l2_ball(0.5), steps=20)
        >>> print(f"{rise:.3f}")
        1.257

    References:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, 2021. Kwon et al., `ASAM
        <https://arxiv.org/abs/2102.11600>`_, 2021, for the adaptive measure. The ascent is the
        conditional gradient method of Frank and Wolfe, 1956.

    .. note:: Costs ``steps`` gradients and as many forward passes. A pure function: jit it, vmap it
        over seeds. Measured with :func:`l2_ball`, sharpness changes if a network is rescaled
        without changing its function; with :func:`adaptive_l2_ball` and ``eta=0``, it does not.
    """
    check_transformation("perturbation", perturbation)
    check_static("steps", steps)
    check_count("steps", steps)
    descended = BatchLoss("loss_fn", loss_fn, has_aux=False)
    ascended = descended
    if perturbation_loss_fn is not None:
        ascended = BatchLoss("perturbation_loss_fn", perturbation_loss_fn, has_aux=False)
    floats, mean = float_part(params), mean_over(batch, microbatch_size)
    state = perturbation.init(floats)

    def value_at(loss: BatchLoss, eps: Any) -> jax.Array:
        return _value(loss, perturb(params, eps), mean)

    def farthest(eps: Any) -> Any:
        gradient = _gradient(ascended, perturb(params, eps), mean)
        return perturbation.update(gradient, state, floats)[0]

    def ascend(_: Any, carry: tuple) -> tuple:
        best, height, share = carry
        target = farthest(best)
        candidate = jax.tree.map(lambda e, t: e + share.astype(e.dtype) * (t - e), best, target)
        value = value_at(ascended, candidate)
        rises = value > height  # NaN does not
        best, height = jax.tree.map(
            lambda new, old: jnp.where(rises, new, old), (candidate, value), (best, height)
        )
        return best, height, jnp.where(rises, jnp.minimum(1.0, 2 * share), share / 2)

    clean = jax.tree.map(jnp.zeros_like, floats)
    eps = farthest(clean)
    if steps > 1:
        carry = eps, value_at(ascended, eps), jnp.float32(1.0)
        eps, *_ = jax.lax.fori_loop(1, steps, ascend, carry)
    rise = value_at(descended, eps) - value_at(descended, clean)
    return Sharpness(rise, perturb(params, eps))


def average_sharpness(
    loss_fn: BatchLossFn,
    params: optax.Params,
    batch: Batch | list[Batch],
    perturbation: optax.GradientTransformation,
    *,
    key: jax.Array | int,
    num_samples: int = 32,
    microbatch_size: int | None = None,
) -> Estimate:
    r"""Returns how much the loss rises in random directions.

    Each direction is a standard normal draw that ``perturbation`` maps into its ball: with
    :func:`l2_ball`, a uniformly distributed point at distance ``rho``.

    Args:
        loss_fn: see :func:`sharpness`.
        params: see :func:`sharpness`.
        batch: see :func:`sharpness`.
        perturbation: see :func:`sharpness`.
        key: a random key, or an integer seed.
        num_samples: number of directions, at least 2; it cannot be traced.
        microbatch_size: see :func:`sharpness`.

    Returns:
        :class:`Estimate`: scalars, the mean rise and its standard error.

    Raises:
        TypeError: if ``key`` is not a random key, or as :func:`sharpness`.
        ValueError: if ``num_samples`` is less than 2, or as :func:`sharpness`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from bisam_jax import l2_ball
        >>> def loss_fn(w, batch):
        ...     return jnp.mean(batch) * jnp.sum(w**2)
        >>> w, batch = jnp.zeros(3), jnp.ones(2)
        >>> mean, error = average_sharpness(loss_fn, w, batch, l2_ball(0.5), key=0)
        >>> print(mean.round(4), error.round(4))
        0.25 0.0

    References:
        Andriushchenko et al., `A Modern Look at the Relationship between Sharpness and
        Generalization <https://arxiv.org/abs/2302.07011>`_, 2023

    .. note:: Costs ``num_samples`` forward passes, one after another, and no gradient.
    """
    check_transformation("perturbation", perturbation)
    check_probes(key, num_samples)
    loss = BatchLoss("loss_fn", loss_fn, has_aux=False)
    floats, mean = float_part(params), mean_over(batch, microbatch_size)
    state = perturbation.init(floats)

    def value_at_random(key: jax.Array) -> jax.Array:
        direction = optax.tree.random_like(key, floats, jax.random.normal)
        eps, _ = perturbation.update(direction, state, floats)
        return _value(loss, perturb(params, eps), mean)

    clean = _value(loss, merge(floats, params), mean)
    values = jax.lax.map(value_at_random, jax.random.split(as_key(key), num_samples))
    return estimate_of(values - clean)


def _value(loss: BatchLoss, params: Any, mean: Mean) -> jax.Array:
    return mean(lambda one: loss.mean(params, one))


def _gradient(loss: BatchLoss, params: Any, mean: Mean) -> Any:
    """Returns the gradient of the floating leaves."""

    def of_floats(floats: Any, one: Batch) -> jax.Array:
        return loss.mean(merge(floats, params), one)

    return mean(lambda one: jax.grad(of_floats)(float_part(params), one))
