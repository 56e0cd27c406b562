"""From a configuration to everything that a run computes with."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import (
    augmentation,
    data,
    evaluation,
    launches,
    layout,
    methods,
    models,
    processes,
    training,
)
from experiments.config import ArgumentError, Config
from experiments.parallelism import devices_of, over_devices

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
        layout: over the devices.
        dataset: its splits on every device, if they fit.
        state: the state before the first step.
        steps_per_epoch: without the incomplete last batch.
        evaluate: see :func:`experiments.evaluation.make_evaluate`.

    Raises:
        ArgumentError: if the configuration does not fit the data.
        DatasetError: if the data set is not there.
    """

    def __init__(self, config: Config, dataset: data.Dataset | None = None) -> None:
        config = config.resolved()
        self.layout = layout.layout_of(config)
        dataset = dataset or processes.agreed(lambda: load(config), data.fingerprint, "data")
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
            train=self._on_devices(dataset.train),
            validation=self._on_devices(dataset.validation),
            test=self._on_devices(dataset.test),
        )
        # Keys of their own, so that nothing drawn for one purpose is drawn for another.
        init_key, method_key, key = jax.random.split(jax.random.key(config.seed), 3)
        self._init, self._apply = _model(config, dataset, self._statistics_axis)
        axis = layout.gradient_axis(config, self.layout)
        self._method = _method(self.config, self.total_steps, method_key, axis)
        self._prepare = _prepare(self.config, self.dataset)
        self.state = self.layout.make(lambda: self._first_state(init_key, key))
        streamed = isinstance(dataset.train, data.Stream)
        self.evaluate = evaluation.make_evaluate(
            self._apply,
            _normalise(self.dataset),
            config.microbatch_size or (self.batch_size if streamed else EVALUATION_BATCH_SIZE),
            self.layout,
        )

    def _on_devices(self, split: data.Split | data.Stream) -> Any:
        return split if isinstance(split, data.Stream) else self.layout.put(split)

    def _first_state(self, init_key: jax.Array, key: jax.Array) -> training.TrainState:
        params, stats = self._init(init_key)
        shape = (self.batch_size, *self.dataset.image_shape)
        integers = jnp.zeros(shape[:1], jnp.int32)
        example = training.Batch(jnp.zeros(shape, jnp.float32), integers, integers)
        return training.init_state(params, stats, self._method, example, key)

    @property
    def _statistics_axis(self) -> str | None:
        """Over which the model takes its batch statistics, where a device sees its part alone."""
        config = self.config
        # In groups, statistics are those of a group.
        synchronised = config.batch_statistics == "synchronised" and config.group_size is None
        return layout.DATA if config.parallelism != "jit" and synchronised else None

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
                self.state,
                train,
                self.dataset.image_shape,
                self.batch_size,
                self.config.seed,
                self.config.epochs or 0,
                self.layout,
            )
        # XLA on CPU runs convolutions inside a loop many times slower.
        alone = jax.default_backend() == "cpu" and self.convolutional
        at_once = 1 if alone else min(STEPS_AT_ONCE, self.steps_per_epoch)
        return launches.InMemory(step, self.state, train, self.batch_size, at_once, self.layout)

    def step(self) -> training.StepOnStored:
        """The training step, on stored images and over all devices."""
        step = over_devices(self._step_of_one(), self._parallelism, self.layout)
        return lambda state, stored: step(state, training.prepared(stored, self._prepare, state))

    @property
    def _parallelism(self) -> str:
        """That of the step, which may be another than the configuration's."""
        config, parts = self.config, self.layout.parts
        if config.parallelism != "jit" or config.group_size is None or config.fsdp > 1:
            return config.parallelism
        # XLA cannot split the convolutions of many models at once over devices: where groups fit
        # on a device, it gets them one by one.
        at_once = config.microbatch_size or self.batch_size
        return "shard_map" if parts > 1 and at_once % (parts * config.group_size) == 0 else "jit"

    def _step_of_one(self) -> training.Step:
        config = self.config
        loss = training.cross_entropy(config.label_smoothing)
        devices = devices_of(
            self._parallelism,
            self.layout,
            shared_statistics=self._statistics_axis is not None,
        )
        if config.group_size is None and config.microbatch_size is None:
            return training.make_step(self._apply, self._method, loss, devices)
        seen = 1 if self._parallelism == "jit" else self.layout.parts
        return training.make_step_in_parts(
            self._apply,
            self._method,
            loss,
            group_size=config.group_size,
            microbatch_size=config.microbatch_size and config.microbatch_size // seen,
            devices=devices,
        )

    @property
    def convolutional(self) -> bool:
        """Whether the model is."""
        return models.ARCHITECTURES[self.config.model or ""].convolutional


def load(config: Config) -> data.Dataset:
    """The data set that a resolved configuration names.

    Raises:
        DatasetError: if it is not there, or cannot be used as asked.
    """
    return data.load(
        config.dataset,
        data_dir=config.data_dir,
        train_examples=config.train_examples,
        label_noise=config.label_noise,
        seed=config.seed,
        image_size=config.image_size,
        workers=config.workers,
    )


def _model(
    config: Config, dataset: data.Dataset, statistics_axis: str | None
) -> tuple[models.Init, models.Apply]:
    assert config.model is not None
    shape, dtype = dataset.image_shape, jnp.dtype(config.precision)
    try:
        return models.build(
            config.model, shape, dataset.classes, dtype=dtype, axis_name=statistics_axis
        )
    except ValueError as error:
        raise ArgumentError(f"--model {config.model}: {error}") from error


def _method(
    config: Config, total_steps: int, key: jax.Array, gradient_axis: str | None
) -> methods.Method:
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
    return methods.make(config.method, config.perturbation, optimizer, values, key, gradient_axis)


def _normalise(dataset: data.Dataset) -> Callable[[jax.Array], jax.Array]:
    return lambda images: augmentation.normalise(images, dataset.mean, dataset.std)


def _prepare(config: Config, dataset: data.Dataset) -> training.Prepare:
    """The recipe's order: crop and flip stored images, normalise, cut out."""
    normalise = _normalise(dataset)
    # Streamed images come cropped at random.
    padding = 0 if isinstance(dataset.train, data.Stream) else config.crop_padding

    def prepare(key: jax.Array, images: jax.Array) -> jax.Array:
        crop_key, flip_key, cutout_key = jax.random.split(key, 3)
        if padding:
            images = augmentation.random_crop(crop_key, images, padding)
        if config.flip:
            images = augmentation.random_flip(flip_key, images)
        images = normalise(images)
        if config.cutout:
            images = augmentation.cutout(cutout_key, images, CUTOUT_LENGTH, config.cutout)
        return images

    return prepare
