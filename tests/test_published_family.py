"""The family's numbers from the authors' own implementations, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bisam_jax import (
    bilateral_sam,
    efficient_sam,
    friendly_sam,
    gsam,
    sam,
    sampa,
    sparse_sam_dynamic,
    sparse_sam_fisher,
    tilted_sam,
)
from tests.published import (
    CASES,
    GOLDEN,
    TOLERANCE,
    assert_close,
    base_optimizer,
    logits_and_stats,
    smooth_cross_entropy,
    tree_of,
)

# The sparse and the efficient code add 1e-7 to the gradient's norm.
LOOSE = 1e-8

pytestmark = [pytest.mark.optimized, pytest.mark.usefixtures("float64")]


class Case:
    """One golden file: its numbers, its losses, and a loop over its steps."""

    def __init__(self, name, tolerance=TOLERANCE):
        self.golden = np.load(GOLDEN / f"{name}.npz")
        self.hyperparameters = CASES[name]["hyperparameters"]
        self.base = base_optimizer(self.hyperparameters)
        self.tolerance = tolerance

    def tree(self, prefix, *index):
        return {
            leaf: value[index] if index else value
            for leaf, value in tree_of(self.golden, prefix).items()
        }

    def batch(self, t):
        return jnp.asarray(self.golden["batch/x"][t]), jnp.asarray(self.golden["batch/y"][t])

    def losses(self, params, batch):
        logits, _ = logits_and_stats(params, batch[0])
        return smooth_cross_entropy(logits, batch[1], self.hyperparameters["label_smoothing"])

    def loss(self, params, batch):
        return self.losses(params, batch).mean()

    def check(self, actual, prefix, *index):
        for leaf, expected in self.tree(prefix, *index).items():
            assert_close(actual[leaf], expected, f"{prefix} {leaf} {index}", self.tolerance)

    def run(self, tx, state=None, numbers=lambda t, params: {}, extra_args=None, after=None):
        """Steps through the file.

        `numbers` returns the numbers of step t other than its batch. `extra_args` makes the
        arguments of `update` from them. `after` is called with the state of each step.
        """

        @jax.jit
        def step(params, state, base_state, batch, numbers):
            clean = jax.grad(self.loss)(params, batch)
            arguments = {"loss_fn": functools.partial(self.loss, batch=batch)}
            if extra_args is not None:
                arguments |= extra_args(batch, clean, numbers)
            grads, state = tx.update(clean, state, params, **arguments)
            updates, base_state = self.base.update(grads, base_state, params)
            return grads, optax.apply_updates(params, updates), state, base_state

        params = self.tree("init")
        state = tx.init(params) if state is None else state
        base_state = self.base.init(params)
        for t in range(len(self.golden["batch/x"])):
            grads, params, state, base_state = step(
                params, state, base_state, self.batch(t), numbers(t, params)
            )
            self.check(grads, "descent_grad", t)
            self.check(params, "traj", t + 1)
            if after is not None:
                after(t, state)


def test_gsam():
    case = Case("gsam_mlp")
    case.run(gsam(case.hyperparameters["rho"], case.hyperparameters["alpha"]))


def test_bilateral():
    case = Case("bilateral_intended_mlp")
    case.run(bilateral_sam(case.hyperparameters["rho_max"], case.hyperparameters["rho_min"]))


def test_friendly():
    case = Case("friendly_mlp")
    h = case.hyperparameters

    def after(t, state):
        case.check(optax.tree.get(state, "mean_gradient"), "ema_grad", t)

    case.run(friendly_sam(h["rho"], h["sigma"], h["lmbda"]), after=after)


@pytest.mark.parametrize("together", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["tsam_lo_mlp", "tsam_hi_mlp"])
def test_tilted(name, together):
    case = Case(name)
    h = case.hyperparameters
    tx = tilted_sam(
        h["rho"], h["tilt"], h["num_samples"], h["radius"], h["scaling"], together=together
    )
    case.run(
        tx,
        numbers=lambda t, params: case.tree("noise_standard_normal", t),
        extra_args=lambda batch, clean, noise: {"noise": noise},
    )


def test_sparse_fisher_with_the_stale_gradient_of_the_published_code():
    case = Case("ssam_fisher_mlp", LOOSE)
    h = case.hyperparameters
    updates_after = np.flatnonzero(case.golden["mask_updated"])
    every = int(np.diff(updates_after)[0])
    # Published: no mask at first, then a new mask after the steps 0, `every`, 2 * `every`.
    tx = sparse_sam_fisher(h["rho"], h["sparsity"], update_every=every)
    start = tx.init(case.tree("init"))
    state = optax.tree.set(start, fisher_count=jnp.asarray(every - 1, jnp.int32))

    @jax.jit
    def gradient(params, x, y):
        def cross_entropy(params):
            logits, _ = logits_and_stats(params, x[None])
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y[None])[0]

        return jax.grad(cross_entropy)(params)

    def scores(t, params):
        if t - 1 not in updates_after:
            return params  # not looked at
        number = list(updates_after).index(t - 1)
        x, y = case.golden["fisher/x"][number], case.golden["fisher/y"][number]
        gradients = [gradient(params, *example) for example in zip(x, y, strict=True)]
        gradients[0] = optax.tree.add(gradients[0], case.tree("descent_grad", t - 1))
        squares = [jax.tree.map(jnp.square, gradient) for gradient in gradients]
        return functools.reduce(optax.tree.add, squares)

    def extra_args(batch, clean, scores):
        return {"fisher_scores_fn": lambda params: scores}

    def after(t, state):
        mask = optax.tree.get(state, "fisher_mask")
        for leaf, expected in case.tree("mask", t).items():
            np.testing.assert_array_equal(mask[leaf], expected.astype(bool))

    case.run(tx, state, scores, extra_args, after)


def test_sparse_dynamic():
    case = Case("ssam_dynamic_mlp", LOOSE)
    h = case.hyperparameters
    steps = len(case.golden["batch/x"])
    every = steps // h["epochs"]

    def drop_rate(count):
        epoch = (count // every).astype(jnp.float64)
        return h["drop_rate"] * 0.5 * (1 + jnp.cos(jnp.pi * epoch / h["epochs"]))

    tx = sparse_sam_dynamic(h["rho"], h["sparsity"], drop_rate, update_every=every)
    masks = jax.tree.map(lambda m: m.astype(bool), case.tree("mask"))
    first = jax.tree.map(lambda m: m[0], masks)
    state = optax.tree.set(jax.jit(tx.init)(case.tree("init")), dynamic_mask=first)

    def extra_args(batch, clean, growth_scores):
        # Published here: drop the smallest gradients, grow at random.
        return {"drop_scores": jax.tree.map(jnp.abs, clean), "growth_scores": growth_scores}

    def after(t, state):
        mask = optax.tree.get(state, "dynamic_mask")
        for leaf in mask:
            np.testing.assert_array_equal(mask[leaf], masks[leaf][t + 1])

    def growth_scores(t, params):
        return case.tree("growth_score", t // every)

    case.run(tx, state, growth_scores, extra_args, after)


def test_efficient():
    case = Case("esam_mlp", LOOSE)
    h = case.hyperparameters
    examples = case.golden["batch/y"].shape[1]
    # Published: strictly above the k-th largest rise, so one example fewer than k.
    kept = int(examples * h["gamma"]) - 1
    assert (case.golden["selected"].sum(-1) == kept).all()
    tx = efficient_sam(h["rho"], h["beta"], kept / examples)

    def extra_args(batch, clean, numbers):
        x, y = batch

        def example_losses_fn(params, indices):
            chosen = (x, y) if indices is None else (x[indices], y[indices])
            return case.losses(params, chosen)

        return {"example_losses_fn": example_losses_fn}

    case.run(tx, extra_args=extra_args)


def test_sampa():
    case = Case("sampa_mlp")
    h = case.hyperparameters
    tx = sampa(case.base, h["rho"], h["lambda"], batch_like=case.batch(0))
    params = case.tree("init")
    state = tx.init(params)
    update = jax.jit(functools.partial(tx.update, batch_loss_fn=case.loss))
    for t in range(len(case.golden["batch/x"])):
        updates, state = update(None, state, params, batch=case.batch(t))
        params = optax.apply_updates(params, updates)
        case.check(state.lookahead_gradient, "ascent_grad", t)
        case.check(params, "traj", t + 1)


def test_momentum_sam_is_a_step_along_minus_the_momentum():
    """Momentum-SAM needs no name of its own: its ascent gradient is minus the momentum."""
    case = Case("msam_mlp")
    h = case.hyperparameters
    tx, base = sam(h["rho"]), optax.sgd(h["lr"], momentum=h["momentum"])
    params = case.tree("clean_traj", 0)
    state, base_state = tx.init(params), base.init(params)

    @jax.jit
    def step(params, state, base_state, batch):
        points = []

        def grad_fn(point):
            points.append(point)
            # Weight decay at the perturbed weights, as published.
            decay = optax.tree.scale(h["weight_decay"], point)
            return optax.tree.add(jax.grad(case.loss)(point, batch), decay)

        ascent = optax.tree.scale(-1.0, optax.tree.get(base_state, "trace"))
        grads, state = tx.update(None, state, params, grad_fn=grad_fn, perturbation_grads=ascent)
        updates, base_state = base.update(grads, base_state)
        return points[0], optax.apply_updates(params, updates), state, base_state

    for t in range(len(case.golden["batch/x"])):
        point, params, state, base_state = step(params, state, base_state, case.batch(t))
        case.check(point, "traj", t)
        case.check(params, "clean_traj", t + 1)
        case.check(optax.tree.get(base_state, "trace"), "momentum_buffer", t)
