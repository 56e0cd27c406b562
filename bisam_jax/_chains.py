"""Checks of the place of a method in a chain.

The state shows the order, since a transformation itself is only two functions: `optax.chain` has a
plain tuple of states, and each method of this package has its own type of state.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from bisam_jax._sampa import SampaState


def check_is_first(state: Any) -> None:
    """Raises if a method is not the first in its chain.

    A method expects the gradient of the loss at the parameters. It returns a gradient, so the
    optimizer must come after it.

    Raises:
        ValueError: names the place of the method in the chain.
    """
    if isinstance(state, (tuple, list)) and not hasattr(state, "_fields"):
        for place, part in enumerate(state):
            if place > 0 and has_method(part):
                raise ValueError(
                    f"the sharpness-aware method is number {place + 1} in its chain, and must be "
                    "the first, since it needs the unchanged gradient: use "
                    "optax.chain(bisam(rho), ..., optimizer)."
                )
        for part in state[:1]:
            check_is_first(part)
    elif isinstance(state, dict):
        # optax.named_chain: its order is lost once JAX has sorted the names.
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
    """Raises if `tx` contains more than a method: it then returns updates, not gradients.

    Raises:
        ValueError: names the argument of `value_and_grad` that needs gradients.
    """
    while hasattr(state, "inner_state"):
        state = state.inner_state
    is_chain = isinstance(state, (tuple, list, dict)) and not hasattr(state, "_fields")
    if isinstance(state, SampaState):
        raise ValueError(
            f"{argument} cannot be used with sampa: it needs gradients, but sampa contains the "
            f"base optimizer and returns updates. Leave out {argument}."
        )
    if is_chain:
        raise ValueError(
            f"{argument} needs a tx that is only the method, got a chain: take gradients from "
            "value_and_grad(bisam(rho), ...), and pass them to the update of the rest of the chain "
            "(clipping, the base optimizer)."
        )


def check_not_conditional(state: Any) -> None:
    """Raises if optax may skip steps: it would then return the gradient of L, which is missing.

    Raises:
        ValueError: says to use `when` instead.
    """
    kinds = (
        optax.ConditionallyTransformState,
        optax.ConditionallyMaskState,
        optax.ApplyIfFiniteState,
    )
    if _has(lambda node: isinstance(node, kinds), state):
        raise ValueError(
            "conditionally_transform, conditionally_mask and apply_if_finite of optax return the "
            "gradient of the loss when they skip a step, and a clean pass of perturbation_loss_fn "
            "does not compute it: pass the method itself, and when= to value_and_grad; "
            "apply_if_finite can come after the method in the chain."
        )


def has_method(state: Any) -> bool:
    return _has(lambda node: type(node).__module__.split(".")[0] == __package__, state)


def _has(condition: Callable[[Any], bool], state: Any) -> bool:
    return any(map(condition, jax.tree.leaves(state, is_leaf=condition)))
