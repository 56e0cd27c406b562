"""Tilted SAM: an average over noisy starts that leans towards the worst of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bisam_jax._checks import as_key, check_count, check_scalar
from bisam_jax._trees import (
    check_not_masked,
    check_same_structure,
    float_part,
    for_base_optimizer,
    global_norm,
    perturb,
    scale_to_norm,
)
from bisam_jax.perturbations import l2_ball
from bisam_jax.sharpness_aware import LossFn, gradient_of, value_and_gradient_of


class TiltedState(NamedTuple):
    """State of :func:`tilted_sam`.

    Attributes:
        tilted_key: random key, from which the next step's noise comes.
        tilted_ball: state of the ball; empty for a constant radius.
    """

    tilted_key: jax.Array
    tilted_ball: optax.OptState


def tilted_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    tilt: jax.typing.ArrayLike = 1.0,
    num_samples: int = 3,
    radius: jax.typing.ArrayLike = 1.0,
    scale: jax.typing.ArrayLike = 1.0,
    key: jax.Array | int = 0,
    *,
    together: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Tilted SAM: SAM steps from noisy starts, the higher losses weighing more.

    For each of ``num_samples`` starts :math:`w_i = w + z_i`, where :math:`z_i` is normal noise of
    standard deviation ``scale``, shortened to ``radius`` where it is longer,

    .. math::
        \epsilon_i = \rho\, \frac{\nabla Q(w_i)}{\lVert \nabla Q(w_i) \rVert}, \qquad
        \sum_i s_i \nabla L(w_i + \epsilon_i), \qquad
        s = \operatorname{softmax}_i\, t\, L(w_i + \epsilon_i),

    with :math:`\rho` (``rho``), :math:`t` (``tilt``), and :math:`Q` the ``perturbation_loss_fn``,
    or :math:`L` itself.

    Args:
        rho: radius of the ball around each start: a scalar, possibly traced, or a schedule.
        tilt: how far the mean leans towards the worst start, a scalar, possibly traced; 0 is the
            plain mean, a large value the worst start alone.
        num_samples: number of starts.
        radius: largest norm of the noise, a scalar >= 0, possibly traced.
        scale: standard deviation of the noise, a scalar >= 0, possibly traced.
        key: random key, or a seed for one.
        together: whether all starts are computed at once, by vmap, in ``num_samples`` times the
            memory; one after another otherwise, in a loop, where XLA on CPU is slow at
            convolutions.

    Returns:
        A transformation whose ``update`` takes what that of :func:`sharpness_aware` takes, without
        ``grad_fn``, since it weighs gradients by losses. The incoming ``grads`` are not used.
        ``noise``, a tree of the parameters' structure with an axis of ``num_samples`` in front of
        each leaf, replaces the standard normal draws (before scaling and shortening).

    Raises:
        TypeError, ValueError: as :func:`sharpness_aware`, and if ``num_samples`` is no positive
            integer, or another argument out of its range; in ``update``, for a missing ``loss_fn``
            or a ``noise`` that does not match.

    References:
        Li, Zhou and Bilmes, `Tilted Sharpness-Aware Minimization
        <https://arxiv.org/abs/2410.22656>`_, 2024

    .. note:: ``2 * num_samples`` gradients a step; under jit the caller's own gradient is dropped.
        State: one key. Agrees to 1e-9 in float64 with the authors' code where its weights are
        float64; as published, they are rounded to float32.
    """
    check_scalar("tilt", tilt)
    check_scalar("radius", radius, minimum=0.0)
    check_scalar("scale", scale, minimum=0.0)
    check_count("num_samples", num_samples)
    ball = l2_ball(rho)

    def init_fn(params: optax.Params) -> TiltedState:
        check_not_masked(params)
        # A new key, so that donating the state leaves the caller's alone.
        first = jax.random.fold_in(as_key(key), 0)
        return TiltedState(first, ball.init(float_part(params)))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        loss_fn: LossFn | None = None,
        perturbation_loss_fn: LossFn | None = None,
        ascent_loss_fn: LossFn | None = None,
        noise: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TiltedState]:
        if params is None or loss_fn is None:
            missing = "params" if params is None else "loss_fn"
            raise ValueError(
                f"{missing} is missing: tilted_sam weighs gradients by losses, so call "
                "update(grads, state, params, loss_fn=...)."
            )
        check_not_masked(params)
        next_key, draw_key = jax.random.split(state.tilted_key)
        if noise is None:
            draw = functools.partial(_standard_normal, draw_key, params)
        else:
            draw = functools.partial(_sample_of, _checked_noise(noise, params, num_samples))
        ascent_fn = gradient_of(
            "perturbation_loss_fn", perturbation_loss_fn or ascent_loss_fn or loss_fn
        )
        descent_fn = value_and_gradient_of("loss_fn", loss_fn)

        def sample(z: optax.Params) -> tuple:
            length = jnp.minimum(global_norm(z) * scale, radius)
            start = perturb(params, scale_to_norm(z, length))
            ascent = float_part(ascent_fn(start))
            eps, ball_state = ball.update(
                ascent, state.tilted_ball, float_part(start), **extra_args
            )
            loss, gradient = descent_fn(perturb(start, eps))
            return tilt * loss, float_part(gradient), ball_state

        mean = _mean_together if together else _mean_one_by_one
        gradient, ball_state = mean(lambda i: sample(draw(i)), num_samples)
        return (
            for_base_optimizer(gradient, updates, params),
            TiltedState(next_key, ball_state),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _mean_together(sample: Callable[[Any], tuple], num_samples: int) -> tuple:
    tilted, gradients, ball_states = jax.vmap(sample)(jnp.arange(num_samples))
    weights = jax.nn.softmax(tilted)
    gradient = jax.tree.map(
        lambda g: jnp.tensordot(jnp.asarray(weights, g.dtype), g, axes=1), gradients
    )
    return gradient, jax.tree.map(lambda leaf: leaf[-1], ball_states)


def _mean_one_by_one(sample: Callable[[Any], tuple], num_samples: int) -> tuple:
    """The softmax-weighted mean with the memory of one sample."""

    def add(carry: tuple, i: jax.Array) -> tuple[tuple, None]:
        largest, total, gradient, _ = carry
        tilted, new, ball_state = sample(i)
        highest = jnp.maximum(largest, tilted)
        old_weight, new_weight = jnp.exp(largest - highest), jnp.exp(tilted - highest)
        gradient = jax.tree.map(
            lambda m, g: (
                jnp.asarray(old_weight, m.dtype) * m + jnp.asarray(new_weight, m.dtype) * g
            ),
            gradient,
            new,
        )
        return (highest, old_weight * total + new_weight, gradient, ball_state), None

    largest, gradient, ball_state = sample(jnp.int32(0))
    if num_samples == 1:
        return gradient, ball_state
    first = (largest, jnp.ones_like(largest), gradient, ball_state)
    rest = jnp.arange(1, num_samples)
    (_, total, gradient, ball_state), _ = jax.lax.scan(add, first, rest)
    return jax.tree.map(lambda m: m / jnp.asarray(total, m.dtype), gradient), ball_state


def _standard_normal(key: jax.Array, params: optax.Params, i: jax.Array) -> optax.Params:
    """The i-th draw, of the structure of the parameters' floating part."""
    leaves, structure = jax.tree.flatten(float_part(params))
    keys = jax.random.split(jax.random.fold_in(key, i), max(len(leaves), 1))
    draws = [
        jax.random.normal(k, jnp.shape(leaf), jnp.result_type(leaf))
        for k, leaf in zip(keys, leaves, strict=False)
    ]
    return structure.unflatten(draws)


def _sample_of(noise: optax.Params, i: jax.Array) -> optax.Params:
    return jax.tree.map(lambda leaf: leaf[i], noise)


def _checked_noise(noise: optax.Params, params: optax.Params, num_samples: int) -> optax.Params:
    noise = float_part(noise)
    expected = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct((num_samples, *jnp.shape(p)), jnp.result_type(p)),
        float_part(params),
    )
    check_same_structure("noise, less its leading axis of num_samples,", noise, expected)
    return noise
