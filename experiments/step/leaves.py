"""Leaves of a model's parameters, by their names: matrices, norms, trained and frozen ones."""

import fnmatch
from collections.abc import Callable
from typing import Any

import jax
import optax

from experiments.models.trees import Path, flat, nested

# Names of parameters that are vectors of tokens and places, or of the class token.
_EMBEDDED = {"embedding", "positions", "class_token"}
# Every normalization layer has this parameter. Other layers have a kernel.
_SCALE = "scale"
Where = Callable[[Any], Any]


def are_matrices(params: Any) -> Any:
    """Returns which leaves are kernels, but no biases, norms, embeddings or positions."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim > 1 and not _EMBEDDED & _names(path[-1:]), params
    )


def are_norms(params: Any) -> Any:
    """Returns which leaves are scales and biases of normalization layers."""
    layers = {path[:-1] for path in flat(params) if path[-1] == _SCALE}
    return nested({path: path[:-1] in layers for path in flat(params)})


# Of `--perturb`.
PERTURBED: dict[str, Where] = {"matrices": are_matrices, "norms": are_norms}


def muon_dimensions(params: Any) -> Any:
    """Returns the axes of the matrices that Muon changes. Adam, without decay, has the others.

    As its authors do, embeddings and the last layer are left to Adam.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            optax.contrib.MuonDimensionNumbers()
            if leaf.ndim == 2 and not {*_EMBEDDED, "head"} & _names(path)
            else None
        ),
        params,
    )


def _names(path: Any) -> set[Any]:
    return {getattr(key, "key", None) for key in path}


class TrainedPart:
    """Which parameters are trained. The others stay what they are, and have no state.

    Args:
        params: parameters, or their shapes.
        is_frozen: whether a leaf stays what it is, by its path.
    """

    def __init__(
        self, params: Any = None, is_frozen: Callable[[Path], bool] = lambda path: False
    ) -> None:
        self._frozen = {path for path in flat(params or {}) if is_frozen(path)}

    def of(self, params: Any) -> Any:
        """Returns the trained parameters, in dictionaries as before."""
        if not self._frozen:
            return params
        return nested({p: leaf for p, leaf in flat(params).items() if p not in self._frozen})

    def into(self, params: Any, trained: Any) -> Any:
        """Returns all parameters, the trained ones from `trained`."""
        return nested({**flat(params), **flat(trained)}) if self._frozen else trained


def matches(path: Path, patterns: str) -> bool:
    """Returns whether a leaf's name, such as "blocks.0.norm_1.scale", matches a pattern.

    Args:
        path: the path of the leaf.
        patterns: shell patterns, separated by commas. `*` also matches dots, and a pattern matches
            everything below what it names.
    """
    name = ".".join(map(str, path))
    return any(
        fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
        for pattern in patterns.split(",")
        if pattern
    )
