"""Every method of the library, once: a method added here is in every test of the contract."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import bisam_jax
from tests.problems import (
    cross_entropy,
    logits_of_batch,
    losses_of_batch,
    mlp_batch,
    perturbation_loss_of_batch,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """How to make a method, and its properties.

    Attributes:
        make: maps rho to the transformation.
        loss_calls: number of calls of `loss_fn`, without the gradient at the parameters.
        needs_clean: whether it uses the gradient of L even with Q.
        state_bytes: bytes of state per weight, in float32.
        takes_grad_fn: whether it takes `grad_fn` in place of `loss_fn`.
        takes_gradient_of_q: whether it takes `perturbation_grads`.
        needs_q: whether it requires Q.
        examples: whether it uses single examples.
        contains_optimizer: whether it returns updates instead of gradients.
        structural: the hyperparameters that cannot be traced.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    loss_calls: int = 1
    needs_clean: bool = False
    state_bytes: int = 0
    takes_grad_fn: bool = True
    takes_gradient_of_q: bool = True
    needs_q: bool = False
    examples: bool = False
    contains_optimizer: bool = False
    structural: tuple[str, ...] = ()


BATCH_LIKE = mlp_batch()


def tilted(rho, num_samples=2, radius=0.3):
    return bisam_jax.tilted_sam(rho, num_samples=num_samples, radius=radius)


METHODS = {
    "sam": Method(bisam_jax.sam),
    "bisam": Method(bisam_jax.bisam, needs_q=True),
    "asam": Method(bisam_jax.asam),
    "gsam": Method(bisam_jax.gsam, needs_clean=True),
    "bilateral": Method(
        lambda rho: bisam_jax.bilateral_sam(rho, rho_min=rho), loss_calls=2, needs_clean=True
    ),
    "friendly": Method(bisam_jax.friendly_sam, state_bytes=4),
    "sparse fisher": Method(bisam_jax.sparse_sam_fisher, state_bytes=1, examples=True),
    "sparse dynamic": Method(bisam_jax.sparse_sam_dynamic, state_bytes=1),
    "tilted": Method(
        tilted,
        takes_grad_fn=False,
        takes_gradient_of_q=False,
        structural=("num_samples",),
    ),
    "efficient": Method(
        bisam_jax.efficient_sam, takes_grad_fn=False, examples=True, structural=("gamma",)
    ),
    "look": Method(lambda rho: bisam_jax.look_sam(rho, k=2), needs_clean=True, state_bytes=4),
    "weighted": Method(bisam_jax.weighted_sam, needs_clean=True),
    "functional": Method(bisam_jax.functional_sam, takes_grad_fn=False),
}
UPDATING = {
    "sampa": Method(
        lambda rho: bisam_jax.sampa(optax.sgd(1.0), rho, batch_like=BATCH_LIKE),
        contains_optimizer=True,
    ),
    "sampa, bilevel": Method(
        lambda rho: bisam_jax.sampa(optax.sgd(1.0), rho, batch_like=BATCH_LIKE, bilevel=True),
        contains_optimizer=True,
        needs_q=True,
    ),
}


def arguments_of(batch: dict, *, q: str | None = None, params=None) -> dict:
    """Returns every argument of `update` that a method may use, made by hand.

    Args:
        batch: the examples.
        q: how Q is given: "function", "gradient" (at `params`) or None.
        params: where the gradient of Q is taken.
    """

    def examples(params, indices=None):
        part = batch if indices is None else jax.tree.map(lambda x: x[indices], batch)
        return losses_of_batch(params, part)

    def mean(params, batch):
        return losses_of_batch(params, batch).mean()

    def scores(params):
        return bisam_jax.fisher_scores(mean, params, batch, microbatch_size=4)

    def q_fn(params):
        return perturbation_loss_of_batch(params, batch)

    arguments = {
        "loss_fn": bisam_jax.logits_loss(
            lambda params: logits_of_batch(params, batch),
            lambda logits: cross_entropy(logits, batch).mean(),
        ),
        "example_losses_fn": examples,
        "fisher_scores_fn": scores,
        "batch": batch,
        "batch_loss_fn": mean,
    }
    if q == "function":
        arguments |= {
            "perturbation_loss_fn": q_fn,
            "batch_perturbation_loss_fn": perturbation_loss_of_batch,
        }
    elif q == "gradient":
        arguments["perturbation_grads"] = jax.grad(q_fn)(params)
    return arguments


def loss_of_params(batch: dict) -> Callable:
    return lambda params: losses_of_batch(params, batch).mean()


def mean_of_trees(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves).mean(0), *trees)
