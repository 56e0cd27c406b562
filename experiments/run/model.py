"""The model of a recipe, and whether it fits the data."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments import data, models
from experiments.config.recipe import Recipe, check_no_images
from experiments.models.lora import LORA, with_lora
from experiments.models.trees import Path, flat
from experiments.run.starting import LAST
from experiments.step.leaves import PERTURBED, TrainedPart, matches
from experiments.system.command_line import ArgumentError


def model_of(
    recipe: Recipe, dataset: data.Dataset, axis_name: str | None = None
) -> tuple[models.Init, models.Apply]:
    """Returns the pure functions of the recipe's model. See :func:`experiments.models.build`.

    Raises:
        ArgumentError: if the model cannot be trained with the options on this data.
    """
    if dataset.vocabulary:  # also if the name of the data set is not known as texts
        check_no_images(recipe, "texts")
    reads_texts = models.architecture(recipe.model).reads_texts
    if reads_texts not in (None, bool(dataset.vocabulary)):
        known = [n for n, a in models.ARCHITECTURES.items() if a.reads_texts != reads_texts]
        raise ArgumentError(
            f"--model {recipe.model} reads {'texts' if reads_texts else 'images'}, which "
            f"{recipe.dataset} has not: use {', '.join(known)}"
        )
    options = {"vocabulary": dataset.vocabulary} if dataset.vocabulary else {}
    try:
        init, apply = models.build(
            recipe.model,
            dataset.image_shape,
            dataset.classes,
            dtype=jnp.dtype(recipe.precision),
            axis_name=axis_name,
            **options,
        )
        if recipe.lora:
            init, apply = with_lora(init, apply, recipe.lora)
            jax.eval_shape(init, jax.random.key(0))
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"--model {recipe.model}: {error}") from error
    if recipe.group_size == 1 and jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))[1]):
        raise ArgumentError(
            f"--group-size must be at least 2 for {recipe.model}: its batch normalization has no "
            "variance of one example"
        )
    return init, apply


def trained_of(recipe: Recipe, params: Any) -> TrainedPart:
    """Returns which parameters the recipe trains: with LoRA, its updates and the last layer.

    Args:
        recipe: the resolved options.
        params: parameters, or their shapes.

    Raises:
        ArgumentError: if a pattern of `--freeze` matches nothing, or nothing is left to train or
            to perturb.
    """

    def is_frozen(path: Path) -> bool:
        of_lora = recipe.lora > 0 and path[0] not in (LORA, LAST)
        return of_lora or matches(path, recipe.freeze)

    leaves = flat(params)
    for pattern in filter(None, recipe.freeze.split(",")):
        if not any(matches(path, pattern) for path in leaves):
            known = ", ".join(dict.fromkeys(str(path[0]) for path in leaves))
            raise ArgumentError(
                f"--freeze {pattern} matches no parameter of {recipe.model}, whose names begin "
                f"with {known}"
            )
    if all(map(is_frozen, leaves)):
        raise ArgumentError(f"--freeze {recipe.freeze} leaves nothing to train")
    trained = TrainedPart(params, is_frozen)
    if recipe.perturb != "all":
        perturbed = PERTURBED[recipe.perturb](trained.of(params))
        if not any(jax.tree.leaves(perturbed)):
            raise ArgumentError(
                f"--perturb {recipe.perturb} leaves nothing to perturb: {recipe.model} trains none"
            )
    return trained
