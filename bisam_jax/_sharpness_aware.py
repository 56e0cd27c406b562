"""The two-gradient step: ascend one loss, descend another at the point reached."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from bisam_jax._boundary import TwoLosses, from_rule, gives_q, perturbed_gradient
from bisam_jax._checks import MissingArgumentError, check_transformation
from bisam_jax.perturbations import adaptive_l2_ball, l2_ball


class SharpnessAwareState(NamedTuple):
    """State of :func:`sharpness_aware`.

    Attributes:
        perturbation_state: state of the perturbation; empty for a ball of constant radius.
    """

    perturbation_state: optax.OptState


def sharpness_aware(
    perturbation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns the gradient of one loss at the point where another loss is largest.

    With :math:`w` the parameters, :math:`L` the loss to descend (``loss_fn``), :math:`Q` the loss
    to ascend (``perturbation_loss_fn``) and :math:`P` the ``perturbation``, the updates are

    .. math:: \nabla L(w + \epsilon), \qquad \epsilon = P(\nabla Q(w)).

    They are a gradient for the base optimizer that follows in the chain. Averaging over devices,
    clipping, weight decay and momentum also come after it. Without :math:`Q`, :math:`L` is
    ascended.

    ``update(grads, state, params, *, ...)`` takes the arguments that every method takes:

    * ``grads``: the gradient of :math:`L` at ``params`` on this batch, as everywhere in optax, or
      None if it has not been computed. Pass nothing else here.
    * ``loss_fn``, which maps parameters to the scalar :math:`L` on this batch; or instead
      ``grad_fn``, which maps parameters to the gradient of :math:`L`.
    * ``perturbation_loss_fn``, which maps parameters to the scalar :math:`Q` on this batch; or
      instead ``perturbation_grads``, the gradient of :math:`Q` at ``params``, already computed.
      ``perturbation_grads`` can be any other direction of ascent, such as minus the momentum.
    * any other argument, which is passed on to the perturbation.

    The functions must be pure. In ``loss_fn``, drop the batch statistics of the perturbed pass, and
    take random numbers (dropout) from a key that it closes over, the same key as in the clean pass.

    Args:
        perturbation: maps the ascent gradient to :math:`\epsilon`; see
            :mod:`bisam_jax.perturbations`. It sees only the floating leaves (None in place of other
            leaves), in float32 or wider.

    Returns:
        A transformation whose updates are the descent gradient, in the dtypes of the parameters.
        ``loss_fn`` gets parameters in float32 or wider: in bfloat16, most of a small
        :math:`\epsilon` would be rounded away. Leaves that are not floating are not perturbed, and
        keep their entry of ``grads`` (zero if ``grads`` is None).

    Raises:
        ValueError: in ``update``, at trace time: if ``params`` is missing; if neither or both of
            ``loss_fn`` and ``grad_fn`` are given, or both forms of :math:`Q`; if gradients do not
            match the parameters; inside :func:`optax.masked`.
        TypeError: if ``perturbation`` is not a transformation, a loss is not a real scalar, or a
            parameter is complex.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> tx = optax.chain(sharpness_aware(l2_ball(rho=0.5)), optax.sgd(0.1))
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(None, tx.init(w), w, loss_fn=lambda w: jnp.sum(w**2))
        >>> print(updates)
        [-0.66 -0.88]

    References:
        Xie et al., `Improving SAM Requires Rethinking its Optimization Formulation
        <https://arxiv.org/abs/2407.12993>`_, 2024

        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, 2021

    .. note:: Two gradients per step; you compute one of them if you pass ``grads`` or
        ``perturbation_grads``. No state except that of ``perturbation``. No copy of the parameters
        between steps, one copy during a step. It must come first in the chain: anything before it
        would change ``grads``. ``optax.MultiSteps`` around it drops the descent gradients of all
        mini-batches except the last; for accumulation, use :func:`bisam_jax.value_and_grad`.
    """
    check_transformation("perturbation", perturbation)
    perturbation = optax.with_extra_args_support(perturbation)

    def init_fn(params: optax.Params) -> SharpnessAwareState:
        return SharpnessAwareState(perturbation.init(params))

    def rule(
        losses: TwoLosses, state: Any, params: optax.Params, /, **extra_args: Any
    ) -> tuple[optax.Updates, SharpnessAwareState]:
        gradient, _, new_state = perturbed_gradient(
            losses, perturbation, state.perturbation_state, params, **extra_args
        )
        return gradient, SharpnessAwareState(new_state)

    return from_rule(init_fn, rule)


