"""Stochastic weight perturbation: perturb a random part of the weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bisam_jax._checks import check_key, check_same_structure, check_scalar
from bisam_jax._keys import draw_like, key_data_of


class RandomSubsetState(NamedTuple):
    """State of :func:`random_subset`.

    Attributes:
        subset_key: data of the random key (uint32) from which the next subset is drawn.
    """

    subset_key: jax.Array


def random_subset(
    beta: jax.typing.ArrayLike, key: jax.Array | int = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps a perturbation on a random part of the weights: stochastic weight perturbation.

    Returns :math:`m \epsilon / \beta`, where each entry of :math:`m` is 1 with probability
    :math:`\beta` (``beta``) and 0 otherwise. The expected value is the perturbation
    :math:`\epsilon`.

    Args:
        beta: probability that a weight is kept, a scalar in (0, 1], possibly traced.
        key: random key or integer seed.

    Returns:
        A transformation to chain after a ball. The extra arg ``subset``, a tree of booleans in
        the parameters' shapes, replaces the draw.

    Raises:
        TypeError, ValueError: if ``beta`` is not in (0, 1]; in ``update``, if ``subset`` does not
            match.

    Examples:
        >>> import jax.numpy as jnp
        >>> tx = random_subset(beta=0.5)
        >>> eps = jnp.array([1.0, 2.0])
        >>> eps, state = tx.update(eps, tx.init(eps), subset=jnp.array([True, False]))
        >>> print(eps)
        [2. 0.]

    References:
        Du et al., `Efficient Sharpness-aware Minimization for Improved Training of Neural
        Networks <https://arxiv.org/abs/2110.03141>`_, 2022
    """
    check_scalar("beta", beta, minimum=0.0, maximum=1.0, exclusive=True)
    check_key(key)
    kept = key_data_of(key)

    def init_fn(params: optax.Params) -> RandomSubsetState:
        del params
        return RandomSubsetState(kept.first())

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        subset: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RandomSubsetState]:
        del params, extra_args
        next_key, draw_key = jax.random.split(kept.as_key(state.subset_key))
        if subset is None:
            subset = draw_like(
                updates,
                draw_key,
                lambda key, shape, dtype: jax.random.bernoulli(
                    key, jnp.asarray(beta, dtype), shape
                ),
            )
        check_same_structure("subset", subset, updates)
        eps = jax.tree.map(
            lambda m, u: jnp.where(m, u / jnp.asarray(beta, u.dtype), 0), subset, updates
        )
        return eps, RandomSubsetState(jax.random.key_data(next_key))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
