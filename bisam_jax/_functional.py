"""Functional SAM: perturb the network's Jacobian, not the loss of its outputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bisam_jax._balls import l2_ball_unless
from bisam_jax._boundary import GradFn, LossFn, gives_q, gradient_of
from bisam_jax._checks import MissingArgumentError, check_params
from bisam_jax._sharpness_aware import sharpness_aware


class FrozenLogits(NamedTuple):
    """Gradients of a loss whose slope at the logits is frozen at some parameters.

    Attributes:
        clean_gradient: takes no arguments, returns the plain gradient at those parameters.
        gradient_fn: maps other parameters to the product of their Jacobian and that slope.
    """

    clean_gradient: Callable[[], optax.Updates]
    gradient_fn: GradFn


class LogitsLoss:
    """A loss function that is split at the logits; made by :func:`logits_loss`."""

    def __init__(self, logits_fn: Callable[..., Any], loss: Callable[..., Any]) -> None:
        self.logits_fn, self.loss = logits_fn, loss

    def __call__(self, params: Any, *batch: Any, **named: Any) -> Any:
        """Returns the loss, or (loss, aux) if `logits_fn` returns aux."""
        out = self.logits_fn(params, *batch, **named)
        if isinstance(out, tuple):
            logits, aux = out
            return self.loss(logits, *batch, **named), aux
        return self.loss(out, *batch, **named)

    def logits(self, params: Any, *batch: Any) -> Any:
        """Returns only the logits."""
        out = self.logits_fn(params, *batch)
        return out[0] if isinstance(out, tuple) else out

    def frozen_at(self, params: Any) -> FrozenLogits:
        """Returns :class:`FrozenLogits` for a loss that takes only parameters."""
        logits, pullback = _pullback(self.logits, params)
        slope = gradient_of("loss", self.loss)(logits)

        def gradient_fn(point: Any) -> Any:
            perturbed, pullback = _pullback(self.logits, point)
            # Perturbed parameters are in float32 or wider, so these logits may be wider too.
            return pullback(slope.astype(perturbed.dtype))

        return FrozenLogits(lambda: pullback(slope), gradient_fn)

    def linear_at(self, params: Any) -> "Callable[[Any, Any], jax.Array]":
        """Returns a loss of parameters and a batch, with the gradient of :class:`FrozenLogits`.

        Args:
            params: where the slope of the loss is taken.

        Returns:
            A function that maps parameters and a batch to the inner product of their logits and
            that slope.
        """

        def linear(point: Any, batch: Any) -> jax.Array:
            clean = jax.lax.stop_gradient(self.logits(params, batch))
            slope = jax.grad(lambda logits: self.loss(logits, batch).mean())(clean)
            perturbed = self.logits(point, batch)
            return jnp.sum(slope.astype(perturbed.dtype) * perturbed)

        return linear


def logits_loss(logits_fn: Callable[..., Any], loss: Callable[..., Any]) -> LogitsLoss:
    """Makes a loss function that is split at the logits, for :func:`functional_sam`.

    For every other method it is the plain function ``loss(logits_fn(params))``, so a program can
    switch methods without another loss function.

    Args:
        logits_fn: maps parameters to logits, floating[...]. For :func:`bisam_jax.value_and_grad`,
            it maps parameters and a batch. It may return ``(logits, aux)``.
        loss: maps logits to a scalar. For :func:`bisam_jax.value_and_grad`, it maps logits and a
            batch to a scalar mean, or to one loss per example.

    Returns:
        A function with the arguments of ``logits_fn``. It returns what ``loss`` returns, or a pair
        of that and aux.

    Examples:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> loss_fn = logits_loss(lambda w: x @ w, lambda logits: jnp.mean(logits**2))
        >>> print(loss_fn(jnp.array([1.0, 0.0])))
        5.0
    """
    return LogitsLoss(logits_fn, loss)


def functional_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    perturbation: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Functional SAM: sharpness of the network, not of the loss at its logits.

    With :math:`z(w)` the logits, :math:`L = h(z(w))` and :math:`\epsilon = \rho\, a / \lVert a
    \rVert`, where :math:`a` is the ascent gradient, returns

    .. math:: J_{w + \epsilon}^\top \nabla h(z(w)), \qquad J_w = \partial z / \partial w.

    This is the Jacobian at the perturbed point, applied to the slope of the loss at the clean
    logits. SAM takes both at the perturbed point, so it can also lower the curvature of the loss by
    making the logits larger.

    Args:
        rho: radius of the ball: a scalar, possibly traced, or a schedule.
        perturbation: replaces the ball of radius ``rho``.

    Returns:
        A transformation whose ``update`` takes the arguments listed in :func:`sharpness_aware`,
        except ``grad_fn``. ``loss_fn`` must be made by :func:`logits_loss`, since the loss has to
        be split at the logits.

    Raises:
        TypeError, ValueError: as :func:`sharpness_aware`; also if ``loss_fn`` is not split at the
            logits, or both ``rho`` and ``perturbation`` are given.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> tx = functional_sam(rho=0.5)
        >>> w = jnp.array([3.0, 4.0])
        >>> loss_fn = logits_loss(lambda w: w[0] * w[1], lambda z: 0.5 * z**2)
        >>> grads, state = tx.update(None, tx.init(w), w, loss_fn=loss_fn)
        >>> print(grads)
        [51.6 40.8]

    References:
        Singh et al., `Avoiding spurious sharpness minimization broadens applicability of SAM
        <https://arxiv.org/abs/2502.02407>`_, 2025

    .. note:: Two gradients per step; no state. With a perturbation loss or with ``grads``, one
        more forward pass for the clean logits, unless the compiler merges it with yours.
    """
    step = sharpness_aware(l2_ball_unless(perturbation, rho))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        loss_fn: LossFn | None = None,
        grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        check_params(params)
        frozen_at = getattr(loss_fn, "frozen_at", None)
        if frozen_at is None or grad_fn is not None:
            raise MissingArgumentError(
                "functional_sam needs a loss_fn that is split at the logits, and no grad_fn",
                "pass loss_fn=bisam_jax.logits_loss(logits_fn, loss)",
                "pass bisam_jax.logits_loss(logits_fn, loss) for loss_fn",
            )
        frozen = frozen_at(params)
        if updates is None and not gives_q(extra_args):
            extra_args["perturbation_grads"] = frozen.clean_gradient()
        return step.update(updates, state, params, grad_fn=frozen.gradient_fn, **extra_args)

    return optax.GradientTransformationExtraArgs(step.init, update_fn)


def _pullback(fn: Callable[[Any], Any], params: Any) -> tuple[Any, GradFn]:
    """Returns `fn(params)`, and a function from its cotangent to the gradient."""
    value, pullback = jax.vjp(fn, params)
    return value, lambda cotangent: pullback(cotangent)[0]
