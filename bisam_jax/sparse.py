"""Sparse SAM: perturb only part of the weights."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.microbatching import micro_grad

from bisam_jax._checks import as_key, check_count, check_scalar
from bisam_jax._trees import check_same_structure, float_part
from bisam_jax.perturbations import l2_ball
from bisam_jax.sharpness_aware import sharpness_aware
from bisam_jax.top_k import size_of, top_k_mask


class FisherMaskState(NamedTuple):
    """State of :func:`fisher_mask`.

    Attributes:
        fisher_count: int32 scalar, the number of perturbations masked so far.
        fisher_mask: which weights are perturbed: booleans in the parameters' shapes.
    """

    fisher_count: jax.Array
    fisher_mask: optax.Params


class DynamicMaskState(NamedTuple):
    """State of :func:`dynamic_mask`.

    Attributes:
        dynamic_count: int32 scalar, the number of perturbations masked so far.
        dynamic_mask: which weights are perturbed: booleans in the parameters' shapes.
    """

    dynamic_count: jax.Array
    dynamic_mask: optax.Params


def fisher_scores(
    loss_fn: Callable[[optax.Params, Any], jax.Array],
    params: optax.Params,
    examples: Any,
    *,
    microbatch_size: int = 1,
) -> optax.Params:
    """The diagonal of the empirical Fisher information: squared gradients, summed over examples.

    Args:
        loss_fn: ``loss_fn(params, example)`` for a batch of one example, the first axis kept.
        params: where the gradients are taken.
        examples: a tree of arrays with the examples along their first axis.
        microbatch_size: how many gradients are held at a time; divides the number of examples.

    Returns:
        A tree of the parameters' structure.

    References:
        Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach
        <https://arxiv.org/abs/2210.05177>`_, 2022

    .. note:: Under :func:`jax.shard_map` with varying-axis checks, give it parameters that vary,
        ``jax.lax.pcast(params, axis_name, to="varying")``, and sum what it returns over the
        devices: gradients of replicated parameters are summed before they are squared. Under
        :func:`jax.jit` with a sharded batch, every device computes the scores of all examples.
    """
    sum_of_squares, _ = micro_grad(
        loss_fn,
        microbatch_size=microbatch_size,
        transform_fn=lambda gradient: jax.tree.map(jnp.square, gradient),
    )(params, examples)
    return sum_of_squares


def fisher_mask(
    sparsity: float = 0.5, update_every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Keeps a perturbation on the weights of largest Fisher information, and zeroes it elsewhere.

    Args:
        sparsity: share of the weights, over all leaves together, that are not perturbed.
        update_every: the mask is made anew before perturbation number 0, ``update_every``, and so
            on.

    Returns:
        A transformation to chain after a ball. Its ``update`` needs the parameters and the extra
        arg ``fisher_scores_fn``, from the parameters' floating part to non-negative scores of that
        structure, such as ``lambda params: fisher_scores(loss_fn, params, examples)``; it is
        evaluated only when the mask is made.

    Raises:
        TypeError, ValueError: if ``sparsity`` is not in [0, 1] or ``update_every`` no positive
            integer; in ``update``, without ``fisher_scores_fn``, or if its result or the mask in
            the state does not match.

    References:
        Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach
        <https://arxiv.org/abs/2210.05177>`_, 2022

    .. note:: State: one boolean a weight, and a counter. The authors' code starts with an empty
        mask, makes the first after one step, and adds that step's descent gradient to the first
        example's before squaring, since it is not cleared: here scores are clean.
    """
    check_scalar("sparsity", sparsity, minimum=0.0, maximum=1.0)
    check_count("update_every", update_every)

    def init_fn(params: optax.Params) -> FisherMaskState:
        none = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=bool), float_part(params))
        return FisherMaskState(jnp.zeros([], jnp.int32), none)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        fisher_scores_fn: Callable[[optax.Params], optax.Params] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FisherMaskState]:
        del extra_args
        if params is None or fisher_scores_fn is None:
            missing = "params" if params is None else "fisher_scores_fn"
            raise ValueError(
                f"{missing} is missing: call update(..., params, fisher_scores_fn=lambda params: "
                "bisam_jax.fisher_scores(loss_fn, params, examples))."
            )
        check_same_structure("the mask in the state", state.fisher_mask, updates)

        def renewed() -> optax.Params:
            scores = float_part(fisher_scores_fn(params))
            check_same_structure("what fisher_scores_fn returned", scores, updates)
            new = top_k_mask(scores, _rounded(int, jnp.floor, size_of(scores), 1 - sparsity))
            # A choice, so that the result varies over devices where the mask in the state does.
            return jax.tree.map(functools.partial(jnp.where, due), new, state.fisher_mask)

        due = state.fisher_count % update_every == 0
        mask = jax.lax.cond(due, renewed, lambda: state.fisher_mask)
        count = jnp.asarray(optax.safe_increment(state.fisher_count))
        return _masked(updates, mask), FisherMaskState(count, mask)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
        A transformation to chain after a ball; its ``update`` needs the parameters. The scores
        are the magnitude of the perturbed weights for dropping, and that of the gradient for
        growing. The extra args ``drop_scores`` and ``growth_scores``, trees of non-negative
        numbers in the parameters' shapes, replace them: random ones, say.

    Raises:
        TypeError, ValueError: if ``sparsity`` or ``drop_rate`` is not in [0, 1], or
            ``update_every`` no positive integer; in ``update``, for missing parameters, or scores
            or a mask that do not match.

    References:
        Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach
        <https://arxiv.org/abs/2210.05177>`_, 2022

    .. note:: State: one boolean a weight, and a counter. The counts are the authors': with
        :math:`n` weights, sparsity :math:`s` and :math:`d` to drop, :math:`\lfloor n(1-s) - d
        \rfloor` stay and :math:`\lfloor d \rfloor` grow, so that the mask can lose one weight to
        rounding.
    """
    check_scalar("sparsity", sparsity, minimum=0.0, maximum=1.0)
    if not callable(drop_rate):
        check_scalar("drop_rate", drop_rate, minimum=0.0, maximum=1.0)
    check_count("update_every", update_every)

    def init_fn(params: optax.Params) -> DynamicMaskState:
        params = float_part(params)
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(as_key(key), max(len(leaves), 1))
        # Added to zeros, to lie where the parameters do.
        draws = [
            jnp.zeros_like(p, dtype=jnp.float32) + jax.random.uniform(k, p.shape, jnp.float32)
            for k, p in zip(keys, leaves, strict=False)
        ]
        scores = structure.unflatten(draws)
        n = size_of(scores)
        mask = top_k_mask(scores, n - _rounded(math.ceil, jnp.ceil, n, sparsity))
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
        eps = _masked(updates, mask)
        drop = jax.tree.map(jnp.add, params, eps) if drop_scores is None else drop_scores
        growth = updates if growth_scores is None else growth_scores
        check_same_structure("drop_scores", drop, updates)
        check_same_structure("growth_scores", growth, updates)
        rate = drop_rate(state.dynamic_count) if callable(drop_rate) else drop_rate

        def moved() -> optax.Params:
            n = size_of(mask)
            dtype = jnp.result_type(float)
            alive = n - n * sparsity
            dropped = jnp.minimum(alive * jnp.asarray(rate, dtype), n * sparsity)
            stay = jnp.floor(alive - dropped).astype(jnp.int32)
            grow = jnp.floor(dropped).astype(jnp.int32)
            staying = top_k_mask(_where(mask, drop), stay)
            absent = jax.tree.map(jnp.logical_not, mask)
            growing = top_k_mask(_where(absent, growth), grow)
            return jax.tree.map(jnp.logical_or, staying, growing)

        due = state.dynamic_count % update_every == 0
        new_mask = jax.lax.cond(due, moved, lambda: mask)
        count = jnp.asarray(optax.safe_increment(state.dynamic_count))
        return eps, DynamicMaskState(count, new_mask)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def sparse_sam_fisher(
    rho: optax.ScalarOrSchedule = 0.05, sparsity: float = 0.5, update_every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Sparse SAM with a Fisher mask: :func:`fisher_mask` after an :func:`l2_ball`.

    Args:
        rho: radius of the ball before masking: a scalar, possibly traced, or a schedule.
        sparsity: share of the weights that are not perturbed; with 0, this is SAM.
        update_every: number of steps between masks.

    Returns:
        The transformation, as :func:`sharpness_aware`; its ``update`` needs ``fisher_scores_fn``.

    References:
        Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach
        <https://arxiv.org/abs/2210.05177>`_, 2022

    .. note:: Two gradients a step, and the scores' when the mask is made; state: one boolean a
        weight, and a counter. Agrees to 1e-8 in float64 with the authors' code, which adds 1e-7 to
        the norm, when given its scores.
    """
    return sharpness_aware(optax.chain(l2_ball(rho), fisher_mask(sparsity, update_every)))


