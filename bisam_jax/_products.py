"""Products of matrices of second derivatives with vectors."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import optax

from bisam_jax._batches import Batch, BatchLoss, BatchLossFn
from bisam_jax._functional import LogitsLoss
from bisam_jax._means import mean_over
from bisam_jax._trees import float_part, merge

Product = Callable[[Any], Any]


class ProductOf(Protocol):
    """Makes the product with a matrix of second derivatives: see :func:`hessian_product`."""

    def __call__(
        self,
        loss_fn: BatchLossFn,
        params: optax.Params,
        batch: Batch | list[Batch],
        *,
        microbatch_size: int | None = None,
    ) -> Product:
        """Returns a function from a tree like the floating leaves to another one."""
        ...


def hessian_product(
    loss_fn: BatchLossFn,
    params: optax.Params,
    batch: Batch | list[Batch],
    *,
    microbatch_size: int | None = None,
) -> Product:
    """Returns the product of the Hessian of the mean loss with a vector.

    Args:
        loss_fn: ``loss_fn(params, batch)`` returns one loss per example, floating[batch], or their
            mean, a scalar.
        params: a tree of parameters.
        batch: a tree of arrays with the examples along their first axis; or a list or an iterator
            of batches, taken as one large batch.
        microbatch_size: number of examples in memory at a time; it must divide every batch.

    Returns:
        A function from a tree with the structure of the floating leaves of ``params`` (None in
        place of others), float32 or wider, to another one.

    Raises:
        TypeError: if ``loss_fn`` does not return what it should.
        ValueError: if there is no batch, or ``microbatch_size`` does not divide one.

    Examples:
        >>> import jax.numpy as jnp
        >>> product = hessian_product(lambda w, x: x @ w**2, jnp.ones(2), jnp.array([[1.0, 3.0]]))
        >>> print(product(jnp.array([1.0, 1.0])))
        [2. 6.]

    .. note:: Forward over reverse mode: about the cost of two gradients.
    """
    loss = BatchLoss("loss_fn", loss_fn, has_aux=False)
    floats, mean = float_part(params), mean_over(batch, microbatch_size)

    def product(vector: Any) -> Any:
        def of_batch(one: Batch) -> Any:
            gradient = jax.grad(lambda at: loss.mean(merge(at, params), one))
            return jax.jvp(gradient, (floats,), (vector,))[1]

        return mean(of_batch)

    return product


def gauss_newton_product(
    loss_fn: BatchLossFn,
    params: optax.Params,
    batch: Batch | list[Batch],
    *,
    microbatch_size: int | None = None,
) -> Product:
    r"""Returns the product of the Gauss-Newton matrix of the mean loss with a vector.

    With :math:`J` the Jacobian of the logits and :math:`H_\ell` the Hessian of the loss as a
    function of the logits, the matrix is :math:`J^\top H_\ell J`: the Hessian without the curvature
    of the network. It is positive semidefinite for a convex loss such as the cross-entropy.

    Args:
        loss_fn: a loss that is split at the logits, made by :func:`logits_loss` from functions
            ``(params, batch) -> logits`` and ``(logits, batch) -> losses``.
        params: see :func:`hessian_product`.
        batch: see :func:`hessian_product`.
        microbatch_size: see :func:`hessian_product`.

    Returns:
        See :func:`hessian_product`.

    Raises:
        TypeError: if ``loss_fn`` is not split at the logits.
        ValueError: as :func:`hessian_product`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from bisam_jax import logits_loss
        >>> loss_fn = logits_loss(lambda w, x: x @ w**2, lambda z, x: 0.5 * z**2)
        >>> product = gauss_newton_product(loss_fn, jnp.ones(2), jnp.array([[1.0, 3.0]]))
        >>> print(product(jnp.array([1.0, 0.0])))
        [ 4. 12.]

    References:
        Schraudolph, `Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent
        <https://doi.org/10.1162/08997660260028683>`_, 2002
    """
    if not isinstance(loss_fn, LogitsLoss):
        raise TypeError(
            "gauss_newton_product needs a loss_fn that is split at the logits: pass "
            f"bisam_jax.logits_loss(logits_fn, loss), got {loss_fn!r}."
        )
    floats, mean = float_part(params), mean_over(batch, microbatch_size)

    def product(vector: Any) -> Any:
        def of_batch(one: Batch) -> Any:
            def logits_of(at: Any) -> Any:
                return loss_fn.logits(merge(at, params), one)

            logits, pullback = jax.vjp(logits_of, floats)
            change = jax.jvp(logits_of, (floats,), (vector,))[1]
            slope = jax.grad(lambda z: loss_fn.loss(z, one).mean())
            return pullback(jax.jvp(slope, (logits,), (change,))[1])[0]

        return mean(of_batch)

    return product
