"""Sparse SAM with a dynamic mask: perturb part of the weights, and let that part move."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bisam_jax._balls import l2_ball_unless
from bisam_jax._checks import as_key, check_count, check_key, check_same_structure, check_scalar
from bisam_jax._sharpness_aware import sharpness_aware
from bisam_jax._top_k import masked, number_of, size_of, top_k_mask
from bisam_jax._trees import float_part


class DynamicMaskState(NamedTuple):
    """State of :func:`dynamic_mask`.

    Attributes:
        dynamic_count: int32 scalar, the number of perturbations masked so far.
        dynamic_mask: which weights are perturbed: booleans in the parameters' shapes.
    """

    dynamic_count: jax.Array
    dynamic_mask: optax.Params


def dynamic_mask(
    sparsity: float = 0.5,
    drop_rate: optax.ScalarOrSchedule = 0.5,
    update_every: int = 1,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps a perturbation on part of the weights, and lets that part move.

    Every ``update_every`` perturbations the ``drop_rate`` share of the perturbed weights with the
    smallest drop scores is dropped, and as many others, those with the largest growth scores, are
    grown; a weight just dropped cannot grow. The new mask holds from the next perturbation on.

    Args:
        sparsity: share of the weights, over all leaves together, that are not perturbed.
        drop_rate: share dropped: a scalar in [0, 1], possibly traced, or a schedule, called with
            the number of perturbations made. The authors' is
            ``optax.cosine_decay_schedule(0.5, total_steps)``.
        update_every: number of perturbations between changes; the first is at number 0.
        key: random key, or a seed for one, for the first mask, which is random.

    Returns:
        A transformation to chain after a ball; its ``update`` needs the parameters. The drop score
        of a weight is its magnitude once perturbed; the growth score is the magnitude of its entry
        in the incoming perturbation, which after an ``l2_ball`` ranks the weights as the ascent
        gradient does. The extra args ``drop_scores`` and ``growth_scores``, trees of non-negative
        numbers in the parameters' shapes, replace them, with random ones for instance.

    Raises:
        TypeError, ValueError: if ``sparsity`` or ``drop_rate`` is not in [0, 1], or
            ``update_every`` no positive integer; in ``update``, for missing parameters, or scores
            or a mask that do not match.

    Examples:
        >>> import jax.numpy as jnp
        >>> tx = dynamic_mask(sparsity=0.5, drop_rate=1.0)
        >>> w, eps = jnp.array([3.0, 4.0]), jnp.array([0.3, 0.4])
        >>> state = tx.init(w)._replace(dynamic_mask=jnp.array([True, False]))
        >>> for step in range(2):
        ...     masked, state = tx.update(eps, state, w)
        ...     print(masked)
        [0.3 0. ]
        [0.  0.4]

    References:
        Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach
        <https://arxiv.org/abs/2210.05177>`_, 2022

    .. note:: State: one boolean per weight, and a counter. The counts are the authors': with
        :math:`n` weights, sparsity :math:`s` and :math:`d` to drop, :math:`\lfloor n(1-s) - d
        \rfloor` stay and :math:`\lfloor d \rfloor` grow, so that the mask can lose one weight to
        rounding.
    """
    check_scalar("sparsity", sparsity, minimum=0.0, maximum=1.0)
    if not callable(drop_rate):
        check_scalar("drop_rate", drop_rate, minimum=0.0, maximum=1.0)
    check_count("update_every", update_every)
    check_key(key)

    def init_fn(params: optax.Params) -> DynamicMaskState:
        scores = _uniform(as_key(key), float_part(params))
        n = size_of(scores)
        mask = top_k_mask(scores, n - number_of(math.ceil, n, sparsity))
        return DynamicMaskState(jnp.zeros([], jnp.int32), mask)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        drop_scores: optax.Params | None = None,
        growth_scores: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DynamicMaskState]:
        del extra_args
        if params is None:
            raise ValueError("dynamic_mask needs the parameters: call update(..., params).")
        mask = state.dynamic_mask
        check_same_structure("the mask in the state", mask, updates)
        eps = masked(updates, mask)
        drop = jax.tree.map(jnp.add, params, eps) if drop_scores is None else drop_scores
        growth = updates if growth_scores is None else growth_scores
        check_same_structure("drop_scores", drop, updates)
        check_same_structure("growth_scores", growth, updates)
        rate = drop_rate(state.dynamic_count) if callable(drop_rate) else drop_rate

        due = state.dynamic_count % update_every == 0
        move = functools.partial(_moved, mask, drop, growth, sparsity, rate)
        new_mask = jax.lax.cond(due, move, lambda: mask)
        count = jnp.asarray(optax.safe_increment(state.dynamic_count))
        return eps, DynamicMaskState(count, new_mask)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def sparse_sam_dynamic(
    rho: optax.ScalarOrSchedule = 0.05,
    sparsity: float = 0.5,
    drop_rate: optax.ScalarOrSchedule = 0.5,
    update_every: int = 1,
    key: jax.Array | int = 0,
    *,
    perturbation: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Sparse SAM with a moving mask: :func:`dynamic_mask` after an :func:`l2_ball`.

    Args:
        rho: radius of the ball before masking: a scalar, possibly traced, or a schedule.
        sparsity: share of the weights that are not perturbed; with 0, this is SAM.
        drop_rate: share of the mask that moves each time.
        update_every: number of steps between moves.
        key: random key, or a seed for one, for the first mask.
        perturbation: replaces the ball of radius ``rho``.

    Returns:
        The transformation, as :func:`sharpness_aware`.

    Raises:
        TypeError, ValueError: as :func:`sharpness_aware` and :func:`dynamic_mask`; if both ``rho``
            and ``perturbation`` are given.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> tx = sparse_sam_dynamic(rho=0.5, sparsity=0.0)
        >>> w = jnp.array([3.0, 4.0])
        >>> grads, state = tx.update(None, tx.init(w), w, loss_fn=lambda w: jnp.sum(w**2))
        >>> print(grads)
        [6.6 8.8]

    References:
        Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach
        <https://arxiv.org/abs/2210.05177>`_, 2022

    .. note:: Two gradients per step; state: one boolean per weight, and a counter. Agrees to 1e-8
        in float64 with the authors' code, which adds 1e-7 to the norm.
    """
    mask = dynamic_mask(sparsity, drop_rate, update_every, key)
    return sharpness_aware(optax.chain(l2_ball_unless(perturbation, rho), mask))


def _uniform(key: jax.Array, like: optax.Params) -> optax.Params:
    """A tree of random numbers in [0, 1)."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, max(len(leaves), 1))
    # Added to zeros, to lie where the parameters do.
    draws = [
        jnp.zeros_like(p, dtype=jnp.float32) + jax.random.uniform(k, p.shape, jnp.float32)
        for k, p in zip(keys, leaves, strict=False)
    ]
    return structure.unflatten(draws)


def _moved(
    mask: optax.Params, drop: optax.Params, growth: optax.Params, sparsity: Any, rate: Any
) -> optax.Params:
    """The mask after dropping the `rate` share of it, and growing as many others."""
    n = size_of(mask)
    alive = n - n * sparsity
    dropped = jnp.minimum(alive * jnp.asarray(rate, jnp.result_type(float)), n * sparsity)
    stay = jnp.floor(alive - dropped).astype(jnp.int32)
    grow = jnp.floor(dropped).astype(jnp.int32)
    staying = top_k_mask(_where(mask, drop), stay)
    absent = jax.tree.map(jnp.logical_not, mask)
    growing = top_k_mask(_where(absent, growth), grow)
    return jax.tree.map(jnp.logical_or, staying, growing)


def _where(mask: optax.Params, scores: optax.Params) -> optax.Params:
    """The scores where `mask` holds, zero elsewhere; a score of zero still comes before those."""
    smallest = float(jnp.finfo(jnp.float32).tiny)
    return jax.tree.map(
        lambda m, s: jnp.where(m, jnp.maximum(jnp.abs(s), smallest), 0), mask, scores
    )
