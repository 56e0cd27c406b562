"""Attacks on images: projected gradient descent in l-infinity and l2 balls.

Pixels are in [0, 1], and the normalization is part of the network.

References:
    Madry et al., `Towards Deep Learning Models Resistant to Adversarial Attacks
    <https://arxiv.org/abs/1706.06083>`_, 2018, for the attack. Zhang et al., `On the Duality
    Between Sharpness-Aware Minimization and Adversarial Training
    <https://arxiv.org/abs/2402.15152>`_, 2024, for the radii and the steps.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import DatasetError, white_of
from experiments.measures.trained import Trained, over_seeds
from experiments.step.attack import LEVELS, ascended, random_start, usual_step
from experiments.step.evaluation import Predict

CROSS_ENTROPY, MARGIN, WORST = "cross-entropy", "margin", "worst"


class Attack(NamedTuple):
    """An attack.

    Attributes:
        norm: "linf" or "l2".
        radius: in units of 1/255.
        step: step size in units of 1/255.
        steps: number of gradients.
        losses: ascended losses: "cross-entropy", "margin".
        restarts: number of random starts for each loss.
    """

    norm: Literal["linf", "l2"]
    radius: float
    step: float
    steps: int = 10
    losses: tuple[str, ...] = (CROSS_ENTROPY, MARGIN)
    restarts: int = 2


def usual_attack(norm: Literal["linf", "l2"], radius: float, **changed: Any) -> Attack:
    """Returns the attack with the usual step size."""
    return Attack(norm, radius, usual_step(norm, radius), **changed)


class Attacker:
    """Attacks the networks of all seeds at once.

    Args:
        trained: the networks, with test examples.

    Attributes:
        clean_accuracy: the accuracies without an attack, float64[seeds].

    Raises:
        DatasetError: if the examples are not images.
    """

    def __init__(self, trained: Trained) -> None:
        self._predict = trained.predict
        self._white = white_of(trained.recipe.dataset)
        if trained.test.images.ndim != 4:
            raise DatasetError(
                f"{trained.recipe.dataset} has texts, not images: there are no pixels to attack"
            )
        self._networks = (trained.params, trained.stats)
        self._labels = jnp.asarray(trained.test.labels)
        pixels = jnp.asarray(trained.test.images, jnp.float32) / self._white
        self._clean = jnp.broadcast_to(pixels[None], (len(trained.seeds), *pixels.shape))
        self.clean_accuracy = self.right(self._clean).mean(-1)

    def accuracies(self, attack: Attack, source: "Attacker | None" = None) -> dict[str, np.ndarray]:
        """Returns the accuracies under an attack, float64[seeds] by loss.

        An example counts as right if it is right after every restart; under "worst", after every
        restart with every loss.

        Args:
            attack: the attack.
            source: attacks its own networks, of the same seeds, instead of these.
        """
        right = {}
        for loss in attack.losses:
            attacked = ((source or self).images(attack, loss, n) for n in range(attack.restarts))
            right[loss] = np.all([self.right(pixels) for pixels in attacked], axis=0)
        right[WORST] = np.all(list(right.values()), axis=0)
        return {name: values.mean(-1) for name, values in right.items()}

    def right(self, pixels: jax.Array) -> np.ndarray:
        """Returns which predictions are right, bool[seeds, examples].

        Args:
            pixels: float32[seeds, examples, height, width, channels], from 0 to 1.
        """
        program = _right(self._predict, self._white)
        return np.asarray(program(*self._networks, pixels, self._labels))

    def images(self, attack: Attack, loss: str, restart: int) -> jax.Array:
        """Returns attacked pixels, float32[seeds, examples, height, width, channels].

        Args:
            attack: the attack.
            loss: the ascended loss.
            restart: number of the random start.
        """
        radius, step = (jnp.float32(x / LEVELS) for x in (attack.radius, attack.step))
        key = jax.random.fold_in(jax.random.key(0), restart)
        at = random_start(key, self._clean, attack.norm, radius)
        program = _step(self._predict, self._white, attack.norm, loss)
        for _ in range(attack.steps):
            at = program(*self._networks, self._clean, at, self._labels, radius, step)
        return at


# Programs are compiled once for all networks, radii and numbers of steps.


@functools.cache
def _right(predict: Predict, white: int) -> Callable:
    """Returns the program that says which predictions are right."""

    def right(params: Any, stats: Any, pixels: jax.Array, labels: jax.Array) -> jax.Array:
        return predict(params, stats, white * pixels).argmax(-1) == labels

    return over_seeds(right, (0, 0, 0, 0))


@functools.cache
def _step(predict: Predict, white: int, norm: str, loss: str) -> Callable:
    """Returns the program of one step of an attack."""

    def step(params: Any, stats: Any, clean: Any, at: Any, labels: Any, *sizes: Any) -> Any:
        def total(pixels: jax.Array) -> jax.Array:
            return _LOSSES[loss](predict(params, stats, white * pixels), labels).sum()

        return ascended(clean, at, jax.grad(total)(at), norm, *sizes)

    return over_seeds(step, (0, 0, 0, 0, 0, None, None))


def margin_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns how far another class is above the label's, float32[examples].

    References:
        Carlini and Wagner, `Towards Evaluating the Robustness of Neural Networks
        <https://arxiv.org/abs/1608.04644>`_, 2017
    """
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    own = jnp.where(is_label, logits, -jnp.inf).max(-1)
    return jnp.where(is_label, -jnp.inf, logits).max(-1) - own


_LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    CROSS_ENTROPY: optax.losses.softmax_cross_entropy_with_integer_labels,
    MARGIN: margin_loss,
}
