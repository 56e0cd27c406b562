"""The sharpness-aware step from loss functions of a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.microbatching import AccumulationType, Accumulator, micro_vmap, microbatch

from bisam_jax._checks import check_loss, check_transformation
from bisam_jax._trees import as_cotangent, fill_with_zeros, float_part, is_floating

Batch = Any
BatchLossFn = Callable[[optax.Params, Batch], Any]
CleanFn = Callable[[optax.Params, Batch], tuple[jax.Array, Any]]
Step = Callable[..., tuple[Any, optax.Updates, optax.OptState]]


def value_and_grad(
    tx: optax.GradientTransformation,
    loss_fn: BatchLossFn,
    perturbation_loss_fn: BatchLossFn | None = None,
    *,
    has_aux: bool = False,
    group_size: int | None = None,
    microbatch_size: int | None = None,
) -> Step:
    r"""A sharpness-aware counterpart of :func:`jax.value_and_grad`.

    ``value_and_grad(tx, loss_fn, perturbation_loss_fn)(params, state, batch, **extra_args)`` makes
    one clean pass, which differentiates ``perturbation_loss_fn`` (or ``loss_fn``, if that is None)
    at ``params``, and one perturbed pass, which differentiates ``loss_fn`` where ``tx`` puts it. It
    returns ``(value, grads, state)``, or ``((value, aux), grads, state)`` with ``has_aux``: value
    and aux of the clean pass, the gradient for any optimizer, and the next state of ``tx``.

    Args:
        tx: :func:`bisam`, :func:`sam`, :func:`gsam` or any other method or
            :func:`sharpness_aware` transformation; ``state`` starts as ``tx.init(params)``. The
            base optimizer may follow in a chain, but not with ``group_size``: all of ``tx`` runs
            once a group.
        loss_fn: ``loss_fn(params, batch)`` is the scalar loss to descend, a mean over the examples.
        perturbation_loss_fn: likewise the scalar loss to ascend; the same as ``loss_fn`` by
            default.
        has_aux: whether the clean pass's function returns ``(value, aux)``. The other one may too,
            its aux is dropped.
        group_size: m of m-sharpness. Each group of ``group_size`` consecutive examples has a
            perturbation of its own, and the descent gradients are averaged. All groups run at
            once, each with its own perturbed parameters; ``microbatch_size`` bounds that. Of the
            state's leaves, floating ones are averaged over the groups and others are the last
            group's.
        microbatch_size: compute on so many examples at a time, to save memory: one perturbation
            from the mean ascent gradient, then the mean gradient there. With ``group_size``, of
            which it must be a multiple, ``microbatch_size // group_size`` groups at a time.

    Returns:
        A pure function ``step(params, state, batch, **extra_args)``. ``batch`` is any tree of
        arrays whose first axis is that of the examples, all of one length. With groups or
        microbatches, aux has the shapes that the whole batch would give: leaves with an axis of
        examples in front are joined in the examples' order, other floating leaves averaged.

    Raises:
        ValueError: if a size is not a positive integer, does not divide the batch (or the other
            size), or if an array of the batch has no axis of examples; if ``tx`` never evaluates
            ``loss_fn`` although there is a ``perturbation_loss_fn``. At trace time where it
            depends on the batch.
        TypeError: if ``tx`` is no transformation, if ``loss_fn`` or ``perturbation_loss_fn`` does
            not return what ``has_aux`` says, or an aux leaf can neither be joined nor averaged.

    Examples:
        >>> import jax.numpy as jnp
        >>> from bisam_jax import bisam, perturbation_loss
        >>> def loss_fn(w, batch):
        ...     losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        ...         batch["x"] @ w, batch["y"])
        ...     return losses.mean()
        >>> def perturbation_loss_fn(w, batch):
        ...     logits = batch["x"] @ w
        ...     return perturbation_loss(logits, batch["y"]).mean(), logits
        >>> tx = bisam(rho=0.05)
        >>> step = value_and_grad(tx, loss_fn, perturbation_loss_fn, has_aux=True)
        >>> w = jnp.zeros((2, 3))
        >>> batch = {"x": jnp.array([[1.0, 2.0], [2.0, -1.0]]), "y": jnp.array([0, 1])}
        >>> (value, logits), grads, state = step(w, tx.init(w), batch)
        >>> print(value, logits.shape)
        1.0986123 (2, 3)

    References:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, 2021, for m-sharpness

    .. note:: Two gradients per example. m is part of the algorithm and not of the hardware: the
        same batch gives the same numbers however it is laid over devices. Batch normalisation, by
        contrast, sees one group or microbatch at a time. ``optax.MultiSteps`` around a
        sharpness-aware step is neither of these options: it drops the descent gradients of all
        mini-batches but the last. ``optax.conditionally_transform`` returns its input on the steps
        that it skips; here that is the gradient of ``perturbation_loss_fn``, so call its
        ``update`` with the gradient of ``loss_fn`` instead.
    """
    check_transformation("tx", tx)
    tx = optax.with_extra_args_support(tx)
    _check_sizes(group_size, microbatch_size)
    clean_fn = _clean_pass_fn(loss_fn, perturbation_loss_fn, has_aux)
    descended = _without_aux("loss_fn", loss_fn, has_aux)
    ascended = None
    if perturbation_loss_fn is not None:
        ascended = _without_aux("perturbation_loss_fn", perturbation_loss_fn, has_aux)
    whole = _step(tx, _clean_pass(clean_fn), descended, ascended)
    if group_size is not None:
        in_parts = _grouped_step(whole, clean_fn, group_size, microbatch_size)
    elif microbatch_size is not None:
        in_parts = _step(
            tx,
            _accumulated_clean_pass(clean_fn, microbatch_size),
            _accumulated(descended, microbatch_size),
            None if ascended is None else _accumulated(ascended, microbatch_size),
        )
    else:
        in_parts = whole

    def step(
        params: optax.Params, state: optax.OptState, batch: Batch, **extra_args: Any
    ) -> tuple[Any, optax.Updates, optax.OptState]:
        examples = _check_batch(batch, group_size=group_size, microbatch_size=microbatch_size)
        one_part = examples == (microbatch_size if group_size is None else group_size)
        run = whole if one_part else in_parts
        (value, aux), grads, state = run(params, state, batch, **extra_args)
        return ((value, aux) if has_aux else value), grads, state

    return step


def _step(
    tx: optax.GradientTransformationExtraArgs,
    clean_pass: Callable,
    descended: BatchLossFn,
    ascended: BatchLossFn | None,
) -> Step:
    """The clean pass, then `tx`; `ascended` is None where the training loss is ascended."""

    def step(params: Any, state: Any, batch: Batch, **extra_args: Any) -> tuple:
        # Some methods take the losses of single examples, say, in place of loss_fn.
        evaluated = bool(extra_args)

        def loss_fn(point: optax.Params) -> jax.Array:
            nonlocal evaluated
            evaluated = True
            return descended(point, batch)

        def clean_grad_fn() -> optax.Updates:
            gradient = jax.grad(descended, allow_int=True)(params, batch)
            return fill_with_zeros(float_part(gradient), params)

        out, ascent = clean_pass(params, batch)
        if ascended is not None:
            # For the rules that need more than the ascent gradient at the parameters.
            extra_args["clean_grad_fn"] = clean_grad_fn
            extra_args["ascent_loss_fn"] = _on_batch(ascended, batch)
        ascent = fill_with_zeros(ascent, params)
        grads, state = tx.update(ascent, state, params, loss_fn=loss_fn, **extra_args)
        if ascended is not None and not evaluated:
            raise ValueError(
                "tx never evaluated loss_fn, so it would descend perturbation_loss_fn: it must be "
                "or contain a sharpness-aware transformation, such as bisam(rho)."
            )
        return out, grads, state

    return step


def _accumulated(fn: BatchLossFn, microbatch_size: int) -> BatchLossFn:
    """The mean of `fn` over microbatches, one after another, and so its gradient."""
    forward = microbatch(fn, 1, microbatch_size, _MEAN)
    both = microbatch(
        _with_float_grad(jax.value_and_grad(fn, allow_int=True)), 1, microbatch_size, _MEAN
    )

    # With its own derivative: that of the loop would keep all microbatches in memory.
    @jax.custom_vjp
    def mean(params: optax.Params, batch: Batch) -> jax.Array:
        return forward(params, batch)

    def mean_fwd(params: optax.Params, batch: Batch) -> tuple[jax.Array, Any]:
        value, gradient = both(params, batch)
        return value, (gradient, params)

    def mean_bwd(residuals: Any, cotangent: jax.Array) -> tuple[Any, None]:
        gradient, params = residuals
        scaled = jax.tree.map(lambda g: jnp.asarray(cotangent, g.dtype) * g, gradient)
        return as_cotangent(scaled, params), None

    mean.defvjp(mean_fwd, mean_bwd)
    return mean


def _clean_pass(clean_fn: CleanFn) -> Callable:
    return _with_float_grad(jax.value_and_grad(clean_fn, has_aux=True, allow_int=True))


def _accumulated_clean_pass(clean_fn: CleanFn, microbatch_size: int) -> Callable:
    def clean_pass(params: optax.Params, batch: Batch) -> tuple[Any, optax.Updates]:
        aux_rule, aux_shapes = _rule_for_aux(clean_fn, params, batch, microbatch_size)
        accumulator = ((_MEAN, aux_rule), _MEAN)
        accumulate = microbatch(_clean_pass(clean_fn), 1, microbatch_size, accumulator)
        (value, aux), ascent = accumulate(params, batch)
        return (value, _reshaped(aux, aux_shapes)), ascent

    return clean_pass


def _grouped_step(
    whole_step: Step, clean_fn: CleanFn, group_size: int, microbatch_size: int | None
) -> Step:
    """The mean of one whole step a group."""

    def step(params: Any, state: Any, batch: Batch, **extra_args: Any) -> tuple:
        def group_step(group: Batch) -> tuple:
            out, grads, new_state = whole_step(params, state, group, **extra_args)
            return out, float_part(grads), new_state

        aux_rule, aux_shapes = _rule_for_aux(clean_fn, params, batch, group_size)
        state_rule = jax.tree.map(lambda leaf: _MEAN if is_floating(leaf) else _LAST, state)
        (value, aux), grads, state = micro_vmap(
            group_step,
            microbatch_size=microbatch_size and microbatch_size // group_size,
            accumulator=((_MEAN, aux_rule), _MEAN, state_rule),
        )(jax.tree.map(lambda x: _in_groups(jnp.asarray(x), group_size), batch))
        return (value, _reshaped(aux, aux_shapes)), fill_with_zeros(grads, params), state

    return step


_MEAN = AccumulationType.MEAN
_LAST = Accumulator(
    init=optax.tree.zeros_like,
    update=lambda carry, value, index: value,
    finalize=lambda carry: carry,
    aggregate=lambda values: jnp.asarray(values)[-1],
)


def _clean_pass_fn(
    loss_fn: BatchLossFn, perturbation_loss_fn: BatchLossFn | None, has_aux: bool
) -> CleanFn:
    """The function that the clean pass differentiates, as `(scalar, aux)`."""
    name = "loss_fn" if perturbation_loss_fn is None else "perturbation_loss_fn"
    fn = loss_fn if perturbation_loss_fn is None else perturbation_loss_fn

    def clean_fn(params: optax.Params, batch: Batch) -> tuple[jax.Array, Any]:
        out = fn(params, batch)
        if has_aux and not _is_pair(out):
            raise TypeError(
                f"{name} makes the clean pass: with has_aux=True it must return (value, aux)."
            )
        value, aux = out if has_aux else (out, None)
        return check_loss(name, value), aux

    return clean_fn


def _without_aux(name: str, fn: BatchLossFn, has_aux: bool) -> BatchLossFn:
    """The scalar alone, checked."""

    def without_aux(params: optax.Params, batch: Batch) -> jax.Array:
        out = fn(params, batch)
        return check_loss(name, out[0] if has_aux and _is_pair(out) else out)

    return without_aux


def _on_batch(fn: BatchLossFn, batch: Batch) -> Callable[[optax.Params], jax.Array]:
    return lambda params: fn(params, batch)


def _with_float_grad(fn: Callable) -> Callable:
    """A `value_and_grad` function with the floating part of the gradient, in float32 at least."""

    def with_float_grad(params: optax.Params, batch: Batch) -> tuple[Any, optax.Updates]:
        out, grad = fn(params, batch)
        return out, float_part(grad)

    return with_float_grad


def _is_pair(out: Any) -> bool:
    return isinstance(out, tuple) and len(out) == 2


def _rule_for_aux(
    clean_fn: Callable, params: optax.Params, batch: Batch, size: int
) -> tuple[Any, Any]:
    """How to put aux together from parts of `size` examples, and the shapes it is to have.

    What has an axis of examples is told by tracing `clean_fn` on the whole batch and on a part.
    """
    examples = len(jax.tree.leaves(batch)[0])

    def shapes_for(length: int) -> Any:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((length, *x.shape[1:]), x.dtype), batch
        )
        return jax.eval_shape(clean_fn, params, shapes)[1]

    whole, part = shapes_for(examples), shapes_for(size)

    def rule(path: Any, whole: jax.ShapeDtypeStruct, part: jax.ShapeDtypeStruct) -> Any:
        if whole.shape == part.shape and jnp.issubdtype(whole.dtype, jnp.floating):
            return _MEAN
        rest = whole.shape[1:]
        if (whole.shape, part.shape) == ((examples, *rest), (size, *rest)):
            return AccumulationType.CONCAT
        raise TypeError(
            f"the aux leaf at {jax.tree_util.keystr(path) or 'the root'}, "
            f"{whole.dtype}{list(whole.shape)}, can be neither joined nor averaged over groups or "
            "microbatches: return an array with the examples along its first axis, or a floating "
            "mean."
        )

    return jax.tree_util.tree_map_with_path(rule, whole, part), whole


def _in_groups(x: jax.Array, size: int) -> jax.Array:
    """Splits the first axis in two, with each group where its examples are."""
    shape = (-1, size, *x.shape[1:])
    sharding = jax.typeof(x).sharding
    if not sharding.mesh.are_all_axes_explicit:
        return x.reshape(shape)
    first, *others = (*sharding.spec, None)[: x.ndim]
    spec = jax.sharding.PartitionSpec(first, None, *others)
    return x.reshape(shape, out_sharding=jax.sharding.NamedSharding(sharding.mesh, spec))


def _reshaped(tree: Any, shapes: Any) -> Any:
    return jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), tree, shapes)


def _check_sizes(group_size: int | None, microbatch_size: int | None) -> None:
    for name, size in (("group_size", group_size), ("microbatch_size", microbatch_size)):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"{name} must be a positive integer or None, got {size!r}.")
    if group_size and microbatch_size and microbatch_size % group_size:
        raise ValueError(
            f"microbatch_size must be a multiple of group_size, got {microbatch_size} and "
            f"{group_size}: a group's perturbation needs all of its examples at once."
        )


def _check_batch(batch: Batch, **sizes: int | None) -> int | None:
    """The number of examples, if there are sizes to check it with."""
    if all(size is None for size in sizes.values()):
        return None
    lengths = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        place = f"batch{jax.tree_util.keystr(path)}"
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"{place} is a scalar, but groups and microbatches split every array of the batch "
                "along its first axis: give it one entry an example, or let the loss function "
                "close over it."
            )
        lengths[place] = jnp.shape(leaf)[0]
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"the arrays of batch must have one number of examples, got {lengths or 'no arrays'}."
        )
    (length,) = set(lengths.values())
    for name, size in sizes.items():
        if size is not None and length % size:
            raise ValueError(
                f"{name} must divide the batch, got {name}={size} for {length} examples."
            )
    return length
