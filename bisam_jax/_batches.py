"""A batch, its parts, and what a loss function returns of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax.microbatching import AccumulationType, Accumulator

from bisam_jax._checks import MissingArgumentError, is_floating_array, shapes_of
from bisam_jax._trees import at_least_float32

Batch = Any
BatchLossFn = Callable[[Any, Any], Any]

MEAN = AccumulationType.MEAN
LAST = Accumulator(
    init=lambda value: jax.tree.map(jnp.zeros_like, value),
    update=lambda carry, value, index: value,
    finalize=lambda carry: carry,
    aggregate=lambda values: jnp.asarray(values)[-1],
)


class Parts(NamedTuple):
    """What a loss function returned for a batch.

    Attributes:
        losses: float[batch], one per example, in float32 at least; None for a scalar mean.
        aux: anything; None without `has_aux`.
    """

    losses: jax.Array | None
    aux: Any


class BatchLoss:
    """A user's loss function of parameters and a batch, with what it returns checked.

    Args:
        name: of the argument, for messages.
        fn: returns a scalar mean or one loss per example; with `has_aux` a pair of it and aux.
        has_aux: see :func:`bisam_jax.value_and_grad`.
        is_clean: whether it makes clean passes; otherwise it may leave out aux.
    """

    def __init__(self, name: str, fn: BatchLossFn, has_aux: bool, is_clean: bool = True) -> None:
        if not callable(fn):
            raise TypeError(f"{name} must be a function of (params, batch), got {fn!r}.")
        self.name, self.fn, self._has_aux, self._is_clean = name, fn, has_aux, is_clean

    def with_parts(self, params: Any, batch: Batch) -> tuple[jax.Array, Parts]:
        """The mean, and what it was made of."""
        out, aux = self._loss_and_aux(self.fn(params, batch))
        if not is_floating_array(out) or jnp.ndim(out) > 1 or _misses_examples(out, batch):
            raise TypeError(
                f"{self.name} must return one real floating scalar, or one loss per example of the "
                f"batch, floating[{length_of(batch)}], got {shapes_of(out)}"
                + ("." if self._has_aux else ": for auxiliary outputs, pass has_aux=True.")
            )
        out = jnp.asarray(out, at_least_float32(jnp.result_type(out)))
        return jnp.mean(out), Parts(out if out.ndim else None, aux)

    def _loss_and_aux(self, out: Any) -> tuple[Any, Any]:
        if not self._has_aux:
            return out, None
        if isinstance(out, tuple) and len(out) == 2:
            return out
        if self._is_clean:
            raise TypeError(f"with has_aux=True, {self.name} must return (loss, aux).")
        return out, None

    def mean(self, params: Any, batch: Batch) -> jax.Array:
        """The mean over the batch."""
        return self.with_parts(params, batch)[0]

    def losses(self, params: Any, batch: Batch) -> jax.Array:
        """One loss per example.

        Raises:
            MissingArgumentError: if `fn` returns their mean.
        """
        losses = self.with_parts(params, batch)[1].losses
        if losses is None:
            raise MissingArgumentError(
                f"the method looks at single examples, and {self.name} returns their mean",
                "pass example_losses_fn, or fisher_scores_fn",
                f"return one loss per example from {self.name}, or pass example_losses_fn or "
                "fisher_scores_fn to the step",
            )
        return losses


def _misses_examples(out: Any, batch: Batch) -> bool:
    length = length_of(batch)
    return jnp.ndim(out) == 1 and length is not None and len(out) != length


def length_of(batch: Batch) -> int | None:
    """The number of examples; None if the batch has no arrays, or not of one length."""
    leaves = jax.tree.leaves(batch)
    lengths = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else None for leaf in leaves}
    return lengths.pop() if len(lengths) == 1 else None


def check_splits(batch: Batch, **sizes: int | None) -> None:
    """Raises unless all of a batch can be split into parts of the given sizes.

    Raises:
        ValueError: names the size, or the array of the batch, that does not fit.
    """
    lengths = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        place = f"batch{jax.tree_util.keystr(path)}"
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"{place} is a scalar, but groups, microbatches and methods that look at single "
                "examples split every array of the batch along its first axis: give it one entry "
                "per example, or let the loss function close over it."
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


def check_not_explicit(batch: Batch) -> None:
    """Raises if the examples lie over an explicit axis of a mesh, where they cannot be taken apart.

    Raises:
        ValueError: names the array of the batch.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        sharding = jax.typeof(jnp.asarray(leaf)).sharding
        if any(sharding.spec[:1]):
            raise ValueError(
                f"microbatch_size cannot split batch{jax.tree_util.keystr(path)}, whose examples "
                f"lie over the explicit mesh axis {sharding.spec[0]!r}: make the mesh with "
                "AxisType.Auto, or call the step inside jax.shard_map with axis_name."
            )


