"""Many runs in one compiled program: replicas that differ in seed and hyperparameters.

A run is a pure function of its key, its labels and its hyperparameters, so `jax.vmap` over these
trains many runs at once. Each replica gets the same numbers as a separate run.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.config.hyperparameters import STRUCTURAL
from experiments.config.recipe import Recipe
from experiments.data import Dataset, Split
from experiments.models.convolution import products_on_all_devices
from experiments.run.experiment import Experiment
from experiments.step.epochs import Steps, steps_on
from experiments.step.feeds import InMemory, windows
from experiments.step.train_step import TrainState
from experiments.system import machine

_AXIS = "replicas"


class Inputs(NamedTuple):
    """The differences between replicas. The first axis of every array is the replica.

    Attributes:
        keys: Key[replicas].
        values: float32[replicas] by name, for hyperparameters that do not change the program.
        train_labels: int32[replicas, examples].
        validation_labels: int32[replicas, examples].
    """

    keys: jax.Array
    values: dict[str, jax.Array]
    train_labels: jax.Array
    validation_labels: jax.Array


class Population(NamedTuple):
    """The replicas after an epoch. The first axis of every array is the replica.

    Attributes:
        state: the state of training.
        accuracy: float32[replicas], the best validation accuracy so far; -1 before the first epoch.
        params: parameters of the best epoch, the last one if several are equal.
        stats: batch statistics of the best epoch.
    """

    state: TrainState
    accuracy: jax.Array
    params: Any
    stats: Any


class Epoch(NamedTuple):
    """The metrics of an epoch, float64[replicas] each.

    Attributes:
        loss: mean training loss over the steps.
        validation_accuracy: accuracy after the epoch; NaN if a logit is not finite.
        validation_loss: loss after the epoch.
    """

    loss: np.ndarray
    validation_accuracy: np.ndarray
    validation_loss: np.ndarray


class Labels(NamedTuple):
    """The labels of one seed, int32[examples] each. With label noise they differ between seeds."""

    train: np.ndarray
    validation: np.ndarray


def inputs_of(recipes: Sequence[Recipe], labels: Mapping[int, Labels]) -> Inputs:
    """Returns the inputs of replicas.

    Args:
        recipes: one per replica, equal except for `seed` and the hyperparameters not in
            `STRUCTURAL`.
        labels: labels by seed.
    """
    names = [name for name in recipes[0].hyperparameters if name not in STRUCTURAL]
    train, validation = zip(*(labels[recipe.seed] for recipe in recipes), strict=True)
    return Inputs(
        keys=jnp.stack([jax.random.key(recipe.seed) for recipe in recipes]),
        values={
            name: jnp.asarray([r.hyperparameters[name] for r in recipes], jnp.float32)
            for name in names
        },
        train_labels=jnp.stack(train),
        validation_labels=jnp.stack(validation),
    )


def labels_of(dataset: Dataset) -> Labels:
    """Returns the labels of a data set in memory."""
    train, validation, *_ = cast(tuple[Split, ...], dataset)
    return Labels(train.labels, validation.labels)


class Replicas:
    """The compiled program of several replicas.

    Args:
        experiment: one of the replicas, on one device, with its splits in memory.
        count: number of replicas, a multiple of the number of devices.
        at_once: whether a device computes its replicas at once, by `jax.vmap`. Otherwise each
            device has one replica and the program of a single run.
        devices: devices that share the replicas; by default the first device.

    Attributes:
        count: see Args.
        at_once: see Args.
        example: inputs of `count` replicas, each equal to the experiment.
        bytes: memory of the replicas on each device.
    """

    def __init__(
        self,
        experiment: Experiment,
        count: int,
        *,
        at_once: bool = True,
        devices: Sequence[Any] | None = None,
    ) -> None:
        self._experiment, self.at_once, self.count = experiment, at_once, count
        mesh = Mesh(np.asarray(devices or jax.devices()[:1]), _AXIS)
        self._mesh, self._split = mesh, NamedSharding(mesh, P(_AXIS))
        whole = NamedSharding(mesh, P())
        # The experiment's arrays, which are on a device already: not a second copy.
        train, validation, test = (
            cast(InMemory, feed).split
            for feed in (experiment.train, experiment.validation, experiment.test)
        )
        self._train_images, self._validation_images, self._test = jax.device_put(
            (train.images, validation.images, test), whole
        )
        recipe = experiment.recipe
        labels = {recipe.seed: labels_of(experiment.dataset)}
        self.example = inputs = self.inputs([recipe] * count, labels)
        self._steps_at_once = experiment.steps_at_once
        self._first = self._jit(self._first_of_one, (0, 0))
        self._order = self._jit(self._order_of_one, (0, None))
        self._sums = self._jit(experiment.sums, (0, 0, None, 0, None))
        self._sums_of_test = self._jit(experiment.sums, (0, 0, None, None, None))
        self._keep_best = self._jit(_keep_best, (0, 0), donated=(0,))
        launch = self._jit(self._launch_of_one, (0, 0, None, 0, 0, None, None), donated=(0,))

        def shapes(tree: Any) -> Any:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._split), tree
            )

        population = shapes(jax.eval_shape(self._first, inputs.keys, inputs.values))
        number = np.int32(0)
        order = shapes(jax.eval_shape(self._order, population.state, number))
        self._launch = launch.lower(
            population.state,
            inputs.values,
            self._train_images,
            inputs.train_labels,
            order,
            number,
            number,
        ).compile()
        best = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(population.params))
        self.bytes = machine.program_bytes(self._launch) + best // mesh.size

    def inputs(self, recipes: Sequence[Recipe], labels: Mapping[int, Labels]) -> Inputs:
        """Returns the inputs of at most `count` recipes, filled up with the last one."""
        filled = [*recipes, *[recipes[-1]] * (self.count - len(recipes))]
        return jax.device_put(inputs_of(filled, labels), self._split)

    def first(self, inputs: Inputs) -> Population:
        """Returns the replicas before the first epoch."""
        return self._first(inputs.keys, inputs.values)

    def epoch(
        self, population: Population, inputs: Inputs, number: int
    ) -> tuple[Population, Epoch]:
        """Trains epoch `number`, from 0; returns the next population. Donates `population`."""
        steps = self._experiment.steps_per_epoch
        state, losses = population.state, []
        order = self._order(state, np.int32(number))
        for start in range(number * steps, (number + 1) * steps, self._steps_at_once):
            stop = min(start + self._steps_at_once, (number + 1) * steps)
            state, of_steps = self._launch(
                state,
                inputs.values,
                self._train_images,
                inputs.train_labels,
                order,
                np.int32(start),
                np.int32(stop),
            )
            losses.append(of_steps[:, : stop - start])
        validation = Split(self._validation_images, inputs.validation_labels)
        accuracy, loss = self._means(self._sums, state.params, state.stats, validation)
        better = jax.device_put(accuracy.astype(np.float32), self._split)
        population = self._keep_best(population._replace(state=state), better)
        mean = np.concatenate([np.asarray(x, np.float64) for x in losses], axis=1).mean(1)
        return population, Epoch(mean, accuracy, loss)

    def test(self, population: Population) -> np.ndarray:
        """Returns test accuracies of the best and of the last epochs, float64[replicas, 2]."""
        state = population.state
        both = ((population.params, population.stats), (state.params, state.stats))
        accuracies = [self._means(self._sums_of_test, *kept, self._test)[0] for kept in both]
        return np.stack(accuracies, axis=-1)

    def _jit(self, function: Callable, axes: Sequence[int | None], donated: Any = ()) -> Callable:
        """Jits a function of one replica for all. `axes` are the replica axes of its arguments."""
        mapped = _of_the_only_one(function, axes)
        if self.at_once:
            mapped = products_on_all_devices()(jax.vmap(function, axes))
        specs = tuple(P() if axis is None else P(_AXIS) for axis in axes)
        over_devices = jax.shard_map(
            mapped, mesh=self._mesh, in_specs=specs, out_specs=P(_AXIS), check_vma=False
        )
        return jax.jit(over_devices, donate_argnums=donated)

    def _first_of_one(self, key: jax.Array, values: dict[str, jax.Array]) -> Population:
        experiment = self._experiment
        state = experiment.state_of(key, {**experiment.recipe.hyperparameters, **values})
        # Copies: the state is donated.
        best = jax.tree.map(jnp.copy, (state.params, state.stats))
        return Population(state, jnp.float32(-1), *best)

    def _steps_with(self, values: dict[str, jax.Array]) -> Steps:
        experiment = self._experiment
        return steps_on(
            experiment.step_of({**experiment.recipe.hyperparameters, **values}),
            experiment.train.examples,
            experiment.recipe.batch_size,
            self._steps_at_once,
        )

    def _order_of_one(self, state: TrainState, epoch: jax.Array) -> jax.Array:
        return self._steps_with({}).order_of(state, epoch)

    def _launch_of_one(
        self,
        state: TrainState,
        values: dict[str, jax.Array],
        images: jax.Array,
        labels: jax.Array,
        order: jax.Array,
        start: jax.Array,
        stop: jax.Array,
    ) -> tuple[TrainState, jax.Array]:
        split = Split(images, labels)
        return self._steps_with(values).launch(state, split, order, start, stop)

    def _means(
        self, sums: Callable, params: Any, stats: Any, split: Split
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns accuracies and losses on a split, float64[replicas]."""
        examples = len(split.images)
        # The size in training fits in memory: training takes more per example.
        size = self._experiment.recipe.microbatch_size
        totals = [
            sums(params, stats, split.images[part], split.labels[..., part], counted)
            for part, counted in windows(examples, size)
        ]
        means = np.sum([np.asarray(total, np.float64) for total in totals], axis=0) / examples
        return means[:, 0], means[:, 1]


def _of_the_only_one(function: Callable, axes: Sequence[int | None]) -> Callable:
    """Acts as `jax.vmap` over one replica, but leaves its axis out of the program."""

    def first(argument: Any, axis: int | None) -> Any:
        return argument if axis is None else jax.tree.map(lambda x: x[0], argument)

    def mapped(*arguments: Any) -> Any:
        result = function(*map(first, arguments, axes))
        return jax.tree.map(lambda x: x[None], result)

    return mapped


def _keep_best(population: Population, accuracy: jax.Array) -> Population:
    # The later of two equal epochs is better. NaN is never better.
    better = accuracy >= population.accuracy
    params, stats = jax.tree.map(
        lambda new, old: jnp.where(better, new, old),
        (population.state.params, population.state.stats),
        (population.params, population.stats),
    )
    return Population(
        population.state, jnp.where(better, accuracy, population.accuracy), params, stats
    )
