"""Efficient SAM: perturb random weights, and descend on the examples whose loss rises most."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bisam_jax._balls import l2_ball_unless
from bisam_jax._boundary import GradFn, LossFn, gives_q
from bisam_jax._checks import MissingArgumentError, check_params, check_scalar, check_static
from bisam_jax._random_subset import random_subset
from bisam_jax._sharpness_aware import sharpness_aware
from bisam_jax._trees import at_least_float32

ExampleLossesFn = Callable[..., Any]


def efficient_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    beta: jax.typing.ArrayLike = 0.5,
    gamma: float = 0.5,
    key: jax.Array | int = 0,
    *,
    perturbation: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Efficient SAM: a random part of the weights, and the examples whose loss rises most.

    The perturbation is :math:`\epsilon = m \rho\, a / (\beta \lVert a \rVert)` with the ascent
    gradient :math:`a` and a random mask :math:`m` (:func:`random_subset`). From a batch of
    :math:`B` examples, the :math:`\lfloor \gamma B \rfloor` (``gamma``) with the largest rise
    :math:`\ell_i(w + \epsilon) - \ell_i(w)` are chosen. The result is the gradient of their mean
    loss at :math:`w + \epsilon`.

    Args:
        rho: radius of the ball: a scalar, possibly traced, or a schedule.
        beta: probability that a weight is perturbed, a scalar in (0, 1], possibly traced.
        gamma: fraction of the examples to descend on, in (0, 1]. With 1, all are used and no
            choice is made. It sets array shapes, so it cannot be traced.
        key: random key or integer seed for the choice of the weights.
        perturbation: replaces the ball of radius ``rho``, before the random mask.

    Returns:
        A transformation whose ``update`` takes the arguments listed in :func:`sharpness_aware`, and
        these extra args:

        * ``example_losses_fn`` is required. It is a function of parameters and ``indices``, an
          int32 array of examples, or None for the whole batch. It returns the losses of those
          examples, floating[examples]. :math:`L` is their mean, so ``loss_fn`` and ``grad_fn`` can
          be left out.
        * ``example_losses`` is optional: the losses of the whole batch at ``params``. If the clean
          pass has computed them, this saves a forward pass.
        * ``subset`` is optional: see :func:`random_subset`.

        :func:`bisam_jax.value_and_grad` makes the first two from a ``loss_fn`` that returns one
        loss per example.

    Raises:
        TypeError, ValueError: as :func:`sharpness_aware`; also if ``beta`` or ``gamma`` is not in
            (0, 1], ``gamma`` is traced or leaves no example, ``example_losses_fn`` is missing or
            its result does not have one axis, or both ``rho`` and ``perturbation`` are given.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> tx = efficient_sam(rho=0.5, beta=1.0, gamma=0.5)
        >>> w, x = jnp.array([1.0, 1.0]), jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> def example_losses_fn(w, indices):
        ...     return jnp.square((x if indices is None else x[indices]) @ w)
        >>> grads, state = tx.update(None, tx.init(w), w, example_losses_fn=example_losses_fn)
        >>> print(grads)
        [ 0.     11.8806]

    References:
        Du et al., `Efficient Sharpness-aware Minimization for Improved Training of Neural
        Networks <https://arxiv.org/abs/2110.03141>`_, 2022

    .. note:: One gradient, one forward pass, and one gradient on the ``gamma`` fraction of the
        examples per step; shapes are static. State: one key. Agrees to 1e-8 in float64 with the
        authors' code. That code adds 1e-7 to the norm, keeps one example fewer (only those strictly
        above the last one chosen here), and draws whole arrays instead of single weights.
    """
    check_static("gamma", gamma)
    check_scalar("gamma", gamma, minimum=0.0, maximum=1.0, exclusive=True)
    gamma = float(gamma)
    ball = l2_ball_unless(perturbation, rho)
    step = sharpness_aware(optax.chain(ball, random_subset(beta, key)))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        loss_fn: LossFn | None = None,
        grad_fn: GradFn | None = None,
        example_losses_fn: ExampleLossesFn | None = None,
        example_losses: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        check_params(params)
        if loss_fn is not None and grad_fn is not None:
            raise ValueError("loss_fn and grad_fn were both given: remove one of them.")
        if example_losses_fn is None:
            raise MissingArgumentError(
                "example_losses_fn is missing, and efficient_sam needs one loss per example",
                "call update(..., params, example_losses_fn=fn), where fn(params, indices) returns "
                "the losses of these examples, or of all examples if indices is None",
                "return one loss per example from loss_fn, not their mean, or pass "
                "example_losses_fn to the step",
            )

        def losses(point: optax.Params, indices: jax.Array | None = None) -> jax.Array:
            return _checked(example_losses_fn(point, indices))

        def mean_gradient(point: optax.Params, indices: jax.Array | None = None) -> optax.Updates:
            return jax.grad(lambda p: losses(p, indices).mean(), allow_int=True)(point)

        def gradient_of_the_worst(point: optax.Params) -> optax.Updates:
            if gamma == 1:
                return mean_gradient(point)
            before = losses(params) if example_losses is None else _checked(example_losses)
            return mean_gradient(point, _worst(losses(point), before, gamma))

        if updates is None and not gives_q(extra_args):
            # The ascent uses the loss of all examples, not only of those chosen for the descent.
            extra_args["perturbation_grads"] = mean_gradient(params)
        return step.update(updates, state, params, grad_fn=gradient_of_the_worst, **extra_args)

    return optax.GradientTransformationExtraArgs(step.init, update_fn)


def _checked(losses: jax.Array) -> jax.Array:
    if jnp.ndim(losses) != 1 or not jnp.issubdtype(jnp.result_type(losses), jnp.floating):
        raise ValueError(
            "example_losses_fn and example_losses must give one loss per example, a floating array "
            f"of one axis, got {jnp.result_type(losses)}{list(jnp.shape(losses))}."
        )
    return jnp.asarray(losses, at_least_float32(losses.dtype))


def _worst(losses: jax.Array, before: jax.Array, gamma: float) -> jax.Array:
    """Returns the indices of the examples whose loss rises most."""
    if losses.shape != before.shape:
        raise ValueError(
            f"example_losses must have one loss per example of the whole batch, "
            f"float[{losses.size}], got float[{before.size}]."
        )
    rise = losses - before
    # On a mesh with explicit axes, top_k works only along an axis that is not sharded.
    if jax.typeof(rise).sharding.mesh.are_all_axes_explicit:
        rise = jax.sharding.reshard(rise, jax.sharding.PartitionSpec())
    return jax.lax.top_k(rise, _number_chosen(gamma, rise.size))[1]


def _number_chosen(gamma: float, examples: int) -> int:
    # Rounding can turn a product of 7 into 6.999999.
    number = int(examples * gamma + 1e-6)
    if number < 1:
        raise ValueError(
            f"gamma leaves no example to descend on, got gamma={gamma} for {examples} examples: "
            "use a larger gamma."
        )
    return number
