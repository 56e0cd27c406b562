"""Flax NNX models, and their pure form.

The library and the training loop see no modules: :func:`create` gives a pure function of
parameters and batch statistics, and their initial values.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from experiments.models.cnn import CNN
from experiments.models.mlp import MLP

Apply = Callable[..., tuple[jax.Array, Any]]


class Architecture(NamedTuple):
    """A model's class, and what the training loop has to know of it.

    Attributes:
        module: called with the image shape and the number of classes.
        convolutional: whether steps are launched one by one on CPU, where XLA runs convolutions
            inside a scan many times slower.
    """

    module: Callable[..., nnx.Module]
    convolutional: bool


ARCHITECTURES = {
    "mlp": Architecture(MLP, convolutional=False),
    "cnn": Architecture(CNN, convolutional=True),
}


def create(
    name: str, image_shape: tuple[int, ...], classes: int, seed: int, **options: Any
) -> tuple[Apply, Any, Any]:
    """Returns `(apply, params, stats)` of a new model; `options` go to its class.

    `apply(params, stats, images, train=...)` returns `(logits, stats)`; batch statistics move if
    and only if `train`.
    """
    model = ARCHITECTURES[name].module(image_shape, classes, rngs=nnx.Rngs(seed), **options)
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def apply(params: Any, stats: Any, images: jax.Array, *, train: bool) -> tuple:
        model: Any = nnx.merge(graphdef, params, stats, copy=True)
        logits = model(images, train=train)
        return logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return apply, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
