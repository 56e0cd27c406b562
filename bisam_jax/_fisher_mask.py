"""Sparse SAM with a Fisher mask: perturb the weights with the largest Fisher information."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.microbatching import micro_grad

from bisam_jax._balls import l2_ball_unless
from bisam_jax._checks import (
    MissingArgumentError,
    check_count,
    check_same_structure,
    check_scalar,
    check_scalar_loss,
)
from bisam_jax._sharpness_aware import sharpness_aware
from bisam_jax._top_k import masked, number_of, size_of, top_k_mask
from bisam_jax._trees import float_part, merge


class FisherMaskState(NamedTuple):
    """State of :func:`fisher_mask`.

    Attributes:
        fisher_count: int32 scalar, the number of perturbations masked so far.
        fisher_mask: which weights are perturbed: booleans in the parameters' shapes.
    """

    fisher_count: jax.Array
    fisher_mask: optax.Params


def fisher_scores(
    loss_fn: Callable[[optax.Params, Any], jax.Array],
    params: optax.Params,
    examples: Any,
    *,
    microbatch_size: int = 1,
) -> optax.Params:
    """Returns the diagonal of the empirical Fisher: squared gradients, summed over examples.

    Args:
        loss_fn: ``loss_fn(params, example)`` returns the scalar loss of a batch of one example; the
            first axis is kept.
        params: where the gradients are taken.
        examples: a tree of arrays with the examples along their first axis.
        microbatch_size: number of gradients in memory at a time. It must divide the number of
            examples.

    Returns:
        A tree with the structure of the parameters, in float32 or wider; None where a parameter is
        not floating.

    Examples:
        >>> import jax.numpy as jnp
        >>> w, x = jnp.array([3.0, 4.0]), jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> print(fisher_scores(lambda w, x: jnp.mean(jnp.square(x @ w)), w, x))
        [  36. 1024.]

    References:
        Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach
        <https://arxiv.org/abs/2210.05177>`_, 2022

    .. note:: One gradient per example. On several devices, :func:`bisam_jax.value_and_grad` makes
        the scores of the whole batch. In your own :func:`jax.shard_map` with varying-axis checks,
        the scores are wrong: JAX sums gradients of replicated parameters before they are squared.
        Under :func:`jax.jit` with a sharded batch, every device computes the scores of all
        examples.
    """

    def loss_of_one(floats: Any, example: Any) -> jax.Array:
        return check_scalar_loss("loss_fn", loss_fn(merge(floats, params), example))

    sum_of_squares, _ = micro_grad(
        loss_of_one,
        microbatch_size=microbatch_size,
        transform_fn=lambda gradient: jax.tree.map(jnp.square, gradient),
    )(float_part(params), examples)
    return sum_of_squares


def fisher_mask(
    sparsity: float = 0.5, update_every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Keeps a perturbation on the weights with the largest Fisher information; elsewhere it is 0.

    Args:
        sparsity: fraction of the weights, over all leaves together, that is not perturbed.
        update_every: number of perturbations from one mask to the next. A new mask is made before
            perturbation 0, ``update_every``, and so on.

    Returns:
        A transformation to chain after a ball. Its ``update`` needs ``params`` and the extra arg
        ``fisher_scores_fn``, such as ``lambda params: fisher_scores(loss_fn, params, examples)``.
        This function maps the parameters' floating part (None in place of other leaves) to
        non-negative scores with that structure. It is evaluated only when a mask is made.
        :func:`bisam_jax.value_and_grad` makes it from a ``loss_fn`` that returns one loss per
        example.

    Raises:
        TypeError, ValueError: if ``sparsity`` is not in [0, 1] or ``update_every`` is not a
            positive integer; in ``update``, if ``params`` or ``fisher_scores_fn`` is missing, or if
            the scores or the mask in the state do not match ``params``.

    Examples:
        >>> import jax.numpy as jnp
        >>> tx = fisher_mask(sparsity=0.5)
        >>> w, eps = jnp.array([3.0, 4.0]), jnp.array([0.3, 0.4])
        >>> eps, state = tx.update(
        ...     eps, tx.init(w), w, fisher_scores_fn=lambda w: jnp.array([36.0, 1024.0]))
        >>> print(eps)
        [0.  0.4]

    References:
        Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach
        <https://arxiv.org/abs/2210.05177>`_, 2022

    .. note:: State: one boolean per weight, and a counter. The authors' code starts with an empty
        mask, and makes the first mask after one step. It does not clear the descent gradient of
        that step, so this gradient is added to the first example's before squaring. Here, the
        scores come only from the examples.
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
            raise MissingArgumentError(
                f"{missing} is missing, and fisher_mask needs it to score the weights",
                "call update(..., params, fisher_scores_fn=lambda params: "
                "bisam_jax.fisher_scores(loss_fn, params, examples))",
                "return one loss per example from loss_fn, not their mean, or pass "
                "fisher_scores_fn to the step",
            )
        check_same_structure("the mask in the state", state.fisher_mask, updates)

        def renewed() -> optax.Params:
            scores = float_part(fisher_scores_fn(params))
            check_same_structure("the output of fisher_scores_fn", scores, updates)
            new = top_k_mask(scores, number_of(math.floor, size_of(scores), 1 - sparsity))
            # jnp.where makes the result vary over devices where the mask in the state does.
            return jax.tree.map(functools.partial(jnp.where, due), new, state.fisher_mask)

        due = state.fisher_count % update_every == 0
        mask = jax.lax.cond(due, renewed, lambda: state.fisher_mask)
        count = jnp.asarray(optax.safe_increment(state.fisher_count))
        return masked(updates, mask), FisherMaskState(count, mask)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def sparse_sam_fisher(
    rho: optax.ScalarOrSchedule = 0.05,
    sparsity: float = 0.5,
    update_every: int = 1,
    *,
    perturbation: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Sparse SAM with a Fisher mask: :func:`fisher_mask` after an :func:`l2_ball`.

    Args:
        rho: radius of the ball before masking: a scalar, possibly traced, or a schedule.
        sparsity: fraction of the weights that is not perturbed; with 0, this is SAM.
        update_every: number of steps from one mask to the next.
        perturbation: replaces the ball of radius ``rho``.

    Returns:
        A transformation, called as described in :func:`sharpness_aware`. Its ``update`` also
        needs ``fisher_scores_fn``; see :func:`fisher_mask`.

    Raises:
        TypeError, ValueError: as :func:`sharpness_aware` and :func:`fisher_mask`; also if both
            ``rho`` and ``perturbation`` are given.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> tx = sparse_sam_fisher(rho=0.5, sparsity=0.5)
        >>> w, x = jnp.array([3.0, 4.0]), jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> loss_fn = lambda w, x: jnp.mean(jnp.square(x @ w))
        >>> grads, state = tx.update(
        ...     None, tx.init(w), w, loss_fn=lambda w: loss_fn(w, x),
        ...     fisher_scores_fn=lambda w: fisher_scores(loss_fn, w, x))
        >>> print(grads)
        [ 3.     17.9657]

    References:
        Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach
        <https://arxiv.org/abs/2210.05177>`_, 2022

    .. note:: Two gradients per step, and one per example when a mask is made; state: one boolean
        per weight, and a counter. Given the scores of the authors' code, agrees with that code to
        1e-8 in float64; the authors add 1e-7 to the norm.
    """
    ball = l2_ball_unless(perturbation, rho)
    return sharpness_aware(optax.chain(ball, fisher_mask(sparsity, update_every)))
