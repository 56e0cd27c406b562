"""Flax NNX models, and their pure form: functions of parameters and batch statistics.

Nothing here knows data sets, methods or training. `ARCHITECTURES` is the only list of models. A
model from elsewhere is named by its module and its factory.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from experiments.models.bert import Bert
from experiments.models.cifar_resnet import CifarResNet
from experiments.models.cnn import CNN
from experiments.models.cnn1d import CNN1D
from experiments.models.convolution import convolve
from experiments.models.densenet import DenseNet
from experiments.models.mlp import MLP
from experiments.models.resnet import ResNet
from experiments.models.text import TextBag, TextTransformer
from experiments.models.vgg import VGG
from experiments.models.vit import ViT
from experiments.models.wide_resnet import WideResNet
from experiments.system.suggestions import did_you_mean

Apply = Callable[..., tuple[jax.Array, Any]]
Init = Callable[[jax.Array], tuple[Any, Any]]


class Architecture(NamedTuple):
    """A model's class, and what the training loop must know about it.

    Attributes:
        module: the class, called with the image shape and the number of classes; for texts also
            with the size of the vocabulary.
        weighs_more_than_batches: whether the parameters take more bytes than a batch's
            activations.
        reads_texts: whether its inputs are tokens; None if they may be.
        base: the usual base optimizer.
        family: the layout of its pretrained weights, a key of `hugging_face.FAMILIES`; None if
            there is none.
    """

    module: Callable[..., nnx.Module]
    weighs_more_than_batches: bool = False
    reads_texts: bool | None = False
    base: str = "sgd"
    family: str | None = None


def _bert(**sizes: int) -> Architecture:
    return Architecture(partial(Bert, **sizes), reads_texts=True, base="adamw", family="bert")


ARCHITECTURES = {
    "mlp": Architecture(MLP, weighs_more_than_batches=True),
    "cnn": Architecture(CNN),
    "cnn1d": Architecture(CNN1D),
    "resnet8": Architecture(partial(CifarResNet, depth=8)),
    "resnet20": Architecture(partial(CifarResNet, depth=20)),
    "resnet32": Architecture(partial(CifarResNet, depth=32)),
    "resnet56": Architecture(partial(CifarResNet, depth=56)),
    "wrn16_8": Architecture(partial(WideResNet, depth=16, width=8)),
    "wrn28_2": Architecture(partial(WideResNet, depth=28, width=2)),
    "wrn28_10": Architecture(partial(WideResNet, depth=28, width=10)),
    "densenet121": Architecture(partial(DenseNet, layers=(6, 12, 24, 16))),
    "vgg19_bn": Architecture(VGG),
    "resnet18": Architecture(partial(ResNet, blocks=(2, 2, 2, 2), bottleneck=False)),
    "resnet50": Architecture(partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True)),
    # Patches are embedded by a linear map.
    "vit_tiny": Architecture(partial(ViT, width=192, heads=3), base="adamw", family="vit"),
    "vit_small": Architecture(partial(ViT, width=384, heads=6), base="adamw", family="vit"),
    "vit_base": Architecture(partial(ViT, width=768, heads=12), base="adamw", family="vit"),
    "text-bag": Architecture(TextBag, reads_texts=True, base="adamw"),
    "text-transformer": Architecture(
        partial(TextTransformer, width=128, heads=4, depth=2), reads_texts=True, base="adamw"
    ),
    "text-transformer-small": Architecture(
        partial(TextTransformer, width=256, heads=8, depth=4), reads_texts=True, base="adamw"
    ),
    "bert-tiny": _bert(width=128, heads=2, depth=2),
    "bert-small": _bert(width=512, heads=8, depth=4),
    "bert-base": _bert(width=768, heads=12, depth=12),
}


def architecture(name: str) -> Architecture:
    """Returns the architecture of a name.

    Args:
        name: a key of `ARCHITECTURES`, or "module:factory": a function or class, called with
            `(image_shape, classes, *, dtype, rngs)`, and for texts with `vocabulary`, that makes
            an `nnx.Module`. The module is called with `(images, *, train, keys)` and returns
            logits.

    Raises:
        ValueError: if there is no such model.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    module, _, factory = name.partition(":")
    if not (module and factory):
        raise ValueError(
            f"there is no model {name!r}: use {', '.join(ARCHITECTURES)}, or MODULE:FACTORY."
            f"{did_you_mean(name, ARCHITECTURES)}"
        )
    try:
        found: Any = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"model {name!r} cannot be imported: {error}. Run the command in the folder of "
            f"{module}.py, or name that folder in PYTHONPATH"
        ) from error
    if not callable(found):
        raise ValueError(f"model {name!r} must be a function or a class, got {found!r}")
    return Architecture(cast(Any, found), reads_texts=None)


