"""Where the curvature settles in training with the full batch: the edge of stability, SAM's edge.

References:
    Cohen et al., `Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability
    <https://arxiv.org/abs/2103.00065>`_, 2021. Long and Bartlett, `Sharpness-Aware Minimization and
    the Edge of Stability <https://arxiv.org/abs/2309.12488>`_, 2024
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bisam_jax
from experiments import data
from experiments.data import Source, Split
from experiments.step.augmentation import normalise
from experiments.system import progress
from experiments.system.command_line import ArgumentError

GRADIENT_DESCENT, SAM, BISAM_LOG, BISAM_TANH = "gd", "sam", "bisam-log", "bisam-tanh"
METHODS_AT_THE_EDGE = (GRADIENT_DESCENT, SAM, BISAM_LOG, BISAM_TANH)
# Enough for a residual far below the distance of the two edges.
_MATVECS = 20


class Curvature(NamedTuple):
    """The curvature of one network at one step.

    Attributes:
        method: name of the method.
        seed: random seed.
        step: number of steps so far.
        loss: the training loss.
        error: share of wrong predictions on the training examples.
        gradient: norm of the gradient.
        eigenvalue: largest eigenvalue of the Hessian, its norm unless a negative one is larger.
        residual: residual of the eigenvalue.
        sams_edge: where SAM's edge is for this gradient; the edge of stability for gradient
            descent.
    """

    method: str
    seed: int
    step: int
    loss: float
    error: float
    gradient: float
    eigenvalue: float
    residual: float
    sams_edge: float


class Setting(NamedTuple):
    """A training with the full batch.

    Attributes:
        loss: "squared": half of the squared distance of the outputs to the one-hot labels; or
            "logistic": the cross-entropy.
        learning_rate: step size.
        rho: radius of the perturbation.
        steps: number of steps.
        every: number of steps between two measurements.
        widths: numbers of hidden units.
    """

    loss: Literal["squared", "logistic"]
    learning_rate: float
    rho: float
    steps: int
    every: int
    widths: tuple[int, ...]


def sams_edge(gradient: Any, learning_rate: float, rho: float) -> Any:
    r"""Returns the norm of the Hessian at which SAM neither contracts nor diverges.

    .. math:: \frac{\lVert g \rVert}{2 \rho}
        \left(\sqrt{1 + \frac{8 \rho}{\eta \lVert g \rVert}} - 1\right)

    It tends to the edge of stability, :math:`2 / \eta`, for a small radius or a large gradient.

    Args:
        gradient: norm of the gradient, greater than 0.
        learning_rate: step size.
        rho: radius of the perturbation; 0 is gradient descent.
    """
    if rho == 0:
        return np.full_like(gradient, 2 / learning_rate)
    return gradient / (2 * rho) * (np.sqrt(1 + 8 * rho / (learning_rate * gradient)) - 1)


def curvature_along(
    source: Source, methods: Sequence[str], seeds: int, setting: Setting
) -> tuple[list[Curvature], int]:
    """Trains a deep perceptron with the full batch, and measures its curvature along the way.

    Args:
        source: the data set; its training part is the batch.
        methods: names of `METHODS_AT_THE_EDGE`.
        seeds: number of initializations.
        setting: loss, step size, radius and length.

    Returns:
        The curvatures, and the number of examples.

    Raises:
        ArgumentError: if the data set is streamed.
        DatasetError: if the data set is not there.
    """
    dataset = data.load(source)
    if dataset.train.streamed:
        raise ArgumentError("the data set must fit in memory: every step takes all of it")
    split = cast(Split, dataset.train)
    images = normalise(jnp.asarray(split.images), dataset.mean, dataset.std)
    batch = (images.reshape(len(images), -1), jnp.asarray(split.labels))
    sizes = (batch[0].shape[1], *setting.widths, dataset.classes)
    keys = jnp.stack([jax.random.key(seed) for seed in range(seeds)])
    found: list[Curvature] = []
    with progress.shown(len(methods) * setting.steps, "step") as bar:
        for method in methods:
            transformation, advance = _training(method, setting, batch)
            params = jax.vmap(lambda key: _initial(key, sizes))(keys)
            state = jax.vmap(transformation.init)(params)
            measure = jax.jit(jax.vmap(lambda p: _measured(p, batch, setting.loss)))
            for step in range(0, setting.steps + 1, setting.every):
                found += _rows(method, step, jax.device_get(measure(params)), setting)
                if step < setting.steps:
                    params, state = advance(params, state)
                    bar.advance(setting.every)
    return found, len(images)


def _initial(key: jax.Array, sizes: Sequence[int]) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (n_in, n_out)) / np.sqrt(n_in), "b": jnp.zeros(n_out)}
        for k, (n_in, n_out) in zip(keys, itertools.pairwise(sizes), strict=True)
    ]


def _outputs(params: Any, images: jax.Array) -> jax.Array:
    """Returns the outputs of a perceptron with tanh units, float32[examples, classes]."""
    x = images
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def _loss(outputs: jax.Array, labels: jax.Array, name: str) -> jax.Array:
    if name == "logistic":
        return optax.losses.softmax_cross_entropy_with_integer_labels(outputs, labels)
    targets = jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype)
    return 0.5 * jnp.square(outputs - targets).sum(-1)


def _training(method: str, setting: Setting, batch: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    """Returns the transformation, and the function that advances all seeds to the next one."""
    base = optax.sgd(setting.learning_rate)
    perturbed = method != GRADIENT_DESCENT
    tx = optax.chain(bisam_jax.sam(setting.rho), base) if perturbed else base

    def loss(params: Any, batch: Any) -> jax.Array:
        return _loss(_outputs(params, batch[0]), batch[1], setting.loss)

    def q(params: Any, batch: Any) -> jax.Array:
        outputs, labels = _outputs(params, batch[0]), batch[1]
        if method == BISAM_LOG:
            return bisam_jax.perturbation_loss(outputs, labels)
        bound = bisam_jax.tanh_lower_bound
        return bisam_jax.perturbation_loss(outputs, labels, lower_bound=bound)

    ascended = q if method in (BISAM_LOG, BISAM_TANH) else None

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        if perturbed:
            step_of = bisam_jax.value_and_grad(tx, loss, ascended)
            _, updates, state = step_of(params, state, batch)
        else:
            gradient = jax.grad(lambda at: loss(at, batch).mean())(params)
            updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def advance(params: Any, state: Any) -> Any:
        return jax.lax.fori_loop(0, setting.every, lambda _, carry: step(*carry), (params, state))

    return tx, jax.jit(jax.vmap(advance), donate_argnums=(0, 1))


def _measured(params: Any, batch: Any, name: str) -> tuple[jax.Array, ...]:
    def loss(params: Any, batch: Any) -> jax.Array:
        return _loss(_outputs(params, batch[0]), batch[1], name)

    gradient = jax.grad(lambda at: loss(at, batch).mean())(params)
    top = bisam_jax.hessian_eigenvalues(loss, params, batch, 1, key=0, num_matvecs=_MATVECS)
    outputs = _outputs(params, batch[0])
    return (
        _loss(outputs, batch[1], name).mean(),
        (outputs.argmax(-1) != batch[1]).mean(),
        jnp.asarray(optax.tree.norm(gradient)),
        top.values[0],
        top.residuals[0],
    )


def _rows(
    method: str, step: int, measured: tuple[np.ndarray, ...], setting: Setting
) -> list[Curvature]:
    gradient = np.asarray(measured[2], np.float64)
    rho = 0.0 if method == GRADIENT_DESCENT else setting.rho
    edge = sams_edge(gradient, setting.learning_rate, rho)
    columns = [np.asarray(column, np.float64).tolist() for column in (*measured, edge)]
    return [
        Curvature(method, seed, step, *values)
        for seed, values in enumerate(zip(*columns, strict=True))
    ]
