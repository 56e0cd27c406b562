"""Sharpness and curvature of trained networks.

Batch statistics are the running ones, and they stay fixed: what is measured is a function of the
parameters only. Nothing is dropped out.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bisam_jax
from experiments.measures.trained import Trained, over_seeds
from experiments.system import machine
from experiments.system.command_line import ArgumentError

ONE_STEP, WORST, RANDOM = "one step", "worst case", "random"
PLAIN_BALL, ADAPTIVE_BALL = "l2", "adaptive l2"
SHARE_OF_MEMORY = 0.8


class Finding(NamedTuple):
    """One measured number of one network.

    Attributes:
        network: name of the networks that differ only in their seed.
        seed: random seed.
        quantity: what was measured.
        ball: "l2", "adaptive l2", or "" for what has no ball.
        at: radius, number of an eigenvalue, place in a spectrum or in a slice; NaN for one number.
        value: the number.
        uncertainty: its standard error, or the residual of an eigenvalue; NaN if it is exact.
    """

    network: str
    seed: int
    quantity: str
    ball: str
    at: float
    value: float
    uncertainty: float


@dataclasses.dataclass(frozen=True)
class Measures:
    """What to measure.

    Attributes:
        radii: radii of l2 balls.
        adaptive_radii: radii of adaptive l2 balls.
        steps: number of gradients of the ascent to the worst case.
        directions: number of random directions.
        eigenvalues: number of largest eigenvalues.
        num_matvecs: number of products with the Hessian, for the eigenvalues and for each probe of
            the spectrum.
        normalised_logits: whether the logits are normalized.
        microbatch_size: number of examples in memory at a time; None for all.
    """

    radii: tuple[float, ...]
    adaptive_radii: tuple[float, ...]
    steps: int
    directions: int
    eigenvalues: int
    num_matvecs: int
    normalised_logits: bool
    microbatch_size: int | None


Loss = Callable[[Any, Any], jax.Array]


def normalised(logits: jax.Array) -> jax.Array:
    """Returns logits of mean 0 and variance 1 per example: a larger scale has no smaller loss.

    Args:
        logits: float[examples, classes].

    References:
        Andriushchenko et al., `A Modern Look at the Relationship between Sharpness and
        Generalization <https://arxiv.org/abs/2302.07011>`_, 2023
    """
    centered = logits - logits.mean(-1, keepdims=True)
    variance = jnp.square(centered).mean(-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.where(variance > 0, variance, 1.0))


def loss_of(trained: Trained, stats: Any, normalised_logits: bool) -> Loss:
    """Returns `loss(params, (images, labels))`: the cross-entropy, float32[examples].

    There is no label smoothing, so that runs with and without it can be compared.
    """

    def loss(params: Any, batch: Any) -> jax.Array:
        images, labels = batch
        logits = trained.experiment.predict(params, stats, images)
        logits = normalised(logits) if normalised_logits else logits
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)

    return loss


def measured_sharpness(trained: Trained, measures: Measures) -> list[Finding]:
    """Measures losses and errors, and how they rise in balls around the parameters."""
    found = list(_clean(trained, measures))
    for ball, radii in (
        (PLAIN_BALL, measures.radii),
        (ADAPTIVE_BALL, measures.adaptive_radii),
    ):
        for quantity, function in (
            (ONE_STEP, _rises(trained, measures, ball, 1)),
            (WORST, _rises(trained, measures, ball, measures.steps)),
            (RANDOM, _random(trained, measures, ball)),
        ):
            for rho in radii if function else ():
                rises = jax.device_get(function(*_arguments(trained), jnp.float32(rho)))
                for name, (values, errors) in rises.items():
                    what = f"{name}, {quantity}"
                    found += _numbers(trained, what, ball, rho, values, errors)
    return found


def measured_curvature(trained: Trained, measures: Measures) -> list[Finding]:
    """Measures the largest eigenvalues and the trace of the Hessian.

    Raises:
        ArgumentError: if the products do not fit in memory.
    """
    size = _size(trained)
    depth = min(measures.num_matvecs, size)
    _check_memory(trained, depth)

    def curvature(params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> Any:
        loss = loss_of(trained, stats, measures.normalised_logits)
        rest = ((images, labels),)
        shared: Any = {"key": 0, "microbatch_size": measures.microbatch_size}
        top = bisam_jax.hessian_eigenvalues(
            loss, params, *rest, min(measures.eigenvalues, depth), num_matvecs=depth, **shared
        )
        trace = bisam_jax.hessian_trace(
            loss, params, *rest, num_samples=measures.directions, **shared
        )
        return top, trace

    top, trace = jax.device_get(over_seeds(trained, curvature, _AXES)(*_arguments(trained)))
    found = []
    for number in range(top.values.shape[1]):
        values, residuals = top.values[:, number], top.residuals[:, number]
        found += _numbers(trained, "eigenvalue", "", number + 1, values, residuals)
    return found + _numbers(trained, "trace", "", np.nan, trace.mean, trace.standard_error)


def measured_spectrum(
    trained: Trained, measures: Measures, grid: np.ndarray, width: float
) -> list[Finding]:
    """Measures the density of the eigenvalues of the Hessian on a grid.

    Args:
        trained: the networks.
        measures: what to measure.
        grid: float[points].
        width: standard deviation of the smoothing.
    """
    depth = min(measures.num_matvecs, _size(trained))

    def density(params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> Any:
        return bisam_jax.spectral_density(
            loss_of(trained, stats, measures.normalised_logits),
            params,
            (images, labels),
            grid=jnp.asarray(grid, jnp.float32),
            width=width,
            key=1,
            num_matvecs=depth,
            microbatch_size=measures.microbatch_size,
        )

    mean, errors = jax.device_get(over_seeds(trained, density, _AXES)(*_arguments(trained)))
    found = []
    for place, at in enumerate(grid.tolist()):
        found += _numbers(trained, "density", "", at, mean[:, place], errors[:, place])
    return found


_AXES = (0, 0, None, 0)


def _arguments(trained: Trained) -> tuple[Any, ...]:
    return trained.params, trained.stats, trained.train.images, trained.train.labels


def _error(
    trained: Trained, params: Any, stats: Any, images: jax.Array, labels: jax.Array
) -> jax.Array:
    return (trained.experiment.predict(params, stats, images).argmax(-1) != labels).mean()


def _clean(trained: Trained, measures: Measures) -> Iterator[Finding]:
    def clean(params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> Any:
        loss = loss_of(trained, stats, measures.normalised_logits)(params, (images, labels))
        return loss.mean(), _error(trained, params, stats, images, labels)

    function = over_seeds(trained, clean, _AXES)
    loss, error = jax.device_get(function(*_arguments(trained)))
    yield from _numbers(trained, "loss", "", np.nan, loss)
    yield from _numbers(trained, "error", "", np.nan, error)
    test = (trained.params, trained.stats, *trained.test)
    yield from _numbers(trained, "test error", "", np.nan, jax.device_get(function(*test))[1])


def _ball(name: str, rho: Any) -> optax.GradientTransformation:
    # Without the usual eta, rescaling the layers of a network changes nothing.
    return bisam_jax.l2_ball(rho) if name == PLAIN_BALL else bisam_jax.adaptive_l2_ball(rho, eta=0)


def _rises(trained: Trained, measures: Measures, ball: str, steps: int) -> Any:
    """Returns the rise of loss and error at the point that an ascent finds."""

    def rises(params: Any, stats: Any, images: jax.Array, labels: jax.Array, rho: jax.Array) -> Any:
        rise, point = bisam_jax.sharpness(
            loss_of(trained, stats, measures.normalised_logits),
            params,
            (images, labels),
            _ball(ball, rho),
            steps=steps,
            microbatch_size=measures.microbatch_size,
        )
        there, here = (_error(trained, at, stats, images, labels) for at in (point, params))
        return {"rise of the loss": (rise, jnp.nan), "rise of the error": (there - here, jnp.nan)}

    return over_seeds(trained, rises, (*_AXES, None))


def _random(trained: Trained, measures: Measures, ball: str) -> Any:
    """Returns the mean rise of the loss in random directions."""

    def rises(params: Any, stats: Any, images: jax.Array, labels: jax.Array, rho: jax.Array) -> Any:
        mean = bisam_jax.average_sharpness(
            loss_of(trained, stats, measures.normalised_logits),
            params,
            (images, labels),
            _ball(ball, rho),
            key=2,
            num_samples=measures.directions,
            microbatch_size=measures.microbatch_size,
        )
        return {"rise of the loss": tuple(mean)}

    return over_seeds(trained, rises, (*_AXES, None))


def _numbers(
    trained: Trained, quantity: str, ball: str, at: float, values: Any, errors: Any = np.nan
) -> list[Finding]:
    errors = np.broadcast_to(errors, np.shape(values))
    return [
        Finding(trained.name, seed, quantity, ball, float(at), float(value), float(error))
        for seed, value, error in zip(trained.seeds, values, errors, strict=True)
    ]


def _size(trained: Trained) -> int:
    return sum(x.size for x in jax.tree.leaves(trained.params)) // len(trained.seeds)


def _check_memory(trained: Trained, depth: int) -> None:
    """Refuses more Lanczos vectors than fit."""
    at_once = 1 if trained.convolutional else len(trained.seeds)
    # XLA on CPU holds them twice.
    copies = 2 if jax.default_backend() == "cpu" else 1
    vector = 4 * _size(trained) * at_once * copies
    free = SHARE_OF_MEMORY * machine.free_bytes()
    if depth * vector > free:
        raise ArgumentError(
            f"--num-matvecs {depth} is too many: so many vectors of {_size(trained):,} parameters "
            f"take about {depth * vector / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; at "
            f"most {int(free // vector)} fit"
        )


def grid_of(numbers: Sequence[Finding], points: int) -> tuple[np.ndarray, float]:
    """Returns a grid that covers the spectra of all networks, and the width of the smoothing."""
    largest = max(n.value for n in numbers if n.quantity == "eigenvalue" and n.at == 1)
    grid = np.linspace(-0.25 * largest, 1.15 * largest, points)
    return grid, 1.5 * float(grid[1] - grid[0])
