"""How strong a perturbation is: what it does to the loss and to the error of a batch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bisam_jax
from experiments.run.experiment import Experiment
from experiments.run.model import model_of
from experiments.step import augmentation
from experiments.step.train_step import cross_entropy

PerExample = Callable[[jax.Array, jax.Array], jax.Array]
TRAINING_LOSS = "ce"


class Strength(NamedTuple):
    """The numbers of one batch of the training part, or means over several.

    Attributes:
        loss_rise: float32[losses, radii], rise of the training loss at the perturbed parameters.
        error_rise: float32[losses, radii], rise of the share of wrong predictions.
        cosine: float32[losses], cosine between the gradients of the ascended loss and of the
            training loss.
    """

    loss_rise: jax.Array
    error_rise: jax.Array
    cosine: jax.Array


def ascended_losses(
    label_smoothing: float, mus: tuple[float, ...], alphas: tuple[float, ...]
) -> dict[str, PerExample]:
    """Returns the losses to ascend by name; the training loss is the first.

    Args:
        label_smoothing: of the training loss.
        mus: sharpness of the maximum, for both of BiSAM's losses.
        alphas: slopes of the tanh bound.
    """
    losses: dict[str, PerExample] = {TRAINING_LOSS: cross_entropy(label_smoothing)}
    for mu in mus:
        losses[f"log, mu {mu:g}"] = functools.partial(bisam_jax.perturbation_loss, mu=mu)
    for alpha in alphas:
        bound = functools.partial(bisam_jax.tanh_lower_bound, alpha=alpha)
        for mu in mus:
            losses[f"tanh, alpha {alpha:g}, mu {mu:g}"] = functools.partial(
                bisam_jax.perturbation_loss, lower_bound=bound, mu=mu
            )
    return losses


def make_strength(
    experiment: Experiment, losses: Mapping[str, PerExample]
) -> Callable[[Any, Any, jax.Array, jax.Array, jax.Array], Strength]:
    """Returns `strength(params, stats, images, labels, radii)`.

    The images and labels are one batch, which is perturbed by itself as in a training step: batch
    statistics are those of the batch, and every loss is ascended by one step in an l2 ball.

    Args:
        experiment: the model.
        losses: see :func:`ascended_losses`.
    """
    recipe, dataset = experiment.recipe, experiment.dataset
    _, apply = model_of(recipe, dataset)

    def strength(
        params: Any, stats: Any, images: jax.Array, labels: jax.Array, radii: jax.Array
    ) -> Strength:
        pixels = augmentation.normalise(images, dataset.mean, dataset.std)
        keys = jax.random.split(jax.random.key(0), len(labels))

        def logits_of(at: Any) -> jax.Array:
            return apply(at, stats, pixels, train=True, keys=keys)[0]

        def of_logits(loss: PerExample) -> Callable[[Any, Any], jax.Array]:
            return lambda at, labels: loss(logits_of(at), labels)

        def error(at: Any) -> jax.Array:
            return (logits_of(at).argmax(-1) != labels).mean()

        def gradient(loss: Callable) -> Any:
            return jax.grad(lambda at: loss(at, labels).mean())(params)

        descended = of_logits(losses[TRAINING_LOSS])
        plain, clean = gradient(descended), error(params)

        def of_loss(ascended: Callable) -> tuple[jax.Array, jax.Array, jax.Array]:
            def at_radius(rho: jax.Array) -> tuple[jax.Array, jax.Array]:
                rise, point = bisam_jax.sharpness(
                    descended,
                    params,
                    labels,
                    bisam_jax.l2_ball(rho),
                    perturbation_loss_fn=ascended,
                )
                return rise, error(point) - clean

            ours = gradient(ascended)
            product = optax.tree.vdot(plain, ours)
            norms = optax.tree.norm(plain) * optax.tree.norm(ours)
            cosine = jnp.asarray(product / jnp.where(norms > 0, norms, 1.0))
            return *jax.vmap(at_radius)(radii), cosine

        measured = [of_loss(of_logits(loss)) for loss in losses.values()]
        return Strength(*map(jnp.stack, zip(*measured, strict=True)))

    return strength