class AuxRules(NamedTuple):
    """How aux of parts of a batch becomes aux of the batch.

    Attributes:
        rules: for each leaf, an accumulation of optax.
        shapes: what each leaf is to have, as `jax.ShapeDtypeStruct`.
    """

    rules: Any
    shapes: Any

    def reshaped(self, tree: Any) -> Any:
        """Joined leaves in their own shapes."""
        return jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), tree, self.shapes)


def aux_rules(loss: BatchLoss, params: Any, batch: Batch, size: int) -> AuxRules:
    """The rules for parts of `size` examples, of what :meth:`BatchLoss.with_parts` returns.

    What has an axis of examples shows in tracing the function on the whole batch and on a part.

    Raises:
        TypeError: for a leaf of aux that can be neither joined nor averaged.
    """
    examples = len(jax.tree.leaves(batch)[0])

    def shapes_for(length: int) -> Any:
        def parts(params: Any, batch: Batch) -> Parts:
            return loss.with_parts(params, jax.tree.map(lambda x: _of_length(x, length), batch))[1]

        return jax.eval_shape(parts, params, batch)

    whole, part = shapes_for(examples), shapes_for(size)

    def rule(path: Any, whole: jax.ShapeDtypeStruct, part: jax.ShapeDtypeStruct) -> Any:
        if whole.shape == part.shape and jnp.issubdtype(whole.dtype, jnp.floating):
            return MEAN
        rest = whole.shape[1:]
        if (whole.shape, part.shape) == ((examples, *rest), (size, *rest)):
            return AccumulationType.CONCAT
        raise TypeError(
            f"the aux leaf at {jax.tree_util.keystr(path[1:]) or 'the root'}, "
            f"{whole.dtype}{list(whole.shape)}, can be neither joined nor averaged over groups, "
            "microbatches or devices: return an array with the examples along its first axis, or a "
            "floating mean."
        )

    return AuxRules(jax.tree_util.tree_map_with_path(rule, whole, part), whole)


def _of_length(x: Any, length: int) -> jax.Array:
    x = jnp.asarray(x)
    if jax.typeof(x).sharding.mesh.are_all_axes_explicit:
        # Only traced: a part need not divide over the devices.
        x = jax.sharding.reshard(x, jax.sharding.PartitionSpec())
    return x[:length] if length <= len(x) else jnp.concatenate([x] * -(-length // len(x)))[:length]


def in_groups(x: jax.Array, size: int) -> jax.Array:
    """Splits the first axis in two, with each group where its examples are."""
    shape = (-1, size, *x.shape[1:])
    sharding = jax.typeof(x).sharding
    if not sharding.mesh.are_all_axes_explicit:
        return x.reshape(shape)
    first, *others = (*sharding.spec, None)[: x.ndim]
    spec = jax.sharding.PartitionSpec(first, None, *others)
    return x.reshape(shape, out_sharding=jax.sharding.NamedSharding(sharding.mesh, spec))
