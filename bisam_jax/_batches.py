"""Batches: how a loss function is called on them, and how they are split and joined again."""

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
    """Output of a loss function on one batch.

    Attributes:
        losses: float[batch], one loss per example, in float32 or wider; None if the function
            returned a scalar mean.
        aux: a tree of any structure; None without `has_aux`.
    """

    losses: jax.Array | None
    aux: Any


class BatchLoss:
    """A user's loss function of parameters and a batch, with checks of its output.

    Args:
        name: name of the argument, used in messages.
        fn: returns a scalar mean or one loss per example; with `has_aux`, a pair of that and aux.
        has_aux: see :func:`bisam_jax.value_and_grad`.
        is_clean: whether the clean pass calls it. If not, it may leave out aux.
    """

    def __init__(self, name: str, fn: BatchLossFn, has_aux: bool, is_clean: bool = True) -> None:
        if not callable(fn):
            raise TypeError(f"{name} must be a function of (params, batch), got {fn!r}.")
        self.name, self.fn, self._has_aux, self._is_clean = name, fn, has_aux, is_clean

    def with_parts(self, params: Any, batch: Batch) -> tuple[jax.Array, Parts]:
        """Returns the mean loss, and the losses and aux that came with it."""
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
        """Returns the mean loss over the batch."""
        return self.with_parts(params, batch)[0]

    def losses(self, params: Any, batch: Batch) -> jax.Array:
        """Returns one loss per example.

        Raises:
            MissingArgumentError: if `fn` returns a scalar mean.
        """
        losses = self.with_parts(params, batch)[1].losses
        if losses is None:
            raise MissingArgumentError(
                f"the method needs one loss per example, and {self.name} returns their mean",
                "pass example_losses_fn or fisher_scores_fn",
                f"return one loss per example from {self.name}, or pass example_losses_fn or "
                "fisher_scores_fn to the step",
            )
        return losses


def _misses_examples(out: Any, batch: Batch) -> bool:
    length = length_of(batch)
    return jnp.ndim(out) == 1 and length is not None and len(out) != length


def length_of(batch: Batch) -> int | None:
    """Returns the number of examples; None if there are no arrays or their lengths differ."""
    leaves = jax.tree.leaves(batch)
    lengths = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else None for leaf in leaves}
    return lengths.pop() if len(lengths) == 1 else None


def check_splits(batch: Batch, **sizes: int | None) -> None:
    """Raises unless every array of a batch can be split into parts of each given size.

    Raises:
        ValueError: names the size or the array that does not fit.
    """
    lengths = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        place = f"batch{jax.tree_util.keystr(path)}"
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"{place} is a scalar, but groups, microbatches and methods that use single "
                "examples split every array of the batch along its first axis: give it one entry "
                "per example, or let the loss function close over it."
            )
        lengths[place] = jnp.shape(leaf)[0]
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"the arrays of batch must have the same number of examples, got {lengths or 'none'}."
        )
    (length,) = set(lengths.values())
    for name, size in sizes.items():
        if size is not None and length % size:
            raise ValueError(
                f"{name} must divide the batch, got {name}={size} for {length} examples."
            )


def check_not_explicit(batch: Batch) -> None:
    """Raises if the examples are sharded over an explicit mesh axis, where they cannot be split.

    Raises:
        ValueError: names the array that is sharded.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        sharding = jax.typeof(jnp.asarray(leaf)).sharding
        if any(sharding.spec[:1]):
            raise ValueError(
                f"microbatch_size cannot split batch{jax.tree_util.keystr(path)}, whose examples "
                f"are sharded over the explicit mesh axis {sharding.spec[0]!r}: make the mesh with "
                "AxisType.Auto, or call the step inside jax.shard_map with axis_name."
            )


class AuxRules(NamedTuple):
    """Rules that combine the aux of parts of a batch into the aux of the whole batch.

    Attributes:
        rules: one optax accumulation per leaf.
        shapes: shape and dtype of each leaf for the whole batch, as `jax.ShapeDtypeStruct`.
    """

    rules: Any
    shapes: Any

    def reshaped(self, tree: Any) -> Any:
        """Returns joined leaves in the shapes that the whole batch gives."""
        return jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), tree, self.shapes)


def aux_rules(loss: BatchLoss, params: Any, batch: Batch, size: int) -> AuxRules:
    """Returns the rules that combine the output of :meth:`BatchLoss.with_parts` on parts.

    Each part has `size` examples. Tracing the function on the whole batch and on a part shows which
    leaves have an axis of examples.

    Raises:
        TypeError: if a leaf of aux can be neither joined nor averaged.
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
        # This is only traced, and a part need not divide evenly over the devices.
        x = jax.sharding.reshard(x, jax.sharding.PartitionSpec())
    return x[:length] if length <= len(x) else jnp.concatenate([x] * -(-length // len(x)))[:length]


def in_groups(x: jax.Array, size: int) -> jax.Array:
    """Splits the first axis into groups of `size`; examples stay on their devices."""
    shape = (-1, size, *x.shape[1:])
    sharding = jax.typeof(x).sharding
    if not sharding.mesh.are_all_axes_explicit:
        return x.reshape(shape)
    first, *others = (*sharding.spec, None)[: x.ndim]
    spec = jax.sharding.PartitionSpec(first, None, *others)
    return x.reshape(shape, out_sharding=jax.sharding.NamedSharding(sharding.mesh, spec))
