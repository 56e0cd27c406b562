"""Everything that a run computes with, built from a recipe and a data set."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments import data, models
from experiments.config.methods import ATTACK_STEPS
from experiments.config.recipe import Recipe
from experiments.run.model import model_of, trained_of
from experiments.run.starting import Start, start_of, started
from experiments.step import attack, augmentation, evaluation, train_step
from experiments.step.feeds import Feed, feed_of
from experiments.step.layout import Layout
from experiments.step.leaves import TrainedPart
from experiments.step.method import BuiltMethod, base_optimizer, build_method, learning_rate
from experiments.step.parallelism import over_devices
from experiments.step.train_step import StepOnStored, TrainState
from experiments.system.command_line import ArgumentError

CUTOUT_LENGTH = 16
# With more, a signal waits longer. With fewer, the device may wait for the host.
STEPS_AT_ONCE = 20
# On a CPU, about the numbers in the images of a launch: 20 batches of digits, one of CIFAR-10.
NUMBERS_AT_ONCE = 2**18
EVALUATION_BATCH_SIZE = 500


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """The data, and the pure functions of model and method. :func:`experiment_of` makes one.

    Attributes:
        recipe: the resolved options.
        layout: the layout over the devices.
        dataset: the data set, on the host.
        train: feeds the training part to the devices.
        validation: feeds the validation part.
        test: feeds the test part.
        steps_per_epoch: number of steps per epoch, without the incomplete last batch.
        steps_at_once: largest number of steps in one launch.
        state_of: `state_of(key, values)` returns the state before the first step; `values` are
            hyperparameters by name, possibly traced.
        step_of: `step_of(values)` returns the step on stored images of one device.
        step: the step on stored images, over all devices of the layout.
        predict: `predict(params, stats, images)` returns the logits of stored images.
        sums: see :func:`experiments.step.evaluation.make_sums`.
        evaluate: see :func:`experiments.step.evaluation.make_evaluate`.
    """

    recipe: Recipe
    layout: Layout
    dataset: data.Dataset
    train: Feed
    validation: Feed
    test: Feed
    steps_per_epoch: int
    steps_at_once: int
    state_of: Callable[[jax.Array, Any], TrainState]
    step_of: Callable[[Any], StepOnStored]
    step: StepOnStored
    predict: evaluation.Predict
    sums: evaluation.Sums
    evaluate: Callable[[Any, Any, Feed], evaluation.Evaluation]

    @property
    def total_steps(self) -> int:
        """The number of steps of the whole run."""
        return self.steps_per_epoch * self.recipe.epochs

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same when a run is resumed, as JSON values."""
        values = dataclasses.asdict(self.recipe)
        values |= values.pop("hyperparameters")
        if values["batch_statistics"] == "per-device":
            values["parts_of_a_batch"] = self.layout.parts
        return values | {
            "train_examples": self.train.examples,
            "image_shape": list(self.dataset.image_shape),
            "JAX_ENABLE_X64": jax.config.jax_enable_x64,  # type: ignore[attr-defined]
        }

    def rates(self, step: int) -> dict[str, float]:
        """Returns the learning rate of a step, and its rho if the method has one."""
        recipe = self.recipe
        schedule = learning_rate(recipe.hyperparameters, self.total_steps)
        rates = {"learning_rate": float(jnp.asarray(schedule(step)))}
        if "rho" in recipe.hyperparameters:
            is_perturbed = step >= recipe.start_step
            rates["rho"] = recipe.hyperparameters["rho"] if is_perturbed else 0.0
        return rates

    def first_state(self) -> TrainState:
        """Makes the state before the first step, over the devices."""
        key = jax.random.key(self.recipe.seed)
        return self.layout.make(lambda: self.state_of(key, self.recipe.hyperparameters))


def experiment_of(
    recipe: Recipe, dataset: data.Dataset, layout: Layout, start: Start | None = None
) -> Experiment:
    """Builds an experiment.

    Args:
        recipe: the resolved options.
        dataset: the data set.
        layout: the layout over the devices.
        start: parameters to start from; None for those of `recipe.from_checkpoint`.

    Raises:
        ArgumentError: if the recipe does not fit the data, or the checkpoint to start from.
        CheckpointError: if that checkpoint cannot be read.
        DatasetError: if images are to be attacked, and there are none.
    """
    steps_per_epoch = dataset.train.examples // recipe.batch_size
    if steps_per_epoch == 0:
        raise ArgumentError(
            f"--batch-size must be at most the {dataset.train.examples} training examples, "
            f"got {recipe.batch_size}"
        )
    # Groups have their own statistics.
    synchronised = not recipe.in_groups and recipe.batch_statistics == "synchronised"
    init, apply = model_of(recipe, dataset, layout.axis_name if synchronised else None)
    first = jax.eval_shape(init, jax.random.key(0))[0]
    trained = trained_of(recipe, first)
    start = start_of(recipe, dataset, first) if start is None else start
    prepare = _prepare(recipe, dataset)
    method_of = _method_of(recipe, dataset, layout, steps_per_epoch * recipe.epochs)

    def state_of(key: jax.Array, values: Any) -> TrainState:
        # Separate keys keep the draws for different purposes independent.
        init_key, method_key, key = jax.random.split(key, 3)
        params, stats = init(init_key)
        params = started(params, start)
        return train_step.init_state(params, stats, method_of(values, method_key), key, trained)

    def on_stored(step: train_step.Step) -> StepOnStored:
        return lambda state, stored: step(state, train_step.prepared(stored, prepare, state))

    def step_of(values: Any) -> StepOnStored:
        return on_stored(_step(recipe, dataset, apply, trained, method_of(values, 0), values))

    method = method_of(recipe.hyperparameters, 0)
    shared = (layout.axis_name, layout.parts_of_program)
    own = _step(recipe, dataset, apply, trained, method, recipe.hyperparameters, *shared)
    predict = evaluation.make_predict(apply, _normalise(dataset))
    sums = evaluation.make_sums(predict)
    steps_at_once = min(_steps_at_once(recipe, dataset), steps_per_epoch)
    train, validation, test = (
        feed_of(part, layout, steps_at_once)
        for part in (dataset.train, dataset.validation, dataset.test)
    )
    return Experiment(
        recipe,
        layout,
        dataset,
        train,
        validation,
        test,
        steps_per_epoch,
        steps_at_once,
        state_of,
        step_of,
        step=on_stored(over_devices(own, layout)),
        predict=predict,
        sums=sums,
        evaluate=evaluation.make_evaluate(sums, _evaluated_at_once(recipe, dataset), layout),
    )


