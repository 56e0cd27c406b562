"""Pretrained weights in the layout of Hugging Face's transformers, as parameters of our models.

`BERT` and `VIT` are the tables of names. Layers of block N are under "encoder.layer.N." there, and
"blocks.N." here. A kernel is the transpose of a weight.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Names(NamedTuple):
    """The names of a family's layers there, by our names.

    Attributes:
        prefix: of all names, in a file of the whole model.
        layers: layers outside the blocks.
        block: layers of a block. Several are side by side in one of ours.
        arrays: parameters that are no kernels, scales or biases.
    """

    prefix: str
    layers: Mapping[str, str]
    block: Mapping[str, tuple[str, ...]]
    arrays: Mapping[str, str]


BERT = Names(
    prefix="bert.",
    layers={"norm": "embeddings.LayerNorm", "pooler": "pooler.dense", "head": "classifier"},
    block={
        "query_key_value": tuple(f"attention.self.{name}" for name in ("query", "key", "value")),
        "projection": ("attention.output.dense",),
        "norm_1": ("attention.output.LayerNorm",),
        "widen": ("intermediate.dense",),
        "narrow": ("output.dense",),
        "norm_2": ("output.LayerNorm",),
    },
    arrays={
        "embedding.embedding": "embeddings.word_embeddings.weight",
        "positions": "embeddings.position_embeddings.weight",
        "segment": "embeddings.token_type_embeddings.weight",
    },
)
VIT = Names(
    prefix="vit.",
    layers={
        "embedding": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
        "head": "classifier",
    },
    block={
        "norm_1": ("layernorm_before",),
        "query_key_value": tuple(
            f"attention.attention.{name}" for name in ("query", "key", "value")
        ),
        "projection": ("attention.output.dense",),
        "norm_2": ("layernorm_after",),
        "widen": ("intermediate.dense",),
        "narrow": ("output.dense",),
    },
    arrays={
        "class_token": "embeddings.cls_token",
        "positions": "embeddings.position_embeddings",
    },
)
FAMILIES = {"bert": BERT, "vit": VIT}
_WEIGHTS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# As the first files of BERT name them.
_OLD = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def read_weights(path: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a file in the format of safetensors, float32, by their names there.

    Raises:
        ValueError: if it is no such file, or the package is not installed.
    """
    # Imported here because only pretrained weights need it.
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise ValueError(
            "it needs the package safetensors: pip install 'bisam_jax[weights]'"
        ) from (error)
    try:
        tensors = safetensors.numpy.load_file(path)
    except Exception as error:  # the package raises its own exceptions
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    return {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}


def from_hugging_face(
    tensors: Mapping[str, np.ndarray], names: Names, asked: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Returns parameters of a model, by our names.

    Args:
        tensors: the arrays there, by their names; of the whole model or of its encoder.
        names: the table of the family.
        asked: shapes of the parameters, by our names.

    Raises:
        ValueError: if an array is missing or has another shape.
    """
    there = {_plain(name, names.prefix): tensor for name, tensor in tensors.items()}
    return {name: _parameter(there, names, name, shape) for name, shape in asked.items()}


def _parameter(
    there: Mapping[str, np.ndarray], names: Names, name: str, shape: tuple[int, ...]
) -> np.ndarray:
    sources = _sources(names, name)
    if missing := [source for source in sources if source not in there]:
        raise ValueError(f"it has no {missing[0]}, which {name} needs")
    found = np.concatenate([_converted(there[source], name, shape) for source in sources], axis=-1)
    if found.shape != shape:
        raise ValueError(f"the shape of {name}, from {sources[0]}, is {found.shape}, not {shape}")
    return found


def _sources(names: Names, name: str) -> list[str]:
    """Returns the names there of one of our parameters."""
    if name in names.arrays:
        return [names.arrays[name]]
    *layer, leaf = name.split(".")
    if layer[0] == "blocks":
        layers = [f"encoder.layer.{layer[1]}.{part}" for part in names.block[layer[2]]]
    else:
        layers = [names.layers[layer[0]]]
    return [f"{layer}.{_WEIGHTS[leaf]}" for layer in layers]


def _converted(tensor: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if tensor.ndim == 4:  # a convolution of patches: here, rows, columns and channels of a patch
        return tensor.transpose(2, 3, 1, 0).reshape(-1, len(tensor))
    if name.endswith("kernel"):
        return tensor.T
    if name == "segment":
        return tensor[0]
    return tensor[None] if tensor.ndim == len(shape) - 1 else tensor


def _plain(name: str, prefix: str) -> str:
    for old, new in _OLD.items():
        name = name.replace(old, new)
    return name.removeprefix(prefix)
