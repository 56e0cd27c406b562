"""Parameters of an earlier run, from which another one starts."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config.config import TOKENIZER
from experiments.config.recipe import Recipe
from experiments.data import Dataset
from experiments.models import architecture
from experiments.models.hugging_face import FAMILIES, from_hugging_face, read_weights
from experiments.models.lora import LORA, without_lora
from experiments.run.arrays import by_name
from experiments.run.checkpoints import Checkpoints
from experiments.run.folder import RunFolder
from experiments.system.command_line import ArgumentError

# The last layer, which has the classes of its own data set.
LAST = "head"
# Arrays by their names in the parameters: "blocks.0.norm_1.scale".
Start = dict[str, np.ndarray]


def start_of(recipe: Recipe, dataset: Dataset, params: Any) -> Start:
    """Returns the parameters to start from, without the last layer's; none for a random start.

    They are pretrained weights, or those of the best epoch of a run, whose data are not read.

    Args:
        recipe: names the file of weights, or the folder of the earlier run.
        dataset: what is trained on.
        params: shapes of the parameters of the new run.

    Raises:
        ArgumentError: if the weights cannot be read or are of another network; if it is no run
            folder, has no checkpoint, or is of another network or of
            other tokens.
        CheckpointError: if the checkpoint cannot be read.
    """
    if recipe.weights:
        return _pretrained(recipe, params)
    if not recipe.from_checkpoint:
        return {}
    folder = RunFolder(Path(recipe.from_checkpoint))
    if not folder.has_checkpoints:
        raise ArgumentError(
            f"--from-checkpoint must be a run folder with checkpoints, got {folder.path}"
        )
    if dataset.vocabulary:
        _check_tokens(folder.path / TOKENIZER, dataset)
    with contextlib.closing(Checkpoints(folder.checkpoints, keep=None)) as checkpoints:
        step = checkpoints.best_step()
        assert step is not None
        start = _without_last(_without_lora(checkpoints.parameters(step)))
    _check_shapes(start, params, recipe.model)
    return start


def started(params: Any, start: Start) -> Any:
    """Returns new parameters, with those of `start` in their places."""
    leaves, tree = jax.tree.flatten(params)
    taken = [start.get(name, leaf) for name, leaf in zip(by_name(params), leaves, strict=True)]
    return tree.unflatten(map(jnp.asarray, taken))


def _pretrained(recipe: Recipe, params: Any) -> Start:
    names = FAMILIES[architecture(recipe.model).family or ""]
    asked = {name: leaf.shape for name, leaf in _without_last(by_name(params)).items()}
    try:
        return from_hugging_face(read_weights(recipe.weights), names, asked)
    except ValueError as error:
        raise ArgumentError(f"--weights: {error}") from error


def _check_tokens(file: Path, dataset: Dataset) -> None:
    """Refuses embeddings of other tokens, also if there are as many."""
    if not file.is_file() or file.read_text() != dataset.tokenizer:
        raise ArgumentError(
            f"--from-checkpoint has embeddings of other tokens: use --tokenizer {file}"
        )


def _check_shapes(start: Start, params: Any, model: str) -> None:
    there = _without_last(by_name(params))
    for name in sorted(there | start):
        of_both = [getattr(known.get(name), "shape", "missing") for known in (start, there)]
        if of_both[0] != of_both[1]:
            raise ArgumentError(
                f"--from-checkpoint has another network than --model {model}: the shape of {name} "
                f"is {of_both[0]} and {of_both[1]}"
            )


def _without_last(leaves: dict[str, Any]) -> dict[str, Any]:
    # New updates of LoRA begin anew, as the last layer does.
    new = (LAST, LORA)
    return {name: leaf for name, leaf in leaves.items() if name.split(".")[0] not in new}


def _without_lora(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the parameters without LoRA, if the earlier run trained with it."""
    whole = without_lora({tuple(name.split(".")): leaf for name, leaf in leaves.items()})
    return {".".join(path): leaf for path, leaf in whole.items()}
