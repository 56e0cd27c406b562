"""The two-gradient step: ascend one loss, descend another at the point reached."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from bisam_jax._checks import check_loss, check_transformation
from bisam_jax._trees import (
    check_not_masked,
    check_same_structure,
    float_part,
    for_base_optimizer,
    perturb,
)
from bisam_jax.perturbations import adaptive_l2_ball, l2_ball

LossFn = Callable[[optax.Params], jax.Array]
GradFn = Callable[[optax.Params], optax.Updates]


class SharpnessAwareState(NamedTuple):
    """State of :func:`sharpness_aware`.

    Attributes:
        perturbation_state: state of the perturbation; empty for a ball of constant radius.
    """

    perturbation_state: optax.OptState


def sharpness_aware(
    perturbation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""The gradient of one loss at the point where another is made worst.

    With :math:`w` the parameters, :math:`L` the loss to descend (``loss_fn``), :math:`Q` the loss
    to ascend (``perturbation_loss_fn``) and :math:`P` the ``perturbation``, returns

    .. math:: \nabla L(w + \epsilon), \qquad \epsilon = P(\nabla Q(w)),

    as the updates: a gradient, for the base optimizer that follows in the chain. Averaging over
    devices, clipping, weight decay and momentum come after it too.

    ``update(grads, state, params, *, loss_fn=None, grad_fn=None, perturbation_loss_fn=None,
    **extra_args)`` takes

    * ``loss_fn``, from parameters to the scalar :math:`L` on this batch; or instead of it
      ``grad_fn``, from parameters to the gradient of :math:`L`, for users who differentiate
      themselves. It is called once, at :math:`w + \epsilon`.
    * ``perturbation_loss_fn``, from parameters to the scalar :math:`Q` on this batch, called once,
      at ``params``. ``grads`` is then not used, and may be None. Without it ``grads`` itself is
      ascended: pass the gradient of :math:`L` for SAM, or that of :math:`Q`, from a
      ``jax.value_and_grad`` of your own with ``has_aux=True``, to keep the clean pass's logits and
      batch statistics.
    * any other argument, which is passed on to the perturbation.

    The functions must be pure: batch statistics that the perturbed pass would update are to be
    dropped by ``loss_fn``, and random numbers (dropout) to come from a key it closes over, the
    same as in the clean pass.

    Args:
        perturbation: from the ascent gradient to :math:`\epsilon`; see
            :mod:`bisam_jax.perturbations`. It sees the floating leaves alone (None in place of
            others), in float32 at least.

    Returns:
        A transformation from the ascent gradient to the descent gradient, in the dtypes of the
        parameters. ``loss_fn`` is given parameters in float32 at least: in bfloat16, most of a
        small :math:`\epsilon` would be rounded away. Leaves that are not floating are not
        perturbed, and keep their entry of ``grads`` (zero, if ``grads`` is None).

    Raises:
        ValueError: in ``update``, at trace time: if ``params`` is missing, if neither or both of
            ``loss_fn`` and ``grad_fn`` are given, if gradients do not match the parameters, if it
            stands inside :func:`optax.masked`.
        TypeError: if ``perturbation`` is no transformation, a loss no real scalar, or a parameter
            complex.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> loss_fn = lambda w: jnp.sum(w**2)
        >>> tx = optax.chain(sharpness_aware(l2_ball(rho=0.5)), optax.sgd(0.1))
        >>> w = jnp.array([3.0, 4.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(jax.grad(loss_fn)(w), state, w, loss_fn=loss_fn)
        >>> print(updates)
        [-0.66 -0.88]

    References:
        Xie et al., `Improving SAM Requires Rethinking its Optimization Formulation
        <https://arxiv.org/abs/2407.12993>`_, 2024

        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, 2021

    .. note:: Two gradients a step: the ascent one, and one here. No state of its own, no copy of
        the parameters between steps, one during a step. ``optax.MultiSteps`` around it drops the
        descent gradients of all mini-batches but the last; see :func:`bisam_jax.value_and_grad` for
        accumulation.
    """
    check_transformation("perturbation", perturbation)
    perturbation = optax.with_extra_args_support(perturbation)

    def init_fn(params: optax.Params) -> SharpnessAwareState:
        check_not_masked(params)
        return SharpnessAwareState(perturbation.init(float_part(params)))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        loss_fn: LossFn | None = None,
        grad_fn: GradFn | None = None,
        perturbation_loss_fn: LossFn | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SharpnessAwareState]:
        if params is None:
            raise ValueError("params is missing: call update(grads, state, params, loss_fn=...).")
        check_not_masked(params)
        descent = descent_gradient_fn(loss_fn, grad_fn, params)
        eps, perturbation_state = perturbation.update(
            ascent_gradient(updates, params, perturbation_loss_fn),
            state.perturbation_state,
            float_part(params),
            **extra_args,
        )
        check_same_structure("the perturbation", eps, float_part(params))
        gradient = descent(perturb(params, eps))
        return for_base_optimizer(gradient, updates, params), SharpnessAwareState(
            perturbation_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def bisam(rho: optax.ScalarOrSchedule = 0.05) -> optax.GradientTransformationExtraArgs:
    r"""Bilevel SAM: ascend a lower bound of the 0-1 loss, descend the training loss there.

    :func:`sharpness_aware` in an :func:`l2_ball` of radius ``rho``. What makes it BiSAM is what is
    ascended: pass ``perturbation_loss_fn``, the mean of :func:`bisam_jax.perturbation_loss` over
    the batch, or the gradient of that as ``grads``.

    Args:
        rho: radius of the ball: a scalar, possibly traced, or a schedule. The paper's values are
            0.05 for CIFAR-10 and 0.1 for CIFAR-100.

    Returns:
        The transformation, as :func:`sharpness_aware`.

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
        ...     jnp.zeros_like(w), tx.init(w), w,
        ...     loss_fn=loss_fn, perturbation_loss_fn=perturbation_loss_fn)
        >>> print(updates)
        [[-0.0179  0.0881 -0.0702]
         [ 0.0856 -0.0689 -0.0168]]

    References:
        Xie et al., `Improving SAM Requires Rethinking its Optimization Formulation
        <https://arxiv.org/abs/2407.12993>`_, 2024

    .. note:: Two gradients a step, no state. Agrees to 1e-9 in float64 with the authors' code.
    """
    return sharpness_aware(l2_ball(rho))


def sam(rho: optax.ScalarOrSchedule = 0.05) -> optax.GradientTransformationExtraArgs:
    """Sharpness-Aware Minimization: ascend and descend the training loss.

    :func:`sharpness_aware` in an :func:`l2_ball` of radius ``rho``; pass the clean gradient of the
    training loss as ``grads``, and that loss as ``loss_fn``.

    Args:
        rho: radius of the ball: a scalar, possibly traced, or a schedule.

    Returns:
        The transformation, as :func:`sharpness_aware`.

    References:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, 2021

    .. note:: Two gradients a step, no state. Agrees to 1e-9 in float64 with the BiSAM authors' SAM.
    """
    return sharpness_aware(l2_ball(rho))


def asam(
    rho: optax.ScalarOrSchedule = 0.5,
    eta: jax.typing.ArrayLike = 0.01,
    where: optax.Params | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adaptive SAM: the perturbation of each weight is in proportion to its size.

    :func:`sharpness_aware` in an :func:`adaptive_l2_ball`; with ``perturbation_loss_fn``, adaptive
    BiSAM.

    Args:
        rho: radius relative to the weights' sizes: a scalar, possibly traced, or a schedule.
        eta: added to each weight's size; a scalar >= 0, possibly traced.
        where: which leaves are scaled, see :func:`adaptive_l2_ball`; all by default.

    Returns:
        The transformation, as :func:`sharpness_aware`.

    References:
        Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of
        Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, 2021

    .. note:: Two gradients a step, no state. With ``where`` as in the authors' code (weight arrays
        only), agrees with it to 1e-9 in float64.
    """
    return sharpness_aware(adaptive_l2_ball(rho, eta, where))


def ascent_gradient(
    grads: optax.Updates | None, params: optax.Params, perturbation_loss_fn: LossFn | None
) -> optax.Updates:
    """The floating part of the gradient to ascend."""
    if perturbation_loss_fn is not None:
        grads = gradient_of("perturbation_loss_fn", perturbation_loss_fn)(params)
    ascent = float_part(grads)
    check_same_structure("grads", ascent, float_part(params))
    return ascent


def descent_gradient_fn(
    loss_fn: LossFn | None, grad_fn: GradFn | None, params: optax.Params
) -> GradFn:
    """The gradient of L as a function of the parameters, from whichever of the two was given."""
    if loss_fn is not None and grad_fn is None:
        return gradient_of("loss_fn", loss_fn)
    if loss_fn is not None or grad_fn is None:
        got = "neither" if loss_fn is None else "both"
        raise ValueError(
            "exactly one of loss_fn (params -> scalar) and grad_fn (params -> gradients) is "
            f"needed, got {got}: call update(grads, state, params, loss_fn=...)."
        )
    expected = float_part(params)

    def checked(point: optax.Params) -> optax.Updates:
        gradient = grad_fn(point)
        check_same_structure("what grad_fn returned", float_part(gradient), expected)
        return gradient

    return checked


def gradient_of(name: str, fn: LossFn) -> GradFn:
    """`jax.grad(fn)`, with an error that names the argument if `fn` is not a real scalar."""

    return jax.grad(lambda params: check_loss(name, fn(params)), allow_int=True)


def value_and_gradient_of(
    name: str, fn: LossFn
) -> Callable[[optax.Params], tuple[jax.Array, optax.Updates]]:
    """`jax.value_and_grad(fn)`, with the errors of `gradient_of`."""
    return jax.value_and_grad(lambda params: check_loss(name, fn(params)), allow_int=True)


def clean_gradient(
    grads: optax.Updates, clean_grad_fn: Callable[[], optax.Updates] | None, params: optax.Params
) -> optax.Updates:
    """The gradient of L at the parameters: `grads`, unless a function for it was given."""
    clean = grads if clean_grad_fn is None else clean_grad_fn()
    name = "grads" if clean_grad_fn is None else "what clean_grad_fn returned"
    check_same_structure(name, float_part(clean), float_part(params))
    return clean
