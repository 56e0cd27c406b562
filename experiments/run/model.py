"""The model of a recipe, and whether it fits the data."""

import jax
import jax.numpy as jnp

from experiments import data, models
from experiments.config.config import option_of
from experiments.config.recipe import Recipe
from experiments.system.command_line import ArgumentError


def model_of(
    recipe: Recipe, dataset: data.Dataset, axis_name: str | None = None
) -> tuple[models.Init, models.Apply]:
    """Returns the pure functions of the recipe's model. See :func:`experiments.models.build`.

    Raises:
        ArgumentError: if the model cannot take the examples.
    """
    reads_texts = models.architecture(recipe.model).reads_texts
    if reads_texts not in (None, bool(dataset.vocabulary)):
        known = [n for n, a in models.ARCHITECTURES.items() if a.reads_texts != reads_texts]
        raise ArgumentError(
            f"--model {recipe.model} reads {'texts' if reads_texts else 'images'}, which "
            f"{recipe.dataset} has not: use {', '.join(known)}"
        )
    options = {"vocabulary": dataset.vocabulary} if dataset.vocabulary else {}
    try:
        return models.build(
            recipe.model,
            dataset.image_shape,
            dataset.classes,
            dtype=jnp.dtype(recipe.precision),
            axis_name=axis_name,
            **options,
        )
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"--model {recipe.model}: {error}") from error


def check_model(recipe: Recipe, dataset: data.Dataset) -> None:
    """Refuses what the model cannot be trained with on this data.

    Raises:
        ArgumentError: if the options contradict the model or the data.
    """
    init, _ = model_of(recipe, dataset)
    if recipe.group_size == 1 and jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))[1]):
        raise ArgumentError(
            f"--group-size must be at least 2 for {recipe.model}: its batch normalization has no "
            "variance of one example"
        )
    # Of data sets whose names are not known as texts.
    if dataset.vocabulary and recipe.method_spec.attack:
        raise ArgumentError(
            f"--method {recipe.method} attacks pixels, and {recipe.dataset} has texts, not images"
        )
    for name in ("crop_padding", "flip", "cutout"):
        if dataset.vocabulary and getattr(recipe, name):
            off = "--no-flip" if name == "flip" else f"{option_of(name)} 0"
            raise ArgumentError(
                f"{option_of(name)} has no meaning for {recipe.dataset}, which has texts: add {off}"
            )