def _method_of(
    recipe: Recipe, dataset: data.Dataset, layout: Layout, total_steps: int
) -> Callable[[Any, jax.Array | int], BuiltMethod]:
    """Returns the method as a function of its hyperparameters and its key."""
    # Images are normalized. Tokens stay what they are, in memory.
    dtype = next(dataset.train.sample()).dtype if dataset.vocabulary else jnp.float32
    images: Any = jax.ShapeDtypeStruct((recipe.batch_size, *dataset.image_shape), dtype)
    integers: Any = jax.ShapeDtypeStruct((recipe.batch_size,), jnp.int32)

    def method_of(values: Any, key: jax.Array | int) -> BuiltMethod:
        return build_method(
            recipe.method,
            recipe.perturbation,
            base_optimizer(recipe.base, values, total_steps),
            values,
            batch_like=train_step.Batch(images, integers, integers),
            key=key,
            gradient_axis=layout.gradient_axis,
            perturb=recipe.perturb,
        )

    return method_of


def _step(
    recipe: Recipe,
    dataset: data.Dataset,
    apply: models.Apply,
    trained: TrainedPart,
    method: BuiltMethod,
    values: Any,
    axis_name: str | None = None,
    parts: int = 1,
) -> train_step.Step:
    """Makes the step of a program that gets one of `parts` parts of a batch."""
    loss = train_step.cross_entropy(recipe.label_smoothing)
    step = train_step.make_step(
        apply,
        method,
        loss,
        when=train_step.whenever(recipe.start_step, recipe.every),
        group_size=recipe.group_size if recipe.in_groups else None,
        microbatch_size=recipe.microbatch_size // parts if recipe.in_microbatches else None,
        axis_name=axis_name,
        trained=trained,
    )
    if (norm := recipe.method_spec.attack) is None:
        return step
    white = data.white_of(recipe.dataset)
    mean, std = (jnp.asarray(x, jnp.float32) for x in (dataset.mean, dataset.std))
    return attack.attacked_step(
        step,
        apply,
        loss,
        norm,
        values["attack_radius"],
        ATTACK_STEPS,
        lambda images: (images * std + mean) / white,
        lambda pixels: augmentation.normalise(white * pixels, mean, std),
    )


def _steps_at_once(recipe: Recipe, dataset: data.Dataset) -> int:
    if jax.default_backend() != "cpu":
        return STEPS_AT_ONCE
    # Large steps take long on a CPU, and a signal waits for the end of a launch.
    numbers = recipe.batch_size * math.prod(dataset.image_shape)
    return max(1, min(STEPS_AT_ONCE, NUMBERS_AT_ONCE // numbers))


def _evaluated_at_once(recipe: Recipe, dataset: data.Dataset) -> int:
    # A text may take more memory than an image: what fits in training fits here.
    if recipe.in_microbatches or dataset.train.streamed or dataset.vocabulary:
        return recipe.microbatch_size
    return EVALUATION_BATCH_SIZE


def _normalise(dataset: data.Dataset) -> Callable[[jax.Array], jax.Array]:
    return lambda images: augmentation.normalise(images, dataset.mean, dataset.std)


def _prepare(recipe: Recipe, dataset: data.Dataset) -> train_step.Prepare:
    """Returns the function that crops, flips and normalizes images, then cuts out a square."""
    normalise = _normalise(dataset)
    # Streamed images are already randomly cropped.
    padding = 0 if dataset.train.streamed else recipe.crop_padding

    def prepare(key: jax.Array, images: jax.Array) -> jax.Array:
        crop_key, flip_key, cutout_key = jax.random.split(key, 3)
        if padding:
            images = augmentation.random_crop(crop_key, images, padding)
        if recipe.flip:
            images = augmentation.random_flip(flip_key, images)
        images = normalise(images)
        if recipe.cutout:
            images = augmentation.cutout(cutout_key, images, CUTOUT_LENGTH, recipe.cutout)
        return images

    return prepare