def sparse_sam_dynamic(
    rho: optax.ScalarOrSchedule = 0.05,
    sparsity: float = 0.5,
    drop_rate: optax.ScalarOrSchedule = 0.5,
    update_every: int = 1,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Sparse SAM with a moving mask: :func:`dynamic_mask` after an :func:`l2_ball`.

    Args:
        rho: radius of the ball before masking: a scalar, possibly traced, or a schedule.
        sparsity: share of the weights that are not perturbed; with 0, this is SAM.
        drop_rate: share of the mask that moves each time.
        update_every: number of steps between moves.
        key: random key, or a seed for one, for the first mask.

    Returns:
        The transformation, as :func:`sharpness_aware`.

    References:
        Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach
        <https://arxiv.org/abs/2210.05177>`_, 2022

    .. note:: Two gradients a step; state: one boolean a weight, and a counter. Agrees to 1e-8 in
        float64 with the authors' code, which adds 1e-7 to the norm.
    """
    mask = dynamic_mask(sparsity, drop_rate, update_every, key)
    return sharpness_aware(optax.chain(l2_ball(rho), mask))


def _masked(updates: optax.Updates, mask: optax.Params) -> optax.Updates:
    return jax.tree.map(lambda m, u: jnp.where(m, u, 0), mask, updates)


def _where(mask: optax.Params, scores: optax.Params) -> optax.Params:
    """The scores where `mask` holds, zero elsewhere; a score of zero still comes before those."""
    smallest = float(jnp.finfo(jnp.float32).tiny)
    return jax.tree.map(
        lambda m, s: jnp.where(m, jnp.maximum(jnp.abs(s), smallest), 0), mask, scores
    )


def _rounded(concrete: Any, traced: Any, n: int, share: Any) -> Any:
    """`n * share` as an integer: a Python one, in double precision, where it can be."""
    if isinstance(share, (int, float)):
        return concrete(n * share)
    return traced(n * jnp.asarray(share, jnp.result_type(float))).astype(jnp.int32)
