"""From a configuration to everything that a run computes with."""

import functools
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
from experiments.config import HYPERPARAMETERS, ArgumentError, Config
from experiments.parallelism import over_devices

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
        values: its hyperparameters by name, for the functions that take them traced.
        steps_per_epoch: without the incomplete last batch.
        sums: see :func:`experiments.evaluation.make_sums`.
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
        self.values = {name: getattr(self.config, name) for name in HYPERPARAMETERS}
        self.dataset = dataset._replace(
            train=self._on_devices(dataset.train),
            validation=self._on_devices(dataset.validation),
            test=self._on_devices(dataset.test),
        )
        self._init, self._apply = _model(config, dataset, self._statistics_axis)
        self._prepare = _prepare(self.config, self.dataset)
        streamed = isinstance(dataset.train, data.Stream)
        self.sums = evaluation.make_sums(self._apply, _normalise(self.dataset))
        self.evaluate = evaluation.make_evaluate(
            self.sums,
            config.microbatch_size or (self.batch_size if streamed else EVALUATION_BATCH_SIZE),
            self.layout,
        )

    def _on_devices(self, split: data.Split | data.Stream) -> Any:
        return split if isinstance(split, data.Stream) else self.layout.put(split)

    @functools.cached_property
    def state(self) -> training.TrainState:
        """The state before the first step, over the devices."""
        key = jax.random.key(self.config.seed)
        return self.layout.make(lambda: self.first_state(key, self.values))

    def first_state(self, key: jax.Array, values: dict[str, Any]) -> training.TrainState:
        """The state before the first step, with a run's key and its hyperparameters."""
        # Keys of their own, so that nothing drawn for one purpose is drawn for another.
        init_key, method_key, key = jax.random.split(key, 3)
        params, stats = self._init(init_key)
        return training.init_state(params, stats, self._method(values, method_key), key)

    def _method(self, values: dict[str, Any], key: jax.Array | int = 0) -> methods.Method:
        config, size = self.config, self.batch_size
        assert config.perturbation is not None
        images: Any = jax.ShapeDtypeStruct((size, *self.dataset.image_shape), jnp.float32)
        integers: Any = jax.ShapeDtypeStruct((size,), jnp.int32)
        return methods.make(
            config.method,
            config.perturbation,
            _optimizer(config, values, self.total_steps),
            values,
            batch_like=training.Batch(images, integers, integers),
            key=key,
            gradient_axis=layout.gradient_axis(config, self.layout),
        )

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
        return launches.InMemory(
            step, self.state, train, self.batch_size, self.steps_at_once, self.layout
        )

    @property
    def steps_at_once(self) -> int:
        """In one launch."""
        # XLA on CPU runs convolutions inside a loop many times slower.
        alone = jax.default_backend() == "cpu" and self.convolutional
        return 1 if alone else min(STEPS_AT_ONCE, self.steps_per_epoch)

    def step(self) -> training.StepOnStored:
        """The training step, on stored images and over all devices."""
        step = over_devices(self._step_of_one(self.values), self._parallelism, self.layout)
        return lambda state, stored: step(state, training.prepared(stored, self._prepare, state))

    def step_with(self, values: dict[str, Any]) -> training.StepOnStored:
        """The same on one device, with hyperparameters that may be traced."""
        step = self._step_of_one(values)
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

    def _step_of_one(self, values: dict[str, Any]) -> training.Step:
        config = self.config
        in_one = self._parallelism == "jit"
        parts = 1 if in_one else self.layout.parts
        return training.make_step(
            self._apply,
            self._method(values),
            training.cross_entropy(config.label_smoothing),
            when=training.whenever(config.start_step, config.every),
            group_size=config.group_size,
            microbatch_size=config.microbatch_size and config.microbatch_size // parts,
            axis_name=None if in_one else layout.DATA,
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


def _optimizer(
    config: Config, values: dict[str, Any], total_steps: int
) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(values["learning_rate"], total_steps)
    if config.base == "adamw":
        return optax.adamw(schedule, weight_decay=values["weight_decay"])
    return optax.chain(
        optax.add_decayed_weights(values["weight_decay"]),
        optax.sgd(schedule, momentum=values["momentum"]),
    )


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