def build(
    name: str,
    image_shape: tuple[int, ...],
    classes: int,
    *,
    dtype: DTypeLike = jnp.float32,
    axis_name: str | None = None,
    **options: Any,
) -> tuple[Init, Apply]:
    """Returns the pure functions `(init, apply)` of a model, without making any array.

    `init(key)` returns `(params, stats)`, all float32, also under `jax.jit` and `jax.vmap`.
    `apply(params, stats, images, train=..., keys=None)` takes [batch, height, width, channels],
    or tokens [batch, length], and returns `(logits, stats)`, the logits float32 [batch, classes].
    Batch statistics change only if `train` is true. Dropout then needs `keys`, one per example:
    Key[batch].

    Args:
        name: see :func:`architecture`.
        image_shape: (height, width, channels); the number of tokens, (length,), for texts.
        classes: the number of logits.
        dtype: dtype of the computation, float32 or bfloat16.
        axis_name: axis of pmap or shard_map whose devices share their batch statistics; None if
            each device has its own.
        **options: arguments of the model's class; for texts also `vocabulary`.

    Raises:
        ValueError: if there is no such model, or it cannot take images of this shape.
    """
    factory = architecture(name).module

    def module(key: jax.Array) -> nnx.Module:
        model = factory(image_shape, classes, dtype=dtype, rngs=nnx.Rngs(key), **options)
        for _, part in nnx.iter_graph(model):
            if isinstance(part, nnx.BatchNorm):
                part.axis_name = axis_name
            plain = jax.lax.conv_general_dilated
            if isinstance(part, nnx.Conv) and part.conv_general_dilated is plain:
                part.conv_general_dilated = convolve
        return model

    def init(key: jax.Array) -> tuple[Any, Any]:
        _, params, stats, others = nnx.split(module(key), nnx.Param, nnx.BatchStat, ...)
        if jax.tree.leaves(others):
            raise ValueError(
                f"model {name!r} keeps state that is neither parameters nor batch statistics: for "
                "dropout, use experiments.models.layers.Dropout, which takes its keys per call"
            )
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: module(jax.random.key(0))))

    def apply(
        params: Any, stats: Any, images: jax.Array, *, train: bool, keys: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        if images.shape[1:] != tuple(image_shape):
            raise ValueError(
                f"images must have the shape {('batch', *image_shape)}; got {images.shape}"
            )
        model: Any = nnx.merge(graphdef, params, stats, copy=True)
        logits = model(images, train=train, keys=keys)
        if logits.shape != (len(images), classes):
            raise ValueError(
                f"model {name!r} must return logits of the shape {(len(images), classes)}; got "
                f"{logits.shape}"
            )
        return logits.astype(jnp.float32), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return init, apply


def create(
    name: str,
    image_shape: tuple[int, ...],
    classes: int,
    seed: int,
    *,
    dtype: DTypeLike = jnp.float32,
    **options: Any,
) -> tuple[Apply, Any, Any]:
    """Returns `(apply, params, stats)` of a new model. See :func:`build`."""
    init, apply = build(name, image_shape, classes, dtype=dtype, **options)
    # Not jitted: for a single model that takes up to twice as long.
    return apply, *init(jax.random.key(seed))
