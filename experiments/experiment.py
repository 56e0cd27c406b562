"""From a configuration to everything that a run computes with."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import augmentation, data, evaluation, launches, methods, models, training
from experiments.config import ArgumentError, Config

CUTOUT_LENGTH = 16
# Enough for the host never to be waited for, and few enough for a signal not to wait long.
STEPS_AT_ONCE = 20
EVALUATION_BATCH_SIZE = 500


class Experiment:
    """Data, model, method and their pure functions.

    Args:
        config: what to train.
        dataset: what to train it on, if not what the configuration names.

    Attributes:
        config: with every default filled in.
        dataset: its splits on the device, if they fit.
        state: the state before the first step.
        steps_per_epoch: without the incomplete last batch.
        evaluate: see :func:`experiments.evaluation.make_evaluate`.

    Raises:
        ArgumentError: if the configuration does not fit the data.
        DatasetError: if the data set is not there.
    """

    def __init__(self, config: Config, dataset: data.Dataset | None = None) -> None:
        config = config.resolved()
        dataset = dataset or data.load(
            config.dataset,
            data_dir=config.data_dir,
            train_examples=config.train_examples,
            label_noise=config.label_noise,
            seed=config.seed,
            image_size=config.image_size,
            workers=config.workers,
        )
        self.batch_size = config.batch_size or 0
        examples = evaluation.num_examples(dataset.train)
        self.steps_per_epoch = examples // self.batch_size
        if self.steps_per_epoch == 0:
            raise ArgumentError(
                f"--batch-size must be at most the {examples} training examples, "
                f"got {config.batch_size}"
            )
        self.config = config.with_epochs_of(self.steps_per_epoch)
        self.dataset = dataset._replace(
            train=_on_device(dataset.train),
            validation=_on_device(dataset.validation),
            test=_on_device(dataset.test),
        )
        # Keys of their own, so that nothing drawn for one purpose is drawn for another.
        init_key, method_key, key = jax.random.split(jax.random.key(config.seed), 3)
        init, self._apply = _model(config, dataset)
        params, stats = init(init_key)
        self._method = _method(self.config, self.total_steps, method_key)
        self._prepare = _prepare(self.config, self.dataset)
        stored = data.Split(
            jax.ShapeDtypeStruct((self.batch_size, *dataset.image_shape), jnp.uint8),
            jax.ShapeDtypeStruct((self.batch_size,), jnp.int32),
        )
        example_batch = jax.eval_shape(self._prepare, key, stored)
        self.state = training.init_state(params, stats, self._method, example_batch, key)
        streamed = isinstance(dataset.train, data.Stream)
        self.evaluate = evaluation.make_evaluate(
            self._apply,
            _normalise(self.dataset),
            config.microbatch_size or (self.batch_size if streamed else EVALUATION_BATCH_SIZE),
        )

    @property
    def total_steps(self) -> int:
        """Of the whole run."""
        return self.steps_per_epoch * (self.config.epochs or 0)

    def compile(self) -> launches.Launch:
        """The compiled training step, on the training split."""
        step, train = self.step(), self.dataset.train
        if isinstance(train, data.Stream):
            return launches.Streamed(
                step,
                self._prepare,
                self.state,
                train,
                self.dataset.image_shape,
                self.batch_size,
                self.config.seed,
                self.config.epochs or 0,
            )
        # XLA on CPU runs convolutions inside a loop many times slower.
        alone = jax.default_backend() == "cpu" and self.convolutional
        at_once = 1 if alone else min(STEPS_AT_ONCE, self.steps_per_epoch)
        return launches.InMemory(step, self._prepare, self.state, train, self.batch_size, at_once)

    def step(self) -> training.Step:
        """The training step, on a prepared batch."""
        config = self.config
        loss = training.cross_entropy(config.label_smoothing)
        if config.group_size is None and config.microbatch_size is None:
            return training.make_step(self._apply, self._method, loss)
        return training.make_step_in_parts(
            self._apply,
            self._method,
            loss,
            group_size=config.group_size,
            microbatch_size=config.microbatch_size,
        )

    @property
    def convolutional(self) -> bool:
        """Whether the model is."""
        return models.ARCHITECTURES[self.config.model or ""].convolutional


def _model(config: Config, dataset: data.Dataset) -> tuple[models.Init, models.Apply]:
    assert config.model is not None
    shape, dtype = dataset.image_shape, jnp.dtype(config.precision)
    try:
        return models.build(config.model, shape, dataset.classes, dtype=dtype)
    except ValueError as error:
        raise ArgumentError(f"--model {config.model}: {error}") from error


def _method(config: Config, total_steps: int, key: jax.Array) -> methods.Method:
    assert config.perturbation is not None
    assert config.learning_rate is not None
    assert config.weight_decay is not None
    schedule = optax.cosine_decay_schedule(config.learning_rate, total_steps)
    if config.base == "adamw":
        optimizer = optax.adamw(schedule, weight_decay=config.weight_decay)
    else:
        optimizer = optax.chain(
            optax.add_decayed_weights(config.weight_decay),
            optax.sgd(schedule, momentum=config.momentum),
        )
    values = dataclasses.asdict(config)
    return methods.make(config.method, config.perturbation, optimizer, values, key)


def _on_device(split: Any) -> Any:
    return split if isinstance(split, data.Stream) else data.on_device(split)


def _normalise(dataset: data.Dataset) -> Callable[[jax.Array], jax.Array]:
    return lambda images: augmentation.normalise(images, dataset.mean, dataset.std)


def _prepare(config: Config, dataset: data.Dataset) -> launches.Prepare:
    """The recipe's order: crop and flip stored images, normalise, cut out."""
    normalise = _normalise(dataset)
    # Streamed images come cropped at random.
    padding = 0 if isinstance(dataset.train, data.Stream) else config.crop_padding

    def prepare(key: jax.Array, batch: Any) -> data.Split:
        crop_key, flip_key, cutout_key = jax.random.split(key, 3)
        images = batch.images
        if padding:
            images = augmentation.random_crop(crop_key, images, padding)
        if config.flip:
            images = augmentation.random_flip(flip_key, images)
        images = normalise(images)
        if config.cutout:
            images = augmentation.cutout(cutout_key, images, CUTOUT_LENGTH, config.cutout)
        return data.Split(images, batch.labels)

    return prepare
