"""The steps that `value_and_grad` is made of: sharp, plain, conditional and grouped."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from optax.microbatching import micro_vmap

from bisam_jax._batches import (
    LAST,
    MEAN,
    Batch,
    BatchLoss,
    BatchLossFn,
    Parts,
    aux_rules,
    in_groups,
)
from bisam_jax._boundary import WithGradient
from bisam_jax._chains import has_method
from bisam_jax._checks import shapes_of
from bisam_jax._devices import OneDevice
from bisam_jax._functional import FrozenLogits, LogitsLoss
from bisam_jax._passes import Clean, Passes
from bisam_jax._trees import fill_with_zeros, float_part, is_floating, merge

When = Callable[[Any], Any]
# Maps params, state and batch to the clean pass's value and parts, the gradient, and the state.
Step = Callable[..., tuple[tuple[jax.Array, Parts], Any, Any]]


_NO_METHOD = (
    "tx made no gradient of perturbation_loss_fn: pass a tx that is or contains a sharpness-aware "
    "method, such as bisam(rho)."
)


def sharp_step(
    tx: optax.GradientTransformationExtraArgs,
    descended: BatchLoss,
    ascended: BatchLoss | None,
    passes: Passes,
) -> Step:
    """Returns a step: the clean pass, then `tx` with every argument that a method may use."""

    def step(params: Any, state: Any, batch: Batch, **extra_args: Any) -> tuple:
        clean = passes.clean(ascended or descended, params, batch)
        mean_loss = passes.mean(descended.mean)
        args: dict[str, Any] = {
            "batch": batch,
            "loss_fn": _LossOnBatch(mean_loss, descended, passes, batch),
            "batch_loss_fn": mean_loss,
            "example_losses_fn": lambda params, indices=None: passes.losses(
                descended, params, batch, indices
            ),
            "fisher_scores_fn": lambda floats: passes.fisher_scores(
                descended, merge(floats, params), batch
            ),
        }
        grads: Any = None
        if ascended is None:
            grads = fill_with_zeros(clean.gradient(), params)
            if clean.parts.losses is not None and "example_losses_fn" not in extra_args:
                args["example_losses"] = passes.devices.joined(clean.parts.losses)
        else:
            args |= _arguments_of_q(passes.mean(ascended.mean), clean, batch)
        try:
            grads, new_state = tx.update(grads, state, params, **args | extra_args)
        except (TypeError, ValueError) as error:
            if ascended is None or has_method(state):
                raise
            raise ValueError(_NO_METHOD) from error
        if grads is None:
            raise ValueError(_NO_METHOD)
        return (clean.value, clean.parts), grads, new_state

    return step


def _arguments_of_q(mean: BatchLossFn, clean: Clean, batch: Batch) -> dict[str, Any]:
    return {
        "perturbation_loss_fn": WithGradient(lambda params: mean(params, batch), clean.gradient),
        "batch_perturbation_loss_fn": mean,
    }


class _LossOnBatch:
    """L on this batch, split at the logits if the user's loss is."""

    def __init__(self, mean: BatchLossFn, loss: BatchLoss, passes: Passes, batch: Batch) -> None:
        self._mean, self._passes, self._batch = mean, passes, batch
        if isinstance(loss.fn, LogitsLoss):
            self._logits_loss = loss.fn
            self.frozen_at = self._frozen_at

    def __call__(self, params: Any) -> jax.Array:
        return self._mean(params, self._batch)

    def _frozen_at(self, params: Any) -> FrozenLogits:
        linear = self._passes.mean(self._logits_loss.linear_at(params))
        return FrozenLogits(
            lambda: jax.grad(self, allow_int=True)(params),
            lambda point: jax.grad(linear, allow_int=True)(point, self._batch),
        )


