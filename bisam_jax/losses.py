"""Margins, lower bounds of the 0-1 loss, and BiSAM's perturbation loss.

Every function works per example, as in `optax.losses`: the caller takes the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from bisam_jax._checks import check_scalar, is_floating_array, shapes_of
from bisam_jax._labels import check_logits, check_range, class_mask, where_any_class
from bisam_jax._trees import at_least_float32

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool, Float, Int

LowerBound = Callable[[jax.Array], jax.Array]

_INVERSE_E = math.exp(-1.0)


def margins(
    logits: Float[ArrayLike, "*batch classes"],
    labels: Int[ArrayLike, "*batch"],
    *,
    axis: int = -1,
) -> Float[Array, "*batch classes"]:
    r"""Returns how far each class's logit is above the logit of the true class.

    With :math:`f` the ``logits`` and :math:`y` the ``labels``, returns
    :math:`F_j = f_j - f_y`. A positive entry is a class the model prefers to the true one, and
    :math:`F_y = 0`.

    Args:
        logits: unnormalised log probabilities, floating, with the classes along ``axis``.
        labels: integers in ``[0, classes)``, in the shape of ``logits`` without ``axis``. A traced
            label outside this range gives NaN.
        axis: axis of the classes.

    Returns:
        An array in the shape of ``logits``; float32 if ``logits`` are narrower, else their dtype.

    Raises:
        TypeError: if ``logits`` are not floating or ``labels`` not integers.
        ValueError: if the shapes do not fit, or a concrete label is outside ``[0, classes)``.

    Examples:
        >>> import jax.numpy as jnp
        >>> print(margins(jnp.array([[2.0, 1.0, 4.0]]), jnp.array([0])))
        [[ 0. -1.  2.]]
    """
    given = labels
    logits, labels = check_logits(logits, labels, axis)
    check_range(given, logits.shape[axis])
    # A negative index would count from the last class.
    labels = jnp.expand_dims(jnp.where(labels < 0, logits.shape[axis], labels), axis)
    true_logit = jnp.take_along_axis(logits, labels, axis=axis)
    classes = jax.lax.broadcasted_iota(labels.dtype, logits.shape, axis % logits.ndim)
    # The margin of the true class is a constant. Subtracting its logit from itself would leave a
    # difference of equal large terms in the gradient, which drowns the tiny terms of a confident
    # example.
    return jnp.where(classes == labels, 0.0, logits - true_logit)


def log_lower_bound(x: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    r"""The lower bound of the 0-1 loss used by BiSAM (-log).

    Returns :math:`\phi(x) = 1 - \log(1 + e^{\gamma - x})` with :math:`\gamma = \log(e - 1)`. It
    is increasing, zero at zero, linear far below it, and never above :math:`1[x > 0]`.

    Args:
        x: margins, floating, of any shape.

    Returns:
        An array in the shape of ``x``; float32 if ``x`` is narrower, else the dtype of ``x``.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> print(log_lower_bound(jnp.array([-2.0, 0.0, 2.0])))
        [-1.6171  0.      0.7909]

    References:
        Xie et al., `Improving SAM Requires Rethinking its Optimization Formulation
        <https://arxiv.org/abs/2407.12993>`_, 2024, section 4.

    .. note:: The authors' code takes :math:`\phi(x) = x + 1 - \gamma` for
        :math:`x < \gamma - 20`, which is larger by 2e-9.
    """
    x = _at_least_float32(jnp.asarray(x))
    # phi = -log(1/e + (1 - 1/e) exp(-x)), in two branches so that no exponential overflows, and
    # so that the rounded phi too is 0 at 0 and never above the 0-1 loss.
    below = x < 0
    decay = jnp.exp(jnp.where(below, x, -x))
    constant = jnp.where(below, 1 - _INVERSE_E, _INVERSE_E)
    return jnp.where(below, x, 0.0) - jnp.log(constant + (1 - constant) * decay)


def tanh_lower_bound(x: Float[ArrayLike, "..."], alpha: ArrayLike = 0.1) -> Float[Array, "..."]:
    r"""The lower bound of the 0-1 loss used by BiSAM (tanh).

    Returns :math:`\phi(x) = \tanh(\alpha x)`, with :math:`\alpha` (``alpha``) the slope at zero.

    Args:
        x: margins, floating, of any shape.
        alpha: a positive scalar, possibly traced.

    Returns:
        An array in the shape of ``x``; float32 if ``x`` is narrower, else the dtype of ``x``.

    Raises:
        ValueError: if a concrete ``alpha`` is not a positive finite scalar.

    Examples:
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> print(tanh_lower_bound(jnp.array([-2.0, 0.0, 2.0])))
        [-0.1974  0.      0.1974]

    References:
        Xie et al., `Improving SAM Requires Rethinking its Optimization Formulation
        <https://arxiv.org/abs/2407.12993>`_, 2024, section 4.
    """
    check_scalar("alpha", alpha, minimum=0.0, exclusive=True)
    x = _at_least_float32(jnp.asarray(x))
    return jnp.tanh(jnp.asarray(alpha, x.dtype) * x)


def perturbation_loss(
    logits: Float[ArrayLike, "*batch classes"],
    labels: Int[ArrayLike, "*batch"],
    *,
    lower_bound: LowerBound = log_lower_bound,
    mu: ArrayLike = 1.0,
    axis: int = -1,
    where: Bool[ArrayLike, "*batch classes"] | None = None,
) -> Float[Array, "*batch"]:
    r"""BiSAM's perturbation loss: a smooth maximum of lower bounds of the 0-1 loss.

    With the margins :math:`F` of ``logits`` and ``labels``, :math:`\phi` (``lower_bound``) and
    :math:`\mu` (``mu``), returns for each example

    .. math:: Q = \frac{1}{\mu} \log \sum_j e^{\mu \phi(F_j)},

    where :math:`j` runs over all classes, including the true one. The perturbation maximises this
    loss. :math:`Q` exceeds :math:`\max_j \phi(F_j)`, which is a lower bound of the 0-1 loss, by at
    most :math:`\log(K)/\mu` for :math:`K` classes.

    Args:
        logits: unnormalised log probabilities, floating, with the classes along ``axis``.
        labels: integers in ``[0, classes)``, in the shape of ``logits`` without ``axis``. An
            example with no class left by ``where`` may have any integer, such as -100 for a padded
            token.
        lower_bound: a function that maps margins to an array of their shape;
            :func:`log_lower_bound` by default. For the paper's tanh variant with its slope, use
            ``functools.partial(tanh_lower_bound, alpha=0.1)`` and ``mu=10``.
        mu: a positive scalar, possibly traced; the larger, the closer to the maximum.
        axis: axis of the classes.
        where: classes that take part: booleans in the shape of ``logits`` or ``labels``, as in
            :func:`optax.losses.softmax_cross_entropy`. An example with no class left gives 0, so
            ``where=labels != -100`` leaves out padded tokens.

    Returns:
        An array in the shape of ``labels``; float32 if ``logits`` are narrower, else their dtype.
        Values and gradients are finite for all finite logits.

    Raises:
        TypeError: if ``logits`` are not floating, ``labels`` are not integers, ``where`` are not
            booleans, or ``lower_bound`` is not a function.
        ValueError: if the shapes do not fit, a concrete label is outside ``[0, classes)``, or a
            concrete ``mu`` is not a positive finite scalar.

    Examples:
        >>> import functools
        >>> import jax.numpy as jnp
        >>> jnp.set_printoptions(precision=4, suppress=True)
        >>> logits, labels = jnp.array([[2.0, 1.0, 4.0], [9.0, 1.0, 0.0]]), jnp.array([0, 0])
        >>> print(perturbation_loss(logits, labels))
        [1.3042 0.0007]
        >>> tanh = functools.partial(tanh_lower_bound, alpha=0.1)
        >>> print(perturbation_loss(logits, labels, lower_bound=tanh, mu=10.0))
        [0.2148 0.0002]

    References:
        Xie et al., `Improving SAM Requires Rethinking its Optimization Formulation
        <https://arxiv.org/abs/2407.12993>`_, 2024, section 4.

    .. note:: The authors' published code leaves out :math:`1/\mu`. This does not change the
        direction of the gradient, and a normalised perturbation uses only the direction.
    """
    check_scalar("mu", mu, minimum=0.0, exclusive=True)
    if not callable(lower_bound):
        raise TypeError(
            "lower_bound must be a function of margins, such as bisam_jax.tanh_lower_bound, got "
            f"{lower_bound!r}."
        )
    if where is not None:
        check_logits(logits, labels, axis)
        where = class_mask(where, jnp.shape(logits), axis)
        labels = where_any_class(where, labels, axis)
    margin = margins(logits, labels, axis=axis)
    if where is not None:
        # Masked logits may be infinite. Removing them before phi keeps NaN out of the gradient.
        # If the true class is masked, even the largest margin may be out of range.
        limit = jnp.finfo(margin.dtype).max
        margin = jnp.clip(jnp.where(where, margin, 0.0), -limit, limit)
    elif lower_bound is log_lower_bound and isinstance(mu, (int, float)) and mu == 1:
        # The paper's default needs one exponential per class instead of two and a logarithm, so
        # it costs little more than the cross-entropy.
        return jnp.log(jnp.sum(_exp_log_lower_bound(margin), axis=axis))
    bounds = lower_bound(margin)
    if not is_floating_array(bounds) or jnp.shape(bounds) != margin.shape:
        raise TypeError(
            f"lower_bound must return a floating array of the margins' shape, {margin.shape}, got "
            f"{shapes_of(bounds)}."
        )
    return _smooth_max(bounds, mu, axis, where)


@jax.custom_jvp
def _exp_log_lower_bound(x: jax.Array) -> jax.Array:
    """Returns `exp(log_lower_bound(x))`, which is 1 / (1/e + (1 - 1/e) exp(-x))."""
    return 1 / (_INVERSE_E + _decay(x))


@_exp_log_lower_bound.defjvp
def _exp_log_lower_bound_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # The derivative of a quotient, ordered so that it neither overflows far below zero nor
    # cancels far above it.
    (x,), (dx,) = primals, tangents
    y = _exp_log_lower_bound(x)
    return y, jnp.where(x > _lowest(x), y * (_decay(x) * y), 0.0) * dx


def _decay(x: jax.Array) -> jax.Array:
    return (1 - _INVERSE_E) * jnp.exp(-jnp.maximum(x, _lowest(x)))


def _lowest(x: jax.Array) -> float:
    """Returns the lowest integer x for which exp(x) is a normal number: -87 in float32."""
    return math.ceil(math.log(jnp.finfo(x.dtype).tiny))


def _smooth_max(
    x: jax.Array, mu: ArrayLike, axis: int, where: jax.Array | np.ndarray | None
) -> jax.Array:
    """Returns `logsumexp(mu * x) / mu`, finite even if `mu * x` is not; 0 for no elements."""
    mu = jnp.asarray(mu, x.dtype)
    largest = jnp.max(x, axis=axis, keepdims=True, where=where, initial=-jnp.inf)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isneginf(largest), 0.0, largest))
    total = jnp.sum(jnp.exp(mu * (x - largest)), axis=axis, where=where)
    total = jnp.where(total > 0, total, 1.0)
    return jnp.squeeze(largest, axis) + jnp.log(total) / mu


def _at_least_float32(x: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"margins must be floating, got dtype {x.dtype}.")
    return x.astype(at_least_float32(x.dtype))
