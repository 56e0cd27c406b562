"""The boundary between a call of `update` and the rule of a method.

The user's side has parameters of any structure and dtype, and functions of them. The rule's side
has only the floating leaves, in float32 or wider, and gradients with their structure.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import optax

from bisam_jax._checks import (
    MissingArgumentError,
    check_not_masked,
    check_params,
    check_same_structure,
    check_scalar_loss,
)
from bisam_jax._trees import float_part, for_base_optimizer, merge, perturb

# Any, not optax.Params: a user's function may say `params: dict[str, Array]`.
LossFn = Callable[[Any], Any]
GradFn = Callable[[Any], Any]
Init = Callable[[optax.Params], Any]


class Rule(Protocol):
    """The mathematics of a method: maps the losses to the gradient for the optimizer."""

    def __call__(
        self, losses: "TwoLosses", state: Any, params: optax.Params, /, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        """Returns the descent gradient and the next state."""
        ...


class WithGradient:
    """A loss function whose gradient at the parameters of this step is already known.

    :func:`bisam_jax.value_and_grad` wraps Q in it, since its clean pass has differentiated Q.

    Args:
        fn: maps parameters to the loss.
        gradient: takes no arguments, returns the gradient at the parameters of this step.
    """

    def __init__(self, fn: LossFn, gradient: Callable[[], optax.Updates]) -> None:
        self._fn, self.gradient = fn, gradient

    def __call__(self, params: Any) -> Any:
        """Returns the loss at any parameters."""
        return self._fn(params)


class TwoLosses:
    """The two losses on this batch: L is descended, and Q is ascended.

    Points and gradients have the structure of the parameters' floating part. Nothing is evaluated
    until it is requested.

    Args:
        params: the user's parameters.
        grads: the gradient of L at `params`, or None.
        loss_fn: L, or None if `grad_fn` is given.
        grad_fn: the gradient of L as a function, or None if `loss_fn` is given.
        perturbation_loss_fn: Q, or None.
        perturbation_grads: the gradient of Q at `params`, or None.

    Raises:
        ValueError: if neither or both forms of L are given, or both forms of Q.
    """

    def __init__(
        self,
        params: optax.Params,
        grads: optax.Updates | None,
        loss_fn: LossFn | None,
        grad_fn: GradFn | None,
        perturbation_loss_fn: LossFn | None,
        perturbation_grads: optax.Updates | None,
    ) -> None:
        if (loss_fn is None) == (grad_fn is None):
            got = "neither" if loss_fn is None else "both"
            raise MissingArgumentError(
                "exactly one of loss_fn (params -> scalar) and grad_fn (params -> gradients) is "
                f"needed, got {got}",
                "call update(grads, state, params, loss_fn=...)",
                "tx must pass extra arguments on, as an optax.GradientTransformationExtraArgs does",
            )
        if perturbation_loss_fn is not None and perturbation_grads is not None:
            raise ValueError(
                "at most one of perturbation_loss_fn (params -> scalar) and perturbation_grads "
                "(the gradient of Q at params) can be used, got both: remove one."
            )
        self._params, self._grads = params, grads
        self._loss_fn, self._grad_fn = loss_fn, grad_fn
        self._q, self._grads_of_q = perturbation_loss_fn, perturbation_grads

    def gradient(self, point: optax.Params) -> optax.Updates:
        """Returns the gradient of L at a point."""
        return self._gradient(merge(point, self._params))

    def value_and_gradient(self, point: optax.Params) -> tuple[jax.Array, optax.Updates]:
        """Returns the value of L and its gradient at a point.

        Raises:
            MissingArgumentError: if only the gradient of L was given.
        """
        if self._loss_fn is None:
            raise MissingArgumentError(
                "loss_fn is missing, and the method weights gradients by losses",
                "call update(grads, state, params, loss_fn=...) instead of grad_fn",
                "pass loss_fn",
            )
        value_and_grad = jax.value_and_grad(checked("loss_fn", self._loss_fn), allow_int=True)
        value, gradient = value_and_grad(merge(point, self._params))
        return value, self._checked("the gradient of loss_fn", gradient)

    @functools.cached_property
    def clean_gradient(self) -> optax.Updates:
        """The gradient of L at the parameters: the given one, or one computed here."""
        if self._grads is None:
            return self._gradient(self._params)
        return self._checked("grads", self._grads)

    def ascent_gradient(self) -> optax.Updates:
        """Returns the gradient of the ascended loss at the parameters: of Q, or of L without Q."""
        if self._grads_of_q is not None:
            return self._checked("perturbation_grads", self._grads_of_q)
        if self._q is None:
            return self.clean_gradient
        if isinstance(self._q, WithGradient):
            return self._checked("the gradient of perturbation_loss_fn", self._q.gradient())
        return float_part(gradient_of("perturbation_loss_fn", self._q)(self._params))

    def ascent_gradient_at(self, point: optax.Params) -> optax.Updates:
        """Returns the gradient of the ascended loss at any point.

        Raises:
            MissingArgumentError: if only the gradient of Q at the parameters was given.
        """
        if self._grads_of_q is not None:
            raise MissingArgumentError(
                "perturbation_grads is valid only at params, and the method ascends Q elsewhere",
                "pass perturbation_loss_fn",
                "pass perturbation_loss_fn",
            )
        if self._q is None:
            return self.gradient(point)
        return float_part(gradient_of("perturbation_loss_fn", self._q)(merge(point, self._params)))

    def _gradient(self, params: optax.Params) -> optax.Updates:
        if self._grad_fn is not None:
            return self._checked("the output of grad_fn", self._grad_fn(params))
        assert self._loss_fn is not None
        return float_part(gradient_of("loss_fn", self._loss_fn)(params))

    def _checked(self, name: str, gradient: optax.Updates) -> optax.Updates:
        floats = float_part(self._params)
        gradient = float_part(gradient)
        check_same_structure(name, gradient, floats)
        # The dtype that JAX gives a gradient of these parameters, so that states keep their types.
        return jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, floats)


def from_rule(init: Init, rule: Rule) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation whose `update` takes the arguments that every method takes.

    Args:
        init: maps the parameters' floating part to the state.
        rule: see :class:`Rule`. It gets every extra argument except those for the two losses.
    """

    def init_fn(params: optax.Params) -> Any:
        check_not_masked(params)
        return init(float_part(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        loss_fn: LossFn | None = None,
        grad_fn: GradFn | None = None,
        perturbation_loss_fn: LossFn | None = None,
        perturbation_grads: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        check_params(params)
        if updates is not None:
            check_same_structure("grads", float_part(updates), float_part(params))
        losses = TwoLosses(
            params, updates, loss_fn, grad_fn, perturbation_loss_fn, perturbation_grads
        )
        gradient, state = rule(losses, state, float_part(params), **extra_args)
        return for_base_optimizer(gradient, updates, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def perturbed_gradient(
    losses: TwoLosses,
    perturbation: optax.GradientTransformationExtraArgs,
    state: Any,
    params: optax.Params,
    **extra_args: Any,
) -> tuple[optax.Updates, optax.Updates, Any]:
    """Returns the gradient of L at the perturbed point, the perturbation, and its next state."""
    eps, state = perturbation.update(losses.ascent_gradient(), state, params, **extra_args)
    check_same_structure("the perturbation", eps, params)
    return losses.gradient(perturb(params, eps)), eps, state


def gives_q(extra_args: dict[str, Any]) -> bool:
    """Returns whether Q or its gradient is among the arguments of `update`."""
    names = ("perturbation_loss_fn", "perturbation_grads")
    return any(extra_args.get(name) is not None for name in names)


def gradient_of(name: str, fn: LossFn) -> GradFn:
    """Returns `jax.grad(fn)`; it raises, naming the argument, if `fn` is not a real scalar."""
    return jax.grad(checked(name, fn), allow_int=True)


def checked(name: str, fn: LossFn) -> LossFn:
    """Returns `fn` with a check that its output is a real scalar; the error uses `name`."""
    return lambda params: check_scalar_loss(name, fn(params))