def bisam(rho: optax.ScalarOrSchedule = 0.05) -> optax.GradientTransformationExtraArgs:
    r"""Bilevel SAM: ascends a lower bound of the 0-1 loss, and descends the training loss there.

    This is :func:`sharpness_aware` with an :func:`l2_ball` of radius ``rho``. It requires
    :math:`Q`: pass ``perturbation_loss_fn``, the mean of :func:`bisam_jax.perturbation_loss` over
    the batch, or its gradient as ``perturbation_grads``.

    Args:
        rho: radius of the ball: a scalar, possibly traced, or a schedule. The paper's values are
            0.05 for CIFAR-10 and 0.1 for CIFAR-100.

    Returns:
        A transformation, called as described in :func:`sharpness_aware`.

    Raises:
        ValueError: as :func:`sharpness_aware`; also in ``update`` without :math:`Q`, since that
            would be :func:`sam`.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> from bisam_jax import perturbation_loss
        >>> x, y = jnp.array([[1.0, 2.0], [3.0, -1.0]]), jnp.array([0, 1])
        >>> def loss_fn(w):
        ...     return optax.losses.softmax_cross_entropy_with_integer_labels(x @ w, y).mean()
        >>> def perturbation_loss_fn(w):
        ...     return perturbation_loss(x @ w, y).mean()
        >>> tx = optax.chain(bisam(rho=0.05), optax.sgd(0.1))
        >>> w = jnp.zeros((2, 3))
        >>> updates, state = tx.update(
        ...     None, tx.init(w), w, loss_fn=loss_fn, perturbation_loss_fn=perturbation_loss_fn)
        >>> print(updates)
        [[-0.0179  0.0881 -0.0702]
         [ 0.0856 -0.0689 -0.0168]]

    References:
        Xie et al., `Improving SAM Requires Rethinking its Optimization Formulation
        <https://arxiv.org/abs/2407.12993>`_, 2024

    .. note:: Two gradients per step, no state. Agrees to 1e-9 in float64 with the authors' code.
    """
    step = sharpness_aware(l2_ball(rho))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        if not gives_q(extra_args):
            raise MissingArgumentError(
                "bisam needs a perturbation loss to ascend, and got none",
                "pass perturbation_loss_fn to update, or perturbation_grads; to ascend the "
                "training loss itself, use sam",
                "pass perturbation_loss_fn to value_and_grad; to ascend the training loss itself, "
                "use sam",
            )
        return step.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(step.init, update_fn)


def sam(rho: optax.ScalarOrSchedule = 0.05) -> optax.GradientTransformationExtraArgs:
    """Sharpness-Aware Minimization: ascends and descends the training loss.

    This is :func:`sharpness_aware` with an :func:`l2_ball` of radius ``rho``. With a perturbation
    loss, it ascends that loss, as every method does, and equals :func:`bisam`.

    Args:
        rho: radius of the ball: a scalar, possibly traced, or a schedule.

    Returns:
        A transformation, called as described in :func:`sharpness_aware`.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> tx = sam(rho=0.5)
        >>> w = jnp.array([3.0, 4.0])
        >>> grads, state = tx.update(None, tx.init(w), w, loss_fn=lambda w: jnp.sum(w**2))
        >>> print(grads)
        [6.6 8.8]

    References:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, 2021

    .. note:: Two gradients per step, no state. Agrees to 1e-9 in float64 with the BiSAM authors'
        SAM.
    """
    return sharpness_aware(l2_ball(rho))


def asam(
    rho: optax.ScalarOrSchedule = 0.5,
    eta: jax.typing.ArrayLike = 0.01,
    where: optax.Params | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adaptive SAM: perturbs each weight in proportion to its size.

    This is :func:`sharpness_aware` with an :func:`adaptive_l2_ball`. With a perturbation loss, it
    is adaptive BiSAM.

    Args:
        rho: radius relative to the weights' sizes: a scalar, possibly traced, or a schedule.
        eta: added to each weight's size; a scalar >= 0, possibly traced.
        where: leaves that are scaled, see :func:`adaptive_l2_ball`; all by default.

    Returns:
        A transformation, called as described in :func:`sharpness_aware`.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> tx = asam(rho=0.5, eta=0.0)
        >>> w = jnp.array([3.0, 4.0])
        >>> grads, state = tx.update(None, tx.init(w), w, loss_fn=lambda w: jnp.sum(w**2))
        >>> print(grads)
        [ 7.4708 11.4863]

    References:
        Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of
        Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, 2021

    .. note:: Two gradients per step, no state. With ``where`` as in the authors' code (only
        weight arrays), agrees with that code to 1e-9 in float64.
    """
    return sharpness_aware(adaptive_l2_ball(rho, eta, where))
