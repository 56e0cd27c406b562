"""Values for models and layers, drawn without JAX, which would compile for each shape."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def drawn(tree):
    """Values for an abstract tree."""

    def draw(path, x):
        centre = 1.0 if path[-1].key in ("scale", "var") else 0.0
        deviation = 0.1 if x.ndim == 1 else math.sqrt(2 / math.prod(x.shape[:-1]))
        return centre + deviation * normal(*x.shape)

    return jax.tree.map_with_path(draw, tree)


def module(kind, *args, **options):
    abstract = nnx.eval_shape(lambda: kind(*args, dtype=jnp.float32, rngs=nnx.Rngs(0), **options))
    graphdef, state = nnx.split(abstract)
    return nnx.merge(graphdef, drawn(nnx.to_pure_dict(state)))