def plain_step(loss: BatchLoss, passes: Passes) -> Step:
    """Returns a step: the gradient of L at the parameters, with the state unchanged."""

    def step(params: Any, state: Any, batch: Batch) -> tuple:
        clean = passes.clean(loss, params, batch)
        return (clean.value, clean.parts), fill_with_zeros(clean.gradient(), params), state

    return step


def conditional(sharp: Step, plain: Step, when: When) -> Step:
    """Returns a step that runs only one of two steps, and costs only that one."""

    def step(params: Any, state: Any, batch: Batch, **extra_args: Any) -> tuple:
        due = when(extra_args["step"])
        if jnp.shape(due) != () or jnp.result_type(due) != jnp.bool_:
            raise TypeError(f"when must return one boolean, got {shapes_of(due)}.")

        def take_sharp() -> tuple:
            return sharp(params, state, batch, **extra_args)

        def take_plain() -> tuple:
            return plain(params, state, batch)

        if not isinstance(due, Tracer):
            return take_sharp() if due else take_plain()
        branches = [lambda: _of_arrays(take_sharp()), lambda: _of_arrays(take_plain())]
        _check_alike(*(jax.eval_shape(branch)[0] for branch in branches))
        (value, aux), grads, new_state = jax.lax.cond(due, *branches)
        return (value, Parts(None, aux)), fill_with_zeros(grads, params), new_state

    return step


def _check_alike(sharp: Any, plain: Any) -> None:
    """Raises unless value and aux of both steps have the same types."""
    if shapes_of(sharp) != shapes_of(plain):
        raise TypeError(
            "with when, loss_fn and perturbation_loss_fn must return value and aux of the same "
            f"types, got {shapes_of(plain)} and {shapes_of(sharp)}."
        )


def _of_arrays(result: tuple) -> tuple:
    """Returns value, aux, gradient and state. Losses are dropped: one step may not have them."""
    (value, parts), grads, state = result
    return (value, parts.aux), float_part(grads), state


def grouped(
    whole: Step,
    clean_loss: BatchLoss,
    group_size: int,
    microbatch_size: int | None,
    passes: Passes,
) -> Step:
    """Returns a step that makes one whole step per group, and averages over all groups."""
    devices = passes.devices

    def step(params: Any, state: Any, batch: Batch, **extra_args: Any) -> tuple:
        own_params = devices.own(params)
        own_state = jax.tree.map(lambda x: devices.own(x) if _follows_data(x) else x, state)

        def group_step(group: Batch) -> tuple:
            out, grads, new_state = whole(own_params, own_state, group, **extra_args)
            return out, float_part(grads), new_state

        if len(jax.tree.leaves(batch)[0]) == group_size:
            (value, parts), grads, new_state = group_step(batch)
        else:
            rules = aux_rules(clean_loss, params, batch, group_size)
            state_rule = jax.tree.map(lambda x: MEAN if is_floating(x) else LAST, state)
            (value, parts), grads, new_state = micro_vmap(
                group_step,
                microbatch_size=microbatch_size and microbatch_size // group_size,
                accumulator=((MEAN, rules.rules), MEAN, state_rule),
            )(jax.tree.map(lambda x: in_groups(jnp.asarray(x), group_size), batch))
            parts = rules.reshaped(parts)
        parts = passes.merged(clean_loss, params, batch, parts)
        value, grads, floats = devices.mean((value, grads, float_part(new_state)))
        new_state = jax.tree.map(
            lambda x, mean: _joined_state(devices, x, mean),
            new_state,
            floats,
            is_leaf=lambda x: x is None,
        )
        return (value, parts), fill_with_zeros(grads, params), new_state

    return step


def _follows_data(leaf: Any) -> bool:
    """Returns whether a leaf of the state differs between groups; counters and keys do not."""
    return is_floating(leaf) or leaf.dtype == jnp.bool_


def _joined_state(devices: OneDevice, leaf: Any, mean: Any) -> Any:
    if mean is not None:
        return mean.astype(leaf.dtype)
    return devices.last(leaf) if leaf is not None and _follows_data(leaf) else leaf
