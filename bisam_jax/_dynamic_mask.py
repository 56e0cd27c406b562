"""Sparse SAM with a dynamic mask: perturb part of the weights, and change that part over time."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bisam_jax._balls import l2_ball_unless
from bisam_jax._checks import check_count, check_key, check_same_structure, check_scalar
from bisam_jax._keys import as_key
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
    r"""Keeps a perturbation on part of the weights, and changes that part over time.

    Every ``update_every`` perturbations, the mask drops some weights and grows the same number. It
    drops the ``drop_rate`` fraction of the perturbed weights with the smallest drop scores. It
    grows the weights with the largest growth scores that were not perturbed, so a weight just
    dropped cannot grow. The new mask applies from the next perturbation.

    Args:
        sparsity: fraction of the weights, over all leaves together, that is not perturbed.
        drop_rate: fraction of the perturbed weights to drop: a scalar in [0, 1], possibly traced,
            or a schedule, called with the number of perturbations so far. The authors use
            ``optax.cosine_decay_schedule(0.5, total_steps)``.
        update_every: number of perturbations from one change of the mask to the next. The first
            change is at perturbation 0.
        key: random key or integer seed for the first mask, which is random.

    Returns:
        A transformation to chain after a ball; its ``update`` needs ``params``. The drop score of a
        weight is the magnitude of the perturbed weight. The growth score is the magnitude of its
        entry in the incoming perturbation; after an ``l2_ball``, this ranks the weights as the
        ascent gradient does. The extra args ``drop_scores`` and ``growth_scores`` replace these
        scores, for example with random ones. Both are trees of non-negative numbers in the
        parameters' shapes.

    Raises:
        TypeError, ValueError: if ``sparsity`` or ``drop_rate`` is not in [0, 1], or
            ``update_every`` is not a positive integer; in ``update``, if ``params`` is missing, or
            if scores or the mask in the state do not match it.

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

    .. note:: State: one boolean per weight, and a counter. The mask has the authors' counts: with
        :math:`n` weights, sparsity :math:`s` and :math:`d` weights to drop, :math:`\lfloor n(1-s) -
        d \rfloor` stay and :math:`\lfloor d \rfloor` grow. Rounding can thus remove one weight from
        the mask.
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
            raise ValueError(
                "dynamic_mask needs the parameters, got None: call update(eps, state, params)."
            )
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
    """Sparse SAM with a dynamic mask: :func:`dynamic_mask` after an :func:`l2_ball`.

    Args:
        rho: radius of the ball before masking: a scalar, possibly traced, or a schedule.
        sparsity: fraction of the weights that is not perturbed; with 0, this is SAM.
        drop_rate: fraction of the perturbed weights to drop at each change of the mask.
        update_every: number of steps from one change of the mask to the next.
        key: random key or integer seed for the first mask.
        perturbation: replaces the ball of radius ``rho``.

    Returns:
        A transformation, called as described in :func:`sharpness_aware`.

    Raises:
        TypeError, ValueError: as :func:`sharpness_aware` and :func:`dynamic_mask`; also if both
            ``rho`` and ``perturbation`` are given.

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
    """Returns a tree of random numbers in [0, 1)."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, max(len(leaves), 1))
    # The sum with zeros has the sharding of the parameters.
    draws = [
        jnp.zeros_like(p, dtype=jnp.float32) + jax.random.uniform(k, p.shape, jnp.float32)
        for k, p in zip(keys, leaves, strict=False)
    ]
    return structure.unflatten(draws)


def _moved(
    mask: optax.Params, drop: optax.Params, growth: optax.Params, sparsity: Any, rate: Any
) -> optax.Params:
    """Returns the mask with its `rate` fraction dropped, and the same number of weights grown."""
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
    """Returns positive scores where `mask` is True, and 0 elsewhere.

    A score of 0 is raised, so that it still ranks above the weights outside the mask.
    """
    smallest = float(jnp.finfo(jnp.float32).tiny)
    return jax.tree.map(
        lambda m, s: jnp.where(m, jnp.maximum(jnp.abs(s), smallest), 0), mask, scores
    )
