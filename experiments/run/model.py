"""The model of a recipe, and whether it fits the data."""

import jax
import jax.numpy as jnp

from experiments import data, models
from experiments.config.recipe import Recipe, check_no_images
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
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"--model {recipe.model}: {error}") from error
    if recipe.group_size == 1 and jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))[1]):
        raise ArgumentError(
            f"--group-size must be at least 2 for {recipe.model}: its batch normalization has no "
            "variance of one example"
        )
    return init, apply
