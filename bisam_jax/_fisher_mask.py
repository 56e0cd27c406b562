"""Sparse SAM with a Fisher mask: perturb the weights that the loss is most curved in."""

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
    """The diagonal of the empirical Fisher information: squared gradients, summed over examples.

    Args:
        loss_fn: ``loss_fn(params, example)`` for a batch of one example, the first axis kept.
        params: where the gradients are taken.
        examples: a tree of arrays with the examples along their first axis.
        microbatch_size: how many gradients are held at a time; divides the number of examples.

    Returns:
        A tree of the parameters' structure, in float32 at least; None where a parameter is not
        floating.

    Examples:
        >>> import jax.numpy as jnp
        >>> w, x = jnp.array([3.0, 4.0]), jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> print(fisher_scores(lambda w, x: jnp.mean(jnp.square(x @ w)), w, x))
        [  36. 1024.]

    References:
        Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach
        <https://arxiv.org/abs/2210.05177>`_, 2022

    .. note:: One gradient per example. :func:`bisam_jax.value_and_grad` makes the scores of the
        whole batch on several devices; in a :func:`jax.shard_map` of your own with varying-axis
        checks, JAX sums gradients of replicated parameters before they are squared. Under
        :func:`jax.jit` with a sharded batch, every device computes the scores of all examples.
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
    """Keeps a perturbation on the weights of largest Fisher information, and zeroes it elsewhere.

    Args:
        sparsity: share of the weights, over all leaves together, that are not perturbed.
        update_every: the mask is made anew before perturbation number 0, ``update_every``, and so
            on.

    Returns:
        A transformation to chain after a ball. Its ``update`` needs the parameters and the extra
        arg ``fisher_scores_fn``, from the parameters' floating part (None in place of other leaves)
        to non-negative scores of that structure, such as
        ``lambda params: fisher_scores(loss_fn, params, examples)``; it is evaluated only when the
        mask is made. :func:`bisam_jax.value_and_grad` makes it from a ``loss_fn`` with losses per
        example.

    Raises:
        TypeError, ValueError: if ``sparsity`` is not in [0, 1] or ``update_every`` no positive
            integer; in ``update``, without ``fisher_scores_fn``, or if its result or the mask in
            the state does not match.

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
            raise MissingArgumentError(
                f"{missing} is missing, and fisher_mask looks at single examples",
                "call update(..., params, fisher_scores_fn=lambda params: "
                "bisam_jax.fisher_scores(loss_fn, params, examples))",
                "return one loss per example from loss_fn, not their mean, or pass "
                "fisher_scores_fn to the step",
            )
        check_same_structure("the mask in the state", state.fisher_mask, updates)

        def renewed() -> optax.Params:
            scores = float_part(fisher_scores_fn(params))
            check_same_structure("what fisher_scores_fn returned", scores, updates)
            new = top_k_mask(scores, number_of(math.floor, size_of(scores), 1 - sparsity))
            # A choice, so that the result varies over devices where the mask in the state does.
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
        sparsity: share of the weights that are not perturbed; with 0, this is SAM.
        update_every: number of steps between masks.
        perturbation: replaces the ball of radius ``rho``.

    Returns:
        The transformation, as :func:`sharpness_aware`; its ``update`` needs ``fisher_scores_fn``.

    Raises:
        TypeError, ValueError: as :func:`sharpness_aware` and :func:`fisher_mask`; if both ``rho``
            and ``perturbation`` are given.

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

    .. note:: Two gradients per step, and one per example when the mask is made; state: one boolean
        per weight, and a counter. Agrees to 1e-8 in float64 with the authors' code, which adds
        1e-7 to the norm, when given its scores.
    """
    ball = l2_ball_unless(perturbation, rho)
    return sharpness_aware(optax.chain(ball, fisher_mask(sparsity, update_every)))
