"""Tilted SAM: a mean over noisy starts in which higher losses weigh more."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bisam_jax._balls import l2_ball_unless
from bisam_jax._boundary import TwoLosses, from_rule
from bisam_jax._checks import (
    check_count,
    check_key,
    check_same_structure,
    check_scalar,
    check_static,
)
from bisam_jax._keys import draw_like, key_data_of
from bisam_jax._trees import float_part, global_norm, perturb, scale_to_norm


class TiltedState(NamedTuple):
    """State of :func:`tilted_sam`.

    Attributes:
        tilted_key: data of the random key (uint32) from which the noise of the next step is drawn.
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
    perturbation: optax.GradientTransformation | None = None,
    together: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Tilted SAM: SAM gradients from noisy starts, averaged so that higher losses weigh more.

    There are ``num_samples`` starts :math:`w_i = w + z_i`, where :math:`z_i` is normal noise of
    standard deviation ``scale``; noise longer than ``radius`` is shortened to ``radius``. Each
    start has a perturbation :math:`\epsilon_i`, and the result is the weighted sum of gradients in

    .. math::
        \epsilon_i = \rho\, \frac{\nabla Q(w_i)}{\lVert \nabla Q(w_i) \rVert}, \qquad
        \sum_i s_i \nabla L(w_i + \epsilon_i), \qquad
        s = \operatorname{softmax}_i\, t\, L(w_i + \epsilon_i),

    with :math:`\rho` (``rho``), :math:`t` (``tilt``), and :math:`Q` the ``perturbation_loss_fn``,
    or :math:`L` itself without one.

    Args:
        rho: radius of the ball around each start: a scalar, possibly traced, or a schedule.
        tilt: strength of the weighting, a scalar, possibly traced. With 0, this is the plain mean;
            with a large value, only the worst start counts.
        num_samples: number of starts. It sets array shapes, so it cannot be traced.
        radius: largest norm of the noise, a scalar >= 0, possibly traced.
        scale: standard deviation of the noise, a scalar >= 0, possibly traced.
        key: random key or integer seed.
        perturbation: replaces the ball of radius ``rho`` around each start.
        together: whether to compute all starts at once, by vmap, with ``num_samples`` times the
            memory. If False, they are computed one after another in a loop, in which XLA on CPU is
            slow at convolutions.

    Returns:
        A transformation whose ``update`` takes the arguments listed in :func:`sharpness_aware`,
        except ``grad_fn``, since it weights gradients by losses, and ``perturbation_grads``, since
        it ascends at the noisy starts and not at ``params``. ``grads`` is not used. The extra arg
        ``noise`` replaces the standard normal draws (before scaling and shortening): a tree with
        the structure of the parameters, and a leading axis of ``num_samples`` on each leaf.

    Raises:
        TypeError, ValueError: as :func:`sharpness_aware`; also if ``num_samples`` is traced or is
            not a positive integer, another argument is out of range, or both ``rho`` and
            ``perturbation`` are given; in ``update``, if ``grad_fn`` or ``perturbation_grads`` is
            given, or ``noise`` does not match the parameters.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> tx = tilted_sam(rho=0.5, tilt=1.0, num_samples=2, radius=0.0)
        >>> w = jnp.array([3.0, 4.0])
        >>> grads, state = tx.update(None, tx.init(w), w, loss_fn=lambda w: jnp.sum(w**2))
        >>> print(grads)
        [6.6 8.8]

    References:
        Li, Zhou and Bilmes, `Tilted Sharpness-Aware Minimization
        <https://arxiv.org/abs/2410.22656>`_, 2024

    .. note:: ``2 * num_samples`` gradients per step; under jit, your own ``grads`` cost nothing.
        State: one key. Agrees to 1e-9 in float64 with the authors' code if the weights :math:`s`
        are float64 there; the published code rounds them to float32.
    """
    check_scalar("tilt", tilt)
    check_scalar("radius", radius, minimum=0.0)
    check_scalar("scale", scale, minimum=0.0)
    check_static("num_samples", num_samples)
    check_count("num_samples", num_samples)
    check_key(key)
    kept = key_data_of(key)
    ball = l2_ball_unless(perturbation, rho)
    mean = _mean_together if together else _mean_one_by_one

    def init_fn(params: optax.Params) -> TiltedState:
        return TiltedState(kept.first(), ball.init(params))

    def rule(
        losses: TwoLosses,
        state: Any,
        params: optax.Params,
        /,
        noise: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TiltedState]:
        next_key, draw_key = jax.random.split(kept.as_key(state.tilted_key))
        draw = functools.partial(_standard_normal, draw_key, params)
        if noise is not None:
            draw = functools.partial(_sample_of, _checked_noise(noise, params, int(num_samples)))

        def sample(i: Any) -> tuple:
            z = draw(i)
            length = jnp.minimum(global_norm(z) * scale, radius)
            start = perturb(params, scale_to_norm(z, length))
            ascent = losses.ascent_gradient_at(start)
            eps, ball_state = ball.update(ascent, state.tilted_ball, start, **extra_args)
            loss, gradient = losses.value_and_gradient(perturb(start, eps))
            return tilt * loss, gradient, ball_state

        gradient, ball_state = mean(sample, int(num_samples))
        return gradient, TiltedState(jax.random.key_data(next_key), ball_state)

    return from_rule(init_fn, rule)


def _mean_together(sample: Callable[[Any], tuple], num_samples: int) -> tuple:
    tilted, gradients, ball_states = jax.vmap(sample)(jnp.arange(num_samples))
    weights = jax.nn.softmax(tilted)
    gradient = jax.tree.map(
        lambda g: jnp.tensordot(jnp.asarray(weights, g.dtype), g, axes=1), gradients
    )
    return gradient, jax.tree.map(lambda leaf: leaf[-1], ball_states)


def _mean_one_by_one(sample: Callable[[Any], tuple], num_samples: int) -> tuple:
    """Returns the softmax-weighted mean, with the memory of one sample."""

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
    """Returns the i-th draw, with the structure of the parameters."""
    return draw_like(params, jax.random.fold_in(key, i), jax.random.normal)


def _sample_of(noise: optax.Params, i: jax.Array) -> optax.Params:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[i], noise)


def _checked_noise(noise: optax.Params, params: optax.Params, num_samples: int) -> optax.Params:
    noise = float_part(noise)
    expected = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct((num_samples, *jnp.shape(p)), jnp.result_type(p)),
        params,
    )
    check_same_structure("noise, which needs a leading axis of num_samples,", noise, expected)
    return noise
