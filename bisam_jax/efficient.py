"""Efficient SAM: perturb a random part of the weights, descend on the examples it hurts most."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bisam_jax._checks import as_key, check_scalar
from bisam_jax._trees import (
    at_least_float32,
    check_not_masked,
    check_same_structure,
    float_part,
    for_base_optimizer,
    perturb,
)
from bisam_jax.perturbations import l2_ball
from bisam_jax.sharpness_aware import (
    LossFn,
    SharpnessAwareState,
    ascent_gradient,
    gradient_of,
)

ExampleLossesFn = Callable[[optax.Params, jax.Array | None], jax.Array]


class RandomSubsetState(NamedTuple):
    """State of :func:`random_subset`.

    Attributes:
        subset_key: random key, from which the next subset comes.
    """

    subset_key: jax.Array


def random_subset(
    beta: jax.typing.ArrayLike, key: jax.Array | int = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps a perturbation on a random part of the weights: stochastic weight perturbation.

    Returns :math:`m \epsilon / \beta`, where each entry of :math:`m` is 1 with probability
    :math:`\beta` (``beta``) and else 0, so that its mean is the perturbation :math:`\epsilon`.

    Args:
        beta: probability of each weight, a scalar in (0, 1], possibly traced.
        key: random key, or a seed for one.

    Returns:
        A transformation to chain after a ball. The extra arg ``subset``, a tree of booleans in
        the parameters' shapes, replaces the draw.

    Raises:
        TypeError, ValueError: if ``beta`` is not in (0, 1]; in ``update``, if ``subset`` does not
            match.

    References:
        Du et al., `Efficient Sharpness-aware Minimization for Improved Training of Neural
        Networks <https://arxiv.org/abs/2110.03141>`_, 2022
    """
    check_scalar("beta", beta, minimum=0.0, maximum=1.0, exclusive=True)

    def init_fn(params: optax.Params) -> RandomSubsetState:
        del params
        # A new key, so that donating the state leaves the caller's alone.
        return RandomSubsetState(jax.random.fold_in(as_key(key), 0))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        subset: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RandomSubsetState]:
        del params, extra_args
        next_key, draw_key = jax.random.split(state.subset_key)
        if subset is None:
            leaves, structure = jax.tree.flatten(updates)
            keys = jax.random.split(draw_key, max(len(leaves), 1))
            subset = structure.unflatten(
                jax.random.bernoulli(k, beta, jnp.shape(leaf))
                for k, leaf in zip(keys, leaves, strict=False)
            )
        check_same_structure("subset", subset, updates)
        eps = jax.tree.map(
            lambda m, u: jnp.where(m, u / jnp.asarray(beta, u.dtype), 0), subset, updates
        )
        return eps, RandomSubsetState(next_key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def efficient_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    beta: jax.typing.ArrayLike = 0.5,
    gamma: float = 0.5,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Efficient SAM: a random part of the weights, and the examples whose loss rises most.

    The perturbation is :math:`\epsilon = m \rho\, a / (\beta \lVert a \rVert)` with the ascent
    gradient :math:`a` and a random mask :math:`m` (:func:`random_subset`). Of a batch of
    :math:`B`, the :math:`\lfloor \gamma B \rfloor` examples with the largest rise
    :math:`\ell_i(w + \epsilon) - \ell_i(w)` are chosen; the result is the gradient of their mean
    loss at :math:`w + \epsilon`.

    Args:
        rho: radius of the ball: a scalar, possibly traced, or a schedule.
        beta: probability that a weight is perturbed, a scalar in (0, 1], possibly traced.
        gamma: share of the examples to descend on, in (0, 1]; with 1, all, and nothing is chosen.
        key: random key, or a seed for one, for the weights.

    Returns:
        A transformation whose ``update`` needs the extra arg ``example_losses_fn``: a function of
        parameters and ``indices``, an int32 array of examples or None for all of the batch, that
        returns those examples' losses, floating[examples]. ``losses``, those of the whole batch
        at the parameters, saves a forward pass if the clean pass has them. ``loss_fn`` and
        ``grad_fn`` are not used. ``perturbation_loss_fn`` is as in :func:`sharpness_aware`;
        ``subset`` as in :func:`random_subset`.

    Raises:
        TypeError, ValueError: as :func:`sharpness_aware`, and if ``beta`` or ``gamma`` is not in
            (0, 1], ``example_losses_fn`` is missing, what it returns has not one axis, or
            ``gamma`` leaves no example.

    References:
        Du et al., `Efficient Sharpness-aware Minimization for Improved Training of Neural
        Networks <https://arxiv.org/abs/2110.03141>`_, 2022

    .. note:: One gradient, one forward pass and ``gamma`` of a gradient a step; shapes are static.
        State: one key. Agrees to 1e-8 in float64 with the authors' code, which adds 1e-7 to the
        norm, keeps one example less (those strictly above the last one chosen), and draws whole
        arrays instead of weights.
    """
    check_scalar("gamma", gamma, minimum=0.0, maximum=1.0, exclusive=True)
    perturbation = optax.chain(l2_ball(rho), random_subset(beta, key))

    def init_fn(params: optax.Params) -> SharpnessAwareState:
        check_not_masked(params)
        return SharpnessAwareState(perturbation.init(float_part(params)))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        example_losses_fn: ExampleLossesFn | None = None,
        losses: jax.Array | None = None,
        perturbation_loss_fn: LossFn | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SharpnessAwareState]:
        if params is None or example_losses_fn is None:
            missing = "params" if params is None else "example_losses_fn"
            raise ValueError(
                f"{missing} is missing: call update(grads, state, params, example_losses_fn="
                "lambda params, indices: losses of these examples, of all if indices is None)."
            )
        check_not_masked(params)
        eps, perturbation_state = perturbation.update(
            ascent_gradient(updates, params, perturbation_loss_fn),
            state.perturbation_state,
            float_part(params),
            **extra_args,
        )
        point = perturb(params, eps)
        chosen = None
        if gamma < 1:
            before = example_losses_fn(params, None) if losses is None else losses
            rise = _checked(example_losses_fn(point, None)) - _checked(before)
            chosen = jax.lax.top_k(_unsharded(rise), _number_chosen(gamma, rise.size))[1]
        descent = gradient_of("loss_fn", lambda p: _checked(example_losses_fn(p, chosen)).mean())
        grads = for_base_optimizer(descent(point), updates, params)
        return grads, SharpnessAwareState(perturbation_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _checked(losses: jax.Array) -> jax.Array:
    if jnp.ndim(losses) != 1:
        raise ValueError(
            "example_losses_fn and losses must give one loss an example, a floating array of one "
            f"axis, got shape {jnp.shape(losses)}."
        )
    return jnp.asarray(losses, at_least_float32(losses.dtype))


def _unsharded(losses: jax.Array) -> jax.Array:
    """On a mesh with explicit axes, JAX looks for the largest along whole axes alone."""
    explicit = jax.typeof(losses).sharding.mesh.are_all_axes_explicit
    return jax.sharding.reshard(losses, jax.sharding.PartitionSpec()) if explicit else losses


def _number_chosen(gamma: float, examples: int) -> int:
    # A product of 6.999999 is meant as 7.
    number = int(examples * gamma + 1e-6)
    if number < 1:
        raise ValueError(
            f"gamma leaves no example to descend on, got gamma={gamma} for {examples} examples."
        )
    return number
