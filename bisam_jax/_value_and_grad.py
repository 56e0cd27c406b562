"""`value_and_grad`, which makes a step on a batch from any method and two loss functions."""

from typing import Any, Literal, Protocol, overload

import jax
import optax

from bisam_jax._batches import Batch, BatchLoss, BatchLossFn, check_not_explicit, check_splits
from bisam_jax._chains import check_gives_gradients, check_is_first, check_not_conditional
from bisam_jax._checks import MissingArgumentError, check_transformation
from bisam_jax._devices import OneDevice, OneOfMany, check_axis
from bisam_jax._passes import Passes
from bisam_jax._steps import When, conditional, grouped, plain_step, sharp_step


class Step(Protocol):
    """A step that returns the loss, the gradient and the state."""

    def __call__(
        self,
        params: Any,
        state: optax.OptState,
        batch: Any,
        *,
        step: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[jax.Array, Any, Any]:
        """See :func:`value_and_grad`."""
        ...


class StepWithAux(Protocol):
    """A step that returns the loss with aux, the gradient and the state."""

    def __call__(
        self,
        params: Any,
        state: optax.OptState,
        batch: Any,
        *,
        step: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[tuple[jax.Array, Any], Any, Any]:
        """See :func:`value_and_grad`."""
        ...


@overload
def value_and_grad(
    tx: optax.GradientTransformation,
    loss_fn: BatchLossFn,
    perturbation_loss_fn: BatchLossFn | None = None,
    *,
    has_aux: Literal[False] = False,
    when: When | None = None,
    group_size: int | None = None,
    microbatch_size: int | None = None,
    axis_name: str | None = None,
) -> Step: ...


@overload
def value_and_grad(
    tx: optax.GradientTransformation,
    loss_fn: BatchLossFn,
    perturbation_loss_fn: BatchLossFn | None = None,
    *,
    has_aux: Literal[True],
    when: When | None = None,
    group_size: int | None = None,
    microbatch_size: int | None = None,
    axis_name: str | None = None,
) -> StepWithAux: ...


def value_and_grad(
    tx: optax.GradientTransformation,
    loss_fn: BatchLossFn,
    perturbation_loss_fn: BatchLossFn | None = None,
    *,
    has_aux: bool = False,
    when: When | None = None,
    group_size: int | None = None,
    microbatch_size: int | None = None,
    axis_name: str | None = None,
) -> Step | StepWithAux:
    r"""A sharpness-aware counterpart of :func:`jax.value_and_grad`, for every method.

    ``step = value_and_grad(tx, loss_fn, perturbation_loss_fn)`` makes one step of ``tx`` a function
    of parameters, state and batch. ``step(params, state, batch)`` first makes the clean pass, which
    differentiates the perturbation loss at ``params`` (or the loss, without a perturbation loss).
    Then ``tx`` makes its passes at other points. The step returns ``(value, grads, state)``, or
    ``((value, aux), grads, state)`` with ``has_aux``: value and aux of the clean pass, the gradient
    for any optimizer, and the next state of ``tx``.

    Args:
        tx: any method, such as :func:`bisam`; ``state`` starts as ``tx.init(params)``. The method
            must come first in a chain. If ``tx`` includes the base optimizer (later in the chain,
            or in :func:`sampa`), the second output is the updates.
        loss_fn: the loss to descend. ``loss_fn(params, batch)`` returns one loss per example,
            floating[batch], or their mean, a scalar. Every method works with losses per example.
            With a scalar, methods that use single examples raise.
        perturbation_loss_fn: the loss to ascend, in the same form; ``loss_fn`` by default.
        has_aux: whether the functions return ``(loss, aux)``. If there is a perturbation loss and
            no ``when``, ``loss_fn`` may return only the loss.
        when: ``when(step)`` says whether to take the step of ``tx`` (for a late start, or every
            k-th step). If not, the step returns the gradient of the loss at ``params``, the value
            and aux of that pass, and the state unchanged, at the cost of one gradient. With
            ``when``, call the step with ``step=``, an integer.
        group_size: m of m-sharpness. Each group of ``group_size`` consecutive examples has its own
            perturbation, and the descent gradients are averaged. All groups are computed at once,
            each with its own perturbed parameters; ``microbatch_size`` limits this. Floating leaves
            of the state are averaged over the groups; other leaves come from the last group.
        microbatch_size: number of examples in memory at a time. The step is that of the whole
            batch: one perturbation from the mean ascent gradient, then the mean gradient there.
            With ``group_size``, it must be a multiple of ``group_size``, and ``microbatch_size //
            group_size`` groups are computed at a time.
        axis_name: the axis over which the batch is split, inside :func:`jax.pmap` or
            :func:`jax.shard_map`. Value, gradient and state are then those of one device with the
            whole batch. Both sizes count the examples of one device. With ``group_size``, groups
            stay on their devices, and the devices exchange no more than in a plain step.

    Returns:
        A pure function ``step(params, state, batch, *, step=None, **extra_args)``. ``batch`` is any
        tree of arrays with the examples along their first axis. The step makes everything that a
        method needs from the losses; ``example_losses_fn`` or ``fisher_scores_fn`` in
        ``extra_args`` replace what it makes. Leaves of aux with a leading axis of examples keep the
        order of the examples. With groups, microbatches or devices, other leaves of aux must be
        floating, and are averaged. On several devices, each device returns its own examples.

    Raises:
        ValueError: if ``axis_name`` is not a mapped axis; if a size is not a positive integer, or
            does not divide the batch (or the other size); if an array of a batch that is split has
            no axis of examples; if an argument that ``tx`` needs is missing; if a method is not the
            first in its chain; if ``tx`` contains the base optimizer and ``group_size`` or ``when``
            is given; if optax may skip steps of ``tx`` and there is a perturbation loss; if
            ``step`` is missing with ``when``.
        TypeError: if ``tx`` is not a transformation, a loss function does not return what it
            should, or a leaf of aux can be neither joined nor averaged.

    Examples:
        >>> import jax.numpy as jnp
        >>> from bisam_jax import bisam, perturbation_loss
        >>> def loss_fn(w, batch):
        ...     return optax.losses.softmax_cross_entropy_with_integer_labels(
        ...         batch["x"] @ w, batch["y"])
        >>> def perturbation_loss_fn(w, batch):
        ...     return perturbation_loss(batch["x"] @ w, batch["y"])
        >>> tx = bisam(rho=0.05)
        >>> step = value_and_grad(tx, loss_fn, perturbation_loss_fn)
        >>> w = jnp.zeros((2, 3))
        >>> batch = {"x": jnp.array([[1.0, 2.0], [2.0, -1.0]]), "y": jnp.array([0, 1])}
        >>> value, grads, state = step(w, tx.init(w), batch)
        >>> print(value, grads.shape)
        1.0986123 (2, 3)

    References:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, 2021, for m-sharpness

    .. note:: m is part of the algorithm, not of the hardware: the same batch gives the same numbers
        on any number of devices. Batch normalisation, however, sees one group or microbatch at a
        time. For a method that does not differentiate at ``params`` (:func:`sampa`,
        :func:`tilted_sam`), value and aux cost one forward pass, or nothing under :func:`jax.jit`
        if they are not used.
    """
    check_transformation("tx", tx)
    _check_options(when, group_size, microbatch_size, axis_name)
    is_clean = perturbation_loss_fn is None or when is not None
    descended = BatchLoss("loss_fn", loss_fn, has_aux, is_clean)
    ascended = None
    if perturbation_loss_fn is not None:
        ascended = BatchLoss("perturbation_loss_fn", perturbation_loss_fn, has_aux)
    devices = OneDevice() if axis_name is None else OneOfMany(axis_name)
    passes = Passes(devices, microbatch_size)
    tx = optax.with_extra_args_support(tx)
    if group_size is None:
        sharp = sharp_step(tx, descended, ascended, passes)
    else:
        whole = sharp_step(tx, descended, ascended, Passes(OneDevice(), None))
        sharp = grouped(whole, ascended or descended, group_size, microbatch_size, passes)
    if when is not None:
        sharp = conditional(sharp, plain_step(descended, passes), when)

    def step_fn(
        params: Any, state: Any, batch: Batch, *, step: Any = None, **extra_args: Any
    ) -> tuple:
        _check_call(extra_args, when, step, group_size)
        _check_state(state, ascended is not None, when, group_size)
        _check_batch(batch, group_size, microbatch_size, axis_name)
        if step is not None:
            extra_args["step"] = step
        try:
            (value, parts), grads, state = sharp(params, state, batch, **extra_args)
        except MissingArgumentError as error:
            raise ValueError(error.for_value_and_grad) from None
        return ((value, parts.aux) if has_aux else value), grads, state

    return step_fn


def _check_options(
    when: Any, group_size: int | None, microbatch_size: int | None, axis_name: Any
) -> None:
    if when is not None and not callable(when):
        raise TypeError(f"when must be a function of the step, got {when!r}.")
    if axis_name is not None and not isinstance(axis_name, str):
        raise TypeError(f"axis_name must be the name of one mapped axis, got {axis_name!r}.")
    for name, size in (("group_size", group_size), ("microbatch_size", microbatch_size)):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"{name} must be a positive integer or None, got {size!r}.")
    if group_size and microbatch_size and microbatch_size % group_size:
        raise ValueError(
            f"microbatch_size must be a multiple of group_size, got {microbatch_size} and "
            f"{group_size}: a group's perturbation needs all of its examples at once."
        )


def _check_state(state: Any, has_q: bool, when: Any, group_size: int | None) -> None:
    check_is_first(state)
    if has_q:
        check_not_conditional(state)
    for name, option in (("group_size", group_size), ("when", when)):
        if option is not None:
            check_gives_gradients(state, name)


def _check_batch(
    batch: Batch, group_size: int | None, microbatch_size: int | None, axis_name: str | None
) -> None:
    if axis_name is not None:
        check_axis(axis_name)
    if group_size is not None or microbatch_size is not None:
        check_splits(batch, group_size=group_size, microbatch_size=microbatch_size)
    if microbatch_size is not None and group_size is None:
        check_not_explicit(batch)


def _check_call(extra_args: dict[str, Any], when: Any, step: Any, group_size: int | None) -> None:
    if when is not None and step is None:
        raise ValueError("step is missing: with when, call step(..., step=step).")
    if group_size is not None and "example_losses_fn" in extra_args:
        raise ValueError(
            "example_losses_fn cannot be passed with group_size, since it does not know its group: "
            "leave out one of them."
        )
    own = ("loss_fn", "grad_fn", "perturbation_loss_fn", "perturbation_grads", "batch_loss_fn")
    for name in (*own, "batch_perturbation_loss_fn"):
        if name in extra_args:
            raise ValueError(
                f"{name} cannot be passed to the step, which already has its losses: pass them to "
                "value_and_grad(tx, loss_fn, perturbation_loss_fn)."
            )
