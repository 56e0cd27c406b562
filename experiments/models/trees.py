"""Parameters as nested dictionaries, and as leaves by their paths."""

from collections.abc import Mapping
from typing import Any

import jax

Path = tuple[Any, ...]


def flat(params: Mapping[Any, Any]) -> dict[Path, Any]:
    """Returns the leaves of nested dictionaries by their paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {tuple(getattr(key, "key", key) for key in path): leaf for path, leaf in leaves}


def nested(leaves: Mapping[Path, Any]) -> dict[Any, Any]:
    """Returns nested dictionaries: the inverse of :func:`flat`."""
    tree: dict[Any, Any] = {}
    for (*folders, last), leaf in leaves.items():
        part = tree
        for folder in folders:
            part = part.setdefault(folder, {})
        part[last] = leaf
    return tree
