"""The order of a chain, told by its state: a transformation itself is only two functions.

`optax.chain` has a plain tuple of states, and the methods of this package have states of their own.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from bisam_jax._sampa import SampaState


def check_is_first(state: Any) -> None:
    """Raises if something comes before a method in its chain.

    A method takes what it gets for the gradient of the loss at the parameters, and what it returns
    is a gradient, which the optimizer must still see.

    Raises:
        ValueError: names the place in the chain.
    """
    if isinstance(state, (tuple, list)) and not hasattr(state, "_fields"):
        for place, part in enumerate(state):
            if place > 0 and has_method(part):
                raise ValueError(
                    f"the sharpness-aware method is number {place + 1} in its chain, and must be "
                    "the first: optax.chain(bisam(rho), ..., optimizer). What comes before it "
                    "would change the gradient that it takes."
                )
        for part in state[:1]:
            check_is_first(part)
    elif isinstance(state, dict):
        # optax.named_chain, whose order is lost where JAX has sorted the names.
        if len(state) > 1 and has_method(state):
            raise ValueError(
                "optax.named_chain does not show whether the sharpness-aware method is the first: "
                "use optax.chain(bisam(rho), ..., optimizer)."
            )
    else:
        inner = getattr(state, "inner_state", None)
        if inner is not None:
            check_is_first(inner)


def check_gives_gradients(state: Any, argument: str) -> None:
    """Raises if more than a method is in `tx`: then it returns updates, not gradients.

    Raises:
        ValueError: names the argument of `value_and_grad` that needs gradients.
    """
    while hasattr(state, "inner_state"):
        state = state.inner_state
    is_chain = isinstance(state, (tuple, list, dict)) and not hasattr(state, "_fields")
    if isinstance(state, SampaState):
        raise ValueError(
            f"{argument} cannot be used with sampa, which contains the base optimizer: it needs "
            "the gradient, not the updates."
        )
    if is_chain:
        raise ValueError(
            f"{argument} needs a tx that is the method only, got a chain: take gradients from "
            "value_and_grad(bisam(rho), ...), and pass them to the rest of the chain (clipping, "
            "the base optimizer) by its own update."
        )


def check_not_conditional(state: Any) -> None:
    """Raises if optax skips steps: it would pass on the gradient of L, which is not there.

    Raises:
        ValueError: names `when`.
    """
    kinds = (
        optax.ConditionallyTransformState,
        optax.ConditionallyMaskState,
        optax.ApplyIfFiniteState,
    )
    if _has(lambda node: isinstance(node, kinds), state):
        raise ValueError(
            "conditionally_transform, conditionally_mask and apply_if_finite of optax hand on the "
            "gradient of the loss where they skip a step, and a clean pass of perturbation_loss_fn "
            "has none: pass the method itself, and when= to value_and_grad; apply_if_finite can "
            "stand after the method in the chain."
        )


def has_method(state: Any) -> bool:
    return _has(lambda node: type(node).__module__.split(".")[0] == __package__, state)


def _has(condition: Callable[[Any], bool], state: Any) -> bool:
    return any(map(condition, jax.tree.leaves(state, is_leaf=condition)))
