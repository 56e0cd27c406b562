"""Sharpness and curvature of trained networks.

Batch statistics are the running ones, and they stay fixed: what is measured is a function of the
parameters only. Nothing is dropped out.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bisam_jax
from experiments.measures.findings import Finding, Measures
from experiments.measures.trained import Trained, over_seeds
from experiments.step.evaluation import Predict
from experiments.system import machine
from experiments.system.command_line import ArgumentError

ONE_STEP, WORST, RANDOM = "one step", "worst case", "random"
PLAIN_BALL, ADAPTIVE_BALL = "l2", "adaptive l2"
SHARE_OF_MEMORY = 0.8


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


def loss_of(predict: Predict, stats: Any, normalised_logits: bool) -> Loss:
    """Returns `loss(params, (images, labels))`: the cross-entropy, float32[examples].

    There is no label smoothing, so that runs with and without it can be compared.
    """

    def loss(params: Any, batch: Any) -> jax.Array:
        images, labels = batch
        logits = predict(params, stats, images)
        logits = normalised(logits) if normalised_logits else logits
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)

    return loss


def measured_sharpness(trained: Trained, measures: Measures) -> list[Finding]:
    """Measures losses and errors, and how they rise in balls around the parameters."""
    how = (trained.predict, measures)
    arguments = (trained.params, trained.stats, *trained.train)
    loss, error = jax.device_get(_clean(*how)(*arguments))
    _, test = jax.device_get(_clean(*how)(trained.params, trained.stats, *trained.test))
    found = []
    for name, values in (("loss", loss), ("error", error), ("test error", test)):
        found += _findings(trained, name, "", np.nan, values)
    for ball, radii in ((PLAIN_BALL, measures.radii), (ADAPTIVE_BALL, measures.adaptive_radii)):
        programs = {
            ONE_STEP: _rises(*how, ball, 1),
            WORST: _rises(*how, ball, measures.steps),
            RANDOM: _random(*how, ball),
        }
        for (quantity, program), rho in itertools.product(programs.items(), radii):
            rises = jax.device_get(program(*arguments, jnp.float32(rho)))
            for name, (values, errors) in rises.items():
                found += _findings(trained, f"{name}, {quantity}", ball, rho, values, errors)
    return found


def measured_curvature(trained: Trained, measures: Measures) -> list[Finding]:
    """Measures the largest eigenvalues and the trace of the Hessian.

    Raises:
        ArgumentError: if the products do not fit in memory.
    """
    depth = min(measures.num_matvecs, _size(trained))
    _check_memory(trained, depth)
    program = _curvature(trained.predict, measures, depth)
    top, trace = jax.device_get(program(trained.params, trained.stats, *trained.train))
    found = []
    for number in range(top.values.shape[1]):
        values, residuals = top.values[:, number], top.residuals[:, number]
        found += _findings(trained, "eigenvalue", "", number + 1, values, residuals)
    return found + _findings(trained, "trace", "", np.nan, trace.mean, trace.standard_error)


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
    program = _density(trained.predict, measures, depth)
    arguments = (trained.params, trained.stats, *trained.train)
    mean, errors = jax.device_get(program(*arguments, jnp.float32(grid), jnp.float32(width)))
    found = []
    for place, at in enumerate(grid.tolist()):
        found += _findings(trained, "density", "", at, mean[:, place], errors[:, place])
    return found


# Parameters and statistics, images, labels. Programs are compiled once for all networks.
_AXES = (0, 0, None, 0)


def _error(predict: Predict, params: Any, stats: Any, batch: Any) -> jax.Array:
    return (predict(params, stats, batch[0]).argmax(-1) != batch[1]).mean()


@functools.cache
def _clean(predict: Predict, measures: Measures) -> Any:
    """Returns loss and error."""

    def clean(params: Any, stats: Any, *batch: jax.Array) -> Any:
        loss = loss_of(predict, stats, measures.normalised_logits)(params, batch)
        return loss.mean(), _error(predict, params, stats, batch)

    return over_seeds(clean, _AXES)


def _ball(name: str, rho: Any) -> optax.GradientTransformation:
    # Without the usual eta, rescaling the layers of a network changes nothing.
    return bisam_jax.l2_ball(rho) if name == PLAIN_BALL else bisam_jax.adaptive_l2_ball(rho, eta=0)


@functools.cache
def _rises(predict: Predict, measures: Measures, ball: str, steps: int) -> Any:
    """Returns the rise of loss and error at the point that an ascent finds."""

    def rises(params: Any, stats: Any, images: Any, labels: Any, rho: jax.Array) -> Any:
        batch = (images, labels)
        rise, point = bisam_jax.sharpness(
            loss_of(predict, stats, measures.normalised_logits),
            params,
            batch,
            _ball(ball, rho),
            steps=steps,
            microbatch_size=measures.microbatch_size,
        )
        there, here = (_error(predict, at, stats, batch) for at in (point, params))
        return {"rise of the loss": (rise, jnp.nan), "rise of the error": (there - here, jnp.nan)}

    return over_seeds(rises, (*_AXES, None))


@functools.cache
def _random(predict: Predict, measures: Measures, ball: str) -> Any:
    """Returns the mean rise of the loss in random directions."""

    def rises(params: Any, stats: Any, images: Any, labels: Any, rho: jax.Array) -> Any:
        mean = bisam_jax.average_sharpness(
            loss_of(predict, stats, measures.normalised_logits),
            params,
            (images, labels),
            _ball(ball, rho),
            key=2,
            num_samples=measures.directions,
            microbatch_size=measures.microbatch_size,
        )
        return {"rise of the loss": tuple(mean)}

    return over_seeds(rises, (*_AXES, None))


@functools.cache
def _curvature(predict: Predict, measures: Measures, depth: int) -> Any:
    """Returns the largest eigenvalues and the trace."""

    def curvature(params: Any, stats: Any, *batch: jax.Array) -> Any:
        rest = (loss_of(predict, stats, measures.normalised_logits), params, batch)
        shared: Any = {"key": 0, "microbatch_size": measures.microbatch_size}
        k = min(measures.eigenvalues, depth)
        return (
            bisam_jax.hessian_eigenvalues(*rest, k, num_matvecs=depth, **shared),
            bisam_jax.hessian_trace(*rest, num_samples=measures.directions, **shared),
        )

    return over_seeds(curvature, _AXES)


@functools.cache
def _density(predict: Predict, measures: Measures, depth: int) -> Any:
    """Returns the density of the eigenvalues."""

    def density(
        params: Any, stats: Any, images: Any, labels: Any, grid: jax.Array, width: jax.Array
    ) -> Any:
        return bisam_jax.spectral_density(
            loss_of(predict, stats, measures.normalised_logits),
            params,
            (images, labels),
            grid=grid,
            width=width,
            key=1,
            num_matvecs=depth,
            microbatch_size=measures.microbatch_size,
        )

    return over_seeds(density, (*_AXES, None, None))


def _findings(
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
    # XLA on CPU holds them twice.
    copies = 2 if jax.default_backend() == "cpu" else 1
    vector = 4 * _size(trained) * copies
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
